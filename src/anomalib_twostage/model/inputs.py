# SPDX-License-Identifier: Apache-2.0
"""What a network refuses to be given."""

from collections.abc import Sequence

import torch

from anomalib_twostage.common.precision import autocast_is_on

__all__ = ["check_dtype", "check_shape"]


def check_shape(images: torch.Tensor, channels: Sequence[int]) -> None:
    """Refuse images that are not ``(B, C, H, W)`` with one of some numbers of channels.

    Raises:
        TypeError: If they are no tensor.
        ValueError: If they have another shape.
    """
    if not isinstance(images, torch.Tensor):
        msg = f"Images must be a tensor, got {type(images).__name__}."
        raise TypeError(msg)
    if images.ndim != 4 or images.shape[1] not in channels:
        msg = f"Images must be (B, {' or '.join(map(str, channels))}, H, W), got shape {tuple(images.shape)}."
        raise ValueError(msg)


def check_dtype(images: torch.Tensor, dtype: torch.dtype) -> None:
    """Refuse images that are not of the type of a network's weights.

    Raises:
        TypeError: If they are of another that autocast, if it is on, does not convert.
    """
    # Autocast converts float32, float16 and bfloat16 into each other, but not float64.
    converted = autocast_is_on(images.device) and images.dtype != torch.float64
    if not images.is_floating_point() or (images.dtype != dtype and not converted):
        msg = f"Images must be {dtype} in [0, 1] like the network's weights, got {images.dtype}: convert them."
        raise TypeError(msg)
