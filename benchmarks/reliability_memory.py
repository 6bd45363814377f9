# SPDX-License-Identifier: Apache-2.0
"""Whether memory stays flat over a long training and many predictions, on tiny images and the CPU.

python benchmarks/reliability_memory.py --steps 500 --predictions 2000

Prints the memory of the process (resident set, MiB) at a tenth of each run and at its end, and by how much it grew. The
two stages of training are two runs: when stage two begins, the optimiser keeps its state as well.
"""

import argparse
import os
import tempfile
from pathlib import Path

import numpy as np
import torch
from anomalib.data import Folder, PredictDataset
from anomalib.engine import Engine
from lightning.pytorch import Callback, seed_everything
from PIL import Image

from anomalib_twostage import TwoStageSuperpixel


def resident() -> float:
    """Resident set of this process in MiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


class Meter(Callback):
    """Notes the memory after every batch."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, *arguments: object) -> None:
        """Note the memory."""
        del arguments
        self.values.append(resident())

    def on_predict_batch_end(self, *arguments: object) -> None:
        """Note the memory."""
        del arguments
        self.values.append(resident())


def report(what: str, values: list[float]) -> None:
    early, late = values[len(values) // 10], values[-1]
    first = len(values) // 10 + 1
    print(f"{what}: {early:.1f} MiB after {first}, {late:.1f} MiB after {len(values)}: {late - early:+.1f} MiB")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--predictions", type=int, default=2000)
    options = parser.parse_args()
    torch.set_num_threads(1)
    seed_everything(0)
    generator = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        for folder, count in (("good", 16), ("new", options.predictions)):
            (root / folder).mkdir()
            for i in range(count):
                pixels = generator.normal(120, 20, (64, 64, 3)).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(root / folder / f"{i:05}.png")
        quiet = {"logger": False, "enable_progress_bar": False, "accelerator": "cpu", "default_root_dir": root}

        def make_model() -> TwoStageSuperpixel:
            pre_processor = TwoStageSuperpixel.configure_pre_processor((64, 64))
            return TwoStageSuperpixel("small", segment_size=8, pre_processor=pre_processor, visualizer=False)

        model, meter = make_model(), Meter()
        data = Folder("parts", root=root, normal_dir="good", train_batch_size=4, num_workers=0)
        Engine(callbacks=[meter], max_steps=options.steps, max_epochs=-1, **quiet).fit(model, datamodule=data)
        first = round(0.7 * options.steps)
        report("stage one, steps", meter.values[:first])
        report("stage two, steps", meter.values[first:])

        meter = Meter()
        engine = Engine(callbacks=[meter], **quiet)
        dataset = PredictDataset(root / "new")
        engine.predict(model, dataset=dataset, return_predictions=False)
        report("Engine.predict, images", meter.values)

        network, values = model.model.eval(), []
        images = torch.rand(1, 3, 64, 64)
        with torch.inference_mode():
            for i in range(options.predictions):
                # Sizes that change from call to call are the hard case for caches.
                network(images if i % 2 else torch.rand(1, 3, 64 + i % 7, 64 + i % 5))
                values.append(resident())
        report("the bare model, calls of changing size", values)


if __name__ == "__main__":
    main()
