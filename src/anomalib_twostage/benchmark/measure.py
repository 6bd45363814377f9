# SPDX-License-Identifier: Apache-2.0
"""Measures of a trained model: quality of its maps, and what a forward pass costs."""

import statistics
import time
from collections.abc import Iterable
from typing import Any

import torch
from anomalib.data import ImageBatch
from anomalib.metrics import AUPR, AUPRO, AUROC
from anomalib.models import AnomalibModule
from torch.utils.flop_counter import FlopCounterMode

from anomalib_twostage.model.lightning_model import TwoStageSuperpixel

from .table import FINAL, METRICS

__all__ = ["as_the_model_sees", "cost_of_inference", "quality", "synchronize"]

_FEWEST_REPEATS, _MOST_REPEATS = 3, 20
_ENOUGH_SECONDS = 5.0


@torch.no_grad()
def quality(model: AnomalibModule, batches: Iterable[ImageBatch]) -> dict[str, dict[str, float | None]]:
    """Metrics of each of the model's maps, at its input size, before any normalisation.

    Args:
        model: Trained model in evaluation mode. Of :class:`TwoStageSuperpixel` the distance to the memory, if there is
            one, stage one's map, its superpixel mean, the map as it would be without stage two, the final map before
            smoothing and the final map are measured, of others the final map.
        batches: Test images with labels and masks, as the datamodule hands them out.

    Returns:
        Per map, the final one last, the values of :data:`METRICS` in [0, 1], by anomalib's metrics; ``None`` where
        the images have no masks or the model no map.
    """
    device = next(model.parameters()).device
    truths: list[dict[str, Any]] = []
    maps: dict[str, list[torch.Tensor | None]] = {}
    scores: dict[str, list[torch.Tensor]] = {}
    for batch in batches:
        images, masks = as_the_model_sees(model, batch)
        truths.append({"image": images, "gt_mask": masks, "gt_label": batch.gt_label})
        for name, (values, score) in _maps(model, images.to(device)).items():
            maps.setdefault(name, []).append(None if values is None else values.float().cpu())
            scores.setdefault(name, []).append(score.float().reshape(len(images)).cpu())
    return {name: _metrics(truths, maps[name], scores[name]) for name in maps}


def cost_of_inference(model: AnomalibModule, images: torch.Tensor) -> dict[str, float]:
    """Parameters, operations and speed of the forward pass, which is what gets exported.

    Args:
        model: Model in evaluation mode.
        images: ``(B, C, H, W)`` on the model's device, as the model sees them.

    Returns:
        ``parameters``; ``GFLOPs`` of one image; ``inference ms`` of one image; ``inference images/s`` of the whole
        batch and ``inference batch``, its size. Times are medians.
    """
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.model(images[:1])
    return {
        "parameters": sum(parameter.numel() for parameter in model.model.parameters()),
        "GFLOPs": round(counter.get_total_flops() / 1e9, 4),
        "inference ms": round(1e3 * _forward_seconds(model, images[:1]), 3),
        "inference batch": len(images),
        "inference images/s": round(len(images) / _forward_seconds(model, images), 3),
    }


def as_the_model_sees(model: AnomalibModule, batch: ImageBatch) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Images ``(B, C, H, W)`` and masks ``(B, H, W)`` of a batch after the model's pre-processor."""
    images, masks = batch.image, batch.gt_mask
    transform = getattr(model.pre_processor, "transform", None)
    if transform is not None:
        images, masks = transform(images, masks)
    assert isinstance(images, torch.Tensor)
    return images, masks


def _maps(model: AnomalibModule, images: torch.Tensor) -> dict[str, tuple[torch.Tensor | None, torch.Tensor]]:
    """Maps and image scores of a batch, by name, as they leave the model."""
    if isinstance(model, TwoStageSuperpixel):
        two_stage = model.model
        stages = two_stage.stages(images)
        # The stages' maps are smoothed like the final one, so that they differ by the method's parts alone.
        maps = {} if stages.distance is None else {"memory": two_stage.smooth(stages.distance)}
        maps |= {
            "stage one": two_stage.smooth(stages.stage_one_map),
            "superpixel mean": two_stage.smooth(stages.pooled_map),
            "without stage two": two_stage.smooth(two_stage.without_stage_two(stages)),
            "not smoothed": stages.fused_map,
            FINAL: stages.anomaly_map,
        }
        return {name: (values, two_stage.score(values)) for name, values in maps.items()}
    result = model.model(images)
    score = result.pred_score
    if score is None:  # as anomalib's post-processor does
        score = result.anomaly_map.flatten(1).amax(1)
    return {FINAL: (result.anomaly_map, score)}


def _metrics(
    truths: list[dict[str, Any]],
    maps: list[torch.Tensor | None],
    scores: list[torch.Tensor],
) -> dict[str, float | None]:
    pixels, image = ["anomaly_map", "gt_mask"], ["pred_score", "gt_label"]
    metrics = dict(zip(METRICS, (AUROC(pixels), AUPR(pixels), AUPRO(pixels), AUROC(image)), strict=True))
    if any(values is None for values in maps) or any(truth["gt_mask"] is None for truth in truths):
        metrics = {name: metric for name, metric in metrics.items() if metric.fields is image}
    for truth, values, score in zip(truths, _to_unit_range(maps), _to_unit_range(scores), strict=True):
        batch = ImageBatch(**truth, anomaly_map=values, pred_score=score)
        for metric in metrics.values():
            metric.update(batch)
    return {name: round(float(metrics[name].compute()), 6) if name in metrics else None for name in METRICS}


def _to_unit_range(values: list[Any]) -> list[Any]:
    """Bring values that leave [0, 1] into it, all by the same line, which changes no ranking.

    torchmetrics would take them for logits and squash them through a sigmoid, which ties large ones.
    """
    present = [value for value in values if value is not None]
    if not present:
        return values
    low = min(float(value.min()) for value in present)
    high = max(float(value.max()) for value in present)
    if low >= 0 and high <= 1:
        return values
    span = (high - low) or 1.0
    return [None if value is None else ((value.double() - low) / span).float() for value in values]


def _forward_seconds(model: AnomalibModule, images: torch.Tensor) -> float:
    """Median time of the forward pass, after one to warm up."""
    times: list[float] = []
    with torch.inference_mode():
        model.model(images)
        while len(times) < _FEWEST_REPEATS or (len(times) < _MOST_REPEATS and sum(times) < _ENOUGH_SECONDS):
            synchronize(images.device)
            start = time.perf_counter()
            model.model(images)
            synchronize(images.device)
            times.append(time.perf_counter() - start)
    return statistics.median(times)


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was asked to."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
