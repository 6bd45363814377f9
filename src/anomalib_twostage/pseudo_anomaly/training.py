# SPDX-License-Identifier: Apache-2.0
"""What is trained on: good images in varied light, painted. The preview shows the same."""

from collections.abc import Callable
from typing import NamedTuple

import torch

from .illumination import vary_illumination

__all__ = ["TrainingImages", "training_images"]


class TrainingImages(NamedTuple):
    """Images to train on, and how they came about."""

    lit: torch.Tensor
    """The images in varied light, ``(B, C, H, W)`` float32 in [0, 1]."""
    painted: torch.Tensor
    """What is trained on, ``(B, C, H, W)``: differs from ``lit`` where ``mask`` is 1."""
    mask: torch.Tensor
    """``(B, 1, H, W)`` float32 in {0, 1}."""


@torch.compiler.disable  # shapes follow what is painted, and a compiler would start anew for each
def training_images(
    images: torch.Tensor,
    painter: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
    mask: torch.Tensor | None = None,
) -> TrainingImages:
    """Vary the light of images and paint them, unless they come painted.

    Args:
        images: ``(B, C, H, W)`` float32 in [0, 1].
        painter: What paints a batch, and returns it with its masks ``(B, 1, H, W)``.
        mask: Where images come painted, ``(B, H, W)`` or ``(B, 1, H, W)`` in {0, 1}; ``None`` if they do not.

    Returns:
        What is trained on, from the device's global random generator.
    """
    lit = vary_illumination(images)
    if mask is None:
        # As plain tensors: compilers stumble over torchvision's masks.
        return TrainingImages(lit, *(part.as_subclass(torch.Tensor) for part in painter(lit)))
    return TrainingImages(lit, lit, mask.reshape(len(images), 1, *images.shape[-2:]).to(images.dtype))
