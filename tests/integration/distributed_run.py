# SPDX-License-Identifier: Apache-2.0
"""A short training in one or more processes, for test_distributed.py.

python distributed_run.py DATASET FOLDER PROCESSES STRATEGY [zoom]

Each process writes what it saw to FOLDER.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from anomalib.data import MVTecAD
from anomalib.engine import Engine
from lightning.pytorch import Callback, seed_everything

from anomalib_twostage import TwoStageSuperpixel

SETTINGS: dict[str, Any] = {"stage_one_fraction": 0.5, "paint_probability": 1.0, "visualizer": False}


class Witness(Callback):
    """Notes the stage of every step, and the random numbers after the first."""

    def __init__(self) -> None:
        self.stages: list[int] = []
        self.random = 0.0
        self.painted: dict[str, float] = {}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.stages.append(pl_module.model.stage)
        self.random = self.random or torch.get_rng_state().double().sum().item()

    def on_train_end(self, trainer, pl_module) -> None:
        metrics = trainer.callback_metrics
        self.painted = {name: float(value) for name, value in metrics.items() if name.startswith("painted")}


def zoomed() -> TwoStageSuperpixel:
    pre_processor = TwoStageSuperpixel.configure_pre_processor((128, 128))
    return TwoStageSuperpixel(zoom=2, magnification=1.0, pre_processor=pre_processor, **SETTINGS)


def small() -> TwoStageSuperpixel:
    pre_processor = TwoStageSuperpixel.configure_pre_processor((64, 64))
    return TwoStageSuperpixel("small", segment_size=8, pre_processor=pre_processor, **SETTINGS)


def main(dataset: str, folder: str, processes: str, strategy: str, kind: str = "") -> None:
    seed_everything(0)
    data = MVTecAD(dataset, category="plate", train_batch_size=2, eval_batch_size=2, num_workers=0)
    model, steps = (zoomed(), 24) if kind == "zoom" else (small(), 120)
    witness = Witness()
    engine = Engine(
        max_steps=steps,
        max_epochs=-1,
        accelerator="cpu",
        devices=int(processes),
        strategy=strategy,
        callbacks=[witness],
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        check_val_every_n_epoch=steps // 3,
    )
    engine.fit(model, datamodule=data)
    results = engine.test(model, datamodule=data)[0]
    weights = {name: value.double().sum().item() for name, value in model.model.named_parameters()}
    seen = {name: getattr(witness, name) for name in ("stages", "random", "painted")}
    report = {**seen, "results": results, "weights": weights}
    Path(folder, f"rank{engine.trainer.global_rank}.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(*sys.argv[1:])
