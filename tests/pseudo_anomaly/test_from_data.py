# SPDX-License-Identifier: Apache-2.0
"""Painters in a data set's transforms stand aside while the model paints in their place."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import ConcatDataset, Dataset, Subset
from torchvision import transforms as v1
from torchvision.transforms import v2

from anomalib_twostage import PerlinAnomaly, SuperpixelAnomaly
from anomalib_twostage.common.transforms import find_transforms
from anomalib_twostage.pseudo_anomaly import DataPainter, PseudoAnomalyTransform, paints

SIZE = 32
IMAGES = torch.rand(40, 3, SIZE, SIZE)


class Images(Dataset):
    """Images with transforms, as anomalib's data sets have them."""

    def __init__(self, augmentations: Any, masks: bool) -> None:
        self.augmentations = augmentations
        self.masks = masks

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Any:
        if self.masks:
            return self.augmentations(IMAGES[index], torch.zeros(SIZE, SIZE))
        return self.augmentations(IMAGES[index])


class Own(nn.Module):
    """A transform of one's own that paints some images."""

    def __init__(self) -> None:
        super().__init__()
        self.painter = PerlinAnomaly()


def perlin(probability: float = 1.0) -> PerlinAnomaly:
    return PerlinAnomaly(probability=probability)


@pytest.mark.parametrize("masks", [True, False])
@pytest.mark.parametrize(
    "wrap",
    [lambda data: data, lambda data: Subset(data, [2, 0]), lambda data: ConcatDataset([data, Subset(data, [1])])],
)
def test_a_data_set_does_not_paint_until_its_painters_are_given_back(wrap: Callable, masks: bool) -> None:
    augmentations = v2.Compose([v2.RandomApply([perlin()], p=1.0), v2.CenterCrop(16)])
    inner = Images(augmentations, masks)
    data = wrap(inner)
    assert paints(data)
    taken = DataPainter(data)
    assert not paints(data)
    item = data[0]
    clean = IMAGES[2 if isinstance(data, Subset) else 0][..., 8:24, 8:24]
    assert torch.equal(item[0] if masks else item, clean)
    taken.give_back()
    assert inner.augmentations is augmentations
    assert paints(data)


def test_after_a_run_that_failed_the_painters_are_found_again() -> None:
    data = Images(v2.Compose([perlin(0.3)]), masks=False)
    DataPainter(data)  # and never given back
    taken = DataPainter(data)
    assert type(taken.painter) is PerlinAnomaly
    assert taken.painter.probability == 0.3
    taken.give_back()
    assert paints(data)


def test_a_data_set_without_painters_is_left_alone() -> None:
    for augmentations in (None, v2.CenterCrop(16)):
        data = Images(augmentations, masks=False)
        taken = DataPainter(data)
        assert taken.painter is None
        assert data.augmentations is augmentations
    assert DataPainter(None).painter is None


@pytest.mark.parametrize(
    "data",
    [
        Images(Own(), masks=True),
        ConcatDataset([Images(perlin(), masks=True), Images(SuperpixelAnomaly(), masks=True)]),
    ],
    ids=["a transform of one's own", "different parts"],
)
def test_painters_that_only_the_data_set_can_apply_stay_there(data: Dataset) -> None:
    assert DataPainter(data).painter is None
    assert paints(data)


@pytest.mark.parametrize(
    "augmentations",
    [perlin(0.4), v2.Compose([v2.CenterCrop(16), perlin(0.4)]), nn.Sequential(v2.RandomOrder([perlin(0.4)]))],
)
def test_a_painter_for_all_images_is_taken_as_it_is(augmentations: Any) -> None:
    painter = DataPainter(Images(augmentations, masks=True)).painter
    assert type(painter) is PerlinAnomaly
    assert painter.probability == 0.4


@pytest.mark.parametrize(
    ("augmentations", "share"),
    [
        (v2.RandomApply([perlin()], p=0.3), 0.3),
        (v2.Compose([v2.RandomApply([v2.Identity(), perlin(0.5)], p=0.6), v2.CenterCrop(16)]), 0.3),
        (v2.RandomChoice([perlin(), v2.Identity()], p=[1.0, 3.0]), 0.25),
        (v2.RandomChoice([perlin(), v2.RandomApply([perlin()], p=0.5)]), 0.75),
        (v1.RandomChoice([perlin(), v2.Identity()]), 0.5),
        (v1.RandomApply(nn.ModuleList([perlin()]), p=0.3), 0.3),
        (v2.Compose([perlin(0.5), perlin(0.5)]), 0.75),
    ],
)
def test_as_many_images_of_a_batch_are_painted_as_the_data_set_would_paint(augmentations: Any, share: float) -> None:
    painter = DataPainter(Images(augmentations, masks=True)).painter
    images = IMAGES[:10].repeat(20, 1, 1, 1)
    painted, masks = painter(images)
    # Noise images are painted nearly always, where a painter is asked to; 4 standard deviations at worst.
    assert masks.amax(dim=(1, 2, 3)).mean().item() == pytest.approx(share, abs=0.15)
    assert masks.shape == (200, 1, SIZE, SIZE)
    assert torch.equal((painted != images).any(dim=1, keepdim=True), masks.bool())


@pytest.mark.parametrize(
    ("augmentations", "count"),
    [
        (v2.RandomApply([perlin()], p=0.5), 1),
        (v2.Compose([perlin(), v2.RandomChoice([perlin(), SuperpixelAnomaly()])]), 3),
        (v1.Compose([perlin(), SuperpixelAnomaly()]), 2),
        (nn.Sequential(perlin(), v2.RandomOrder([perlin()])), 2),
    ],
)
def test_the_photographs_of_every_painter_move_with_the_model(
    augmentations: Any, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    painting = set()

    def forward(self: PseudoAnomalyTransform, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        painting.add((id(self), self.textures.device.type))
        return inputs

    monkeypatch.setattr(PseudoAnomalyTransform, "forward", forward)
    model = nn.Module()
    model.painter = DataPainter(Images(augmentations, masks=True)).painter
    model.to("meta").painter(IMAGES)
    assert [device for _, device in painting] == ["meta"] * count
    # Once each, and not in checkpoints.
    assert len(list(model.buffers())) == count
    assert len(find_transforms(model.painter, PseudoAnomalyTransform)) == count
    assert model.state_dict() == {}
