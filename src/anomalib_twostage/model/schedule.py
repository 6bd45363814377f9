# SPDX-License-Identifier: Apache-2.0
"""Which stage an optimizer step belongs to, and its learning rate."""

import logging
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from anomalib.data import Batch
from lightning.pytorch import Callback, Trainer
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from anomalib_twostage.inspection.painted_defects import PaintedDefects
from anomalib_twostage.inspection.training_time import TrainingTime

from .checkpoint import ResumableCheckpoints
from .engine import averaged_models

__all__ = ["TwoStageSchedule", "TwoStageTraining", "run_length"]

logger = logging.getLogger(__name__)

_WARM_UP = 0.05  # share of each stage's steps over which the learning rate rises


class TwoStageSchedule:
    """Shares the optimizer steps of a run between the stages.

    Per stage the learning rate warms up and falls along a cosine. Both stages get at least one step of any run that has
    two; a run of a single step is stage one's.

    Args:
        total: Optimizer steps of the run.
        stage_one_fraction: Share of them for stage one, in (0, 1).
        switch: Step by which stage two had begun in the run that is resumed. If the run is now longer, the learning
            rate falls once over all that stage two gets.

    Example:
        >>> TwoStageSchedule(total=100, stage_one_fraction=0.7).switch
        70
    """

    def __init__(self, total: int, stage_one_fraction: float, switch: int | None = None) -> None:
        planned = min(max(1, round(total * stage_one_fraction)), max(1, total - 1))
        self.total = total
        self.switch = planned if switch is None else min(planned, switch)
        if self.switch < planned:
            logger.warning(
                "Stage one finished its training at step %d and stays as it is, although in a run of %d steps it would "
                "have learnt until step %d: stage two gets all that remains. Fit without ckpt_path to train both.",
                *(self.switch, total, planned),
            )
        self._scheduler: LambdaLR | None = None

    def factor(self, step: int) -> float:
        """Learning rate of a step as a share of its peak."""
        first, last = (0, self.switch) if step < self.switch else (self.switch, self.total)
        progress = min(1.0, (step - first + 1) / max(1, last - first))
        return min(1.0, progress / _WARM_UP) * 0.5 * (1.01 + 0.99 * math.cos(math.pi * progress))

    def scheduler(self, optimizer: Optimizer) -> LambdaLR:
        """The learning rate for an optimizer, to be stepped once per step.

        A checkpoint restores the lengths that other schedulers were made with; this one keeps those of the run.
        """
        self._scheduler = LambdaLR(optimizer, self.factor)
        return self._scheduler

    def end(self) -> None:
        """Let go of the optimizer and its state: whoever copies or pickles the model after the run needs neither."""
        self._scheduler = None

    def resume(self, step: int, stage: int) -> None:
        """Go on at a step with the learning rate of this run: a restored optimizer brings that of a shorter one."""
        if stage == 1:
            self.switch = max(self.switch, step)
        if self._scheduler is not None:
            self._scheduler.last_epoch = step
            for group, peak in zip(self._scheduler.optimizer.param_groups, self._scheduler.base_lrs, strict=True):
                group["lr"] = peak * self.factor(step)


def run_length(trainer: Trainer) -> int:
    """Optimizer steps of a trainer's run.

    Raises:
        ValueError: If the run has no end, so that it cannot be shared out.
    """
    total = trainer.estimated_stepping_batches
    if math.isinf(total):
        msg = (
            "The run has no end, so it cannot be shared between the two stages: "
            f"set max_epochs (now {trainer.max_epochs}) or max_steps (now {trainer.max_steps})."
        )
        raise ValueError(msg)
    return int(total)


class TwoStageTraining(ResumableCheckpoints):
    """Trains stage one, then stage two, also across checkpoints. Stands before ``AnomalibModule`` among the bases."""

    stage_one_fraction: float
    _schedule: TwoStageSchedule | None = None

    @property
    def schedule(self) -> TwoStageSchedule:
        """How the run that is going on is shared between the stages."""
        if self._schedule is None:
            switch = self.resume()  # first: asked for a run's length, the data loader draws the order of the images
            self._schedule = TwoStageSchedule(run_length(self.trainer), self.stage_one_fraction, switch)
        return self._schedule

    def configure_callbacks(self) -> Sequence[Callback] | Callback:
        """Bring along what tells how a training goes, unless the trainer has its own."""
        callbacks = super().configure_callbacks()
        own = callbacks if isinstance(callbacks, Sequence) else [callbacks]
        given = {type(callback) for callback in getattr(self._trainer, "callbacks", [])}
        # First, so that post-processors have not changed the answers yet.
        return [*(kind() for kind in (PaintedDefects, TrainingTime) if kind not in given), *own]

    def setup(self, stage: str) -> None:
        """Let stage one learn in a run that begins. A checkpoint that is resumed is loaded later."""
        super().setup(stage)
        if stage == "fit":
            self.train()  # Lightning leaves it as it is, and who has looked at predictions may have left it otherwise
            # A trainer may also go on without a checkpoint.
            self._resumed = {"two_stage_switch": self._schedule.switch} if self._schedule else None
            self._schedule = None
            if self.trainer.global_step == 0:  # here, because a strategy wraps only what learns
                for model in (self.model, *averaged_models(self.trainer)):
                    model.start_stage_one()

    def teardown(self, stage: str) -> None:
        """Keep of a run how it was shared, and not its optimizer."""
        super().teardown(stage)
        if self._schedule is not None:
            self._schedule.end()

    def on_fit_start(self) -> None:
        """Share out the run, and continue the random numbers of a resumed one."""
        super().on_fit_start()
        _ = self.schedule  # unless the optimizer asked for it

    def on_train_start(self) -> None:
        """Go on with the learning rate of this run, and let each process draw other random numbers."""
        super().on_train_start()
        step = self.trainer.global_step
        if self.trainer.world_size > 1:  # all processes start from one seed
            done = self.trainer.world_size * step
            torch.manual_seed((torch.initial_seed() + done + self.global_rank) % 2**63)
        if step > 0:
            self.schedule.resume(step, self.model.stage)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Start stage two when stage one has had its share of the steps."""
        super().on_train_batch_start(batch, batch_idx)
        if self.model.stage == 1 and self.trainer.global_step >= self.schedule.switch:
            for model in (self.model, *averaged_models(self.trainer)):
                model.start_stage_two()

    def on_train_end(self) -> None:
        """Say so if the run ends before stage two, by early stopping or a limit of time."""
        super().on_train_end()
        if self.model.stage == 1:
            logger.warning(
                "The run ended after %d steps, before stage two, which was to begin after %d: the anomaly maps are "
                "stage one's alone.",
                *(self.trainer.global_step, self.schedule.switch),
            )

    def buffers(self, recurse: bool = True) -> Iterator[torch.Tensor]:
        """What goes along with the weights: statistics of the networks, and neither template nor thresholds.

        Callbacks that average weights take these, in step with a copy of the model that was made before the template
        was. Averages of the others mean nothing. To state dicts and devices all buffers are known.
        """
        for network in (self.model.stage_one, self.model.stage_two):
            yield from network.buffers(recurse)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save when stage two began; and with averaged weights, whose model is from before, the own template."""
        super().on_save_checkpoint(checkpoint)
        if self.model.stage == 2 and self._schedule is not None:
            checkpoint["two_stage_switch"] = self._schedule.switch
        if "averaging_state" in checkpoint:
            own = self.state_dict()
            checkpoint["state_dict"] |= {name: own[name] for name in own if not name.startswith("model.stage_")}
