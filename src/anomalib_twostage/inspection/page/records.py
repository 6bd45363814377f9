# SPDX-License-Identifier: Apache-2.0
"""Predictions as they come, from a model, an engine or an inferencer of anomalib, image by image."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from anomalib.data import NumpyImageBatch, NumpyImageItem

from anomalib_twostage.inspection.regions import Region, find_regions

__all__ = ["NO_MAP", "NO_SCORE", "Prediction", "read_predictions"]

NO_MAP = "no anomaly map, as anomalib's Dfkde, Ganomaly and Dfm with score_type='nll' give none"
NO_SCORE = "no score, as anomalib's VlmAd gives verdicts alone"


@dataclass(frozen=True)
class Prediction:
    """What is known of one image.

    Attributes:
        path: File of the image.
        image: ``(C, H, W)`` as the model saw it.
        score: Image score; NaN stays NaN.
        verdict: The model's, true for defective.
        truth: True for defective.
        anomaly_map: ``(H, W)`` float32.
        truth_mask: ``(H, W)`` bool.
        regions: Of the predicted mask, or where the map is above the pixel threshold; highest peak first.
        score_is_peak: Whether the score is the highest value of the map, for want of another.
    """

    path: str | None
    image: torch.Tensor | None
    score: float
    verdict: bool | None
    truth: bool | None
    anomaly_map: np.ndarray | None
    truth_mask: np.ndarray | None
    regions: list[Region]
    score_is_peak: bool


def read_predictions(batch: Any, pixel_threshold: float, min_area: int = 1) -> Iterator[Prediction]:
    """Take a batch apart.

    Args:
        batch: ``ImageBatch``, ``ImageItem``, ``InferenceBatch`` or what else has their fields, as tensors or arrays.
            Images have their channels first, but in ``NumpyImageBatch`` and ``NumpyImageItem`` last.
        pixel_threshold: Pixels of the anomaly map above it belong to a region, where there is no predicted mask.
        min_area: Smallest region in pixels of the map.

    Yields:
        One prediction per image.

    Raises:
        TypeError: If it is no batch of images.
        ValueError: If there are neither scores nor maps, or different numbers of them.
    """
    images, maps = _images(batch), _tensor(batch, "anomaly_map")
    scores = _flat(batch, "pred_score")
    if images is not None and images.ndim == 5:
        msg = f"The inspection page shows images, and this {type(batch).__name__} holds videos."
        raise TypeError(msg)
    if maps is not None:
        maps = maps.float().reshape(-1, *_sides(maps))
    if scores is None and maps is None:
        kind = type(batch).__name__
        msg = f"There is nothing to sort by in this {kind}: {NO_SCORE}, and {NO_MAP}. Take a model with scores or maps."
        raise ValueError(msg)
    score_is_peak = scores is None
    if scores is None:
        assert maps is not None
        scores = maps.amax(dim=(1, 2))  # as anomalib does in an export
    count = len(scores)
    if images is not None and images.ndim == 3:
        images = images.unsqueeze(0)
    masks = _tensor(batch, "gt_mask")
    masks = None if masks is None else (masks > 0).reshape(-1, *_sides(masks))
    verdicts, truths = _flat(batch, "pred_label"), _flat(batch, "gt_label")
    paths = getattr(batch, "image_path", None)
    paths = None if paths is None else [str(paths)] if isinstance(paths, str) else [str(path) for path in paths]
    fields = {
        "maps": maps,
        "images": images,
        "masks": masks,
        "predicted labels": verdicts,
        "labels": truths,
        "image paths": paths,
    }
    for name, values in fields.items():
        if values is not None and len(values) != count:
            msg = f"There are {len(values)} {name} for {count} scores in this {type(batch).__name__}."
            raise ValueError(msg)
    regions = _regions(batch, maps, pixel_threshold, min_area)
    for i in range(count):
        yield Prediction(
            path=None if paths is None else paths[i],
            image=None if images is None else images[i],
            score=float(scores[i]),
            verdict=None if verdicts is None or math.isnan(verdicts[i]) else bool(verdicts[i]),
            truth=None if truths is None else bool(truths[i]),
            anomaly_map=None if maps is None else maps[i].numpy(),
            truth_mask=None if masks is None else masks[i].numpy(),
            regions=regions[i] if regions else [],
            score_is_peak=score_is_peak,
        )


def _regions(batch: Any, maps: torch.Tensor | None, threshold: float, min_area: int) -> list[list[Region]]:
    """The regions of each image."""
    if maps is None:
        return []
    masks = _tensor(batch, "pred_mask")
    if masks is None:
        masks = maps > threshold
    masks = (masks > 0).reshape(-1, *_sides(masks))
    # One image at a time, as regions know their image by its path alone, which need not be there.
    return [find_regions(_Mapped(values, mask), min_area=min_area) for values, mask in zip(maps, masks, strict=True)]


@dataclass(frozen=True)
class _Mapped:
    anomaly_map: torch.Tensor
    pred_mask: torch.Tensor


def _sides(planes: torch.Tensor) -> tuple[int, int]:
    """Height and width of ``(H, W)``, ``(B, H, W)``, ``(B, 1, H, W)`` or, as arrays have it, ``(B, H, W, 1)``."""
    last_is_channel = planes.ndim == 4 and planes.shape[3] == 1 and planes.shape[1] != 1
    height, width = planes.shape[1:3] if last_is_channel else planes.shape[-2:]
    return height, width


def _tensor(batch: Any, name: str) -> torch.Tensor | None:
    value = getattr(batch, name, None)
    return None if value is None else torch.as_tensor(value).detach().cpu().as_subclass(torch.Tensor)


def _images(batch: Any) -> torch.Tensor | None:
    """Images with their channels first, ``(B, C, H, W)`` or ``(C, H, W)``."""
    images = _tensor(batch, "image")
    channels_last = isinstance(batch, NumpyImageBatch | NumpyImageItem)  # anomalib turns what they are made of
    return images.movedim(-1, -3) if images is not None and channels_last else images


def _flat(batch: Any, name: str) -> torch.Tensor | None:
    """One number per image, ``(B,)``."""
    value = _tensor(batch, name)
    return None if value is None else value.reshape(-1)
