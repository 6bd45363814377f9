# SPDX-License-Identifier: Apache-2.0
"""Training: images per second of each variant against Draem, painting included.

    python benchmarks/training_speed.py --out results/training_speed.md

Each round is a short run of anomalib's Engine per model, on the same images, resized to 128 x 128 pixels, in batches
of 4; both paint with the same folder of photographs, and ours paints every second image as Draem does. A step is the
time from the end of the step before to its own end: data loading, painting, both passes and the optimiser. The first
step of each stage warms up and is not counted. "Schedule" is the mean over a run with the default share of stage one.
"""

import logging
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _models import draem_module
from _timing import Report, paired_ratio, parse, parser, synchronize
from anomalib.engine import Engine
from anomalib.models.components import AnomalibModule
from anomalib.pre_processing import PreProcessor
from lightning.pytorch import Callback
from PIL import Image
from torchvision.transforms.v2 import Resize

from anomalib_twostage import SampleTextures, TwoStageSuperpixel
from anomalib_twostage.model.variants import VARIANTS
from anomalib_twostage.pseudo_anomaly.textures import builtin_textures

SHARE = 0.7  # of stage one, the default


class StepTimes(Callback):
    """Seconds of every step but the first."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_batch_end(self, trainer: object, pl_module: AnomalibModule, *args: Any) -> None:
        """Note the time once the device is done."""
        del trainer, args
        synchronize(str(pl_module.device))
        self.ends.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """Seconds of the second step and those after it."""
        return [end - start for start, end in zip(self.ends[:-1], self.ends[1:], strict=True)]


def main() -> None:
    options = parser(__doc__, rounds=2)
    options.add_argument("--batch", type=int, default=4, help="images at once (default: %(default)s)")
    options.add_argument("--size", type=int, default=128, help="side of the images (default: %(default)s)")
    options.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    options.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    arguments = parse(options)
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    report = Report(arguments, ("anomalib", "lightning"), arguments.device)
    report.line(f"{arguments.size} x {arguments.size} pixels, batches of {arguments.batch}.")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        textures = folder / "textures"
        textures.mkdir()
        for i, texture in enumerate(builtin_textures()):
            Image.fromarray(texture.permute(1, 2, 0).numpy()).save(textures / f"{i}.png")
        seconds = measure(arguments, folder, textures)
    report.table("model", "ms per step", "images per second", "its / Draem's")
    for title, values in seconds.items():
        speed = arguments.batch / statistics.median(values)
        report.row(title, 1e3 * statistics.median(values), speed, paired_ratio(seconds["Draem"], values))


def measure(arguments: Any, folder: Path, textures: Path) -> dict[str, list[float]]:
    """Seconds per step, one entry a round."""

    def ours(variant: str) -> Callable[[], AnomalibModule]:
        return lambda: TwoStageSuperpixel(
            variant, stage_one_fraction=0.5, paint_probability=0.5, texture_dir=textures, visualizer=False
        )

    def run(module: AnomalibModule, steps: int) -> list[float]:
        module.pre_processor = PreProcessor(Resize([arguments.size, arguments.size], antialias=True))
        data = SampleTextures(root=folder / "data", train_batch_size=arguments.batch)
        times = StepTimes()
        engine = Engine(
            max_steps=steps,
            max_epochs=-1,
            limit_val_batches=0,
            accelerator="gpu" if arguments.device == "cuda" else "cpu",
            devices=1,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[times],
            default_root_dir=folder / "results",
        )
        engine.fit(module, datamodule=data)
        return times.seconds()

    seconds: dict[str, list[float]] = {}

    def note(title: str, value: float) -> None:
        seconds.setdefault(title, []).append(value)

    for _ in range(arguments.rounds):
        torch.manual_seed(0)
        for variant in arguments.variants:
            first, _, second = run(ours(variant)(), steps=4)
            note(f"`{variant}`, stage one", first)
            note(f"`{variant}`, stage two", second)
            note(f"`{variant}`, schedule", SHARE * first + (1 - SHARE) * second)
        note("Draem", run(draem_module(textures), steps=2)[0])
    return seconds


if __name__ == "__main__":
    main()
