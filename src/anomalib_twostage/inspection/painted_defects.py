# SPDX-License-Identifier: Apache-2.0
"""How well a model that is being trained finds painted defects on good images that it is not trained on.

Without defective images nothing else tells whether a training gets anywhere, whether it is finished, and whether it
begins to know its images by heart.
"""

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from anomalib.data import ImageBatch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only
from torch import nn
from torchmetrics import SumMetric
from torchmetrics.classification import BinaryAUROC, BinaryAveragePrecision

from anomalib_twostage.common.transforms import find_transforms
from anomalib_twostage.pseudo_anomaly import PseudoAnomalyTransform
from anomalib_twostage.pseudo_anomaly.random import fixed_seed

__all__ = ["PaintedDefects"]

logger = logging.getLogger(__name__)

_SEED = 20220  # whatever it is, the paint is the same at each validation
_AT_ONCE = 8  # images, whatever the batches of the validation: painting takes more memory than detecting
_SIDE = 128  # of larger maps every n-th pixel counts in each direction, which changes the figure little


class _Found(NamedTuple):
    """What a validation found."""

    step: int
    stage: int
    pixel: float
    image: float


class PaintedDefects(Callback):
    """Logs how well painted defects on held-out good images are found: ``painted_pixel_AP``, ``painted_image_AUROC``.

    At each validation during training, good validation images are painted with what the training paints with, each
    image every time alike. Pixel AP is taken over these images as they are and painted, image AUROC over their scores.
    Both are logged, so that loggers and the progress bar show them, and ``ModelCheckpoint`` and ``EarlyStopping`` can
    watch them. They are of the answer as it is at that time: of stage one alone, until stage two learns. A line at the
    end of the training tells how they went.

    :class:`~anomalib_twostage.TwoStageSuperpixel` brings this callback along. One of your own, given to the trainer,
    takes its place. The training's random numbers are left as they are.

    Args:
        num_images: Good images that are painted at most, the first ones of the validation; 0 turns it off. Each of them
            costs as much as a validation image and its paint.

    Raises:
        ValueError: If the number is negative.

    Example:
        >>> from anomalib.engine import Engine
        >>> from lightning.pytorch.callbacks import ModelCheckpoint
        >>> from anomalib_twostage import PaintedDefects
        >>> best = ModelCheckpoint(monitor="painted_pixel_AP", mode="max")
        >>> engine = Engine(callbacks=[best, PaintedDefects(num_images=16)])
    """

    def __init__(self, num_images: int = 32) -> None:
        super().__init__()
        if num_images < 0:
            msg = f"num_images must be 0 or more, got {num_images}."
            raise ValueError(msg)
        self.num_images = num_images
        # Values are not checked: that would wait for the device once more per batch.
        self._pixels = BinaryAveragePrecision(validate_args=False)
        self._images = BinaryAUROC(validate_args=False)
        self._good, self._painted = SumMetric(), SumMetric()
        self._left = 0  # good images that may still be painted in this validation
        self._course: list[_Found] = []
        self._warned = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say so if there is nothing to paint on."""
        self._course, self._warned = [], False
        if self._measures(trainer, pl_module) and not trainer.enable_validation:
            rank_zero_info(
                "There is no validation in this training, so the log cannot show how well painted defects on held-out "
                "good images are found."
            )

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin anew."""
        for metric in (self._pixels, self._images, self._good, self._painted):
            metric.reset()
            metric.to(pl_module.device)
        self._left = math.ceil(self.num_images / trainer.world_size) if self._measures(trainer, pl_module) else 0

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *args: Any, **kwargs: Any
    ) -> None:
        """Paint the good images of a batch, and see what is found."""
        del args, kwargs
        del batch
        if not (self._left and isinstance(outputs, ImageBatch) and outputs.gt_label is not None):
            return
        assert isinstance(outputs.image, torch.Tensor)
        assert isinstance(outputs.anomaly_map, torch.Tensor)
        assert isinstance(outputs.pred_score, torch.Tensor)
        good = (~outputs.gt_label.bool()).nonzero().flatten()[: self._left]
        for chosen in good.split(_AT_ONCE) if len(good) else ():
            images = outputs.image[chosen].as_subclass(torch.Tensor)
            number = trainer.global_rank * self.num_images + self._left
            with fixed_seed(_SEED + number, images.device), _painting_all(pl_module.painter):  # type: ignore[arg-type]
                painted, masks = pl_module.painter(images)  # type: ignore[operator]
            with trainer.precision_plugin.val_step_context():
                found = pl_module.model(painted)  # type: ignore[operator]
            has_paint = masks.flatten(1).any(dim=1)
            self._update(outputs.anomaly_map[chosen], outputs.pred_score[chosen], torch.zeros_like(masks))
            self._update(found.anomaly_map[has_paint], found.pred_score[has_paint], masks[has_paint])
            self._good.update(len(chosen))
            self._painted.update(has_paint.sum())
            self._left -= len(chosen)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the figures."""
        if not self._measures(trainer, pl_module):
            return
        good, painted = (int(_total(metric)) for metric in (self._good, self._painted))
        if not painted:
            self._warn_without(good)
            return
        pixel, image = self._pixels.compute(), self._images.compute()
        pl_module.log("painted_pixel_AP", pixel, prog_bar=True, batch_size=good)
        pl_module.log("painted_image_AUROC", image, prog_bar=True, batch_size=good)
        stage = pl_module.model.stage  # type: ignore[union-attr]
        self._course.append(_Found(trainer.global_step, stage, float(pixel), float(image)))  # type: ignore[arg-type]

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tell how the figures went."""
        del trainer, pl_module
        if self._course:
            rank_zero_info(_told(self._course))

    def _measures(self, trainer: Trainer, pl_module: LightningModule) -> bool:
        """Whether a model is being trained on paint, and not just tried out; other models may follow on a trainer."""
        fits = trainer.state.fn is TrainerFn.FITTING and not trainer.sanity_checking
        return bool(fits and self.num_images and getattr(pl_module, "painter", None) is not None)

    def _update(self, maps: torch.Tensor, scores: torch.Tensor, masks: torch.Tensor) -> None:
        """Add images with their masks ``(B, 1, H, W)``, empty for images without a defect."""
        step = math.ceil(max(masks.shape[-2:]) / _SIDE)
        maps, shown = (values[..., step // 2 :: step, step // 2 :: step] for values in (maps.float(), masks))
        self._pixels.update(maps.flatten(), shown.flatten().int())
        self._images.update(scores.float(), masks.flatten(1).any(dim=1).int())

    @rank_zero_only
    def _warn_without(self, good: int) -> None:
        """Say once why there are no figures."""
        if not self._warned:
            reason = "none could be painted" if good else "none is known to be good"
            logger.warning(
                "Painted defects on held-out good images are not measured, so that painted_pixel_AP and "
                "painted_image_AUROC are missing: of the validation images %s.",
                reason,
            )
        self._warned = True


def _total(metric: SumMetric) -> torch.Tensor:
    """The sum over all processes, also where there was nothing to add."""
    if not metric.update_called:
        metric.update(0)
    return metric.compute()


@contextmanager
def _painting_all(painter: nn.Module) -> Iterator[None]:
    """Let painters paint every image."""
    painters = find_transforms(painter, PseudoAnomalyTransform)  # of any kind
    shares = [each.probability for each in painters]
    try:
        for each in painters:
            each.probability = 1.0
        yield
    finally:
        for each, share in zip(painters, shares, strict=True):
            each.probability = share


def _told(course: list[_Found]) -> str:
    """How the figures went, in a line."""
    last, best = course[-1], max(course, key=lambda found: found.pixel)
    shown = {last.step: ("at the end", last)}
    if best.pixel > last.pixel:
        shown[best.step] = ("at best", best)
    stage_one = [found for found in course if found.stage < last.stage]
    if stage_one:
        shown[stage_one[-1].step] = ("at the end of stage one", stage_one[-1])
    parts = [
        f"{when} (step {step}) pixel AP {found.pixel:.3f} and image AUROC {found.image:.3f}"
        for step, (when, found) in sorted(shown.items())
    ]
    return f"Painted defects on held-out good images: {', '.join(parts)}."
