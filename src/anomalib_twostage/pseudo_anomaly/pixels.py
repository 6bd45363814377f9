# SPDX-License-Identifier: Apache-2.0
"""Some pixels of a batch of images, as a flat list: what the painters compute on.

A shape covers a few per cent of an image, so paint for whole images would mostly be thrown away. Values of listed
pixels have the layout ``(C, N)``. They are read by ``index_select`` on flattened images, which on a CPU takes a
fraction of the time of indexing.
"""

from typing import NamedTuple

import torch

__all__ = ["Pixels", "list_pixels", "pick", "sample", "sums"]


class Pixels(NamedTuple):
    """Places of pixels in a batch of images, ``(N,)`` int64 each."""

    number: torch.Tensor
    """The image that each pixel is in."""
    row: torch.Tensor
    column: torch.Tensor

    def part(self, which: slice) -> "Pixels":
        """Some of the pixels."""
        return Pixels(*(place[which] for place in self))


def list_pixels(shape: torch.Tensor) -> tuple[Pixels, torch.Tensor, list[int]]:
    """List the pixels where ``(B, 1, H, W)`` bool is true, image by image.

    To count them, any device but a CPU would have to be waited for: there, all pixels are listed, and nothing else
    changes.

    Returns:
        The pixels; which of them are in the shape, float32 ``(N,)`` in {0, 1}; where each image's pixels begin, and
        where the last one's end.
    """
    batch, _, height, width = shape.shape
    flat, area = shape.flatten(), height * width
    if flat.device.type != "cpu":
        pixel, inside = torch.arange(flat.numel(), device=flat.device), flat.float()
        starts = list(range(0, (batch + 1) * area, area))
    else:
        pixel = flat.nonzero().flatten()
        inside = torch.ones(len(pixel))
        starts = torch.searchsorted(pixel, torch.arange(0, (batch + 1) * area, area)).tolist()
    line = pixel.div(width, rounding_mode="floor")
    number = line.div(height, rounding_mode="floor")
    return Pixels(number, line - number * height, pixel - line * width), inside, starts


def offsets(pixels: Pixels, shape: torch.Size) -> torch.Tensor:
    """Where the pixels lie in contiguous images of shape ``(B, C, H, W)``, ``(C, N)`` int64."""
    _, channels, height, width = shape
    first = ((pixels.number * (channels * height) + pixels.row) * width).add_(pixels.column)
    return first + torch.arange(0, channels * height * width, height * width, device=first.device).view(-1, 1)


def pick(images: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Values ``(C, N)`` at offsets ``(C, N)`` in images ``(B, C, H, W)``."""
    return images.flatten().index_select(0, index.flatten()).view(index.shape)


def sample(pictures: torch.Tensor, number: torch.Tensor, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Read pictures between their pixels, bilinearly; beyond the border they are mirrored.

    Args:
        pictures: ``(B, C, h, w)`` of any type.
        number: Which picture to read, ``(N,)`` int64.
        y: Row, ``(N,)`` float32; a whole number is the middle of a pixel.
        x: Column, likewise.

    Returns:
        Values ``(C, N)`` float32.
    """
    height, width = pictures.shape[-2:]
    y, x = _mirror(y, height), _mirror(x, width)
    top, left = y.floor(), x.floor()
    y, x = y.sub_(top), x.sub_(left)
    index = offsets(Pixels(number, top.long(), left.long()), pictures.shape)
    # In the last row and column there is no next one, and its weight is zero.
    below = (top < height - 1).long().mul_(width)
    beside = (left < width - 1).long()
    flat = pictures.flatten()

    def read(index: torch.Tensor) -> torch.Tensor:
        return flat.index_select(0, index.flatten()).view(index.shape).float()

    upper = torch.lerp(read(index), read(index + beside), x)
    index += below
    lower = torch.lerp(read(index), read(index + beside), x)
    return upper.lerp_(lower, y)


def sums(values: torch.Tensor, number: torch.Tensor, batch: int) -> torch.Tensor:
    """Sum values ``(C, N)`` per image, ``(C, batch)``."""
    return values.new_zeros(len(values), batch).scatter_add_(1, number.expand(len(values), -1), values)


def _mirror(place: torch.Tensor, size: int) -> torch.Tensor:
    place = (place + 0.5).abs_()
    place = place.sub_((place / (2 * size)).floor_(), alpha=2 * size)
    return torch.minimum(place, 2 * size - place).sub_(0.5).clamp_(0, size - 1)
