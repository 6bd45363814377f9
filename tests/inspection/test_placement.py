# SPDX-License-Identifier: Apache-2.0
"""Against coordinates that go through the transforms as pixels of an image."""

from typing import Any

import pytest
import torch
from torch import nn
from torchvision import transforms as v1
from torchvision.transforms import v2

from anomalib_twostage.inspection.placement import find_placement

FILE = (120, 200)


def coordinates() -> torch.Tensor:
    """An image that says of each of its pixels where its middle is: ``(3, H, W)``, row and twice column."""
    rows, columns = torch.arange(FILE[0]) + 0.5, torch.arange(FILE[1]) + 0.5
    return torch.stack(torch.meshgrid(rows, columns, indexing="ij"))[[0, 1, 1]]


@pytest.mark.parametrize(
    "transforms",
    [
        [None],
        [v2.Resize((30, 40))],
        [v2.Resize(60), None, v2.Resize((60, 60))],
        [v2.CenterCrop((50, 90)), v2.Resize((100, 45))],
        [v2.CenterCrop((11, 17))],
        [v2.Compose([v2.Compose([v2.Resize((60, 90))]), v2.CenterCrop(40)]), v2.Resize((80, 80))],
        [v2.RandomHorizontalFlip(1.0), v2.CenterCrop((50, 90))],
        [v2.RandomVerticalFlip(1.0), v2.Resize((30, 40))],
        [v2.Compose([v2.ToDtype(torch.float32), v2.RandomHorizontalFlip(0.0)]), v2.Resize((30, 40))],
        [v2.RandomApply([v2.CenterCrop((50, 90))], p=1.0)],
    ],
)
def test_a_placement_leads_to_where_each_pixel_comes_from(transforms: list[Any]) -> None:
    geometry = [v2.Identity() if transform is None else transform for transform in transforms]
    image = coordinates().expand(1, -1, -1, -1)
    for transform in geometry:
        image = transform(image)
    rows, columns, _ = image[0]
    height, width = rows.shape
    placement = find_placement(transforms, FILE, (height, width))
    # Off the border, where antialiasing sees one side only; it weighs whole pixels, and so is not exact elsewhere.
    near = 0.1 * max(abs(placement.row_height), abs(placement.column_width))
    for index in range(height // 4, 3 * height // 4):
        assert placement.top + (index + 0.5) * placement.row_height == pytest.approx(rows[index, 0].item(), abs=near)
    for index in range(width // 4, 3 * width // 4):
        expected = columns[0, index].item()
        assert placement.left + (index + 0.5) * placement.column_width == pytest.approx(expected, abs=near)


def test_a_map_of_another_size_is_stretched_over_the_image() -> None:
    placement = find_placement([v2.CenterCrop((60, 100))], FILE, (30, 25))
    assert placement == pytest.approx((30.0, 50.0, 2.0, 4.0))
    assert placement.to_file((0, 0, 25, 30), FILE) == (50, 30, 150, 90)
    assert placement.to_file((1, 2, 3, 4), FILE) == (54, 34, 62, 38)


def test_padding_is_no_part_of_the_file() -> None:
    placement = find_placement([v2.Pad(20)], FILE, (160, 240))
    assert placement.to_file((10, 10, 30, 30), FILE) == (0, 0, 10, 10)
    assert placement.to_file((0, 0, 20, 10), FILE) is None


@pytest.mark.parametrize(
    "transform",
    [
        v2.RandomCrop(60),
        v2.RandomHorizontalFlip(),
        v2.RandomRotation((90, 90), expand=True),
        v2.RandomAffine(20),
        v2.Lambda(lambda image: image[..., 5:, 5:]),
        nn.Sequential(nn.ZeroPad2d(3)),
        v1.CenterCrop(30),
        v2.CenterCrop(2),  # too little is left to tell
    ],
    ids=lambda transform: type(transform).__name__,
)
def test_what_the_transforms_do_not_say_is_unknown(transform: Any) -> None:
    assert find_placement([transform], FILE, (30, 40)) is None
