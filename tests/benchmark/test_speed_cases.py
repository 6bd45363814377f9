# SPDX-License-Identifier: Apache-2.0
"""What the speed benchmarks time: images are what they are called, whatever rounds, and models as if trained."""

import sys
from pathlib import Path

import pytest
import torch

from anomalib_twostage import TwoStageSuperpixelModel
from anomalib_twostage.model.variants import two_stage_superpixel_model

SIDE = 64


@pytest.fixture(autouse=True)
def _benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    monkeypatch.delitem(sys.modules, "_models", raising=False)


@pytest.mark.parametrize("variant", ["small", "scratch", "default", "paper"])
@pytest.mark.parametrize("rounds", [False, True], ids=["float32", "bfloat16"])
def test_stage_one_selects_with_a_margin(variant: str, rounds: bool) -> None:
    from _models import flat, ours, photograph

    torch.manual_seed(0)
    model: TwoStageSuperpixelModel = ours(variant, SIDE)
    threshold = torch.tensor(model.refiner.threshold).logit()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=rounds):
        good, defective = (
            model.stage_one(*model.seen(image).levels).float().max() for image in (flat(SIDE), photograph(SIDE))
        )
    assert good + 1 < threshold < defective - 1


def test_the_timed_memory_is_as_large_as_a_trained_one() -> None:
    from _models import ours, photograph

    timed, trained = ours("default", SIDE).template, two_stage_superpixel_model("default").template
    trained.fit([(photograph(SIDE)[0], 0)])
    for filled, fitted in zip(timed.statistics[:3], trained.statistics[:3], strict=True):
        assert filled.mean.shape == fitted.mean.shape
