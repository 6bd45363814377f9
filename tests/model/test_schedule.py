# SPDX-License-Identifier: Apache-2.0
import copy
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.callbacks import EarlyStopping, EMAWeightAveraging

from anomalib_twostage import TwoStageSuperpixel
from anomalib_twostage.model import schedule
from anomalib_twostage.model.schedule import TwoStageSchedule
from tests.integration.conftest import write_dataset

from .test_lightning_model import make_data, make_engine, make_model

STEPS = 6  # of a whole run in epochs of 3 batches; half of them for stage one


class Recorder(Callback):
    """Notes the stage, whether stage one learns, and the learning rate of every optimiser step."""

    def __init__(self) -> None:
        self.stages: list[int] = []
        self.trainable: list[bool] = []
        self.rates: list[float] = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        self.stages.append(pl_module.model.stage)
        self.trainable.append(all(weight.grad is not None for weight in pl_module.model.stage_one.parameters()))
        self.rates.append(optimizer.param_groups[0]["lr"])


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data"))


def fit(model: TwoStageSuperpixel, dataset: Path, folder: Path, steps: int = STEPS, **options: Any) -> Recorder:
    recorder = Recorder()
    engine = make_engine(folder, callbacks=[recorder], max_steps=steps, max_epochs=-1, limit_val_batches=0)
    engine.fit(model, datamodule=make_data(dataset), **options)
    engine.trainer.save_checkpoint(folder / "model.ckpt")
    return recorder


@pytest.fixture(scope="module")
def trained(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[TwoStageSuperpixel, Path]:
    """A model at the end of its training, and its checkpoint."""
    folder = tmp_path_factory.mktemp("trained")
    model = make_model(stage_one_fraction=0.5)
    fit(model, dataset, folder)
    return model, folder / "model.ckpt"


@pytest.mark.parametrize("loaded", [False, True])
def test_a_second_fit_begins_with_stage_one(
    loaded: bool, trained: tuple[TwoStageSuperpixel, Path], dataset: Path, tmp_path: Path
) -> None:
    model, path = trained
    model = TwoStageSuperpixel.load_from_checkpoint(path) if loaded else copy.deepcopy(model)
    before = copy.deepcopy(model.model.stage_one.state_dict())
    recorder = fit(model, dataset, tmp_path)
    assert recorder.stages == [1] * 3 + [2] * 3
    assert recorder.trainable == [True] * 3 + [False] * 3
    after = model.model.stage_one.state_dict()
    assert all(not torch.equal(before[name], after[name]) for name, _ in model.model.stage_one.named_parameters())


def test_a_model_that_was_only_looked_at_learns_as_a_fresh_one(dataset: Path, tmp_path: Path) -> None:
    class Modes(Callback):
        """Notes who is in training mode at each step."""

        def __init__(self) -> None:
            self.seen: list[tuple[bool, ...]] = []

        def on_train_batch_end(self, trainer, pl_module, *args) -> None:
            model = pl_module.model
            self.seen.append((pl_module.training, *(part.training for part in (model.stage_one, model.stage_two))))

    def fit(looked_at: bool) -> list[tuple[bool, ...]]:
        model, modes = make_model(), Modes()
        options = {"max_steps": 2, "max_epochs": -1, "limit_val_batches": 0}
        make_engine(tmp_path, callbacks=[modes], **options).fit(
            model.eval() if looked_at else model, make_data(dataset)
        )
        return modes.seen

    assert fit(looked_at=True) == fit(looked_at=False) == [(True, True, True), (True, False, True)]


def test_more_epochs_on_the_same_trainer_go_on_where_it_stood(dataset: Path, tmp_path: Path) -> None:
    recorder, model = Recorder(), make_model(stage_one_fraction=0.5)
    engine = make_engine(tmp_path, callbacks=[recorder], max_epochs=2, limit_val_batches=0)
    engine.fit(model, datamodule=make_data(dataset))
    stage_one = copy.deepcopy(model.model.stage_one.state_dict())
    engine.trainer.fit_loop.max_epochs = 3
    engine.trainer.fit(model, datamodule=make_data(dataset))
    assert recorder.stages == [1] * 3 + [2] * 6
    assert all(torch.equal(value, model.model.stage_one.state_dict()[name]) for name, value in stage_one.items())


def test_a_run_resumed_for_longer_decays_once_and_says_that_stage_one_stays(
    trained: tuple[TwoStageSuperpixel, Path], dataset: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, path = make_model(stage_one_fraction=0.5), trained[1]
    recorder = fit(model, dataset, tmp_path, steps=4 * STEPS, ckpt_path=path)
    assert recorder.stages == [2] * 3 * STEPS
    assert (np.diff(recorder.rates) < 0).all()
    assert recorder.rates[0] > 0.5 * model.learning_rate
    assert recorder.rates[-1] < 0.05 * model.learning_rate
    assert any(record.levelno == logging.WARNING and "tage one" in record.message for record in caplog.records)
    for name, value in trained[0].model.stage_one.state_dict().items():
        assert torch.equal(value, model.model.stage_one.state_dict()[name])


def test_a_longer_run_resumed_in_stage_one_is_shared_anew(
    dataset: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert fit(make_model(stage_one_fraction=0.5), dataset, tmp_path / "first", steps=1).stages == [1]
    caplog.clear()
    model, path = make_model(stage_one_fraction=0.5), tmp_path / "first" / "model.ckpt"
    assert fit(model, dataset, tmp_path / "second", ckpt_path=path).stages == [1] * 2 + [2] * 3
    assert not [record for record in caplog.records if record.name == schedule.__name__]


@pytest.mark.parametrize("share", [0.3, 0.7])
def test_a_run_resumed_as_long_as_planned_keeps_its_learning_rates(share: float) -> None:
    whole = TwoStageSchedule(100, share)
    resumed = TwoStageSchedule(100, share, switch=whole.switch)
    assert [resumed.factor(step) for step in range(100)] == [whole.factor(step) for step in range(100)]


@pytest.mark.parametrize(("total", "fraction", "switch"), [(100, 0.7, 70), (2, 0.9, 1), (1, 0.5, 1), (3, 0.01, 1)])
def test_both_stages_get_a_step_where_there_are_two(total: int, fraction: float, switch: int) -> None:
    assert TwoStageSchedule(total, fraction).switch == switch


def test_the_end_before_stage_two_is_said(dataset: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    stop = EarlyStopping("train_loss", patience=1, mode="max", check_on_train_epoch_end=True, min_delta=1e9)
    engine = make_engine(tmp_path, callbacks=[stop], max_epochs=10, limit_val_batches=0)
    engine.fit(make_model(), datamodule=make_data(dataset))
    assert 0 < engine.trainer.global_step < 21
    (message,) = (record.message for record in caplog.records if "before stage two" in record.message)
    assert str(engine.trainer.global_step) in message
    assert "21" in message  # when stage two would have begun


def test_nothing_is_said_of_a_run_with_both_stages(
    dataset: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fit(make_model(), dataset, tmp_path, steps=2)
    assert not [record for record in caplog.records if record.name == schedule.__name__]


@pytest.mark.parametrize("use_buffers", [True, False])
def test_weights_can_be_averaged(use_buffers: bool, dataset: Path, tmp_path: Path) -> None:
    class Last(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
            """What is averaged, before the averages take its place."""
            self.weights = {name: value.clone() for name, value in pl_module.model.named_parameters()}
            self.template = copy.deepcopy(pl_module.model.template.state_dict())

    model, last = make_model(stage_one_fraction=0.5), Last()
    average = EMAWeightAveraging(decay=0.9, use_buffers=use_buffers)
    engine = make_engine(tmp_path, callbacks=[last, average], max_steps=STEPS, max_epochs=-1)
    engine.fit(model, datamodule=make_data(dataset))
    assert model.model.stage == 2
    assert not any(torch.equal(value, last.weights[name]) for name, value in model.model.named_parameters())
    assert all(torch.equal(value, last.template[name]) for name, value in model.model.template.state_dict().items())
    # Stage two goes on from stage one in the average too, not from the random weights that the copy was made with.
    first, second = (network.encoder[1][0].weight for network in (model.model.stage_one, model.model.stage_two))
    assert (second - first).norm() < 0.1 * first.norm()
    assert model.post_processor.image_threshold.isfinite()

    engine.trainer.save_checkpoint(tmp_path / "model.ckpt")
    loaded = TwoStageSuperpixel.load_from_checkpoint(tmp_path / "model.ckpt").state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in model.state_dict().items())


def test_a_run_with_averaged_weights_can_be_resumed(dataset: Path, tmp_path: Path) -> None:
    def run(steps: int, **options: Any) -> TwoStageSuperpixel:
        model, average = make_model(stage_one_fraction=0.5), EMAWeightAveraging(decay=0.9)
        callbacks = [average, Interruption(steps)]
        engine = make_engine(tmp_path, callbacks=callbacks, max_epochs=2, limit_val_batches=0)
        engine.fit(model, datamodule=make_data(dataset), **options)
        return model

    class Interruption(Callback):
        def __init__(self, steps: int) -> None:
            self.steps = steps

        def on_train_epoch_end(self, trainer, pl_module) -> None:
            if trainer.global_step == self.steps:
                trainer.save_checkpoint(tmp_path / "interrupted.ckpt")

    seed_everything(0)
    whole = run(3)
    seed_everything(0)
    torch.rand(7)
    resumed = run(0, ckpt_path=tmp_path / "interrupted.ckpt")
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name
