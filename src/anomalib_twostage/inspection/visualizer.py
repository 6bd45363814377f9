# SPDX-License-Identifier: Apache-2.0
"""Pictures of the model's stages: of test and predicted images as files, of training examples in the logger."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain, count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import torch
from anomalib.data import Batch, ImageBatch, ImageItem
from anomalib.loggers import AnomalibMLFlowLogger
from anomalib.loggers.base import ImageLoggerBase
from anomalib.utils.path import generate_output_filename
from anomalib.visualization import Visualizer
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn
from PIL import Image, ImageDraw, ImageFont
from skimage.segmentation import find_boundaries
from torch.nn import functional

from .placement import FilePlacement

if TYPE_CHECKING:
    from anomalib_twostage.model.lightning_model import TwoStageSuperpixel
    from anomalib_twostage.model.torch_model import StageMaps, TwoStageSuperpixelModel

__all__ = ["StageVisualizer", "heat_panel", "image_panel", "mask_panel", "picture_grid", "superpixel_panel"]

_BORDER = (255, 230, 25)  # of superpixels: yellow, as in scikit-image
_CONTOUR = (0, 230, 255)  # of the predicted mask: the one hue that the heat map lacks
_WINDOW = (255, 60, 60)  # of what was looked at closely
_INK, _PAPER = (30, 30, 30), (255, 255, 255)
_SMALLEST_PANEL = 64  # below, the titles are wider than the panels


class StageVisualizer(Visualizer):
    """Writes one picture per tested or predicted image, the stages side by side.

    From left to right: the image as the model sees it, in the proportions that it has in its file; the ground truth, if
    known; stage one's map; the borders of the superpixels and, of a model that zooms, of what it looked at closely; the
    refined image; the final map as reported, that is after the post-processor, with the contour of the predicted mask.
    The file has the path that anomalib's own ``ImageVisualizer`` would give it, which is mostly name and folder of the
    image's file; where another image of the run has that path, more of the folders above go before it.

    During training, painted examples go to the loggers after each validation, if there is one that takes images
    (anomalib's, or Lightning's ``TensorBoardLogger``): the image, what was painted, its mask, stage one's map and
    the final map. They come from the last training batch, so the pictures draw no random numbers.

    Args:
        panel_size: Longer side of each panel in pixels, at least 64.
        output_dir: Folder of the pictures; by default ``images`` in the run's folder.
        log_examples: Painted examples to show per validation; 0 turns them off.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> from anomalib_twostage import StageVisualizer, TwoStageSuperpixel
        >>> model = TwoStageSuperpixel(visualizer=StageVisualizer(panel_size=384))
    """

    def __init__(self, panel_size: int = 256, output_dir: str | Path | None = None, log_examples: int = 4) -> None:
        super().__init__()
        if panel_size < _SMALLEST_PANEL:
            msg = f"panel_size must be at least {_SMALLEST_PANEL} pixels, got {panel_size}."
            raise ValueError(msg)
        if log_examples < 0:
            msg = f"log_examples must be 0 or more, got {log_examples}."
            raise ValueError(msg)
        self.panel_size = panel_size
        self.output_dir = output_dir
        self.log_examples = log_examples
        self._placement: FilePlacement | None = None  # of the run's images in their files
        # Clean images, painted images and masks of the last training batch.
        self._example: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None
        # Where the pictures of this run's images go.
        self._places: dict[str, Path] = {}
        self._taken: set[Path] = set()

    def visualize(self, predictions: ImageBatch, stages: StageMaps, *, stretch: bool = True) -> list[Image.Image]:
        """Draw the stages of a batch.

        Args:
            predictions: Batch with ``image`` ``(B, 3, H, W)`` in [0, 1]. What else it has is used: ``anomaly_map``
                (else the one of ``stages``), ``pred_mask``, ``gt_mask``, scores, labels and paths.
            stages: What the model's ``stages`` returned for these images.
            stretch: Give the panels the proportions of the image's file, where there is one.

        Returns:
            One RGB picture per image.

        Raises:
            TypeError: If ``predictions`` is not a batch of images.

        Example:
            >>> from anomalib.data import ImageBatch
            >>> from anomalib_twostage import TwoStageSuperpixel
            >>> model = TwoStageSuperpixel(variant="small").eval()
            >>> batch = ImageBatch(image=torch.rand(2, 3, 128, 128))
            >>> with torch.no_grad():
            ...     pictures = StageVisualizer().visualize(batch, model.model.stages(batch.image))
            >>> len(pictures)
            2
        """
        if not isinstance(predictions, ImageBatch):
            msg = f"StageVisualizer draws an ImageBatch, got {type(predictions).__name__}."
            raise TypeError(msg)
        return self._pictures(predictions, stages, [_file_size(item) if stretch else None for item in predictions])

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check the model and the output folder before the run, not after it.

        Raises:
            TypeError: If the model has no stages.
            OSError: If the output folder cannot be written.
        """
        if not hasattr(getattr(pl_module, "model", None), "stages"):
            msg = (
                f"StageVisualizer draws the stages of TwoStageSuperpixel, and {type(pl_module).__name__} has none: "
                "use anomalib.visualization.ImageVisualizer."
            )
            raise TypeError(msg)
        self._placement = None
        if trainer.is_global_zero and (self.output_dir is not None or stage in ("test", "predict")):
            self._check_folder(self._folder(trainer))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Remember the batch as an example of the paint, if there is a logger to show it."""
        del pl_module, batch_idx
        if self.log_examples and isinstance(outputs, Mapping) and _image_loggers(trainer):
            self._example = (batch.image, outputs["painted"], outputs["mask"])

    def on_validation_end(self, trainer: Trainer, pl_module: TwoStageSuperpixel) -> None:  # type: ignore[override]
        """Show the painted examples of the last training batch in the loggers."""
        example, self._example = self._example, None
        if example is None or trainer.state.fn is not TrainerFn.FITTING:
            return
        with trainer.precision_plugin.val_step_context():
            picture = np.asarray(self._examples(pl_module.model, *example))
        for logger in _image_loggers(trainer):
            _log(logger, picture, "training_examples", trainer.global_step)

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Ask for the stages, and give each image's picture its place, the same in all processes."""
        pl_module.keep_stages = True  # type: ignore[assignment]
        self._give_places(trainer, trainer.test_dataloaders)

    def on_predict_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Ask for the stages, and give each image's picture its place, the same in all processes."""
        pl_module.keep_stages = True  # type: ignore[assignment]
        self._give_places(trainer, trainer.predict_dataloaders)

    def on_test_batch_end(  # type: ignore[override]
        self,
        trainer: Trainer,
        pl_module: TwoStageSuperpixel,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Write the pictures of a batch.

        Raises:
            OSError: If a picture cannot be written.
        """
        del outputs
        assert isinstance(batch, ImageBatch)
        assert pl_module.last_stages is not None  # of the step that has just ended
        if self._placement is None:
            self._placement = FilePlacement(trainer, pl_module)
        shapes = [_shown_size(item, self._placement) for item in batch]
        pictures = self._pictures(batch, pl_module.last_stages, shapes)
        source = "".join(f"{name}{i}_" for name, i in (("rank", trainer.global_rank), ("loader", dataloader_idx)) if i)
        for index, picture in enumerate(pictures):
            number = f"{source}{batch_idx:04}_{index:02}.png"
            path = self._place(trainer, batch.image_path[index] if batch.image_path else number)
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                picture.save(path)
            except OSError as error:
                raise _cannot_write(self._folder(trainer), error) from error

    def on_predict_batch_end(  # type: ignore[override]
        self,
        trainer: Trainer,
        pl_module: TwoStageSuperpixel,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Write the pictures of a batch.

        Raises:
            OSError: If a picture cannot be written.
        """
        self.on_test_batch_end(trainer, pl_module, outputs, batch, batch_idx, dataloader_idx)

    def _folder(self, trainer: Trainer) -> Path:
        return Path(trainer.default_root_dir) / "images" if self.output_dir is None else Path(self.output_dir)

    def _give_places(self, trainer: Trainer, dataloaders: Any) -> None:
        self._places, self._taken = {}, set()
        for loader in dataloaders if isinstance(dataloaders, list | tuple) else [dataloaders]:
            for name in _image_paths(getattr(loader, "dataset", None)):
                self._place(trainer, name)

    def _place(self, trainer: Trainer, name: str) -> Path:
        """Where the picture of an image goes: anomalib's place, or one of its own if that is another image's."""
        if name not in self._places:
            folder, datamodule = self._folder(trainer), getattr(trainer, "datamodule", None)
            place = generate_output_filename(
                input_path=name,
                output_path=folder,
                dataset_name=getattr(datamodule, "name", None),
                category=getattr(datamodule, "category", None),
                mkdir=False,
            )
            parts = Path(name).relative_to(Path(name).anchor).parts
            deeper = (folder.joinpath(*parts[-n:]) for n in range(len(place.relative_to(folder).parts), len(parts) + 1))
            numbered = (place.with_stem(f"{place.stem}_{n}") for n in count(2))
            place = next(place for place in chain([place], deeper, numbered) if place not in self._taken)
            self._places[name] = place
            self._taken.add(place)
        return self._places[name]

    @staticmethod
    def _check_folder(folder: Path) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            probe = folder / ".writable"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise _cannot_write(folder, error) from error

    def _size(self, width: float, height: float) -> tuple[int, int]:
        """Width and height of a panel for an image of these proportions."""
        scale = self.panel_size / max(width, height)
        return max(1, round(width * scale)), max(1, round(height * scale))

    def _pictures(
        self, predictions: ImageBatch, stages: StageMaps, shapes: Sequence[tuple[float, float] | None]
    ) -> list[Image.Image]:
        """Draw a batch, with panels in the proportions of these widths and heights, or of the images."""
        return [self._picture(item, stages, index, shapes[index]) for index, item in enumerate(predictions)]

    def _picture(
        self, item: ImageItem, stages: StageMaps, index: int, shape: tuple[float, float] | None
    ) -> Image.Image:
        assert isinstance(item.image, torch.Tensor)
        size = self._size(*(shape or reversed(item.image.shape[-2:])))

        panels = {"image": image_panel(item.image, size)}
        if item.gt_mask is not None:
            panels["ground truth"] = mask_panel(item.gt_mask, size)
        panels["stage one"] = heat_panel(stages.stage_one_map[index], size)
        panels["superpixels"] = superpixel_panel(panels["image"], stages, index)
        panels["refined image"] = image_panel(stages.refined_image[index], size)
        final = item.anomaly_map if item.anomaly_map is not None else stages.anomaly_map[index]
        panels["final map"] = heat_panel(final, size)
        if item.pred_mask is not None:
            panels["final map"] = _outlined(panels["final map"], item.pred_mask, _CONTOUR, thick=True)
        return picture_grid([list(panels.values())], list(panels), _caption(item))

    @torch.no_grad()
    def _examples(
        self, model: TwoStageSuperpixelModel, images: torch.Tensor, painted: torch.Tensor, masks: torch.Tensor
    ) -> Image.Image:
        """Draw painted images, one per row; unpainted ones only where there are too few."""
        has_paint = masks.flatten(1).any(dim=1)
        chosen = has_paint.int().argsort(descending=True, stable=True)[: self.log_examples]
        images, painted, masks = images[chosen], painted[chosen], masks[chosen]
        if painted.shape[-2:] != images.shape[-2:]:  # stage one of a model that zooms learns from reduced images
            painted, masks = (functional.interpolate(each, images.shape[-2:]) for each in (painted, masks))
        training = model.training
        model.eval()
        try:
            stages = model.stages(painted)
        finally:
            model.train(training)
        size = self._size(images.shape[-1], images.shape[-2])
        titles = ["image", "painted", "mask", "stage one", "final map"]
        rows = [
            [
                image_panel(images[i], size),
                image_panel(painted[i], size),
                mask_panel(masks[i], size),
                heat_panel(stages.stage_one_map[i], size),
                heat_panel(stages.anomaly_map[i], size),
            ]
            for i in range(len(chosen))
        ]
        return picture_grid(rows, titles)


def image_panel(image: torch.Tensor, size: tuple[int, int]) -> Image.Image:
    """An image ``(C, H, W)`` in [0, 1], 1 or 3 channels, as an RGB panel of this width and height in pixels."""
    values = image.detach().float().clamp(0, 1).expand(3, -1, -1).permute(1, 2, 0).cpu().numpy()
    return Image.fromarray((values * 255).round().astype(np.uint8)).resize(size, Image.Resampling.BILINEAR)


def mask_panel(mask: torch.Tensor, size: tuple[int, int]) -> Image.Image:
    """A mask ``(H, W)`` or ``(1, H, W)``, bool or in {0, 1}, in black and white."""
    return Image.fromarray(_nearest(mask.detach() > 0, size).astype(np.uint8) * 255).convert("RGB")


def heat_panel(values: torch.Tensor, size: tuple[int, int]) -> Image.Image:
    """A map ``(H, W)`` or ``(1, H, W)`` as a heat map, black at 0 and bright at 1; NaN counts as 0."""
    plane = _plane(values.detach().float().nan_to_num(0.0).clamp(0, 1))
    resized = np.asarray(Image.fromarray(plane).resize(size, Image.Resampling.BILINEAR))
    return Image.fromarray(mpl.colormaps["inferno"](resized, bytes=True)[..., :3])


def superpixel_panel(panel: Image.Image, stages: Any, index: int) -> Image.Image:
    """A panel with the borders between the superpixels and, of a model that zooms, of what it looked at closely.

    Args:
        panel: What to draw on.
        stages: What has ``labels`` ``(B, H, W)`` and, unless it is ``None``, ``looked`` ``(B, 1, H, W)`` in [0, 1].
        index: Which of the batch.
    """
    panel = _outlined(panel, stages.labels[index], _BORDER, opacity=0.6)
    looked = getattr(stages, "looked", None)
    return panel if looked is None else _outlined(panel, looked[index] > 0.5, _WINDOW, thick=True)


def picture_grid(
    rows: Sequence[Sequence[Image.Image]], titles: Sequence[str], caption: str = "", gap: int = 6
) -> Image.Image:
    """Lay panels out on white paper.

    Args:
        rows: Panels of one common size; as many per row as there are titles.
        titles: Heads of the columns.
        caption: Line above the titles.
        gap: Space between the panels in pixels.

    Returns:
        The RGB picture.
    """
    width, height = rows[0][0].size
    font_size = min(24, max(12, max(width, height) // 18))
    font = ImageFont.load_default(size=font_size)
    line = round(font_size * 1.5)
    column = max(width, *(round(font.getlength(title)) for title in titles)) + gap
    head = gap + line * (2 if caption else 1)
    paper_width = max(gap + column * len(titles), round(font.getlength(caption)) + 2 * gap)
    picture = Image.new("RGB", (paper_width, head + (height + gap) * len(rows)), _PAPER)
    draw = ImageDraw.Draw(picture)
    if caption:
        draw.text((gap, gap), caption, fill=_INK, font=font)
    for index, title in enumerate(titles):
        draw.text((gap + index * column, head - line), title, fill=_INK, font=font)
        for number, row in enumerate(rows):
            picture.paste(row[index], (gap + index * column, head + number * (height + gap)))
    return picture


def _plane(values: torch.Tensor) -> np.ndarray:
    """A map ``(H, W)`` or ``(1, H, W)`` as an array ``(H, W)``."""
    return values.reshape(values.shape[-2:]).cpu().numpy()


def _nearest(values: torch.Tensor, size: tuple[int, int]) -> np.ndarray:
    """Resize labels to this width and height without mixing them."""
    plane, (width, height) = _plane(values), size
    rows = ((np.arange(height) + 0.5) * plane.shape[0] / height).astype(int)
    columns = ((np.arange(width) + 0.5) * plane.shape[1] / width).astype(int)
    return plane[np.ix_(rows, columns)]


def _outlined(
    panel: Image.Image, labels: torch.Tensor, colour: tuple[int, int, int], opacity: float = 1.0, thick: bool = False
) -> Image.Image:
    """Draw the borders between labels ``(H, W)`` or ``(1, H, W)`` into a panel."""
    borders = find_boundaries(_nearest(labels.detach(), panel.size), mode="thick" if thick else "inner")
    pixels = np.array(panel)
    pixels[borders] = np.round(pixels[borders] * (1 - opacity) + np.array(colour) * opacity)
    return Image.fromarray(pixels)


def _caption(item: ImageItem) -> str:
    """File, score and verdict, as far as they are known."""
    verdict = []
    if item.pred_score is not None:
        verdict.append(f"score {float(item.pred_score):.3f}")
    if item.pred_label is not None:
        verdict.append(_word(item.pred_label))
    parts = ["/".join(Path(item.image_path).parts[-2:])] if item.image_path else []
    parts += [", ".join(verdict)] if verdict else []
    parts += [f"truth: {_word(item.gt_label)}"] if item.gt_label is not None else []
    return "   |   ".join(parts)


def _file_size(item: ImageItem) -> tuple[float, float] | None:
    """Width and height of an image's file; ``None`` if there is none."""
    if not item.image_path or not Path(item.image_path).is_file():
        return None
    with Image.open(item.image_path) as file:
        return file.size


def _shown_size(item: ImageItem, placement: FilePlacement) -> tuple[float, float] | None:
    """Width and height of what an image shows, in pixels of its file; ``None`` if they are unknown."""
    assert isinstance(item.image, torch.Tensor)
    height, width = item.image.shape[-2:]
    found = placement.find(item.image_path, (height, width)) if item.image_path else None
    return None if found is None else (abs(found[0].column_width) * width, abs(found[0].row_height) * height)


def _word(label: torch.Tensor) -> str:
    return "anomalous" if bool(label) else "normal"


def _image_paths(dataset: Any) -> list[str]:
    """Paths of all images of a data set of anomalib; none of others."""
    samples = getattr(dataset, "samples", None)
    if isinstance(samples, pd.DataFrame) and "image_path" in samples:
        return [str(path) for path in samples["image_path"]]
    return [str(path) for path in getattr(dataset, "image_filenames", [])]


def _cannot_write(folder: Path, error: OSError) -> OSError:
    msg = (
        f"Cannot write pictures to {folder} ({error.strerror or error}): free the place or give StageVisualizer "
        "another output_dir, or turn the pictures off with visualizer=False."
    )
    return OSError(msg)


def _image_loggers(trainer: Trainer) -> list[Logger]:
    if not trainer.is_global_zero:
        return []
    return [logger for logger in trainer.loggers if isinstance(logger, ImageLoggerBase | TensorBoardLogger)]


def _log(logger: Any, picture: np.ndarray, name: str, step: int) -> None:
    """Hand a picture ``(H, W, 3)`` uint8 to a logger."""
    if isinstance(logger, AnomalibMLFlowLogger):  # keeps files, so each step needs a name of its own
        logger.add_image(picture, name=f"{name}/{step:08}.png")
    elif isinstance(logger, ImageLoggerBase):
        logger.add_image(picture, name=name, global_step=step)
    else:
        logger.experiment.add_image(name, picture, step, dataformats="HWC")
