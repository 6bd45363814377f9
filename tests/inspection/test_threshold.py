# SPDX-License-Identifier: Apache-2.0
import re

import pytest
import torch
from anomalib.cli import AnomalibCLI
from anomalib.data import ImageBatch, InferenceBatch
from anomalib.metrics import F1AdaptiveThreshold
from sklearn.metrics import f1_score

from anomalib_twostage.inspection.good_images import good_image_threshold
from anomalib_twostage.inspection.threshold import MidwayF1Threshold, MidwayPostProcessor

FIELDS = ["pred_score", "gt_label"]


def batch(scores: torch.Tensor, labels: torch.Tensor) -> ImageBatch:
    return ImageBatch(image=torch.zeros(len(scores), 3, 4, 4), pred_score=scores, gt_label=labels)


def thresholds(scores: torch.Tensor, labels: torch.Tensor, bins: int | None = None) -> tuple[float, float]:
    """Ours and anomalib's."""
    metrics = [kind(fields=FIELDS, thresholds=bins) for kind in (MidwayF1Threshold, F1AdaptiveThreshold)]
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


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("bins", [3, 11, 200])
def test_binned_it_labels_as_well_as_the_best_bin_without_keeping_scores(bins: int, seed: int) -> None:
    torch.manual_seed(seed)
    labels = torch.randint(0, 2, (40,))
    scores = (torch.rand(40) + 0.5 * labels).mul(20).round().clamp(max=20) / 20  # with ties, some of them on bins
    ours, theirs = (kind(fields=FIELDS, thresholds=bins) for kind in (MidwayF1Threshold, F1AdaptiveThreshold))
    for metric in (ours, theirs):
        for some, their in zip(scores.split(7), labels.split(7), strict=True):
            metric.update(batch(some, their))
    threshold = ours.compute()
    assert torch.equal(scores > threshold, scores >= theirs.compute())
    best = max(f1_score(labels, scores >= candidate) for candidate in torch.linspace(0, 1, bins))
    assert f1_score(labels, scores > threshold) == pytest.approx(best)
    assert sum(state.numel() for state in ours.metric_state.values()) == 4 * bins


def test_binned_it_stands_between_the_bins_where_no_score_is() -> None:
    metric = MidwayF1Threshold(fields=FIELDS, thresholds=11)
    metric.update(batch(torch.tensor([0.12, 0.25, 0.85, 0.9]), torch.tensor([0, 0, 1, 1])))
    assert float(metric.compute()) == pytest.approx(0.55)  # 0.3 to 0.8


@pytest.mark.parametrize("label", [0, 1])
@pytest.mark.parametrize("bins", [None, 11])
def test_one_class_alone_keeps_the_threshold_of_anomalib(label: int, bins: int | None) -> None:
    ours, theirs = thresholds(torch.tensor([0.2, 0.5, 0.4]), torch.full((3,), label), bins)
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


def validate(processor: MidwayPostProcessor, scores: torch.Tensor, labels: torch.Tensor | None = None) -> None:
    """Show scores to a post-processor as a validation of images of 2 x 2 pixels, which peak at half their score.

    There are no masks, as in a folder of good images.
    """
    labels = torch.zeros(len(scores)).int() if labels is None else labels
    for some, their in zip(scores.split(8), labels.split(8), strict=True):
        result = batch(some, their)
        result.anomaly_map = torch.stack([some / 8, some / 4, some / 2, some / 8], dim=1).view(-1, 1, 2, 2)
        processor.on_validation_batch_end(None, None, result)
    processor.on_validation_epoch_end(None, None)


class TestGoodImagesAlone:
    @pytest.mark.parametrize(("count", "rate"), [(30, 0.1), (30, 0.01), (99, 0.01), (150, 0.05), (7, 0.5), (1, 0.3)])
    def test_fresh_good_images_are_called_defective_as_seldom_as_was_asked_for(self, count: int, rate: float) -> None:
        # Of uniform scores a share of 1 - t lies above t. By exchangeability it is at most the rate in the mean, and
        # what n images can tell comes in steps of 1 / (n + 1).
        draws = torch.rand(3000, count, generator=torch.Generator().manual_seed(1))
        alarms = torch.stack([1 - good_image_threshold(scores, rate) for scores in draws])
        error = 4 * float(alarms.std()) / len(draws) ** 0.5
        step = 1 / (count + 1)
        assert float(alarms.mean()) <= max(rate, step) + error
        assert float(alarms.mean()) >= max(rate, step) - step - error

    def test_it_stands_between_two_scores(self) -> None:
        scores = torch.tensor([0.1, 0.2, 0.2, 0.3, 0.3, 0.3, 0.5, 0.9, 0.4])
        assert float(good_image_threshold(scores, 0.2)) == pytest.approx(0.7)
        assert float(good_image_threshold(scores, 0.5)) == pytest.approx(0.35)
        assert float(good_image_threshold(scores, 0.1)) == pytest.approx(0.9)  # 9 images: none may be above

    def test_images_and_masks_alarm_equally_seldom(self) -> None:
        scores = torch.linspace(0.01, 0.4, 40)[torch.randperm(40)]
        processor = MidwayPostProcessor(false_alarm_rate=0.1)
        validate(processor, scores)
        result = batch(scores, torch.zeros(40).int())
        result.anomaly_map = torch.stack([scores / 8, scores / 2], dim=1).view(-1, 1, 1, 2)
        processor.post_process_batch(result)
        alarms = scores > scores.sort().values[36]  # 4 of 41 may alarm, and one of these is the next image
        assert result.pred_label.tolist() == alarms.tolist()
        assert result.pred_mask.flatten(1).any(dim=1).tolist() == alarms.tolist()
        assert processor.num_good_images == 40

    def test_clear_defects_keep_their_order(self) -> None:
        processor = MidwayPostProcessor()
        validate(processor, torch.linspace(0.1, 0.2, 20))
        defects = torch.tensor([0.3, 0.6, 0.9, 1.0])
        result = batch(torch.cat([torch.tensor([0.0]), defects]), torch.tensor([0, 1, 1, 1, 1]))
        result.anomaly_map = result.pred_score.clone().view(5, 1, 1, 1)
        processor.post_process_batch(result)
        assert (result.pred_score.diff() > 0.01).all()
        assert (result.anomaly_map.flatten().diff() > 0.01).all()
        assert result.pred_label.tolist() == [False, True, True, True, True]

    def test_defective_images_bring_the_best_f1_back(self) -> None:
        scores, labels = torch.tensor([0.1, 0.2, 0.6, 0.9]), torch.tensor([0, 0, 1, 1])
        processor = MidwayPostProcessor()
        validate(processor, torch.linspace(0.5, 0.8, 20))
        validate(processor, scores, labels)
        assert float(processor.image_threshold) == pytest.approx(0.4)
        assert processor.num_good_images == 0

    def test_the_log_says_what_so_few_images_can_tell_once(self, caplog: pytest.LogCaptureFixture) -> None:
        processor = MidwayPostProcessor(false_alarm_rate=0.01)
        with caplog.at_level("INFO"):
            for _ in range(2):
                validate(processor, torch.rand(30))
        (message,) = caplog.messages
        assert re.search(r"30 good.*rates below 3\.2 %.*1 %.*99 good", message)
        caplog.clear()
        with caplog.at_level("INFO"):
            validate(processor, torch.rand(120))
        (message,) = caplog.messages
        assert re.search(r"120 good.*at most 1 %", message)

    def test_images_without_a_number_are_left_out(self) -> None:
        processor = MidwayPostProcessor(false_alarm_rate=0.1)
        validate(processor, torch.cat([torch.linspace(0.01, 0.2, 20), torch.tensor([float("nan")])]))
        assert float(processor.image_threshold) == pytest.approx(0.195)

    def test_a_model_made_from_the_state_and_settings_decides_alike(self) -> None:
        trained, loaded = MidwayPostProcessor(false_alarm_rate=0.1), MidwayPostProcessor()
        validate(trained, torch.rand(40))
        loaded.load_state_dict(trained.state_dict())
        loaded.load_checkpoint_config(trained.checkpoint_config())
        assert (loaded.false_alarm_rate, loaded.num_good_images) == (0.1, 40)
        predictions = InferenceBatch(pred_score=torch.rand(20), anomaly_map=torch.rand(20, 1, 4, 4))
        for ours, theirs in zip(trained(predictions), loaded(predictions), strict=True):
            assert torch.equal(ours, theirs)

    @pytest.mark.parametrize("rate", [0.0, 1.0, -0.1, 2.0, float("nan")])
    def test_rates_out_of_range_are_refused(self, rate: float) -> None:
        with pytest.raises(ValueError, match=f"false_alarm_rate must be above 0 and below 1, got {rate}"):
            MidwayPostProcessor(false_alarm_rate=rate)

    def test_the_command_line_names_a_rate(self) -> None:
        cli = AnomalibCLI(
            args=[
                *("fit", "--model", "TwoStageSuperpixel"),
                *("--model.post_processor", "anomalib_twostage.MidwayPostProcessor"),
                *("--model.post_processor.false_alarm_rate", "0.02", "--data", "MVTecAD"),
            ],
            run=False,
        )
        assert cli.model.post_processor.false_alarm_rate == 0.02
