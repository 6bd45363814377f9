# SPDX-License-Identifier: Apache-2.0
"""The golden template: how far each pixel is from the good images at the same place.

Inspection has long compared a part with a golden sample. Parts that come to lie in the same place give away at once
what the good ones never look like there; where they lie anywhere, as textures do, the statistics of all places are
alike, and the deviation is the image itself on another scale. PaDiM (Defard et al., 2021) keeps such statistics of
the features of a pre-trained network; here they are of the colours alone, so nothing has to be pre-trained.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.nn import functional

__all__ = ["GoldenTemplate"]

_NOISE = 0.05  # added to the spread, so that a pixel which never changed is not alarming at the first grey level
_SCALE = 0.3  # brings most deviations into the range of the images
_LIMIT = 3.0  # beyond ten times the spread all is equally far


class GoldenTemplate(nn.Module):
    """Mean and standard deviation of good images, pixel by pixel.

    Before :meth:`fit` the template is a grey image of even spread.

    Args:
        channels: Channels of the images.

    Example:
        >>> template = GoldenTemplate()
        >>> template.fit(torch.rand(20, 3, 64, 48))
        >>> template(torch.rand(2, 3, 64, 48)).shape
        torch.Size([2, 3, 64, 48])
    """

    mean: torch.Tensor
    spread: torch.Tensor

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        self.register_buffer("mean", torch.full((channels, 1, 1), 0.5))
        self.register_buffer("spread", torch.full((channels, 1, 1), 0.25))

    def fit(self, images: Iterable[torch.Tensor]) -> None:
        """Take the statistics of good images.

        Args:
            images: Images ``(C, H, W)`` in [0, 1], one by one; sizes that differ from the first one's are scaled to it.

        Raises:
            ValueError: If there is no image, or one has another number of channels.
        """
        count, total, squares = 0, torch.empty(0), torch.empty(0)
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
        if count == 0:
            msg = "A template needs at least one good image, got none."
            raise ValueError(msg)
        mean = total / count
        variance = (squares / count - mean.square()).clamp_min(0)
        self.mean, self.spread = (value.float().to(self.mean.device) for value in (mean, variance.sqrt()))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Compare images with the template.

        Args:
            images: ``(B, C, H, W)`` in [0, 1]. A template of another size is scaled to theirs.

        Returns:
            Signed deviations ``(B, C, H, W)`` in [-3, 3], in the images' type; 0.3 is about one standard deviation. NaN
            stays NaN.

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
        size = images.shape[-2:]
        mean, spread = self.mean, self.spread
        # Sizes are symbols while the model is traced for export, where a comparison would freeze them.
        if torch.compiler.is_compiling() or mean.shape[-2:] != size:
            mean, spread = _resized(mean, size), _resized(spread, size)
        return ((images.float() - mean) * (_SCALE / (spread + _NOISE))).clamp(-_LIMIT, _LIMIT).to(images.dtype)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        """Take the size of what is loaded: it is that of the images the other template was fitted to."""
        for name in ("mean", "spread"):
            saved, own = state_dict.get(f"{prefix}{name}"), getattr(self, name)
            if saved is not None and saved.ndim == 3 and saved.shape[0] == own.shape[0]:
                setattr(self, name, torch.empty_like(saved, device=own.device, dtype=own.dtype))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def _resized(image: torch.Tensor, size: torch.Size) -> torch.Tensor:
    return functional.interpolate(image.unsqueeze(0), size=size, mode="bilinear", align_corners=False).squeeze(0)
