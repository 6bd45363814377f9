# SPDX-License-Identifier: Apache-2.0
"""Two processes on the CPU, with Lightning's plain `ddp`."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from .conftest import write_dataset

pytestmark = pytest.mark.integration


def run_two(tmp_path: Path, *kind: str) -> list[dict[str, Any]]:
    """What each of two processes has seen."""
    dataset = write_dataset(tmp_path / "data", train=8)
    script = Path(__file__).with_name("distributed_run.py")
    run = subprocess.run(
        [sys.executable, script, dataset, tmp_path, "2", "ddp", *kind],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]


def test_two_processes_train_one_model(tmp_path: Path) -> None:
    first, second = run_two(tmp_path)
    # The resting stage does not stop the gradients' exchange, in either stage.
    assert first["stages"] == second["stages"] == [1] * 60 + [2] * 60
    assert first["weights"] == second["weights"]
    assert first["results"] == second["results"]
    # Each process paints other good images; the figures are of them all.
    assert first["painted"] == second["painted"]
    assert first["painted"]["painted_pixel_AP"] > 0.3
    assert first["results"]["pixel_AUROC"] > 0.9
    # Paint is drawn in each process anew: from one seed, all would paint the same shapes.
    assert first["random"] != second["random"]


def test_two_processes_train_one_model_that_looks_closer(tmp_path: Path) -> None:
    first, second = run_two(tmp_path, "zoom")
    assert first["stages"] == second["stages"] == [1] * 12 + [2] * 12
    assert first["weights"] == second["weights"]
    assert first["results"] == second["results"]
    assert first["painted"] == second["painted"]
    assert first["random"] != second["random"]
