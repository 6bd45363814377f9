# SPDX-License-Identifier: Apache-2.0
"""Reduced precision, determinism: a short run of both stages on the CPU."""

from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, seed_everything

from anomalib_twostage import TwoStageSuperpixel
from anomalib_twostage.model.loss import PaperLoss, SegmentationLoss
from anomalib_twostage.model.variants import two_stage_superpixel_model
from tests.integration.conftest import write_dataset
from tests.model.test_lightning_model import make_data, make_engine, make_model


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data"))


class Watch(Callback):
    """Notes losses, and that every gradient is a number."""

    def __init__(self) -> None:
        self.losses: dict[int, list[float]] = {1: [], 2: []}

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        for name, parameter in pl_module.named_parameters():
            assert parameter.grad is None or parameter.grad.isfinite().all(), name

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.losses[pl_module.model.stage].append(float(outputs["loss"]))


def train(dataset: Path, folder: Path, loss: str = "default", **options) -> tuple[TwoStageSuperpixel, dict, Watch]:
    seed_everything(0)
    watch, model = Watch(), make_model(loss=loss, stage_one_fraction=0.5)
    engine = make_engine(folder, max_epochs=6, callbacks=[watch], **options)
    (results,) = engine.train(model, datamodule=make_data(dataset))
    return model, results, watch


@pytest.mark.filterwarnings("ignore::UserWarning")  # on a CPU Lightning takes bfloat16 for float16, and says so
@pytest.mark.parametrize("loss", ["default", "paper"])
@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_mixed_precision_stays_finite_over_both_stages(
    precision: str, loss: str, dataset: Path, tmp_path: Path
) -> None:
    model, results, watch = train(dataset, tmp_path, loss, precision=precision)
    for losses in watch.losses.values():
        assert len(losses) == 9
        assert torch.tensor(losses).isfinite().all()
    assert all(value.isfinite().all() for value in model.model.state_dict().values())
    assert all(0 <= value <= 1 for value in results.values())


@pytest.mark.parametrize("gate_and_loss", [("average", SegmentationLoss), ("hard", PaperLoss)])
def test_float16_autocast_stays_finite_over_both_stages(gate_and_loss: tuple) -> None:
    gate, loss = gate_and_loss[0], gate_and_loss[1]()
    model = two_stage_superpixel_model("small", segment_size=8, gate=gate)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for step in range(12):
        if step == 6:
            model.start_stage_two()
        images = torch.rand(2, 3, 64, 64)
        mask = torch.zeros(2, 1, 64, 64)
        images[:, :, 20:40, 20:40] = 1
        mask[:, :, 20:40, 20:40] = 1
        with torch.autocast("cpu", dtype=torch.float16):
            logits = model.stage_one(*model.seen(images).levels) if step < 6 else model.stages(images).stage_two_logits
            value = loss(logits, mask)
        value.backward()
        assert value.isfinite()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    with torch.autocast("cpu", dtype=torch.float16), torch.no_grad():
        output = model(torch.rand(2, 3, 64, 64))
    assert output.anomaly_map.dtype == torch.float32
    assert output.anomaly_map.isfinite().all()


@pytest.mark.parametrize("precision", ["bf16-true", "16-true", "64-true"])
def test_precisions_that_cannot_work_are_refused_by_name(precision: str, dataset: Path, tmp_path: Path) -> None:
    for run in ("fit", "test"):
        engine = make_engine(tmp_path, max_epochs=1, precision=precision)
        with pytest.raises(ValueError, match=f"{precision}.*bf16-mixed"):
            getattr(engine, run)(make_model(), datamodule=make_data(dataset))


def test_a_seed_repeats_a_run_and_deterministic_algorithms_suffice(dataset: Path, tmp_path: Path) -> None:
    try:
        (first, results, _), (second, again, _) = (train(dataset, tmp_path, deterministic=True) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert results == again
    for name, value in first.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[name]), name
