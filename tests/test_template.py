# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
import torch

from anomalib_twostage import GoldenTemplate


def fitted(count: int = 12, size: tuple[int, int] = (9, 7)) -> tuple[GoldenTemplate, torch.Tensor]:
    torch.manual_seed(0)
    images = torch.rand(count, 3, *size)
    template = GoldenTemplate()
    template.fit(images)
    return template, images


def test_statistics_are_those_of_numpy() -> None:
    template, images = fitted()
    assert np.allclose(template.mean, images.numpy().mean(axis=0, dtype=np.float64), atol=1e-6)
    assert np.allclose(template.spread, images.numpy().std(axis=0, dtype=np.float64), atol=1e-6)


def test_many_almost_equal_bright_images_keep_their_small_spread() -> None:
    values = 0.9 + 1e-3 * np.random.default_rng(0).standard_normal((400, 1, 4, 4))
    template = GoldenTemplate(channels=1)
    template.fit(torch.from_numpy(values).float())
    assert np.allclose(template.spread, values.std(axis=0), rtol=1e-3)


def test_the_mean_of_the_good_images_does_not_deviate() -> None:
    template, images = fitted()
    assert template(images.mean(dim=0, keepdim=True)).abs().max() < 1e-5


def test_deviation_has_the_sign_and_grows_with_the_distance_and_shrinks_with_the_spread() -> None:
    template, _ = fitted()
    brighter = [template((template.mean + distance).unsqueeze(0)) for distance in (0.05, 0.1)]
    assert (brighter[0] > 0).all()
    assert torch.allclose(brighter[1], 2 * brighter[0], rtol=1e-4)
    assert (template((template.mean - 0.05).unsqueeze(0)) < 0).all()
    wide, narrow = template.spread.argmax(), template.spread.argmin()
    assert brighter[0].flatten()[wide] < brighter[0].flatten()[narrow]


def test_far_is_far_and_finite() -> None:
    template = GoldenTemplate()
    template.fit(torch.zeros(2, 3, 4, 4))
    assert torch.equal(template(torch.ones(1, 3, 4, 4)), torch.full((1, 3, 4, 4), 3.0))


def test_a_broken_pixel_stays_one() -> None:
    template, images = fitted()
    images[0, 1, 2, 3] = torch.nan
    found = template(images).isnan()
    assert found[0, 1, 2, 3]
    assert found.sum() == 1


def test_images_of_another_size_are_compared_with_the_scaled_template() -> None:
    rows = torch.linspace(0, 1, 8).view(1, 1, 8, 1).expand(5, 3, 8, 8)
    template = GoldenTemplate()
    template.fit(rows)
    larger = torch.nn.functional.interpolate(rows[:1], size=(16, 24), mode="bilinear")
    assert template(larger).abs().max() < 1e-4


def test_good_images_of_other_sizes_are_scaled_to_the_first() -> None:
    image = torch.rand(3, 4, 4)
    template = GoldenTemplate()
    template.fit([image, torch.nn.functional.interpolate(image[None], size=(8, 8), mode="nearest")[0]])
    assert template.mean.shape == (3, 4, 4)


def test_a_fresh_template_takes_size_and_values_of_a_state() -> None:
    template, images = fitted()
    fresh = GoldenTemplate()
    fresh.load_state_dict(template.state_dict())
    assert torch.equal(fresh(images), template(images))


def test_a_state_with_other_channels_is_refused() -> None:
    with pytest.raises(RuntimeError, match="size mismatch"):
        GoldenTemplate(channels=1).load_state_dict(fitted()[0].state_dict())


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([], "at least one good image"),
        ([torch.rand(1, 4, 4)], r"3 channels.*\(1, 4, 4\)"),
        ([torch.rand(2, 3, 4, 4)], r"\(2, 3, 4, 4\)"),
    ],
)
def test_wrong_images_are_named(images: list[torch.Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GoldenTemplate().fit(images)


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (torch.rand(2, 1, 8, 8), ValueError, r"\(B, 3, H, W\).*\(2, 1, 8, 8\)"),
        (torch.rand(3, 8, 8), ValueError, r"\(B, 3, H, W\).*\(3, 8, 8\)"),
        (np.zeros((1, 3, 8, 8)), TypeError, "ndarray"),
    ],
)
def test_wrong_input_is_named(images: torch.Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        GoldenTemplate()(images)
