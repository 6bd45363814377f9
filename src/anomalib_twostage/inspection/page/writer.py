# SPDX-License-Identifier: Apache-2.0
"""The folder of the inspection page, written whole or not at all."""

import math
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import replace
from datetime import datetime
from itertools import count
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader

from .pictures import heat_tables, save_map, save_mask, save_pictures, save_stages, stretch_map
from .records import Prediction, read_predictions
from .rows import PageHead, Row, differing_rows, images_of, remarks_on

__all__ = ["PageWriter", "check_settings", "write_page"]

_FILES = Path(__file__).parent / "files"
_ASSETS = ("page.css", "chart.js", "gallery.js", "large.js", "page.js")
_FOLDERS = ("images", "thumbs", "maps", "truths", "stages")
_PICTURE = re.compile(r"(images|thumbs|stages)/(\d+-)?\d{5,}\.jpg|(maps|truths)/(\d+-)?\d{5,}\.png")
_OF_FILE_MANAGERS = (".DS_Store", "Thumbs.db", "desktop.ini")  # which leave them where somebody has looked
_MARK = '<meta name="generator" content="anomalib-twostage">'  # by which a page of ours is known; see index.html
_RAW = (
    "The predictions have no verdicts: if no post-processor has normalised their scores either, they are raw, and "
    "{:.4g} is where the page begins."
)
_MOST_REGIONS = 50  # of one image; more are no list to read


class PageWriter:
    """Takes predictions batch by batch, and writes a page of them in the end.

    Pictures go to a folder beside the page's, which takes its place when it is complete.

    Args:
        folder: Folder of the page. If it is there already, it must be empty or hold an older page, which is replaced,
            and nothing else.
        picture_size: Longer side of the large pictures in pixels.
        min_area: Smallest region in pixels of the anomaly map.
        partial: Folder for the pictures, if another process has made it.
        prefix: What the names of this process's files begin with.

    Raises:
        ValueError: If a number is out of range.
        OSError: If the folder cannot be written, or holds something else.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        picture_size: int = 512,
        min_area: int = 1,
        partial: Path | None = None,
        prefix: str = "",
    ) -> None:
        check_settings(picture_size, min_area)
        self.folder = Path(folder).resolve()
        self.picture_size = picture_size
        self.min_area = min_area
        self.prefix = prefix
        self.rows: list[Row] = []
        if partial is None:
            _check_replaceable(self.folder)
            partial = self.folder.with_name(f".{self.folder.name}.{os.getpid()}")
            try:
                shutil.rmtree(partial, ignore_errors=True)
                for name in _FOLDERS:
                    (partial / name).mkdir(parents=True)
            except OSError as error:
                raise _cannot_write(self.folder, error) from error
        self.partial = partial

    def add(self, batch: Any, *, pixel_threshold: float = 0.5, stages: Any = None, whole: bool = True) -> None:
        """Add the images of a batch.

        Args:
            batch: What a model, an engine or an inferencer of anomalib returned, for one image or several.
            pixel_threshold: Pixels above it belong to a region, where there is no predicted mask.
            stages: What the stages of this package's model gave for these images.
            whole: Whether the model saw the whole of each file, so that it can be shown in place of what it saw.

        Raises:
            TypeError: If it is no batch of images.
            ValueError: If it has neither scores nor maps.
            OSError: If the pictures cannot be written.
        """
        for index, prediction in enumerate(read_predictions(batch, pixel_threshold, self.min_area)):
            try:
                self.rows.append(self._row(prediction, stages, index, whole))
            except OSError as error:
                raise _cannot_write(self.folder, error) from error

    def finish(self, head: PageHead, rows: Iterable[Row] | None = None) -> Path:
        """Write the page.

        Args:
            head: What it says of all images.
            rows: The images, by default those that were added here.

        Returns:
            Its file ``index.html``.

        Raises:
            ValueError: If there are no images.
            FileExistsError: If something else has come to lie in the folder meanwhile. It stays, and the page lies
                beside the folder.
            OSError: If it cannot be written.
        """
        rows = self.rows if rows is None else list(rows)
        if not rows:
            self.discard()
            msg = "There are no predictions, so there is nothing to inspect: predict some images first."
            raise ValueError(msg)
        try:
            self._write(head, rows)
            stranger = next(_strangers(self.folder), None)  # again, as a run takes long
            if stranger is None:
                _swap(self.partial, self.folder)
                return self.folder / "index.html"
            beside = next(place for n in count(2) if not (place := Path(f"{self.folder}-{n}")).exists())
            self.partial.rename(beside)
        except OSError as error:
            self.discard()
            raise _cannot_write(self.folder, error) from error
        msg = (
            f"While the inspection page was made, {stranger} came to lie where it should go. The new page is "
            f"{beside / 'index.html'}; next time, name another output folder, which nothing else writes to."
        )
        raise FileExistsError(msg)

    def discard(self) -> None:
        """Remove what was written so far; an older page stays."""
        shutil.rmtree(self.partial, ignore_errors=True)

    def _row(self, prediction: Prediction, stages: Any, index: int, whole: bool) -> Row:
        key = f"{self.prefix}{len(self.rows) + 1:05}"
        size = save_pictures(prediction, whole, self.picture_size, self._file("images", key), self._file("thumbs", key))
        has_picture = size is not None
        map_range = None
        values = prediction.anomaly_map
        if values is not None:
            map_range = save_map(values, self._file("maps", key))
            size = size or (values.shape[1], values.shape[0])
        has_truth_mask = prediction.truth_mask is not None and bool(prediction.truth_mask.any())
        if has_truth_mask:
            assert prediction.truth_mask is not None
            save_mask(prediction.truth_mask, self._file("truths", key))
        has_stages = stages is not None and size is not None
        if has_stages:
            assert size is not None
            save_stages(stages, index, size, self._file("stages", key))
        regions = []
        for region in prediction.regions[:_MOST_REGIONS]:
            assert values is not None
            height, width = values.shape
            x_min, y_min, x_max, y_max = region.box
            box = (x_min / width, y_min / height, x_max / width, y_max / height)
            # JSON has no other numbers than finite ones.
            scores = (score if math.isfinite(score) else None for score in (region.mean_score, region.peak_score))
            regions.append([*(round(edge, 5) for edge in box), region.area, *scores])
        return Row(
            key=key,
            path=prediction.path,
            score=prediction.score,
            verdict=prediction.verdict,
            truth=prediction.truth,
            size=size,
            map_range=map_range,
            has_picture=has_picture,
            has_truth_mask=has_truth_mask,
            has_stages=has_stages,
            score_is_peak=prediction.score_is_peak,
            num_regions=len(prediction.regions),
            regions=regions,
        )

    def _file(self, folder: str, key: str) -> Path:
        return self.partial / folder / f"{key}.{'png' if folder in ('maps', 'truths') else 'jpg'}"

    def _write(self, head: PageHead, rows: list[Row]) -> None:
        ranges = {row.map_range for row in rows if row.map_range}
        low, high = (min(low for low, _ in ranges), max(high for _, high in ranges)) if ranges else (0.0, 1.0)
        for row in rows:
            if row.map_range and row.map_range != (low, high):
                stretch_map(self._file("maps", row.key), row.map_range, (low, high))
        data = {
            "imageThreshold": head.image_threshold,
            "pixelThreshold": head.pixel_threshold,
            "mapRange": [low, high],
            "images": images_of(rows),
        }
        environment = Environment(loader=FileSystemLoader(_FILES), autoescape=True)
        environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
        html = environment.get_template("index.html").render(
            title=head.title,
            written=f"{datetime.now():%Y-%m-%d %H:%M}",
            remarks=[*head.remarks, *remarks_on(head, rows)],
            data=data,
            heat=heat_tables(),
            assets=_ASSETS,
        )
        for name in _ASSETS:
            shutil.copyfile(_FILES / name, self.partial / name)
        for name in _FOLDERS:
            if not any((self.partial / name).iterdir()):
                (self.partial / name).rmdir()
        (self.partial / "index.html").write_text(html, encoding="utf-8")


def write_page(
    predictions: Iterable[Any],
    folder: str | Path = "inspection",
    *,
    image_sensitivity: float = 0.5,
    pixel_sensitivity: float = 0.5,
    title: str = "Inspection",
    picture_size: int = 512,
    min_area: int = 1,
    whole: bool = True,
) -> Path:
    """Write an inspection page of predictions that are there already.

    Args:
        predictions: What ``Engine.predict`` returned, or a list of what an inferencer did; for the names of the images
            and for large pictures their field ``image_path`` must be set.
        folder: Folder of the page. If it is there already, it must be empty or hold an older page, which is replaced,
            and nothing else.
        image_sensitivity: What the predictions were made with, for the threshold: 1 less it.
        pixel_sensitivity: Likewise, for the maps.
        title: Headline.
        picture_size: Longer side of the large pictures in pixels.
        min_area: Smallest region in pixels of the anomaly map.
        whole: Whether the model saw the whole of each file, so that it can be shown in place of what it saw.

    Returns:
        Its file ``index.html``.

    Raises:
        TypeError: If a prediction is no batch of images.
        ValueError: If there are no predictions, or they have neither scores nor maps; if their verdicts are not those
            of this sensitivity; if a number is out of range.
        OSError: If the folder cannot be written, or holds something else.
    """
    head = PageHead(title, 1 - image_sensitivity, 1 - pixel_sensitivity)
    writer = PageWriter(folder, picture_size=picture_size, min_area=min_area)
    try:
        for batch in predictions:
            writer.add(batch, pixel_threshold=head.pixel_threshold, whole=whole)
        differing = differing_rows(head, writer.rows)
        if differing:
            row = differing[0]
            msg = (
                f"{len(differing)} of {len(writer.rows)} verdicts are not those of image_sensitivity "
                f"{image_sensitivity:g}, among them that of {row.path or row.key} with a score of {row.score:.4g}: "
                "give the image_sensitivity that the predictions were made with."
            )
            raise ValueError(msg)
        if all(row.verdict is None for row in writer.rows):
            head = replace(head, remarks=[_RAW.format(head.image_threshold)])
        return writer.finish(head)
    except BaseException:
        writer.discard()
        raise


def check_settings(picture_size: int, min_area: int) -> None:
    """Refuse numbers that are out of range."""
    for name, value, least in (("picture_size", picture_size, 64), ("min_area", min_area, 1)):
        if value < least:
            msg = f"{name} must be at least {least}, got {value}."
            raise ValueError(msg)


def _check_replaceable(folder: Path) -> None:
    try:
        stranger = next(_strangers(folder), None)
    except OSError as error:
        raise _cannot_write(folder, error) from error
    if stranger == folder:
        msg = f"Cannot write the inspection page to {folder}, which is a file: name another folder."
        raise FileExistsError(msg)
    if folder.is_mount():
        msg = (
            f"The folder {folder} is a mount point, which nothing can take the place of: "
            f"name a folder in it, such as {folder / 'inspection'}."
        )
        raise OSError(msg)
    if stranger is not None:
        name = stranger.relative_to(folder)
        msg = (
            f"The folder {folder} holds something else than an inspection page ({name}): empty it or name another one."
        )
        raise FileExistsError(msg)


def _strangers(folder: Path) -> Iterator[Path]:
    """What would be lost if a page took the place of this folder, or file, and is not of an older page."""
    if not folder.exists():
        return
    if not folder.is_dir():
        yield folder
        return
    index = folder / "index.html"
    is_page = index.is_file() and _MARK in index.read_text("utf-8", errors="replace")[:1000]
    for entry in sorted(folder.iterdir()):
        if not is_page:
            yield entry
        elif entry.name in _FOLDERS and entry.is_dir():
            inside = (path for path in entry.iterdir() if path.name not in _OF_FILE_MANAGERS)
            yield from (path for path in inside if not _PICTURE.fullmatch(f"{entry.name}/{path.name}"))
        elif entry.name not in (index.name, *_ASSETS, *_OF_FILE_MANAGERS):
            yield entry


def _swap(new: Path, folder: Path) -> None:
    """Put a complete folder in the place of an older one."""
    old = new.with_name(f"{new.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    try:
        new.rename(folder)
    except OSError:
        if old.exists():
            old.rename(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _cannot_write(folder: Path, error: OSError) -> OSError:
    reason = error.strerror or error
    msg = f"Cannot write the inspection page to {folder} ({reason}): free the place or name another folder."
    return OSError(msg)
