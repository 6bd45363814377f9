# SPDX-License-Identifier: Apache-2.0
"""Batched Perlin gradient noise (Perlin, "Improving Noise", 2002)."""

import math

import torch
from torch.nn import functional

__all__ = ["perlin_noise", "random_perlin_noise"]

# Random gradients repeat after this many lattice cells; no field drawn here spans more.
_PERIOD = 64


def perlin_noise(y: torch.Tensor, x: torch.Tensor, gradients: torch.Tensor) -> torch.Tensor:
    """Evaluate gradient noise at given points.

    Args:
        y: Vertical lattice coordinates ``(B, H, W)``, float32, one unit per lattice cell.
        x: Horizontal lattice coordinates ``(B, H, W)``.
        gradients: One gradient ``(dy, dx)`` per lattice point, ``(B, R, C, 2)``; the lattice repeats.

    Returns:
        Noise ``(B, H, W)``: zero at every lattice point, with the given gradient there, and C2-continuous between.
    """
    rows, columns = gradients.shape[1:3]
    top, left = y.floor(), x.floor()
    fraction_y, fraction_x = y - top, x - left
    # With its first row and column once more at the end, the lattice repeats without a division per corner.
    gradients = torch.cat([gradients, gradients[:, :1]], dim=1)
    gradients = torch.cat([gradients, gradients[:, :, :1]], dim=2)
    home = (top.long().remainder(rows) * (columns + 1) + left.long().remainder(columns)).flatten(1)
    flat = gradients.flatten(1, 2)
    gradient_y, gradient_x = flat[..., 0].contiguous(), flat[..., 1].contiguous()

    def corner(down: int, right: int) -> torch.Tensor:
        index = home + (down * (columns + 1) + right)
        dy, dx = gradient_y.gather(1, index).view_as(y), gradient_x.gather(1, index).view_as(x)
        return dy * (fraction_y - down) + dx * (fraction_x - right)

    def fade(t: torch.Tensor) -> torch.Tensor:
        return t * t * t * (t * (t * 6 - 15) + 10)

    weight_x = fade(fraction_x)
    upper = torch.lerp(corner(0, 0), corner(0, 1), weight_x)
    lower = torch.lerp(corner(1, 0), corner(1, 1), weight_x)
    return torch.lerp(upper, lower, fade(fraction_y))


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
    device, batch = frequency.device, frequency.shape[0]
    side = max(height, width)
    # The middle of each block of step by step pixels.
    rows = torch.arange(-(-height // step), device=device, dtype=torch.float32) * step + (step - 1) / 2
    columns = torch.arange(-(-width // step), device=device, dtype=torch.float32) * step + (step - 1) / 2
    grid_y, grid_x = rows.view(1, -1, 1) / side, columns.view(1, 1, -1) / side
    cosine, sine = angle.cos().view(-1, 1, 1), angle.sin().view(-1, 1, 1)
    offset = torch.rand(batch, 2, 1, 1, device=device) * _PERIOD
    y = (cosine * grid_y + sine * grid_x) * frequency[:, 0].view(-1, 1, 1) + offset[:, 0]
    x = (cosine * grid_x - sine * grid_y) * frequency[:, 1].view(-1, 1, 1) + offset[:, 1]
    direction = torch.rand(batch, _PERIOD, _PERIOD, device=device) * (2 * math.pi)
    noise = perlin_noise(y, x, torch.stack([direction.sin(), direction.cos()], dim=-1))
    noise = noise.sub_(noise.mean(dim=(1, 2), keepdim=True))
    noise = noise.div_(noise.square().mean(dim=(1, 2), keepdim=True).sqrt().clamp_min(1e-6))
    if step == 1:
        return noise
    noise = functional.interpolate(noise.unsqueeze(1), scale_factor=step, mode="bilinear").squeeze(1)
    return noise[:, :height, :width].contiguous()
