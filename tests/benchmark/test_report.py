# SPDX-License-Identifier: Apache-2.0
import math
from pathlib import Path

import pandas as pd
import pytest
from PIL import Image

from anomalib_twostage.benchmark.report import choose, draw, load, main
from anomalib_twostage.benchmark.summary import cost_table, quality_table
from anomalib_twostage.benchmark.table import FINAL, METRICS, ResultsTable

COSTS = {
    "model": "Model",
    "parameters": 1234567,
    "GFLOPs": 1.5,
    "steps": 1500,
    "images": 12000,
    "training images/s": 20,
    "inference ms": 9.5,
    "inference batch": 16,
    "inference images/s": 120,
    "peak memory MiB": 900,
    "device": "cpu",
    "threads": 1,
    "precision": "32-true",
    "python": "3.11",
    "torch": "2.0",
    "anomalib": "2.7",
    "anomalib-twostage": "0.1",
}


def write(path: Path, values: dict[tuple[str, str, int], float]) -> Path:
    """A table of made-up values, the same for all metrics; of `ours` stage one is a tenth lower."""
    with ResultsTable(path) as table:
        for (label, category, seed), value in values.items():
            key = {"label": label, "category": category, "seed": seed}
            rows = [{**key, "map": FINAL, **dict.fromkeys(METRICS, value), **COSTS, "training seconds": 100 + seed}]
            if label == "ours":
                rows.insert(0, {**key, "map": "stage one", **dict.fromkeys(METRICS, value - 0.1)})
            table.add(rows)
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """`theirs` has not seen the second seed on `tile`."""
    return write(
        tmp_path / "table.csv",
        {
            ("ours", "bottle", 0): 0.8,
            ("theirs", "bottle", 0): 0.6,
            ("ours", "tile", 0): 0.4,
            ("theirs", "tile", 0): 0.2,
            ("ours", "bottle", 1): 0.9,
            ("theirs", "bottle", 1): 0.7,
            ("ours", "tile", 1): 0.5,
        },
    )


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_quality_is_mean_and_deviation_over_seeds(path: Path) -> None:
    lines = [cells(line) for line in quality_table(load([path])).splitlines()]
    assert lines[0] == ["category", "model", "map", "seeds", *METRICS]
    deviation = math.sqrt(0.05**2 * 2)  # of two seeds, 0.1 apart
    assert lines[2:] == [
        ["bottle", "ours", "stage one", "2", *[f"0.750 ± {deviation:.3f}"] * 4],
        ["bottle", "ours", "final", "2", *[f"0.850 ± {deviation:.3f}"] * 4],
        ["bottle", "theirs", "final", "2", *[f"0.650 ± {deviation:.3f}"] * 4],
        ["tile", "ours", "stage one", "2", *[f"0.350 ± {deviation:.3f}"] * 4],
        ["tile", "ours", "final", "2", *[f"0.450 ± {deviation:.3f}"] * 4],
        ["tile", "theirs", "final", "1", *["0.200"] * 4],
        ["**mean**", "ours", "stage one", "2", *[f"0.550 ± {deviation:.3f}"] * 4],
        ["**mean**", "ours", "final", "2", *[f"0.650 ± {deviation:.3f}"] * 4],
        ["**mean**", "theirs", "final", "1", *["0.400"] * 4],  # the first seed alone was run on both
    ]


def test_one_category_needs_no_mean(tmp_path: Path) -> None:
    table = quality_table(load([write(tmp_path / "one.csv", {("ours", "bottle", 0): 0.8})]))
    assert "**mean**" not in table
    assert "±" not in table


def test_costs_are_those_of_the_final_rows(path: Path) -> None:
    lines = cost_table(load([path])).splitlines()
    assert cells(lines[2]) == ["ours", "1,234,567", "1.50", "1,500", "12,000", "100", "20.0", "9.5", "120.0", "900"]
    assert len([line for line in lines if line.startswith("| ")]) == 3
    assert "a batch (16)" in "".join(lines)
    assert "7 trainings on: device cpu, threads 1, precision 32-true" in lines[-1]


def test_runs_whose_costs_are_not_known_add_none(path: Path) -> None:
    rows = load([path])
    rows.loc[rows["label"] == "theirs", ["inference batch", "peak memory MiB"]] = math.nan
    table = cost_table(rows)
    assert cells(table.splitlines()[3])[-1] == "-"
    assert "a batch (16)" in table


def test_no_sentence_on_batches_that_were_not_timed(path: Path) -> None:
    rows = load([path])
    rows["inference batch"] = math.nan
    assert "Inference" not in cost_table(rows)
    assert "7 trainings on:" in cost_table(rows)


def test_legend_hides_no_bar(path: Path) -> None:
    figure = draw(load([path]))
    figure.draw_without_rendering()
    legends = [*figure.legends, *(axes.get_legend() for axes in figure.axes if axes.get_legend())]
    assert [text.get_text() for text in legends[0].get_texts()] == ["ours", "theirs"]
    assert not any(legend.get_window_extent().overlaps(axes.bbox) for legend in legends for axes in figure.axes)


def test_several_tables_are_put_together(path: Path, tmp_path: Path) -> None:
    other = write(tmp_path / "other.csv", {("theirs", "tile", 1): 0.3})
    assert quality_table(load([path, other])).count("| theirs | final | 2 |") == 3
    with pytest.raises(ValueError, match="ours, bottle, seed 0 is in more than one of the files"):
        load([path, path])


def test_rows_are_chosen_and_ordered(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chosen = choose(load([path]), label=["theirs", "ours"], category=["tile"])
    assert list(zip(chosen["label"], chosen["category"], chosen["seed"], strict=True)) == [
        ("theirs", "tile", 0),
        *[("ours", "tile", seed) for seed in (0, 0, 1, 1)],
    ]
    assert choose(load([path]), label=None).equals(load([path]))
    with pytest.raises(SystemExit, match="no label nobody in the tables; there are ours, theirs"):
        main([str(path), "--out", str(tmp_path / "x"), "--labels", "nobody", "ours"])
    main([str(path), "--out", str(tmp_path / "x"), "--labels", "ours", "--categories", "bottle"])
    assert "theirs" not in capsys.readouterr().out


def test_half_written_line_is_named_and_left_out(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path.write_text(path.read_text()[:-5])
    rows = load([path])
    assert len(rows[(rows["category"] == "tile") & (rows["label"] == "ours")]) == 2
    assert "is half-written" in capsys.readouterr().err


def test_command_writes_tables_and_figure(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([str(path), "--out", str(tmp_path / "docs/v1.5")])
    text = (tmp_path / "docs/v1.5.md").read_text()
    assert quality_table(load([path])) in text
    assert cost_table(load([path])) in text
    with Image.open(tmp_path / "docs/v1.5.png") as picture:
        assert len(picture.convert("L").getcolors(1 << 16)) > 10


@pytest.mark.parametrize(("table", "out"), [("missing.csv", "x"), ("docs", "x"), ("table.csv", "table.csv/x")])
def test_what_cannot_be_read_or_written_is_named(table: str, out: str, path: Path, tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    with pytest.raises(SystemExit, match=rf"Error: .*{table}"):
        main([str(tmp_path / table), "--out", str(tmp_path / out)])


def test_bars_are_the_final_maps(path: Path) -> None:
    bars, points = draw(load([path])).axes
    heights = {container.get_label(): [bar.get_height() for bar in container] for container in bars.containers[1::2]}
    assert heights == {
        "ours": pytest.approx([0.85, 0.45, 0.65]),
        "theirs": pytest.approx([0.65, 0.2, 0.4]),
    }
    assert [tick.get_text() for tick in bars.get_xticklabels()] == ["bottle", "tile", "mean"]
    assert [list(container[0].get_xydata()[0]) for container in points.containers] == [
        pytest.approx([100.5, 0.65]),
        pytest.approx([100 + 1 / 3, 0.4]),
    ]


def test_empty_table_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "empty.csv"
    path.write_text(",".join(pd.Index([])))
    with pytest.raises(ValueError, match="no finished training"):
        load([path])
