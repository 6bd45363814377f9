# SPDX-License-Identifier: Apache-2.0
"""Nothing waits for a device or mixes it with the host's tensors, and no device's rounding decides.

PyTorch's "meta" device stands for all that are neither CPU nor CUDA: its tensors have no values, so whatever asks for
one fails, as does most of what mixes it with the host. A mode finds the rest.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from anomalib.data import ImageBatch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from anomalib_twostage import (
    GoldenTemplate,
    PaperLoss,
    PerlinAnomaly,
    PseudoAnomaly,
    SegmentationLoss,
    SuperpixelAnomaly,
    TwoStageSuperpixel,
    slic,
)
from anomalib_twostage.common.resize import antialiased_resize
from anomalib_twostage.pseudo_anomaly import imitate_faults, vary_illumination

SIDE = 64


class OneDevice(TorchDispatchMode):
    """Fails where tensors of two devices meet, and where one is sent over while the sender waits."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, torch.Tensor)]
        if func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
            waits = not (kwargs or {}).get("non_blocking", len(args) > 2 and args[2])
        else:
            waits = True
            tensors = [tensor for tensor in tensors if tensor.ndim > 0]  # a number may stay with the host
        devices = {tensor.device.type for tensor in tensors}
        assert len(devices) < 2 or not waits, f"{func} of {sorted(devices)}"
        return result


def pictures(count: int = 4) -> torch.Tensor:
    return torch.rand(count, 3, SIDE, SIDE, device="meta")


def maps() -> torch.Tensor:
    return torch.rand(4, 1, SIDE, SIDE, device="meta")


def paints(kind: type) -> Callable[[], object]:
    painter = kind(probability=1.0).to("meta")
    return lambda: painter(pictures())


@pytest.mark.parametrize(
    "function",
    [
        lambda: slic(pictures(), segment_size=8),
        lambda: antialiased_resize(pictures(), (40, 70)),
        paints(PerlinAnomaly),
        paints(SuperpixelAnomaly),
        paints(PseudoAnomaly),
        lambda: vary_illumination(pictures()),
        lambda: imitate_faults(maps()),
        lambda: PaperLoss()(maps(), maps()),
        lambda: SegmentationLoss()(maps(), maps()),
    ],
    ids=["slic", "resize", "Perlin", "superpixel", "both", "light", "faults", "paper loss", "loss"],
)
def test_parts_stay_on_their_device(function: Callable[[], object]) -> None:
    with OneDevice():
        function()


def make_model(variant: str, stage: int) -> TwoStageSuperpixel:
    model = TwoStageSuperpixel(variant, segment_size=8, visualizer=False)
    if model.model.template is not None:
        model.model.template.fit(torch.full((3, SIDE, SIDE), number / 8) for number in range(8))
        model.model.template.gallery = torch.zeros(8, 3, SIDE, SIDE, dtype=torch.uint8)
        model.model.template.keys = torch.zeros(8, 3 * 32 * 32)
    if stage == 2:
        model.model.start_stage_two()
    return model.to("meta")


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("variant", ["small", "paper"])
class TestModel:
    def test_forward_stays_on_its_device(self, variant: str, stage: int) -> None:
        model = make_model(variant, stage).model.eval()
        with OneDevice(), torch.no_grad():
            model(pictures())

    def test_the_training_step_stays_on_its_device(
        self, variant: str, stage: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model = make_model(variant, stage).train()
        monkeypatch.setattr(model, "painter", PseudoAnomaly(probability=1.0).to("meta"))
        logged: dict[str, Any] = {}
        monkeypatch.setattr(model, "log", lambda name, value, **options: logged.update({name: value}))
        with OneDevice():
            model.training_step(ImageBatch(image=pictures()))["loss"].backward()
        # Lightning sends a plain number over, and waits until it is there.
        assert all(value.is_meta for value in logged.values())


class RoundedProducts(TorchDispatchMode):
    """Rounds the factors of matrix products to eleven bits, as TF32 does where a user allows it."""

    PRODUCTS = ("mm", "bmm", "addmm", "baddbmm", "baddbmm_", "addbmm", "mv", "dot")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in self.PRODUCTS:
            args = (*args[:-2], *(self.rounded(factor) for factor in args[-2:]))
        return func(*args, **(kwargs or {}))

    @staticmethod
    def rounded(values: torch.Tensor) -> torch.Tensor:
        bits = values.contiguous().view(torch.int32)
        return ((bits + (1 << 12)) & ~((1 << 13) - 1)).view(torch.float32)


def test_rounded_products_are_rounded() -> None:
    first, second = torch.rand(2, 8, 8)
    with RoundedProducts():
        found = first @ second
    assert not torch.equal(found, first @ second)
    torch.testing.assert_close(found, first @ second, atol=0, rtol=2**-10)


@pytest.mark.parametrize("segment_size", [5, 16])
def test_rounded_products_do_not_move_labels(segment_size: int) -> None:
    images = torch.rand(2, 3, SIDE, SIDE)
    with RoundedProducts():
        labels = slic(images, segment_size=segment_size)
    assert torch.equal(labels, slic(images, segment_size=segment_size))


def test_rounded_products_do_not_move_deviations() -> None:
    poses = torch.rand(4, 1, 3, 32, 32) + 0.01 * torch.rand(4, 30, 3, 32, 32)  # of each so many that digits decide
    images, good = poses[:, 0], poses[:, 1:].flatten(0, 1)
    template = GoldenTemplate().eval()
    template.gallery = torch.randint(256, good.shape, dtype=torch.uint8)
    template.keys = (good - good.mean(dim=(-2, -1), keepdim=True)).flatten(1)
    with RoundedProducts():
        found = template(images)
    assert torch.equal(found, template(images))
