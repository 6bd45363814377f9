# SPDX-License-Identifier: Apache-2.0
"""Pixel AP of a category against minutes of training: trainings of several lengths, one line a model.

    python benchmarks/minutes.py results/*.csv --category bottle --out results/minutes

Takes tables of ``python -m anomalib_twostage.benchmark``, in which one model may come several times, each time with
another budget. Writes ``OUT.csv``, ``OUT.md`` and ``OUT.png``.
"""

import argparse
from pathlib import Path

import matplotlib as mpl

mpl.use("agg")
import matplotlib.pyplot as plt
import pandas as pd

from anomalib_twostage.benchmark.report import choose
from anomalib_twostage.benchmark.summary import final_rows
from anomalib_twostage.benchmark.table import METRICS

_SECONDS = "training seconds"


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("tables", type=Path, nargs="+", metavar="results.csv")
    options.add_argument("--category", required=True)
    options.add_argument("--out", type=Path, required=True, help="path of the results without suffix")
    arguments = options.parse_args()
    rows = pd.concat([pd.read_csv(path, dtype={"category": str}) for path in arguments.tables], ignore_index=True)
    rows = final_rows(choose(rows, category=[arguments.category])).sort_values(["label", _SECONDS])
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    rows.to_csv(f"{arguments.out}.csv", index=False)
    Path(f"{arguments.out}.md").write_text(table(rows), encoding="utf-8")
    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    for label, own in rows.groupby("label", sort=False):
        axis.plot(own[_SECONDS] / 60, own["pixel AP"], "o-", label=label)
    axis.set(xlabel="minutes of training", ylabel=f"pixel AP, {arguments.category}", ylim=(0, 1))
    axis.set_xlim(left=0)
    axis.legend()
    figure.savefig(f"{arguments.out}.png", dpi=80)
    print(table(rows))


def table(rows: pd.DataFrame) -> str:
    """Markdown: a row for each training."""
    lines = [f"| model | steps | minutes | {' | '.join(METRICS)} |", "|---" * (3 + len(METRICS)) + "|"]
    for _, row in rows.iterrows():
        metrics = " | ".join(f"{row[name]:.3f}" for name in METRICS)
        lines.append(f"| {row['label']} | {row['steps']:.0f} | {row[_SECONDS] / 60:.1f} | {metrics} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
