# SPDX-License-Identifier: Apache-2.0
"""Tables and a figure of a comparison.

    python -m anomalib_twostage.benchmark.report results.csv --out results/name

writes ``name.md`` with the tables and ``name.png`` with the figure. Several CSV files are put together.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from .summary import cost_table, final_rows, over_categories, quality_table
from .table import KEYS, read_rows

__all__ = ["choose", "draw", "load", "main"]

_METRIC = "pixel AP"


def load(paths: Sequence[Path]) -> pd.DataFrame:
    """Read tables of results; lines that are half-written are named on standard error and left out.

    Args:
        paths: CSV files of ``python -m anomalib_twostage.benchmark``.

    Returns:
        Their rows.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If a file is no such table, there are no rows, or a training is there twice.
    """
    rows = []
    for path in paths:
        read, left_out = read_rows(path)
        rows += read
        for sentence in left_out:
            print(f"{sentence}. It is left out.", file=sys.stderr)
    if not rows:
        msg = f"There is no finished training in {', '.join(map(str, paths))}."
        raise ValueError(msg)
    table = pd.DataFrame(rows)
    twice = table[table.duplicated(list(KEYS))]
    if len(twice):
        first = twice.iloc[0]
        msg = f"{first['label']}, {first['category']}, seed {first['seed']} is in more than one of the files."
        raise ValueError(msg)
    return table


def choose(rows: pd.DataFrame, **wanted: Sequence[str] | None) -> pd.DataFrame:
    """Choose and order rows by what is in some of their columns.

    Args:
        rows: Rows of a table of results.
        wanted: Values of a column that are wanted, in the order that is wanted; ``None`` for all as they come.

    Returns:
        The chosen rows.

    Raises:
        ValueError: If there is no row with one of the values.
    """
    for column, values in wanted.items():
        if values is None:
            continue
        present = list(rows[column].unique())
        missing = [value for value in values if value not in present]
        if missing:
            msg = f"There is no {column} {', '.join(missing)} in the tables; there are {', '.join(present)}."
            raise ValueError(msg)
        rows = pd.concat([rows[rows[column] == value] for value in values], ignore_index=True)
    return rows


def draw(rows: pd.DataFrame) -> Figure:
    """Draw pixel AP of the final maps: by category, and against the time of training.

    Args:
        rows: Rows of a table of results.

    Returns:
        The figure. Lines on bars and points are one standard deviation over the seeds to either side.
    """
    final = final_rows(rows)
    categories = list(final["category"].unique())
    parts = [(category, final[final["category"] == category]) for category in categories]
    mean = over_categories(final) if len(categories) > 1 else final
    if len(categories) > 1:
        parts.append(("mean", mean))
    labels = list(final["label"].unique())
    figure, (bars, points) = plt.subplots(1, 2, figsize=(12, 4), width_ratios=(2, 1), layout="constrained")
    width = 0.8 / len(labels)
    for number, label in enumerate(labels):
        values = [part.loc[part["label"] == label, _METRIC] for _, part in parts]
        places = np.arange(len(parts)) + (number - (len(labels) - 1) / 2) * width
        heights = [value.mean() for value in values]
        errors = [value.std() if len(value) > 1 else 0.0 for value in values]
        bars.bar(places, heights, width, yerr=errors, label=label)
        seconds = pd.to_numeric(final.loc[final["label"] == label, "training seconds"])
        points.errorbar(seconds.mean(), heights[-1], yerr=errors[-1], fmt="o", capsize=3, label=label)
    bars.set_xticks(range(len(parts)), [name for name, _ in parts])
    bars.set(ylabel=_METRIC, ylim=(0, 1))
    figure.legend(*bars.get_legend_handles_labels(), loc="outside upper left", ncols=5)
    points.set(xlabel="seconds of training", ylabel=_METRIC, ylim=(0, 1))
    points.set_xlim(left=0)
    return figure


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the tables and the figure.

    Args:
        arguments: Command line; by default that of the process.
    """
    parser = argparse.ArgumentParser(
        prog="python -m anomalib_twostage.benchmark.report",
        description="Tables and a figure of a comparison.",
    )
    parser.add_argument("tables", type=Path, nargs="+", metavar="results.csv")
    parser.add_argument("--out", type=Path, required=True, help="path of the report without suffix")
    parser.add_argument("--labels", nargs="+", help="these models only, in this order")
    parser.add_argument("--categories", nargs="+", help="these categories only, in this order")
    parsed = parser.parse_args(arguments)
    try:
        rows = choose(load(parsed.tables), label=parsed.labels, category=parsed.categories)
        parsed.out.parent.mkdir(parents=True, exist_ok=True)
        text = f"{quality_table(rows)}\n{cost_table(rows)}"
        Path(f"{parsed.out}.md").write_text(text, encoding="utf-8")
        figure = draw(rows)
        figure.savefig(f"{parsed.out}.png", dpi=80)
        plt.close(figure)
    except (OSError, ValueError) as error:
        sys.exit(f"Error: {error}")
    print(text)


if __name__ == "__main__":
    main()
