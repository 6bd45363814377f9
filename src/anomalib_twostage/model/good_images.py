# SPDX-License-Identifier: Apache-2.0
"""Which data set is trained on, and its good images as the model is to know them.

What a data set's transforms do to every image alike belongs to a good image, as a crop to the middle does; what they do
by chance, such as turning some images, does not, and paint least of all.
"""

import zlib
from collections.abc import Callable, Iterator
from typing import Any

import pandas as pd
import torch
from anomalib.data import ImageBatch
from lightning.pytorch import Trainer
from tqdm import tqdm

from anomalib_twostage.common.datasets import datasets_in, with_transforms
from anomalib_twostage.common.spacing import evenly_spaced
from anomalib_twostage.common.transforms import fixed_part
from anomalib_twostage.pseudo_anomaly import PseudoAnomalyTransform

from .checks import FileCheck, check_values

__all__ = ["good_images", "image_files", "image_number", "image_numbers", "training_data"]


def training_data(trainer: Trainer) -> Any:
    """The data set that a trainer is about to train on, before its data loader starts to read.

    Returns:
        The data set, or ``None`` if it is known only to a datamodule that is not anomalib's.
    """
    datamodule = getattr(trainer, "datamodule", None)
    if datamodule is not None:
        return getattr(datamodule, "train_data", None)
    # Private in Lightning 2.6, but no public hook sees a data loader before its workers have started.
    return getattr(trainer.fit_loop._data_source.instance, "dataset", None)


def image_number(path: str | None, index: int = -1) -> int:
    """The number by which an image is known again: of its file, or, without one, its place among the others."""
    return index if path is None else zlib.crc32(path.encode(errors="surrogatepass"))  # not all names are text


@torch.compiler.disable  # a compiler knows no checksums
def image_numbers(batch: ImageBatch) -> torch.Tensor | None:
    """Numbers ``(B,)`` int64 of a batch's images, on their device; ``None`` if it does not name their files."""
    if batch.image_path is None:
        return None
    assert isinstance(batch.image, torch.Tensor)
    numbers = torch.tensor([image_number(path) for path in batch.image_path])
    return numbers.to(batch.image.device, non_blocking=True)


def image_files(dataset: Any) -> list[str]:
    """Paths of the images of anomalib's data sets, also of those wrapped in others, without reading any."""
    paths = []
    for part in datasets_in(dataset):
        samples = getattr(part, "samples", None)
        paths += list(samples["image_path"]) if isinstance(samples, pd.DataFrame) and "image_path" in samples else []
    return paths


def good_images(
    dataset: Any, most: int, pre_process: Callable[[Any], torch.Tensor] | None, files: FileCheck
) -> Iterator[tuple[torch.Tensor, int]]:
    """Read images of a data set without what is done to them by chance.

    Args:
        dataset: Training data, also wrapped in others; it is left as it is. Its items are those of anomalib.
        most: How many to read at most; of more, some evenly spaced ones.
        pre_process: What the model's pre-processor does to images.
        files: Looks at their files.

    Yields:
        The images ``(3, H, W)`` as the model sees them, and the number of each, see :func:`image_number`.

    Raises:
        ValueError: If an image holds NaN, is not in [0, 1], or comes from a file of more than 8 bits a channel.
    """
    image = with_transforms(dataset, lambda _: None)[0].image
    fixed = with_transforms(dataset, lambda transform: fixed_part(transform, image, without=PseudoAnomalyTransform))
    assert isinstance(image, torch.Tensor)
    for index in tqdm(evenly_spaced(len(dataset), most), desc="Golden template", leave=False, disable=None):
        item = fixed[index]
        paths = [item.image_path] if item.image_path else []
        files.check(paths)
        image = item.image if pre_process is None else pre_process(item.image)
        check_values(image, paths)
        yield image, image_number(item.image_path, index)
