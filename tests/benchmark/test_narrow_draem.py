# SPDX-License-Identifier: Apache-2.0
from pathlib import Path

import numpy as np
import pytest
import torch
from anomalib.models import Draem
from anomalib.models.image.draem.torch_model import DraemModel
from PIL import Image
from torch import nn

from anomalib_twostage.benchmark import NarrowDraem


@pytest.fixture
def dtd(tmp_path: Path) -> Path:
    Image.fromarray(np.full((32, 32, 3), 90, np.uint8)).save(tmp_path / "texture.png")
    return tmp_path


def channels(model: nn.Module) -> list[tuple[int, int]]:
    return [(layer.in_channels, layer.out_channels) for layer in model.modules() if isinstance(layer, nn.Conv2d)]


def test_every_inner_width_is_divided(dtd: Path) -> None:
    with torch.device("meta"):
        full = channels(DraemModel())
    narrow = channels(NarrowDraem(width_divisor=16, dtd_dir=dtd).model)
    outer = {2, 3, 6}  # channels of images, of an image with its reconstruction, and of the answer
    assert narrow == [tuple(n if n in outer else n // 16 for n in pair) for pair in full]


def test_all_else_is_draem(dtd: Path) -> None:
    model = NarrowDraem(width_divisor=32, dtd_dir=dtd, beta=0.5)
    assert isinstance(model, Draem)
    assert model.augmenter.blend_factor == 0.5
    assert model.training_step.__func__ is Draem.training_step
    assert model.configure_optimizers.__func__ is Draem.configure_optimizers


def test_sspcab_listens_to_the_narrow_network(dtd: Path) -> None:
    model = NarrowDraem(width_divisor=16, dtd_dir=dtd, enable_sspcab=True)
    model.model(torch.rand(2, 3, 32, 32))
    assert model.sspcab_activations["input"].shape[1] == 128 * 8 // 16


@pytest.mark.parametrize("divisor", [0, 3, 128])
def test_divisor_must_divide(divisor: int, dtd: Path) -> None:
    with pytest.raises(ValueError, match=f"width_divisor must divide 64, got {divisor}"):
        NarrowDraem(width_divisor=divisor, dtd_dir=dtd)
