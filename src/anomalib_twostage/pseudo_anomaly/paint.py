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

__all__ = ["mix_paint", "move", "tint"]

# Shares of: the image itself, blurred or sharpened; training images, moved; photographs; procedural textures.
_SHARES = (0.25, 0.25, 0.25, 0.25)
_OWN, _MOVED, _PHOTOGRAPH = range(3)
_LUMINANCE = (0.299, 0.587, 0.114)


def mix_paint(images: torch.Tensor, textures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw one full picture of paint per image, in its own colours.

    Args:
        images: RGB ``(B, 3, H, W)`` float32 in [0, 1].
        textures: Photographs, uint8 ``(N, 3, S, S)``.

    Returns:
        Paint ``(B, 3, H, W)`` float32, about [0, 1]; and the numbers of the images whose paint comes from training
        images, int64: such paint can be of the same material as what it covers.
    """
    batch, _, height, width = images.shape
    device = images.device
    paint = torch.empty_like(images, memory_format=torch.contiguous_format)
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
    return paint, (kind == _MOVED).nonzero().flatten().to(device)


def tint(paint: torch.Tensor, number: torch.Tensor, moved: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """Change the colours of paint: contrast, brightness, tint, order of the channels, greyness.

    Args:
        paint: The pixels of the paint, ``(3, N)`` float32.
        number: The image that each pixel is for, ``(N,)`` int64 in ``0 .. B - 1``.
        moved: Numbers of the images whose paint comes from training images: half of it keeps its colours.
        images: What is painted on, ``(B, 3, H, W)`` float32 in [0, 1].

    Returns:
        Pixels ``(3, N)`` float32, about [0, 1], which the painter clamps.
    """
    batch, device = len(images), images.device
    count = torch.zeros(batch, device=device).index_add_(0, number, torch.ones_like(paint[0])).clamp_min_(1)
    mean = torch.zeros(3, batch, device=device).index_add_(1, number, paint) / count
    contrast = uniform(batch, 0.4, 1.6, device=device)
    contrast = torch.where(choose(batch, 0.15, device=device), -contrast, contrast)
    contrast = torch.where(choose(batch, 0.15, device=device), torch.zeros_like(contrast), contrast)
    shift = torch.randn(batch, device=device) * 0.25 + torch.randn(3, batch, device=device) * 0.1
    keep = torch.zeros(batch, dtype=torch.bool, device=device)
    keep[moved] = choose(len(moved), 0.5, device=device)
    contrast = torch.where(keep, 1.0, contrast)
    shift = torch.where(keep, 0.0, mean * (1 - contrast) + shift)
    turned = choose(batch, 0.25, device=device) & ~keep
    paint = torch.where(turned[number], paint.roll(1, dims=0), paint)
    shift = torch.where(turned, shift.roll(1, dims=0), shift)
    paint = paint * contrast[number] + shift[:, number]

    # Colour gives paint away on grey images. Every fourth pixel tells whether they are grey.
    few = images[..., ::4, ::4]
    chroma = (few.amax(dim=1) - few.amin(dim=1)).mean(dim=(1, 2))
    grey = torch.rand(batch, device=device) < torch.where(chroma < 0.02, 0.85, 0.25)
    luminance = (paint * paint.new_tensor(_LUMINANCE).view(3, 1)).sum(dim=0)
    return torch.where(grey[number], luminance, paint)


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
        angle = uniform(batch, 0, math.pi, device=device)
        # Three steps in the narrowest lattice cell.
        step = max(1, int(max(height, width) / (3 * min(4 * highest, 64))))
        return random_perlin_noise(height, width, axes, angle, step).unsqueeze(1)

    fine = layer(4.0, 64.0)
    stripes = (fine * uniform(batch, 1.0, 8.0, device=device).view(-1, 1, 1, 1)).sin()
    fine = torch.where(choose(batch, 0.3, device=device).view(-1, 1, 1, 1), stripes, fine)
    base, strong, weak = torch.rand(3, batch, 3, 1, 1, device=device)
    return base + (strong - 0.5) * 0.6 * fine + (weak - 0.5) * 0.4 * layer(0.5, 8.0)
