# SPDX-License-Identifier: Apache-2.0
import io

import numpy as np
import pytest
import torch

from anomalib_twostage import GoldenTemplate


def fitted(
    count: int = 12, size: tuple[int, int] = (9, 7), num_neighbors: int = 0
) -> tuple[GoldenTemplate, torch.Tensor]:
    """Kinds of images, alike within each."""
    torch.manual_seed(0)
    kinds = torch.rand(max(1, count // 5), 3, *size).repeat(5, 1, 1, 1)[:count]
    images = (0.8 * kinds + 0.2 * torch.rand(len(kinds), 3, *size)).mul(255).round() / 255
    template = GoldenTemplate(num_neighbors=num_neighbors)
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
    template = GoldenTemplate(num_neighbors=0)
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
    template = GoldenTemplate(num_neighbors=0)
    template.fit(rows)
    larger = torch.nn.functional.interpolate(rows[:1], size=(16, 24), mode="bilinear")
    assert template(larger).abs().max() < 1e-4


def test_good_images_of_other_sizes_are_scaled_to_the_first() -> None:
    image = torch.rand(3, 4, 4)
    template = GoldenTemplate()
    template.fit([image, torch.nn.functional.interpolate(image[None], size=(8, 8), mode="nearest")[0]])
    assert template.mean.shape == (3, 4, 4)


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


def poses(count: int = 24, size: int = 40) -> torch.Tensor:
    """One bar at as many angles, on black: ``(count, 3, size, size)``."""
    y, x = torch.meshgrid(*[torch.linspace(-1, 1, size)] * 2, indexing="ij")
    angles = torch.arange(count).view(-1, 1, 1) * torch.pi / count
    across, along = x * angles.sin() - y * angles.cos(), x * angles.cos() + y * angles.sin()
    bars = ((across.abs() < 0.15) & (along.abs() < 0.9)).float() * 0.6
    return bars.unsqueeze(1).repeat(1, 3, 1, 1)


def nearest_by_numpy(image: np.ndarray, gallery: np.ndarray, count: int, first: int = 0) -> np.ndarray:
    """Deviation ``(C, H, W)`` of an image from the nearest of a gallery, as documented, for small images."""

    def key(one: np.ndarray) -> np.ndarray:
        return one - one.mean(axis=(1, 2), keepdims=True)

    distances = [np.square(key(image) - key(other)).sum() for other in gallery]
    found = gallery[np.argsort(distances)[first : first + count]]
    difference = key(image - found.mean(axis=0))
    return np.clip(0.3 * difference / (found.std(axis=0) + 0.1), -3, 3)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("num_neighbors", [1, 3])
def test_the_second_deviation_is_from_the_nearest_good_images(num_neighbors: int, training: bool) -> None:
    template, gallery = fitted(20, (32, 32), num_neighbors)
    template.train(training)
    # Of the gallery itself and near it; keys are of 32 x 32 pixels, so here they are the images.
    images = (gallery[:4] + 0.1 * torch.randn(4, 3, 32, 32)).clamp(0, 1)
    found = template(images)
    for number, image in enumerate(images.numpy()):
        expected = nearest_by_numpy(image, gallery.numpy(), num_neighbors, first=int(training))
        np.testing.assert_allclose(found[number, 3:], expected, atol=1e-4)


def test_the_first_deviation_does_not_depend_on_neighbors() -> None:
    alone, images = fitted(20, (32, 32), num_neighbors=0)
    both, _ = fitted(20, (32, 32), num_neighbors=4)
    assert torch.equal(both(images)[:, :3], alone(images))
    assert (alone.out_channels, both.out_channels) == (3, 6)


def test_a_part_at_any_angle_deviates_where_it_is_broken_only() -> None:
    template = GoldenTemplate(num_neighbors=2).eval()
    template.fit(poses(48)[::2])
    image = poses(48)[13:14].clone()  # an angle between two of the template's
    image[..., 18:22, 18:22] = 0.0
    from_nearest = template(image)[0, 3:].abs().amax(dim=0)
    broken = torch.zeros(40, 40, dtype=torch.bool)
    broken[18:22, 18:22] = True
    assert from_nearest[broken].min() > 1.0
    assert (from_nearest[~broken] > 1.0).float().mean() < 0.02  # the outline, between the angles


def test_light_neither_chooses_nor_deviates() -> None:
    template = GoldenTemplate(num_neighbors=3).eval()
    template.fit(poses())
    image = poses()[5:6]
    dark, bright = template(image)[:, 3:], template(image + 0.3)[:, 3:]
    torch.testing.assert_close(dark, bright, atol=1e-5, rtol=0)


def test_in_training_an_image_does_not_find_itself() -> None:
    template = GoldenTemplate(num_neighbors=1)
    template.fit(poses())
    assert template.eval()(poses())[:, 3:].abs().max() < 0.01
    assert (template.train()(poses())[:, 3:].abs().amax(dim=(1, 2, 3)) > 0.1).all()


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("count", [1, 2, 5, 6])
def test_with_few_good_images_there_are_no_nearest(count: int, training: bool) -> None:
    template = GoldenTemplate(num_neighbors=4).train(training)
    images = poses(24)[:count]
    template.fit(images)
    found = template(images)
    assert found.isfinite().all()
    assert bool(found[:, 3:].any()) == (count > 5)


def test_where_nothing_is_alike_there_are_no_nearest() -> None:
    template = GoldenTemplate()
    texture = torch.rand(30, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    template.fit(texture)
    assert len(template.gallery) == len(template.keys) == 0
    file = io.BytesIO()
    torch.save(template.state_dict(), file)
    assert file.tell() < 2 * (template.mean.nbytes + template.spread.nbytes)
    found = template.eval()(texture)
    assert found[:, :3].any()
    assert not found[:, 3:].any()


def test_the_gallery_is_small_and_deviations_are_of_the_images_size() -> None:
    template = GoldenTemplate().eval()
    template.fit(torch.nn.functional.interpolate(poses(), size=(160, 320)))
    assert template.gallery.shape == (24, 3, 64, 128)
    assert template.gallery.dtype == torch.uint8
    assert template(torch.rand(2, 3, 160, 320)).shape == (2, 6, 160, 320)


def test_mixed_precision_finds_the_same_neighbors() -> None:
    template = GoldenTemplate().eval()
    template.fit(poses())
    images = poses(48)[1::2]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = template(images)
    assert torch.equal(found, template(images))


@pytest.mark.parametrize("num_neighbors", [0, 4])
def test_a_fresh_template_takes_sizes_and_values_of_a_state(num_neighbors: int) -> None:
    template, images = fitted(20, (32, 24), num_neighbors)
    fresh = GoldenTemplate(num_neighbors=num_neighbors)
    fresh.load_state_dict(template.state_dict())
    assert torch.equal(fresh.eval()(images), template.eval()(images))


def test_a_negative_number_of_neighbors_is_refused() -> None:
    with pytest.raises(ValueError, match=r"num_neighbors.*-1"):
        GoldenTemplate(num_neighbors=-1)
