# SPDX-License-Identifier: Apache-2.0
"""The golden template: how far each pixel is from the good images at the same place.

Inspection has long compared a part with a golden sample. Parts that come to lie in the same place give away at once
what the good ones never look like there. Of parts that lie at any angle, like screws, some good image lies about alike:
therefore an image is compared with all good images together, and with the few that are nearest to it. Where nothing is
alike, as in textures, the first comparison shows little but the image itself on another scale, and the second is left
out.

SPADE (Cohen and Hoshen, 2020) retrieves the nearest good images, and PaDiM (Defard et al., 2021) keeps statistics of
each place, both in the features of a pre-trained network; here they are of the colours alone, so nothing has to be
pre-trained.
"""

import logging
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from anomalib_twostage.common.buffers import resize_buffers
from anomalib_twostage.common.precision import full_precision
from anomalib_twostage.common.resize import antialiased_resize
from anomalib_twostage.common.tracing import is_exporting

__all__ = ["GoldenTemplate"]

logger = logging.getLogger(__name__)

_NOISE = 0.05  # added to the spread, so that a pixel which never changed is not alarming at the first grey level
_FEW_NOISE = 0.1  # the same for the spread of a few images, which may agree by chance
_SCALE = 0.3  # brings most deviations into the range of the images
_LIMIT = 3.0  # beyond ten times the spread all is equally far
_GALLERY_SIDE = 128  # 500 images of this size are 23 MiB, and their keys another 6
_KEY_SIDE = 32


class GoldenTemplate(nn.Module):
    """Deviation of images from all good images, pixel by pixel, and from the good images nearest to each.

    The nearest are those with the least squared difference at 32 x 32 pixels. They are kept with a longer side of at
    most 128 pixels, in bytes. Neither choosing them nor comparing with them heeds the mean of a channel over the image:
    brighter light is not another part, and no defect. They are kept only if they tell more of a good image than the
    mean of all the others does; where nothing is alike, as in a texture, that deviation is zero.

    Before :meth:`fit` the template is a grey image of even spread.

    Args:
        channels: Channels of the images.
        num_neighbors: Nearest good images to compare with, 0 for none. In training mode the very nearest is left out:
            a training image would find itself.

    Raises:
        ValueError: If ``num_neighbors`` is negative.

    Example:
        >>> template = GoldenTemplate().eval()
        >>> template.fit(torch.rand(20, 3, 64, 48))
        >>> template(torch.rand(2, 3, 64, 48)).shape
        torch.Size([2, 6, 64, 48])
    """

    mean: torch.Tensor
    spread: torch.Tensor
    gallery: torch.Tensor
    keys: torch.Tensor

    def __init__(self, channels: int = 3, num_neighbors: int = 4) -> None:
        super().__init__()
        if not isinstance(num_neighbors, int) or num_neighbors < 0:
            msg = f"num_neighbors must be a whole number, 0 or more, got {num_neighbors}."
            raise ValueError(msg)
        self.num_neighbors = num_neighbors
        self.register_buffer("mean", torch.full((channels, 1, 1), 0.5))
        self.register_buffer("spread", torch.full((channels, 1, 1), 0.25))
        if num_neighbors:
            self.register_buffer("gallery", torch.zeros(0, channels, 1, 1, dtype=torch.uint8))
            self.register_buffer("keys", torch.zeros(0, channels * _KEY_SIDE**2))

    @property
    def out_channels(self) -> int:
        """Channels of the deviations."""
        return len(self.mean) * (2 if self.num_neighbors else 1)

    def fit(self, images: Iterable[torch.Tensor]) -> None:
        """Take the statistics of good images, and keep them.

        Args:
            images: Images ``(C, H, W)`` in [0, 1], one by one; sizes that differ from the first one's are scaled to it.

        Raises:
            ValueError: If there is no image, or one has another number of channels.
        """
        count, total, squares = 0, torch.empty(0), torch.empty(0)
        gallery, keys = [], []
        for image in images:
            if image.ndim != 3 or image.shape[0] != self.mean.shape[0]:
                msg = f"A template of {self.mean.shape[0]} channels takes images (C, H, W), got {tuple(image.shape)}."
                raise ValueError(msg)
            values = image.detach().double()  # where the image is: not every device has 64 bits
            if count == 0:
                total, squares = torch.zeros_like(values), torch.zeros_like(values)
            elif values.shape != total.shape:
                values = _resized(values, total.shape[-2:])
            count += 1
            total += values
            squares += values.square()
            if self.num_neighbors:
                small = antialiased_resize(values.float(), _gallery_size(*values.shape[-2:]))
                keys.append(_key(small.unsqueeze(0)))
                gallery.append((small * 255).round().clamp(0, 255).to(torch.uint8))
        if count == 0:
            msg = "A template needs at least one good image, got none."
            raise ValueError(msg)
        device = self.mean.device
        mean = total / count
        variance = (squares / count - mean.square()).clamp_min(0)
        self.mean, self.spread = (value.float().to(device) for value in (mean, variance.sqrt()))
        if self.num_neighbors:
            self.gallery, self.keys = torch.stack(gallery).to(device), torch.cat(keys).to(device)
            share = self._share_to_nearest()
            used = share < 1
            logger.info(
                "Squared difference of good images to the mean of their %d nearest: %.2f times that to the mean of all "
                "others. The nearest are %s.",
                *(self.num_neighbors, share, "used" if used else "left out"),
            )
            if not used:  # copies of nothing, for a checkpoint holds all that a view looks at
                self.gallery, self.keys = self.gallery[:0].clone(), self.keys[:0].clone()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Compare images with the template.

        Args:
            images: ``(B, C, H, W)`` in [0, 1]. A template of another size is scaled to theirs.

        Returns:
            Signed deviations in [-3, 3], in the images' type: from all good images ``(B, C, H, W)``, where 0.3 is about
            one standard deviation, and after them, ``(B, C, H, W)`` once more, from the nearest. NaN stays NaN; from
            the nearest all of its channel is.

        Raises:
            TypeError: If the images are not a tensor.
            ValueError: If their shape or number of channels is not as above.
        """
        if not isinstance(images, torch.Tensor):
            msg = f"Images must be a tensor, got {type(images).__name__}."
            raise TypeError(msg)
        if images.ndim != 4 or images.shape[1] != self.mean.shape[0]:
            msg = f"Images must be (B, {self.mean.shape[0]}, H, W), got shape {tuple(images.shape)}."
            raise ValueError(msg)
        values = images.float()
        size = images.shape[-2:]
        mean, spread = self.mean, self.spread
        # Sizes are symbols while the model is traced for export, where a comparison would freeze them.
        if torch.compiler.is_compiling() or mean.shape[-2:] != size:
            mean, spread = _resized(mean, size), _resized(spread, size)
        deviation = (values - mean) * (_SCALE / (spread + _NOISE))
        if self.num_neighbors:
            with full_precision(images.device):
                deviation = torch.cat([deviation, self._from_nearest(values)], dim=1)
        return deviation.clamp(-_LIMIT, _LIMIT).to(images.dtype)

    def _from_nearest(self, images: torch.Tensor) -> torch.Tensor:
        if len(self.gallery) == 0:
            return torch.zeros_like(images)
        small = antialiased_resize(images, self.gallery.shape[-2:])
        skipped = int(self.training)
        nearest = self._nearest(_key(small), skipped + self.num_neighbors)[:, skipped:]
        neighbors = self.gallery[nearest.flatten()].float() / 255
        neighbors = neighbors.reshape(-1, self.num_neighbors, *self.gallery.shape[1:])
        mean = neighbors.mean(dim=1)
        spread = (neighbors - mean.unsqueeze(1)).square().mean(dim=1).sqrt()  # std() takes ten times as long
        deviation = _centred(small - mean) * (_SCALE / (spread + _FEW_NOISE))
        return antialiased_resize(deviation, images.shape[-2:])

    def _nearest(self, keys: torch.Tensor, count: int) -> torch.Tensor:
        """Numbers ``(B, count)`` of the images nearest to keys ``(B, D)``."""
        own = self.keys.float()
        if not is_exporting():  # no matrix product, which a user may allow to be rounded
            distance = torch.cdist(keys, own, compute_mode="donot_use_mm_for_euclid_dist")
            return distance.topk(count, dim=1, largest=False).indices
        # Least |a - b|^2 is most a.b - |b|^2 / 2. About the mean of the keys no digits are lost.
        middle = own.mean(dim=0)
        own = own - middle
        return ((keys - middle) @ own.T - own.square().sum(dim=1) / 2).topk(count, dim=1).indices

    def _share_to_nearest(self) -> float:
        """Squared difference of good images to the mean of their nearest, over that to the mean of all others."""
        count = len(self.gallery)
        if count < self.num_neighbors + 2:  # the nearest would be all the others
            return 1.0
        nearest = self._nearest(self.keys, self.num_neighbors + 1)
        mean = _centred(self.gallery.float().mean(dim=0))
        from_nearest, from_mean = 0.0, 0.0
        for number, found in enumerate(nearest):
            image = _centred(self.gallery[number].float())
            others = found[found != number][: self.num_neighbors]
            from_nearest += float((image - _centred(self.gallery[others].float().mean(dim=0))).square().mean())
            from_mean += float((image - mean).square().mean()) * (count / (count - 1)) ** 2  # the mean of the others
        return from_nearest / from_mean if from_mean else 1.0

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        """Take the sizes of what is loaded: they are those of the images the other template was fitted to."""
        resize_buffers(self, state_dict, prefix, {"mean": 0, "spread": 0, "gallery": 1, "keys": 1})
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def _gallery_size(height: int, width: int) -> tuple[int, int]:
    share = min(1.0, _GALLERY_SIDE / max(height, width))
    return max(1, round(height * share)), max(1, round(width * share))


def _key(images: torch.Tensor) -> torch.Tensor:
    """What images ``(B, C, H, W)`` are compared by: ``(B, C * 32 * 32)`` float32, without their mean colour."""
    return _centred(antialiased_resize(images, (_KEY_SIDE, _KEY_SIDE))).flatten(1)


def _centred(images: torch.Tensor) -> torch.Tensor:
    """Images ``(..., H, W)`` without the mean of each channel."""
    return images - images.mean(dim=(-2, -1), keepdim=True)


def _resized(image: torch.Tensor, size: torch.Size) -> torch.Tensor:
    return functional.interpolate(image.unsqueeze(0), size=size, mode="bilinear", align_corners=False).squeeze(0)
