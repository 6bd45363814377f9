# SPDX-License-Identifier: Apache-2.0
r"""Measure built-in models of anomalib with and without `SuperpixelPostProcessor`.

    python benchmarks/refine_models.py --models Padim Patchcore --categories brick grass gravel --seeds 0 1 2 \
        --out results/refine_models
    python benchmarks/refine_models.py --models Padim Patchcore --data MVTecAD --data.root path/to/MVTecAD \
        --categories bottle --seeds 0 1 2 --out results/refine_models

Each model is trained once per category and seed, with anomalib's Engine; its maps of the test images then go through
anomalib's post-processor and through the refining one, and both are measured alike ("peak" is the highest pixel of a
map). One row per map goes to OUT.csv as soon as it is measured, and a run that has its rows is skipped, so the command
can be interrupted, repeated, and called for several data sets. OUT.md gets the table.

Nothing is downloaded: Padim and Patchcore look through a ResNet-18 with random weights, which makes them much weaker
than with ImageNet's, and Draem paints with the images of --dtd_dir.
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
from anomalib.data import AnomalibDataModule, ImageBatch, get_datamodule
from anomalib.engine import Engine
from anomalib.metrics import AUPR, AUPRO, AUROC, F1Score
from anomalib.models import AnomalibModule, Draem, Padim, Patchcore
from anomalib.post_processing import PostProcessor
from lightning.pytorch import Trainer, seed_everything

from anomalib_twostage import SuperpixelPostProcessor
from anomalib_twostage.benchmark.summary import spread

METRICS = ("pixel AUROC", "pixel AP", "AUPRO", "image AUROC of the peak", "pixel F1")
MODELS = ("Padim", "Patchcore", "Draem")
KEYS = ["data", "category", "model", "seed"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["Padim"])
    parser.add_argument(
        "--data", default="SampleTextures", help="datamodule with categories; SampleTextures or MVTecAD"
    )
    parser.add_argument("--data.root", dest="root", help="folder of the data, by default the datamodule's own")
    parser.add_argument("--categories", nargs="+", required=True)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--image_size", type=int, default=128)
    parser.add_argument("--segment_size", type=int, default=8)
    parser.add_argument("--compactness", type=float, default=10.0, help="1e6 makes squares of the superpixels")
    parser.add_argument("--blends", nargs="+", type=float, default=[0.5, 1.0], help="shares of the superpixel average")
    parser.add_argument("--max_steps", type=int, default=300, help="optimiser steps, for models that have them")
    parser.add_argument("--dtd_dir", default="./datasets/dtd", help="folder of images for Draem to paint with")
    parser.add_argument("--out", type=Path, required=True, help="path of the results without suffix")
    arguments = parser.parse_args()
    logging.disable(logging.INFO)
    warnings.simplefilter("ignore")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    table = Path(f"{arguments.out}.csv")
    names = ("image_size", "segment_size", "compactness", "blends", "max_steps")
    settings = {name: getattr(arguments, name) for name in names}
    rows = read_rows(table, settings)
    runs = [(c, m, s) for c in arguments.categories for m in arguments.models for s in arguments.seeds]
    for category, name, seed in runs:
        run = dict(zip(KEYS, (arguments.data, category, name, seed), strict=True))
        if any(all(row[key] == run[key] for key in KEYS) for row in rows):
            continue
        print(f"{category}, {name}, seed {seed}: training", flush=True)
        seed_everything(seed)
        data = datamodule(arguments.data, arguments.root, category)
        model = build(name, arguments)
        with tempfile.TemporaryDirectory() as folder:
            engine = Engine(
                default_root_dir=folder, accelerator="cpu", enable_progress_bar=False, **length(name, arguments)
            )
            engine.fit(model, datamodule=data)
        results = measure(model, data, arguments)
        rows += [{**run, "map": kind, **metrics} for kind, metrics in results.items()]
        write_rows(table, rows, settings)
        print(pd.DataFrame(rows[-len(results) :]).to_string(index=False), flush=True)
    report = summary(pd.DataFrame(rows))
    Path(f"{arguments.out}.md").write_text(report)
    print(report)


def datamodule(name: str, root: str | None, category: str) -> AnomalibDataModule:
    settings: dict[str, Any] = {"category": category, "train_batch_size": 8, "eval_batch_size": 8, "num_workers": 0}
    if root is not None:
        settings["root"] = root
    return get_datamodule({"class_path": name, "init_args": settings})


def build(name: str, arguments: argparse.Namespace) -> AnomalibModule:
    """The model without what is not measured here: metrics and pictures."""
    size = (arguments.image_size, arguments.image_size)
    off: dict[str, Any] = {"evaluator": False, "visualizer": False}
    if name == "Padim":
        return Padim(pre_trained=False, pre_processor=Padim.configure_pre_processor(size), **off)
    if name == "Patchcore":
        pre_processor = Patchcore.configure_pre_processor(size)
        return Patchcore("resnet18", pre_trained=False, coreset_sampling_ratio=0.02, pre_processor=pre_processor, **off)
    return Draem(dtd_dir=arguments.dtd_dir, pre_processor=Draem.configure_pre_processor(size), **off)


def length(name: str, arguments: argparse.Namespace) -> dict[str, int]:
    return {"max_steps": arguments.max_steps, "max_epochs": -1} if name == "Draem" else {}


@torch.no_grad()
def measure(
    model: AnomalibModule, data: AnomalibDataModule, arguments: argparse.Namespace
) -> dict[str, dict[str, float]]:
    """Metrics of each map over the test images, post-processed; anomalib takes its thresholds from them, too."""
    model.eval()
    batches = []
    for batch in data.test_dataloader():
        images, masks = model.pre_processor.transform(batch.image, batch.gt_mask)
        prediction = model.model(images)
        batches.append(
            {
                "image": images,
                "gt_mask": masks,
                "gt_label": batch.gt_label,
                "anomaly_map": prediction.anomaly_map,
                "pred_score": prediction.pred_score,
            }
        )
    # anomalib's metrics pass values outside [0, 1] through a sigmoid, where they tie. One scale for all is harmless.
    low = min(float(fields["anomaly_map"].min()) for fields in batches)
    high = max(float(fields["anomaly_map"].max()) for fields in batches)
    for fields in batches:
        fields["anomaly_map"] = (fields["anomaly_map"] - low) / (high - low)
    processors: dict[str, PostProcessor] = {"the model's": PostProcessor()}
    for blend in arguments.blends:
        processors[f"refined, blend {blend:g}"] = SuperpixelPostProcessor(
            arguments.segment_size, arguments.compactness, blend
        )
    return {kind: _scores(model, processor, batches) for kind, processor in processors.items()}


def _scores(model: AnomalibModule, processor: PostProcessor, batches: list[dict[str, Any]]) -> dict[str, float]:
    """Metrics of one post-processor: rankings before normalisation, which ties values, and F1 of the predicted mask."""
    trainer = Trainer(logger=False, accelerator="cpu", enable_checkpointing=False)
    pixels, image = ["anomaly_map", "gt_mask"], ["pred_score", "gt_label"]
    rankings = (AUROC(pixels), AUPR(pixels), AUPRO(pixels), AUROC(image))
    f1_score = F1Score(["pred_mask", "gt_mask"])
    for fields in batches:
        batch = ImageBatch(**fields)
        processor.on_validation_batch_end(trainer, model, batch)
        batch.pred_score = batch.anomaly_map.amax(dim=(-2, -1))
        for metric in rankings:
            metric.update(batch)
    processor.on_validation_epoch_end(trainer, model)
    for fields in batches:
        batch = ImageBatch(**fields)
        processor.on_test_batch_end(trainer, model, batch)
        f1_score.update(batch)
    return {
        title: round(float(metric.compute()), 4) for title, metric in zip(METRICS, (*rankings, f1_score), strict=True)
    }


def summary(rows: pd.DataFrame) -> str:
    """Markdown table: mean over the seeds, with the standard deviation behind it where there are several."""
    lines = ["| category | model | map | " + " | ".join(METRICS) + " |", "|---" * (len(METRICS) + 3) + "|"]
    for (category, model, kind), group in rows.groupby(["category", "model", "map"], sort=False):
        cells = [spread(group[metric]) for metric in METRICS]
        lines.append(f"| {category} | {model} | {kind} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
