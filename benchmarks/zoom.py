# SPDX-License-Identifier: Apache-2.0
"""What a closer look is worth: the default on reduced images, with zoom, and on the whole images outright.

    python benchmarks/zoom.py --root path/to/images --categories capsule grid macaroni1 --out results/zoom.csv
    python -m anomalib_twostage.benchmark.report results/zoom.csv --out results/zoom

Each category is a folder with ``train/good``, ``test/good``, ``test/<kind>`` and ``ground_truth/<kind>``. All maps are
measured against the masks as they lie in the folder. Trained weights are kept beside the table: the same command goes
on where it was stopped.
"""

import argparse
import platform
import statistics
import sys
import time
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path

import torch
from _curves import BinnedCurves
from _timing import machine
from anomalib.data import Folder
from anomalib.engine import Engine
from lightning.pytorch import seed_everything
from PIL import Image
from torch.nn import functional

from anomalib_twostage import TwoStageSuperpixel
from anomalib_twostage.benchmark.table import FINAL, ResultsTable, Row, RunKey
from anomalib_twostage.common.files import written_whole
from anomalib_twostage.model.variants import VARIANTS

KINDS = ("reduced", "zoom", "outright")
MAGNIFICATION = VARIANTS["default"].magnification


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--root", type=Path, required=True, help="folder of the categories")
    options.add_argument("--categories", nargs="+", required=True)
    options.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    options.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    options.add_argument(
        "--zoom", type=int, default=3, help="also how much 'reduced' is reduced (default: %(default)s)"
    )
    options.add_argument("--zoom_windows", type=int, default=8, help="changes no training (default: %(default)s)")
    options.add_argument(
        "--magnification", type=float, default=MAGNIFICATION, help="of what stage one sees (default: %(default)s)"
    )
    options.add_argument("--max_steps", type=int, default=600)
    options.add_argument("--precision", default="32-true", help="bf16-mixed where the processor has it")
    options.add_argument("--accelerator", default="cpu", choices=("cpu", "cuda"))
    options.add_argument("--threads", type=int, default=2)
    options.add_argument("--out", type=Path, default=Path("results/zoom.csv"))
    arguments = options.parse_args()
    torch.set_num_threads(arguments.threads)
    with ResultsTable(arguments.out) as table:
        for seed in arguments.seeds:
            for category in arguments.categories:
                for kind in arguments.kinds:
                    key = RunKey(label(kind, arguments), category, seed)
                    row = table.run(key)
                    if row is not None:
                        refuse_other(arguments, key, row)
                    else:
                        print(key, flush=True)
                        table.add(train_and_measure(key, kind, arguments))


def refuse_other(arguments: argparse.Namespace, key: RunKey, row: Row) -> None:
    """End the program if a row was measured with other settings than those that are asked for now."""
    for column, name in (("steps", "max_steps"), ("precision", "precision")):
        asked = getattr(arguments, name)
        if str(row[column]) != str(asked):
            found = f"{arguments.out} holds {key} with {name} {row[column]} (now {asked})"
            sys.exit(f"Error: {found}. Write to another file (--out).")


def label(kind: str, arguments: argparse.Namespace) -> str:
    zoom, windows, magnification = arguments.zoom, arguments.zoom_windows, arguments.magnification
    name = {"reduced": f"reduced by {zoom}", "zoom": f"zoom {zoom}", "outright": "outright"}[kind]
    if magnification != MAGNIFICATION:
        name += ", not magnified" if magnification == 1 else f", magnified by {magnification:g}"
    return name + (f", {windows} windows" if kind == "zoom" and windows != 8 else "")


def weights_file(folder: Path, kind: str, zoom: int, magnification: float, category: str, seed: int) -> Path:
    name = kind if kind == "outright" else f"{kind}-{zoom}"
    return folder / f"{name}-{magnification:g}-{category}-{seed}.pt"


def train_and_measure(key: RunKey, kind: str, arguments: argparse.Namespace) -> list[dict[str, object]]:
    data = folder(arguments.root / key.category)
    data.setup()
    width, height = Image.open(data.train_data.samples["image_path"].iloc[0]).size
    side = arguments.zoom if kind == "reduced" else 1
    pre_processor = TwoStageSuperpixel.configure_pre_processor((-(-height // side), -(-width // side)))
    zoom = arguments.zoom if kind == "zoom" else 1
    seed_everything(key.seed)
    model = TwoStageSuperpixel(
        zoom=zoom,
        zoom_windows=arguments.zoom_windows,
        magnification=arguments.magnification,
        pre_processor=pre_processor,
        visualizer=False,
        evaluator=False,
    )
    kept_in = arguments.out.with_suffix("")
    weights = weights_file(kept_in, kind, arguments.zoom, arguments.magnification, key.category, key.seed)
    kept = torch.load(weights, weights_only=True) if weights.exists() else {}
    asked = {"steps": arguments.max_steps, "precision": arguments.precision}
    if all(kept.get(name) == value for name, value in asked.items()):
        model.load_state_dict(kept["weights"])
    else:
        seconds = train(model, data, arguments)
        kept = {**asked, "weights": model.state_dict(), "seconds": seconds, "threads": arguments.threads}
        weights.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(weights) as partial:
            torch.save(kept, partial)
    model.to(arguments.accelerator).eval()
    batches = folder(arguments.root / key.category)  # one that no engine has seen keeps its masks as they are
    batches.setup()
    with torch.autocast(arguments.accelerator, torch.bfloat16, enabled=arguments.precision == "bf16-mixed"):
        rows = [{**key._asdict(), "map": name, **values} for name, values in measured(model, batches).items()]
    rows[-1] |= {
        "model": type(model).__name__,
        "steps": arguments.max_steps,
        "training seconds": round(kept["seconds"], 1),
        "device": machine(arguments.accelerator),
        "threads": kept["threads"],  # that the seconds were taken with
        "precision": arguments.precision,
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "anomalib", "anomalib-twostage")},
    }
    assert rows[-1]["map"] == FINAL
    return rows


@torch.no_grad()
def measured(model: TwoStageSuperpixel, data: Folder) -> dict[str, dict[str, float]]:
    """Metrics of the maps, against the masks at the size of their files, and the share that was looked at closely."""
    two_stage, curves = model.model, defaultdict(BinnedCurves)
    looked: dict[bool, list[float]] = {False: [], True: []}
    for batch in data.test_dataloader():
        images = model.pre_processor.transform(batch.image).to(model.device).as_subclass(torch.Tensor)
        stages = two_stage.stages(images)
        # The stages' maps are smoothed like the final one, so that they differ by the method's parts alone.
        maps = {
            "memory": two_stage.smooth(stages.distance),
            "without stage two": two_stage.smooth(two_stage.without_stage_two(stages)),
            FINAL: stages.anomaly_map,
        }
        for name, values in maps.items():
            size = batch.image.shape[-2:]
            planes = functional.interpolate(values.float(), size, mode="bilinear").squeeze(1).cpu()
            curves[name].add(planes, batch.gt_mask, two_stage.score(values.float()))
        if stages.looked is not None:
            for share, label in zip(stages.looked.mean(dim=(1, 2, 3)), batch.gt_label, strict=True):
                looked[bool(label)].append(float(share))
    for defective, shares in looked.items():
        if shares:
            kind = "defective" if defective else "good"
            print(f"looked closely at {100 * statistics.mean(shares):.1f} % of the {kind} images", flush=True)
    return {name: curve.compute() for name, curve in curves.items()}


def train(model: TwoStageSuperpixel, data: Folder, arguments: argparse.Namespace) -> float:
    engine = Engine(
        max_steps=arguments.max_steps,
        accelerator=arguments.accelerator,
        devices=1,
        precision=arguments.precision,
        logger=False,
        enable_progress_bar=False,
        limit_val_batches=0,
        default_root_dir=arguments.out.parent / "runs",
    )
    start = time.perf_counter()
    engine.fit(model, datamodule=data)
    return time.perf_counter() - start


def folder(root: Path) -> Folder:
    kinds = sorted(path.name for path in (root / "test").iterdir() if path.name != "good")
    return Folder(
        name=root.name,
        root=root,
        normal_dir="train/good",
        normal_test_dir="test/good",
        abnormal_dir=[f"test/{kind}" for kind in kinds],
        mask_dir=[f"ground_truth/{kind}" for kind in kinds],
        val_split_mode="same_as_test",  # or half of the test images would be kept for validation
        train_batch_size=8,
        eval_batch_size=4,
        num_workers=0,
    )


if __name__ == "__main__":
    main()
