# SPDX-License-Identifier: Apache-2.0
"""What the painters paint with: four kinds of paint, drawn per image.

DRAEM buys breadth with 5,640 photographs. Breadth here comes from what is always there: the image itself (shaded,
blurred, sharpened), other images of the batch (turned, scaled, recoloured), photographs, and procedural textures.
"""

import math

import torch
from torch.nn import functional

from .perlin import random_perlin_noise
from .random import choose, log_uniform, uniform

__all__ = ["mix_paint", "move"]

# Shares of: the image itself, blurred or sharpened; training images, moved; photographs; procedural textures.
_SHARES = (0.25, 0.25, 0.25, 0.25)
_OWN, _MOVED, _PHOTOGRAPH = range(3)
_LUMINANCE = (0.299, 0.587, 0.114)


def mix_paint(images: torch.Tensor, textures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw one full picture of paint per image.

    Args:
        images: RGB ``(B, 3, H, W)`` float32 in [0, 1].
        textures: Photographs, uint8 ``(N, 3, S, S)``.

    Returns:
        Paint ``(B, 3, H, W)`` float32, about [0, 1], which the painter clamps; and where it comes from training
        images, ``(B,)`` bool: such paint can be of the same material as what it covers.
    """
    batch, _, height, width = images.shape
    device = images.device
    paint = torch.empty_like(images)
    # Drawn on the host, so that each kind is computed only for the images that get it.
    kind = torch.multinomial(torch.tensor(_SHARES), batch, replacement=True)
    for number in kind.unique().tolist():
        index = (kind == number).nonzero().flatten().to(device)
        count = len(index)
        if number == _OWN:
            drawn = _blur_or_sharpen(images[index])
        elif number == _MOVED:
            others = images[torch.randint(batch, (count,), device=device)]
            drawn = torch.where(
                choose(count, 0.5, device=device).view(-1, 1, 1, 1),
                move(images[index], height, width, reach=0.15),
                move(others, height, width),
            )
        elif number == _PHOTOGRAPH:
            picked = textures[torch.randint(len(textures), (count,), device=device)]
            drawn = move(picked.float() / 255, height, width)
        else:
            drawn = _procedural(count, height, width, device)
        paint.index_copy_(0, index, drawn)
    moved = (kind == _MOVED).to(device)
    paint = torch.where((moved & choose(batch, 0.5, device=device)).view(-1, 1, 1, 1), paint, _recolour(paint))
    return _match_greyness(paint, images), moved


def _blur_or_sharpen(images: torch.Tensor) -> torch.Tensor:
    """Take away all fine detail, or add up to twice as much of it."""
    height, width = images.shape[-2:]
    coarse = functional.interpolate(images, size=(max(1, height // 12), max(1, width // 12)), mode="area")
    blurred = functional.interpolate(coarse, size=(height, width), mode="bilinear", align_corners=False)
    amount = uniform(len(images), -1.5, 2.0, device=images.device).clamp_min(-1).view(-1, 1, 1, 1)
    return images + amount * (images - blurred)


def move(images: torch.Tensor, height: int, width: int, reach: float = 1.0) -> torch.Tensor:
    """Turn, scale, mirror and shift pictures ``(B, 3, h, w)`` at random, to ``(B, 3, height, width)``.

    ``reach`` 1 moves anywhere; a small one displaces a little, as where a part is bent or chipped.
    """
    batch, device = len(images), images.device
    angle = uniform(batch, -math.pi, math.pi, device=device) * reach
    scale_y = log_uniform(batch, 0.3**reach, 1.5**reach, device=device)
    scale_x = scale_y * log_uniform(batch, 0.7**reach, 1.4**reach, device=device)
    if reach == 1.0:
        scale_x = torch.where(choose(batch, 0.5, device=device), -scale_x, scale_x)
    shift = (torch.rand(batch, 2, device=device) - 0.5) * reach
    cosine, sine = angle.cos(), angle.sin()
    matrix = torch.stack(
        [scale_x * cosine, -scale_y * sine, shift[:, 0], scale_x * sine, scale_y * cosine, shift[:, 1]],
        dim=1,
    ).view(batch, 2, 3)
    grid = functional.affine_grid(matrix, [batch, 3, height, width], align_corners=False)
    return functional.grid_sample(images, grid, padding_mode="reflection", align_corners=False)


def _procedural(batch: int, height: int, width: int, device: torch.device) -> torch.Tensor:
    """Two layers of coloured noise over a base colour; the finer one sometimes bent into stripes."""

    def layer(lowest: float, highest: float) -> torch.Tensor:
        frequency = log_uniform(batch, lowest, highest, device=device)
        stretch = log_uniform(batch, 0.25, 4.0, device=device)
        axes = torch.stack([frequency * stretch, frequency / stretch], dim=1).clamp(0.5, 64)
        return random_perlin_noise(height, width, axes, uniform(batch, 0, math.pi, device=device)).unsqueeze(1)

    fine = layer(4.0, 64.0)
    stripes = (fine * uniform(batch, 1.0, 8.0, device=device).view(-1, 1, 1, 1)).sin()
    fine = torch.where(choose(batch, 0.3, device=device).view(-1, 1, 1, 1), stripes, fine)
    base, strong, weak = torch.rand(3, batch, 3, 1, 1, device=device)
    return base + (strong - 0.5) * 0.6 * fine + (weak - 0.5) * 0.4 * layer(0.5, 8.0)


def _recolour(paint: torch.Tensor) -> torch.Tensor:
    """Change contrast, brightness, tint and the order of the channels."""
    batch, device = len(paint), paint.device
    mean = paint.mean(dim=(2, 3), keepdim=True)
    contrast = uniform(batch, 0.4, 1.6, device=device)
    contrast = torch.where(choose(batch, 0.15, device=device), -contrast, contrast)
    contrast = torch.where(choose(batch, 0.15, device=device), torch.zeros_like(contrast), contrast)
    brightness = torch.randn(batch, 1, 1, 1, device=device) * 0.25
    tint = torch.randn(batch, 3, 1, 1, device=device) * 0.1
    paint = (paint - mean) * contrast.view(-1, 1, 1, 1) + mean + brightness + tint
    return torch.where(choose(batch, 0.25, device=device).view(-1, 1, 1, 1), paint.roll(1, dims=1), paint)


def _match_greyness(paint: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """Take the colour out of some paint, and of most of the paint for grey images, where colour gives it away."""
    batch, device = len(paint), paint.device
    luminance = (paint * torch.tensor(_LUMINANCE, device=device).view(1, 3, 1, 1)).sum(dim=1, keepdim=True)
    chroma = (images.amax(dim=1) - images.amin(dim=1)).mean(dim=(1, 2))
    probability = torch.where(chroma < 0.02, 0.85, 0.25)
    grey = torch.rand(batch, device=device) < probability
    return torch.where(grey.view(-1, 1, 1, 1), luminance, paint)
