# SPDX-License-Identifier: Apache-2.0
"""One training of a comparison, in a process of its own: only so is its peak memory its own.

The process reads one line of JSON from standard input, :class:`RunSettings`, and answers on standard output with
lines of JSON: ``{"phase": ..., "step": ..., "steps": ...}`` as it goes, and ``{"rows": [...]}`` at the end. All else
that is printed goes to standard error. When standard input closes, the other side is gone, and the process ends.
"""

import json
import os
import platform
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from tempfile import TemporaryDirectory
from typing import Any, TypedDict

import torch
from anomalib.callbacks import ModelCheckpoint
from anomalib.data import AnomalibDataModule, ImageBatch
from anomalib.engine import Engine
from anomalib.models import AnomalibModule
from jsonargparse import ArgumentParser
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything

from .measure import as_the_model_sees, cost_of_inference, quality, synchronize
from .table import Row, RunKey

__all__ = ["RunSettings", "add_run_arguments", "run"]

_COLD_STEPS = 4
_FEWEST_TIMED_STEPS = 10
_TIMED_SHARE = 0.1  # of the seconds that the training itself may take, as far as there are enough of them

Progress = Callable[[str, int, int], None]


class RunSettings(TypedDict):
    """One training: JSON values only.

    Attributes:
        label: Name of the model in the table.
        category: Name of the category in the table.
        seed: Seed of everything.
        model: ``class_path`` and ``init_args`` of the model.
        data: ``class_path`` and ``init_args`` of the datamodule.
        trainer: Arguments of Lightning's trainer.
        max_seconds: Training time to convert into a number of steps, or ``None`` for the trainer's ``max_steps``.
    """

    label: str
    category: str
    seed: int
    model: dict[str, Any]
    data: dict[str, Any]
    trainer: dict[str, Any]
    max_seconds: float | None


def add_run_arguments(parser: ArgumentParser) -> None:
    """Add the datamodule and the trainer, as anomalib's command line has them."""
    parser.add_subclass_arguments(AnomalibDataModule, "data", fail_untyped=False, required=True)
    parser.add_class_arguments(Trainer, "trainer", fail_untyped=False, instantiate=False, sub_configs=True)


def run(settings: RunSettings, progress: Progress) -> list[Row]:
    """Train a model and measure it as its last step left it.

    Args:
        settings: What to train.
        progress: Called with the phase, the steps done and the steps to do.

    Returns:
        Rows of the table, one per map, the final map's last.
    """
    steps = settings["trainer"].get("max_steps", -1)
    seconds = settings["max_seconds"]
    if seconds is not None:
        steps = _affordable_steps(settings, seconds, progress)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    trained = _train(settings, steps, lambda step: progress("training", step, steps))
    memory = _peak_memory_mib(trained.device)

    progress("measuring", steps, steps)
    model = trained.model.to(trained.device).eval()
    metrics = quality(model, trained.data.test_dataloader())
    images, _ = as_the_model_sees(model, next(iter(trained.data.test_dataloader())))
    costs = {
        "model": type(model).__name__,
        **cost_of_inference(model, images.to(trained.device)),
        "max seconds": seconds,
        "steps": trained.steps,
        "images": trained.images,
        "training seconds": round(trained.seconds, 2),
        "training images/s": round(trained.images / trained.seconds, 3) if trained.seconds else None,
        "peak memory MiB": memory,
        "device": _device_name(trained.device),
        "threads": torch.get_num_threads(),
        "precision": trained.precision,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "anomalib": version("anomalib"),
        "anomalib-twostage": version("anomalib-twostage"),
    }
    key = RunKey(settings["label"], settings["category"], settings["seed"])._asdict()
    rows: list[Row] = [{**key, "map": name, **values} for name, values in metrics.items()]
    rows[-1].update(costs)
    return rows


@dataclass
class _Trained:
    model: AnomalibModule
    data: AnomalibDataModule
    device: torch.device
    precision: str
    steps: int
    batches_per_epoch: int
    images: int
    seconds: float
    seconds_before: float  # of these, before the first step


class _Meter(Callback):
    """Time and images of the training loop, the loading of images included."""

    def __init__(self, report: Callable[[int], None]) -> None:
        self.report = report
        self.images = 0
        self.seconds = self.seconds_before = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        del trainer
        synchronize(pl_module.device)
        self.start = time.perf_counter()

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: ImageBatch, batch_idx: int
    ) -> None:
        del trainer, batch, batch_idx
        if not self.images:
            synchronize(pl_module.device)
            self.seconds_before = time.perf_counter() - self.start

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: ImageBatch,
        batch_idx: int,
    ) -> None:
        del pl_module, outputs, batch_idx
        assert isinstance(batch.image, torch.Tensor)
        self.images += len(batch.image)
        self.report(trainer.global_step)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        del trainer
        synchronize(pl_module.device)
        self.seconds = time.perf_counter() - self.start


def _train(settings: RunSettings, steps: int, report: Callable[[int], None]) -> _Trained:
    """Train for a number of optimiser steps, without validation: that would look at the test images."""
    seed_everything(settings["seed"], workers=True)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(AnomalibModule, "model", fail_untyped=False, required=True)
    add_run_arguments(parser)
    parts = {"model": settings["model"], "data": settings["data"], "trainer": settings["trainer"]}
    config = parser.instantiate_classes(parser.parse_object(parts))
    arguments = {name: value for name, value in config.trainer.items() if value is not None}
    if arguments.get("devices", "auto") == "auto":
        arguments["devices"] = 1  # of several GPUs Lightning would take all
    meter = _Meter(report)
    # A checkpoint callback that saves nothing keeps the engine from adding one that saves after every epoch.
    given = arguments.pop("callbacks", [])
    callbacks = [*(given if isinstance(given, list) else [given]), ModelCheckpoint(save_top_k=0), meter]
    with TemporaryDirectory() as folder:
        arguments |= {
            "max_steps": steps,
            "limit_val_batches": 0,
            "default_root_dir": folder,
            "enable_progress_bar": False,
            "enable_model_summary": False,
        }
        engine = Engine(callbacks=callbacks, **arguments)
        engine.fit(model=config.model, datamodule=config.data)
    trainer = engine.trainer
    return _Trained(
        model=config.model,
        data=config.data,
        device=trainer.strategy.root_device,
        precision=str(trainer.precision),
        steps=trainer.global_step,
        batches_per_epoch=int(trainer.num_training_batches),
        images=meter.images,
        seconds=meter.seconds,
        seconds_before=meter.seconds_before,
    )


def _affordable_steps(settings: RunSettings, seconds: float, progress: Progress) -> int:
    """Optimiser steps that take about so many seconds, judged by a short training of the same kind.

    The short training is a whole run, so a model that shares out its run between stages shares out this one too, and
    its mean step is the long run's; what comes before the first step, however many follow, is taken off. A yet shorter
    one goes before it, because the first steps of a process are slow.
    """
    cold = _train(settings, _COLD_STEPS, lambda step: progress("warming up", step, _COLD_STEPS))
    if cold.steps == 0:  # a model that does not train
        return _COLD_STEPS
    affordable = int(_TIMED_SHARE * seconds * cold.steps / (cold.seconds - cold.seconds_before))
    timed_steps = max(_FEWEST_TIMED_STEPS, min(affordable, 2 * cold.batches_per_epoch))
    timed = _train(settings, timed_steps, lambda step: progress("timing", step, timed_steps))
    stepping = timed.seconds - timed.seconds_before
    return max(2, round((seconds - timed.seconds_before) * timed.steps / stepping))


def _peak_memory_mib(device: torch.device) -> float | None:
    """Peak memory of this process so far, of the device where that can be told."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**20, 1)
    if sys.platform == "win32":
        return None
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (2**20 if sys.platform == "darwin" else 2**10), 1)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} ({platform.machine()})"


def _first_line(descriptor: int) -> bytes:
    line = b""
    while not line.endswith(b"\n"):
        part = os.read(descriptor, 1 << 16)
        if not part:
            break
        line += part
    return line


def _end_with(descriptor: int) -> None:
    """End this process when the other end of the pipe is closed."""
    while os.read(descriptor, 1 << 10):
        pass
    os._exit(1)


def main() -> None:
    """Serve one run; see the module's description."""
    # The descriptors themselves: the data loader's processes, forks of this one, close the object `sys.stdin`, and
    # would wait for ever for its lock, which the waiting thread holds.
    requests, answers = os.dup(0), os.dup(1)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(2, 1)
    settings: RunSettings = json.loads(_first_line(requests))
    threading.Thread(target=_end_with, args=(requests,), daemon=True).start()
    with os.fdopen(answers, "w", encoding="utf-8") as answer:

        def tell(message: dict[str, Any]) -> None:
            print(json.dumps(message), file=answer, flush=True)

        rows = run(settings, lambda phase, step, steps: tell({"phase": phase, "step": step, "steps": steps}))
        tell({"rows": rows})


if __name__ == "__main__":
    main()
