# SPDX-License-Identifier: Apache-2.0
"""Areas under the curves of maps with too many pixels to keep: 200 of 768 x 512 take anomalib's metrics 9 GB.

Pixels are counted in 65,536 bins, so the areas are those of as many thresholds. A test compares them with anomalib's.
"""

import torch
from scipy import ndimage
from torchmetrics.functional.classification import binary_auroc

_BINS = 65536
_LIMIT = 0.3  # of the false-positive rate, as anomalib's AUPRO


class BinnedCurves:
    """Pixel AUROC, pixel AP, AUPRO and image AUROC of maps in [0, 1], batch by batch."""

    def __init__(self) -> None:
        self._defective, self._normal, self._overlap = torch.zeros(3, _BINS, dtype=torch.float64)
        self._regions = 0
        self._scores: list[float] = []
        self._labels: list[bool] = []

    def add(self, maps: torch.Tensor, masks: torch.Tensor, scores: torch.Tensor) -> None:
        """Add maps ``(B, H, W)`` in [0, 1], their masks ``(B, H, W)`` and the images' scores ``(B,)``."""
        for anomaly_map, mask, score in zip(maps, masks, scores, strict=True):
            self._add(anomaly_map, mask.bool(), float(score))

    def _add(self, anomaly_map: torch.Tensor, mask: torch.Tensor, score: float) -> None:
        bins = (anomaly_map.double().sqrt() * (_BINS - 1)).round().long()  # the root: low values are many
        self._normal += torch.bincount(bins[~mask], minlength=_BINS)
        self._scores.append(score)
        self._labels.append(bool(mask.any()))
        regions, count = ndimage.label(mask.numpy(), structure=torch.ones(3, 3).numpy())
        for region in range(1, count + 1):
            inside = torch.bincount(bins[torch.from_numpy(regions == region)], minlength=_BINS)
            self._defective += inside
            self._overlap += inside / inside.sum()
        self._regions += count

    def compute(self) -> dict[str, float]:
        """The areas, by the names of the columns of a table of results."""
        hits, alarms, overlap = (each.flip(0).cumsum(0) for each in (self._defective, self._normal, self._overlap))
        rate, recall = alarms / alarms[-1], hits / hits[-1]
        precision = hits / (hits + alarms).clamp_min(1)
        steps = torch.diff(recall, prepend=torch.zeros(1, dtype=torch.float64))
        start = torch.zeros(1, dtype=torch.float64)
        rate, recall, overlap = (torch.cat([start, each]) for each in (rate, recall, overlap / self._regions))
        last = int((rate <= _LIMIT).sum()) - 1
        share = (_LIMIT - rate[last]) / (rate[last + 1] - rate[last])
        end = overlap[last] + share * (overlap[last + 1] - overlap[last])
        within = (
            torch.trapezoid(overlap[: last + 1], rate[: last + 1]) + (_LIMIT - rate[last]) * (end + overlap[last]) / 2
        )
        return {
            "pixel AUROC": float(torch.trapezoid(recall, rate)),
            "pixel AP": float((precision * steps).sum()),
            "AUPRO": float(within / _LIMIT),
            "image AUROC": float(binary_auroc(torch.tensor(self._scores), torch.tensor(self._labels))),
        }
