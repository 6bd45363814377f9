# SPDX-License-Identifier: Apache-2.0
"""What callbacks of this package that read predictions share: when a batch is ready, and what other processes read."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

__all__ = ["PredictionReader", "gathered"]

_Found = TypeVar("_Found")


class PredictionReader(Callback, ABC):
    """Callback that reads every tested or predicted batch, post-processed.

    Lightning calls the callbacks of the trainer before those of the model, among them the post-processor, which
    changes the batch in place. So a batch is read when the next one starts, and the last one at the end.
    """

    def __init__(self) -> None:
        super().__init__()
        self._waiting: Any = None

    def begin(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Start anew, before the first batch of a ``"test"`` or ``"predict"``."""

    @abstractmethod
    def read(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> None:
        """Read what a step of the model returned, after the post-processor has seen it."""

    @abstractmethod
    def finish(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Close, after the last batch."""

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start anew."""
        self._waiting = None
        self.begin(trainer, pl_module, "test")

    def on_predict_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start anew."""
        self._waiting = None
        self.begin(trainer, pl_module, "predict")

    def on_test_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        """Read the batch before, now that it is post-processed."""
        del args, kwargs
        self._read_waiting(trainer, pl_module)

    def on_predict_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        """Read the batch before, now that it is post-processed."""
        del args, kwargs
        self._read_waiting(trainer, pl_module)

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *args: Any, **kwargs: Any
    ) -> None:
        """Keep the batch until it is post-processed."""
        del trainer, pl_module, args, kwargs
        self._waiting = outputs

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *args: Any, **kwargs: Any
    ) -> None:
        """Keep the batch until it is post-processed."""
        del trainer, pl_module, args, kwargs
        self._waiting = outputs

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read the last batch and close."""
        self._read_waiting(trainer, pl_module)
        self.finish(trainer, pl_module, "test")

    def on_predict_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read the last batch and close."""
        self._read_waiting(trainer, pl_module)
        self.finish(trainer, pl_module, "predict")

    def _read_waiting(self, trainer: Trainer, pl_module: LightningModule) -> None:
        batch, self._waiting = self._waiting, None
        if batch is not None:
            self.read(trainer, pl_module, batch)


def gathered(trainer: Trainer, found: list[_Found], path_of: Callable[[_Found], str | None]) -> list[_Found]:
    """What all processes found.

    The sampler hands some images to two processes, so that all have equally many. Of these the first one's findings
    are taken; the second one's need not be the same, as scores depend on the batch in their last bits.

    Args:
        trainer: The trainer.
        found: What this process found, any number for an image.
        path_of: The file of the image that something was found in; what has none is taken from every process.

    Returns:
        The same in all processes.
    """
    if trainer.world_size == 1:
        return found
    shares: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(shares, found)
    everything: list[_Found] = []
    seen: set[str | None] = set()
    for share in shares:
        everything += [each for each in share if path_of(each) not in seen]
        seen |= {path_of(each) for each in share} - {None}
    return everything
