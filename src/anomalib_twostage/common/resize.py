# SPDX-License-Identifier: Apache-2.0
"""Antialiased resizing for exports.

anomalib resizes with antialiasing while it trains, tests and predicts, and without while it exports, because ONNX
runtimes lack it or, like OpenVINO, silently leave it out. On images larger than the model's input an export then sees
other pixels than the model learned from, and gives other maps. Antialiased bilinear resizing is a weighted mean along
each axis, hence two matrix products, and those every runtime knows.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from anomalib.pre_processing.utils.transform import get_exportable_transform
from torch import nn
from torchvision.transforms.v2 import Compose, InterpolationMode, Normalize, Resize, Transform

__all__ = ["AntialiasedResize", "antialiased_resize", "exportable_transform", "shows_whole_image"]

_BILINEAR = ("bilinear", InterpolationMode.BILINEAR, 2)  # as torchvision's versions keep it; 2 is Pillow's


class AntialiasedResize(Transform):
    """Bilinear resizing with antialiasing, as torchvision's ``Resize(size, antialias=True)``, in matrix products.

    Args:
        size: Height and width of the result in pixels.

    Example:
        >>> AntialiasedResize((64, 48))(torch.rand(2, 3, 200, 100)).shape
        torch.Size([2, 3, 64, 48])
    """

    def __init__(self, size: tuple[int, int]) -> None:
        super().__init__()
        self.size = size

    def transform(self, images: torch.Tensor, params: dict[str, Any]) -> torch.Tensor:
        """Resize images ``(..., H, W)``, floating point, to ``(..., *size)``."""
        del params
        return antialiased_resize(images, self.size)

    def extra_repr(self) -> str:
        """Show the settings in ``print(model)``."""
        return f"size={self.size}"


def antialiased_resize(images: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """Resize images ``(..., H, W)``, floating point, to ``(..., *size)``; see :class:`AntialiasedResize`."""
    sides = images.shape[-2:]
    # Sides are symbols while an export of any size is traced, where a comparison would freeze them.
    if all(isinstance(side, int) for side in (*sides, *size)) and sides == tuple(size):
        return images
    rows, columns = (_weights(old, new, images) for old, new in zip(sides, size, strict=True))
    return rows @ images @ columns.T


def _weights(old: int, new: int, like: torch.Tensor) -> torch.Tensor:
    """Share of each old pixel in each new one, ``(new, old)``: a triangle as wide as a new pixel, at least an old one.

    Positions are those of pixel centres; each row adds up to 1.
    """
    scale = torch.ones(new, dtype=like.dtype, device=like.device) * old / new
    centres = (torch.arange(new, dtype=like.dtype, device=like.device) + 0.5) * scale
    positions = torch.arange(old, dtype=like.dtype, device=like.device) + 0.5
    distance = (positions - centres.unsqueeze(1)).abs() / scale.clamp_min(1.0).unsqueeze(1)
    triangle = (1 - distance).clamp_min(0.0)
    return triangle / triangle.sum(dim=1, keepdim=True)


def exportable_transform(transform: Transform | None) -> Transform | None:
    """Make a transform exportable as anomalib does, except that resizing stays antialiased.

    That holds for bilinear resizing to a given height and width. Of other resizing anomalib takes the antialiasing.

    Args:
        transform: Transform of a pre-processor. It is left as it is.

    Returns:
        A transform for the same images, or ``None`` for ``None``.
    """
    if isinstance(transform, Compose):
        return Compose([exportable_transform(one) for one in transform.transforms])
    if (
        isinstance(transform, Resize)
        and transform.antialias
        and transform.interpolation in _BILINEAR
        and len(transform.size or ()) == 2
    ):
        height, width = transform.size
        return AntialiasedResize((height, width))
    return get_exportable_transform(copy.deepcopy(transform))


def shows_whole_image(transform: nn.Module | None) -> bool:
    """Whether a transform neither crops nor pads, so that what comes out shows what the image's file shows."""
    if isinstance(transform, Compose):
        return all(shows_whole_image(part) for part in transform.transforms)
    return transform is None or isinstance(transform, Resize | Normalize)
