# SPDX-License-Identifier: Apache-2.0
"""Tables of a comparison in Markdown."""

import pandas as pd

from .table import FINAL, METRICS

__all__ = ["MEAN", "cost_table", "final_rows", "over_categories", "quality_table", "spread"]

MEAN = "**mean**"
_COSTS = {
    "parameters": "{:,.0f}",
    "GFLOPs": "{:.2f}",
    "steps": "{:,.0f}",
    "images": "{:,.0f}",
    "training seconds": "{:,.0f}",
    "training images/s": "{:.1f}",
    "inference ms": "{:.1f}",
    "inference images/s": "{:.1f}",
    "peak memory MiB": "{:,.0f}",
}
_MACHINE = ("device", "threads", "precision", "python", "torch", "anomalib", "anomalib-twostage")


def quality_table(rows: pd.DataFrame) -> str:
    """Metrics per category, model and map: the mean over the seeds ± their sample standard deviation.

    Args:
        rows: Rows of a table of results.

    Returns:
        Markdown. With several categories it ends with their mean, which takes in only those seeds of a model that
        have been run on every category.
    """
    header = ("category", "model", "map", "seeds", *METRICS)
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    groups = [(category, rows[rows["category"] == category]) for category in rows["category"].unique()]
    if len(groups) > 1:
        groups.append((MEAN, over_categories(rows)))
    for category, group in groups:
        for (label, name), cell in group.groupby(["label", "map"], sort=False):
            metrics = [spread(cell[metric]) for metric in METRICS]
            lines.append(f"| {' | '.join([str(category), str(label), str(name), str(len(cell)), *metrics])} |")
    return "\n".join(lines) + "\n"


def cost_table(rows: pd.DataFrame) -> str:
    """What the models cost: medians over their runs, and below them what they were measured on.

    Args:
        rows: Rows of a table of results.

    Returns:
        Markdown.
    """
    header = ("model", *_COSTS)
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    final = final_rows(rows)
    for label, group in final.groupby("label", sort=False):
        costs = [_cell(form, pd.to_numeric(group[name]).median()) for name, form in _COSTS.items()]
        lines.append(f"| {' | '.join([str(label), *costs])} |")
    batches = ", ".join(f"{value:.0f}" for value in sorted(pd.to_numeric(final["inference batch"]).dropna().unique()))
    if batches:
        lines += [
            "",
            "GFLOPs and inference in ms are of a category's first test image, where stage two may have nothing to do; "
            f"inference in images/s is of a batch ({batches}). Reading images is not in them.",
        ]
    for machine, group in final.groupby(list(_MACHINE), sort=False, dropna=False):
        parts = [f"{name} {value}" for name, value in zip(_MACHINE, machine, strict=True)]
        lines += ["", f"{len(group)} trainings on: {', '.join(parts)}."]
    return "\n".join(lines) + "\n"


def final_rows(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows of the models' final maps."""
    return rows[rows["map"] == FINAL]


def over_categories(rows: pd.DataFrame) -> pd.DataFrame:
    """Mean of the metrics over the categories, per model, map and seed, where a seed has been run on all of them."""
    groups = rows.groupby(["label", "map", "seed"], sort=False)
    complete = groups["category"].transform("nunique") == rows["category"].nunique()
    return rows[complete].groupby(["label", "map", "seed"], sort=False)[list(METRICS)].mean().reset_index()


def spread(values: pd.Series) -> str:
    """Mean ± sample standard deviation in Markdown; the mean alone of one value, a dash of none."""
    values = pd.to_numeric(values)
    text = _cell("{:.3f}", values.mean())
    return f"{text} ± {values.std():.3f}" if values.count() > 1 else text


def _cell(form: str, value: float) -> str:
    return "-" if pd.isna(value) else form.format(value)
