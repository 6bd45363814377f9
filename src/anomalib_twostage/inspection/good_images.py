# SPDX-License-Identifier: Apache-2.0
"""A threshold from good images alone: as many false alarms as the user is willing to look at.

Where no validation image is defective, anomalib takes the highest score of the good ones, however few there are. Here
the user names the share of good images that may be called defective. A fresh good image is as likely to come to lie at
any of the n + 1 places among n held-out ones, so with the k-th highest of them as threshold it is called defective with
a probability of k / (n + 1) at most. That holds whatever the scores are, as long as training did not see the images.
"""

import math

import torch
from anomalib.metrics import AnomalibMetric
from torchmetrics import Metric
from torchmetrics.utilities.data import dim_zero_cat

__all__ = ["GoodImagePeaks", "good_image_threshold", "needed_images"]


def good_image_threshold(scores: torch.Tensor, false_alarm_rate: float) -> torch.Tensor:
    """Threshold above which a fresh good image lies with at most this probability.

    It stands halfway between two scores. ``n`` scores cannot tell rates below ``1 / (n + 1)``; for these it is the
    highest score.

    Args:
        scores: ``(n,)`` floating point, of good images that training did not see; at least one.
        false_alarm_rate: Share of good images that may lie above, in (0, 1).

    Returns:
        Scalar tensor.

    Example:
        >>> good_image_threshold(torch.arange(1, 10) / 10, false_alarm_rate=0.2)
        tensor(0.8500)
    """
    ordered = scores.sort().values
    # The rate that was named in decimals may be a hair below what it means: 0.29 * 100 is less than 29.
    above = math.floor(false_alarm_rate * (len(ordered) + 1) + 1e-9)
    highest_normal = ordered[len(ordered) - max(above, 1)]
    higher = ordered[ordered > highest_normal]
    return (highest_normal + higher[0]) / 2 if len(higher) else highest_normal


def needed_images(false_alarm_rate: float) -> int:
    """The fewest good images that can tell a false-alarm rate in (0, 1)."""
    return max(1, math.ceil(1 / false_alarm_rate - 1 - 1e-9))


class _GoodImagePeaks(Metric):
    """See :class:`GoodImagePeaks`."""

    full_state_update = False
    peaks: list[torch.Tensor]
    num_defective: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("peaks", [], dist_reduce_fx="cat")
        self.add_state("num_defective", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, values: torch.Tensor, labels: torch.Tensor) -> None:
        """Add images: scores ``(B,)`` or maps ``(B, ..., H, W)``, and labels ``(B,)``, true for defective ones."""
        defective = labels.bool()
        values = values.detach().float()
        peaks = values.flatten(1).amax(dim=1) if values.ndim > 1 else values
        self.peaks.append(peaks[~(defective | peaks.isnan())])
        self.num_defective += defective.sum()

    def compute(self) -> torch.Tensor:
        """The peaks ``(n,)`` of all good images; none as soon as there is a defective one."""
        peaks = dim_zero_cat(self.peaks)
        return peaks[:0] if self.num_defective else peaks


class GoodImagePeaks(AnomalibMetric, _GoodImagePeaks):  # type: ignore[misc]  # as anomalib's own metrics
    """Collects the highest value of each image, as long as all images are good.

    Its fields are scores or maps, and the images' labels.
    """
