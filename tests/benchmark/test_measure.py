# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
import torch
from anomalib.data import ImageBatch, InferenceBatch
from anomalib.pre_processing import PreProcessor
from scipy import integrate, ndimage
from sklearn.metrics import average_precision_score, roc_auc_score
from torch import nn
from torchvision.transforms.v2 import Resize

from anomalib_twostage import TwoStageSuperpixel
from anomalib_twostage.benchmark.measure import cost_of_inference, quality

SIDE = 64


class Brightness(nn.Module):
    """Takes the red channel for the anomaly map, on some scale."""

    def __init__(self, scale: float = 1.0, offset: float = 0.0) -> None:
        super().__init__()
        self.scale, self.offset = scale, offset
        self.convolution = nn.Conv2d(3, 5, 3, padding=1)

    def forward(self, images: torch.Tensor) -> InferenceBatch:
        self.convolution(images)
        values = images[:, 0] * self.scale + self.offset
        return InferenceBatch(anomaly_map=values, pred_score=values.flatten(1).mean(1))


class Detector(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.pre_processor: PreProcessor | None = None


def batches() -> list[ImageBatch]:
    """Two batches of noise with brighter squares; of three images each, the last one good."""
    made = []
    for _ in range(2):
        image, mask = torch.rand(3, 3, SIDE, SIDE), torch.zeros(3, SIDE, SIDE, dtype=torch.bool)
        mask[0, 5:15, 5:25] = mask[0, 30:34, 30:34] = mask[1, 20:44, 20:28] = True
        image[:, 0] = (image[:, 0] + 0.3 * mask).clamp(max=1)
        made.append(ImageBatch(image=image, gt_mask=mask, gt_label=torch.tensor([1, 1, 0])))
    return made


def aupro(maps: np.ndarray, masks: np.ndarray, limit: float = 0.3) -> float:
    """Mean overlap with the regions over the false-positive rate, up to a limit, threshold by threshold."""
    regions = [
        values[labels == region]
        for values, mask in zip(maps, masks, strict=True)
        for labels, count in [ndimage.label(mask, np.ones((3, 3)))]
        for region in range(1, count + 1)
    ]
    normal = np.sort(maps[~masks])
    thresholds = np.r_[np.inf, np.unique(maps)[::-1]]
    rates = 1 - np.searchsorted(normal, thresholds) / len(normal)
    overlaps = np.mean([1 - np.searchsorted(np.sort(values), thresholds) / len(values) for values in regions], axis=0)
    inside = rates <= limit
    x, y = np.r_[rates[inside], limit], np.r_[overlaps[inside], np.interp(limit, rates, overlaps)]
    return float(integrate.trapezoid(y, x) / limit)


@pytest.mark.parametrize(("scale", "offset"), [(1.0, 0.0), (500.0, 40.0), (3.0, -1.0)])
def test_metrics_are_those_of_the_raw_maps(scale: float, offset: float) -> None:
    data = batches()
    measured = quality(Detector(Brightness(scale, offset)).eval(), data)
    assert list(measured) == ["final"]
    maps = torch.cat([batch.image[:, 0] for batch in data]).numpy()
    masks = torch.cat([batch.gt_mask for batch in data]).numpy().astype(bool)
    labels = torch.cat([batch.gt_label for batch in data]).numpy()
    expected = {
        "pixel AUROC": roc_auc_score(masks.ravel(), maps.ravel()),
        "pixel AP": average_precision_score(masks.ravel(), maps.ravel()),
        "AUPRO": aupro(maps, masks),
        "image AUROC": roc_auc_score(labels, maps.mean((1, 2))),
    }
    assert 0.6 < expected["pixel AUROC"] < 0.95
    assert measured["final"] == pytest.approx(expected, abs=2e-4)


def test_images_without_masks_are_measured_as_images() -> None:
    data = batches()
    for batch in data:
        batch.gt_mask = None
    measured = quality(Detector(Brightness()).eval(), data)["final"]
    assert measured["image AUROC"] is not None
    assert [measured[name] for name in ("pixel AUROC", "pixel AP", "AUPRO")] == [None, None, None]


def test_masks_are_resized_with_the_images() -> None:
    detector = Detector(Brightness()).eval()
    detector.pre_processor = PreProcessor(transform=Resize((SIDE // 2, SIDE // 2), antialias=False, interpolation=0))
    data = batches()
    measured = quality(detector, data)["final"]
    small = [detector.pre_processor.transform(batch.image, batch.gt_mask) for batch in data]
    maps = torch.cat([image[:, 0] for image, _ in small])
    masks = torch.cat([mask for _, mask in small])
    assert maps.shape == masks.shape == (6, SIDE // 2, SIDE // 2)
    assert measured["pixel AUROC"] == pytest.approx(roc_auc_score(masks.flatten().int(), maps.flatten()), abs=1e-5)


def test_stages_of_ours_are_measured_apart() -> None:
    model = TwoStageSuperpixel(variant="small", segment_size=8).eval()
    model.pre_processor = None
    model.model.start_stage_two()
    data = batches()
    measured = quality(model, data)
    assert list(measured) == ["stage one", "superpixel mean", "without stage two", "not smoothed", "final"]
    masks = torch.cat([batch.gt_mask for batch in data]).flatten().int()
    labels = torch.cat([batch.gt_label for batch in data]).int()
    with torch.no_grad():
        stages = [model.model.stages(batch.image) for batch in data]
    for name, attribute in [
        ("stage one", lambda maps: maps.stage_one_map),
        ("superpixel mean", lambda maps: maps.pooled_map),
        ("without stage two", lambda maps: (maps.stage_one_map + maps.pooled_map) / 2),
        ("not smoothed", lambda maps: maps.fused_map),
        ("final", lambda maps: maps.anomaly_map),
    ]:
        maps = torch.cat([attribute(stage) for stage in stages])
        if name in (
            "stage one",
            "superpixel mean",
            "without stage two",
        ):  # smoothed like the final map, so that the rows differ by the method's parts alone
            maps = model.model.smooth(maps)
        assert measured[name]["pixel AUROC"] == pytest.approx(roc_auc_score(masks, maps.flatten()), abs=1e-5)
        assert measured[name]["image AUROC"] == pytest.approx(roc_auc_score(labels, model.model.score(maps)), abs=1e-5)


def test_cost_counts_one_image() -> None:
    cost = cost_of_inference(Detector(Brightness()).eval(), torch.rand(4, 3, 32, 24))
    assert cost["parameters"] == 5 * 3 * 9 + 5
    assert cost["GFLOPs"] == pytest.approx(2 * 5 * 3 * 9 * 32 * 24 / 1e9, abs=1e-4)
    assert cost["inference batch"] == 4
