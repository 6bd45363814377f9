# SPDX-License-Identifier: Apache-2.0
"""The models that the benchmarks time: ours in a known state, and built-in ones that need no download."""

import math
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from anomalib.models import Draem
from anomalib.models.image.dsr.torch_model import DsrModel
from anomalib.models.image.efficient_ad.torch_model import EfficientAdModel
from anomalib.models.image.fastflow.torch_model import FastflowModel
from anomalib.models.image.patchcore.torch_model import PatchcoreModel
from skimage import data

from anomalib_twostage import TwoStageSuperpixel, TwoStageSuperpixelModel
from anomalib_twostage.model.feature_model import FeatureTemplate
from anomalib_twostage.model.variants import two_stage_superpixel_model

_MARGIN = 4.0  # in logits, of which bfloat16 rounds off some hundredths


def photograph(side: int) -> torch.Tensor:
    """A photograph ``(1, 3, side, side)`` in [0, 1]."""
    image = torch.from_numpy(data.astronaut()).permute(2, 0, 1).unsqueeze(0).float() / 255
    if side > image.shape[-1]:
        return torch.nn.functional.interpolate(image, size=(side, side), mode="bilinear", antialias=True)
    return image[..., :side, :side].contiguous()


def flat(side: int) -> torch.Tensor:
    """An image of one colour, ``(1, 3, side, side)``."""
    return torch.full((1, 3, side, side), 0.5)


def fill_template(model: TwoStageSuperpixelModel, side: int, count: int = 300) -> None:
    """Give the model the template of that many good images of that size; time does not depend on what they show."""
    if isinstance(model.template, FeatureTemplate):
        seen, _ = model.template.magnified_size(side, side)
        for statistics, stride in zip(model.template.statistics, (8, 8, 16), strict=False):
            statistics.mean = torch.randn(len(statistics.middle), math.ceil(seen / stride), math.ceil(seen / stride))
        for memory in model.template.memories:
            memory.patches = torch.randn(memory.size, memory.patches.shape[1])
            memory.sources = torch.zeros(memory.size, dtype=torch.int64)
    elif model.template is not None:
        good, state = min(side, 128), model.template.state_dict()
        state["mean"], state["spread"] = torch.rand(3, side, side), torch.rand(3, side, side)
        state["gallery"] = torch.randint(256, (count, 3, good, good), dtype=torch.uint8)
        state["keys"] = torch.randn(count, state["keys"].shape[1])
        model.template.load_state_dict(state)


@torch.no_grad()
def select_on_photograph_only(model: TwoStageSuperpixelModel, side: int) -> None:
    """Have stage one mark a few pixels of :func:`photograph` and none of :func:`flat`, whatever its weights.

    Time depends on whether something is selected, not on what. The last layer is set to look for the features of that
    pixel of the photograph which are least like the flat image's. The photograph's highest logit lies as far above the
    threshold as the flat image's highest below it, too far for a runtime's rounding to exchange them.

    Raises:
        RuntimeError: If the two images cannot be told apart.
    """
    head, features = model.stage_one.head, []
    images = flat(side), photograph(side)
    watch = head.register_forward_pre_hook(lambda _, inputs: features.append(inputs[0][0].flatten(1)))
    for image in images:
        model.stage_one(*model.seen(image).levels)
    watch.remove()
    apart = features[1] - features[0].mean(dim=1, keepdim=True)
    head.bias.zero_()
    head.weight.copy_(apart[:, apart.square().sum(dim=0).argmax()].view_as(head.weight))
    low, high = (model.stage_one(*model.seen(image).levels).max() for image in images)
    scale = 2 * _MARGIN / (high - low)
    head.weight.mul_(scale)
    threshold = math.log(model.refiner.threshold / (1 - model.refiner.threshold))
    head.bias.fill_(threshold - _MARGIN - float(low * scale))
    selected = [bool(model.stages(image).selected.any()) for image in images]
    if selected != [False, True]:
        msg = "Random weights tell the two images not apart; take another seed."
        raise RuntimeError(msg)


def ours(variant: str, side: int) -> TwoStageSuperpixelModel:
    """A variant that runs both stages on :func:`photograph` and stage one alone on :func:`flat`."""
    model = two_stage_superpixel_model(variant).eval()
    model.start_stage_two()
    fill_template(model, side)
    select_on_photograph_only(model, side)
    return model


def our_module(variant: str, side: int) -> TwoStageSuperpixel:
    """The same as Lightning module, to export and train."""
    module = TwoStageSuperpixel(variant, visualizer=False).eval()
    module.model.start_stage_two()
    fill_template(module.model, side)
    select_on_photograph_only(module.model, side)
    return module


def draem_module(textures: Path | None = None) -> Draem:
    """Draem; it looks for textures as soon as it is made, and downloads them where there is no such folder."""
    if textures is not None:
        return Draem(dtd_dir=textures, visualizer=False)
    with tempfile.TemporaryDirectory() as folder:
        return Draem(dtd_dir=folder, visualizer=False)


def patchcore(images: int = 209) -> PatchcoreModel:
    """Patchcore with the default's backbone and a hundredth of the patches of that many images of 256 x 256 pixels."""
    model = PatchcoreModel(["blocks.2", "blocks.4"], backbone="efficientnet_lite0_offline", pre_trained=False)
    model.memory_bank = torch.randn(images * 32 * 32 // 100, 40 + 112)
    return model


def builtins(side: int) -> dict[str, Callable[[], torch.nn.Module]]:
    """Built-in models that can be made without a download, by name; weights are random."""
    return {
        "Draem": lambda: draem_module().model,
        "Dsr": DsrModel,
        "EfficientAd (S)": EfficientAdModel,
        "Patchcore (same backbone)": patchcore,
        "Fastflow (ResNet-18)": lambda: FastflowModel((side, side), backbone="resnet18", pre_trained=False),
    }
