# SPDX-License-Identifier: Apache-2.0
"""Which stage an optimizer step belongs to, and its learning rate."""

import logging
import math

from lightning.pytorch import Trainer
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

__all__ = ["TwoStageSchedule", "run_length"]

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
