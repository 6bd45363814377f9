# SPDX-License-Identifier: Apache-2.0
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from .commands import run_command

SIZE = 64


def write_dataset(root: Path, train: int = 6, good: int = 3, defective: int = 3) -> Path:
    """Write a tiny data set in MVTec layout: grey noise, and bright squares as defects."""
    generator = np.random.default_rng(0)

    def surface() -> np.ndarray:
        return generator.normal(120, 8, (SIZE, SIZE, 3)).clip(0, 255).astype(np.uint8)

    def save(array: np.ndarray, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(path)

    for i in range(train):
        save(surface(), root / "plate/train/good" / f"{i:03}.png")
    for i in range(good):
        save(surface(), root / "plate/test/good" / f"{i:03}.png")
    for i in range(defective):
        image, mask = surface(), np.zeros((SIZE, SIZE), np.uint8)
        top, left = generator.integers(4, 40, 2)
        image[top : top + 16, left : left + 16] = 250
        mask[top : top + 16, left : left + 16] = 255
        save(image, root / "plate/test/square" / f"{i:03}.png")
        save(mask, root / "plate/ground_truth/square" / f"{i:03}_mask.png")
    return root


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def config(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete configuration of the stock command, small enough for seconds on a CPU."""
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    resize = {"class_path": "torchvision.transforms.v2.Resize", "init_args": {"size": [SIZE, SIZE]}}
    pre_processor = {"class_path": "anomalib.pre_processing.PreProcessor", "init_args": {"transform": resize}}
    settings = {
        "seed_everything": 0,
        "model": {
            "class_path": "TwoStageSuperpixel",
            "init_args": {"variant": "small", "segment_size": 8, "pre_processor": pre_processor},
        },
        "data": {
            "class_path": "anomalib.data.MVTecAD",
            "init_args": {
                "root": str(dataset),
                "category": "plate",
                "train_batch_size": 3,
                "eval_batch_size": 3,
                "num_workers": 0,
            },
        },
        "trainer": {"max_epochs": 3, "accelerator": "cpu", "logger": False, "enable_progress_bar": False},
    }
    path.write_text(yaml.safe_dump(settings))
    return path


def run_anomalib(*arguments: str | Path, cwd: Path, **environment: str) -> str:
    """Run the stock `anomalib` command of this environment; returns what it printed."""
    return "".join(run_command(["anomalib", *map(str, arguments)], cwd, **environment))


def blocks(page: str, language: str) -> list[str]:
    """The code blocks of a language on a page, commands in one line each."""
    found = re.findall(rf"```{language}\n(.*?)```", page, flags=re.DOTALL)
    return [block.replace("\\\n", " ").strip() for block in found]


def command_with(page: str, word: str) -> str:
    """The one command on a page that holds a word."""
    (command,) = (block for block in blocks(page, "bash") if word in block)
    return command


def run(command: str, folder: Path) -> str:
    """Run a line of shell, one command with variables before it; returns what it printed."""
    words = shlex.split(command)
    number = next(i for i, word in enumerate(words) if "=" not in word)
    variables = dict(word.split("=", 1) for word in words[:number])
    return run_command(words[number:], folder, **variables)[0]


@pytest.fixture(scope="session")
def trained(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a finished `anomalib train`; holds `checkpoint`, a link to the saved model."""
    folder = tmp_path_factory.mktemp("trained")
    # Long enough to tell defects from noise: normalised by its range, a map that is all alike is all rounding error.
    epochs = ("--trainer.max_epochs", "40", "--trainer.check_val_every_n_epoch", "40")
    # This once as users do: a program of its own, not a fork.
    command = [Path(sys.executable).with_name("anomalib"), "train", "--config", config, *epochs]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([*command, "--default_root_dir", folder / "results"], cwd=folder, env=environment, check=True)
    checkpoints = sorted(folder.rglob("*.ckpt"))
    assert checkpoints
    (folder / "checkpoint").symlink_to(checkpoints[-1])
    return folder
