# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from anomalib_twostage.pseudo_anomaly import vary_illumination


@pytest.fixture
def images() -> torch.Tensor:
    torch.manual_seed(0)
    return torch.full((64, 3, 48, 64), 0.5) + 0.02 * torch.randn(64, 3, 48, 64)


def test_light_changes_between_images_by_about_its_strength(images: torch.Tensor) -> None:
    lit = vary_illumination(images, strength=0.1)
    change = (lit - images).mean(dim=(1, 2, 3))
    assert 0.02 < change.std() < 0.08
    assert change.abs().max() <= 0.5 * 0.1 + 0.05 + 0.01


def test_light_changes_smoothly_within_an_image(images: torch.Tensor) -> None:
    flat = torch.full_like(images, 0.5)
    lit = vary_illumination(flat, strength=0.1)
    assert lit.std(dim=(1, 2, 3)).max() > 0.005
    steps = torch.maximum(lit.diff(dim=-1).abs().amax(dim=(1, 2, 3)), lit.diff(dim=-2).abs().amax(dim=(1, 2, 3)))
    assert steps.max() < 0.02


def test_colours_of_a_pixel_keep_their_order_and_values_stay_in_range(images: torch.Tensor) -> None:
    coloured = (images * torch.tensor([0.2, 0.5, 1.9]).view(1, 3, 1, 1)).clamp(0, 1)
    lit = vary_illumination(coloured)
    assert ((lit[:, 0] <= lit[:, 1]) & (lit[:, 1] <= lit[:, 2])).all()
    assert lit.min() >= 0
    assert lit.max() <= 1


def test_no_strength_is_no_change(images: torch.Tensor) -> None:
    clean = images.clamp(0, 1)
    torch.testing.assert_close(vary_illumination(clean, strength=0.0), clean)
