# SPDX-License-Identifier: Apache-2.0
"""How long a training will take, said after its first steps."""

import logging
import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only

__all__ = ["TrainingTime"]

logger = logging.getLogger(__name__)

_WARM_UP = 2  # batches of each stage that are not timed: memory is asked for, kernels are chosen
_TIMED = 8  # batches of each stage that are timed; of slow ones
_FEWEST = 3  # so many will do,
_ENOUGH = 20.0  # once they have taken as many seconds

# Until they are timed, a step of stage two is taken to last so many times as long as one of stage one (measured on a
# CPU over the variants: 1.3 to 1.9 at 128 and 256 pixels, 2.4 for the default variant at 512), and an image of the
# validation so many times as long as one of the training (0.4 to 1.6, painted ones included).
_STAGE_TWO = 1.6
_VALIDATION = 1.0

_RESULTS = (4_500, 24_000)  # fewest and most images that this package's models saw for a table in docs/results.md
_FAR = (8, 40)  # how many times fewer than the fewest, or more than the most, is said to be far from it


class _Run(NamedTuple):
    """What a training does, counted for one process."""

    step: int  # at which it begins: above zero if it is resumed
    steps: int  # at which it ends
    switch: int  # at which stage two begins
    batches: float  # per step
    batch: int  # images of a batch of one process,
    images: float  # and in the mean, as the last batch of an epoch may be smaller
    processes: int

    def images_of(self, steps: int) -> int:
        return round(steps * self.batches * self.images * self.processes)


class TrainingTime(Callback):
    """Says after the first steps of a training how long it will take, and what share of that is stage one.

    One line tells steps, images, time and share, and when the first validation comes; another one, when stage two has
    begun and been timed as well, what is left. If the training sees far fewer or far more images than those of the
    documented results, a warning says so once. A GPU is waited for twice per stage, before and after the timed steps.

    :class:`~anomalib_twostage.TwoStageSuperpixel` brings this callback along.

    Args:
        clock: What returns seconds.

    Attributes:
        predicted: Seconds from the beginning of the training to its end, as last predicted; ``None`` before.
        seconds: Seconds per batch of each stage that has been timed.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        super().__init__()
        self.clock = clock
        self.predicted: float | None = None
        self.seconds: dict[int, float] = {}
        self._run: _Run | None = None
        self._begun = 0.0  # when the training began
        self._away = 0.0  # seconds in validations so far
        self._left_at: float | None = None  # when the validation that is going on began
        self._validations: list[float] = []  # seconds of each
        self._stage, self._count = 0, 0  # what is timed, and batches of it so far
        self._timed_from = 0.0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to count."""
        del trainer, pl_module
        self.predicted, self.seconds, self._run = None, {}, None
        self._begun, self._away, self._left_at, self._validations = self.clock(), 0.0, None, []
        self._stage, self._count = 0, 0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Note how long a validation took, and look at the first batch."""
        del batch_idx
        if self._left_at is not None:
            self._validations.append(self.clock() - self._left_at)
            self._away += self._validations[-1]
            self._left_at = None
        if self._run is None and hasattr(pl_module, "schedule") and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._run = _plan(trainer, pl_module, len(batch.image))
            _compare(self._run.images_of(self._run.steps))

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock of the training."""
        del pl_module
        self._left_at = None if trainer.sanity_checking else self.clock()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Time the first steps of each stage, and tell what follows from them."""
        del outputs, batch, batch_idx
        stage = getattr(getattr(pl_module, "model", None), "stage", 0)
        if self._run is None or stage in self.seconds:
            return
        if stage != self._stage:
            self._stage, self._count = stage, 0
        self._count += 1
        timed = self._count - _WARM_UP
        if timed == 0:
            _wait(pl_module.device)
            self._timed_from = self.clock() - self._away
        elif timed >= _TIMED or (timed >= _FEWEST and self._time() >= _ENOUGH):
            _wait(pl_module.device)
            self.seconds[stage] = self._time() / timed
            self._tell(trainer, pl_module.device, self._run)

    def _time(self) -> float:
        """Seconds of training, without validations, since the timed steps began."""
        return self.clock() - self._away - self._timed_from

    def _tell(self, trainer: Trainer, device: torch.device, run: _Run) -> None:
        """Predict and tell the time."""
        first = self.predicted is None
        now = trainer.global_step
        checks = _validations(trainer, run.steps * run.batches) - _validations(trainer, run.step * run.batches)
        checks = max(0, checks - len(self._validations))
        left = self._steps_seconds(run, now, run.steps) + checks * self._validation_seconds(trainer, run)
        self.predicted = self.clock() - self._begun + left
        if not first:
            rank_zero_info(f"Stage two has begun: about {_spoken(left)} of the training are left.")
            return
        steps = run.steps - run.step
        told = [
            f"The training takes {steps:,} steps of {round(run.batch * run.batches * run.processes):,} images, "
            f"{run.images_of(steps):,} in all, and about {_spoken(self.predicted)} on {device.type}."
        ]
        if run.step < run.switch:
            share = self._steps_seconds(run, run.step, run.switch) / self._steps_seconds(run, run.step, run.steps)
            told.append(f"Stage one is {100 * share:.0f} % of that, until step {run.switch:,}.")
        rank_zero_info(" ".join([*told, self._first_validation(trainer, run, now)]).rstrip())

    def _first_validation(self, trainer: Trainer, run: _Run, now: int) -> str:
        """When the first validation comes, in words; nothing if there have been some, or if they come by the clock."""
        if not trainer.enable_validation:
            return "There is no validation."
        if self._validations or trainer.val_check_batch is None:
            return ""
        done = _validations(trainer, now * run.batches)
        steps = range(now, run.steps + 1)
        step = next((step for step in steps if _validations(trainer, step * run.batches) > done), None)
        if step is None:
            return "It ends before the first validation."
        seconds = _spoken(self._steps_seconds(run, now, step))
        return f"The first validation, with pictures for loggers that take them, comes at step {step:,}, in {seconds}."

    def _steps_seconds(self, run: _Run, start: int, end: int) -> float:
        """Seconds from one step to another."""
        one, two = max(0, min(end, run.switch) - start), max(0, end - max(start, run.switch))
        return run.batches * (one * self._seconds_of(1) + two * self._seconds_of(2))

    def _seconds_of(self, stage: int) -> float:
        """Seconds per batch of a stage, as timed or else by the other."""
        if stage in self.seconds:
            return self.seconds[stage]
        return self.seconds[1] * _STAGE_TWO if stage == 2 else self.seconds[2] / _STAGE_TWO

    def _validation_seconds(self, trainer: Trainer, run: _Run) -> float:
        """Seconds of a validation, as timed or else by the training's images."""
        if self._validations:
            return sum(self._validations) / len(self._validations)
        return _VALIDATION * _validation_images(trainer) * self._seconds_of(1) / run.images


def _plan(trainer: Trainer, pl_module: LightningModule, images: int) -> _Run:
    """What a training is going to do that begins with a batch of so many images."""
    schedule: Any = pl_module.schedule
    epoch, accumulated = trainer.num_training_batches, trainer.accumulate_grad_batches
    batches: float = accumulated if math.isinf(epoch) else epoch / math.ceil(epoch / accumulated)
    held = getattr(getattr(trainer.train_dataloader, "dataset", None), "__len__", None)
    mean = float(images)
    if held is not None and not math.isinf(epoch):
        mean = min(mean, held() / trainer.world_size / epoch)
    return _Run(trainer.global_step, schedule.total, schedule.switch, batches, images, mean, trainer.world_size)


def _validations(trainer: Trainer, batches: float) -> int:
    """Validations by the time that a training has seen so many batches; 0 if they come by the clock."""
    every, per_epoch = trainer.val_check_batch, trainer.num_training_batches
    if not trainer.enable_validation or every is None:
        return 0
    done = round(batches)
    if trainer.check_val_every_n_epoch is None:
        return int(done // every)
    epochs, rest = (0, done) if math.isinf(per_epoch) else divmod(done, int(per_epoch))
    in_one = max(1, int(per_epoch // every)) if not math.isinf(every) else 1
    count = epochs // trainer.check_val_every_n_epoch * in_one
    if (epochs + 1) % trainer.check_val_every_n_epoch == 0:
        count += int(rest // every)
    return count


def _validation_images(trainer: Trainer) -> int:
    """Images of a validation in one process."""
    limits, loaders = trainer.num_val_batches, trainer.val_dataloaders
    loaders = loaders if isinstance(loaders, list | tuple) else [loaders]
    images = 0
    for limit, loader in zip(limits, loaders, strict=False):
        size = getattr(loader, "batch_size", None) or 1
        held = getattr(getattr(loader, "dataset", None), "__len__", None)
        batches = 0 if math.isinf(limit) else int(limit) * size
        images += min(batches, math.ceil(held() / trainer.world_size)) if held is not None else batches
    return images


@rank_zero_only
def _compare(images: int) -> None:
    """Say so if a training is far from those of the documented results."""
    fewest, most = _RESULTS
    seen = f"The training sees {images:,} images in all. Those of the documented results saw {fewest:,} to {most:,}"
    if images * _FAR[0] < fewest:
        logger.warning("%s, and with far fewer little is learnt: set max_steps or max_epochs higher.", seen)
    elif images > most * _FAR[1]:
        logger.warning(
            "%s. See by painted_pixel_AP whether so many more still help; max_steps and max_epochs set their number.",
            seen,
        )


def _wait(device: torch.device) -> None:
    """Wait until a device has done what it was told."""
    if device.type not in ("cpu", "meta"):
        torch.get_device_module(device).synchronize()


def _spoken(seconds: float) -> str:
    """A time in seconds, minutes or hours, with two digits at most."""
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= 1.5 * length:
            value = seconds / length
            return f"{value:.1f} {unit}" if value < 9.95 else f"{value:.0f} {unit}"
    return f"{max(1, seconds):.0f} s"
