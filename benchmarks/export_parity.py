# SPDX-License-Identifier: Apache-2.0
"""Exports against `Engine.predict`: maps, scores, labels, pixel AUROC, size and time of every kind of export.

    python benchmarks/export_parity.py --out results/export_parity.md
    python benchmarks/export_parity.py --checkpoint path/to/model.ckpt --category grass

Trains the small variant for some steps on a category of the sample textures, unless there is a checkpoint, and exports
it through anomalib's `Engine.export`. Each export answers through anomalib's inferencer for it, image by image, and is
compared over the whole test set. The exports to OpenVINO share two ONNX files, one for images of the files' size and
one for any size, because tracing is what takes the time; INT8_PTQ is calibrated with the validation images.

OpenVINO computes in bfloat16 where the processor has it, and float32 must be asked for: "f32" is
`OpenVINOInferencer(path, config={"INFERENCE_PRECISION_HINT": "f32"})`, "default" is without.
"""

import argparse
import logging
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from _timing import Report, parse, parser
from anomalib.data import ImageBatch
from anomalib.deploy import CompressionType, OpenVINOInferencer, TorchInferencer
from anomalib.engine import Engine
from anomalib.pre_processing import PreProcessor
from torchmetrics.functional.classification import binary_auroc
from torchvision.transforms.v2 import Resize

from anomalib_twostage import SampleTextures, TwoStageSuperpixel
from anomalib_twostage.data.sample_textures import CATEGORIES

Inferencer = TorchInferencer | OpenVINOInferencer


def main() -> None:
    options = parser(__doc__, rounds=1)
    options.add_argument("--checkpoint", type=Path, help="of a model trained on the category, instead of training one")
    options.add_argument("--category", default="brick", choices=CATEGORIES)
    options.add_argument("--steps", type=int, default=150, help="training steps (default: %(default)s)")
    options.add_argument("--size", type=int, default=128, help="side of the model's input (default: %(default)s)")
    arguments = parse(options)
    arguments.steps = 4 if arguments.quick else arguments.steps
    arguments.checkpoint = arguments.checkpoint and arguments.checkpoint.resolve()
    arguments.out = arguments.out and arguments.out.resolve()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    os.environ["TRUST_REMOTE_CODE"] = "1"  # anomalib's torch export is a pickle; these are ours
    report = Report(arguments, ("anomalib", "onnx", "openvino", "nncf"))
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)  # where OpenVINO leaves its cache
        compare(report, arguments)
        os.chdir("/")


def compare(report: Report, arguments: argparse.Namespace) -> None:
    engine = Engine(accelerator="cpu", logger=False, enable_progress_bar=False)
    checkpoint = arguments.checkpoint or train(arguments)
    model = TwoStageSuperpixel.load_from_checkpoint(checkpoint, visualizer=False).eval()
    test = datamodule(arguments.category)
    batches = engine.predict(model, dataloaders=test.test_dataloader())
    predictions = ImageBatch.collate([item for batch in batches for item in batch])
    auroc = pixel_auroc(predictions.anomaly_map, predictions)
    source = checkpoint.name if arguments.checkpoint else f"{arguments.steps} steps"
    report.line(
        f"Category {arguments.category}, model from {source}, {len(predictions.image_path)} test images, "
        f"pixel AUROC of Engine.predict {auroc:.4f}."
    )
    report.table(
        "export",
        "mean map difference",
        "of the worst image",
        "largest score difference",
        "labels that differ",
        "pixel AUROC",
        "its difference",
        "MiB",
        "ms per image",
    )
    for name, path, make in exports(engine, model, arguments):
        answers, milliseconds = predict(make(path), predictions)
        difference = (answers["anomaly_map"].squeeze() - predictions.anomaly_map.squeeze()).abs().flatten(1).mean(1)
        scores = (answers["pred_score"].flatten() - predictions.pred_score).abs()
        found = pixel_auroc(answers["anomaly_map"], predictions)
        report.row(
            name,
            f"{difference.mean():.1e}",
            f"{difference.max():.1e}",
            f"{scores.max():.1e}",
            int((answers["pred_label"].flatten().bool() != predictions.pred_label).sum()),
            f"{found:.4f}",
            f"{found - auroc:+.4f}",
            sum(file.stat().st_size for file in path.parent.iterdir()) / 2**20,
            milliseconds,
        )


def train(arguments: argparse.Namespace) -> Path:
    resize = PreProcessor(Resize([arguments.size, arguments.size], antialias=True))
    model = TwoStageSuperpixel("small", segment_size=8, learning_rate=4e-3, pre_processor=resize, visualizer=False)
    engine = Engine(
        max_steps=arguments.steps,
        max_epochs=-1,
        val_check_interval=arguments.steps,
        check_val_every_n_epoch=None,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
    )
    engine.fit(model, datamodule=datamodule(arguments.category))
    path = Path("model.ckpt").resolve()
    engine.trainer.save_checkpoint(path)
    return path


def datamodule(category: str) -> SampleTextures:
    data = SampleTextures(root="data", category=category)
    data.prepare_data()
    data.setup()
    return data


def exports(
    engine: Engine, model: TwoStageSuperpixel, arguments: argparse.Namespace
) -> list[tuple[str, Path, Callable[[Path], Inferencer]]]:
    """Name, file and inferencer of each export."""
    openvino = partial(OpenVINOInferencer, device="CPU", config={"INFERENCE_NUM_THREADS": arguments.threads})
    exact = partial(
        OpenVINOInferencer,
        device="CPU",
        config={"INFERENCE_NUM_THREADS": arguments.threads, "INFERENCE_PRECISION_HINT": "f32"},
    )
    height, width = datamodule(arguments.category).test_data[0].image.shape[-2:]  # the model resizes inside the graph
    made = [("torch", Path(engine.export(model, "torch", export_root="torch")), partial(TorchInferencer, device="cpu"))]
    quiet = {"verbose": False}
    fixed = Path(engine.export(model, "onnx", export_root="fixed", input_size=(height, width), onnx_kwargs=quiet))
    dynamic = Path(engine.export(model, "onnx", export_root="dynamic", onnx_kwargs=quiet))
    made += [("ONNX, fixed size, f32", fixed, exact), ("ONNX, any size, f32", dynamic, exact)]
    for title, onnx in (("fixed size", fixed), ("any size", dynamic)):
        model.to_onnx = finished(onnx)
        for compression in (None, CompressionType.FP16, CompressionType.INT8, CompressionType.INT8_PTQ):
            if compression is not None and onnx is dynamic:
                continue
            kind = compression.value.upper() if compression else "FP32"
            data = datamodule(arguments.category) if compression == CompressionType.INT8_PTQ else None
            root = f"{kind} {title}"
            path = engine.export(model, "openvino", export_root=root, compression_type=compression, datamodule=data)
            made += [(f"OpenVINO {kind}, {title}, f32", Path(path), exact)]
            if onnx is fixed and compression in (None, CompressionType.INT8_PTQ):
                made += [(f"OpenVINO {kind}, {title}, default", Path(path), openvino)]
    return made


def finished(path: Path) -> Callable[..., Path]:
    """An export to ONNX that has been made already."""
    return lambda *_args, **_kwargs: path


def predict(inferencer: Inferencer, predictions: ImageBatch) -> tuple[dict[str, torch.Tensor], float]:
    """What an inferencer says of the same images, and the median milliseconds per image, reading the file included."""
    found, times = [], []
    with torch.inference_mode():
        for path in predictions.image_path:
            start = time.perf_counter()
            found.append(inferencer.predict(path))
            times.append((time.perf_counter() - start) * 1e3)
    names = ("anomaly_map", "pred_score", "pred_label")
    answers = {name: torch.cat([torch.as_tensor(np.asarray(getattr(one, name))) for one in found]) for name in names}
    return answers, statistics.median(times)


def pixel_auroc(maps: torch.Tensor, predictions: ImageBatch) -> float:
    return float(binary_auroc(maps.flatten(), predictions.gt_mask.flatten().int()))


if __name__ == "__main__":
    main()
