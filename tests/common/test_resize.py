# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from torchvision.transforms.v2 import InterpolationMode, Resize

from anomalib_twostage.common.resize import AntialiasedResize


@pytest.mark.parametrize("old", [(300, 200), (129, 64), (64, 63), (50, 61), (2, 700)])
@pytest.mark.parametrize("new", [(64, 64), (97, 31)])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_resizes_like_torchvision(interpolation: str, old: tuple[int, int], new: tuple[int, int]) -> None:
    images = torch.rand(2, 3, *old)
    expected = Resize(list(new), InterpolationMode(interpolation), antialias=True)(images)
    torch.testing.assert_close(AntialiasedResize(new, interpolation)(images), expected, atol=2e-6, rtol=0)


def test_the_right_size_passes_untouched() -> None:
    images = torch.rand(2, 3, 40, 30)
    assert AntialiasedResize((40, 30))(images) is images
