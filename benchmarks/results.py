# SPDX-License-Identifier: Apache-2.0
"""Train through the stock `anomalib` command, then measure every stage of what came out.

    python benchmarks/results.py configs/demo.yaml --categories brick grass gravel --seeds 0 1 2 --out results/demo

One row per (category, seed, map) goes to OUT.csv as soon as it is measured, and a run that has its rows is skipped, so
the command can be interrupted and repeated. OUT.md gets the table of means and spreads, OUT_<category>.png the
stages of the first seed's model on the images that it found best and worst by pixel AP, and on the good ones with the
lowest and the highest score. Further options go to `anomalib train` as they are; what the data are, but for their
folder, has to be in the configuration.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("agg")
import matplotlib.pyplot as plt
import pandas as pd
import torch
import yaml
from _continued import read_rows, write_rows
from anomalib.data import AnomalibDataModule, ImageBatch, get_datamodule
from skimage.segmentation import find_boundaries
from torchmetrics.functional.classification import binary_average_precision

from anomalib_twostage import TwoStageSuperpixel
from anomalib_twostage.benchmark.measure import as_the_model_sees, quality
from anomalib_twostage.benchmark.summary import MEAN, over_categories, spread
from anomalib_twostage.benchmark.table import METRICS

MAPS = ("memory", "stage one", "superpixel mean", "without stage two", "final")  # as far as a model has them


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("config", type=Path, help="configuration of `anomalib train` with model, data and trainer")
    parser.add_argument("--categories", nargs="+", required=True)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--data.root", dest="root", help="folder of the data, by default the configuration's")
    parser.add_argument("--out", type=Path, required=True, help="path of the results without suffix")
    arguments, options = parser.parse_known_args()
    for option in options:
        if option.startswith("--data"):
            parser.error(
                f"{option}: write what the data are into the configuration, to be trained and measured on alike"
            )
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    table = Path(f"{arguments.out}.csv")
    settings = {"config": yaml.safe_load(arguments.config.read_text()), "options": options}
    rows = read_rows(table, settings)
    for category in arguments.categories:
        for seed in arguments.seeds:
            if any(row["category"] == category and row["seed"] == seed for row in rows):
                continue
            print(f"{category}, seed {seed}: training", flush=True)
            with tempfile.TemporaryDirectory() as folder:
                where = ["--data.root", arguments.root] if arguments.root is not None else []
                command = train_command(arguments.config, category, seed, Path(folder), [*options, *where])
                start = time.perf_counter()
                subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
                seconds = time.perf_counter() - start
                model = load(Path(folder))
                data = datamodule(arguments.config, category, arguments.root)
                measured = measure(model, data)
                common = {"category": category, "seed": seed, "train and test seconds": round(seconds)}
                added = [{**common, "map": name, **measured[name]} for name in MAPS if name in measured]
                rows += added
                write_rows(table, rows, settings)
                print(pd.DataFrame(added).to_string(index=False), flush=True)
                if seed == arguments.seeds[0]:
                    picture = arguments.out.with_name(f"{arguments.out.name}_{category}.png")
                    draw(model, data, picture)
    report = summary(pd.DataFrame(rows))
    Path(f"{arguments.out}.md").write_text(report)
    print(report)


def train_command(config: Path, category: str, seed: int, folder: Path, options: list[str]) -> list[str]:
    anomalib = str(Path(sys.executable).with_name("anomalib"))
    command = [anomalib, "train", "--config", str(config), "--data.category", category, "--seed_everything", str(seed)]
    return [*command, "--default_root_dir", str(folder), *options]


def load(folder: Path) -> TwoStageSuperpixel:
    (checkpoint,) = folder.rglob("*.ckpt")
    return TwoStageSuperpixel.load_from_checkpoint(checkpoint, map_location="cpu").eval()


def datamodule(config: Path, category: str, root: str | None) -> AnomalibDataModule:
    """The data of the configuration, in its folder or in another."""
    data: dict[str, Any] = yaml.safe_load(config.read_text())["data"]
    data.setdefault("init_args", {})["category"] = category
    if root is not None:
        data["init_args"]["root"] = root
    module = get_datamodule(data)
    module.prepare_data()
    module.setup()
    return module


def measure(model: TwoStageSuperpixel, data: AnomalibDataModule) -> dict[str, dict[str, float]]:
    """Metrics of each map over the test images, at the model's input size, before any normalisation."""
    measured = quality(model, data.test_dataloader())
    return {name: {metric: round(value, 4) for metric, value in row.items()} for name, row in measured.items()}


@torch.no_grad()
def choose(model: TwoStageSuperpixel, data: AnomalibDataModule) -> dict[str, int]:
    """Successes and failures, by what they are: the numbers of test images."""
    good, defective = [], []
    for i, item in enumerate(data.test_data):
        images, masks = as_the_model_sees(model, ImageBatch.collate([item]))
        final = model.model.stages(images).anomaly_map
        if masks.any():
            defective.append((float(binary_average_precision(final.flatten(), masks.flatten().int())), i))
        else:
            good.append((float(model.model.score(final)), i))
    good, defective = sorted(good), sorted(defective, reverse=True)
    return {
        "best": defective[0][1],
        "second best": defective[1][1],
        "second worst": defective[-2][1],
        "worst": defective[-1][1],
        "good, calmest": good[0][1],
        "good, loudest": good[-1][1],
    }


@torch.no_grad()
def draw(model: TwoStageSuperpixel, data: AnomalibDataModule, path: Path) -> None:
    """One row per image: query, ground truth, stage one, superpixels, refined image, final map."""
    chosen = choose(model, data)
    titles = ("image", "ground truth", "stage one", "superpixels", "refined image", "final map")
    figure, axes = plt.subplots(len(chosen), len(titles), figsize=(2 * len(titles), 2 * len(chosen)), squeeze=False)
    for row, (kind, number) in zip(axes, chosen.items(), strict=True):
        item = data.test_data[number]
        images, masks = as_the_model_sees(model, ImageBatch.collate([item]))
        stages = model.model.stages(images)
        picture = images[0].permute(1, 2, 0).clamp(0, 1)
        borders = torch.from_numpy(find_boundaries(stages.labels[0].numpy(), mode="inner"))
        outlined = torch.where(borders.unsqueeze(-1), torch.tensor([1.0, 0.9, 0.1]), picture)
        refined = stages.refined_image[0].permute(1, 2, 0).clamp(0, 1)
        shown = (picture, masks[0], stages.stage_one_map[0, 0], outlined, refined, stages.anomaly_map[0, 0])
        for axis, values, title in zip(row, shown, titles, strict=True):
            axis.imshow(values, vmin=0, vmax=1, cmap="inferno" if values.ndim == 2 else None)
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
            if axis in axes[0]:
                axis.set_title(title)
        row[0].set_ylabel(kind)
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    plt.close(figure)


def summary(rows: pd.DataFrame) -> str:
    """Markdown table: mean over the seeds, with the standard deviation behind it where there are several."""
    lines = ["| category | map | " + " | ".join(METRICS) + " |", "|---" * (len(METRICS) + 2) + "|"]
    order = list(dict.fromkeys(rows["category"]))
    groups: list[tuple[str, pd.DataFrame]] = [(name, rows[rows["category"] == name]) for name in order]
    if len(groups) > 1:
        groups.append((MEAN, over_categories(rows.assign(label=""))))
    for category, group in groups:
        for name in (name for name in MAPS if name in set(group["map"])):
            cells = [spread(group.loc[group["map"] == name, metric]) for metric in METRICS]
            lines.append(f"| {category} | {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
