# SPDX-License-Identifier: Apache-2.0
"""Painters among the transforms of a data set: the model takes them over, so that there is one way to train.

A data set paints images one at a time, before they are resized and without a change of light, and without masks of its
own it has no place for the painter's. So while the model trains, its data set's painters stand aside, and the model
paints with them: resized images in varied light, a batch at a time.
"""

import copy
from typing import Any

import torch
from torch import nn
from torchvision.transforms import v2

from anomalib_twostage.common.datasets import transforms_of
from anomalib_twostage.common.transforms import EACH_IS_APPLIED, RANDOM_APPLY, RANDOM_CHOICE, find_transforms, parts

from .painters import PseudoAnomalyTransform
from .random import to_device

__all__ = ["BatchPainter", "DataPainter", "paints"]

_CONTAINERS = (*RANDOM_APPLY, *RANDOM_CHOICE, *EACH_IS_APPLIED)


class DataPainter:
    """Takes the painters of a data set over, until they are given back.

    Painters inside transforms that are not torchvision's containers stay where they are, and so do those of wrapped
    data sets that paint differently.

    Args:
        dataset: Training data, also wrapped in others.

    Attributes:
        painter: A copy of the data set's painter; of several, or one in a container that chooses, what paints batches
            alike. ``None`` if none is taken over.
    """

    def __init__(self, dataset: Any) -> None:
        self.painter: nn.Module | None = None
        self._replaced: list[tuple[Any, str, Any]] = []
        places = [(holder, name, getattr(holder, name)) for holder, name in transforms_of(dataset)]
        places = [place for place in places if _painters(place[2])]
        if not places or any(place[2] is not places[0][2] for place in places) or not _is_known(places[0][2]):
            return
        transform = _brought_back(places[0][2])
        painters = _painters(transform)
        aside = copy.deepcopy(transform, {id(painter): _Aside(painter) for painter in painters})
        for holder, name, _ in places:
            self._replaced.append((holder, name, transform))
            setattr(holder, name, aside)
        # A copy may move to the training device while the workers that read images keep the original.
        self.painter = copy.deepcopy(_only_painter(transform) or BatchPainter(transform))

    def give_back(self) -> None:
        """Let the data set paint again."""
        for holder, name, transform in self._replaced:
            setattr(holder, name, transform)
        self._replaced = []


def paints(dataset: Any) -> bool:
    """Whether a data set, also a wrapped one, has painters among its transforms that have not been taken over."""
    return any(_paints(getattr(holder, name)) for holder, name in transforms_of(dataset))


class BatchPainter(nn.Module):
    """Paints a batch as the painters in torchvision's containers would paint its images one by one.

    Args:
        transform: Container of painters; other transforms in it are left out.
    """

    def __init__(self, transform: Any) -> None:
        super().__init__()
        self.transform = transform
        # torchvision's containers keep painters in a plain list, so that their photographs would not move to the device
        # with this module. By this name they are all that parts() finds in it: none twice.
        self.transforms = nn.ModuleList(_painters(transform))

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Paint images ``(B, C, H, W)``; returns them and the masks ``(B, 1, H, W)``, float32 in {0, 1}."""
        masks = torch.zeros(len(images), 1, *images.shape[-2:], device=images.device)
        return self._paint(self.transform, images, masks)

    def _paint(self, transform: Any, images: torch.Tensor, masks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if isinstance(transform, PseudoAnomalyTransform):
            return transform(images, masks)
        batch = len(images)
        inside = parts(transform)
        # What a part is applied to is drawn on the host, so that the device is never waited for.
        if isinstance(transform, RANDOM_CHOICE):
            weights = torch.tensor(transform.p or [1.0] * len(inside))
            choice = torch.multinomial(weights, batch, replacement=True)
            chosen = [(choice == index).nonzero().flatten() for index in range(len(inside))]
        elif isinstance(transform, RANDOM_APPLY):
            chosen = [(torch.rand(batch) < transform.p).nonzero().flatten()] * len(inside)
        else:
            chosen = [torch.arange(batch)] * len(inside)
        for part, places in zip(inside, chosen, strict=True):
            if len(places) > 0 and _painters(part):
                index = to_device(places, images.device)
                painted, mask = self._paint(part, images.index_select(0, index), masks.index_select(0, index))
                images, masks = images.index_copy(0, index, painted), masks.index_copy(0, index, mask)
        return images, masks


class _Aside(v2.Transform):
    """Stands in a data set's transforms where a painter stood, and does nothing."""

    def __init__(self, painter: PseudoAnomalyTransform) -> None:
        super().__init__()
        self.painter = painter

    def forward(self, *inputs: Any) -> Any:
        return inputs if len(inputs) > 1 else inputs[0]


def _paints(transform: Any) -> bool:
    if isinstance(transform, PseudoAnomalyTransform | _Aside):
        return isinstance(transform, PseudoAnomalyTransform)
    return any(_paints(part) for part in parts(transform))


def _painters(transform: Any) -> list[PseudoAnomalyTransform]:
    return find_transforms(transform, PseudoAnomalyTransform)  # of any kind


def _brought_back(transform: Any) -> Any:
    """A transform with its painters, should a run that failed have put them aside."""
    asides = find_transforms(transform, _Aside)
    return copy.deepcopy(transform, {id(aside): aside.painter for aside in asides}) if asides else transform


def _is_known(transform: Any) -> bool:
    """Whether painters are in torchvision's containers alone."""
    if isinstance(transform, PseudoAnomalyTransform | _Aside):
        return True
    inside = [part for part in parts(transform) if _painters(part)]
    return isinstance(transform, _CONTAINERS) and all(_is_known(part) for part in inside)


def _only_painter(transform: Any) -> PseudoAnomalyTransform | None:
    """The painter that paints every image, or ``None`` if there are several or it is chosen by chance."""
    if isinstance(transform, PseudoAnomalyTransform):
        return transform
    inside = [part for part in parts(transform) if _painters(part)]
    return _only_painter(inside[0]) if len(inside) == 1 and isinstance(transform, EACH_IS_APPLIED) else None
