# SPDX-License-Identifier: Apache-2.0
r"""Measure how many fresh good images are called defective, against the rate that was asked for.

    python benchmarks/false_alarms.py --data.root path/to/MVTecAD --categories bottle grid screw magnetic_tile \
        --out results/false_alarms
    python benchmarks/false_alarms.py --data.root path/to/MVTecAD --categories bottle grid screw magnetic_tile \
        --variant small --image_size 128 --segment_size 8 --steps 400 --out results/false_alarms_small

A model learns from half of a category's good training images. The other half, which it does not see, is split at random
into images that give the threshold and fresh ones that it is measured on, a thousand times, since one split of so few
images says little. Each threshold is `good_image_threshold`'s, as `MidwayPostProcessor(false_alarm_rate=...)` takes it,
once from all images of the first part, once from 30 of them if there are so many, and as anomalib has it, the highest
score of three: what a `Folder` of 30 good images keeps for validation. Then all of the held-out images give the
threshold, and the data set's own test images are measured, good and defective ones.

Scores of one training go to OUT_scores.csv as soon as they are there, and a training that has its scores is skipped, so
the command can be interrupted and repeated. OUT.md gets the tables, in percent.
"""

import argparse
import logging
import tempfile
import warnings
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from _continued import read_rows, write_rows
from _timing import machine
from anomalib.callbacks import ModelCheckpoint
from anomalib.data import MVTecAD
from anomalib.data.datasets import AnomalibDataset
from anomalib.engine import Engine
from lightning.pytorch import seed_everything
from torch.utils.data import DataLoader

from anomalib_twostage import TwoStageSuperpixel
from anomalib_twostage.benchmark.measure import as_the_model_sees
from anomalib_twostage.inspection.good_images import good_image_threshold

RATES = (0.01, 0.02, 0.05, 0.1, 0.2)
FEW = 30
STOCK = 3  # good validation images that a Folder of 30 good images has by default
SPLITS = 1000
IMAGES = "Images"

Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data.root", dest="root", type=Path, required=True, help="folder in MVTec AD's layout")
    parser.add_argument("--categories", nargs="+", required=True)
    parser.add_argument("--variant", default="default", help="variant of the model (%(default)s)")
    parser.add_argument("--image_size", type=int, default=256, help="side of the model's input (%(default)s)")
    parser.add_argument("--segment_size", type=int, help="side of a superpixel (the variant's own)")
    parser.add_argument("--steps", type=int, default=600, help="optimiser steps of 8 images (%(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (%(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="path of the results without suffix")
    arguments = parser.parse_args()
    logging.disable(logging.INFO)
    warnings.simplefilter("ignore")
    torch.set_num_threads(arguments.threads)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    table = arguments.out.with_name(f"{arguments.out.name}_scores.csv")
    settings = {name: getattr(arguments, name) for name in ("variant", "image_size", "segment_size", "steps")}
    rows = read_rows(table, settings)
    for category in arguments.categories:
        if not any(row["category"] == category for row in rows):
            print(f"{category}: training", flush=True)
            rows += [{"category": category, **row} for row in train_and_score(arguments, category)]
            write_rows(table, rows, settings, float_format="%.9g")
    report = describe(arguments, pd.DataFrame(rows))
    Path(f"{arguments.out}.md").write_text(report)
    print(report)


def train_and_score(arguments: argparse.Namespace, category: str) -> list[Row]:
    """Train on half of the good images, and score all others: image score and highest value of the map."""
    seed_everything(0)
    data = MVTecAD(root=arguments.root, category=category, train_batch_size=8, eval_batch_size=8, num_workers=0)
    data.prepare_data()
    data.setup()
    order = torch.randperm(len(data.train_data)).tolist()
    half = len(order) // 2
    model = TwoStageSuperpixel(
        arguments.variant,
        segment_size=arguments.segment_size,
        pre_processor=TwoStageSuperpixel.configure_pre_processor((arguments.image_size, arguments.image_size)),
        visualizer=False,
        evaluator=False,
    )
    with tempfile.TemporaryDirectory() as folder:
        engine = Engine(
            callbacks=[ModelCheckpoint(save_top_k=0)],
            max_steps=arguments.steps,
            max_epochs=-1,
            limit_val_batches=0,
            accelerator="cpu",
            default_root_dir=folder,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        train = DataLoader(
            data.train_data.subsample(order[:half]), 8, shuffle=True, collate_fn=data.train_data.collate_fn
        )
        engine.fit(model, train_dataloaders=train)
    model.eval()
    return score(model, data.train_data.subsample(order[half:]), "held out") + score(model, data.test_data, "test")


@torch.inference_mode()
def score(model: TwoStageSuperpixel, dataset: AnomalibDataset, name: str) -> list[Row]:
    """Raw scores, before any normalisation."""
    rows: list[Row] = []
    for batch in DataLoader(dataset, 8, collate_fn=dataset.collate_fn):
        images, _ = as_the_model_sees(model, batch)
        answer = model.model(images)
        peaks = answer.anomaly_map.flatten(1).amax(dim=1)
        for label, value, peak in zip(batch.gt_label.tolist(), answer.pred_score.flatten(), peaks, strict=True):
            part = name if name == "held out" else f"{name}, {'defective' if label else 'good'}"
            rows.append({"part": part, "score": float(value), "peak": float(peak)})
    return rows


def describe(arguments: argparse.Namespace, scores: pd.DataFrame) -> str:
    """The tables, in Markdown: rates asked for by categories."""
    lines = [
        f"{machine()}, {arguments.threads} threads; variant `{arguments.variant}`, {arguments.image_size} x "
        f"{arguments.image_size} pixels, {arguments.steps} steps of 8 images."
    ]
    columns = {category: measure(scores[scores["category"] == category]) for category in arguments.categories}
    titles: dict[str, list[str]] = {}
    for title, line in next(iter(columns.values())):
        titles.setdefault(title, []).append(line)
    for title, asked in titles.items():
        head = "" if title == IMAGES else "asked for"
        lines += ["", f"{title}:", "", f"| {head} | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
        lines += [f"| {line} | {' | '.join(cells[title, line] for cells in columns.values())} |" for line in asked]
    return "\n".join(lines) + "\n"


def measure(scores: pd.DataFrame) -> dict[tuple[str, str], str]:
    """What one category has in each table and line."""
    parts = scores.groupby("part")
    held_out = torch.tensor(parts.get_group("held out")[["score", "peak"]].to_numpy(dtype=float))
    good, defective = (
        torch.tensor(parts.get_group(f"test, {truth}")["score"].to_numpy(dtype=float))
        for truth in ("good", "defective")
    )
    generator = torch.Generator().manual_seed(0)
    orders = torch.stack([torch.randperm(len(held_out), generator=generator) for _ in range(SPLITS)])
    half = len(held_out) // 2
    cells = {
        (IMAGES, "good, for the threshold"): str(half),
        (IMAGES, "good, fresh"): str(len(held_out) - half),
        (IMAGES, "of the test set, good and defective"): f"{len(good)} and {len(defective)}",
    }
    for title, count, column in (
        ("Fresh images called defective, in percent", half, 0),
        ("Fresh images with any marked pixel, in percent", half, 1),
        (f"Fresh images called defective, in percent, with the threshold from {FEW} images", FEW, 0),
    ):
        for rate in RATES:
            cells[title, f"{100 * rate:.0f} %"] = (
                spread(rates_of_splits(held_out, orders, half, count, rate)[:, column]) if count <= half else "-"
            )
    highest = rates_of_splits(held_out, orders, half, STOCK, 1 / (STOCK + 1))[:, 0]
    cells[title, f"as anomalib: the highest of {STOCK}"] = spread(highest)
    title = "Test images called defective, good and defective, with the threshold from all held-out images"
    for rate in RATES:
        threshold = good_image_threshold(held_out[:, 0], rate)
        shares = (f"{100 * (values > threshold).double().mean():.0f} %" for values in (good, defective))
        cells[title, f"{100 * rate:.0f} %"] = " and ".join(shares)
    return cells


def rates_of_splits(held_out: torch.Tensor, orders: torch.Tensor, half: int, count: int, rate: float) -> torch.Tensor:
    """Share of fresh images above the threshold, ``(S, 2)`` for each split, by score and by the map's highest value.

    Args:
        held_out: ``(n, 2)``, score and highest value.
        orders: ``(S, n)``, one order of the images per split: the first of them give the threshold.
        half: Where the fresh ones begin.
        count: Images that give the threshold.
        rate: What is asked for.
    """
    rows = []
    for order in orders:
        chosen, fresh = held_out[order[:count]], held_out[order[half:]]
        thresholds = torch.stack([good_image_threshold(values, rate) for values in chosen.T])
        rows.append((fresh > thresholds).double().mean(dim=0))
    return torch.stack(rows)


def spread(alarms: torch.Tensor) -> str:
    """Mean over the splits, and where nine in ten of them lie, in percent."""
    low, high = (100 * alarms.quantile(torch.tensor([0.05, 0.95], dtype=alarms.dtype))).tolist()
    return f"{100 * alarms.mean():.1f} ({low:.0f} to {high:.0f})"


if __name__ == "__main__":
    main()
