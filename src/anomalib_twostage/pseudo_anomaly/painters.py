# SPDX-License-Identifier: Apache-2.0
"""The two painters of pseudo-anomalies: where they paint, and how paint meets image.

Both are torchvision transforms that work on one image or a batch, on any device, and draw from that device's
global random generator, so that ``torch.manual_seed`` makes them repeat.
"""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from torchvision import tv_tensors
from torchvision.transforms import v2

from anomalib_twostage.common.precision import full_precision
from anomalib_twostage.superpixels.color import rgb_to_lab
from anomalib_twostage.superpixels.pooling import superpixel_mean
from anomalib_twostage.superpixels.slic import Slic

from .paint import draw_kinds, mix_paint, move, tint
from .perlin import random_perlin_noise
from .pixels import Pixels, list_pixels, offsets, pick, sample, sums
from .random import choose, log_uniform, to_device, uniform
from .textures import builtin_textures, folder_textures

__all__ = ["PAINTERS", "PerlinAnomaly", "PseudoAnomaly", "PseudoAnomalyTransform", "SuperpixelAnomaly"]

JUST_NOTICEABLE = 2.3
"""CIE76 delta E below which a person sees no difference (Mahy et al., 1994)."""

_LEAST_HALVED = 128  # shorter side in pixels from which superpixel shapes are drawn at half resolution,
_LEAST_SEGMENT = 4  # as long as a superpixel keeps this side
_CLEAR = 8.0  # delta E that paint is lifted to on average; a defect should be seen, not searched for


class PseudoAnomalyTransform(v2.Transform, ABC):
    """Base of the painters.

    Called with an image, a painter returns ``(image, mask)``. Called with an image and a mask, as anomalib's
    datasets call ``train_augmentations``, it returns ``(image, mask)`` with its own mask added to the given one.
    Images change exactly where the painter's mask is 1, and every such change is above the just noticeable
    difference, before it is rounded to the image's type.

    Args:
        probability: Share of images that are painted, in [0, 1].
        opacity: Lowest and highest opacity of the paint, in (0, 1].
        texture_dir: Folder of images to paint with (searched recursively), such as DTD, instead of the
            photographs that scikit-image ships.

    Raises:
        ValueError: If ``probability`` or ``opacity`` is out of range.
        FileNotFoundError: If ``texture_dir`` does not exist or holds no image.
    """

    def __init__(
        self,
        probability: float = 0.5,
        opacity: tuple[float, float] = (0.2, 1.0),
        texture_dir: str | Path | None = None,
    ) -> None:
        super().__init__()
        if not 0 <= probability <= 1:
            msg = f"probability must be between 0 and 1, got {probability}."
            raise ValueError(msg)
        if len(opacity) != 2 or not 0 < opacity[0] <= opacity[1] <= 1:
            msg = f"opacity must be (lowest, highest) with 0 < lowest <= highest <= 1, got {tuple(opacity)}."
            raise ValueError(msg)
        self.probability = probability
        self.opacity = tuple(opacity)
        textures = builtin_textures() if texture_dir is None else folder_textures(texture_dir)
        # Not persistent: paint does not belong into a checkpoint.
        self.register_buffer("textures", textures, persistent=False)
        self.textures: torch.Tensor

    @abstractmethod
    def shapes(self, images: torch.Tensor) -> torch.Tensor:
        """Draw where to paint: bool ``(B, 1, H, W)`` for RGB images ``(B, 3, H, W)`` in [0, 1]."""

    def forward(self, *inputs: Any) -> tuple[torch.Tensor, torch.Tensor]:  # torchvision's signature
        """Paint.

        Args:
            inputs: An image ``(C, H, W)`` or batch ``(B, C, H, W)``, 1 or 3 channels, floating point in [0, 1]
                or uint8; then, optionally, its mask ``(H, W)``, ``(1, H, W)``, ``(B, H, W)`` or
                ``(B, 1, H, W)``. Both may come as one tuple.

        Returns:
            The image in its own type and shape, and the mask: in the given mask's type and shape, or a
            ``tv_tensors.Mask``, float32 ``(1, H, W)`` or ``(B, 1, H, W)`` in {0, 1}.

        Raises:
            TypeError: If the input is not one image with at most one mask, or of another dtype.
            ValueError: If the image's shape or number of channels is not as above.
        """
        image, given = self._unpack(inputs)
        images = image.as_subclass(torch.Tensor)
        painted, mask = self._paint(images if images.ndim == 4 else images.unsqueeze(0))
        painted = painted.view(image.shape)
        if isinstance(image, tv_tensors.TVTensor):
            painted = tv_tensors.wrap(painted, like=image)
        if given is None:
            # Transforms that follow would turn the image and leave a plain tensor beside it as it is.
            return painted, tv_tensors.Mask(mask if image.ndim == 4 else mask.squeeze(0))
        joined = torch.maximum(given.as_subclass(torch.Tensor), mask.reshape(given.shape).to(given.dtype))
        return painted, tv_tensors.wrap(joined, like=given) if isinstance(given, tv_tensors.TVTensor) else joined

    def extra_repr(self) -> str:
        """Show the settings in ``print(painter)``."""
        return f"probability={self.probability}, opacity={self.opacity}, textures={len(self.textures)}"

    @staticmethod
    def _unpack(inputs: tuple) -> tuple[torch.Tensor, torch.Tensor | None]:
        if len(inputs) == 1 and isinstance(inputs[0], tuple | list):
            inputs = tuple(inputs[0])
        if not 1 <= len(inputs) <= 2 or not all(isinstance(value, torch.Tensor) for value in inputs):
            kinds = ", ".join(type(value).__name__ for value in inputs)
            msg = f"A painter takes an image tensor and at most one mask tensor, got ({kinds})."
            raise TypeError(msg)
        image, mask = inputs[0], inputs[1] if len(inputs) == 2 else None
        if not (image.is_floating_point() or image.dtype == torch.uint8):
            msg = f"The image must be floating point in [0, 1] or uint8, got {image.dtype}."
            raise TypeError(msg)
        if image.ndim not in (3, 4) or image.shape[-3] not in (1, 3):
            msg = f"The image must be (C, H, W) or (B, C, H, W) with 1 or 3 channels, got {tuple(image.shape)}."
            raise ValueError(msg)
        expected = (*image.shape[:-3], *image.shape[-2:])
        if mask is not None and mask.shape not in (expected, (*image.shape[:-3], 1, *image.shape[-2:])):
            msg = f"The mask {tuple(mask.shape)} does not fit the image {tuple(image.shape)}."
            raise ValueError(msg)
        return image, mask

    @torch.no_grad()
    def _paint(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Paint images ``(B, C, H, W)``; returns them and the masks ``(B, 1, H, W)``, float32 in {0, 1}."""
        painted = images.clone(memory_format=torch.contiguous_format)
        masks = torch.zeros(images.shape[0], 1, *images.shape[-2:], device=images.device)
        # Decided on the host, so that only the chosen images cost anything and the device is never waited for.
        chosen = (torch.rand(images.shape[0]) < self.probability).nonzero().flatten()
        if len(chosen) > 0 and images.numel() > 0:
            with full_precision(images.device):
                self._paint_chosen(painted, masks, to_device(chosen, images.device))
        return painted, masks

    def _paint_chosen(self, images: torch.Tensor, masks: torch.Tensor, chosen: torch.Tensor) -> None:
        """Paint some images ``(B, C, H, W)`` and their masks in place."""
        device, channels, batch = images.device, images.shape[1], len(chosen)
        given = images if batch == len(images) else images.index_select(0, chosen)
        given = v2.functional.to_dtype(given, torch.float32, scale=True)
        shape = self.shapes(given.expand(-1, 3, -1, -1))

        # From here on only the pixels of the shapes, as (3, N), with the number of their image; by kind of paint.
        order, kinds = draw_kinds(batch)
        order = to_device(order, device)
        listed, inside, starts = list_pixels(shape.index_select(0, order))
        pixels = listed._replace(number=order.index_select(0, listed.number))
        number = pixels.number
        before = pick(given, offsets(pixels, given.shape))
        paint, moved, of_moved = mix_paint(given, self.textures.to(device), order, kinds, listed, starts, before)
        before = before.expand(3, -1)
        # Paint thins out towards the border of its shape, by a softness that differs per call.
        reach = int(torch.randint(0, max(2, max(given.shape[-2:]) // 32), ()))
        soft = _thinned(shape, pixels, reach) * inside if reach else inside
        opacity = uniform(batch, *self.opacity, device=device).index_select(0, number)
        change = tint(paint, number, moved, given).sub_(before).mul_(opacity.mul_(soft))

        # Half of the channels' difference in CIELAB is lost when colours are clamped or made grey, so look twice.
        lab = _to_lab(before)
        lift = _squared_length(_to_lab((before + change).clamp_(0, 1)).sub_(lab)).sqrt_() * inside
        lift = sums(torch.stack([lift, inside]), number, batch)
        lift = (_CLEAR / (lift[0] / lift[1].clamp_min(1)).clamp_min(1e-3)).clamp(1, 8)
        painted = change.mul_(lift.index_select(0, number)).add_(before).clamp_(0, 1)
        if channels == 1:
            painted = painted.mean(dim=0, keepdim=True).expand(3, -1)
        difference = (_to_lab(painted).sub_(lab)).mul_(inside)
        visible = _squared_length(difference) > JUST_NOTICEABLE**2
        # Gravel on gravel changes every pixel and yet nothing to see: its grain averages out.
        afar = _seen_from_afar(difference[:, of_moved], pixels.part(of_moved), batch, *given.shape[-2:])
        visible[of_moved] &= _squared_length(afar) > JUST_NOTICEABLE**2

        pixels = Pixels(chosen.index_select(0, number), pixels.row, pixels.column)
        masks.view(-1).scatter_(0, offsets(pixels, masks.shape).view(-1), visible.float())
        # A detour through float32 may round: what is not painted stands, bit by bit.
        index = offsets(pixels, images.shape)
        painted = v2.functional.to_dtype(painted[:channels].unsqueeze(1), images.dtype, scale=True).squeeze(1)
        images.view(-1).scatter_(0, index.flatten(), torch.where(visible, painted, pick(images, index)).flatten())


class PerlinAnomaly(PseudoAnomalyTransform):
    """Paint inside thresholded Perlin noise, as DRAEM does, in more shapes than DRAEM's.

    Noise of any scale and direction is cut above a level (stains, specks) or along its zero line (scratches,
    cracks), and often confined to a window, since real defects are rarely all over the image. Arguments and
    calls: :class:`PseudoAnomalyTransform`.

    Example:
        >>> painter = PerlinAnomaly(probability=1.0)
        >>> image, mask = painter(torch.rand(3, 64, 64))
        >>> mask.shape
        torch.Size([1, 64, 64])
    """

    def shapes(self, images: torch.Tensor) -> torch.Tensor:
        """Draw where to paint: bool ``(B, 1, H, W)``."""
        batch, _, height, width = images.shape
        device, side = images.device, max(height, width)
        noise, frequency, step = _stretched_noise(height, width, batch, device, lowest=1.0, highest=24.0)
        level = torch.minimum(uniform(batch, 0.0, 1.8, device=device), 0.8 * noise.amax(dim=(1, 2)))
        # Near its zero line the noise climbs by about three standard deviations per lattice cell.
        line = log_uniform(batch, 1.0, 5.0, device=device) * 1.5 * frequency / side
        is_line = choose(batch, 0.35, device=device)
        low = torch.where(is_line, -line, level).view(-1, 1, 1)
        high = torch.where(is_line, line, torch.inf).view(-1, 1, 1)
        window = _window(torch.minimum(noise - low, high - noise), images, step)
        noise = _enlarge(noise.unsqueeze(1), step, height, width).squeeze(1)
        return ((noise > low) & (noise < high) & window).unsqueeze(1)


class SuperpixelAnomaly(PseudoAnomalyTransform):
    """Paint inside clusters of superpixels, the paper's own kind of pattern.

    The superpixels are those of the image itself, which follow its edges, or of a texture, which do not, of a size
    drawn per call. Arguments and calls: :class:`PseudoAnomalyTransform`.

    Example:
        >>> painter = SuperpixelAnomaly(probability=1.0)
        >>> image, mask = painter(torch.rand(2, 3, 64, 64))
        >>> mask.shape
        torch.Size([2, 1, 64, 64])
    """

    def shapes(self, images: torch.Tensor) -> torch.Tensor:
        """Draw where to paint: bool ``(B, 1, H, W)``."""
        batch, _, height, width = images.shape
        device = images.device
        shorter, longer = min(height, width), max(height, width)
        finest, coarsest = min(max(4, shorter // 32), longer), min(max(5, shorter // 8), longer)
        size, step = int(torch.randint(finest, coarsest + 1, ())), 1
        # At half resolution or a quarter, and enlarged before the cut: a fraction of the work, and outlines without
        # steps.
        while shorter >= _LEAST_HALVED and size >= 2 * _LEAST_SEGMENT:
            images, size, step, shorter = _halve(_halve(images, -2), -1), size // 2, step * 2, shorter // 2
        rows, columns = images.shape[-2:]
        if rows == columns == 1:  # nothing to cut
            return torch.ones(batch, 1, 1, 1, dtype=torch.bool, device=device)
        textures = self.textures[..., ::step, ::step]
        picked = textures[torch.randint(len(textures), (batch,), device=textures.device)].to(device)
        foreign = move(picked.float() / 255, rows, columns)
        own = choose(batch, 0.5, device=device)
        slic = Slic(size, num_iterations=1)
        labels = slic(torch.where(own.view(-1, 1, 1, 1), images, foreign))
        segments = slic.max_segments(rows, columns)

        noise, _, coarse = _stretched_noise(rows, columns, batch, device, lowest=1.0, highest=8.0)
        noise = _enlarge(noise.unsqueeze(1), coarse, rows, columns)
        field = superpixel_mean(noise, labels, segments)
        level = torch.minimum(uniform(batch, 0.0, 1.8, device=device), 0.9 * field.amax(dim=(1, 2, 3)))
        field = field - level.view(-1, 1, 1, 1)
        window = _window(field.squeeze(1), images, 1).float().unsqueeze(1)
        field = torch.minimum(field, superpixel_mean(window, labels, segments) - 0.5)
        return _enlarge(field, step, height, width) > 0


class PseudoAnomaly(PseudoAnomalyTransform):
    """Both painters by turns, the first one drawn by lot. Arguments and calls: :class:`PseudoAnomalyTransform`.

    Example:
        >>> painter = PseudoAnomaly(probability=1.0)
        >>> image, mask = painter(torch.rand(2, 3, 64, 64))
        >>> mask.shape
        torch.Size([2, 1, 64, 64])
    """

    def shapes(self, images: torch.Tensor) -> torch.Tensor:
        """Draw where to paint: bool ``(B, 1, H, W)``."""
        shapes = torch.empty(len(images), 1, *images.shape[-2:], dtype=torch.bool, device=images.device)
        first = int(torch.randint(2, ()))
        for painter, start in ((SuperpixelAnomaly, first), (PerlinAnomaly, 1 - first)):
            if start < len(images):
                shapes[start::2] = painter.shapes(self, images[start::2])
        return shapes


PAINTERS: dict[str, type[PseudoAnomalyTransform]] = {
    "both": PseudoAnomaly,
    "perlin": PerlinAnomaly,
    "superpixel": SuperpixelAnomaly,
}
"""Painters by the name of what they paint."""


def _stretched_noise(
    height: int, width: int, batch: int, device: torch.device, lowest: float, highest: float
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Perlin noise ``(B, h, w)`` of random scale, direction and stretch, its mean frequency ``(B,)``, and its step.

    The noise has one value per ``step`` by ``step`` pixels: the narrowest lattice cell, stretched as far as can be,
    is three steps wide.
    """
    frequency = log_uniform(batch, lowest, highest, device=device)
    stretch = log_uniform(batch, 1 / 3, 3.0, device=device)
    axes = torch.stack([frequency * stretch, frequency / stretch], dim=1).clamp(0.5, 64)
    angle = uniform(batch, 0, torch.pi, device=device)
    step = max(1, int(max(height, width) / (3 * highest * 3.0**0.5)))
    return random_perlin_noise(-(-height // step), -(-width // step), axes, angle), frequency, step


def _enlarge(values: torch.Tensor, step: int, height: int, width: int) -> torch.Tensor:
    """Enlarge ``(B, 1, h, w)`` with one value per ``step`` by ``step`` pixels to ``(B, 1, height, width)``."""
    if step == 1:
        return values
    return functional.interpolate(values, scale_factor=step, mode="bilinear")[..., :height, :width]


def _halve(images: torch.Tensor, dim: int) -> torch.Tensor:
    """Means of two lines each, the last one alone where their number is odd; several times faster than pooling."""
    first = images[..., ::2, :] if dim == -2 else images[..., ::2]
    second = images[..., 1::2, :] if dim == -2 else images[..., 1::2]
    if second.shape[dim] < first.shape[dim]:
        second = torch.cat([second, first.narrow(dim, first.shape[dim] - 1, 1)], dim=dim)
    return (first + second).mul_(0.5)


def _window(field: torch.Tensor, images: torch.Tensor, step: int) -> torch.Tensor:
    """Discs around a random point of each shape, or everything for some of the batch: bool ``(B, H, W)``.

    Args:
        field: Above zero inside the shape, ``(B, h, w)``, one value per ``step`` by ``step`` pixels.
        images: ``(B, 3, H, W)``.
        step: See above.
    """
    batch, _, height, width = images.shape
    device, side = images.device, max(height, width)
    # The highest of random numbers inside the shape: a draw from it without waiting for the device. One number for
    # four by four pixels does; where the shape slips through between them, the nearest in value is taken.
    stride = max(1, 4 // step)
    field, stride = field[:, ::stride, ::stride], stride * step
    draw = torch.rand(field.shape, device=device).mul_(_interest(images[..., ::stride, ::stride]).squeeze(1))
    best = torch.where(field > 0, draw, field.clamp_max(0)).flatten(1).argmax(dim=1).view(-1, 1, 1)
    row = best.div(field.shape[2], rounding_mode="floor")
    middle = (step - 1) / 2
    y = torch.arange(height, device=device).view(1, -1, 1) - (row * stride + middle)
    x = torch.arange(width, device=device).view(1, 1, -1) - ((best - row * field.shape[2]) * stride + middle)
    radius = log_uniform(batch, 0.08, 0.6, device=device) * side
    radius = torch.where(choose(batch, 0.25, device=device), torch.inf, radius).view(-1, 1, 1)
    return x.square() <= radius.square() - y.square()


def _interest(images: torch.Tensor) -> torch.Tensor:
    """Where a defect matters, ``(B, 1, H, W)``: 1 on what differs from the frame of the image, less on what does not.

    Objects are photographed on plain backgrounds, and a defect is on the object. A texture differs from its own
    mean nearly everywhere, or nearly nowhere; either way its draw stays even enough.
    """
    frame = torch.cat([images[..., :2, :].flatten(2), images[..., :, :2].flatten(2)], dim=2).mean(dim=2)
    difference = (images - frame[..., None, None]).abs().amax(dim=1, keepdim=True)
    return torch.where(difference > 0.1, 1.0, 0.9)


def _to_lab(pixels: torch.Tensor) -> torch.Tensor:
    """CIELAB of pixels ``(3, N)``."""
    return rgb_to_lab(pixels.unsqueeze(0)).squeeze(0)


def _squared_length(difference: torch.Tensor) -> torch.Tensor:
    """Squared CIE76 delta E ``(N,)`` of differences in CIELAB ``(3, N)``; norm() takes ten times as long."""
    return difference.square().sum(dim=0)


def _thinned(shape: torch.Tensor, pixels: Pixels, reach: int) -> torch.Tensor:
    """Share of a shape ``(B, 1, H, W)`` in a square window of ``2 * reach + 1`` pixels around each pixel, ``(N,)``.

    Of every second row and column, which stands for its neighbours.
    """
    coarse = _smoothed(shape[..., ::2, ::2].float(), (reach + 1.5) / 2)
    return sample(coarse, pixels.number, pixels.row / 2, pixels.column / 2).view(-1)


def _smoothed(values: torch.Tensor, reach: float) -> torch.Tensor:
    """Means of values ``(B, C, H, W)`` in square windows, which end one short of ``reach`` or fade out before it.

    Two products with a matrix each, several times faster than pooling.
    """
    for dim in (-2, -1):
        place = torch.arange(values.shape[dim], device=values.device, dtype=torch.float32)
        weight = (place - place.view(-1, 1)).abs_().neg_().add_(reach).clamp_(0, 1)
        weight = weight / weight.sum(dim=1, keepdim=True)
        values = weight @ values if dim == -2 else values @ weight.T
    return values


def _seen_from_afar(difference: torch.Tensor, pixels: Pixels, batch: int, height: int, width: int) -> torch.Tensor:
    """Mean of differences ``(3, N)`` around each pixel, in a window of a 24th of the image; elsewhere they are zero."""
    # Summed in cells of a third of the window, of which three by three are averaged.
    cell = max(1, round(max(height, width) / 72))
    rows, columns = -(-height // cell), -(-width // cell)
    row, column = (place.div(cell, rounding_mode="floor") for place in pixels[1:])
    cells = (pixels.number * rows + row) * columns + column
    mean = sums(difference, cells, batch * rows * columns).view(3, batch, rows, columns).transpose(0, 1) / cell**2
    mean = _smoothed(mean, 2.0)
    y, x = ((place + 0.5) / cell - 0.5 for place in pixels[1:])
    return sample(mean, pixels.number, y, x)
