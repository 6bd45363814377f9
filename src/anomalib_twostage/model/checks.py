# SPDX-License-Identifier: Apache-2.0
"""What images and sizes the model takes, said early and by name."""

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from anomalib.data import AnomalibDataModule, ImageBatch
from anomalib.pre_processing import PreProcessor
from lightning.pytorch import LightningModule

from anomalib_twostage.common.bit_depth import DeepFileCheck
from anomalib_twostage.common.transforms import NORMALIZE, find_transforms

from .torch_model import TwoStageSuperpixelModel

__all__ = [
    "CheckedImages",
    "FileCheck",
    "check_fraction",
    "check_precision",
    "check_size",
    "check_values",
    "refuse_normalization",
]

_OVERSHOOT = 0.3  # bicubic resizing may leave [0, 1] by this much; normalised images leave it by more
_CHECKED = "files_checked"  # attribute of a batch whose files have been checked


def check_fraction(name: str, value: float, *, include_one: bool) -> None:
    """Refuse an argument outside (0, 1), or (0, 1] with ``include_one``.

    Raises:
        ValueError: If it is outside.
    """
    if not (0 < value < 1 or (include_one and value == 1)):
        msg = f"{name} must be above 0 and {'at most' if include_one else 'below'} 1, got {value}."
        raise ValueError(msg)


def check_size(height: int, width: int, *, smallest: int, segment_size: int, variant: str) -> None:
    """Refuse images that are too small for the networks or for their superpixels.

    Args:
        height: Height of the images in pixels.
        width: Width of the images in pixels.
        smallest: Shortest side that the networks take.
        segment_size: Side of a superpixel.
        variant: Name of the networks, for the message.

    Raises:
        ValueError: If a side is below ``smallest`` or ``segment_size``.
    """
    if min(height, width) < smallest:
        msg = (
            f"Images of {height} x {width} pixels are too small for variant {variant!r}: "
            f"the pre-processor must resize to at least {smallest} x {smallest}."
        )
        raise ValueError(msg)
    if segment_size > min(height, width):
        msg = (
            f"segment_size ({segment_size} pixels) is larger than the image ({height} x {width}): "
            "choose it well below the shorter side."
        )
        raise ValueError(msg)


def check_values(images: torch.Tensor, paths: Sequence[str]) -> None:
    """Refuse images with NaN and images that are not in [0, 1]. On a GPU this would wait for the images.

    Args:
        images: Images of any shape, floating point.
        paths: Their files, for the message.

    Raises:
        ValueError: If a pixel is NaN, or leaves [0, 1] by more than resizing does.
    """
    if images.numel() == 0:
        return
    low, high = (float(value) for value in images.detach().float().aminmax())
    if math.isnan(low) or math.isnan(high):
        msg = f"The batch holds NaN pixels; check these images and the augmentations: {list(paths)}."
        raise ValueError(msg)
    if low < -_OVERSHOOT or high > 1 + _OVERSHOOT:
        msg = (
            f"TwoStageSuperpixel reads images in [0, 1], got values from {low:.3g} to {high:.3g}: "
            "take normalisation out of the augmentations and the pre-processor, and scale integers to [0, 1]."
        )
        raise ValueError(msg)


def refuse_normalization(transform: Any) -> None:
    """Refuse a pre-processor's transform that normalises, however deep inside it.

    Raises:
        ValueError: If it does.
    """
    if find_transforms(transform, NORMALIZE):
        msg = "TwoStageSuperpixel reads images in [0, 1]: take Normalize out of the pre-processor."
        raise ValueError(msg)


def check_precision(precision: str) -> None:
    """Refuse a trainer's precision that is neither 32 bits nor mixed.

    Raises:
        ValueError: If it is another.
    """
    if precision.endswith("-true") and precision != "32-true":
        msg = (
            f"precision {precision!r} is not supported, because anomalib leaves its images in float32: "
            "take '32-true', '16-mixed' or 'bf16-mixed'."
        )
        raise ValueError(msg)


class FileCheck:
    """Looks once at every image file for what anomalib would misread; where it can, where the file is read.

    With one of anomalib's datamodules that is in the workers of its data loaders. Batches of other data loaders are
    looked at when they arrive.
    """

    def __init__(self) -> None:
        self._refuse_deep_files = DeepFileCheck()

    def join(self, datamodule: Any) -> None:
        """Have a datamodule's data loaders, made from now on, check what they read; others are left as they are."""
        self.leave(datamodule)
        if not isinstance(datamodule, AnomalibDataModule):
            return
        given = datamodule.external_collate_fn
        subsets = [getattr(datamodule, f"{name}_data", None) for name in ("train", "val", "test")]
        functions = {given or subset.collate_fn for subset in subsets if subset is not None}
        if len(functions) == 1:  # one function serves all three
            datamodule.external_collate_fn = _CheckingCollate(functions.pop(), given, self._refuse_deep_files)

    def leave(self, datamodule: Any) -> None:
        """Take the check out of a datamodule again."""
        if isinstance(getattr(datamodule, "external_collate_fn", None), _CheckingCollate):
            datamodule.external_collate_fn = datamodule.external_collate_fn.given

    def check(self, paths: Iterable[str]) -> None:
        """Check files.

        Raises:
            ValueError: If one of them has more than 8 bits a channel.
        """
        self._refuse_deep_files(paths)

    def check_batch(self, batch: ImageBatch) -> None:
        """Check a batch that has arrived, unless its data loader has done so.

        Raises:
            ValueError: If one of its files has more than 8 bits a channel.
        """
        paths = batch.image_path or []
        if getattr(batch, _CHECKED, False):
            self._refuse_deep_files.seen.update(paths)  # workers that start later need not look again
        else:
            self._refuse_deep_files(paths)


class _CheckingCollate:
    """A collate function that first checks the files of what it collates."""

    def __init__(
        self, collate: Callable[[list[Any]], Any], given: Callable[[list[Any]], Any] | None, check: DeepFileCheck
    ) -> None:
        self.collate = collate
        self.given = given
        self.check = check

    def __call__(self, items: list[Any]) -> Any:
        self.check(item.image_path for item in items if item.image_path)
        batch = self.collate(items)
        setattr(batch, _CHECKED, True)
        return batch


class CheckedImages(LightningModule):
    """Looks at all images before the model does. Stands before ``AnomalibModule`` among a model's bases."""

    model: TwoStageSuperpixelModel
    variant: str
    pre_processor: PreProcessor | None
    input_size: tuple[int, int] | None
    _files: FileCheck

    def setup(self, stage: str) -> None:
        """Check pre-processor and precision before the run, and files where they are read.

        Raises:
            ValueError: If the pre-processor normalises or resizes to too small a size, or the trainer's precision is
                neither 32 bits nor mixed.
        """
        super().setup(stage)
        if self.pre_processor:
            refuse_normalization(self.pre_processor.transform)
            self.check_known_size()
        check_precision(str(self.trainer.precision))
        # Lightning tells every user with a datamodule that the model checks batches before their transfer.
        warnings.filterwarnings("ignore", "You have overridden `on_before_batch_transfer` in `LightningModule`")
        self._files.join(getattr(self.trainer, "datamodule", None))

    def teardown(self, stage: str) -> None:
        """Take the check out of the data loaders again."""
        super().teardown(stage)
        self._files.leave(getattr(self.trainer, "datamodule", None))

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Check the images while they are in the host's memory, so that no step waits for the device.

        Raises:
            ValueError: If images hold NaN, are not in [0, 1], or come from files of more than 8 bits a channel.
        """
        batch = super().on_before_batch_transfer(batch, dataloader_idx)
        if isinstance(batch, ImageBatch) and isinstance(batch.image, torch.Tensor):
            check_values(batch.image, batch.image_path or [])
            self._files.check_batch(batch)
        return batch

    def check_known_size(self) -> None:
        """Refuse a pre-processor that brings all images to a size too small for the model.

        Raises:
            ValueError: If it does.
        """
        transform = self.pre_processor.transform if self.pre_processor else None
        # anomalib's input_size is what becomes of a single pixel; a transform that only pads makes more of more.
        if self.input_size is None or transform is None:
            return
        if tuple(transform(torch.zeros(1, 3, 2, 2)).shape[-2:]) == tuple(self.input_size):
            self.check_size(*self.input_size)

    def check_size(self, height: int, width: int) -> None:
        """Refuse images that are too small for the model.

        Raises:
            ValueError: If they are.
        """
        smallest, segment_size = self.model.stage_one.minimum_size, self.model.slic.segment_size
        zoom = self.model.zoom
        check_size(height, width, smallest=zoom * smallest, segment_size=zoom * segment_size, variant=self.variant)
