# SPDX-License-Identifier: Apache-2.0
"""The scripts under benchmarks/ can be started, and measure what they are asked to."""

import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from anomalib_twostage.model.variants import VARIANTS

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SCRIPTS = sorted(path.stem for path in BENCHMARKS.glob("[a-z]*.py"))


@pytest.fixture(autouse=True)
def _benchmarks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The scripts can be imported anew; paths, threads and loggers are as they were once they are through."""
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
    for name in SCRIPTS:
        monkeypatch.delitem(sys.modules, name, raising=False)
    threads, disabled = torch.get_num_threads(), logging.root.manager.disable
    yield
    torch.set_num_threads(threads)
    logging.disable(disabled)


def script(name: str) -> Any:
    return __import__(name)


@pytest.mark.parametrize("name", SCRIPTS)
def test_each_script_tells_its_options(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as ended:
        script(name).main()
    assert ended.value.code == 0
    assert "usage:" in capsys.readouterr().out


@pytest.mark.parametrize("variant", VARIANTS)
def test_networks_are_all_but_what_lies_between_them(variant: str) -> None:
    from _models import ours, photograph

    image = photograph(64)
    model = ours(variant, 64)
    with torch.inference_mode():
        counts = []
        for function in (lambda: model(image), script("roofline").networks(model, image)):
            with FlopCounterMode(display=False) as counter:
                function()
            counts.append(counter.get_flop_counts()["Global"])
    convolution = torch.ops.aten.convolution
    whole, networks = (count[convolution] for count in counts)
    assert networks > 0
    assert 0.5 * whole < networks <= whole  # superpixels and smoothing have convolutions too


def test_zooms_do_not_share_their_weights(tmp_path: Path) -> None:
    zoom = script("zoom")
    files = {zoom.weights_file(tmp_path, kind, size, 1.5, "grid", 0) for kind in ("zoom", "reduced") for size in (2, 3)}
    assert len(files) == 4
    assert len({zoom.weights_file(tmp_path, "outright", size, 1.5, "grid", 0) for size in (2, 3)}) == 1


def test_fresh_images_give_no_threshold() -> None:
    """Of 20 held-out images 10 are fresh, so that 30 cannot give the threshold."""
    false_alarms = script("false_alarms")
    rows = [{"part": "held out", "score": i / 20, "peak": i / 20} for i in range(20)]
    rows += [{"part": f"test, {truth}", "score": 0.5, "peak": 0.5} for truth in ("good", "defective")]
    cells = false_alarms.measure(pd.DataFrame(rows))
    few = [cell for (title, line), cell in cells.items() if "from 30 images" in title and line.endswith("%")]
    assert few == ["-"] * len(false_alarms.RATES)
    rows += [{"part": "held out", "score": i / 20, "peak": i / 20} for i in range(40)]
    cells = false_alarms.measure(pd.DataFrame(rows))
    assert "-" not in cells.values()


def test_mean_is_of_seeds_that_have_all_categories() -> None:
    results = script("results")
    rows = [
        {"category": category, "seed": seed, "map": "final", **dict.fromkeys(results.METRICS, value)}
        for category, seed, value in (("bottle", 0, 0.8), ("bottle", 1, 0.6), ("screw", 0, 0.4))
    ]
    mean = next(line for line in results.summary(pd.DataFrame(rows)).splitlines() if "mean" in line)
    assert mean == "| **mean** | final |" + " 0.600 |" * len(results.METRICS)


@pytest.mark.parametrize("form", [["--data.root", "photos"], ["--data.root=photos"]], ids=["two words", "one word"])
def test_what_was_trained_on_is_measured_on(form: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = script("results")
    roots, commands = [], []

    def datamodule(config: dict[str, Any]) -> Any:
        roots.append(config["init_args"]["root"])
        raise KeyboardInterrupt

    monkeypatch.setattr(results.subprocess, "run", lambda command, **_: commands.append(command))
    monkeypatch.setattr(results, "load", lambda _: None)
    monkeypatch.setattr(results, "get_datamodule", datamodule)
    config = BENCHMARKS.parent / "configs" / "demo.yaml"
    options = [str(config), "--categories", "brick", "--out", str(tmp_path / "out"), *form]
    monkeypatch.setattr(sys, "argv", ["results", *options, "--trainer.max_steps", "4"])
    with pytest.raises(KeyboardInterrupt):
        results.main()
    assert roots == ["photos"]
    assert commands[0][-4:] == ["--trainer.max_steps", "4", "--data.root", "photos"]


def test_data_that_would_not_be_measured_on_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = str(BENCHMARKS.parent / "configs" / "demo.yaml")
    options = [config, "--categories", "brick", "--out", str(tmp_path / "out"), "--data.val_split_mode=from_train"]
    monkeypatch.setattr(sys, "argv", ["results", *options])
    with pytest.raises(SystemExit):
        script("results").main()
    assert "--data.val_split_mode=from_train: write what the data are into the configuration" in capsys.readouterr().err


def test_categories_that_look_like_numbers_stay_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from _continued import read_rows, write_rows

    table = tmp_path / "table.csv"
    rows = [{"category": "01", "seed": 0, "pixel AP": 0.25}]
    write_rows(table, rows, {})
    assert read_rows(table, {}) == rows
    header = "label,category,seed,map,pixel AUROC,pixel AP,AUPRO,image AUROC,training seconds,steps"
    table.write_text(f"{header}\nours,01,0,final,0.9,0.5,0.8,0.9,60,100\n")
    out = tmp_path / "lr0.001"
    monkeypatch.setattr(sys, "argv", ["minutes", str(table), "--category", "01", "--out", str(out)])
    script("minutes").main()
    assert "| ours | 100 | 1.0 |" in Path(f"{out}.md").read_text()
