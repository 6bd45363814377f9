# SPDX-License-Identifier: Apache-2.0
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from sklearn.metrics import average_precision_score, roc_auc_score
from torch import nn

from anomalib_twostage import PerlinAnomaly, SuperpixelPostProcessor, TwoStageSuperpixel
from anomalib_twostage.inspection import painted_defects
from anomalib_twostage.inspection.painted_defects import PaintedDefects
from anomalib_twostage.pseudo_anomaly.random import fixed_seed
from tests.integration.conftest import write_dataset
from tests.model.test_lightning_model import make_data, make_engine, make_model

NAMES = {"painted_pixel_AP", "painted_image_AUROC"}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data"), good=5)


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr(painted_defects, "rank_zero_info", lines.append)
    return lines


class Unpainted(nn.Module):
    """A painter that paints nothing."""

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return images, torch.zeros_like(images[:, :1])


class Course(Callback):
    """Notes the figures of each validation."""

    def __init__(self) -> None:
        self.found: list[dict[str, float]] = []

    def on_validation_end(self, trainer, pl_module) -> None:
        self.found.append({name: float(value) for name, value in trainer.callback_metrics.items() if name in NAMES})


@pytest.fixture
def painted(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """What is painted, of calls that paint every image."""
    results: list[torch.Tensor] = []
    paint = PerlinAnomaly.forward

    def forward(painter: PerlinAnomaly, *inputs: Any) -> Any:
        result = paint(painter, *inputs)
        if painter.probability == 1:
            results.append(result[0].clone())
        return result

    monkeypatch.setattr(PerlinAnomaly, "forward", forward)
    return results


def fit(dataset: Path, folder: Path, *callbacks: Callback, **options: Any) -> tuple[TwoStageSuperpixel, list]:
    seed_everything(0)
    model, course = make_model(**{"stage_one_fraction": 0.5, **options.pop("model", {})}), Course()
    options = {"max_epochs": 4, **options}
    make_engine(folder, callbacks=[course, *callbacks], **options).fit(model, datamodule=make_data(dataset))
    return model, course.found


def test_figures_are_logged_at_each_validation_of_both_stages(dataset: Path, tmp_path: Path, told: list[str]) -> None:
    _, found = fit(dataset, tmp_path)
    assert len(found) == 4
    assert all(set(figures) == NAMES and all(0 <= value <= 1 for value in figures.values()) for figures in found)
    (line,) = told
    for figures, when in ((found[1], "end of stage one (step 6)"), (found[3], "at the end (step 12)")):
        assert f"{when} pixel AP {figures['painted_pixel_AP']:.3f}" in line


def test_figures_rise_while_the_model_learns(dataset: Path, tmp_path: Path) -> None:
    _, found = fit(dataset, tmp_path, max_epochs=24, check_val_every_n_epoch=12)
    assert found[-1]["painted_pixel_AP"] > found[0]["painted_pixel_AP"] + 0.1


def test_they_are_those_of_an_independent_reference(dataset: Path, tmp_path: Path, painted: list[torch.Tensor]) -> None:
    class Reference(Callback):
        def on_validation_epoch_end(self, trainer, pl_module) -> None:
            good = torch.stack([item.image for item in trainer.datamodule.val_data if not item.gt_label])
            masks = (torch.cat(painted) != good).any(dim=1, keepdim=True)
            with torch.no_grad():
                answers = [pl_module.model(images) for images in (good, torch.cat(painted))]
            truth = torch.cat([torch.zeros_like(masks), masks]).flatten()
            maps = torch.cat([answer.anomaly_map for answer in answers]).flatten()
            self.pixel = average_precision_score(truth, maps)
            scores = torch.cat([answer.pred_score for answer in answers])
            self.image = roc_auc_score([0] * len(good) + [1] * len(good), scores)

    reference = Reference()
    _, found = fit(dataset, tmp_path, reference, max_epochs=1, model={"painter": PerlinAnomaly(probability=0.5)})
    assert found[-1]["painted_pixel_AP"] == pytest.approx(reference.pixel, abs=1e-4)
    assert found[-1]["painted_image_AUROC"] == pytest.approx(reference.image, abs=1e-4)


def test_the_trainings_painter_paints_all_good_images_alike_each_time(
    dataset: Path, tmp_path: Path, painted: list[torch.Tensor]
) -> None:
    painter = PerlinAnomaly(probability=0.3)
    fit(dataset, tmp_path, max_epochs=2, limit_train_batches=1, model={"painter": painter})
    images = torch.cat(painted)
    assert len(images) == 10
    assert torch.equal(images[:5], images[5:])
    assert painter.probability == 0.3


def test_no_more_than_the_asked_number_is_painted(dataset: Path, tmp_path: Path, painted: list[torch.Tensor]) -> None:
    model = {"painter": PerlinAnomaly(probability=0.3)}
    fit(dataset, tmp_path, PaintedDefects(num_images=4), max_epochs=1, limit_train_batches=1, model=model)
    assert len(torch.cat(painted)) == 4


@pytest.mark.parametrize("post_processor", [True, SuperpixelPostProcessor()])
def test_the_training_is_not_disturbed(post_processor: Any, dataset: Path, tmp_path: Path) -> None:
    def run(*callbacks: Callback) -> dict[str, torch.Tensor]:
        model = fit(dataset, tmp_path, *callbacks, max_epochs=2, model={"post_processor": post_processor})[0]
        return {**model.state_dict(), "random numbers": torch.get_rng_state()}

    with_it, without = run(), run(PaintedDefects(num_images=0))
    for name, value in without.items():
        assert torch.equal(value, with_it[name]) or value.isnan().any(), name


def test_checkpoints_and_early_stopping_can_watch_them(dataset: Path, tmp_path: Path) -> None:
    best = ModelCheckpoint(tmp_path / "best", monitor="painted_pixel_AP", mode="max")
    stop = EarlyStopping("painted_image_AUROC", mode="max", patience=1, min_delta=2.0)
    _, found = fit(dataset, tmp_path, best, stop)
    assert len(found) == 2  # the second is no improvement by 2
    assert float(best.best_model_score) == pytest.approx(max(each["painted_pixel_AP"] for each in found))
    assert TwoStageSuperpixel.load_from_checkpoint(best.best_model_path).variant == "small"


def test_nothing_is_measured_outside_of_training(dataset: Path, tmp_path: Path) -> None:
    course = Course()
    make_engine(tmp_path, callbacks=[course]).validate(make_model(), datamodule=make_data(dataset))
    assert course.found == [{}]


def test_it_is_said_that_there_is_no_validation(dataset: Path, tmp_path: Path, told: list[str]) -> None:
    fit(dataset, tmp_path, max_epochs=1, limit_train_batches=1, limit_val_batches=0)
    (line,) = told
    assert "no validation" in line


@pytest.mark.parametrize("reason", ["none is known to be good", "none could be painted"])
def test_it_is_said_once_that_there_are_no_figures(
    reason: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dataset, options = write_dataset(tmp_path / "data"), {}
    if "good" in reason:  # of the first batch, because it is the one with defects
        for folder in ("test", "ground_truth"):
            (dataset / "plate" / folder / "square").rename(dataset / "plate" / folder / "dent")
        options = {"limit_val_batches": 1}
    else:
        options = {"model": {"painter": Unpainted()}}
    _, found = fit(dataset, tmp_path, max_epochs=2, limit_train_batches=1, **options)
    assert found == [{}, {}]
    (message,) = (record.message for record in caplog.records if "painted_pixel_AP" in record.message)
    assert reason in message


def test_a_negative_number_is_refused() -> None:
    with pytest.raises(ValueError, match=r"num_images.*-1"):
        PaintedDefects(num_images=-1)


def test_a_fixed_seed_repeats_and_leaves_the_random_numbers_as_they_are() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    drawn = []
    for _ in range(2):
        with fixed_seed(1, torch.device("cpu")):
            drawn.append(torch.rand(2))
    assert torch.equal(*drawn)
    assert torch.equal(torch.rand(3), expected)
