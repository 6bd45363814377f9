# SPDX-License-Identifier: Apache-2.0
"""Antialiased resizing, as PyTorch does it, and in matrix products for exports.

ONNX runtimes lack antialiasing or, like OpenVINO, silently leave it out. It is a weighted mean along each axis, hence
two matrix products, and those every runtime knows.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch.nn import functional
from torchvision.transforms.v2 import Transform

from .tracing import is_exporting

__all__ = ["AntialiasedResize", "antialiased_resize"]


class AntialiasedResize(Transform):
    """Resizing with antialiasing for exports, as torchvision's ``Resize(size, interpolation, antialias=True)``.

    Args:
        size: Height and width of the result in pixels.
        interpolation: ``"bilinear"`` or ``"bicubic"``.

    Example:
        >>> AntialiasedResize((64, 48))(torch.rand(2, 3, 200, 100)).shape
        torch.Size([2, 3, 64, 48])
    """

    def __init__(self, size: tuple[int, int], interpolation: Literal["bilinear", "bicubic"] = "bilinear") -> None:
        super().__init__()
        self.size = size
        self.interpolation = interpolation

    def transform(self, images: torch.Tensor, params: dict[str, Any]) -> torch.Tensor:
        """Resize images ``(..., H, W)``, floating point, to ``(..., *size)``."""
        del params
        return _resize_by_matrices(images, self.size, self.interpolation)

    def extra_repr(self) -> str:
        """Show the settings in ``print(model)``."""
        return f"size={self.size}, interpolation={self.interpolation}"


def antialiased_resize(
    images: torch.Tensor, size: Sequence[int], interpolation: Literal["bilinear", "bicubic"] = "bilinear"
) -> torch.Tensor:
    """Resize images ``(..., H, W)``, floating point, to ``(..., *size)``, also where a graph is exported."""
    if is_exporting():
        return _resize_by_matrices(images, size, interpolation)
    flat = images.reshape(-1, 1, *images.shape[-2:])
    resized = functional.interpolate(flat, size=tuple(size), mode=interpolation, antialias=True)
    return resized.reshape(*images.shape[:-2], *size)


def _resize_by_matrices(images: torch.Tensor, size: Sequence[int], interpolation: str) -> torch.Tensor:
    sides = images.shape[-2:]
    # Sides are symbols while an export of any size is traced, where a comparison would freeze them.
    if all(isinstance(side, int) for side in (*sides, *size)) and sides == tuple(size):
        return images
    rows, columns = (_weights(old, new, images, interpolation) for old, new in zip(sides, size, strict=True))
    return rows @ images @ columns.T


def _weights(old: int, new: int, like: torch.Tensor, interpolation: str) -> torch.Tensor:
    """Share of each old pixel in each new one, ``(new, old)``; each row adds up to 1.

    It falls with the distance of the pixels' centres, counted in new pixels, or in old ones where these are wider.
    """
    scale = torch.ones(new, dtype=like.dtype, device=like.device) * old / new
    centres = (torch.arange(new, dtype=like.dtype, device=like.device) + 0.5) * scale
    positions = torch.arange(old, dtype=like.dtype, device=like.device) + 0.5
    distance = (positions - centres.unsqueeze(1)).abs() / scale.clamp_min(1.0).unsqueeze(1)
    if interpolation == "bilinear":
        share = (1 - distance).clamp_min(0.0)
    else:  # Keys (1981), a = -0.5
        near = (1.5 * distance - 2.5) * distance.square() + 1
        far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
        share = torch.where(distance < 1, near, torch.where(distance < 2, far, torch.zeros_like(far)))
    return share / share.sum(dim=1, keepdim=True)
