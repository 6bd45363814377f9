# SPDX-License-Identifier: Apache-2.0
import logging
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback

from anomalib_twostage.inspection import training_time
from anomalib_twostage.inspection.training_time import TrainingTime
from tests.integration.conftest import write_dataset
from tests.model.test_lightning_model import make_data, make_engine, make_model

STEPS = 24  # of a run in epochs of 3 batches
STEP, STEP_TWO, VALIDATION, START = 1.0, 1.6, 6.0, 30.0  # seconds of the machine that the tests imagine


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data"))


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr(training_time, "rank_zero_info", lines.append)
    return lines


class Machine(Callback):
    """A clock, and what lets it run on. Stands before the callback that reads it."""

    def __init__(self, first: float = STEP, second: float = STEP_TWO, warm_up: float = 0.0) -> None:
        self.seconds = {1: first, 2: second}
        self.warm_up = warm_up  # more seconds of the first step of each stage
        self.now = 100.0
        self.stages: list[int] = []
        self.validated: list[int] = []

    def __call__(self) -> float:
        return self.now

    def on_train_start(self, trainer, pl_module) -> None:
        self.began = self.now
        self.now += START

    def on_train_batch_end(self, trainer, pl_module, *args) -> None:
        stage = pl_module.model.stage
        self.now += self.seconds[stage] + (0 if stage in self.stages else self.warm_up)
        self.stages.append(stage)

    def on_validation_batch_end(self, trainer, pl_module, *args) -> None:
        self.now += VALIDATION / 2  # of two batches

    def on_validation_end(self, trainer, pl_module) -> None:
        self.validated.append(len(self.stages))

    def on_train_end(self, trainer, pl_module) -> None:
        self.took = self.now - self.began


def fit(dataset: Path, folder: Path, machine: Machine, **options: Any) -> TrainingTime:
    clock, model = TrainingTime(machine), make_model(stage_one_fraction=options.pop("share", 0.5))
    options = {"max_steps": STEPS, "max_epochs": -1, "limit_val_batches": 0, **options}
    fitting = {key: options.pop(key) for key in ("ckpt_path",) if key in options}
    callbacks = [*options.pop("callbacks", []), machine, clock]
    engine = make_engine(folder, callbacks=callbacks, **options)
    engine.fit(model, datamodule=make_data(dataset), **fitting)
    engine.trainer.save_checkpoint(folder / "model.ckpt")
    return clock


def test_one_line_tells_steps_images_time_share_and_the_first_validation(
    dataset: Path, tmp_path: Path, told: list[str]
) -> None:
    machine = Machine(warm_up=50.0)
    options = {"limit_val_batches": 1.0, "val_check_interval": 11, "check_val_every_n_epoch": None}
    clock = fit(dataset, tmp_path, machine, **options)
    first, second = told
    assert "24 steps of 2 images, 48 in all" in first
    assert "Stage one is 38 % of that, until step 12" in first
    assert "at step 11, in 1 s" in first  # it is told after the tenth
    assert "left" in second
    # 30 s to begin with, 50 s to warm up, 10 s timed, 2 s + 12 * 1.6 s to go, and two validations of 6 images
    predicted = 30 + 50 + 10 + 2 + 12 * 1.6 + 2 * 6 / 2
    assert f"about {predicted / 60:.1f} min on cpu" in first
    assert clock.predicted == pytest.approx(machine.took, rel=0.01)  # as told in stage two


@pytest.mark.parametrize("second", [1.0, 1.6, 2.5])
def test_stage_two_is_timed_when_it_has_begun(second: float, dataset: Path, tmp_path: Path, told: list[str]) -> None:
    machine = Machine(second=second)
    clock = fit(dataset, tmp_path, machine)
    assert clock.seconds == pytest.approx({1: 1.0, 2: second})
    assert clock.predicted == pytest.approx(machine.took)
    assert f"about {2 * second:.0f} s" in told[1]


def test_validations_that_were_seen_count_as_they_were(dataset: Path, tmp_path: Path, told: list[str]) -> None:
    machine = Machine()
    options = {"limit_val_batches": 1.0, "max_steps": -1, "max_epochs": 8}
    clock = fit(dataset, tmp_path, machine, **options)
    assert len(machine.validated) == 8
    assert clock.predicted == pytest.approx(machine.took)
    assert "validation" not in told[0]


def test_slow_steps_are_not_waited_for_so_long(dataset: Path, tmp_path: Path, told: list[str]) -> None:
    class Now(Callback):
        """Notes at which step the line comes."""

        step = 0

        def on_train_batch_start(self, *args) -> None:
            self.step += not told

    now = Now()
    fit(dataset, tmp_path, Machine(first=8.0), callbacks=[now])
    assert now.step == 5  # two to warm up and three that took 24 s


@pytest.mark.parametrize(
    "options",
    [
        {"max_epochs": 5},
        {"max_epochs": 7, "check_val_every_n_epoch": 3},
        {"max_epochs": 3, "val_check_interval": 0.34},
        {"max_epochs": 3, "val_check_interval": 2},
        {"max_steps": 8},
        {"max_steps": 11, "val_check_interval": 4, "check_val_every_n_epoch": None},
        {"max_epochs": 4, "accumulate_grad_batches": 2},
        {"max_epochs": 4, "limit_val_batches": 0},
        {"max_epochs": 4, "limit_train_batches": 2, "check_val_every_n_epoch": 2},
    ],
)
def test_validations_are_counted_as_the_trainer_makes_them(options: dict, dataset: Path, tmp_path: Path) -> None:
    class Counts(Callback):
        """Notes how many validations there should have been at each step."""

        def __init__(self) -> None:
            self.expected: dict[int, int] = {}

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
            seen = len(machine.stages)
            self.expected[seen] = training_time._validations(trainer, seen)

    counts, machine = Counts(), Machine()
    options = {"max_steps": -1, "limit_val_batches": 1.0, **options}
    fit(dataset, tmp_path, machine, callbacks=[counts], **options)
    made = {step: sum(each <= step for each in machine.validated) for step in counts.expected}
    assert counts.expected == made


def test_gradients_that_are_accumulated_make_longer_steps(dataset: Path, tmp_path: Path, told: list[str]) -> None:
    machine = Machine()
    clock = fit(dataset, tmp_path, machine, max_steps=-1, max_epochs=8, accumulate_grad_batches=3)
    assert "8 steps of 6 images, 48 in all" in told[0]
    assert clock.predicted == pytest.approx(machine.took, rel=0.05)  # as told in the midst of a step


def test_a_resumed_run_tells_what_it_has_left_to_do(dataset: Path, tmp_path: Path, told: list[str]) -> None:
    fit(dataset, tmp_path / "first", Machine(), max_steps=15)
    told.clear()
    machine = Machine()
    clock = fit(dataset, tmp_path / "second", machine, ckpt_path=tmp_path / "first" / "model.ckpt", max_steps=30)
    (line,) = told
    assert "15 steps" in line
    assert "tage one" not in line
    assert clock.predicted == pytest.approx(machine.took)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"limit_val_batches": 0}, "There is no validation."),
        (
            {"limit_val_batches": 1.0, "val_check_interval": 50, "check_val_every_n_epoch": None},
            "It ends before the first validation.",
        ),
    ],
)
def test_it_is_said_that_no_validation_comes(
    options: dict, said: str, dataset: Path, tmp_path: Path, told: list[str]
) -> None:
    fit(dataset, tmp_path, Machine(), **options)
    assert told[0].endswith(said)


def test_short_runs_are_not_timed_but_named(
    dataset: Path, tmp_path: Path, told: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    fit(dataset, tmp_path, Machine(), max_steps=4)
    assert not told
    (message,) = (record.message for record in caplog.records if "images in all" in record.message)
    assert "8 images" in message


@pytest.mark.parametrize(("images", "word"), [(500, "far fewer"), (1_200, ""), (256_000, ""), (1_000_000, "so many")])
def test_only_runs_far_from_the_documented_ones_are_named(
    images: int, word: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        training_time._compare(images)
    assert len(caplog.records) == bool(word)
    assert word in caplog.text


def test_the_model_brings_the_callback_along(dataset: Path, tmp_path: Path) -> None:
    engine = make_engine(tmp_path, max_steps=1, limit_val_batches=0)
    engine.fit(make_model(), datamodule=make_data(dataset))
    assert sum(isinstance(callback, TrainingTime) for callback in engine.trainer.callbacks) == 1


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.2, "1 s"), (45, "45 s"), (89.6, "90 s"), (90, "1.5 min"), (1800, "30 min"), (9000, "2.5 h")],
)
def test_times_are_spoken_with_two_digits(seconds: float, words: str) -> None:
    assert training_time._spoken(seconds) == words
