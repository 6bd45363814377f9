# SPDX-License-Identifier: Apache-2.0
"""The benchmarks that train go on where they were stopped, and never call figures of other settings done."""

import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from anomalib_twostage.benchmark.table import ResultsTable

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SHIPPED = Path(__file__).parents[2] / "docs" / "results"


@pytest.fixture(autouse=True)
def _benchmarks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The scripts can be imported; threads and loggers are as they were once they are through."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    for name in ("results", "refine_models", "false_alarms", "zoom"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    threads, disabled = torch.get_num_threads(), logging.root.manager.disable
    yield
    torch.set_num_threads(threads)
    logging.disable(disabled)


def test_rows_come_back_as_long_as_settings_stay(tmp_path: Path) -> None:
    from _continued import read_rows, write_rows

    table, settings = tmp_path / "table.csv", {"steps": 600, "blends": [0.5, 1.0], "segment_size": None}
    assert read_rows(table, settings) == []
    rows = [{"category": "bottle", "seed": 0, "pixel AP": 0.25}, {"category": "grid", "seed": 1, "pixel AP": 0.5}]
    write_rows(table, rows, settings)
    assert read_rows(table, settings) == rows
    with pytest.raises(SystemExit, match=r"of other settings: steps 600 \(now 300\)\. Write to another file"):
        read_rows(table, {**settings, "steps": 300})


@pytest.mark.parametrize(
    ("script", "table", "options"),
    [
        ("results", "mvtec_cpu.csv", ["configs/demo.yaml", "--categories", "bottle"]),
        ("refine_models", "refine_models.csv", ["--categories", "brick", "--image_size", "256"]),
        ("false_alarms", "false_alarms_scores.csv", ["--data.root", "nowhere", "--categories", "brick"]),
        ("zoom", "zoom.csv", ["--root", "nowhere", "--categories", "grid", "--kinds", "zoom", "--max_steps", "300"]),
    ],
)
def test_figures_of_other_settings_are_refused(
    script: str, table: str, options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / table
    if script == "false_alarms":
        path.write_text("category,part,score,peak\nbrick,held out,0.1,0.2\n")
    else:
        path.write_bytes((SHIPPED / table).read_bytes())
    before = path.read_bytes()
    out = path if script == "zoom" else tmp_path / table.removesuffix("_scores.csv").removesuffix(".csv")
    monkeypatch.chdir(BENCHMARKS.parent)
    monkeypatch.setattr(sys, "argv", [script, *options, "--out", str(out)])
    module: Any = __import__(script)
    with pytest.raises(SystemExit, match=r"holds .*settings|holds zoom 3, grid, seed 0 with max_steps 600 \(now 300\)"):
        module.main()
    assert path.read_bytes() == before
    assert not out.with_suffix(".md").exists()


def test_zoom_takes_what_was_measured_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "zoom.csv"
    path.write_bytes((SHIPPED / "zoom.csv").read_bytes())
    options = ["--root", "nowhere", "--categories", "grid", "--kinds", "zoom", "--precision", "bf16-mixed"]
    monkeypatch.setattr(sys, "argv", ["zoom", *options, "--out", str(path)])
    __import__("zoom").main()  # nothing is left to do: the folder is not asked for
    with ResultsTable(path) as table:
        assert len(table.rows) == len((SHIPPED / "zoom.csv").read_text().splitlines()) - 1
