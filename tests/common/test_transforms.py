# SPDX-License-Identifier: Apache-2.0
import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn
from torchvision import transforms as v1
from torchvision.transforms import v2

from anomalib_twostage import PerlinAnomaly, PseudoAnomaly
from anomalib_twostage.common.transforms import find_transforms, fixed_part

PAINTER = PerlinAnomaly(probability=1.0)
CROP = v2.CenterCrop(20)


class Holder(nn.Module):
    """A transform of one's own that holds another."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = PAINTER


class Roi(nn.Module):
    """A fixed crop of one's own."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return image[..., 3:13, 5:25]


class CoinOfNumpy(v2.Transform):
    def transform(self, image: torch.Tensor, params: dict) -> torch.Tensor:
        return image * (0.5 if np.random.rand() < 0.5 else 1.0)  # noqa: NPY002


class CoinOfPython(v2.Transform):
    def transform(self, image: torch.Tensor, params: dict) -> torch.Tensor:
        return image * (0.5 if random.random() < 0.5 else 1.0)


@pytest.mark.parametrize(
    "container",
    [
        PAINTER,
        v2.Compose([PAINTER]),
        v2.Compose([v2.Compose([CROP, PAINTER])]),
        v2.RandomApply([PAINTER], p=0.3),
        v2.RandomApply(nn.ModuleList([PAINTER])),
        v2.RandomChoice([CROP, v2.Compose([PAINTER])]),
        v2.RandomOrder([CROP, PAINTER]),
        v1.Compose([CROP, v1.RandomApply([PAINTER])]),
        nn.Sequential(CROP, PAINTER),
        v2.Lambda(PAINTER),
        Holder(),
    ],
    ids=lambda container: type(container).__name__,
)
def test_transforms_are_found_wherever_they_can_be_put(container: object) -> None:
    assert find_transforms(container, PerlinAnomaly) == [PAINTER]
    assert find_transforms(container, PseudoAnomaly) == []


@pytest.mark.parametrize(
    ("transform", "expected"),
    [
        (None, None),
        (CROP, (CROP,)),
        (v2.RandomHorizontalFlip(0.5), None),
        (v2.RandomHorizontalFlip(1.0), "all"),
        (v2.RandomAutocontrast(0.5), None),
        (v2.GaussianBlur(3, sigma=1.0), "all"),
        (v2.GaussianBlur(3, sigma=(0.1, 2.0)), None),
        (v2.ColorJitter(brightness=0.2), None),
        (v2.RandomCrop(20), None),
        (v2.Compose([v2.RandomRotation(9), CROP, v2.ColorJitter(0.1)]), (CROP,)),
        (v2.Compose([v2.Compose([v2.Grayscale(3)]), v2.RandomApply([CROP], p=0.5)]), (v2.Grayscale,)),
        (v2.RandomApply([CROP, v2.ColorJitter(0.1)], p=1.0), (CROP,)),
        (v2.RandomOrder([CROP, v2.ColorJitter(0.1)]), (CROP,)),
        (v2.RandomChoice([CROP, v2.CenterCrop(10)]), None),
        (v1.Compose([v1.CenterCrop(20)]), (v1.CenterCrop,)),
        (nn.Sequential(CROP, PAINTER), (CROP,)),
        (Roi(), "all"),
        (v2.Compose([Roi(), CoinOfNumpy(), CoinOfPython()]), (Roi,)),
    ],
)
def test_what_happens_to_every_image_alike_is_kept(transform: Callable, expected: object) -> None:
    image = torch.rand(3, 40, 30)
    kept = fixed_part(transform, image, without=PerlinAnomaly)
    if expected is None:
        assert kept is None
    elif expected == "all":
        assert kept.transforms == [transform]
    else:
        assert len(kept.transforms) == len(expected)
        assert all(part is like or type(part) is like for part, like in zip(kept.transforms, expected, strict=True))


def test_looking_draws_no_random_numbers() -> None:
    torch.manual_seed(5), random.seed(5), np.random.seed(5)  # noqa: NPY002
    fixed_part(v2.Compose([v2.RandomRotation(9), CoinOfNumpy(), CoinOfPython()]), torch.rand(3, 40, 30))
    drawn = torch.rand(()).item(), random.random(), np.random.rand()  # noqa: NPY002
    torch.manual_seed(5), random.seed(5), np.random.seed(5)  # noqa: NPY002
    torch.rand(3, 40, 30)
    assert drawn == (torch.rand(()).item(), random.random(), np.random.rand())  # noqa: NPY002
