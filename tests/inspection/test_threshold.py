# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from anomalib.data import ImageBatch
from anomalib.metrics import F1AdaptiveThreshold
from sklearn.metrics import f1_score

from anomalib_twostage.inspection.threshold import MidwayF1Threshold, MidwayPostProcessor

FIELDS = ["pred_score", "gt_label"]


def batch(scores: torch.Tensor, labels: torch.Tensor) -> ImageBatch:
    return ImageBatch(image=torch.zeros(len(scores), 3, 4, 4), pred_score=scores, gt_label=labels)


def thresholds(scores: torch.Tensor, labels: torch.Tensor) -> tuple[float, float]:
    """Ours and anomalib's."""
    metrics = MidwayF1Threshold(fields=FIELDS), F1AdaptiveThreshold(fields=FIELDS)
    for metric in metrics:
        metric.update(batch(scores, labels))
    return float(metrics[0].compute()), float(metrics[1].compute())


@pytest.mark.parametrize("seed", range(8))
def test_no_score_is_on_the_threshold_and_none_labels_better(seed: int) -> None:
    torch.manual_seed(seed)
    labels = torch.randint(0, 2, (40,))
    scores = (torch.rand(40) + 0.5 * labels).mul(20).round() / 40  # with ties
    ours, theirs = thresholds(scores, labels)
    below, above = scores[scores < ours], scores[scores > ours]
    assert len(below) + len(above) == len(scores)
    assert ours - float(below.max()) == pytest.approx(float(above.min()) - ours, abs=1e-6)
    assert float(above.min()) == theirs
    best = max(f1_score(labels, scores >= threshold) for threshold in scores.unique())
    assert f1_score(labels, scores > ours) == pytest.approx(best)


@pytest.mark.parametrize("label", [0, 1])
def test_one_class_alone_keeps_the_threshold_of_anomalib(label: int) -> None:
    ours, theirs = thresholds(torch.tensor([0.2, 0.5, 0.4]), torch.full((3,), label))
    assert ours == theirs


def test_the_lowest_of_all_scores_keeps_the_threshold_of_anomalib() -> None:
    ours, theirs = thresholds(torch.tensor([0.3, 0.3, 0.3]), torch.tensor([0, 1, 1]))
    assert ours == theirs


def test_rounding_moves_no_label() -> None:
    processor = MidwayPostProcessor()
    scores, labels = torch.tensor([0.1, 0.2, 0.6, 0.9]), torch.tensor([0, 0, 1, 1])
    result = batch(scores, labels)
    result.anomaly_map, result.gt_mask = scores.view(4, 1, 1, 1), labels.view(4, 1, 1)
    processor.on_validation_batch_end(None, None, result)
    processor.on_validation_epoch_end(None, None)
    for shift in (-1e-3, 0, 1e-3):
        shifted = batch(scores + shift, labels)
        shifted.anomaly_map = (scores + shift).view(4, 1, 1, 1)
        processor.post_process_batch(shifted)
        assert shifted.pred_label.tolist() == [False, False, True, True]
        assert shifted.pred_mask.flatten().tolist() == [False, False, True, True]
