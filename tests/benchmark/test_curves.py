# SPDX-License-Identifier: Apache-2.0
from pathlib import Path

import pytest
import torch
from anomalib.data import ImageBatch
from anomalib.metrics import AUPR, AUPRO, AUROC


def test_binned_areas_are_those_of_anomalib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    from _curves import BinnedCurves

    maps, masks = torch.rand(6, 64, 80) ** 8, torch.zeros(6, 64, 80, dtype=torch.bool)
    masks[0, 5:15, 5:25] = masks[0, 30:34, 30:34] = masks[1, 20:44, 20:28] = masks[2, 60:, 70:] = True
    maps = 0.6 * maps + 0.4 * masks * torch.rand(6, 64, 80)
    scores = maps.flatten(1).amax(dim=1)
    curves = BinnedCurves()
    curves.add(maps, masks, scores)
    pixels, image = ["anomaly_map", "gt_mask"], ["pred_score", "gt_label"]
    metrics = {
        "pixel AUROC": AUROC(pixels),
        "pixel AP": AUPR(pixels),
        "AUPRO": AUPRO(pixels),
        "image AUROC": AUROC(image),
    }
    labels = masks.flatten(1).any(dim=1)
    batch = ImageBatch(
        image=torch.zeros(6, 3, 64, 80), anomaly_map=maps, gt_mask=masks, gt_label=labels, pred_score=scores
    )
    for metric in metrics.values():
        metric.update(batch)
    expected = {name: float(metric.compute()) for name, metric in metrics.items()}
    assert 0.1 < expected["pixel AP"] < 0.95
    assert curves.compute() == pytest.approx(expected, abs=1e-3)
