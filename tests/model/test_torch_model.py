# SPDX-License-Identifier: Apache-2.0
import copy
import io

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import nn

from anomalib_twostage import Slic, SuperpixelRefiner, TwoStageSuperpixelModel, UNet
from anomalib_twostage.model.variants import VARIANTS, two_stage_superpixel_model
from anomalib_twostage.superpixels.pooling import superpixel_mean

BOTH_GATES = pytest.mark.parametrize("gate", ["hard", "average"])
WIDTHS = (6, 8, 10)


def make_model(gate: str, threshold: float = 0.5, channels: int = 3, **options: float) -> TwoStageSuperpixelModel:
    """A small model in evaluation mode whose maps and batch-norm statistics are not those of a fresh one."""
    model = TwoStageSuperpixelModel(
        stage_one=UNet(channels, WIDTHS),
        slic=Slic(segment_size=8),
        refiner=SuperpixelRefiner(threshold),
        stage_two=UNet(channels if gate == "hard" else channels + 2, WIDTHS),
        gate=gate,
        **options,
    )
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
        model.stage_one.head.weight.mul_(3)
        model.eval()
        logits = model.stage_one(*model.seen(pictures(channels=channels)).levels)
        model.stage_one.head.bias.sub_(logits.quantile(0.7))  # somewhat less than half of the map above one half
    return model


def pictures(batch: int = 2, channels: int = 3) -> torch.Tensor:
    torch.manual_seed(1)
    coarse = torch.rand(batch, channels, 6, 7)
    return nn.functional.interpolate(coarse, size=(48, 56), mode="bilinear")


def learn(model: TwoStageSuperpixelModel) -> TwoStageSuperpixelModel:
    """Stand in for the training of stage two."""
    with torch.no_grad():
        for parameter in model.stage_two.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("stage", [1, 2])
def test_every_variant_gives_maps_and_scores_in_range(variant: str, stage: int) -> None:
    model = two_stage_superpixel_model(variant).eval()
    if stage == 2:
        model.start_stage_two()
    side = model.stage_one.minimum_size
    with torch.no_grad():
        found = model(torch.rand(2, 3, side, side + 9))
    assert found.anomaly_map.shape == (2, 1, side, side + 9)
    assert found.pred_score.shape == (2,)
    for values in (found.anomaly_map, found.pred_score):
        assert values.dtype == torch.float32
        assert values.min() >= 0
        assert values.max() <= 1


@BOTH_GATES
def test_grey_images_have_a_model_of_their_own(gate: str) -> None:
    variant = next(name for name, shape in VARIANTS.items() if shape.gate == gate)
    model = two_stage_superpixel_model(variant, in_channels=1).eval()
    model.start_stage_two()
    side = model.stage_one.minimum_size
    with torch.no_grad():
        assert model(torch.rand(1, 1, side, side)).anomaly_map.shape == (1, 1, side, side)


@BOTH_GATES
def test_stages_fit_together(gate: str) -> None:
    model, images = make_model(gate), pictures()
    model.start_stage_two()
    with torch.no_grad():
        maps = learn(model).stages(images)
        assert torch.equal(maps.stage_one_logits, model.stage_one(*model.seen(images).levels))
    assert torch.equal(maps.stage_one_map, maps.stage_one_logits.sigmoid())
    assert torch.equal(maps.labels, model.slic(images))
    refined = model.refiner(images, maps.stage_one_map, maps.labels, int(maps.labels.max()) + 1)
    assert torch.equal(maps.refined_image, refined.image)
    assert torch.equal(maps.selected, refined.selected)
    assert torch.equal(maps.pooled_map, refined.pooled)
    assert 0.05 < maps.selected.mean() < 0.95


def test_before_stage_two_the_hard_gate_shows_the_map_of_stage_one() -> None:
    model, images = make_model("hard"), pictures()
    with torch.no_grad():
        assert torch.equal(model(images).anomaly_map, model.stage_one(*model.seen(images).levels).sigmoid())
        assert model.stages(images).stage_two_logits is None


def test_before_stage_two_the_average_gate_shows_the_mean_with_the_superpixels() -> None:
    model, images = make_model("average"), pictures()
    with torch.no_grad():
        first = model.stage_one(*model.seen(images).levels).sigmoid()
        labels = model.slic(images)
        pooled = superpixel_mean(first, labels, int(labels.max()) + 1)
        assert torch.equal(model(images).anomaly_map, (first + pooled) / 2)
        assert model.stages(images).stage_two_logits is None


def test_the_hard_gate_is_zero_outside_what_is_selected() -> None:
    model, images = make_model("hard"), pictures()
    model.start_stage_two()
    with torch.no_grad():
        maps = learn(model).stages(images)
        alone = model.stage_two(maps.refined_image).sigmoid()
    outside = maps.selected == 0
    assert outside.any()
    assert (maps.anomaly_map[outside] == 0).all()
    assert torch.equal(maps.anomaly_map[~outside], alone[~outside])


def test_the_hard_gate_lets_stage_two_see_the_refined_image_only() -> None:
    model, images = make_model("hard"), pictures()
    model.start_stage_two()
    learn(model)
    with torch.no_grad():
        before = model.stages(images)
        model.slic.forward = lambda images: before.labels
        changed = torch.where(before.selected == 1, images, torch.rand_like(images))
        after = model.stages(changed, stage_one_logits=before.stage_one_logits)
    assert not torch.equal(changed, images)
    assert torch.equal(after.stage_two_logits, before.stage_two_logits)


def test_outside_what_is_selected_the_average_gate_keeps_the_ranking_of_before() -> None:
    model, images = make_model("average"), pictures()
    with torch.no_grad():
        before = model(images).anomaly_map
        model.start_stage_two()
        maps = learn(model).stages(images)
    outside = maps.selected == 0
    assert outside.any()
    assert torch.equal(maps.anomaly_map[outside], before[outside] / 2)
    assert (maps.anomaly_map[~outside] - before[~outside] / 2).abs().max() > 0.01


def test_selecting_a_pixel_never_lowers_it() -> None:
    model, images = make_model("average"), pictures()
    model.start_stage_two()
    learn(model)
    with torch.no_grad():
        selected = model.stages(images)
        model.refiner.threshold = 0.999
        unselected = model.stages(images)
    assert selected.selected.sum() > unselected.selected.sum()
    assert (selected.fused_map >= unselected.fused_map).all()


def test_inside_what_is_selected_the_average_gate_averages() -> None:
    model, images = make_model("average"), pictures()
    model.start_stage_two()
    with torch.no_grad():
        maps = learn(model).stages(images)
    expected = maps.stage_two_logits.sigmoid() / 2 + maps.stage_one_map / 4 + maps.pooled_map / 4
    inside = maps.selected == 1
    torch.testing.assert_close(maps.anomaly_map[inside], expected[inside])


def test_with_nothing_selected_stage_two_has_no_say() -> None:
    images, model = pictures(), make_model("average", threshold=0.999)
    with torch.no_grad():
        model.stage_one.head.bias.sub_(3)
        before = model(images).anomaly_map
        model.start_stage_two()
        assert torch.equal(learn(model)(images).anomaly_map, before / 2)


@BOTH_GATES
@pytest.mark.parametrize("blank", [(0,), (1, 2), (0, 1, 2), ()], ids=str)
def test_stage_two_runs_for_images_with_a_selection_only_and_nothing_else_changes(
    gate: str, blank: tuple[int, ...]
) -> None:
    images, model = pictures(3), make_model(gate)
    model.start_stage_two()
    learn(model)
    seen: list[int] = []
    model.stage_two.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    with torch.no_grad():
        logits = model.stage_one(*model.seen(images).levels)
        logits[list(blank)] = -20.0
        found = model.stages(images, logits)
        assert sum(seen) == 3 - len(blank)
        assert found.stage_two_logits is not None
        assert not found.stage_two_logits[list(blank)].any()
        model._stage_two_logits = lambda seen, _: model.stage_two(*seen).float()  # the full path
        torch.testing.assert_close(found.anomaly_map, model.stages(images, logits).anomaly_map, atol=1e-6, rtol=0)


def test_in_training_stage_two_sees_every_image() -> None:
    images, model = pictures(3), make_model("average")
    model.start_stage_two()
    model.train()
    maps = model.stages(images, torch.full((3, 1, 48, 56), -20.0))
    assert maps.stage_two_logits is not None
    assert (maps.stage_two_logits.flatten(1).std(dim=1) > 0).all()


def test_with_the_average_gate_stage_two_begins_as_the_equal_of_stage_one() -> None:
    model, images = make_model("average"), pictures()
    model.start_stage_two()
    with torch.no_grad():
        maps = model.stages(images)
    torch.testing.assert_close(maps.stage_two_logits, maps.stage_one_logits)


def test_with_the_hard_gate_stage_two_keeps_its_own_weights() -> None:
    model = make_model("hard")
    before = copy.deepcopy(model.stage_two.state_dict())
    model.start_stage_two()
    for name, value in model.stage_two.state_dict().items():
        assert torch.equal(value, before[name]), name


@BOTH_GATES
def test_stage_two_learns_and_stage_one_stays_as_it_is(gate: str) -> None:
    model, images = make_model(gate).train(), pictures()
    model.start_stage_two()
    model.train()
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.stages(images).stage_two_logits.square().mean().backward()
    optimizer.step()
    after = model.state_dict()
    for name, value in before.items():
        if name.startswith("stage_one."):
            assert torch.equal(value, after[name]), name
        elif name.startswith("stage_two.") and not name.endswith("head.bias"):
            assert not torch.equal(value, after[name]), name
    assert not any(parameter.requires_grad for parameter in model.stage_one.parameters())
    assert model.stage_two.training
    assert not any(module.training for module in model.stage_one.modules())


def test_in_stage_one_stage_one_learns_its_batch_norm_statistics() -> None:
    model, images = make_model("average").train(), pictures()
    before = model.stage_one.encoder[0][1].running_mean.clone()
    model.stages(images).stage_one_logits.mean().backward()
    assert not torch.equal(model.stage_one.encoder[0][1].running_mean, before)
    assert all(parameter.grad is not None for parameter in model.stage_one.parameters())
    assert all(parameter.grad is None for parameter in model.stage_two.parameters())


@BOTH_GATES
def test_starting_stage_two_respects_evaluation_mode(gate: str) -> None:
    model = make_model(gate).eval()
    model.start_stage_two()
    assert not any(module.training for module in model.modules())


def saved(model: nn.Module) -> dict:
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@BOTH_GATES
@pytest.mark.parametrize("stage", [1, 2])
def test_a_state_dict_carries_stage_and_weights(gate: str, stage: int) -> None:
    model, images = make_model(gate), pictures()
    if stage == 2:
        model.start_stage_two()
        learn(model)
    torch.manual_seed(7)
    other = make_model(gate).train()
    assert not torch.equal(other.stage_one.head.weight, model.stage_one.head.weight)
    other.load_state_dict(saved(model))
    assert other.stage == stage
    assert other.stage_two.training
    assert other.stage_one.training == (stage == 1)
    assert all(parameter.requires_grad == (stage == 1) for parameter in other.stage_one.parameters())
    with torch.no_grad():
        assert torch.equal(other.eval()(images).anomaly_map, model(images).anomaly_map)


@BOTH_GATES
def test_a_state_of_stage_one_takes_a_model_back_to_stage_one(gate: str) -> None:
    model, images = make_model(gate), pictures()
    state = saved(model)
    with torch.no_grad():
        before = model(images).anomaly_map
        model.start_stage_two()
        learn(model).load_state_dict(state)
        assert model.stage == 1
        assert torch.equal(model(images).anomaly_map, before)
    assert all(parameter.requires_grad for parameter in model.stage_one.parameters())


@BOTH_GATES
def test_a_copy_is_independent(gate: str) -> None:
    model, images = make_model(gate), pictures()
    model.start_stage_two()
    other = copy.deepcopy(model)
    with torch.no_grad():
        before = model(images).anomaly_map
        learn(other)
        assert torch.equal(model(images).anomaly_map, before)
    assert other.stage == 2


@pytest.mark.parametrize("stage", [1, 2])
def test_tiny_probabilities_do_not_tie(stage: int) -> None:
    model, images = make_model("average"), pictures(1)
    logits = torch.empty(1, 1, 48, 56).uniform_(-46, -41)  # probabilities from 1e-20 to 1e-18
    logits[..., 20:30, 20:30] = 5  # and a defect that stage two may judge
    if stage == 2:
        model.start_stage_two()
    with torch.no_grad():
        maps = model.stages(images, stage_one_logits=logits)
    # Far from the defect, within one superpixel, the map ranks like stage one.
    number = maps.labels[0, 2, 2]
    inside = (maps.labels == number).unsqueeze(1) & (maps.selected == 0)
    assert inside.sum() > 20
    assert torch.equal(maps.anomaly_map[inside].argsort(), logits[inside].argsort())
    assert maps.anomaly_map[inside].unique().numel() == inside.sum()


@BOTH_GATES
def test_stage_ones_logits_may_be_given(gate: str) -> None:
    model, images = make_model(gate), pictures()
    model.start_stage_two()
    given = torch.randn(2, 1, 48, 56) * 3
    with torch.no_grad():
        maps = model.stages(images, stage_one_logits=given)
        assert torch.equal(maps.stage_one_map, given.sigmoid())
        again = model.stages(images, stage_one_logits=model.stage_one(*model.seen(images).levels))
        assert torch.equal(again.anomaly_map, model(images).anomaly_map)


@BOTH_GATES
def test_images_of_a_batch_do_not_mix(gate: str) -> None:
    model, images = make_model(gate), pictures(3)
    model.start_stage_two()
    learn(model)
    with torch.no_grad():
        together = model(images)
        for i in range(3):
            alone = model(images[i : i + 1])
            torch.testing.assert_close(alone.anomaly_map[0], together.anomaly_map[i], atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(alone.pred_score[0], together.pred_score[i], atol=1e-5, rtol=1e-4)


@BOTH_GATES
def test_half_precision_ends_in_float32(gate: str) -> None:
    model = make_model(gate)
    model.start_stage_two()
    with torch.no_grad():
        exact = model(pictures()).anomaly_map
        found = model.bfloat16()(pictures().bfloat16())
    assert found.anomaly_map.dtype == found.pred_score.dtype == torch.float32
    assert (found.anomaly_map - exact).abs().median() < 0.05


def spot(top: int, left: int, side: int) -> torch.Tensor:
    anomaly_map = torch.zeros(1, 1, 40, 50)
    anomaly_map[..., top : top + side, left : left + side] = 1
    return anomaly_map


def test_one_hot_pixel_scores_less_than_a_block() -> None:
    model = make_model("average")
    pixel, block = model.score(spot(20, 20, 1)).item(), model.score(spot(20, 20, 7)).item()
    assert pixel == pytest.approx(1 / 49)
    assert block == pytest.approx(1)


@pytest.mark.parametrize(("top", "left"), [(0, 0), (33, 43), (0, 20), (17, 43)])
def test_a_block_at_the_border_scores_like_one_inside(top: int, left: int) -> None:
    assert make_model("average").score(spot(top, left, 7)).item() == pytest.approx(1)


def test_each_image_has_a_score_of_its_own() -> None:
    maps = torch.cat([spot(5, 5, 0), spot(5, 5, 3), spot(20, 5, 9)])
    torch.testing.assert_close(make_model("average").score(maps), torch.tensor([0.0, 9 / 49, 1.0]))


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_is_traced_for_export_and_answers_alike(variant: str) -> None:
    model = two_stage_superpixel_model(variant, segment_size=8).eval()
    model.start_stage_two()
    with torch.no_grad():
        model.stage_one.head.bias += 5.0  # something is selected
        images = torch.rand(2, 3, 64, 64)
        exported = torch.export.export(model, (images,), strict=True).module()
        for batch in (images, images.flip(-1)):
            torch.testing.assert_close(exported(batch).anomaly_map, model(batch).anomaly_map, atol=1e-4, rtol=0)


@BOTH_GATES
def test_the_final_map_alone_is_smoothed_as_by_scipy(gate: str) -> None:
    smoothed = make_model(gate, smoothing=2.0)
    plain = copy.deepcopy(smoothed)
    plain.smoothing = 0.0
    with torch.no_grad():
        found, expected = smoothed.stages(pictures()), plain.stages(pictures())
    for one, other in zip(expected.anomaly_map.squeeze(1), found.anomaly_map.squeeze(1), strict=True):
        assert np.allclose(other, ndimage.gaussian_filter(one.numpy(), 2.0, mode="nearest", truncate=3.0), atol=1e-5)
    assert torch.equal(found.stage_one_map, expected.stage_one_map)
    assert torch.equal(found.selected, expected.selected)


def test_autocast_does_not_round_what_is_smoothed() -> None:
    model, values = make_model("hard", smoothing=2.0), torch.rand(1, 1, 64, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = model.smooth(values)
    assert found.dtype == torch.float32
    assert torch.equal(found, model.smooth(values))


def test_smoothing_below_zero_is_refused() -> None:
    with pytest.raises(ValueError, match=r"smoothing.*-1\.0"):
        make_model("hard", smoothing=-1.0)


def test_an_unknown_gate_is_named() -> None:
    with pytest.raises(ValueError, match="'soft'"):
        TwoStageSuperpixelModel(UNet(3, WIDTHS), Slic(), SuperpixelRefiner(), UNet(3, WIDTHS), gate="soft")


def test_an_unknown_variant_is_named_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'default', 'paper', 'scratch', 'small'.*'huge'"):
        two_stage_superpixel_model("huge")


def test_settings_reach_the_superpixels() -> None:
    model = two_stage_superpixel_model("small", segment_size=11, compactness=3.0)
    assert model.slic.segment_size == 11
    assert model.slic.compactness == 3.0
