# SPDX-License-Identifier: Apache-2.0
"""The decoder that both stages of the feature variant share: from features at several strides to a map."""

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional

from .unet import ConvBlock

__all__ = ["Decoder"]


class Decoder(nn.Module):
    """From features, coarsest first, to one logit per pixel: the ascending half of a U-Net.

    Args:
        in_channels: Channels at each level, coarsest first; each further level has twice the resolution.
        widths: Channels of the decoder at each level.
        stride: Stride of the finest level, a power of 2. The logits are enlarged from there: a level of stride 2 gives
            four to each of its places.

    Raises:
        ValueError: If the lengths differ.

    Example:
        >>> decoder = Decoder(in_channels=(112, 40, 24), widths=(64, 64, 32), stride=4)
        >>> decoder(torch.rand(1, 112, 4, 4), torch.rand(1, 40, 8, 8), torch.rand(1, 24, 16, 16)).shape
        torch.Size([1, 1, 64, 64])
    """

    def __init__(self, in_channels: Sequence[int], widths: Sequence[int], stride: int) -> None:
        super().__init__()
        if len(in_channels) != len(widths):
            msg = f"in_channels and widths must be as many, got {tuple(in_channels)} and {tuple(widths)}."
            raise ValueError(msg)
        self.in_channels = tuple(in_channels)
        self.widths = tuple(widths)
        self.stride = stride
        self.lateral = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(own, width, kernel_size=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)
            )
            for own, width in zip(in_channels, widths, strict=True)
        )
        coarser = (0, *widths[:-1])
        self.blocks = nn.ModuleList(
            ConvBlock(above + width, width) for above, width in zip(coarser, widths, strict=True)
        )
        self.head = nn.Conv2d(widths[-1], 4 if stride == 2 else 1, kernel_size=1)
        self.to(memory_format=torch.channels_last)

    @property
    def minimum_size(self) -> int:
        """Smallest height and width in pixels: four places at the coarsest level, for their statistics."""
        return 4 * self.stride * 2 ** (len(self.widths) - 1)

    def forward(self, *levels: torch.Tensor) -> torch.Tensor:
        """Compute one logit per pixel.

        Args:
            levels: Features ``(B, C, h, w)``, coarsest first.

        Returns:
            Logits ``(B, 1, H, W)``, unbounded, where ``H`` and ``W`` are the finest level's times :attr:`stride`.
        """
        features: torch.Tensor | None = None
        for level, lateral, block in zip(levels, self.lateral, self.blocks, strict=True):
            own = lateral(level.contiguous(memory_format=torch.channels_last))
            if features is not None:
                above = functional.interpolate(features, size=own.shape[-2:], mode="bilinear", align_corners=False)
                own = torch.cat([above, own], dim=1)
            features = block(own)
        logits = self.head(features)
        if self.stride == 2:
            return functional.pixel_shuffle(logits, 2)
        height, width = logits.shape[-2:]
        size = (self.stride * height, self.stride * width)
        return functional.interpolate(logits, size=size, mode="bilinear", align_corners=False)
