# SPDX-License-Identifier: Apache-2.0
"""Batched Perlin gradient noise (Perlin, "Improving Noise", 2002)."""

import math

import torch
from torch.nn import functional

__all__ = ["affine", "lattice", "perlin_noise", "random_gradients", "random_perlin_noise"]

# Random gradients repeat after this many lattice cells. All fields of a batch come from one lattice, each from a
# random place of it: wide enough that two hardly meet, small enough for the cache.
_PERIOD = 128

DEVIATION = 0.2488
"""Standard deviation of the noise of random gradients of length one."""


def perlin_noise(y: torch.Tensor, x: torch.Tensor, gradients: torch.Tensor) -> torch.Tensor:
    """Evaluate gradient noise at given points.

    Args:
        y: Vertical lattice coordinates ``(B, H, W)``, floating point, one unit per lattice cell.
        x: Horizontal lattice coordinates ``(B, H, W)``.
        gradients: One gradient ``(dy, dx)`` per lattice point, ``(B, R, C, 2)``, or ``(1, R, C, 2)`` for all fields;
            the lattice repeats.

    Returns:
        Noise ``(B, H, W)``: zero at every lattice point, with the given gradient there, and C2-continuous between.
    """
    rows, columns = gradients.shape[1:3]
    top, left = y.floor(), x.floor()
    fraction_y, fraction_x = y - top, x - left
    # With its first row and column once more at the end, the lattice repeats without a division per corner.
    gradients = torch.cat([gradients, gradients[:, :1]], dim=1)
    gradients = torch.cat([gradients, gradients[:, :, :1]], dim=2)
    home = _wrap(top, rows).mul_(columns + 1).add_(_wrap(left, columns)).long()
    if len(gradients) > 1:
        home += (torch.arange(len(gradients), device=home.device) * ((rows + 1) * (columns + 1))).view(-1, 1, 1)
    home = home.flatten()
    gradient_y, gradient_x = gradients[..., 0].flatten(), gradients[..., 1].flatten()
    before_y, before_x = fraction_y - 1, fraction_x - 1

    def corner(down: int, right: int) -> torch.Tensor:
        index = home + (down * (columns + 1) + right)
        dy, dx = gradient_y.index_select(0, index).view_as(y), gradient_x.index_select(0, index).view_as(y)
        return dy.mul_(before_y if down else fraction_y).addcmul_(dx, before_x if right else fraction_x)

    def fade(t: torch.Tensor) -> torch.Tensor:
        return (t * 6).sub_(15).mul_(t).add_(10).mul_(t).mul_(t).mul_(t)

    weight_x = fade(fraction_x)
    upper = corner(0, 0).lerp_(corner(0, 1), weight_x)
    lower = corner(1, 0).lerp_(corner(1, 1), weight_x)
    return upper.lerp_(lower, fade(fraction_y))


def random_perlin_noise(
    height: int,
    width: int,
    frequency: torch.Tensor,
    angle: torch.Tensor,
    step: int = 1,
) -> torch.Tensor:
    """Draw one random noise field per image, from the global random generator of the device.

    Args:
        height: Height in pixels.
        width: Width in pixels.
        frequency: Lattice cells along the longer image side, per image and axis (vertical, horizontal) of the
            turned lattice, ``(B, 2)``.
        angle: Turn of the lattice in radians, ``(B,)``.
        step: Evaluate one pixel in ``step`` by ``step`` and enlarge bilinearly. Fields of which every lattice cell
            spans some steps hardly change, and cost that much less.

    Returns:
        Noise ``(B, height, width)``, float32, zero mean and unit standard deviation per image.
    """
    device, side = frequency.device, max(height, width)
    # The middle of each block of step by step pixels.
    rows = torch.arange(-(-height // step), device=device, dtype=torch.float32) * step + (step - 1) / 2
    columns = torch.arange(-(-width // step), device=device, dtype=torch.float32) * step + (step - 1) / 2
    matrix = lattice(frequency / side, angle).view(6, -1, 1, 1)
    y, x = affine(matrix, rows.view(1, -1, 1), columns.view(1, 1, -1))
    noise = perlin_noise(y, x, random_gradients(device))
    noise = noise.sub_(noise.mean(dim=(1, 2), keepdim=True))
    noise = noise.div_(noise.square().mean(dim=(1, 2), keepdim=True).sqrt().clamp_min(1e-6))
    if step == 1:
        return noise
    noise = functional.interpolate(noise.unsqueeze(1), scale_factor=step, mode="bilinear").squeeze(1)
    return noise[:, :height, :width].contiguous()


def random_gradients(device: torch.device) -> torch.Tensor:
    """Draw gradients of length one, ``(1, R, C, 2)``."""
    direction = torch.rand(1, _PERIOD, _PERIOD, device=device) * (2 * math.pi)
    return torch.stack([direction.sin(), direction.cos()], dim=-1)


def lattice(frequency: torch.Tensor, angle: torch.Tensor) -> torch.Tensor:
    """Lay a turned lattice over each image, from a random place on.

    Args:
        frequency: Lattice cells per pixel, ``(B, 2)``.
        angle: Turn in radians, ``(B,)``.

    Returns:
        What leads from pixels to lattice coordinates: the entries of two by three matrices, ``(6, B)``.
    """
    cosine, sine = angle.cos(), angle.sin()
    offset = torch.rand(2, len(angle), device=angle.device) * _PERIOD
    down, along = frequency[:, 0], frequency[:, 1]
    return torch.stack([cosine * down, sine * down, offset[0], -sine * along, cosine * along, offset[1]])


def affine(matrix: torch.Tensor, y: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Apply two by three matrices, whose entries are ``(6, ...)``, to points."""
    return matrix[0] * y + (matrix[1] * x + matrix[2]), matrix[3] * y + (matrix[4] * x + matrix[5])


def _wrap(place: torch.Tensor, period: int) -> torch.Tensor:
    """Whole numbers modulo a period; remainder() takes five times as long."""
    return place.sub((place / period).floor_(), alpha=period)
