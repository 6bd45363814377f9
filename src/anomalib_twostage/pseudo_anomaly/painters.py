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

from anomalib_twostage.color import rgb_to_lab
from anomalib_twostage.refiner import superpixel_mean
from anomalib_twostage.slic import Slic

from .paint import mix_paint, move, tint
from .perlin import random_perlin_noise
from .random import choose, log_uniform, uniform
from .textures import builtin_textures, folder_textures

__all__ = ["PerlinAnomaly", "PseudoAnomaly", "SuperpixelAnomaly"]

JUST_NOTICEABLE = 2.3
"""CIE76 delta E below which a person sees no difference (Mahy et al., 1994)."""

_LEAST_HALVED = 128  # shorter side in pixels from which superpixel shapes are drawn at half resolution
_CLEAR = 8.0  # delta E that paint is lifted to on average; a defect should be seen, not searched for


class PseudoAnomalyTransform(v2.Transform, ABC):
    """Base of the painters.

    Called with an image, a painter returns ``(image, mask)``. Called with an image and a mask, as anomalib's
    datasets call ``train_augmentations``, it returns ``(image, mask)`` with its own mask added to the given one.
    Images change exactly where the painter's mask is 1, and every such change is above the just noticeable
    difference.

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
            The image in its own type and shape, and the mask: in the given mask's type and shape, or float32
            ``(1, H, W)`` or ``(B, 1, H, W)`` in {0, 1}.

        Raises:
            TypeError: If the input is not one image with at most one mask, or of another dtype.
            ValueError: If the image's shape or number of channels is not as above.
        """
        image, given = self._unpack(inputs)
        images = image.as_subclass(torch.Tensor)
        images = images if images.ndim == 4 else images.unsqueeze(0)
        painted, mask = self._paint(v2.functional.to_dtype(images, torch.float32, scale=True))
        painted = v2.functional.to_dtype(painted, image.dtype, scale=True).reshape(image.shape)
        # A detour through float32 may round: outside the mask the given values stand, bit by bit.
        untouched = (mask == 0).reshape(*image.shape[:-3], 1, *image.shape[-2:])
        painted = torch.where(untouched, image.as_subclass(torch.Tensor), painted)
        if isinstance(image, tv_tensors.TVTensor):
            painted = tv_tensors.wrap(painted, like=image)
        if given is None:
            return painted, mask if image.ndim == 4 else mask.squeeze(0)
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

    def _paint(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Paint float images ``(B, C, H, W)``; returns them and the masks ``(B, 1, H, W)``, float32 in {0, 1}."""
        masks = images.new_zeros(images.shape[0], 1, *images.shape[-2:])
        # Decided on the host, so that only the chosen images cost anything and the device is never waited for.
        chosen = (torch.rand(images.shape[0]) < self.probability).nonzero().flatten().to(images.device)
        if len(chosen) == 0 or images.numel() == 0:
            return images, masks
        painted, mask = self._paint_all(images[chosen])
        return images.index_copy(0, chosen, painted), masks.index_copy(0, chosen, mask)

    @torch.no_grad()
    def _paint_all(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        batch, channels = images.shape[:2]
        device = images.device
        with torch.autocast(device.type, enabled=False):
            rgb = images.expand(-1, 3, -1, -1)
            shape = self.shapes(rgb)
            paint, moved = mix_paint(rgb, self.textures.to(device))
            # Paint thins out towards the border of its shape, by a softness that differs per call.
            reach = int(torch.randint(0, max(2, max(rgb.shape[-2:]) // 32), ()))
            soft = shape.float()
            soft = soft * _box_mean(soft, 2 * reach + 1) if reach else soft

            # From here on only the pixels of the shapes, as (3, N), with the number of their image. To list them, a GPU
            # would have to be waited for: there all pixels are taken.
            inside = shape.flatten()
            pixel = torch.arange(inside.numel(), device=device) if inside.is_cuda else inside.nonzero().flatten()
            number = pixel.div(shape[0].numel(), rounding_mode="floor")
            inside, soft = inside[pixel], soft.flatten()[pixel]
            before, paint = _pick(rgb, pixel, number), _pick(paint, pixel, number)
            opacity = uniform(batch, *self.opacity, device=device)
            change = (tint(paint, number, moved, rgb) - before) * (soft * opacity[number])

            # Half of the channels' difference in CIELAB is lost when colours are clamped or made grey, so look twice.
            lab = _to_lab(before)
            lift = _squared_length(_to_lab((before + change).clamp_(0, 1)) - lab).sqrt_() * inside
            sums = torch.zeros(2, batch, device=device).index_add_(1, number, torch.stack([lift, inside.float()]))
            lift = (_CLEAR / (sums[0] / sums[1].clamp_min(1)).clamp_min(1e-3)).clamp(1, 8)
            painted = (before + change * lift[number]).clamp_(0, 1)
            if channels == 1:
                painted = painted.mean(dim=0, keepdim=True).expand(3, -1)
            difference = (_to_lab(painted) - lab) * inside
            visible = _squared_length(difference) > JUST_NOTICEABLE**2
            visible &= self._shows_from_afar(difference, pixel, moved, rgb.shape)

            mask = torch.zeros(shape.shape, device=device)
            mask.view(-1)[pixel] = visible.float()
            result = images.clone(memory_format=torch.contiguous_format)
            index = _offsets(images.shape, pixel, number)
            kept = images.flatten()[index] if images.is_contiguous() else result.view(-1)[index]
            result.view(-1)[index] = torch.where(visible, painted[:channels], kept)
        return result, mask

    @staticmethod
    def _shows_from_afar(
        difference: torch.Tensor, pixel: torch.Tensor, moved: torch.Tensor, shape: torch.Size
    ) -> torch.Tensor:
        """Where paint shows when its grain averages out, ``(N,)`` bool; other than training images always does.

        Gravel on gravel changes every pixel and yet nothing to see.
        """
        batch, _, height, width = shape
        apart = torch.zeros(3, batch * height * width, device=difference.device)
        apart[:, pixel] = difference
        apart = apart.view(3, batch, height, width)
        window = max(3, max(height, width) // 24 | 1)
        coarse = _squared_length(_box_mean(apart[:, moved], window))
        shows = torch.ones(batch, height, width, dtype=torch.bool, device=difference.device)
        shows[moved] = coarse > JUST_NOTICEABLE**2
        return shows.flatten()[pixel]


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
        noise, frequency = _stretched_noise(images, lowest=1.0, highest=24.0)
        level = torch.minimum(uniform(batch, 0.0, 1.8, device=device), 0.8 * noise.amax(dim=(1, 2)))
        # Near its zero line the noise climbs by about three standard deviations per lattice cell.
        line = log_uniform(batch, 1.0, 5.0, device=device) * 1.5 * frequency / side
        is_line = choose(batch, 0.35, device=device)
        field = torch.where(
            is_line.view(-1, 1, 1),
            line.view(-1, 1, 1) - noise.abs(),
            noise - level.view(-1, 1, 1),
        )
        shape = field > 0
        return (shape & _window(shape, images)).unsqueeze(1)


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
        # At half resolution, and enlarged before the cut: a quarter of the work, and outlines without steps.
        batch, _, height, width = images.shape
        step = 2 if min(height, width) >= _LEAST_HALVED else 1
        images = functional.avg_pool2d(images, step, ceil_mode=True)
        rows, columns = images.shape[-2:]
        device = images.device
        if rows == columns == 1:  # nothing to cut
            return torch.ones(batch, 1, 1, 1, dtype=torch.bool, device=device)
        picked = self.textures[torch.randint(len(self.textures), (batch,), device=self.textures.device)].to(device)
        foreign = move(picked.float() / 255, rows, columns)
        own = choose(batch, 0.5, device=device)
        shorter, longer = sorted((rows, columns))
        finest, coarsest = min(max(4 // step, shorter // 32), longer), min(max(5, shorter // 8), longer)
        slic = Slic(int(torch.randint(finest, coarsest + 1, ())), num_iterations=2)
        labels = slic(torch.where(own.view(-1, 1, 1, 1), images, foreign))
        segments = slic.max_segments(rows, columns)

        noise, _ = _stretched_noise(images, lowest=1.0, highest=8.0)
        field = superpixel_mean(noise.unsqueeze(1), labels, segments)
        level = torch.minimum(uniform(batch, 0.0, 1.8, device=device), 0.9 * field.amax(dim=(1, 2, 3)))
        field = field - level.view(-1, 1, 1, 1)
        window = _window(field.squeeze(1) > 0, images).float().unsqueeze(1)
        field = torch.minimum(field, superpixel_mean(window, labels, segments) - 0.5)
        if step > 1:
            field = functional.interpolate(field, scale_factor=step, mode="bilinear")[..., :height, :width]
        return field > 0


class PseudoAnomaly(PseudoAnomalyTransform):
    """Both painters, one or the other per image. Arguments and calls: :class:`PseudoAnomalyTransform`.

    Example:
        >>> painter = PseudoAnomaly(probability=1.0)
        >>> image, mask = painter(torch.rand(2, 3, 64, 64))
        >>> mask.shape
        torch.Size([2, 1, 64, 64])
    """

    def shapes(self, images: torch.Tensor) -> torch.Tensor:
        """Draw where to paint: bool ``(B, 1, H, W)``."""
        by_superpixel = torch.rand(len(images)) < 0.5
        shapes = torch.empty(len(images), 1, *images.shape[-2:], dtype=torch.bool, device=images.device)
        for painter, chosen in ((SuperpixelAnomaly, by_superpixel), (PerlinAnomaly, ~by_superpixel)):
            index = chosen.nonzero().flatten().to(images.device)
            if len(index) > 0:
                shapes.index_copy_(0, index, painter.shapes(self, images[index]))
        return shapes


def _stretched_noise(images: torch.Tensor, lowest: float, highest: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Perlin noise ``(B, H, W)`` of random scale, direction and stretch, and its mean frequency ``(B,)``."""
    batch, _, height, width = images.shape
    frequency = log_uniform(batch, lowest, highest, device=images.device)
    stretch = log_uniform(batch, 1 / 3, 3.0, device=images.device)
    axes = torch.stack([frequency * stretch, frequency / stretch], dim=1).clamp(0.5, 64)
    angle = uniform(batch, 0, torch.pi, device=images.device)
    # The narrowest lattice cell, stretched as far as can be, is three steps wide.
    step = max(1, int(max(height, width) / (3 * highest * 3.0**0.5)))
    return random_perlin_noise(height, width, axes, angle, step), frequency


def _window(shape: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """Discs around a random point of each shape ``(B, H, W)``, or everything for some of the batch."""
    batch, height, width = shape.shape
    device, side = shape.device, max(height, width)
    # The highest of random numbers inside the shape: a draw from it without waiting for the device. One number for
    # four by four pixels does.
    draw = torch.rand(batch, 1, -(-height // 4), -(-width // 4), device=device) * _interest(images[..., ::4, ::4])
    draw = functional.interpolate(draw, scale_factor=4.0, mode="nearest")[:, 0, :height, :width]
    centre = (draw * shape).flatten(1).argmax(dim=1).view(-1, 1, 1)
    y = torch.arange(height, device=device).view(1, -1, 1) - centre.div(width, rounding_mode="floor")
    x = torch.arange(width, device=device).view(1, 1, -1) - centre.remainder(width)
    radius = log_uniform(batch, 0.08, 0.6, device=device).view(-1, 1, 1) * side
    return (y.square() + x.square() <= radius.square()) | choose(batch, 0.25, device=device).view(-1, 1, 1)


def _interest(images: torch.Tensor) -> torch.Tensor:
    """Where a defect matters, ``(B, 1, H, W)``: 1 on what differs from the frame of the image, less on what does not.

    Objects are photographed on plain backgrounds, and a defect is on the object. A texture differs from its own
    mean nearly everywhere, or nearly nowhere; either way its draw stays even enough.
    """
    frame = torch.cat([images[..., :2, :].flatten(2), images[..., :, :2].flatten(2)], dim=2).mean(dim=2)
    difference = (images - frame[..., None, None]).abs().amax(dim=1, keepdim=True)
    return torch.where(difference > 0.1, 1.0, 0.9)


def _offsets(shape: torch.Size, pixel: torch.Tensor, number: torch.Tensor) -> torch.Tensor:
    """Where in the memory of images ``(B, C, H, W)`` some pixels lie, ``(C, N)``."""
    _, channels, height, width = shape
    first = pixel + number * ((channels - 1) * height * width)
    return first + torch.arange(channels, device=pixel.device).view(-1, 1) * (height * width)


def _pick(images: torch.Tensor, pixel: torch.Tensor, number: torch.Tensor) -> torch.Tensor:
    """Some pixels of images ``(B, C, H, W)``, as ``(C, N)``."""
    return images.flatten()[_offsets(images.shape, pixel, number)]


def _to_lab(pixels: torch.Tensor) -> torch.Tensor:
    """CIELAB of pixels ``(3, N)``."""
    return rgb_to_lab(pixels.unsqueeze(0)).squeeze(0)


def _squared_length(difference: torch.Tensor) -> torch.Tensor:
    """Squared CIE76 delta E ``(N,)`` of differences in CIELAB ``(3, N)``; norm() takes ten times as long."""
    return difference.square().sum(dim=0)


def _box_mean(values: torch.Tensor, window: int) -> torch.Tensor:
    """Mean over a square window of odd side, of the pixels in the image: by running sums, whatever the side."""
    for dim in (-2, -1):
        size = values.shape[dim]
        place = torch.arange(size, device=values.device)
        first, behind = (place - window // 2).clamp_min(0), (place + window // 2 + 1).clamp_max(size)
        sums = functional.pad(values.cumsum(dim), (0, 0, 1, 0) if dim == -2 else (1, 0))
        count = (behind - first).view(-1, *[1] * (-dim - 1))
        values = sums.index_select(dim, behind).sub_(sums.index_select(dim, first)).div_(count)
    return values
