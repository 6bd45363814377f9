# SPDX-License-Identifier: Apache-2.0
"""Whatever comes in: the right answer or an error that names the value; never a crash, a hang or a silent NaN.

``FUZZ_EXAMPLES=5000 pytest tests/test_fuzz.py`` draws that many fresh examples per test instead of a few fixed ones.
"""

import os
import re
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.ndimage import maximum_filter

from anomalib_twostage import PerlinAnomaly, PseudoAnomaly, SuperpixelAnomaly
from anomalib_twostage.model.refiner import SuperpixelRefiner
from anomalib_twostage.model.torch_model import TwoStageSuperpixelModel
from anomalib_twostage.model.variants import two_stage_superpixel_model
from anomalib_twostage.pseudo_anomaly import PseudoAnomalyTransform
from anomalib_twostage.superpixels.slic import Slic, slic

EXAMPLES = os.environ.get("FUZZ_EXAMPLES")
LARGEST = 2**17  # pixels of an image; long ones have up to 1024 on a side
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
OTHERS = (torch.uint8, torch.uint16, torch.int32, torch.bool)


def fuzz(share: float = 1.0):
    """Few examples, the same each time; as many fresh ones as asked for otherwise."""
    count = max(1, int(share * int(EXAMPLES or 150)))
    return settings(max_examples=count, derandomize=EXAMPLES is None, deadline=None, database=None)


@dataclass
class Images:
    """Images, their layout as drawn, and what they hold."""

    values: torch.Tensor
    content: str


side = st.one_of(st.integers(1, 8), st.integers(1, 48), st.integers(49, 160), st.integers(161, 1024))


@st.composite
def images(draw, channels=(1, 3, 4), dtypes=FLOATS + OTHERS, sides=side) -> Images:
    batch = draw(st.sampled_from([2, 1, 3, 0]))
    height, width = draw(sides), draw(sides)
    assume(height * width <= LARGEST)
    shape = (batch, draw(st.sampled_from(channels)), height, width)
    dtype = draw(st.sampled_from(dtypes))
    content = draw(st.sampled_from(["noise", "constant", "edge", "nan", "inf", "-inf", "all nan", "outside"]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    values = torch.rand(shape, generator=generator)
    if content == "constant":
        values[:] = draw(st.sampled_from([0.0, 0.3, 1.0]))
    elif content == "edge":
        values = (values.cumsum(dim=-1) > values.shape[-1] / 4).float()
    elif content == "outside":
        values = values * draw(st.sampled_from([3.0, 300.0, 60000.0])) - 1
    elif content != "noise" and values.numel() > 0:
        row, column = draw(st.integers(0, height - 1)), draw(st.integers(0, width - 1))
        index = (0,) if content == "all nan" else (0, 0, row, column)
        values[index] = float(content.removeprefix("all "))
    if not dtype.is_floating_point:
        values = (values.nan_to_num(0, 1, 0).clamp(0, 1) * 255).to(torch.uint8)
    values = values.to(dtype)
    if dtype == torch.float64:
        values = values * (1 - 1e-12)  # no float32

    layout = draw(st.sampled_from(["contiguous", "channels last", "part of a larger one", "transposed", "repeated"]))
    if layout == "channels last":
        values = values.contiguous(memory_format=torch.channels_last)
    elif layout == "part of a larger one":
        larger = torch.zeros(batch, shape[1], 2 * height + 1, width + 3, dtype=dtype)
        larger[:, :, 1::2, 2:-1] = values
        values = larger[:, :, 1::2, 2:-1]
    elif layout == "transposed":
        values = values.mT.contiguous().mT
    elif layout == "repeated":
        values = values[:, :1].expand(shape)
    return Images(values, content)


def refused(given: Images, floats_only: bool = True) -> tuple[type[Exception], str] | None:
    """The error that these images deserve anywhere, and what it has to name."""
    values = given.values
    if values.dtype in OTHERS and (floats_only or values.dtype != torch.uint8):
        return TypeError, str(values.dtype)
    if values.shape[1] == 4:
        return ValueError, re.escape(str(tuple(values.shape)))
    return None


@fuzz()
@given(given=images(), segment_size=st.integers(1, 40), num_iterations=st.integers(0, 4))
def test_slic(given: Images, segment_size: int, num_iterations: int) -> None:
    values = given.values
    options = {"segment_size": segment_size, "num_iterations": num_iterations}
    batch, _, height, width = values.shape
    if error := refused(given):
        with pytest.raises(error[0], match=error[1]):
            slic(values, **options)
        return
    if segment_size > max(height, width):
        with pytest.raises(ValueError, match=f"segment_size.*{max(height, width)}.*{segment_size}"):
            slic(values, **options)
        return
    labels = slic(values, **options)
    assert labels.shape == (batch, height, width)
    assert labels.dtype == torch.int64
    for image in labels:
        assert torch.equal(image.unique(), torch.arange(image.max() + 1))
        assert image.max() < Slic(max(2, segment_size)).max_segments(height, width) or segment_size == 1
    # Layout, precision and pixels that are no numbers change nothing beyond what the docstring says.
    array = values.double().numpy()
    cleaned = np.where(np.isnan(array), 0.0, np.clip(array, 0, 1)).astype(np.float32)
    assert torch.equal(labels, slic(torch.from_numpy(np.ascontiguousarray(cleaned)), **options))


@fuzz(0.5)
@given(given=images(channels=(1, 3), dtypes=FLOATS), n_segments=st.integers(1, 3000))
def test_slic_by_number(given: Images, n_segments: int) -> None:
    labels = slic(given.values, n_segments)
    assert labels.shape == (len(given.values), *given.values.shape[2:])
    assert all(torch.equal(image.unique(), torch.arange(image.max() + 1)) for image in labels)


@fuzz(0.5)
@given(data=st.data(), threshold=st.floats(0.05, 0.95), margin=st.integers(0, 5), segments=st.integers(1, 50))
def test_refiner(data: st.DataObject, threshold: float, margin: int, segments: int) -> None:
    maps = data.draw(images(channels=(1,), dtypes=FLOATS)).values
    batch, _, height, width = maps.shape
    labels = torch.randint(segments, (batch, height, width), generator=torch.Generator().manual_seed(segments))
    pictures = torch.rand(batch, 3, height, width)
    refined = SuperpixelRefiner(threshold, margin)(pictures, maps, labels, max_segments=segments + 2)
    assert refined.image.shape == pictures.shape
    assert refined.selected.shape == refined.pooled.shape == maps.shape
    for i in range(batch):
        values, names = maps[i, 0].double().numpy(), labels[i].numpy()
        mean = np.empty_like(values)
        for name in np.unique(names):
            mean[names == name] = values[names == name].astype(np.float32).mean(dtype=np.float64)
        np.testing.assert_allclose(refined.pooled[i, 0].numpy(), mean, rtol=1e-4, atol=1e-5)
        # In the precision of the map, as the model compares.
        touched = (maps[i, 0] >= threshold).numpy()
        rim = maximum_filter(touched, size=2 * margin + 1, mode="constant")
        clear = ~(np.abs(mean - threshold) < 1e-4)
        with np.errstate(invalid="ignore"):
            expected = ~(mean < threshold) | rim
        assert np.array_equal(refined.selected[i, 0].numpy()[clear], expected[clear].astype(np.float32))
    assert torch.equal(refined.image, pictures * refined.selected)


PAINTERS = {kind: kind(probability=1.0) for kind in (PerlinAnomaly, SuperpixelAnomaly, PseudoAnomaly)}


@pytest.mark.parametrize("kind", PAINTERS)
@fuzz()
@given(given=images(), alone=st.booleans(), seed=st.integers(0, 2**31))
def test_painters(kind: type[PseudoAnomalyTransform], given: Images, alone: bool, seed: int) -> None:
    values = given.values
    torch.manual_seed(seed)
    if error := refused(given, floats_only=False):
        with pytest.raises(error[0], match=error[1]):
            PAINTERS[kind](values)
        return
    if alone and len(values) > 0:
        values = values[0]
    before = values.clone()
    painted, mask = PAINTERS[kind](values)
    assert same(values, before)  # the input is not written to
    assert painted.shape == values.shape
    assert painted.dtype == values.dtype
    assert mask.shape == (*values.shape[:-3], 1, *values.shape[-2:])
    assert ((mask == 0) | (mask == 1)).all()
    inside = (mask > 0).expand_as(values)
    assert same(painted[~inside], values[~inside])
    assert ((painted[inside] >= 0) & (painted[inside] <= (1 if values.is_floating_point() else 255))).all()
    # There is no paint where there is no number to change.
    if values.shape[-3] > 0:
        assert not mask[~values.isfinite().all(dim=-3, keepdim=True)].any()


def same(first: torch.Tensor, second: torch.Tensor) -> bool:
    return torch.equal(first.isnan(), second.isnan()) and torch.equal(first.nan_to_num(0), second.nan_to_num(0))


def make_model(gate: str, stage: int, dtype: torch.dtype) -> TwoStageSuperpixelModel:
    """A model whose maps spread over [0, 1], so that some superpixels are selected and some are not."""
    torch.manual_seed(1)
    model = two_stage_superpixel_model("small", gate=gate)
    if gate == "hard":
        model.refiner = SuperpixelRefiner(0.4)
    model.eval()
    for network in (model.stage_one, model.stage_two):
        with torch.no_grad():
            logits = network(torch.rand(2, network.in_channels, 64, 64) * torch.linspace(0, 1, 64))
            network.head.weight *= 5 / logits.std()
            network.head.bias[:] = (network.head.bias - logits.mean()) * 5 / logits.std() - 4
    if stage == 2:
        model.start_stage_two()
    return model.to(dtype)


MODELS = {
    (gate, stage, dtype): make_model(gate, stage, dtype)
    for gate in ("average", "hard")
    for stage in (1, 2)
    for dtype in (torch.float32, torch.bfloat16)
}


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("gate", ["average", "hard"])
@fuzz(0.25)
@given(
    given=st.one_of(
        images(channels=(3,), dtypes=(torch.float32, torch.bfloat16), sides=st.integers(64, 100)),
        images(channels=(3,), dtypes=(torch.float32,), sides=st.integers(64, 1024)),
        images(),
    ),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_forward(gate: str, stage: int, given: Images, dtype: torch.dtype) -> None:
    model, values = MODELS[gate, stage, dtype], given.values
    batch, channels, height, width = values.shape
    with torch.no_grad():
        if channels != 3:
            with pytest.raises(ValueError, match=re.escape(str(tuple(values.shape)))):
                model(values)
            return
        if min(height, width) < 64:
            with pytest.raises(ValueError, match=f"{height} x {width}.*64 x 64"):
                model(values)
            return
        if values.dtype in OTHERS:
            with pytest.raises(TypeError, match=str(values.dtype)):
                model(values)
            return
        if values.dtype != dtype:
            with pytest.raises(TypeError, match=f"{dtype}.*{values.dtype}"):
                model(values)
            values = values.to(dtype)
        output = model(values)
    assert output.anomaly_map.shape == (batch, 1, height, width)
    assert output.pred_score.shape == (batch,)
    assert output.anomaly_map.dtype == output.pred_score.dtype == torch.float32
    for i, bad in enumerate((~values.isfinite()).flatten(1).any(dim=1).tolist()):
        anomaly_map, score = output.anomaly_map[i], output.pred_score[i]
        if not bad:  # whatever is beside it in the batch
            assert ((anomaly_map >= 0) & (anomaly_map <= 1)).all()
            assert 0 <= score <= 1
        if values[i].isnan().any():  # it must not pass for good
            assert score.isnan()
        assert score.isnan() == anomaly_map.isnan().any()


def test_the_models_of_the_fuzz_select_some_superpixels_and_not_others() -> None:
    torch.manual_seed(3)
    pictures = torch.rand(2, 3, 64, 64) * torch.linspace(0, 1, 64)
    for (_, _, dtype), model in MODELS.items():
        with torch.no_grad():
            assert 0.02 < model.stages(pictures.to(dtype)).selected.mean() < 0.98
