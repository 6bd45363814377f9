# SPDX-License-Identifier: Apache-2.0
"""Changes of light that are no defect."""

import torch

from .perlin import random_perlin_noise
from .random import log_uniform, uniform

__all__ = ["vary_illumination"]


def vary_illumination(images: torch.Tensor, strength: float = 0.1) -> torch.Tensor:
    """Brighten and darken good images, as a whole and smoothly from place to place.

    A painter's faint stains teach a detector to notice small changes of brightness. Without this, it also notices
    those between two exposures, or between one brick and the next.

    Args:
        images: ``(B, C, H, W)`` float32 in [0, 1].
        strength: Half the range of the gain of the whole image; its smooth part has a standard deviation of up to
            half as much, and so has the offset.

    Returns:
        Images of the same shape in [0, 1], from the device's global random generator.
    """
    batch, _, height, width = images.shape
    device = images.device
    frequency = log_uniform(batch, 0.7, 4.0, device=device)
    angle = uniform(batch, 0.0, torch.pi, device=device)
    step = max(1, max(height, width) // 32)  # eight in the smallest lattice cell
    noise = random_perlin_noise(height, width, torch.stack([frequency, frequency], dim=1), angle, step).unsqueeze(1)
    gain = 1 + uniform(batch, -strength, strength, device=device).view(-1, 1, 1, 1)
    uneven = noise * uniform(batch, 0.0, strength / 2, device=device).view(-1, 1, 1, 1)
    offset = uniform(batch, -strength / 2, strength / 2, device=device).view(-1, 1, 1, 1)
    return (images * (gain + uneven) + offset).clamp(0, 1)
