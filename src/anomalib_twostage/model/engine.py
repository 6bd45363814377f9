# SPDX-License-Identifier: Apache-2.0
"""What is changed in Lightning's trainer, in one place: it has no public way for any of this as of 2.6.

- ``DDPStrategy`` must be told before it wraps the model that one stage rests while the other learns.
- Checkpoints are read and written by a plugin that the user chose or the engine made. Ours goes around it, and away
  after the run: an engine may run other models next.
- ``WeightAveraging`` copies the model before training, so that its copy does not notice when stage two begins.
"""

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.strategies import DDPStrategy

from .checkpoint import VerifiedCheckpointIO
from .torch_model import TwoStageSuperpixelModel

__all__ = ["averaged_models", "release_trainer", "take_trainer"]


def take_trainer(trainer: Trainer) -> None:
    """Let a trainer check checkpoints and, with plain ``ddp``, leave a resting stage alone, from ``setup`` on."""
    strategy = trainer.strategy
    if isinstance(strategy.checkpoint_io, TorchCheckpointIO):
        strategy.checkpoint_io = VerifiedCheckpointIO(strategy.checkpoint_io)
    if isinstance(strategy, DDPStrategy):
        strategy._ddp_kwargs.setdefault("find_unused_parameters", True)


def release_trainer(trainer: Trainer) -> None:
    """Give a trainer its own checkpoint plugin back."""
    strategy = trainer.strategy
    if isinstance(strategy.checkpoint_io, VerifiedCheckpointIO):
        strategy.checkpoint_io = strategy.checkpoint_io.checkpoint_io


def averaged_models(trainer: Trainer) -> list[TwoStageSuperpixelModel]:
    """The copies of the model that callbacks keep averaged weights in."""
    averages = [each._average_model for each in trainer.callbacks if isinstance(each, WeightAveraging)]  # type: ignore[attr-defined]
    return [average.module.model for average in averages if average is not None]  # type: ignore[misc]
