# SPDX-License-Identifier: Apache-2.0
"""anomalib's post-processor with its thresholds between two scores instead of on one.

anomalib takes the F1-optimal threshold from the scores themselves, counts scores from the threshold up as anomalous
while it searches, and scores above it while it labels. So the validation image on the threshold is counted as found
and then labelled normal, or, once rounding has touched its score in an export, either way.
"""

from typing import Any

import torch
from anomalib.metrics import F1AdaptiveThreshold
from anomalib.post_processing import PostProcessor
from torchmetrics.utilities.data import dim_zero_cat

__all__ = ["MidwayF1Threshold", "MidwayPostProcessor"]


class MidwayF1Threshold(F1AdaptiveThreshold):
    """F1-optimal threshold, halfway between the lowest score that counts as anomalous and the next lower one.

    Where there is no lower score, or the validation set lacks normal or anomalous samples, it is anomalib's threshold.

    Example:
        >>> from anomalib.data import ImageBatch
        >>> threshold = MidwayF1Threshold(fields=["pred_score", "gt_label"])
        >>> scores, labels = torch.tensor([0.1, 0.2, 0.8, 0.9]), torch.tensor([0, 0, 1, 1])
        >>> threshold.update(ImageBatch(image=torch.rand(4, 3, 8, 8), pred_score=scores, gt_label=labels))
        >>> threshold.compute()
        tensor(0.5000)
    """

    def compute(self) -> torch.Tensor:  # type: ignore[override]  # as anomalib, narrower than torchmetrics
        """Compute the threshold, a scalar tensor."""
        threshold = super().compute()
        if not (self._has_anomalous_samples() and self._has_normal_samples()):
            return threshold
        scores = dim_zero_cat(self.preds)
        lower = scores[scores < threshold]
        return (threshold + lower.max()) / 2 if len(lower) else threshold


class MidwayPostProcessor(PostProcessor):
    """Post-processor of anomalib with :class:`MidwayF1Threshold` for images and pixels.

    Args:
        args: See anomalib's ``PostProcessor``.
        kwargs: See anomalib's ``PostProcessor``.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._image_threshold_metric = MidwayF1Threshold(fields=["pred_score", "gt_label"], strict=False)
        self._pixel_threshold_metric = MidwayF1Threshold(fields=["anomaly_map", "gt_mask"], strict=False)
