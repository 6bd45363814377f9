# SPDX-License-Identifier: Apache-2.0
"""Two-stage superpixel anomaly detection.

Stage one, a segmentation network, learns from pseudo-anomalies painted on good images. SLIC superpixels of the
input turn its noisy map into whole patches. Stage two learns on those patches, after stage one is finished.

Paper: Shah Rizwan Ali and HyungWon Kim, "Enhancement of Anomaly Detection Using Two-Stage Anomaly Segmentation
Model", EasyChair preprint, 2022.
"""

import logging
import math
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
from lightning.pytorch.utilities.types import STEP_OUTPUT, OptimizerLRSchedulerConfig
from torch import nn
from torchvision.transforms.v2 import Resize

from anomalib_twostage.inspection.threshold import MidwayPostProcessor
from anomalib_twostage.inspection.visualizer import StageVisualizer
from anomalib_twostage.pseudo_anomaly import PseudoAnomalyTransform, training_images

from .backbone import DEFAULT_BACKBONE
from .checks import CheckedImages, FileCheck, check_fraction
from .engine import release_trainer, take_trainer
from .export import FaithfulExport
from .good_images import good_images, image_files, image_number, image_numbers, training_data
from .loss import make_loss
from .painting import Painting, refuse_painted_evaluation
from .schedule import TwoStageTraining
from .torch_model import StageMaps, TwoStageSuperpixelModel
from .variants import VARIANTS, two_stage_superpixel_model, variant_of
from .zoom import check_zoom

__all__ = ["TwoStageSuperpixel"]

logger = logging.getLogger(__name__)

_TEMPLATE_IMAGES = 500  # more change the statistics little
_UNKNOWN = (
    "so the template cannot know them again: while it trains, each image is compared with itself too, and the networks "
    "learn from smaller distances than they will meet."
)


class TwoStageSuperpixel(CheckedImages, TwoStageTraining, FaithfulExport, AnomalibModule):  # type: ignore[misc]  # to_onnx is anomalib's, not Lightning's
    """Two-stage superpixel anomaly detection.

    The first ``stage_one_fraction`` of the run's optimiser steps trains stage one, the rest stage two with stage
    one frozen. The run's length is whatever the trainer is told (``max_epochs``, ``max_steps``, limited batches,
    accumulated gradients). Training images are painted here, on the training device: by ``painter``, or by the painters
    among the ``train_augmentations`` of the datamodule, which then stand aside there. Images that come with a mask from
    elsewhere are taken as painted.

    Args:
        variant: ``"default"``, which looks through a small pretrained backbone; ``"scratch"``, which learns all from
            random weights; ``"small"``, a quarter of that; or ``"paper"``, as published: networks of DRAEM's
            discriminative shape, published loss, hard gate.
        loss: ``"default"`` (focal loss and Dice) or ``"paper"`` (squared error and SSIM, equation 4);
            ``None`` takes the variant's own.
        gate: ``"average"`` (stage two's map, zero outside the selected superpixels, is averaged with stage one's) or
            ``"hard"`` (stage two's alone, as published); ``None`` takes the variant's own.
        template: Whether the networks see how far the image is from the good training images: from their nearest
            patches (:class:`~anomalib_twostage.model.memory.PatchMemory`), or, without a backbone, from them at the
            same place (:class:`~anomalib_twostage.model.template.GoldenTemplate`); ``None`` takes the variant's own.
        num_neighbors: Nearest good images that a golden template compares with, 0 for none.
        smoothing: Standard deviation in pixels of the Gaussian that smooths the final map, 0 for none; ``None`` takes
            the variant's own: an eighth of the segment size for ``"default"``, none for ``"paper"``, else a quarter.
        segment_size: Side of a superpixel in pixels of the resized image, 1 for none; ``None`` takes the variant's own,
            8 for ``"default"``, else 16.
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
        backbone: Pretrained network that ``"default"`` looks through: the name of a convolutional one of timm, a file
            of weights, or ``None`` for variant ``"scratch"``. The default's weights are installed with the package.
        place_deviation: Whether ``"default"`` also compares features with the mean of the good images at their place.
        zoom: Of ``"default"``: a whole number from 1 to 16, by how much stage one's image is reduced. The default
            pre-processor then resizes to that many times 256 x 256, and stage two looks at windows of that.
        zoom_windows: Windows of an image that stage two looks at, at most.
        magnification: Of ``"default"``: how many times as large the backbone sees images, or, with a zoom, the reduced
            ones, 1 or more. Time grows with its square; ``None`` takes 1.5.

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
        variant: Literal["default", "scratch", "small", "paper"] = "default",
        loss: Literal["default", "paper"] | None = None,
        gate: Literal["average", "hard"] | None = None,
        template: bool | None = None,
        num_neighbors: int = 4,
        smoothing: float | None = None,
        segment_size: int | None = None,
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
        backbone: str | Path | None = DEFAULT_BACKBONE,
        place_deviation: bool = True,
        zoom: int = 1,
        zoom_windows: int = 8,
        magnification: float | None = None,
    ) -> None:
        check_zoom(zoom)
        default_size = (256 * zoom, 256 * zoom)
        if pre_processor is True:
            pre_processor = self.configure_pre_processor(default_size)
        super().__init__(pre_processor, post_processor, evaluator, visualizer)
        check_fraction("stage_one_fraction", stage_one_fraction, include_one=False)
        if not 0 < learning_rate < math.inf:
            msg = f"learning_rate must be above 0 and finite, got {learning_rate}."
            raise ValueError(msg)
        self.default_size = default_size
        self.variant = variant_of(variant, backbone)
        self.model = two_stage_superpixel_model(
            self.variant,
            segment_size,
            compactness,
            gate=gate,
            template=template,
            num_neighbors=num_neighbors,
            smoothing=smoothing,
            backbone=backbone,
            place_deviation=place_deviation,
            zoom=zoom,
            zoom_windows=zoom_windows,
            magnification=magnification,
        )
        self.loss = make_loss(loss or VARIANTS[self.variant].loss)
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
        self._files = FileCheck()
        self.check_known_size()

    def setup(self, stage: str) -> None:
        """Check the trainer, the data and the pre-processor, and choose the painter before training.

        Raises:
            ValueError: If the pre-processor normalises or resizes to too small a size, the trainer's precision is
                neither 32 bits nor mixed, or the datamodule paints validation or test images.
            FileNotFoundError: If the texture folder is missing or empty.
        """
        super().setup(stage)
        refuse_painted_evaluation(getattr(self.trainer, "datamodule", None))
        take_trainer(self.trainer)
        if stage == "fit":
            self.painter = self._painting.begin(training_data(self.trainer))

    def teardown(self, stage: str) -> None:
        """Drop the painter after training, and the last batch's stages."""
        super().teardown(stage)
        if stage == "fit":
            self._painting.end()
            self.painter = self._painting.given
        self.keep_stages, self.last_stages = False, None
        self.model.end_run()
        release_trainer(self.trainer)

    def on_train_start(self) -> None:
        """Take the template of a run that begins."""
        super().on_train_start()
        dataset = getattr(self.trainer.train_dataloader, "dataset", None)
        self._painting.see(dataset)
        if self.trainer.global_step == 0:
            transform = self.pre_processor.transform if isinstance(self.pre_processor, PreProcessor) else None
            self.model.remember(good_images(dataset, _TEMPLATE_IMAGES, transform, self._files))
        else:
            files, known = image_files(dataset), self.model.known_images()
            if files and known and known.isdisjoint(map(image_number, files)):
                logger.warning(
                    "The run goes on with other files, such as %s, than it began with, %s", files[0], _UNKNOWN
                )

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Say so if the images of a run that begins cannot be known again."""
        super().on_train_batch_start(batch, batch_idx)
        begins = self.trainer.global_step == 0 and batch_idx == 0
        if begins and self.model.known_images() and image_numbers(batch) is None:
            logger.warning("The training images have no image_path, %s", _UNKNOWN)

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Check the images, and see which come painted, while they are in the host's memory: no step shall wait.

        Raises:
            ValueError: If images hold NaN, are not in [0, 1], or come from files of more than 8 bits a channel.
        """
        batch = super().on_before_batch_transfer(batch, dataloader_idx)
        trains = self._trainer is not None and self._trainer.training
        return self._painting.unmasked(batch) if trains else batch

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
        self.check_size(*batch.image.shape[-2:])
        images, mask = self.model.to_be_painted(batch.image, batch.gt_mask)
        _, images, mask = training_images(images, self.painter, mask)
        loss = self.loss(*self.model.learned_logits(images, mask, image_numbers(batch)))
        self.log("train_loss", loss.detach(), on_epoch=True, prog_bar=True, logger=True, batch_size=len(images))
        # Lightning would send a number over, and wait until it is there.
        stage = torch.full((), float(self.model.stage), device=self.device)
        self.log("stage", stage, prog_bar=True, batch_size=len(images))
        return {"loss": loss, "painted": images, "mask": mask}

    def validation_step(self, batch: Batch, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        """Detect anomalies as the model's forward does, and keep its stages if they are asked for.

        Args:
            batch: Images ``(B, 3, H, W)`` in [0, 1].
            args: Unused.
            kwargs: Unused.

        Returns:
            The batch with ``anomaly_map`` and ``pred_score``.

        Raises:
            ValueError: If the images are too small.
        """
        del args, kwargs
        assert isinstance(batch.image, torch.Tensor)
        self.check_size(*batch.image.shape[-2:])
        kept: list[StageMaps] = []
        images = batch.image.as_subclass(torch.Tensor)  # compilers stumble over torchvision's images
        answer = self.model(images, kept=kept if self.keep_stages else None)
        self.last_stages = kept[0] if kept else None
        return batch.update(anomaly_map=answer.anomaly_map, pred_score=answer.pred_score)

    test_step = predict_step = validation_step

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """AdamW over both stages; per stage, the learning rate warms up and falls along a cosine.

        A stage whose turn it is not has no gradients, and AdamW passes it over. See :class:`TwoStageSchedule`.

        Raises:
            ValueError: If the run has no end, so that it cannot be shared out.
        """
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=self.learning_rate, weight_decay=1e-4)
        scheduler = self.schedule.scheduler(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

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
