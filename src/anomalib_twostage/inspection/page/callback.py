# SPDX-License-Identifier: Apache-2.0
"""The inspection page as a callback of test and predict."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer

from anomalib_twostage.inspection.placement import FilePlacement
from anomalib_twostage.inspection.prediction_reader import PredictionReader, gathered

from .rows import PageHead
from .writer import PageWriter, check_settings

__all__ = ["InspectionPage"]


class InspectionPage(PredictionReader):
    """Lightning callback that writes a page to look at the tested or predicted images and to choose a threshold.

    The folder ``inspection`` of the run gets ``index.html``, which any browser opens from the file system: all images
    by score with map, contour and regions, the distribution of scores, and a threshold to drag, with the setting that
    gives it in anomalib. It serves every model of anomalib; of this package's model it also shows the stages. Give the
    callback to the trainer: ``Engine(callbacks=[InspectionPage()])``, or ``trainer.callbacks`` in a configuration.

    The folder appears when the page is complete, and then replaces an older page.

    Args:
        output_dir: Folder of the page, for it alone; by default ``inspection`` in the run's folder.
        picture_size: Longer side of the large pictures in pixels, at least 64.
        min_area: Smallest region in pixels of the anomaly map.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> from anomalib.engine import Engine
        >>> from anomalib_twostage import InspectionPage
        >>> engine = Engine(callbacks=[InspectionPage(min_area=20)])
    """

    def __init__(self, output_dir: str | Path | None = None, picture_size: int = 512, min_area: int = 1) -> None:
        super().__init__()
        check_settings(picture_size, min_area)
        self.output_dir = output_dir
        self.picture_size = picture_size
        self.min_area = min_area
        self._writer: PageWriter | None = None
        self._placement: FilePlacement | None = None

    def begin(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Make a place for the pictures, and ask a model that has stages for them.

        Raises:
            OSError: If the folder cannot be written, or holds something else.
        """
        del stage
        if hasattr(pl_module, "keep_stages"):
            pl_module.keep_stages = True  # type: ignore[assignment]
        self._discard()
        self._placement = None
        folder = Path(trainer.default_root_dir) / "inspection" if self.output_dir is None else Path(self.output_dir)
        settings: dict[str, Any] = {"picture_size": self.picture_size, "min_area": self.min_area}
        if trainer.is_global_zero:
            self._writer = PageWriter(folder, **settings)
        if trainer.world_size > 1:
            partial = trainer.strategy.broadcast(self._writer.partial if self._writer else None)
            prefix = f"{trainer.global_rank}-"
            self._writer = PageWriter(folder, partial=partial, prefix=prefix, **settings)

    def read(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> None:
        """Add the images of a batch.

        Raises:
            TypeError: If it is no batch of images.
            ValueError: If it has neither scores nor maps.
            OSError: If the pictures cannot be written.
        """
        assert self._writer is not None  # made in begin
        if self._placement is None:
            self._placement = FilePlacement(trainer, pl_module)
        image, paths = getattr(batch, "image", None), getattr(batch, "image_path", None)
        self._writer.add(
            batch,
            pixel_threshold=_threshold(pl_module, "pixel"),
            stages=getattr(pl_module, "last_stages", None),
            whole=image is None or self._placement.shows_whole_files(paths or [], tuple(image.shape[-2:])),
        )

    def finish(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write the page.

        Raises:
            ValueError: If there were no images.
            OSError: If the page cannot be written, or something else has come to lie in its folder meanwhile.
        """
        writer, self._writer = self._writer, None
        assert writer is not None  # made in begin
        rows = gathered(trainer, writer.rows, lambda row: row.path)
        if trainer.is_global_zero:
            head = PageHead(
                title=f"{type(pl_module).__name__}, {stage}",
                image_threshold=_threshold(pl_module, "image"),
                pixel_threshold=_threshold(pl_module, "pixel"),
                remarks=_origin(pl_module),
            )
            writer.finish(head, rows)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave nothing half-written."""
        del trainer, pl_module, exception
        self._discard()

    def _discard(self) -> None:
        if self._writer is not None:
            self._writer.discard()
            self._writer = None


def _threshold(pl_module: LightningModule, kind: str) -> float:
    """Where the post-processor's ``"image"`` or ``"pixel"`` threshold lies in what it returns."""
    post_processor = getattr(pl_module, "post_processor", None)
    return float(getattr(post_processor, f"normalized_{kind}_threshold", 0.5))


def _origin(pl_module: LightningModule) -> list[str]:
    """Where the thresholds come from."""
    post_processor = getattr(pl_module, "post_processor", None)
    if getattr(post_processor, "normalized_image_threshold", None) is None:
        return ["The model has no post-processor of anomalib: scores are raw, and 0.5 is where the page begins."]
    if bool(torch.isnan(torch.as_tensor(getattr(post_processor, "image_threshold", 0.0)))):
        return ["The model's thresholds were never measured: scores are raw, and 0.5 is where the page begins."]
    count = getattr(post_processor, "num_good_images", 0)
    if not count:
        return []
    rate, finest = 100 * getattr(post_processor, "false_alarm_rate", 0.0), 100 / (count + 1)
    limit = f", but {count} images cannot tell rates below {finest:.2g} %" if rate < finest else ""
    return [f"The model's thresholds come from {count} good images alone, for {rate:.4g} % false alarms{limit}."]
