# SPDX-License-Identifier: Apache-2.0
"""anomalib's post-processor with its thresholds between two scores instead of on one.

anomalib takes the F1-optimal threshold from the scores themselves, counts scores from the threshold up as anomalous
while it searches, and scores above it while it labels. So the validation image on the threshold is counted as found
and then labelled normal, or, once rounding has touched its score in an export, either way.

Without a defective validation image anomalib takes the highest score of the good ones, and for pixels, if there are no
masks either, that same image score. Here both come from the good images by a rate of false alarms; see
:mod:`~anomalib_twostage.inspection.good_images`.
"""

import logging
import math
from typing import Any

import torch
from anomalib.metrics import F1AdaptiveThreshold
from anomalib.post_processing import PostProcessor
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only
from torchmetrics.utilities.data import dim_zero_cat

from .good_images import GoodImagePeaks, good_image_threshold, needed_images

__all__ = ["MidwayF1Threshold", "MidwayPostProcessor"]

logger = logging.getLogger(__name__)


class MidwayF1Threshold(F1AdaptiveThreshold):
    """F1-optimal threshold, halfway between the lowest score that counts as anomalous and the next lower one.

    Where there is no lower score, or the validation set lacks normal or anomalous samples, it is anomalib's threshold.
    With ``thresholds``, that is in anomalib's binned mode, which keeps counts instead of scores, it is halfway between
    the lowest and the highest bin that tell the samples apart as well as the best one.

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
        if self.thresholds is not None:
            counts = self.confmat.flatten(1)
            best = counts[int((self.thresholds == threshold).int().argmax())]
            highest = self.thresholds[(counts == best).all(dim=1)].amax()
            # Scores on the threshold count, here too.
            return torch.minimum((threshold + highest) / 2, highest.nextafter(threshold - 1))
        scores = dim_zero_cat(self.preds)
        lower = scores[scores < threshold]
        return (threshold + lower.max()) / 2 if len(lower) else threshold


class MidwayPostProcessor(PostProcessor):
    """Post-processor of anomalib with :class:`MidwayF1Threshold` for images and pixels.

    Where validation has good images alone, both thresholds come from these: the image threshold such that at most the
    given share of fresh good images is called defective, the pixel threshold such that at most that share gets any
    marked pixel. ``n`` good images cannot tell rates below ``1 / (n + 1)``, and the log says so. Another rate needs a
    new validation. Scores are then scaled so that all of [0, 1] has its place, which is what this package's model
    predicts; the range of good images alone, by which anomalib scales, would put every clear defect at 1.

    Args:
        args: See anomalib's ``PostProcessor``.
        false_alarm_rate: Share of good images that may be called defective, in (0, 1); used where validation has no
            defective image.
        kwargs: See anomalib's ``PostProcessor``.

    Attributes:
        num_good_images: Good images that the thresholds come from; 0 if there were defective ones as well.

    Raises:
        ValueError: If the rate is out of range.

    Example:
        >>> from anomalib_twostage import MidwayPostProcessor, TwoStageSuperpixel
        >>> model = TwoStageSuperpixel(post_processor=MidwayPostProcessor(false_alarm_rate=0.05))
    """

    def __init__(self, *args: Any, false_alarm_rate: float = 0.01, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not 0 < false_alarm_rate < 1:
            msg = f"false_alarm_rate must be above 0 and below 1, got {false_alarm_rate}."
            raise ValueError(msg)
        self.false_alarm_rate = false_alarm_rate
        self.num_good_images = 0
        self._image_threshold_metric = MidwayF1Threshold(fields=["pred_score", "gt_label"], strict=False)
        self._pixel_threshold_metric = MidwayF1Threshold(fields=["anomaly_map", "gt_mask"], strict=False)
        self._image_peaks = GoodImagePeaks(fields=["pred_score", "gt_label"], strict=False)
        self._pixel_peaks = GoodImagePeaks(fields=["anomaly_map", "gt_label"], strict=False)
        self._told = ""

    @property
    def _checkpoint_config_keys(self) -> tuple[str, ...]:
        return (*super()._checkpoint_config_keys, "false_alarm_rate", "num_good_images")

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *args: Any, **kwargs: Any
    ) -> None:
        """Collect what thresholds and range are taken from."""
        super().on_validation_batch_end(trainer, pl_module, outputs, *args, **kwargs)
        if self.enable_thresholding:
            self._image_peaks.update(outputs)
            self._pixel_peaks.update(outputs)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take thresholds and range."""
        image_peaks, pixel_peaks = _taken(self._image_peaks), _taken(self._pixel_peaks)
        self.num_good_images = max(len(image_peaks), len(pixel_peaks))
        if self.num_good_images:
            # There is nothing to balance; anomalib would take the highest score, and warn.
            self._image_threshold_metric.reset()
            self._pixel_threshold_metric.reset()
        super().on_validation_epoch_end(trainer, pl_module)
        if not self.num_good_images:
            return
        for threshold, peaks in ((self._image_threshold, image_peaks), (self._pixel_threshold, pixel_peaks)):
            threshold.fill_(good_image_threshold(peaks, self.false_alarm_rate) if len(peaks) else math.nan)
        if self.enable_normalization:
            _make_room(self.image_min, self.image_max, self.image_threshold)
            _make_room(self.pixel_min, self.pixel_max, self.pixel_threshold)
        self._tell()

    @rank_zero_only
    def _tell(self) -> None:
        """Log where the threshold comes from, once."""
        count, rate = self.num_good_images, self.false_alarm_rate
        needed = needed_images(rate)
        told = f"Thresholds come from {count} good validation images alone, as none is defective"
        if count < needed:
            told += (
                f": they are the highest values of these, because {count} images cannot tell false-alarm rates below "
                f"{100 / (count + 1):.2g} %. The rate asked for, {100 * rate:.4g} %, needs {needed} good images that "
                "training does not see."
            )
        else:
            told += f": at most {100 * rate:.4g} % of fresh good images should be called defective."
        if told != self._told:
            logger.log(logging.WARNING if count < needed else logging.INFO, told)
        self._told = told


def _taken(metric: GoodImagePeaks) -> torch.Tensor:
    """The peaks that a metric has collected; it starts anew."""
    peaks = metric.compute() if metric.update_called else torch.empty(0)
    metric.reset()
    return peaks


def _make_room(low: torch.Tensor, high: torch.Tensor, threshold: torch.Tensor) -> None:
    """Widen a range of scores around the threshold until all of [0, 1] lies in it."""
    reach = torch.maximum(threshold - low.clamp(max=0), high.clamp(min=1) - threshold)
    low.copy_(threshold - reach)
    high.copy_(threshold + reach)
