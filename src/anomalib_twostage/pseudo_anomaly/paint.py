# SPDX-License-Identifier: Apache-2.0
"""What the painters paint with: four kinds of paint, drawn per image.

DRAEM buys breadth with 5,640 photographs. Breadth here comes from what is always there: the image itself (shaded,
blurred, sharpened), other images of the batch (turned, scaled, recoloured), photographs, and procedural textures.
"""

import math

import torch
from torch.nn import functional

from .perlin import DEVIATION, affine, lattice, perlin_noise, random_gradients
from .pixels import Pixels, sample, sums
from .random import choose, log_uniform, uniform

__all__ = ["draw_kinds", "mix_paint", "move", "tint"]

# Shares of: the image itself, blurred or sharpened; training images, moved; photographs; procedural textures.
_SHARES = (0.25, 0.25, 0.25, 0.25)
_OWN, _MOVED, _PHOTOGRAPH = range(3)


def draw_kinds(batch: int) -> tuple[torch.Tensor, list[tuple[int, int, int]]]:
    """Draw a kind of paint per image, on the host, so that each is computed only for the images that get it.

    Returns:
        The numbers of the images sorted by their kind, int64 ``(B,)``; and of each kind drawn its number, the place of
        its first image in this order, and the place after its last.
    """
    kind, order = torch.multinomial(torch.tensor(_SHARES), batch, replacement=True).sort(stable=True)
    drawn, counts = kind.unique_consecutive(return_counts=True)
    ends = counts.cumsum(0)
    return order, list(zip(drawn.tolist(), (ends - counts).tolist(), ends.tolist(), strict=True))


def mix_paint(
    images: torch.Tensor,
    textures: torch.Tensor,
    order: torch.Tensor,
    kinds: list[tuple[int, int, int]],
    pixels: Pixels,
    starts: list[int],
    before: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, slice]:
    """Paint some pixels with their image's kind of paint, in its own colours.

    Args:
        images: ``(B, C, H, W)`` float32 in [0, 1], 1 or 3 channels, contiguous.
        textures: Photographs, uint8 ``(N, 3, S, S)``.
        order: Images by kind, of :func:`draw_kinds`.
        kinds: What is painted with what, of :func:`draw_kinds`.
        pixels: What to paint, image by image in this order; ``number`` is the place in it.
        starts: Where each image's pixels begin, and where the last one's end.
        before: The pixels' colours in the images, ``(C, N)``.

    Returns:
        Paint ``(3, N)`` float32, about [0, 1]; the numbers of the images whose paint comes from training images, int64,
        since such paint can be of the same material as what it covers; and which of the pixels are theirs.
    """
    batch, _, height, width = images.shape
    device = images.device
    paint = []
    moved, of_moved = order[:0], slice(0, 0)
    for kind, first, end in kinds:
        index, which = order[first:end], slice(starts[first], starts[end])
        local, row, column = pixels.part(which)
        local, y, x = local - first, row.float(), column.float()
        if kind == _OWN:
            colours = _blur_or_sharpen(images.index_select(0, index), before[:, which], local, y, x)
        elif kind == _MOVED:
            source, matrix = _from_training_images(index, batch)
            place = _at(matrix, local, y, x, (height, width), (height, width))
            colours = sample(images, source.index_select(0, local), *place)
            moved, of_moved = index, which
        elif kind == _PHOTOGRAPH:
            picked = torch.randint(len(textures), (len(index),), device=device)
            matrix = _displace(len(index), 1.0, device)
            place = _at(matrix, local, y, x, (height, width), (textures.shape[-2], textures.shape[-1]))
            colours = sample(textures, picked.index_select(0, local), *place).div_(255)
        else:
            colours = _procedural(len(index), local, y, x, max(height, width))
        paint.append(colours.expand(3, -1))
    return torch.cat(paint, dim=1), moved, of_moved


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
    total = sums(torch.cat([paint, torch.ones_like(paint[:1])]), number, batch)
    mean = total[:3] / total[3].clamp_min(1)
    contrast = uniform(batch, 0.4, 1.6, device=device)
    contrast = torch.where(choose(batch, 0.15, device=device), -contrast, contrast)
    contrast = torch.where(choose(batch, 0.15, device=device), torch.zeros_like(contrast), contrast)
    shift = torch.randn(batch, device=device) * 0.25 + torch.randn(3, batch, device=device) * 0.1
    keep = torch.zeros(batch, dtype=torch.bool, device=device)
    keep[moved] = choose(len(moved), 0.5, device=device)
    contrast = torch.where(keep, 1.0, contrast)
    shift = torch.where(keep, 0.0, mean * (1 - contrast) + shift)
    turned = choose(batch, 0.25, device=device) & ~keep
    paint = torch.where(turned.index_select(0, number), paint.roll(1, dims=0), paint)
    shift = torch.where(turned, shift.roll(1, dims=0), shift)
    paint = paint.mul_(contrast.index_select(0, number)).add_(shift.index_select(1, number))

    # Colour gives paint away on grey images. Some of their pixels tell whether they are grey.
    few = images[..., ::8, ::8]
    chroma = (few.amax(dim=1) - few.amin(dim=1)).mean(dim=(1, 2))
    grey = torch.rand(batch, device=device) < torch.where(chroma < 0.02, 0.85, 0.25)
    luminance = (paint[0] * 0.299).add_(paint[1], alpha=0.587).add_(paint[2], alpha=0.114)
    return torch.where(grey.index_select(0, number), luminance, paint)


def _blur_or_sharpen(
    images: torch.Tensor, before: torch.Tensor, number: torch.Tensor, y: torch.Tensor, x: torch.Tensor
) -> torch.Tensor:
    """Take away all fine detail of some pixels ``(C, N)``, or add up to twice as much of it."""
    height, width = images.shape[-2:]
    rows, columns = max(1, height // 12), max(1, width // 12)
    # Means of blocks as two products: many times faster than interpolation by area.
    coarse = _means(height, rows, images.device) @ (images @ _means(width, columns, images.device).T)
    blurred = sample(coarse, number, _rescale(y, height, rows), _rescale(x, width, columns))
    amount = uniform(len(images), -1.5, 2.0, device=images.device).clamp_min(-1).index_select(0, number)
    return before + (before - blurred).mul_(amount)


def _means(size: int, count: int, device: torch.device) -> torch.Tensor:
    """The matrix ``(count, size)`` that averages a line of pixels in that many about equal blocks."""
    block = torch.arange(size, device=device) * count // size
    member = (block == torch.arange(count, device=device).view(-1, 1)).float()
    return member / member.sum(dim=1, keepdim=True)


def _rescale(place: torch.Tensor, size: int, to: int) -> torch.Tensor:
    """From pixels of a line to pixels of the same line drawn with another number of them."""
    return (place + 0.5) * (to / size) - 0.5


def move(images: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Turn, scale, mirror and shift pictures ``(B, 3, h, w)`` at random, to ``(B, 3, height, width)``."""
    batch = len(images)
    matrix = _displace(batch, 1.0, images.device).T.view(batch, 2, 3)
    grid = functional.affine_grid(matrix, [batch, 3, height, width], align_corners=False)
    return functional.grid_sample(images, grid, padding_mode="reflection", align_corners=False)


def _displace(batch: int, reach: float, device: torch.device) -> torch.Tensor:
    """Draw how to turn, scale, mirror and shift pictures: entries of matrices ``(6, batch)`` as of affine_grid().

    ``reach`` 1 moves anywhere; a small one displaces a little, as where a part is bent or chipped.
    """
    angle = uniform(batch, -math.pi, math.pi, device=device) * reach
    scale_y = log_uniform(batch, 0.3**reach, 1.5**reach, device=device)
    scale_x = scale_y * log_uniform(batch, 0.7**reach, 1.4**reach, device=device)
    if reach == 1.0:
        scale_x = torch.where(choose(batch, 0.5, device=device), -scale_x, scale_x)
    shift = (torch.rand(2, batch, device=device) - 0.5) * reach
    cosine, sine = angle.cos(), angle.sin()
    return torch.stack([scale_x * cosine, -scale_y * sine, shift[0], scale_x * sine, scale_y * cosine, shift[1]])


def _from_training_images(index: torch.Tensor, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw which image each paints with, and how that is moved: itself a little, or any one anywhere."""
    count, device = len(index), index.device
    near = choose(count, 0.5, device=device)
    source = torch.where(near, index, torch.randint(batch, (count,), device=device))
    return source, torch.where(near, _displace(count, 0.15, device), _displace(count, 1.0, device))


def _at(
    matrix: torch.Tensor,
    number: torch.Tensor,
    y: torch.Tensor,
    x: torch.Tensor,
    size: tuple[int, int],
    to: tuple[int, int],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Where in its picture, of height and width ``to``, each pixel of an image of ``size`` gets its paint from."""
    y, x = (y * 2 + 1) / size[0] - 1, (x * 2 + 1) / size[1] - 1
    x, y = affine(matrix.index_select(1, number), x, y)
    return ((y + 1) * to[0] - 1) / 2, ((x + 1) * to[1] - 1) / 2


def _procedural(batch: int, number: torch.Tensor, y: torch.Tensor, x: torch.Tensor, side: int) -> torch.Tensor:
    """Two layers of coloured noise over a base colour; the finer one sometimes bent into stripes."""
    device = y.device

    def layer(lowest: float, highest: float) -> torch.Tensor:
        frequency = log_uniform(batch, lowest, highest, device=device)
        stretch = log_uniform(batch, 0.25, 4.0, device=device)
        axes = torch.stack([frequency * stretch, frequency / stretch], dim=1).clamp(0.5, 64) / side
        matrix = lattice(axes, uniform(batch, 0, math.pi, device=device)).index_select(1, number)
        row, column = affine(matrix, y, x)
        return perlin_noise(row.view(1, 1, -1), column.view(1, 1, -1), random_gradients(device)).view(-1) / DEVIATION

    fine = layer(4.0, 64.0)
    stripes = (fine * uniform(batch, 1.0, 8.0, device=device).index_select(0, number)).sin_()
    fine = torch.where(choose(batch, 0.3, device=device).index_select(0, number), stripes, fine)
    base, strong, weak = torch.rand(3, 3, batch, device=device).unbind()
    paint = ((strong - 0.5) * 0.6).index_select(1, number).mul_(fine)
    paint += ((weak - 0.5) * 0.4).index_select(1, number).mul_(layer(0.5, 8.0))
    return paint.add_(base.index_select(1, number))
