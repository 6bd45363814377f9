# SPDX-License-Identifier: Apache-2.0
"""Batched SLIC superpixels (Achanta et al., 2012) in dense tensor operations.

SLIC is k-means over colour and position, each pixel compared only with the centres near it. Here the image is
cut into square cells, one centre starts in each, and a pixel is compared with the centres of its own cell and
the eight around it. That makes both halves of k-means dense: the comparison is a sum of products per cell, and
a centre's new value is a sum over its nine cells, collected by shifting. Nothing is scattered, nothing waits
for the host, and the graph exports. Nothing is a matrix product either: a user may allow those to be rounded
(``torch.set_float32_matmul_precision``), which would move pixels between segments.
"""

import math
from numbers import Integral

import torch
from torch import nn
from torch.nn import functional

from anomalib_twostage.common.precision import full_precision

from .color import rgb_to_lab

__all__ = ["Slic", "slic"]

# How far a centre is that does not exist, beyond the image: no pixel chooses it.
_FAR = 1.0e30
# Below the first distances leave the range of float32; above the second their squares come near to that one.
_LEAST_COMPACTNESS = 1e-6
_MOST_COMPACTNESS = 1e12
# Centres move beyond the mean of their pixels, where further rounds would take them: two rounds do the work of four. At
# twice the way they swing.
_REACH = 1.7


def slic(
    image: torch.Tensor,
    n_segments: int | None = None,
    *,
    segment_size: int | None = None,
    compactness: float = 10.0,
    num_iterations: int = 2,
) -> torch.Tensor:
    """Segment images into superpixels.

    Distances are those of scikit-image: CIELAB colour distance over ``compactness``, plus distance in the plane
    over the segment size. Unlike there, images are not stretched to fill [0, 1] first, and connectivity is not
    enforced: a segment is compact, but a few of its pixels may be islands.

    Args:
        image: RGB or grey images ``(B, C, H, W)`` or ``(C, H, W)``, ``C`` 1 or 3, floating point in [0, 1]. Values
            outside are clamped, and NaN counts as 0.
        n_segments: Wanted number of segments per image; the outcome is close to it, as in scikit-image.
            Give either this or ``segment_size``; with neither, 100.
        segment_size: Wanted side of a segment in pixels.
        compactness: Weight of position against colour, from 1e-6 to 1e12; 10 suits most images.
        num_iterations: Rounds of k-means.

    Returns:
        Labels, int64, ``(B, H, W)`` or ``(H, W)``: per image, every number from 0 to the highest is in use. An empty
        batch has empty labels.

    Raises:
        TypeError: If the image is not a floating-point tensor, or a number that must be whole is not.
        ValueError: If the shape, the number or size of segments, the compactness or the number of iterations is
            out of range.

    Example:
        >>> labels = slic(torch.rand(2, 3, 64, 48), segment_size=16)
        >>> labels.shape
        torch.Size([2, 64, 48])
    """
    _check_image(image)
    batched = image.ndim == 4
    images = image.detach() if batched else image.detach().unsqueeze(0)
    height, width = images.shape[-2:]
    size = _resolve_segment_size(height, width, n_segments, segment_size)
    _check_settings(compactness, num_iterations)
    with full_precision(image.device):  # half of it moves pixels between segments
        labels = _dense_labels(_segment(images, size, compactness, num_iterations), _grid(height, width, size))
    return labels if batched else labels.squeeze(0)


class Slic(nn.Module):
    """Module form of :func:`slic` with a fixed segment size.

    Args:
        segment_size: Side of a segment in pixels; 1 leaves every pixel for itself.
        compactness: Weight of position against colour.
        num_iterations: Rounds of k-means.

    Raises:
        TypeError: If a number that must be whole is not.
        ValueError: If an argument is out of range.

    Example:
        >>> Slic(segment_size=16)(torch.rand(2, 3, 64, 48)).shape
        torch.Size([2, 64, 48])
    """

    def __init__(self, segment_size: int = 16, compactness: float = 10.0, num_iterations: int = 2) -> None:
        super().__init__()
        _check_whole("segment_size", segment_size)
        if segment_size < 1:
            msg = f"segment_size must be at least 1 pixel, got {segment_size}."
            raise ValueError(msg)
        _check_settings(compactness, num_iterations)
        self.segment_size = segment_size
        self.compactness = compactness
        self.num_iterations = num_iterations

    def max_segments(self, height: int, width: int) -> int:
        """Upper bound of the number of segments of an image of this height and width in pixels."""
        rows, columns = _grid(height, width, self.segment_size)
        return rows * columns

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Segment images ``(B, C, H, W)`` in [0, 1] into labels ``(B, H, W)``, int64. See :func:`slic`."""
        if self.segment_size == 1:
            batch, _, height, width = images.shape
            every = torch.arange(height * width, device=images.device).reshape(1, height, width)
            return every.expand(batch, -1, -1).contiguous()
        return slic(
            images,
            segment_size=self.segment_size,
            compactness=self.compactness,
            num_iterations=self.num_iterations,
        )

    def extra_repr(self) -> str:
        """Show the settings in ``print(model)``."""
        return f"segment_size={self.segment_size}, compactness={self.compactness}, iterations={self.num_iterations}"


def _check_image(image: torch.Tensor) -> None:
    if not isinstance(image, torch.Tensor):
        msg = f"image must be a tensor, got {type(image).__name__}."
        raise TypeError(msg)
    if not image.is_floating_point():
        msg = f"image must be floating point in [0, 1], got {image.dtype}; divide integers by their maximum first."
        raise TypeError(msg)
    if image.ndim not in (3, 4) or image.shape[-3] not in (1, 3):
        msg = f"image must be (B, C, H, W) or (C, H, W) with 1 or 3 channels, got shape {tuple(image.shape)}."
        raise ValueError(msg)
    if not torch.compiler.is_compiling() and min(image.shape[-2:]) < 1:
        msg = f"image must be at least one pixel high and wide, got shape {tuple(image.shape)}."
        raise ValueError(msg)


def _check_whole(name: str, value: int) -> None:
    if not isinstance(value, Integral):
        msg = f"{name} must be a whole number, got {value!r}."
        raise TypeError(msg)


def _check_settings(compactness: float, num_iterations: int) -> None:
    if not _LEAST_COMPACTNESS <= compactness <= _MOST_COMPACTNESS:
        msg = f"compactness must be from {_LEAST_COMPACTNESS:g} to {_MOST_COMPACTNESS:g}, got {compactness}."
        raise ValueError(msg)
    _check_whole("num_iterations", num_iterations)
    if num_iterations < 0:
        msg = f"num_iterations must be 0 or more, got {num_iterations}."
        raise ValueError(msg)


def _resolve_segment_size(height: int, width: int, n_segments: int | None, segment_size: int | None) -> int:
    if n_segments is not None and segment_size is not None:
        msg = f"Give n_segments or segment_size, not both (got {n_segments} and {segment_size})."
        raise ValueError(msg)
    if segment_size is None:
        n_segments = 100 if n_segments is None else n_segments
        _check_whole("n_segments", n_segments)
        if n_segments < 1:
            msg = f"n_segments must be at least 1, got {n_segments}."
            raise ValueError(msg)
        size = math.sqrt(height * width / n_segments)
        # An image thinner than a segment holds a single row of them.
        return max(1, round(size if size <= min(height, width) else max(height, width) / n_segments))
    _check_whole("segment_size", segment_size)
    # Sizes are symbols while the model is traced for export, where a comparison would freeze them.
    if not torch.compiler.is_compiling() and not 1 <= segment_size <= max(height, width):
        msg = f"segment_size must be between 1 and the longer image side {max(height, width)}, got {segment_size}."
        raise ValueError(msg)
    return segment_size


def _grid(height: int, width: int, size: int) -> tuple[int, int]:
    """Rows and columns of cells that cover an image."""
    return (height + size - 1) // size, (width + size - 1) // size


def _segment(images: torch.Tensor, size: int, compactness: float, num_iterations: int) -> torch.Tensor:
    """Label every pixel with the cell whose centre it belongs to: ``(B, H, W)`` int64, numbers may be missing."""
    batch, _, height, width = images.shape
    rows, columns = _grid(height, width, size)
    top, left = (rows * size - height) // 2, (columns * size - width) // 2
    border = (left, columns * size - width - left, top, rows * size - height - top)

    cells = _to_cells(functional.pad(_to_lab(images), border, mode="replicate"), rows, columns, size)
    # Distances in the plane are stretched, not those of colour shrunk: there are fewer of them.
    steps = _steps(cells.device)
    offsets = functional.pad(steps * compactness, (3, 0))
    beyond = _neighbours(cells.new_zeros(1, rows, columns, 1), beyond=-_FAR).repeat(batch, 1, 1)

    # Centres move on one pixel of every two by two: a quarter of the work.
    stride = 2 if size >= 8 else 1
    samples = cells[..., ::stride, ::stride].flatten(2)
    place = _places(size, stride, compactness, cells.device)
    inside = _inside(rows, size, top, height, cells.device)[:, None, ::stride, None]
    inside = inside * _inside(columns, size, left, width, cells.device)[:, None, ::stride]
    weight = inside.view(rows * columns, 1, -1).repeat(batch, 1, 1)
    # Weights come last, to be summed like the rest: a count.
    summands = torch.cat([samples * weight, place * weight], dim=1)

    # The first centres: the middle of each cell, with the cell's mean colour. Places are relative to that middle.
    centres = functional.pad(samples.mean(dim=2).view(batch, rows, columns, 3), (0, 2))
    for _ in range(num_iterations):
        member = _nearest(samples, place, centres, offsets, beyond)
        sums = torch.stack([(member * summand).sum(dim=2) for summand in summands.split(1, dim=1)], dim=2)
        centres = centres.lerp(_means(sums, centres, offsets), _REACH)

    member = _nearest(cells.flatten(2), _places(size, 1, compactness, cells.device), centres, offsets, beyond)
    # The way from a cell's own number to each of the nine, raised above zero: the one way left is the highest. Several
    # times faster than argmax() over a strided dimension.
    way = steps[:, :1] * columns + steps[:, 1:] + (columns + 2)
    way = member.mul_(way).amax(dim=1).int()
    home = torch.arange(-columns - 2, (rows - 1) * columns - 2, device=cells.device, dtype=torch.int32)
    labels = way.view(batch, rows * columns, size * size).add_(home.unsqueeze(1))
    labels = labels.reshape(batch, rows, columns, size, size).transpose(2, 3)
    labels = labels.reshape(batch, rows * size, columns * size)
    return labels[:, top : top + height, left : left + width].long()


def _to_lab(images: torch.Tensor) -> torch.Tensor:
    """CIELAB of images of one or three channels, ``(B, 3, H, W)`` float32."""
    # A single NaN would become labels that no segment has, and on a GPU such an index ends the whole process.
    return rgb_to_lab(images.float().clamp(0, 1).nan_to_num_(0.0).expand(-1, 3, -1, -1))


def _to_cells(values: torch.Tensor, rows: int, columns: int, size: int) -> torch.Tensor:
    """Regroup ``(B, C, rows * size, columns * size)`` by cell: ``(B * rows * columns, C, size, size)``."""
    batch, channels = values.shape[:2]
    values = values.reshape(batch, channels, rows, size, columns, size).permute(0, 2, 4, 1, 3, 5)
    return values.reshape(batch * rows * columns, channels, size, size)


def _steps(device: torch.device) -> torch.Tensor:
    """Rows and columns from a cell to the nine around it, itself among them: ``(9, 2)`` float32, in -1, 0, 1."""
    step = torch.arange(-1, 2, device=device, dtype=torch.float32)
    return torch.stack([step.repeat_interleave(3), step.repeat(3)], dim=1)


def _places(size: int, stride: int, compactness: float, device: torch.device) -> torch.Tensor:
    """Row and column of a cell's pixels from its middle, and ones: ``(3, pixels)`` float32; a cell is that wide.

    With a stride, each pixel stands for its neighbours up to the next one, and so for their common middle.
    """
    place = torch.arange(0, size, stride, device=device, dtype=torch.float32)
    place = (place - (place[-1] / 2)) * (compactness / size)
    row = place.repeat_interleave(len(place))
    return torch.stack([row, place.repeat(len(place)), torch.ones_like(row)])


def _inside(count: int, size: int, start: int, side: int, device: torch.device) -> torch.Tensor:
    """One for the lines of cells that are in the image, zero for those beyond: ``(count, size)`` float32."""
    line = torch.arange(count * size, device=device)
    return ((line >= start) & (line < start + side)).float().view(count, size)


def _neighbours(centres: torch.Tensor, beyond: float = 0.0) -> torch.Tensor:
    """What belongs to the nine centres that compete for each cell, ``(B * rows * columns, 9, C)``."""
    rows, columns = centres.shape[1:3]
    padded = functional.pad(centres, (0, 0, 1, 1, 1, 1), value=beyond)
    lines = torch.stack([padded[:, i : i + rows] for i in range(3)], dim=3)
    return torch.stack([lines[:, :, i : i + columns] for i in range(3)], dim=4).view(-1, 9, centres.shape[3])


def _nearest(
    colour: torch.Tensor,
    place: torch.Tensor,
    centres: torch.Tensor,
    offsets: torch.Tensor,
    beyond: torch.Tensor,
) -> torch.Tensor:
    """One for the nearest to each pixel of its nine centres, zero for others, ``(B * rows * columns, 9, pixels)``.

    A pixel halfway between two centres has both: no index, no one-hot. What is compared is minus half the squared
    distance, but for a part that is the same for all nine. Centres are taken relative to the cell's own, so that the
    products stay small and lose little to rounding.
    """
    near = _neighbours(centres) + offsets
    own = near[:, 4:5]
    apart = near - own
    square = (near + own).mul_(apart).sum(dim=-1, keepdim=True)
    nearness = torch.addcmul(torch.add(beyond, square, alpha=-0.5), apart[..., 3:4], place[0])
    # In place from here on: fresh memory of this size costs as much as the arithmetic.
    nearness.addcmul_(apart[..., 4:], place[1])
    for channel in range(3):
        nearness.addcmul_(apart[..., channel : channel + 1], colour[:, channel : channel + 1])
    return nearness.ge_(nearness.amax(dim=1, keepdim=True))


def _means(sums: torch.Tensor, centres: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """Mean of each centre's pixels in its nine cells; without pixels, the centre itself."""
    batch, rows, columns, _ = centres.shape
    # From places relative to the pixel's cell to places relative to the centre's.
    sums = torch.addcmul(sums, sums[..., -1:], functional.pad(offsets, (0, 1)), value=-1)
    # What a cell has for the centre above or before it is taken from the cell below or behind.
    padded = functional.pad(sums.view(batch, rows, columns, 3, 3, 6), (0, 0, 0, 0, 0, 0, 1, 1, 1, 1))
    lines = padded[:, 2:, :, 0] + padded[:, 1:-1, :, 1] + padded[:, :-2, :, 2]
    total = lines[:, :, 2:, 0] + lines[:, :, 1:-1, 1] + lines[:, :, :-2, 2]
    return torch.where(total[..., -1:] > 0, total[..., :-1] / total[..., -1:].clamp_min(1.0), centres)


def _dense_labels(labels: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Renumber so that every number from 0 up is in use in each image."""
    flat = labels.flatten(1)
    used = torch.zeros(labels.shape[0], grid[0] * grid[1], dtype=torch.int64, device=labels.device)
    used = used.scatter(1, flat, 1)
    return (used.cumsum(dim=1) - 1).gather(1, flat).reshape(labels.shape)
