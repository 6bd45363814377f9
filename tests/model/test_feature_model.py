# SPDX-License-Identifier: Apache-2.0
import copy
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from anomalib.data import ImageBatch
from torch.nn import functional

from anomalib_twostage import TwoStageSuperpixel
from anomalib_twostage.model.backbone import Backbone
from anomalib_twostage.model.decoder import Decoder
from anomalib_twostage.model.feature_model import FeatureTemplate, FeatureTwoStageModel
from anomalib_twostage.model.good_images import image_number
from anomalib_twostage.model.torch_model import Seen, Way
from anomalib_twostage.model.variants import two_stage_superpixel_model

SIDE = 64


def good_images(count: int = 6, side: int = SIDE) -> Iterator[tuple[torch.Tensor, int]]:
    """Pictures that are alike but for noise, each with its number."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(1, 3, 8, 8, generator=generator)
    common = functional.interpolate(coarse, size=(side, side), mode="bilinear")[0]
    for number in range(count):
        yield (common + 0.05 * torch.rand(3, side, side, generator=generator)).clamp(0, 1), number


def with_a_spot(image: torch.Tensor) -> torch.Tensor:
    """The same image, with a square of another colour in the middle."""
    image = image.clone()
    image[:, 24:40, 24:40] = 1 - image[:, 24:40, 24:40]
    return image


@pytest.fixture(scope="module")
def remembered() -> FeatureTwoStageModel:
    torch.manual_seed(0)
    model = two_stage_superpixel_model("default").eval()
    assert isinstance(model, FeatureTwoStageModel)
    model.remember(good_images())
    return model


def test_the_distance_is_high_where_an_image_differs_before_any_training(remembered: FeatureTwoStageModel) -> None:
    good = next(good_images())[0]
    distance = remembered.seen(torch.stack([good, with_a_spot(good)])).distance
    assert distance is not None
    assert distance.shape == (2, 1, SIDE, SIDE)
    assert distance.min() >= 0
    assert distance.max() < 1
    spot = distance[1, 0, 24:40, 24:40]
    assert spot.mean() > 3 * distance[0].mean()
    assert spot.mean() > 1.5 * distance[1, 0, :10].mean()


def test_a_training_image_does_not_find_itself(remembered: FeatureTwoStageModel) -> None:
    images = torch.stack([image for image, _ in good_images()])
    found = remembered.seen(images).distance
    others = remembered.seen(images, torch.arange(len(images))).distance
    assert found is not None
    assert others is not None
    assert others.mean() > 2 * found.mean()


def test_the_same_images_give_the_same_memory_whatever_the_random_state(remembered: FeatureTwoStageModel) -> None:
    torch.manual_seed(123)
    other = FeatureTemplate(Backbone(), magnification=remembered.template.magnification)
    other.fit(good_images())
    for name, value in remembered.template.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


def mean_distance(template: FeatureTemplate, images: torch.Tensor, count: int) -> torch.Tensor:
    """The distance map as it is said to come about, of three levels and, if there are six, their means."""
    fine, middle, coarse = template.backbone(images)
    levels = [functional.avg_pool2d(fine, 2), middle, coarse]
    levels = (levels + [functional.avg_pool2d(level, 2) for level in levels])[:count]
    size = middle.shape[-2:]
    distances = []
    for level, statistics, memory in zip(levels, template.statistics, template.memories, strict=True):
        distance = memory((level - statistics.middle) / statistics.spread).distance
        while distance.shape[-1] < size[-1]:
            distance = functional.interpolate(distance, scale_factor=2.0, mode="bilinear")
        distances.append(distance)
    return functional.interpolate(sum(distances) / count / 2, images.shape[-2:], mode="bilinear").tanh()


def test_the_distance_map_is_the_mean_of_six_distances() -> None:
    template = FeatureTemplate(Backbone()).eval()
    template.fit(good_images())
    images = torch.rand(2, 3, SIDE, SIDE)
    with torch.no_grad():
        found = template(images).distance
        expected = mean_distance(template, images, 6)
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=0)


def test_weights_from_before_there_were_memories_of_means_have_none() -> None:
    trained = FeatureTemplate(Backbone()).eval()
    trained.fit(good_images())
    weights = trained.state_dict()
    of_means = [f"{part}.{number}." for part in ("statistics", "memories") for number in (3, 4, 5)]
    earlier = {name: value for name, value in weights.items() if not name.startswith(tuple(of_means))}
    assert len(earlier) == len(weights) - 3 * (3 + 3)
    template = FeatureTemplate(Backbone()).eval()
    template.load_state_dict(earlier)
    images = torch.rand(1, 3, SIDE, SIDE)
    with torch.no_grad():
        torch.testing.assert_close(template(images).distance, mean_distance(template, images, 3), atol=2e-3, rtol=0)
        for level, expected in zip(template(images).levels, trained(images).levels, strict=True):
            assert torch.equal(level, expected)


@pytest.mark.parametrize(("arguments", "count"), [({}, 6), ({"zoom": 2}, 3), ({"template": False}, 0)])
def test_who_looks_for_small_defects_has_no_memories_of_means(arguments: dict[str, Any], count: int) -> None:
    model = two_stage_superpixel_model("default", **arguments)
    templates = [model.template, *([model.close_template] if "zoom" in arguments else [])]
    assert [len(template.memories) for template in templates] == [count] * len(templates)


def test_images_of_any_number_and_size_are_remembered_in_bounds() -> None:
    template = FeatureTemplate(Backbone(), size=50)
    template.fit(image for side in (64, 96) for image in good_images(9, side))
    assert [len(memory.patches) for memory in template.memories] == [50] * 6
    assert template.statistics[1].mean.shape[-2:] == (8, 8)
    assert template(torch.rand(1, 3, 80, 70)).distance.shape == (1, 1, 80, 70)


def test_one_image_is_enough() -> None:
    model = two_stage_superpixel_model("default").eval()
    image = next(good_images())[0]
    model.remember([(image, 7)])
    with torch.no_grad():
        assert model(with_a_spot(image).unsqueeze(0)).anomaly_map.isfinite().all()
    model.train()
    logits, _ = model.learned_logits(image.expand(2, -1, -1, -1), torch.zeros(2, 1, SIDE, SIDE), torch.tensor([7, 7]))
    assert logits.isfinite().all()


@pytest.mark.parametrize("copies", [1, 4])
def test_one_image_or_copies_of_it_tell_a_spot_from_the_rest(copies: int, caplog: pytest.LogCaptureFixture) -> None:
    model = two_stage_superpixel_model("default").eval()
    image, other = (image for image, _ in good_images(2))
    model.remember((image, number) for number in range(copies))
    assert "how far good images are from each other" in caplog.text
    good, spotted = model.seen(torch.stack([other, with_a_spot(other)])).distance
    assert spotted.max() < 1
    assert spotted[0, 28:36, 28:36].min() > good.max()
    caplog.clear()
    model.remember(good_images(2))
    assert not caplog.text


def test_no_image_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one good image"):
        two_stage_superpixel_model("default").remember([])


@pytest.mark.parametrize("options", [{}, {"template": False}, {"place_deviation": False}, {"gate": "hard"}], ids=str)
def test_every_option_gives_maps_in_range_in_both_stages(options: dict) -> None:
    model = two_stage_superpixel_model("default", **options).eval()
    model.remember(good_images(3))
    for _ in range(2):
        with torch.no_grad():
            found = model(torch.rand(2, 3, 65, 83))
        assert found.anomaly_map.shape == (2, 1, 65, 83)
        assert found.anomaly_map.min() >= 0
        assert found.anomaly_map.max() <= 1
        model.start_stage_two()


@pytest.mark.parametrize("options", [{}, {"template": False}, {"zoom": 2}], ids=str)
@pytest.mark.parametrize("stage", [1, 2])
def test_no_images_have_no_answers_and_wrong_ones_are_named(options: dict, stage: int) -> None:
    model = two_stage_superpixel_model("default", **options).eval()
    model.remember((image, number) for image, number in good_images(2, 2 * SIDE))
    if stage == 2:
        model.start_stage_two()
    answer = model(torch.zeros(0, 3, 2 * SIDE, 2 * SIDE + 1))
    assert answer.anomaly_map.shape == (0, 1, 2 * SIDE, 2 * SIDE + 1)
    assert answer.pred_score.shape == (0,)
    images = torch.rand(2, 3, 2 * SIDE, 2 * SIDE)
    with pytest.raises(ValueError, match=r"\(B, 1 or 3, H, W\), got shape \(2, 4,"):
        model(torch.cat([images, images[:, :1]], dim=1))
    with pytest.raises(TypeError, match=r"torch\.float32.*got torch\.float64"):
        model(images.double())


def test_grey_images_have_a_model_of_their_own() -> None:
    model = two_stage_superpixel_model("default", in_channels=1).eval()
    model.remember((image[:1], number) for image, number in good_images(3))
    model.start_stage_two()
    with torch.no_grad():
        assert model(torch.rand(1, 1, SIDE, SIDE)).anomaly_map.shape == (1, 1, SIDE, SIDE)


def test_what_no_paint_resembles_keeps_its_rank(remembered: FeatureTwoStageModel) -> None:
    """Where the networks see nothing at all, the map ranks as the memory does."""
    model = copy.deepcopy(remembered)
    model.start_stage_two()
    with torch.no_grad():
        for network in (model.stage_one, model.stage_two):
            network.head.weight.zero_()
            network.head.bias.fill_(-10.0)
        images = with_a_spot(next(good_images())[0]).unsqueeze(0)
        maps = model.stages(images)
    torch.testing.assert_close(maps.anomaly_map, 16 * model.smooth(maps.distance) / 27, atol=1e-4, rtol=0)


def test_the_map_is_the_distance_weighed_by_stage_one_with_a_ninth_of_stage_two(
    remembered: FeatureTwoStageModel,
) -> None:
    model = copy.deepcopy(remembered)
    model.start_stage_two()
    images = with_a_spot(next(good_images())[0]).unsqueeze(0)
    with torch.no_grad():
        model.refiner.threshold = 0.99 * float(model.stages(images).stage_one_map.max())
        maps = model.stages(images)
    assert maps.stage_two_logits is not None
    assert 0 < maps.selected.mean() < 1
    second = maps.stage_two_logits.sigmoid()  # outside the selection too
    first = (maps.stage_one_map + maps.pooled_map) / 2
    without = maps.distance * (2 + first) / 3
    torch.testing.assert_close(model.without_stage_two(maps), without)
    torch.testing.assert_close(maps.fused_map, 8 / 9 * without + 1 / 9 * second)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"template": False}, lambda first, second, _: (first + second) / 2),
        ({"gate": "hard"}, lambda _, second, distance: distance * (2 + second) / 3),
    ],
    ids=["no template", "hard gate"],
)
def test_without_a_distance_or_with_the_hard_gate_the_maps_are_fused_as_elsewhere(
    options: dict[str, Any], expected: Callable[..., torch.Tensor]
) -> None:
    model = two_stage_superpixel_model("default", **options).eval()
    model.remember(good_images(3))
    model.start_stage_two()
    images = with_a_spot(next(good_images())[0]).unsqueeze(0)
    with torch.no_grad():
        model.refiner.threshold = 0.99 * float(model.stages(images).stage_one_map.max())
        maps = model.stages(images)
    assert 0 < maps.selected.mean() < 1
    assert maps.stage_two_logits is not None
    second = maps.stage_two_logits.sigmoid() * maps.selected
    first = (maps.stage_one_map + maps.pooled_map) / 2
    torch.testing.assert_close(maps.fused_map, expected(first, second, maps.distance))


def handed_on(model: FeatureTwoStageModel, images: torch.Tensor, seen: Seen, first: torch.Tensor) -> Any:
    """What stage two sees of images when stage one has drawn these maps."""
    labels = model.slic(images)
    refined = model.refiner(images, first, labels, model.slic.max_segments(*images.shape[-2:]))
    return model._handed_on(images, seen, Way(first, first, labels, refined, None))


@pytest.mark.parametrize("options", [{}, {"template": False}], ids=str)
def test_stage_two_sees_how_far_features_are_and_not_in_what_way(options: dict[str, Any]) -> None:
    model = two_stage_superpixel_model("default", **options).eval()
    assert isinstance(model, FeatureTwoStageModel)
    model.remember(good_images())
    images = with_a_spot(next(good_images())[0]).unsqueeze(0)
    first = torch.rand(1, 1, SIDE, SIDE)
    seen = model.seen(images)
    coarse, middle, fine = (-level for level in seen.levels)
    if options == {}:
        coarse[:, -1:], middle[:, -2:] = -coarse[:, -1:], -middle[:, -2:]  # distances have no sign
    turned = seen._replace(levels=(coarse, middle, fine))
    with torch.no_grad():
        one, other = (handed_on(model, images, which, first) for which in (seen, turned))
        closer = handed_on(model, images, seen._replace(levels=(coarse / 2, middle / 2, fine / 2)), first)
    for own, expected, smaller in zip(one, other, closer, strict=True):
        assert torch.equal(own, expected)
        assert own is one[-1] or (own >= smaller).all()
    torch.testing.assert_close(one[2], seen.levels[2].norm(dim=1, keepdim=True) / seen.levels[2].shape[1] ** 0.5)


def test_stage_two_sees_maps_in_full_and_their_means_over_superpixels(remembered: FeatureTwoStageModel) -> None:
    images = with_a_spot(next(good_images())[0])[:, :63].unsqueeze(0)
    seen, first = remembered.seen(images), torch.rand(1, 1, 63, SIDE)
    with torch.no_grad():
        maps = functional.pixel_shuffle(handed_on(remembered, images, seen, first)[-1], 2)[..., :63, :]
    assert seen.distance is not None
    assert torch.equal(maps[:, :1], first)
    assert torch.equal(maps[:, 2:3], seen.distance)
    labels = remembered.slic(images)
    for label in labels.unique():
        inside = labels == label
        torch.testing.assert_close(maps[:, 1][inside], first[:, 0][inside].mean().expand(int(inside.sum())))
        torch.testing.assert_close(maps[:, 3][inside], seen.distance[:, 0][inside].mean().expand(int(inside.sum())))


def test_with_the_hard_gate_stage_two_sees_what_is_selected_alone() -> None:
    model = two_stage_superpixel_model("default", gate="hard").eval()
    assert isinstance(model, FeatureTwoStageModel)
    model.remember(good_images(3))
    images, first = next(good_images())[0].unsqueeze(0), torch.zeros(1, 1, SIDE, SIDE)
    first[..., 8:24, 8:24] = 1.0
    with torch.no_grad():
        maps = functional.pixel_shuffle(handed_on(model, images, model.seen(images), first)[-1], 2)
    assert (maps[..., 8:24, 8:24] > 0).all()
    assert (maps[..., 48:, 48:] == 0).all()


def test_stage_two_begins_anew(remembered: FeatureTwoStageModel) -> None:
    model = copy.deepcopy(remembered)
    before = copy.deepcopy(model.stage_two.state_dict())
    model.start_stage_two()
    for name, value in model.stage_two.state_dict().items():
        assert torch.equal(before[name], value), name


def test_only_the_stage_that_learns_gets_gradients(remembered: FeatureTwoStageModel) -> None:
    model = copy.deepcopy(remembered).train()
    images = torch.stack([image for image, _ in good_images(2)])
    for learning, resting in (("stage_one", "stage_two"), ("stage_two", "stage_one")):
        model.zero_grad()
        model.learned_logits(images, torch.zeros(2, 1, SIDE, SIDE), torch.arange(2))[0].sum().backward()
        assert any(parameter.grad is not None for parameter in getattr(model, learning).parameters())
        assert all(parameter.grad is None for parameter in getattr(model, resting).parameters())
        assert all(parameter.grad is None for parameter in model.template.parameters())
        model.start_stage_two()


def test_everything_travels_in_the_state_dict(remembered: FeatureTwoStageModel) -> None:
    file = io.BytesIO()
    torch.save(remembered.state_dict(), file)
    assert file.tell() < 15e6
    file.seek(0)
    other = two_stage_superpixel_model("default", smoothing=1.0).eval()
    other.load_state_dict(torch.load(file, weights_only=True))
    images = with_a_spot(next(good_images())[0]).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(remembered(images).anomaly_map, other(images).anomaly_map)
    assert other.template.backbone.ready


def test_without_a_backbone_the_variant_is_trained_from_scratch() -> None:
    model = TwoStageSuperpixel(backbone=None)
    assert model.variant == "scratch"
    own, scratch = model.model.state_dict(), TwoStageSuperpixel(variant="scratch").model.state_dict()
    assert {name: value.shape for name, value in own.items()} == {name: value.shape for name, value in scratch.items()}


def test_numbers_of_images_are_those_of_their_files() -> None:
    from anomalib_twostage.model.good_images import image_numbers

    paths = [str(Path("good") / f"{number}.png") for number in range(3)]
    batch = ImageBatch(image=torch.rand(3, 3, 8, 8), image_path=paths)
    assert image_numbers(batch).tolist() == [image_number(path) for path in paths]
    assert len(set(image_numbers(batch).tolist())) == 3
    assert image_numbers(ImageBatch(image=torch.rand(3, 3, 8, 8))) is None


def test_levels_and_widths_must_be_as_many() -> None:
    with pytest.raises(ValueError, match=r"\(3, 4\) and \(8,\)"):
        Decoder((3, 4), (8,), stride=2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_another_type_are_refused(dtype: torch.dtype, remembered: FeatureTwoStageModel) -> None:
    model = copy.deepcopy(remembered).to(dtype)
    with pytest.raises(TypeError, match=rf"in float32, got weights of {dtype}.*autocast"):
        model(torch.rand(1, 3, 64, 64, dtype=dtype))


def test_a_graph_of_an_odd_size_answers_alike(remembered: FeatureTwoStageModel) -> None:
    model = copy.deepcopy(remembered)
    model.start_stage_two()
    model.refiner.threshold = 1e-3
    images = torch.rand(2, 3, 66, 71)
    with torch.no_grad():
        graph = torch.export.export(model, (images,), strict=False).module()
        torch.testing.assert_close(graph(images)[2], model(images).anomaly_map, atol=1e-4, rtol=0)


def magnified_by(factor: float) -> FeatureTwoStageModel:
    torch.manual_seed(0)
    model = two_stage_superpixel_model("default", magnification=factor).eval()
    assert isinstance(model, FeatureTwoStageModel)
    return model


def test_a_magnified_image_looks_like_a_larger_one() -> None:
    def enlarged(images: torch.Tensor) -> torch.Tensor:
        return functional.interpolate(images, (96, 96), mode="bilinear")

    magnifying, plain = magnified_by(1.5), magnified_by(1.0)
    magnifying.remember(good_images())
    plain.remember((enlarged(image.unsqueeze(0))[0], number) for image, number in good_images())
    image = with_a_spot(next(good_images())[0]).unsqueeze(0)
    own, other = magnifying.seen(image), plain.seen(enlarged(image))
    for level, expected in zip(own.levels, other.levels, strict=True):
        assert torch.equal(level, expected)
    assert own.distance is not None
    assert other.distance is not None
    assert own.distance.shape == (1, 1, SIDE, SIDE)
    reduced = functional.interpolate(other.distance, (SIDE, SIDE), mode="bilinear")
    torch.testing.assert_close(own.distance, reduced, atol=0.02, rtol=0)


def test_maps_and_logits_of_magnified_images_lie_where_the_images_do() -> None:
    """What stage one draws of one half only is found in that half."""
    model = magnified_by(1.5)
    model.remember(good_images(3))
    images = torch.rand(2, 3, 65, 83)

    def half(*levels: torch.Tensor) -> torch.Tensor:
        logits = torch.full((2, 1, 4 * levels[-1].shape[-2], 4 * levels[-1].shape[-1]), -5.0)
        logits[..., : round(1.5 * 83) // 2] = 5.0
        return logits

    model.stage_one.forward = half  # type: ignore[method-assign]
    with torch.no_grad():
        stages = model.stages(images)
        logits, _ = model.learned_logits(images, torch.zeros(2, 1, 65, 83))
    assert stages.stage_one_map.shape == stages.anomaly_map.shape == logits.shape == (2, 1, 65, 83)
    assert stages.stage_one_map[..., :41].min() > 0.9
    assert stages.stage_one_map[..., 43:].max() < 0.1
    torch.testing.assert_close(logits.sigmoid(), stages.stage_one_map)


@pytest.mark.parametrize("zoom", [1, 2])
def test_the_default_magnifies(zoom: int) -> None:
    assert two_stage_superpixel_model("default", zoom=zoom).template.magnification == 1.5
    assert two_stage_superpixel_model("default", zoom=zoom, magnification=2).template.magnification == 2


def test_weights_from_before_there_was_a_magnification_have_none(caplog: pytest.LogCaptureFixture) -> None:
    weights = magnified_by(1.0).state_dict()
    state = json.loads(bytes(weights["_extra_state"].tolist()))
    assert state.pop("magnification") == 1
    weights["_extra_state"] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    model = magnified_by(1.5)
    model.load_state_dict(weights)
    assert model.template.magnification == 1
    assert "magnification=1.0 instead of 1.5" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"magnification": 0.5}, "magnification must be 1 or more, got 0.5"),
        ({"magnification": float("inf")}, "magnification must be 1 or more, got inf"),
        ({"magnification": float("nan")}, "magnification must be 1 or more, got nan"),
        ({"magnification": 1.5, "variant": "small"}, "magnification=1.5 needs variant 'default'"),
        ({"magnification": 1.5, "backbone": None}, "magnification=1.5 needs variant 'default'"),
    ],
)
def test_what_cannot_be_magnified_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TwoStageSuperpixel(**arguments)
