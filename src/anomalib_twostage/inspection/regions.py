# SPDX-License-Identifier: Apache-2.0
"""Defects as a list: where they are, how large and how sure, as Python objects and as CSV or JSON files.

Coordinates count pixels from the upper left corner, x to the right and y down. A box runs from its first pixel up to,
but not including, ``x_max`` and ``y_max``, so that its width is ``x_max - x_min``.
"""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from lightning.pytorch import LightningModule, Trainer
from skimage.measure import label, regionprops

from anomalib_twostage.common.files import written_whole

from .placement import FilePlacement
from .prediction_reader import PredictionReader, gathered

__all__ = ["Box", "Region", "RegionWriter", "find_regions", "write_regions"]

_SUFFIXES = (".csv", ".json")
_EDGES = ("x_min", "y_min", "x_max", "y_max")
_COLUMNS = ("image_path", *_EDGES, *(f"image_{edge}" for edge in _EDGES), "area", "mean_score", "peak_score")


class Box(NamedTuple):
    """A rectangle of pixels: ``x_min <= x < x_max`` and ``y_min <= y < y_max``."""

    x_min: int
    y_min: int
    x_max: int
    y_max: int


@dataclass(frozen=True)
class Region:
    """A connected region of an image's predicted mask; pixels that touch at a corner are connected.

    Attributes:
        image_path: File of the image; ``None`` if unknown.
        box: Bounding box in pixels of the anomaly map, which is as large as the image after pre-processing.
        image_box: Bounding box in pixels of the image's file, rounded outwards; ``None`` if unknown.
        area: Pixels of the anomaly map.
        mean_score: Mean of the anomaly map over the region; in [0, 1] if anomalib normalised it, as it does by default.
        peak_score: Highest value of the anomaly map in the region.
    """

    image_path: str | None
    box: Box
    image_box: Box | None
    area: int
    mean_score: float
    peak_score: float


def find_regions(
    prediction: Any,
    *,
    threshold: float | None = None,
    min_area: int = 1,
    image_sizes: Sequence[tuple[int, int] | None] | None = None,
) -> list[Region]:
    """List the defects of a prediction.

    Args:
        prediction: What a model, an engine or an inferencer of anomalib returned, for one image (``ImageItem``) or
            several (``ImageBatch``, ``InferenceBatch``); or anomaly maps alone, a tensor or array ``(H, W)``,
            ``(B, H, W)``, ``(B, 1, H, W)`` or ``(B, H, W, 1)``.
        threshold: Pixels of the anomaly map above it belong to a region. By default the predicted mask says.
        min_area: Smallest region in pixels of the anomaly map; smaller ones are left out.
        image_sizes: Height and width of each image's file, to scale the boxes to, where the map shows the whole image;
            ``None`` for an image whose size is unknown.

    Returns:
        The regions, image by image; within an image, the one with the highest peak first.

    Raises:
        ValueError: If there is no anomaly map, or neither mask nor threshold; if shapes or numbers do not fit; if
            ``min_area`` is below 1.

    Example:
        >>> anomaly_map = torch.zeros(32, 48)
        >>> anomaly_map[8:12, 20:30] = 0.75
        >>> (region,) = find_regions(anomaly_map, threshold=0.5)
        >>> region.box, region.area, region.peak_score
        (Box(x_min=20, y_min=8, x_max=30, y_max=12), 40, 0.75)
    """
    _check_area(min_area)
    is_map = isinstance(prediction, torch.Tensor | np.ndarray)
    anomaly_map = prediction if is_map else getattr(prediction, "anomaly_map", None)
    if anomaly_map is None:
        msg = f"Regions are read from an anomaly map, and this {type(prediction).__name__} has none."
        raise ValueError(msg)
    maps = _planes(anomaly_map)
    if threshold is not None:
        masks = maps > float(threshold)  # a post-processor's is a tensor
    elif not is_map and getattr(prediction, "pred_mask", None) is not None:
        masks = _planes(prediction.pred_mask) > 0
    else:
        msg = "There is no predicted mask: give a threshold, or predict with a post-processor that thresholds."
        raise ValueError(msg)
    if masks.shape != maps.shape:
        msg = f"The predicted mask has shape {masks.shape}, the anomaly map {maps.shape}: they must be alike."
        raise ValueError(msg)
    paths = None if is_map else getattr(prediction, "image_path", None)
    paths = [None] * len(maps) if paths is None else [paths] if isinstance(paths, str | Path) else list(paths)
    sizes = [None] * len(maps) if image_sizes is None else list(image_sizes)
    for name, values in (("image paths", paths), ("image_sizes", sizes)):
        if len(values) != len(maps):
            msg = f"There are {len(values)} {name} for {len(maps)} anomaly maps."
            raise ValueError(msg)
    return [
        region
        for values, mask, path, size in zip(maps, masks, paths, sizes, strict=True)
        for region in _regions_of(values, mask, None if path is None else str(path), size, min_area)
    ]


def write_regions(regions: Iterable[Region], path: str | Path) -> None:
    """Write regions to a CSV file with one row, or a JSON file with one object, per region.

    The columns are those of :class:`Region`, with its boxes as four columns each: ``x_min`` to ``y_max`` and
    ``image_x_min`` to ``image_y_max``. What is unknown is empty in CSV and null in JSON, which has null also for scores
    that are not finite. What in a path is no text, as in names from old file systems, is escaped. A file that is there
    is replaced once the new one is complete.

    Args:
        regions: Any number of regions, also none.
        path: Where to write; ``.csv`` or ``.json``. Folders are made.

    Raises:
        ValueError: If the path has another suffix.
        OSError: If the file cannot be written.
    """
    path = Path(path)
    _check_suffix(path)
    rows = [_row(region) for region in regions]
    escaped: dict[str, Any] = {"encoding": "utf-8", "errors": "backslashreplace"}  # not all paths are text
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(path) as partial:
            if path.suffix == ".json":
                rows = [{name: _or_null(value) for name, value in row.items()} for row in rows]
                partial.write_text(json.dumps(rows, indent=2, ensure_ascii=False, allow_nan=False) + "\n", **escaped)
            else:
                pd.DataFrame(rows, columns=_COLUMNS, dtype=object).to_csv(partial, index=False, **escaped)
    except OSError as error:
        msg = f"Cannot write regions to {path} ({error.strerror or error}): free the place or choose another."
        raise OSError(msg) from error


class RegionWriter(PredictionReader):
    """Writes the defects of all tested or predicted images to one file per run.

    The file lies in the run's folder, beside the pictures: ``regions_test.csv`` after ``anomalib test`` or ``train``,
    ``regions_predict.csv`` after ``anomalib predict``. It is written at the end, complete or not at all, and has no
    rows for images without a region. Give the callback to the trainer: ``Engine(callbacks=[RegionWriter()])``, or
    ``trainer.callbacks`` in a configuration.

    Boxes are also given in pixels of the image's file, if there is one. Crops, pads and resizing by torchvision's
    transforms are followed, in the data set's augmentations and in the model's pre-processor. After other transforms
    of one's own, and after turns, the box in the file is left empty.

    Args:
        min_area: Smallest region in pixels of the anomaly map.
        threshold: Pixels of the anomaly map, as the post-processor leaves it, above this belong to a region. By default
            the predicted mask says.
        file_format: ``"csv"`` or ``"json"``.
        output_dir: Folder of the file; by default the run's.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> from anomalib.engine import Engine
        >>> engine = Engine(callbacks=[RegionWriter(min_area=20)])
    """

    def __init__(
        self,
        min_area: int = 1,
        threshold: float | None = None,
        file_format: str = "csv",
        output_dir: str | Path | None = None,
    ) -> None:
        super().__init__()
        _check_area(min_area)
        _check_suffix(Path(f"regions.{file_format}"))
        self.min_area = min_area
        self.threshold = threshold
        self.file_format = file_format
        self.output_dir = output_dir
        self._regions: list[Region] = []
        self._placement: FilePlacement | None = None

    def begin(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Start an empty list."""
        del trainer, pl_module, stage
        self._regions, self._placement = [], None

    def read(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> None:
        """Add the regions of a batch.

        Raises:
            ValueError: If it has no anomaly map, or neither mask nor threshold.
        """
        if self._placement is None:
            self._placement = FilePlacement(trainer, pl_module)
        for region in find_regions(batch, threshold=self.threshold, min_area=self.min_area):
            map_height, map_width = batch.anomaly_map.shape[-2:]
            found = None
            if region.image_path is not None:
                found = self._placement.find(region.image_path, (map_height, map_width))
            box = None if found is None else found[0].to_file(region.box, found[1])
            self._regions.append(region if box is None else replace(region, image_box=Box(*box)))

    def finish(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write ``regions_test`` or ``regions_predict``.

        Raises:
            OSError: If the file cannot be written.
        """
        del pl_module
        regions = gathered(trainer, self._regions, lambda region: region.image_path)
        if trainer.is_global_zero:
            folder = Path(trainer.default_root_dir if self.output_dir is None else self.output_dir)
            write_regions(regions, folder / f"regions_{stage}.{self.file_format}")


def _regions_of(
    values: np.ndarray, mask: np.ndarray, path: str | None, size: tuple[int, int] | None, min_area: int
) -> list[Region]:
    regions = []
    for found in regionprops(label(mask, connectivity=2), intensity_image=values):
        if found.area < min_area:
            continue
        y_min, x_min, y_max, x_max = found.bbox
        box = Box(x_min, y_min, x_max, y_max)
        regions.append(
            Region(
                image_path=path,
                box=box,
                image_box=None if size is None else _scaled(box, values.shape, size),
                area=int(found.area),
                mean_score=float(found.intensity_mean),
                peak_score=float(found.intensity_max),
            )
        )
    return sorted(regions, key=lambda region: -region.peak_score)


def _scaled(box: Box, map_size: Sequence[int], image_size: tuple[int, int]) -> Box:
    """The smallest box of whole pixels of the image that covers a box of the map."""
    (map_height, map_width), (height, width) = map_size, map(int, image_size)  # NumPy's numbers are none of JSON's
    return Box(
        x_min=box.x_min * width // map_width,
        y_min=box.y_min * height // map_height,
        x_max=-(-box.x_max * width // map_width),
        y_max=-(-box.y_max * height // map_height),
    )


def _planes(values: Any) -> np.ndarray:
    """Maps of any accepted shape as an array ``(B, H, W)``; half precision as single."""
    tensor = torch.as_tensor(values).detach().cpu()
    tensor = tensor.float() if tensor.is_floating_point() else tensor
    if tensor.ndim == 4 and 1 in (tensor.shape[1], tensor.shape[3]):
        # Where an inferencer of anomalib hands out arrays, masks have their channel last.
        tensor = tensor.squeeze(1 if tensor.shape[1] == 1 else 3)
    if tensor.ndim == 2:
        tensor = tensor.unsqueeze(0)
    if tensor.ndim != 3:
        accepted = "(H, W), (B, H, W), (B, 1, H, W) or (B, H, W, 1)"
        msg = f"An anomaly map or mask must be {accepted}, got shape {tuple(tensor.shape)}."
        raise ValueError(msg)
    return tensor.numpy()


def _row(region: Region) -> dict[str, Any]:
    """A region as one flat record."""
    image_box = region.image_box or (None, None, None, None)
    scores = (region.mean_score, region.peak_score)
    return dict(zip(_COLUMNS, (region.image_path, *region.box, *image_box, region.area, *scores), strict=True))


def _or_null(value: Any) -> Any:
    """The value as JSON can hold it, which knows neither infinity nor NaN."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _check_area(min_area: int) -> None:
    if min_area < 1:
        msg = f"min_area must be at least 1 pixel, got {min_area}."
        raise ValueError(msg)


def _check_suffix(path: Path) -> None:
    if path.suffix not in _SUFFIXES:
        msg = f"Regions are written as .csv or .json, got {path.name!r}."
        raise ValueError(msg)
