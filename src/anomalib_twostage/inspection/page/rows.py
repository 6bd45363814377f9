# SPDX-License-Identifier: Apache-2.0
"""What the page knows of its images, and what it says of them all."""

import math
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from .records import NO_MAP

__all__ = ["PageHead", "Row", "differing_rows", "images_of", "remarks_on"]


@dataclass(frozen=True)
class PageHead:
    """What the page says of all images.

    Attributes:
        title: Headline.
        image_threshold: Scores above it are defective.
        pixel_threshold: Pixels of the map above it are marked.
        remarks: Lines that a reader should know.
    """

    title: str
    image_threshold: float = 0.5
    pixel_threshold: float = 0.5
    remarks: Sequence[str] = ()


@dataclass(frozen=True)
class Row:
    """What the page keeps of one image; its pictures are files named by ``key``."""

    key: str
    path: str | None
    score: float
    verdict: bool | None
    truth: bool | None
    size: tuple[int, int] | None
    map_range: tuple[float, float] | None
    has_picture: bool
    has_truth_mask: bool
    has_stages: bool
    score_is_peak: bool
    num_regions: int
    regions: list[list[float]] = field(default_factory=list)


def differing_rows(head: PageHead, rows: list[Row]) -> list[Row]:
    """Images whose verdict is not that of the threshold."""
    return [row for row in rows if row.verdict is not None and row.verdict != (row.score > head.image_threshold)]


def images_of(rows: list[Row]) -> list[dict[str, Any]]:
    """The images as the page's script knows them."""
    parents = [os.path.dirname(row.path) for row in rows if row.path]  # noqa: PTH120  # names are kept as they are
    try:
        common = os.path.commonpath(parents) if parents else ""
    except ValueError:  # some absolute, some not, or on several drives
        common = ""
    images = []
    for row in rows:
        parent, name = os.path.split(row.path) if row.path else ("", f"image {row.key.lstrip('0')}")
        folder = os.path.relpath(parent, common) if common and parent else parent
        images.append(
            {
                "key": row.key,
                "name": name,
                "folder": "" if folder == "." else folder,
                "path": row.path or "",
                "score": row.score if math.isfinite(row.score) else None,
                "truth": row.truth,
                "size": row.size,
                "picture": row.has_picture,
                "map": row.map_range is not None,
                "truthMask": row.has_truth_mask,
                "stages": row.has_stages,
                "numRegions": row.num_regions,
                "regions": row.regions,
            }
        )
    return images


def remarks_on(head: PageHead, rows: list[Row]) -> list[str]:
    """What a reader should know of these images."""
    remarks = []
    lost = sum(not math.isfinite(row.score) for row in rows)
    if lost:
        remarks.append(
            f"{lost} of {len(rows)} scores are no numbers (NaN). anomalib calls such images normal; here they stand "
            "first, and count nowhere."
        )
    if any(row.score_is_peak for row in rows):
        remarks.append("There are no scores: the highest value of each map is taken, as in anomalib's exports.")
    if any(row.map_range is None for row in rows):
        remarks.append(f"The predictions have {NO_MAP}: there are no contours and regions.")
    differing = len([row for row in differing_rows(head, rows) if math.isfinite(row.score)])
    if differing:
        remarks.append(
            f"In {differing} of {len(rows)} images the model's own verdict is not what its score and threshold say. "
            "This page goes by the score."
        )
    twice = sum(count > 1 for path, count in Counter(row.path for row in rows).items() if path)
    if twice:
        remarks.append(f"{twice} files were predicted more than once; each prediction is shown.")
    return remarks
