# SPDX-License-Identifier: Apache-2.0
"""Kill trainings with SIGKILL at random moments, resume them, and compare with one that was left alone.

    python benchmarks/reliability_kill.py --kills 10 --runs 2

Each run is killed at random moments until it has been killed so many times, resumed each time from the newest
checkpoint there is, and then finishes. Its weights and metrics must equal those of the undisturbed run bit for bit, and
every checkpoint that a kill leaves must be whole. Checkpoints are written at the end of each epoch, as anomalib does.
"""

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

EPOCHS = 30  # of 2 steps each


def write_dataset(root: Path) -> Path:
    """Grey noise, and bright squares as defects, in MVTec layout."""
    generator = np.random.default_rng(0)
    for part, count in (("train/good", 8), ("test/good", 3), ("test/square", 3)):
        for i in range(count):
            image = generator.normal(120, 8, (64, 64, 3)).clip(0, 255).astype(np.uint8)
            mask = np.zeros((64, 64), np.uint8)
            if part == "test/square":
                top, left = generator.integers(4, 40, 2)
                image[top : top + 16, left : left + 16] = 250
                mask[top : top + 16, left : left + 16] = 255
                (root / "plate/ground_truth/square").mkdir(parents=True, exist_ok=True)
                Image.fromarray(mask).save(root / f"plate/ground_truth/square/{i:03}_mask.png")
            (root / "plate" / part).mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(root / "plate" / part / f"{i:03}.png")
    return root


def train(folder: Path) -> None:
    """One process: train, from the newest checkpoint if there is one, and write weights and metrics."""
    import torch
    from anomalib.data import MVTecAD
    from anomalib.engine import Engine
    from lightning.pytorch import seed_everything
    from lightning.pytorch.callbacks import ModelCheckpoint

    from anomalib_twostage import TwoStageSuperpixel

    torch.set_num_threads(1)
    seed_everything(0)
    data = MVTecAD(folder.parent / "data", category="plate", train_batch_size=4, num_workers=0)
    pre_processor = TwoStageSuperpixel.configure_pre_processor((64, 64))
    model = TwoStageSuperpixel("small", segment_size=8, pre_processor=pre_processor, visualizer=False)
    saver = ModelCheckpoint(folder, filename="{epoch}", save_top_k=2, monitor="epoch", mode="max")
    engine = Engine(
        max_epochs=EPOCHS,
        accelerator="cpu",
        callbacks=[saver],
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        limit_val_batches=0,
    )
    newest = max(folder.glob("epoch=*.ckpt"), key=lambda path: int(path.stem.split("=")[1]), default=None)
    print(f"from {newest.name if newest else 'the start'}", flush=True)
    engine.fit(model, datamodule=data, ckpt_path=newest)
    results = engine.test(model, datamodule=data)[0]
    torch.save(model.model.state_dict(), folder / "weights.pt")
    (folder / "results.json").write_text(json.dumps(results))


def start(folder: Path) -> subprocess.Popen:
    with (folder / "log.txt").open("a") as log:
        return subprocess.Popen([sys.executable, __file__, "--train", folder], stdout=log, stderr=log)


def newest_epoch(folder: Path) -> int:
    return max((int(path.stem.split("=")[1]) for path in folder.glob("epoch=*.ckpt")), default=-1)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--train", type=Path)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--runs", type=int, default=2)
    options = parser.parse_args()
    if options.train:
        train(options.train)
        return

    import torch

    from anomalib_twostage.model.checkpoint import check_checkpoint

    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        write_dataset(root / "data")
        folders = [root / f"run{i}" for i in range(options.runs + 1)]
        for folder in folders:
            folder.mkdir()
        if start(folders[0]).wait() != 0:
            sys.exit((folders[0] / "log.txt").read_text()[-3000:])
        whole = torch.load(folders[0] / "weights.pt", weights_only=True)
        random.seed(0)
        left_over, different = 0, False
        for folder in folders[1:]:
            kills = []
            while len(kills) < options.kills:
                process, before = start(folder), newest_epoch(folder)
                # Somewhere in the work: wait until it has written something new, then for a random while.
                while newest_epoch(folder) == before and process.poll() is None:
                    time.sleep(0.01)
                time.sleep(random.uniform(0, 0.5))
                if process.poll() is not None:
                    if process.returncode != 0:
                        sys.exit((folder / "log.txt").read_text()[-3000:])
                    break
                process.send_signal(signal.SIGKILL)
                process.wait()
                kills.append(newest_epoch(folder))
                for path in folder.glob("epoch=*.ckpt"):
                    check_checkpoint(path)
                left_over += len(list(folder.glob("*.partial")))
            if not (folder / "results.json").exists() and start(folder).wait() != 0:
                sys.exit((folder / "log.txt").read_text()[-3000:])
            weights = torch.load(folder / "weights.pt", weights_only=True)
            same = all(torch.equal(value, weights[name]) for name, value in whole.items())
            results = [(path / "results.json").read_text() for path in (folders[0], folder)]
            different |= not same or results[0] != results[1]
            print(
                f"{folder.name}: killed {len(kills)} times, newest checkpoint of epoch {kills} of {EPOCHS}; "
                f"weights equal: {same}; metrics equal: {results[0] == results[1]}"
            )
        print(f"unfinished files left beside the checkpoints: {left_over}; {results[0]}")
        if different:
            sys.exit("Error: a training that was killed ended differently from the one that was left alone.")


if __name__ == "__main__":
    main()
