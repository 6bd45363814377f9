# SPDX-License-Identifier: Apache-2.0
"""Where the pixels of an anomaly map lie in the image's file, after crops, pads and resizing on the way."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms import v2

from anomalib_twostage.common.datasets import transforms_of
from anomalib_twostage.common.transforms import EACH_IS_APPLIED, RANDOM_APPLY, RANDOM_CHOICE, parts

__all__ = ["FilePlacement", "Placement", "find_placement"]

_CONTAINERS = (*EACH_IS_APPLIED, *RANDOM_APPLY, *RANDOM_CHOICE)
_TRIALS = 16  # transforms that place an image so many times alike are taken to do so always
_EXACT = 1e-3  # pixels by which rounding in single precision may be off


class Placement(NamedTuple):
    """Where a map lies in a file: ``x`` columns of the map are ``left + x * column_width`` columns of the file."""

    top: float
    left: float
    row_height: float
    """Height of a row of the map in the file; negative where the image is upside down."""
    column_width: float
    """Width of a column of the map in the file; negative where the image is mirrored."""

    def to_file(self, edges: tuple[int, int, int, int], file_size: tuple[int, int]) -> tuple[int, int, int, int] | None:
        """The smallest box of whole pixels of the file that covers a box of the map.

        Args:
            edges: ``x_min``, ``y_min``, ``x_max`` and ``y_max`` in the map.
            file_size: Height and width of the file.

        Returns:
            The same in the file, or ``None`` if the box lies outside it, in what was padded.
        """
        x = sorted(self.left + edge * self.column_width for edge in edges[::2])
        y = sorted(self.top + edge * self.row_height for edge in edges[1::2])
        x_min, y_min = (max(0, math.floor(low + _EXACT)) for low in (x[0], y[0]))
        x_max, y_max = (math.ceil(high - _EXACT) for high in (x[1], y[1]))
        x_max, y_max = min(x_max, file_size[1]), min(y_max, file_size[0])
        return (x_min, y_min, x_max, y_max) if x_min < x_max and y_min < y_max else None


def find_placement(
    transforms: Sequence[Any], file_size: tuple[int, int], map_size: tuple[int, int]
) -> Placement | None:
    """Follow an image through transforms.

    Torchvision's transforms move boxes along with images, so three tiny boxes tell where the image goes.

    Args:
        transforms: What the image goes through; ``None`` among them does nothing.
        file_size: Height and width of the image's file.
        map_size: Height and width of the anomaly map, which is stretched over what comes out.

    Returns:
        Where the map lies in the file, or ``None`` if transforms do not say, or place the image by chance or turned.
    """
    if not all(transform is None or _is_known(transform) for transform in transforms):
        return None
    height, width = file_size
    middle = torch.tensor([width / 2, height / 2], dtype=torch.float64)
    step = torch.tensor([width / 64, height / 64], dtype=torch.float64)
    points = torch.stack([middle, middle + step * torch.tensor([1, 0]), middle + step * torch.tensor([0, 1])])
    corners = torch.cat([points - step / 16, points + step / 16], dim=1)
    try:
        with isolate_rng(include_cuda=False):
            torch.default_generator.manual_seed(0)
            outcomes = [_moved(transforms, corners, file_size) for _ in range(_TRIALS)]
    except (TypeError, ValueError, RuntimeError):  # a transform that cannot do without the image
        return None
    moved, canvas = outcomes[0]
    if any(other != canvas or not torch.equal(boxes, moved) for boxes, other in outcomes):
        return None
    sides = moved[:, 2:] - moved[:, :2]
    points = (moved[:, :2] + moved[:, 2:]) / 2
    across, down = (points[1] - points[0]) / step[0], (points[2] - points[0]) / step[1]
    scale = torch.stack([across[0], down[1]])
    turned = max(abs(across[1]), abs(down[0])) > 1e-6
    cut = not torch.allclose(sides, (scale.abs() * step / 8).expand(3, 2), rtol=1e-3)
    if turned or cut or not (scale.abs() > 0).all():
        return None
    start = middle - points[0] / scale  # of what comes out, in the file
    stretch = torch.tensor([canvas[1] / map_size[1], canvas[0] / map_size[0]], dtype=torch.float64) / scale
    return Placement(*start.flip(0).tolist(), *stretch.flip(0).tolist())


class FilePlacement:
    """Finds where maps lie in image files while a trainer tests or predicts.

    Args:
        trainer: The trainer, whose data sets may transform images.
        pl_module: The model, whose pre-processor may.
    """

    def __init__(self, trainer: Trainer, pl_module: LightningModule) -> None:
        loaders = trainer.predict_dataloaders if trainer.predicting else trainer.test_dataloaders
        loaders = loaders if isinstance(loaders, list | tuple) else [loaders]
        own = getattr(getattr(pl_module, "pre_processor", None), "transform", None)
        before: list[Any] = []
        for loader in loaders:
            places = [getattr(*place) for place in transforms_of(getattr(loader, "dataset", None))] or [None]
            before += [transform for transform in places if all(transform is not known for known in before)]
        # Data sets that transform differently may each be where an image comes from.
        self._transforms = [before[0], own] if len(before) == 1 else None
        self._found: dict[tuple[tuple[int, int], tuple[int, int]], Placement | None] = {}

    def find(self, path: str | Path, map_size: tuple[int, int]) -> tuple[Placement, tuple[int, int]] | None:
        """Where a map lies in a file.

        Args:
            path: The file; images that a datamodule makes have none.
            map_size: Height and width of the map.

        Returns:
            The placement, and height and width of the file; ``None`` if it is unknown.
        """
        if self._transforms is None or not Path(path).is_file():
            return None
        with Image.open(path) as image:
            file_size = (image.height, image.width)
        key = (file_size, map_size)
        if key not in self._found:
            self._found[key] = find_placement(self._transforms, *key)
        placement = self._found[key]
        return None if placement is None else (placement, file_size)

    def shows_whole_files(self, paths: Sequence[str | Path], map_size: tuple[int, int]) -> bool:
        """Whether maps show the whole of their files, nothing else, and not mirrored, as far as there are files."""
        for path in paths:
            found = self.find(path, map_size)
            if found is None:
                if Path(path).is_file():
                    return False
                continue
            placement, file_size = found
            shown = (map_size[0] * placement.row_height, map_size[1] * placement.column_width)
            if not all(abs(x) < 1 for x in (*placement[:2], shown[0] - file_size[0], shown[1] - file_size[1])):
                return False
        return True


def _is_known(transform: Any) -> bool:
    """Whether a transform is torchvision's own, and so moves boxes as it moves images."""
    if isinstance(transform, _CONTAINERS):
        return all(_is_known(part) for part in parts(transform))
    return type(transform).__module__.startswith(v2.__name__) and not isinstance(transform, v2.Lambda)


def _moved(
    transforms: Sequence[Any], corners: torch.Tensor, canvas: tuple[int, int]
) -> tuple[torch.Tensor, tuple[int, int]]:
    """Corners ``(N, 4)`` after transforms, and the size of the image they are in."""
    boxes = tv_tensors.BoundingBoxes(corners, format="XYXY", canvas_size=canvas)
    for transform in transforms:
        boxes = boxes if transform is None else transform(boxes)
    return boxes.as_subclass(torch.Tensor), tuple(boxes.canvas_size)
