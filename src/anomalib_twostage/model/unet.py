# SPDX-License-Identifier: Apache-2.0
"""The segmentation network that both stages share: a U-Net (Ronneberger et al., 2015).

The paper gives no network shape. This one keeps the layout of DRAEM's discriminative network (two 3x3
convolutions per level, batch normalisation, skip connections) and adds one choice that decides its cost: a
stem stride of 2 computes everything from half resolution down and enlarges the logits at the end.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import nn
from torch.nn import functional

from .inputs import check_dtype, check_shape

__all__ = ["UNet"]


class ConvBlock(nn.Sequential):
    """Two 3x3 convolutions, each followed by batch normalisation and ReLU.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        stride: Stride of the first convolution.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__(
            nn.Conv2d(in_channels, out_channels, kernel_size=3, stride=stride, padding=1, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(out_channels, out_channels, kernel_size=3, padding=1, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(inplace=True),
        )


class UNet(nn.Module):
    """U-Net that maps an image to one logit per pixel.

    Args:
        in_channels: Channels of the input.
        widths: Channels of each level, finest first; each further level halves the resolution.
        stem_stride: Resolution of the finest level as a divisor of the input's: 1 computes at full
            resolution, 2 at half (about a quarter of the cost) with bilinear enlargement at the end.

    Raises:
        ValueError: If there are fewer than two levels, a width is below 1, or ``stem_stride`` is not 1 or 2.

    Example:
        >>> network = UNet(in_channels=3, widths=(16, 32, 64))
        >>> network(torch.rand(2, 3, 64, 48)).shape
        torch.Size([2, 1, 64, 48])
    """

    def __init__(self, in_channels: int = 3, widths: Sequence[int] = (32, 64, 128, 256, 256), stem_stride: int = 2):
        super().__init__()
        if len(widths) < 2 or min(widths) < 1:
            msg = f"widths must name at least two levels of at least one channel each, got {tuple(widths)}."
            raise ValueError(msg)
        if stem_stride not in (1, 2):
            msg = f"stem_stride must be 1 (full resolution) or 2 (half resolution), got {stem_stride}."
            raise ValueError(msg)
        self.in_channels = in_channels
        self.widths = tuple(widths)
        self.stem_stride = stem_stride
        self.encoder = nn.ModuleList([ConvBlock(in_channels, widths[0], stride=stem_stride)])
        self.encoder.extend(ConvBlock(fine, coarse) for fine, coarse in pairwise(widths))
        self.decoder = nn.ModuleList(
            ConvBlock(coarse + fine, fine) for fine, coarse in zip(widths[-2::-1], widths[:0:-1], strict=True)
        )
        self.head = nn.Conv2d(widths[0], 1, kernel_size=1)
        # Half again as fast to train on a CPU, and what tensor cores want.
        self.to(memory_format=torch.channels_last)

    @property
    def minimum_size(self) -> int:
        """Smallest height and width in pixels that leaves two pixels at the coarsest level."""
        return self.stem_stride * 2 ** len(self.widths)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Compute one logit per pixel.

        Args:
            images: ``(B, in_channels, H, W)``, any ``H`` and ``W`` from :attr:`minimum_size` up.

        Returns:
            Logits ``(B, 1, H, W)``, unbounded. NaN stays NaN, within its own image.

        Raises:
            TypeError: If the images are not of the network's floating-point type.
            ValueError: If their shape, number of channels or size is not as above.
        """
        # Sizes are symbols while the network is traced for export, where a comparison would freeze them.
        if not torch.compiler.is_compiling():
            check_shape(images, (self.in_channels,))
            self._check_size(images)
            check_dtype(images, self.head.weight.dtype)
        features = self.encoder[0](images.contiguous(memory_format=torch.channels_last))
        skips = [features]
        for block in self.encoder[1:]:
            features = block(functional.max_pool2d(features, kernel_size=2))
            skips.append(features)
        for block, skip in zip(self.decoder, skips[-2::-1], strict=True):
            features = functional.interpolate(features, size=skip.shape[-2:], mode="bilinear", align_corners=False)
            features = block(torch.cat([features, skip], dim=1))
        logits = self.head(features)
        if self.stem_stride > 1:
            logits = functional.interpolate(logits, size=images.shape[-2:], mode="bilinear", align_corners=False)
        return logits

    def _check_size(self, images: torch.Tensor) -> None:
        if min(images.shape[-2:]) < self.minimum_size:
            height, width = images.shape[-2:]
            msg = (
                f"Images of {height} x {width} pixels are too small for a network of {len(self.widths)} levels: "
                f"enlarge them to at least {self.minimum_size} x {self.minimum_size}."
            )
            raise ValueError(msg)
