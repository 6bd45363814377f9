# SPDX-License-Identifier: Apache-2.0
import io

import numpy as np
import pytest
import torch
from anomalib.models.components.sampling import KCenterGreedy
from scipy.spatial.distance import cdist

from anomalib_twostage.common.spacing import evenly_spaced
from anomalib_twostage.model.memory import (
    FeatureSums,
    PatchMemory,
    PlaceStatistics,
    _halves,
    as_patches,
    farthest_first,
    first_highest,
)

CHANNELS = 6


def good_features(count: int = 9, side: int = 7) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(count, CHANNELS, side, side + 2) * torch.rand(CHANNELS, 1, 1) + torch.randn(CHANNELS, 1, 1)


def fitted(size: int = 40) -> tuple[PatchMemory, torch.Tensor, torch.Tensor]:
    """A memory, and the patches of ten images that it was chosen from, with the number of each."""
    patches = as_patches(good_features(10))
    sources = torch.arange(10).repeat_interleave(len(patches) // 10)
    memory = PatchMemory(CHANNELS, size)
    memory.fit(patches, sources)
    return memory, patches, sources


@pytest.mark.parametrize("count", [1, 40, 64, 65, 200, 2048])
def test_the_first_of_the_highest_is_found(count: int) -> None:
    torch.manual_seed(0)
    values = torch.randint(-20, 5, (3, 50, count)).float()  # many are equal
    values[:, 0, : count // 2] = -torch.inf
    values[:, 1] = -torch.inf
    assert np.array_equal(first_highest(values).numpy(), values.numpy().argmax(axis=-1))


def test_statistics_are_those_of_numpy() -> None:
    features, sums = good_features(), FeatureSums()
    for part in features.split(4):
        sums.add(part)
    statistics = PlaceStatistics(CHANNELS)
    statistics.fit(sums)
    spread = features.numpy().std(axis=(0, 2, 3))
    assert np.allclose(statistics.spread.flatten(), spread, rtol=1e-5)
    deviation = statistics.deviation(statistics.scaled(features))
    expected = (features.numpy() - features.numpy().mean(axis=0)) / spread[:, None, None]
    assert np.allclose(deviation, np.clip(expected, -3, 3), atol=1e-4)


def test_without_places_all_have_the_same_mean() -> None:
    features, sums = good_features(), FeatureSums()
    sums.add(features)
    statistics = PlaceStatistics(CHANNELS, place=False)
    statistics.fit(sums)
    mean, spread = features.numpy().mean(axis=(0, 2, 3)), features.numpy().std(axis=(0, 2, 3))
    expected = (features.numpy() - mean[:, None, None]) / spread[:, None, None]
    deviation = statistics.deviation(statistics.scaled(features))
    assert np.allclose(deviation, np.clip(expected, -3, 3), atol=1e-4)


def test_a_patch_is_a_place_and_the_mean_around_it() -> None:
    features = good_features(1)
    patches = as_patches(features).reshape(7, 9, 2 * CHANNELS)
    assert torch.equal(patches[3, 4, :CHANNELS], features[0, :, 3, 4])
    torch.testing.assert_close(patches[3, 4, CHANNELS:], features[0, :, 2:5, 3:6].mean(dim=(1, 2)))
    torch.testing.assert_close(patches[0, 0, CHANNELS:], features[0, :, :2, :2].mean(dim=(1, 2)))


def test_the_nearest_patch_is_found_and_the_distance_is_its_length() -> None:
    memory, _, _ = fitted()
    features = good_features(3) + 0.3
    found = memory(features)
    distances = cdist(as_patches(features), memory.patches) / np.sqrt(2 * CHANNELS)
    expected = distances.min(axis=1) / float(memory.scale)
    assert np.allclose(found.distance.flatten(), expected, atol=1e-4)
    nearest = memory.patches[torch.from_numpy(distances.argmin(axis=1))][:, :CHANNELS]
    difference = features - nearest.reshape(3, 7, 9, CHANNELS).permute(0, 3, 1, 2)
    torch.testing.assert_close(found.difference, difference.clamp(-3, 3))


def test_an_image_does_not_find_its_own_patches() -> None:
    memory, _, _ = fitted()
    own = good_features(10)[[4]]
    assert (memory(own).distance == 0).any()
    found = memory(own, torch.tensor([4])).distance
    others = memory.patches[memory.sources != 4]
    expected = cdist(as_patches(own), others).min(axis=1) / np.sqrt(2 * CHANNELS) / float(memory.scale)
    assert np.allclose(found.flatten(), expected, atol=1e-4)


def test_one_good_patch_of_a_thousand_exceeds_the_scale() -> None:
    memory, patches, sources = fitted()
    distances = cdist(patches, memory.patches) / np.sqrt(2 * CHANNELS)
    distances[sources[:, None] == memory.sources[None]] = np.inf
    assert float(memory.scale) == pytest.approx(np.quantile(distances.min(axis=1), 0.999), rel=0.05)


def test_patches_are_chosen_as_far_apart_as_by_anomalib() -> None:
    patches = torch.randn(600, 12, generator=torch.Generator().manual_seed(1))
    chosen = farthest_first(patches, 60)
    assert len(chosen.unique()) == 60
    radius = cdist(patches, patches[chosen]).min(axis=1).max()
    theirs = KCenterGreedy(patches, 0.1).sample_coreset()
    assert radius < 1.1 * cdist(patches, theirs).min(axis=1).max()
    assert radius < 0.9 * cdist(patches, patches[:60]).min(axis=1).max()


def test_every_point_is_chosen_where_there_are_few_and_duplicates_are_no_trouble() -> None:
    assert farthest_first(torch.rand(5, 3), 8).tolist() == [0, 1, 2, 3, 4]
    chosen = farthest_first(torch.ones(50, 3), 8)
    assert len(chosen.unique()) == 8


def test_a_rare_patch_of_a_hundred_and_fifty_thousand_is_kept() -> None:
    patches = torch.zeros(150_000, 2)
    patches[3::5] = 9.0
    rare = 77_776
    patches[rare] = torch.tensor([-50.0, 30.0])
    assert rare not in evenly_spaced(len(patches), 60_000)
    memory = PatchMemory(channels=1, size=3)
    memory.fit(patches, torch.arange(len(patches)) % 7)
    assert (memory.patches == patches[rare]).all(dim=1).any()


def test_many_dimensions_are_chosen_alike_every_time() -> None:
    points = torch.rand(300, 200)
    torch.manual_seed(1)
    first = farthest_first(points, 20)
    torch.manual_seed(2)
    assert torch.equal(first, farthest_first(points, 20))


def test_a_single_image_finds_itself_for_want_of_others() -> None:
    patches = as_patches(good_features(1))
    memory = PatchMemory(CHANNELS, 40)
    memory.fit(patches, torch.full((len(patches),), 3))
    found = memory(good_features(1), torch.tensor([3]))
    assert found.distance.isfinite().all()
    assert found.distance.mean() < 1


@pytest.mark.parametrize("sources", [[3, 3, 3], [1, 2, 3]], ids=["one image", "three copies"])
def test_without_two_images_that_differ_the_unit_is_the_features_spread(sources: list[int]) -> None:
    patches = as_patches(good_features(1))
    memory = PatchMemory(CHANNELS, 4 * len(patches))
    measured = memory.fit(patches.repeat(3, 1), torch.tensor(sources).repeat_interleave(len(patches)))
    assert not measured
    assert float(memory.scale) == 1
    expected = cdist(as_patches(good_features(2)[[1]]), patches).min(axis=1) / np.sqrt(2 * CHANNELS)
    assert np.allclose(memory(good_features(2)[[1]]).distance.flatten(), expected, atol=1e-4)


def test_a_compiled_training_does_not_find_its_own_patches_either() -> None:
    memory, _, _ = fitted()
    images, numbers = good_features(10)[[4, 7]], torch.tensor([4, 7])
    torch._dynamo.reset()
    compiled = torch.compile(memory, backend="eager")
    torch.testing.assert_close(compiled(images, numbers), memory(images, numbers))
    assert not torch.allclose(memory(images).distance, memory(images, numbers).distance)


def test_no_images_have_no_distances() -> None:
    memory, _, _ = fitted()
    for numbers in (None, torch.empty(0, dtype=torch.int64)):
        assert memory(good_features()[:0], numbers).distance.shape == (0, 1, 7, 9)


def test_images_that_are_all_alike_give_finite_distances() -> None:
    sums, statistics, memory = FeatureSums(), PlaceStatistics(CHANNELS), PatchMemory(CHANNELS, 10)
    alike = torch.full((4, CHANNELS, 5, 5), 0.7)
    sums.add(alike)
    statistics.fit(sums)
    memory.fit(as_patches(statistics.scaled(alike)), torch.arange(4).repeat_interleave(25))
    for features in (alike, alike + 1):
        assert memory(statistics.scaled(features)).distance.isfinite().all()
        assert statistics.deviation(statistics.scaled(features)).isfinite().all()
    assert memory(statistics.scaled(alike)).distance.max() < 1


def test_no_image_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one good image"):
        PlaceStatistics(CHANNELS).fit(FeatureSums())
    with pytest.raises(ValueError, match="at least one good patch"):
        PatchMemory(CHANNELS).fit(torch.zeros(0, 2 * CHANNELS), torch.zeros(0))
    with pytest.raises(ValueError, match="size=0"):
        PatchMemory(CHANNELS, 0)


def test_large_tables_are_searched_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    memory, _, _ = fitted()
    features, numbers = good_features(3), torch.tensor([0, 4, -7])
    whole = memory(features), memory(features, numbers)
    monkeypatch.setattr("anomalib_twostage.model.memory._ENTRIES_CPU", 50 * len(memory.patches))
    for one, other in zip(whole, (memory(features), memory(features, numbers)), strict=True):
        torch.testing.assert_close(one.distance, other.distance)


def test_what_was_remembered_travels_in_the_state_dict() -> None:
    memory, _, _ = fitted()
    file = io.BytesIO()
    torch.save(memory.state_dict(), file)
    file.seek(0)
    other = PatchMemory(CHANNELS)
    other.load_state_dict(torch.load(file, weights_only=True))
    features = good_features(2)
    assert torch.equal(memory(features).distance, other(features).distance)
    with pytest.raises(RuntimeError, match="size mismatch"):
        PatchMemory(CHANNELS + 1).load_state_dict(memory.state_dict())


def test_products_of_halves_are_exact_where_operands_are_rounded_to_ten_bits() -> None:
    """As TF32 does; the product of the values themselves would find other patches."""
    torch.manual_seed(0)
    first, second = 5 * torch.randn(300, 64), 5 * torch.randn(200, 64)

    def rounded(values: torch.Tensor) -> torch.Tensor:
        return ((values.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32).double()

    exact = first.double() @ second.double().T
    (high, low), (other_high, other_low) = _halves(first), _halves(second)
    found = rounded(high) @ rounded(other_high).T + rounded(high) @ rounded(other_low).T
    found += rounded(low) @ rounded(other_high).T
    assert (found - exact).abs().max() < 2e-4 * exact.abs().max()
    assert (found - exact).abs().max() < 0.05 * (rounded(first) @ rounded(second).T - exact).abs().max()
