# SPDX-License-Identifier: Apache-2.0
"""Training: minutes by variant and image size, and how far the predicted time is from the real one.

    python benchmarks/training_time.py --out results/training_time.md

Minutes are of 2,000 steps of 8 out of 300 images, 70 % of them stage one's, with painting, data loading and optimiser,
without validations. They follow from the steps that the model times itself, eight of each stage. Images are crops of
photographs in PNG files of the size that the model sees.

Then three whole trainings, each with validations: what the line in the log predicts after the first ten steps, and how
long the training took. `--clock cpu` counts the seconds of one thread's work instead of those that pass: on a machine
that others use as well only these can be compared.
"""

import argparse
import logging
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from _timing import Report, parse, parser
from anomalib.data import Folder
from anomalib.engine import Engine
from lightning.pytorch import Callback
from torchvision.transforms.functional import resized_crop
from torchvision.utils import save_image

from anomalib_twostage import TwoStageSuperpixel
from anomalib_twostage.inspection.training_time import TrainingTime
from anomalib_twostage.pseudo_anomaly.textures import builtin_textures

IMAGES, BATCH, STEPS, SHARE = 300, 8, 2000, 0.7
TIMED = 10  # steps that TrainingTime warms up with and times, per stage
WHOLE = [("small", 128, 120, 40), ("scratch", 128, 100, 100), ("default", 128, 100, 50)]  # steps, steps to a validation
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


class Recorder(Callback):
    """Notes what was predicted first, and how long the training took.

    Args:
        timer: What predicts.
        brief: Whether each stage is to end when it has been timed.
    """

    def __init__(self, timer: TrainingTime, brief: bool) -> None:
        self.timer = timer
        self.brief = brief
        self.predicted: float | None = None
        self.took = 0.0

    def on_fit_start(self, trainer: object, pl_module: object) -> None:
        """Begin to count."""
        del trainer, pl_module
        self.took = -self.timer.clock()

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        """Keep the first prediction."""
        del args
        self.predicted = self.predicted or self.timer.predicted
        if self.brief and pl_module.model.stage == 1 and self.timer.seconds:
            pl_module.schedule.switch = trainer.global_step
        trainer.should_stop = self.brief and len(self.timer.seconds) == 2

    def on_train_end(self, trainer: object, pl_module: object) -> None:
        """Stop."""
        del trainer, pl_module
        self.took += self.timer.clock()


def main() -> None:
    options = parser(__doc__, rounds=1)
    options.add_argument("--sizes", type=int, nargs="+", default=[128, 256], help="sides (default: %(default)s)")
    options.add_argument("--variants", nargs="+", default=["default", "scratch", "small", "paper"])
    options.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    options.add_argument("--clock", default="wall", choices=list(CLOCKS))
    arguments = parse(options)
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    report = Report(arguments, ("anomalib", "lightning"), arguments.device)
    clock = {"wall": "time that passes", "cpu": "time of the processor"}[arguments.clock]
    report.line(f"{STEPS:,} steps of {BATCH} out of {IMAGES} images, {SHARE:.0%} stage one's; {clock}.")
    report.table("variant", "size", "s per step, stage one", "s per step, stage two", "minutes")
    for variant in arguments.variants:
        for size in arguments.sizes[: 1 if variant == "paper" else None]:  # which takes minutes a step
            timer, _ = train(arguments, variant, size, steps=2 * TIMED)
            one, two = timer.seconds[1], timer.seconds[2]
            report.row(f"`{variant}`", size, one, two, STEPS * (SHARE * one + (1 - SHARE) * two) / 60)
    report.table("variant", "size", "steps", "predicted s", "real s", "predicted / real")
    for variant, size, steps, interval in WHOLE[: 1 if arguments.quick else None]:
        _, recorder = train(arguments, variant, size, steps, interval)
        assert recorder.predicted is not None
        report.row(f"`{variant}`", size, steps, recorder.predicted, recorder.took, recorder.predicted / recorder.took)


def train(
    arguments: argparse.Namespace, variant: str, size: int, steps: int, interval: int = 0
) -> tuple[TrainingTime, Recorder]:
    """Train so many steps, with a validation each time so many have passed; without, until both stages are timed."""
    pre_processor = TwoStageSuperpixel.configure_pre_processor((size, size))
    share = SHARE if interval else 0.5
    model = TwoStageSuperpixel(variant, stage_one_fraction=share, pre_processor=pre_processor, visualizer=False)
    timer = TrainingTime(CLOCKS[arguments.clock])
    recorder = Recorder(timer, brief=not interval)
    with tempfile.TemporaryDirectory() as name:
        write_images(Path(name) / "good", size)
        data = Folder(
            "crops", root=name, normal_dir="good", test_split_ratio=0.2, train_batch_size=BATCH, eval_batch_size=BATCH,
            val_split_mode="same_as_test", num_workers=0,
        )  # fmt: skip
        validation = {"val_check_interval": interval, "check_val_every_n_epoch": None}
        engine = Engine(
            max_steps=steps,
            max_epochs=-1,
            accelerator="gpu" if arguments.device == "cuda" else "cpu",
            devices=1,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[recorder, timer],
            default_root_dir=Path(name) / "results",
            **(validation if interval else {"limit_val_batches": 0}),
        )
        engine.fit(model, datamodule=data)
    return timer, recorder


def write_images(folder: Path, size: int) -> None:
    """Write crops of photographs, so many that the training gets its number of images."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    textures = builtin_textures()
    side = textures.shape[-1] // 2
    for number in range(round(IMAGES / 0.8)):
        top, left = torch.randint(side, (2,), generator=generator).tolist()
        crop = resized_crop(textures[number % len(textures)], top, left, side, side, [size, size], antialias=True)
        save_image(crop.float() / 255, folder / f"{number:03}.png")


if __name__ == "__main__":
    main()
