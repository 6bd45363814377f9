# SPDX-License-Identifier: Apache-2.0
"""Losses between predicted logits and the mask of what was painted."""

import torch
from kornia.losses import binary_focal_loss_with_logits
from torch import nn
from torch.nn import functional

from anomalib_twostage.common.precision import full_precision

__all__ = ["PaperLoss", "SegmentationLoss", "make_loss"]

_SSIM_WINDOW, _SSIM_SPREAD, _SSIM_C1, _SSIM_C2 = 11, 1.5, 0.01**2, 0.03**2  # Wang et al., for values in [0, 1]
_GAMMA = 2.0
_FOCAL_WEIGHT = 8.0  # undoes alpha, a half, and the factor of an undecided pixel, a quarter


class PaperLoss(nn.Module):
    """The published loss, equation (4): squared error plus one minus SSIM.

    Two readings differ from the print. Equation (1) sums the squared error; at 256 x 256 a sum drowns the SSIM
    term, so this takes the mean. Equation (3) multiplies the squared means in SSIM's denominator; this takes
    standard SSIM (Wang et al., 2004), which adds them.

    Example:
        >>> PaperLoss()(torch.zeros(2, 1, 32, 32), torch.zeros(2, 1, 32, 32)).shape
        torch.Size([])
    """

    def forward(self, logits: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Compare logits ``(B, 1, H, W)`` with masks ``(B, 1, H, W)`` in {0, 1}; returns a scalar."""
        prediction, mask = logits.float().sigmoid(), mask.float()
        # SSIM subtracts nearly equal numbers; autocast would take its means in half precision.
        with full_precision(logits.device):
            similarity = _ssim(prediction, mask).mean()
        return functional.mse_loss(prediction, mask) + (1 - similarity)


def _ssim(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """SSIM of maps ``(B, 1, H, W)``, pixel by pixel; that of libraries sends its window to the device, and waits."""
    place = torch.arange(_SSIM_WINDOW, device=first.device, dtype=first.dtype) - _SSIM_WINDOW // 2
    window = (place.square() / (-2 * _SSIM_SPREAD**2)).exp()
    window = (window / window.sum()).view(1, 1, 1, -1)
    moments = torch.cat([first, second, first.square(), second.square(), first * second])
    moments = functional.pad(moments, (_SSIM_WINDOW // 2,) * 4, mode="reflect")
    moments = functional.conv2d(functional.conv2d(moments, window), window.mT)
    mean, other, square, other_square, product = moments.chunk(5)
    covariance = product - mean * other
    variances = square - mean.square() + other_square - other.square()
    luminance = (2 * mean * other + _SSIM_C1) / (mean.square() + other.square() + _SSIM_C1)
    return luminance * (2 * covariance + _SSIM_C2) / (variances + _SSIM_C2)


class SegmentationLoss(nn.Module):
    """The default loss: focal loss plus soft Dice.

    Both give every pixel a gradient from the first step, where the published loss first flattens the map. The focal
    loss (Lin et al., 2017, equation 4, with gamma 2) is a cross-entropy that pays little heed to pixels that are right
    already: most of them are good and easy, and it is the doubtful ones that decide how well a map ranks. It is scaled
    so that an undecided pixel costs what it does under cross-entropy. Dice weighs a small defect like a large one; it
    is taken over the batch, so that an image without a defect does not define an empty overlap.

    Example:
        >>> SegmentationLoss()(torch.zeros(2, 1, 32, 32), torch.zeros(2, 1, 32, 32)).shape
        torch.Size([])
    """

    def forward(self, logits: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Compare logits ``(B, 1, H, W)`` with masks ``(B, 1, H, W)`` in {0, 1}; returns a scalar."""
        logits, mask = logits.float(), mask.float()
        prediction = logits.sigmoid()
        dice = (2 * (prediction * mask).sum() + 1) / (prediction.sum() + mask.sum() + 1)
        focal = binary_focal_loss_with_logits(logits, mask, alpha=0.5, gamma=_GAMMA, reduction="mean")
        return _FOCAL_WEIGHT * focal + (1 - dice)


_LOSSES: dict[str, type[nn.Module]] = {"default": SegmentationLoss, "paper": PaperLoss}


def make_loss(name: str) -> nn.Module:
    """Build the loss ``"default"`` or ``"paper"``.

    Raises:
        ValueError: If there is none of that name.
    """
    if name not in _LOSSES:
        msg = f"loss must be one of {sorted(_LOSSES)}, got {name!r}."
        raise ValueError(msg)
    return _LOSSES[name]()
