# SPDX-License-Identifier: Apache-2.0
"""The good and the defective image of the speed benchmarks are what they are called, whatever rounds."""

import sys
from pathlib import Path

import pytest
import torch

from anomalib_twostage import TwoStageSuperpixelModel

SIDE = 64


@pytest.mark.parametrize("variant", ["small", "scratch", "default", "paper"])
@pytest.mark.parametrize("rounds", [False, True], ids=["float32", "bfloat16"])
def test_stage_one_selects_with_a_margin(variant: str, rounds: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    monkeypatch.delitem(sys.modules, "_models", raising=False)
    from _models import flat, ours, photograph

    torch.manual_seed(0)
    model: TwoStageSuperpixelModel = ours(variant, SIDE)
    threshold = torch.tensor(model.refiner.threshold).logit()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=rounds):
        good, defective = (
            model.stage_one(*model.seen(image).levels).float().max() for image in (flat(SIDE), photograph(SIDE))
        )
    assert good + 1 < threshold < defective - 1
