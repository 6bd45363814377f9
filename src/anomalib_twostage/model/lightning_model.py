# SPDX-License-Identifier: Apache-2.0
"""Two-stage superpixel anomaly detection.

Stage one, a segmentation network, learns from pseudo-anomalies painted on good images. SLIC superpixels of the
input turn its noisy map into whole patches. Stage two learns on those patches, after stage one is finished.

Paper: Shah Rizwan Ali and HyungWon Kim, "Enhancement of Anomaly Detection Using Two-Stage Anomaly Segmentation
Model", EasyChair preprint, 2022.
"""

import inspect
import logging
import pickle
import warnings
from pathlib import Path
from typing import Any, Literal

import torch
from anomalib import LearningType
from anomalib.data import Batch, ImageBatch
from anomalib.metrics import Evaluator
from anomalib.models.components import AnomalibModule
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from anomalib.visualization import Visualizer
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import STEP_OUTPUT, OptimizerLRSchedulerConfig
from torch import nn
from torchvision.transforms.v2 import Resize

from anomalib_twostage.inspection.threshold import MidwayPostProcessor
from anomalib_twostage.inspection.visualizer import StageVisualizer
from anomalib_twostage.pseudo_anomaly import (
    PseudoAnomalyTransform,
    imitate_faults,
    paints,
    training_images,
)

from .checkpoint import (
    VerifiedCheckpointIO,
    add_settings,
    check_checkpoint,
    check_fit,
    get_random_state,
    name_replaced_processors,
    refused,
    set_random_state,
)
from .checks import FileCheck, check_fraction, check_precision, check_size, check_values, refuse_normalization
from .export import FaithfulExport
from .good_images import good_images, training_data
from .loss import PaperLoss, SegmentationLoss
from .painting import Painting
from .schedule import TwoStageSchedule, run_length
from .torch_model import StageMaps, TwoStageSuperpixelModel
from .variants import VARIANTS, two_stage_superpixel_model

__all__ = ["TwoStageSuperpixel"]

logger = logging.getLogger(__name__)

_LOSSES: dict[str, type[nn.Module]] = {"default": SegmentationLoss, "paper": PaperLoss}
_RESUMED = ("global_step", "two_stage_random_state", "two_stage_switch")  # what a resumed run takes from a checkpoint
_TEMPLATE_IMAGES = 500  # more change the statistics little


class TwoStageSuperpixel(FaithfulExport, AnomalibModule):  # type: ignore[misc]  # to_onnx is anomalib's, not Lightning's
    """Two-stage superpixel anomaly detection.

    The first ``stage_one_fraction`` of the run's optimiser steps trains stage one, the rest stage two with stage
    one frozen. The run's length is whatever the trainer is told (``max_epochs``, ``max_steps``, limited batches,
    accumulated gradients). Training images are painted here, on the training device: by ``painter``, or by the painters
    among the ``train_augmentations`` of the datamodule, which then stand aside there. Images that come with a mask from
    elsewhere are taken as painted.

    Args:
        variant: ``"default"``; ``"small"``, a quarter of its cost; or ``"paper"``, as published: networks of
            DRAEM's discriminative shape, published loss, hard gate.
        loss: ``"default"`` (focal loss and Dice) or ``"paper"`` (squared error and SSIM, equation 4);
            ``None`` takes the variant's own.
        gate: ``"average"`` (stage two's map, zero outside the selected superpixels, is averaged with stage one's) or
            ``"hard"`` (stage two's alone, as published); ``None`` takes the variant's own.
        template: Whether the networks also see how far each pixel is from the good training images at the same place,
            and from those nearest to the image (:class:`~anomalib_twostage.model.template.GoldenTemplate`); ``None``
            takes the variant's own.
        num_neighbors: Nearest good images that the template compares with, 0 for none.
        smoothing: Standard deviation in pixels of the Gaussian that smooths the final map, 0 for none; ``None`` takes
            the variant's own: a quarter of the segment size, none for ``"paper"``.
        segment_size: Side of a superpixel in pixels of the resized image.
        compactness: Weight of position against colour in SLIC.
        stage_one_fraction: Share of the optimiser steps for stage one, in (0, 1).
        learning_rate: Peak learning rate of both stages.
        painter: What paints the training images, such as ``SuperpixelAnomaly(probability=0.7, opacity=(0.1, 0.6))``.
            It is not kept in checkpoints. ``None`` makes one of the next three arguments when training begins.
        paint: Kinds of pseudo-anomalies: ``"both"``, ``"perlin"`` or ``"superpixel"``.
        paint_probability: Share of training images that are painted, in (0, 1].
        texture_dir: Folder of images to paint with, such as DTD, instead of scikit-image's photographs.
        pre_processor: Pre-processor, or a flag for the default (resize to 256 x 256, no normalisation).
        post_processor: Post-processor, or a flag for the default.
        evaluator: Evaluator, or a flag for the default, which is anomalib's.
        visualizer: Visualizer, or a flag for the default, which is :class:`StageVisualizer`.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> from anomalib.engine import Engine
        >>> from anomalib_twostage import SampleTextures, TwoStageSuperpixel
        >>> model = TwoStageSuperpixel(variant="small")
        >>> Engine(max_steps=400).train(model, datamodule=SampleTextures(category="brick"))  # doctest: +SKIP
    """

    model: TwoStageSuperpixelModel

    def __init__(
        self,
        variant: Literal["default", "small", "paper"] = "default",
        loss: Literal["default", "paper"] | None = None,
        gate: Literal["average", "hard"] | None = None,
        template: bool | None = None,
        num_neighbors: int = 4,
        smoothing: float | None = None,
        segment_size: int = 16,
        compactness: float = 10.0,
        stage_one_fraction: float = 0.7,
        learning_rate: float = 2e-3,
        paint: Literal["both", "perlin", "superpixel"] = "both",
        paint_probability: float = 0.7,
        texture_dir: str | Path | None = None,
        pre_processor: PreProcessor | bool = True,
        post_processor: PostProcessor | bool = True,
        evaluator: Evaluator | bool = True,
        visualizer: Visualizer | bool = True,
        painter: PseudoAnomalyTransform | None = None,
    ) -> None:
        super().__init__(
            pre_processor=pre_processor,
            post_processor=post_processor,
            evaluator=evaluator,
            visualizer=visualizer,
        )
        check_fraction("stage_one_fraction", stage_one_fraction, include_one=False)
        if not learning_rate > 0:
            msg = f"learning_rate must be above 0, got {learning_rate}."
            raise ValueError(msg)
        self.model = two_stage_superpixel_model(
            variant,
            segment_size,
            compactness,
            gate=gate,
            template=template,
            num_neighbors=num_neighbors,
            smoothing=smoothing,
        )
        loss = loss or VARIANTS[variant].loss
        if loss not in _LOSSES:
            msg = f"loss must be one of {sorted(_LOSSES)}, got {loss!r}."
            raise ValueError(msg)
        self.loss = _LOSSES[loss]()
        self.variant = variant
        self.stage_one_fraction = stage_one_fraction
        self.learning_rate = learning_rate
        self.paint = paint
        self.paint_probability = paint_probability
        self.texture_dir = texture_dir
        self._painting = Painting(painter, paint, paint_probability, texture_dir)
        self.painter: nn.Module | None = painter  # what paints while the model trains, and else what was given
        # For those who draw: a callback that asks finds what led to the answer for the last batch, until the run ends.
        self.keep_stages = False
        self.last_stages: StageMaps | None = None
        self._images_come_painted = False
        # Of the run that is going on, and what its checkpoint says of how to go on.
        self._schedule: TwoStageSchedule | None = None
        self._resumed: dict[str, Any] = {}
        self._files = FileCheck()
        if self.input_size is not None:
            self._check_size(*self.input_size)

    def save_hyperparameters(self, *args: Any, ignore: Any = None, frame: Any = None, **kwargs: Any) -> None:
        """Save the arguments as Lightning does, without the painter, which is no plain data."""
        frame = frame or inspect.currentframe().f_back  # type: ignore[union-attr]  # whose arguments they are
        super().save_hyperparameters(*args, ignore=[*(ignore or []), "painter"], frame=frame, **kwargs)

    def setup(self, stage: str) -> None:
        """Check the pre-processor, and make the painter before training.

        Raises:
            ValueError: If the pre-processor normalises or resizes to too small a size, or the trainer's precision is
                neither 32 bits nor mixed.
            FileNotFoundError: If the texture folder is missing or empty.
        """
        if self.pre_processor:
            refuse_normalization(self.pre_processor.transform)
            if self.input_size is not None:
                self._check_size(*self.input_size)
        check_precision(str(self.trainer.precision))
        # Lightning tells every user with a datamodule that the model checks batches before their transfer.
        warnings.filterwarnings("ignore", "You have overridden `on_before_batch_transfer` in `LightningModule`")
        self._files.join(getattr(self.trainer, "datamodule", None))
        strategy = self.trainer.strategy
        if isinstance(strategy.checkpoint_io, TorchCheckpointIO):
            strategy.checkpoint_io = VerifiedCheckpointIO(strategy.checkpoint_io)
        if isinstance(strategy, DDPStrategy):
            # One stage rests while the other learns. Said here, since Lightning has no public way and wraps soon.
            strategy._ddp_kwargs.setdefault("find_unused_parameters", True)
        if stage == "fit":
            self.painter = self._painting.begin(training_data(self.trainer))
            # A checkpoint that is resumed is loaded later. A trainer may also go on without one.
            self._resumed = {"two_stage_switch": self._schedule.switch} if self._schedule else {}
            self._schedule = None
            if self.trainer.global_step == 0:  # here, because a strategy wraps only what learns
                self.model.start_stage_one()

    def teardown(self, stage: str) -> None:
        """Drop the painter after training, and the last batch's stages."""
        if stage == "fit":
            self._painting.end()
            self.painter = self._painting.given
        self.keep_stages, self.last_stages = False, None
        self._files.leave(getattr(self.trainer, "datamodule", None))
        strategy = self.trainer.strategy
        if isinstance(strategy.checkpoint_io, VerifiedCheckpointIO):
            strategy.checkpoint_io = strategy.checkpoint_io.checkpoint_io

    def on_train_start(self) -> None:
        """See whether the datamodule paints, let each process paint differently, and take the template."""
        dataset = getattr(self.trainer.train_dataloader, "dataset", None)
        self._images_come_painted = paints(dataset)
        step = self.trainer.global_step
        if self.trainer.world_size > 1:  # all processes start from one seed
            done = self.trainer.world_size * step
            torch.manual_seed((torch.initial_seed() + done + self.global_rank) % 2**63)
        if step > 0:
            self.schedule.resume(step, self.model.stage)
        elif self.model.template is not None:
            transform = self.pre_processor.transform if isinstance(self.pre_processor, PreProcessor) else None
            self.model.template.fit(good_images(dataset, _TEMPLATE_IMAGES, transform, self._files))

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Check the images while they are in the host's memory, so that no step waits for the device.

        Raises:
            ValueError: If images hold NaN, are not in [0, 1], or come from files of more than 8 bits a channel.
        """
        batch = super().on_before_batch_transfer(batch, dataloader_idx)
        if isinstance(batch, ImageBatch) and isinstance(batch.image, torch.Tensor):
            check_values(batch.image, batch.image_path or [])
            self._files.check_batch(batch)
            trains = self._trainer is not None and self._trainer.training
            if trains and not self._images_come_painted and batch.gt_mask is not None and not batch.gt_mask.any():
                batch.gt_mask = None  # good images, which are still to be painted
        return batch

    def on_fit_start(self) -> None:
        """Share out the run, and continue the random numbers of a resumed one."""
        _ = self.schedule  # unless the optimizer asked for it

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Start stage two when stage one has had its share of the steps."""
        del batch, batch_idx
        if self.model.stage == 1 and self.trainer.global_step >= self.schedule.switch:
            self.model.start_stage_two()

    def on_train_end(self) -> None:
        """Say so if the run ends before stage two, by early stopping or a limit of time."""
        if self.model.stage == 1:
            logger.warning(
                "The run ended after %d steps, before stage two, which was to begin after %d: the anomaly maps are "
                "stage one's alone.",
                *(self.trainer.global_step, self.schedule.switch),
            )

    def training_step(self, batch: Batch, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        """Vary the light, paint if need be, and train the stage whose turn it is.

        Args:
            batch: Training images ``(B, 3, H, W)`` in [0, 1], and their masks if they come painted.
            args: Unused.
            kwargs: Unused.

        Returns:
            The ``loss``, and what it was taken on: ``painted`` images ``(B, 3, H, W)`` and ``mask`` ``(B, 1, H, W)``.

        Raises:
            ValueError: If the images are too small.
        """
        del args, kwargs
        assert isinstance(batch, ImageBatch)
        assert isinstance(batch.image, torch.Tensor)
        assert self.painter is not None  # set in setup
        self._check_size(*batch.image.shape[-2:])
        _, images, mask = training_images(batch.image, self.painter, batch.gt_mask)
        logits = self.model.stage_one(self.model.seen(images))
        if self.model.stage == 2:
            logits = self.model.stages(images, imitate_faults(logits.float())).stage_two_logits
        loss = self.loss(logits, mask)
        self.log("train_loss", loss.detach(), on_epoch=True, prog_bar=True, logger=True, batch_size=len(images))
        # Lightning would send a number over, and wait until it is there.
        stage = torch.full((), float(self.model.stage), device=self.device)
        self.log("stage", stage, prog_bar=True, batch_size=len(images))
        return {"loss": loss, "painted": images, "mask": mask}

    def validation_step(self, batch: Batch, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        """Detect anomalies; returns the batch with ``anomaly_map`` and ``pred_score``."""
        del args, kwargs
        return self._detect(batch)

    def test_step(self, batch: Batch, batch_idx: int, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        """Detect anomalies; returns the batch with ``anomaly_map`` and ``pred_score``."""
        del batch_idx, args, kwargs
        return self._detect(batch)

    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> STEP_OUTPUT:
        """Detect anomalies; returns the batch with ``anomaly_map`` and ``pred_score``."""
        del batch_idx, dataloader_idx
        return self._detect(batch)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """AdamW over both stages; per stage, the learning rate warms up and falls along a cosine.

        A stage whose turn it is not has no gradients, and AdamW passes it over. See :class:`TwoStageSchedule`.

        Raises:
            ValueError: If the run has no end, so that it cannot be shared out.
        """
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=self.learning_rate, weight_decay=1e-4)
        scheduler = self.schedule.scheduler(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]  # anomalib's signature, with what is passed on left open
        cls, checkpoint_path: str | Path, *args: Any, **kwargs: Any
    ) -> "TwoStageSuperpixel":
        """Load a trained model. No code from the checkpoint runs, unless ``weights_only=False`` asks for it.

        Args:
            checkpoint_path: File of Lightning's checkpoint.
            args: As in anomalib.
            kwargs: As in anomalib; further arguments replace those that the model was made with.

        Returns:
            The model.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the file is half-written, damaged or no checkpoint, or of another variant than asked for.
            pickle.UnpicklingError: If the file holds other objects than weights and plain values.
        """
        if isinstance(checkpoint_path, str | Path) and "://" not in str(checkpoint_path):
            check_checkpoint(checkpoint_path)
        try:
            return super().load_from_checkpoint(checkpoint_path, *args, **kwargs)  # type: ignore[return-value]
        except pickle.UnpicklingError as error:
            raise refused(checkpoint_path) from error

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save with the weights what a resumed run needs to paint and learn as it would have done uninterrupted."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["hyper_parameters"].update({k: v for k, v in self.model.settings.items() if k in self.hparams})
        checkpoint["two_stage_random_state"] = get_random_state(self.device)
        if self.model.stage == 2 and self._schedule is not None:
            checkpoint["two_stage_switch"] = self._schedule.switch

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that the checkpoint fits, and note how a resumed run goes on.

        Raises:
            ValueError: If the checkpoint is of another variant or width.
        """
        name_replaced_processors(self, checkpoint)
        super().on_load_checkpoint(checkpoint)
        add_settings(checkpoint)
        check_fit(checkpoint, self.state_dict(), self.variant)
        if self._trainer is not None and self.trainer.state.fn is TrainerFn.FITTING:
            self._resumed = {name: checkpoint[name] for name in _RESUMED if name in checkpoint}

    def to_torch(self, *args: Any, **kwargs: Any) -> Path:
        """Export to torch as anomalib does, except that images are transformed as in training."""
        painters = self.painter, self._painting.given
        self.painter = self._painting.given = None
        try:
            return super().to_torch(*args, **kwargs)  # pickles all that the model holds, and needs no paint
        finally:
            self.painter, self._painting.given = painters

    @property
    def trainer_arguments(self) -> dict[str, Any]:
        """Trainer arguments of the model: no sanity validation before the first step, as in anomalib's Draem."""
        return {"num_sanity_val_steps": 0}

    @property
    def learning_type(self) -> LearningType:
        """Learns from good images only."""
        return LearningType.ONE_CLASS

    @staticmethod
    def configure_pre_processor(image_size: tuple[int, int] | None = None) -> PreProcessor:
        """Build the default pre-processor: resize, no normalisation.

        Args:
            image_size: Height and width in pixels, by default 256 x 256.
        """
        return PreProcessor(transform=Resize(image_size or (256, 256), antialias=True))

    def configure_post_processor(self) -> PostProcessor:
        """Build the default post-processor: anomalib's, with thresholds between two scores instead of on one."""
        return MidwayPostProcessor()

    @classmethod
    def configure_visualizer(cls) -> StageVisualizer:  # type: ignore[override]  # anomalib's own is one of several
        """Build the default visualizer: the stages side by side."""
        return StageVisualizer()

    def _detect(self, batch: Batch) -> STEP_OUTPUT:
        """Take over the model's answer, and keep its stages if they are asked for."""
        assert isinstance(batch.image, torch.Tensor)
        self._check_size(*batch.image.shape[-2:])
        kept: list[StageMaps] = []
        answer = self.model(batch.image, kept=kept if self.keep_stages else None)
        self.last_stages = kept[0] if kept else None
        return batch.update(anomaly_map=answer.anomaly_map, pred_score=answer.pred_score)

    @property
    def schedule(self) -> TwoStageSchedule:
        """How the run that is going on is shared between the stages."""
        if self._schedule is None:
            resumed, self._resumed = self._resumed, {}
            # Before asking for the run's length: the data loader's first act is to draw the order of the images. One
            # saved state would make every process of a distributed run paint alike.
            if self.trainer.world_size == 1 and "two_stage_random_state" in resumed:
                set_random_state(resumed["two_stage_random_state"], self.device)
            switch = resumed.get("two_stage_switch", resumed.get("global_step")) if self.model.stage == 2 else None
            self._schedule = TwoStageSchedule(run_length(self.trainer), self.stage_one_fraction, switch)
        return self._schedule

    def _check_size(self, height: int, width: int) -> None:
        check_size(
            height,
            width,
            smallest=self.model.stage_one.minimum_size,
            segment_size=self.model.slic.segment_size,
            variant=self.variant,
        )
