# SPDX-License-Identifier: Apache-2.0
"""Predictions and pages for the tests of the inspection page."""

import json
import struct
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import torch
from anomalib.data import ImageBatch

SIDE = 32


def predictions(
    scores: list[float], truths: list[bool] | None = None, threshold: float = 0.5, **fields: Any
) -> ImageBatch:
    """A batch of grey images; each map is flat at a tenth of its score but for a square of 8 x 8 pixels at the score.

    The square moves to the right with the number of the image.
    """
    values = torch.tensor(scores)
    maps = (values / 10).view(-1, 1, 1).repeat(1, SIDE, SIDE)
    for i, value in enumerate(values):
        maps[i, 4:12, i % 24 : i % 24 + 8] = value
    labels = None if truths is None else torch.tensor(truths)
    settings = {
        "image": torch.full((len(scores), 3, SIDE, SIDE), 0.5),
        "anomaly_map": maps,
        "pred_score": values,
        "pred_label": values > threshold,
        "pred_mask": maps > threshold,
        "gt_label": labels,
        "image_path": [f"parts/{'bad' if truths and truths[i] else 'good'}/{i:03}.png" for i in range(len(scores))],
    }
    if truths is not None:
        settings["gt_mask"] = (maps > 0.5 * values.view(-1, 1, 1)) & labels.view(-1, 1, 1)
    return ImageBatch(**{**settings, **fields})


def huge_image() -> bytes:
    """The head of a BMP file of 400 megapixels, which Pillow refuses to open."""
    return b"BM" + struct.pack("<IIIIiiHHIIiiII", 54, 0, 54, 40, 20_000, 20_000, 1, 24, 0, 0, 0, 0, 0, 0)


class _Data(HTMLParser):
    """Finds the page's data, as a browser would."""

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.text, self.scripts, self.remarks = False, "", 0, []
        self.in_remarks = False

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.scripts += tag == "script"
        self.inside = tag == "script" and ("id", "data") in attributes
        self.in_remarks = tag == "li"

    def handle_endtag(self, tag: str) -> None:
        self.inside = self.in_remarks = False

    def handle_data(self, text: str) -> None:
        self.text += text if self.inside else ""
        if self.in_remarks:
            self.remarks.append(text)


def read_page(folder: Path) -> tuple[dict[str, Any], list[str]]:
    """The data of a page, and its remarks."""
    parser = _Data()
    parser.feed((folder / "index.html").read_text(encoding="utf-8"))
    assert parser.scripts == 5
    return json.loads(parser.text), parser.remarks
