# SPDX-License-Identifier: Apache-2.0
"""What is exported answers like `Engine.predict`, on photographs twice as large as the model's input."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import pytest
import torch
import yaml
from anomalib.data import ImageBatch
from anomalib.deploy import OpenVINOInferencer, TorchInferencer
from anomalib.engine import Engine
from anomalib.pre_processing import PreProcessor
from torchmetrics.functional.classification import binary_auroc
from torchvision.transforms.v2 import Resize

from anomalib_twostage import SampleTextures, TwoStageSuperpixel
from anomalib_twostage.data.sample_textures import SIZE
from anomalib_twostage.model.export import _FIRST_LAYER, _graphs

from .conftest import run_anomalib

pytestmark = pytest.mark.integration

INPUT = 64  # of the model; the photographs are SIZE = 128 pixels wide
STEPS = 120
TOLERANCE = 1e-3
# OpenVINO computes in bfloat16 where the processor has it, unless told otherwise.
FLOAT32 = {"INFERENCE_PRECISION_HINT": "f32"}


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Working folder, where OpenVINO leaves its cache."""
    folder = tmp_path_factory.mktemp("export")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield folder


def datamodule(folder: Path) -> SampleTextures:
    data = SampleTextures(root=folder / "data", category="brick")
    data.prepare_data()
    data.setup()
    return data


@pytest.fixture(scope="module")
def data(folder: Path) -> SampleTextures:
    return datamodule(folder)


@pytest.fixture(scope="module")
def photographs(folder: Path) -> torch.Tensor:
    """The test images at their own size; a datamodule that the engine has seen resizes them."""
    images = torch.cat([batch.image for batch in datamodule(folder).test_dataloader()])
    assert images.shape[-2:] == (SIZE, SIZE)
    return images


@pytest.fixture(scope="module")
def checkpoint(folder: Path, data: SampleTextures, photographs: torch.Tensor) -> Path:
    """A checkpoint of both stages, trained for seconds."""
    torch.manual_seed(0)
    resize = Resize([INPUT, INPUT], antialias=True)
    model = TwoStageSuperpixel(
        "small", segment_size=8, learning_rate=4e-3, pre_processor=PreProcessor(resize), visualizer=False
    )
    engine = Engine(
        max_steps=STEPS,
        max_epochs=-1,
        val_check_interval=STEPS,
        check_val_every_n_epoch=None,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        default_root_dir=folder / "results",
    )
    engine.fit(model, datamodule=data)
    # So short a training leaves it to chance which images get something selected: make it every second one.
    with torch.no_grad():
        highest = model.model.stage_one(*model.model.seen(resize(photographs)).levels).flatten(1).amax(dim=1)
        threshold = torch.tensor(model.model.refiner.threshold).logit()
        model.model.stage_one.head.bias += threshold - highest.quantile(0.5)
    engine.validate(model, datamodule=data)
    path = folder / "model.ckpt"
    engine.trainer.save_checkpoint(path)
    return path


@pytest.fixture(scope="module")
def engine(folder: Path) -> Engine:
    return Engine(accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=folder / "results")


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> TwoStageSuperpixel:
    return TwoStageSuperpixel.load_from_checkpoint(checkpoint, visualizer=False).eval()


@pytest.fixture(scope="module")
def predictions(checkpoint: Path, engine: Engine, data: SampleTextures) -> ImageBatch:
    """What `Engine.predict` says of every test image."""
    model = TwoStageSuperpixel.load_from_checkpoint(checkpoint, visualizer=False)
    batches = engine.predict(model, dataloaders=data.test_dataloader())
    assert batches is not None
    return ImageBatch.collate([item for batch in batches for item in batch])


def answers(inferencer: TorchInferencer | OpenVINOInferencer, predictions: ImageBatch) -> dict[str, torch.Tensor]:
    """What an inferencer says of the same images, one file after the other."""
    found = [inferencer.predict(path) for path in predictions.image_path]
    names = ("anomaly_map", "pred_score", "pred_label")
    return {name: torch.cat([torch.as_tensor(np.asarray(getattr(one, name))) for one in found]) for name in names}


def pixel_auroc(maps: torch.Tensor, predictions: ImageBatch) -> float:
    return float(binary_auroc(maps.flatten(), predictions.gt_mask.flatten().int()))


def assert_same(found: dict[str, torch.Tensor], predictions: ImageBatch) -> None:
    assert found["anomaly_map"].squeeze().shape == (len(predictions.image_path), INPUT, INPUT)
    difference = (found["anomaly_map"].squeeze() - predictions.anomaly_map.squeeze()).abs()
    assert difference.flatten(1).mean(dim=1).max() <= TOLERANCE
    torch.testing.assert_close(found["pred_score"].squeeze(), predictions.pred_score, atol=TOLERANCE, rtol=0)
    assert torch.equal(found["pred_label"].squeeze().bool(), predictions.pred_label)
    expected = pixel_auroc(predictions.anomaly_map, predictions)
    assert pixel_auroc(found["anomaly_map"], predictions) == pytest.approx(expected, abs=TOLERANCE)


def test_the_test_images_put_every_part_to_use(
    model: TwoStageSuperpixel, photographs: torch.Tensor, predictions: ImageBatch
) -> None:
    """Otherwise exports could lack superpixels, stage two or antialiasing, and nobody would see it."""
    with torch.no_grad():
        stages = model.model.stages(model.pre_processor.transform(photographs))
        plain = model.post_processor(model.model(Resize([INPUT, INPUT], antialias=False)(photographs)))
    assert (stages.pooled_map - stages.stage_one_map).abs().mean() > 5 * TOLERANCE
    share = stages.selected.flatten(1).amax(dim=1).mean()
    assert 0.4 < share < 0.6
    assert 0.2 < predictions.pred_label.float().mean() < 0.9
    assert (plain.anomaly_map - predictions.anomaly_map.reshape_as(plain.anomaly_map)).abs().mean() > TOLERANCE


def test_torch_export_answers_like_predict(
    model: TwoStageSuperpixel, engine: Engine, predictions: ImageBatch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = engine.export(model, "torch", export_root=tmp_path)
    # anomalib's torch export is a pickle of the whole model by design, and its inferencer asks for this.
    monkeypatch.setenv("TRUST_REMOTE_CODE", "1")
    with torch.no_grad():
        assert_same(answers(TorchInferencer(path, device="cpu"), predictions), predictions)


@pytest.fixture(scope="module")
def onnx(model: TwoStageSuperpixel, engine: Engine, folder: Path) -> Path:
    """An ONNX file for any number of images of any size."""
    path = engine.export(model, "onnx", export_root=folder / "dynamic")
    assert path is not None
    return Path(path)


@pytest.fixture
def exporting(onnx: Path, model: TwoStageSuperpixel, monkeypatch: pytest.MonkeyPatch) -> TwoStageSuperpixel:
    """The model, with an export to OpenVINO that begins from the finished ONNX file: tracing takes its time."""
    monkeypatch.setattr(model, "to_onnx", lambda *args, **kwargs: onnx)
    return model


def test_openvino_export_answers_like_predict(
    exporting: TwoStageSuperpixel, engine: Engine, predictions: ImageBatch, tmp_path: Path
) -> None:
    path = engine.export(exporting, "openvino", export_root=tmp_path)
    assert_same(answers(OpenVINOInferencer(path, device="CPU", config=FLOAT32), predictions), predictions)


@pytest.mark.parametrize("shape", [(1, INPUT, INPUT), (3, SIZE, SIZE), (2, 57, 150)])
def test_one_export_takes_any_number_of_images_of_any_size(
    shape: tuple[int, int, int], onnx: Path, model: TwoStageSuperpixel, photographs: torch.Tensor
) -> None:
    count, height, width = shape
    images = torch.cat([photographs, photographs.flip(-1)], dim=-1)[:count, :, :height, :width]
    answer = openvino.Core().compile_model(str(onnx), "CPU", FLOAT32)(images.numpy())
    with torch.no_grad():
        expected = model.post_processor(model.model(model.pre_processor.transform(images)))
    # The map has the size that the pre-processor resizes to, whatever the images had.
    assert answer["anomaly_map"].shape == (count, 1, INPUT, INPUT)
    assert np.abs(answer["anomaly_map"] - expected.anomaly_map.numpy()).mean() <= TOLERANCE
    np.testing.assert_allclose(answer["pred_score"], expected.pred_score.numpy(), atol=TOLERANCE)


def test_onnx_export_by_the_command_answers_like_predict(
    checkpoint: Path, predictions: ImageBatch, folder: Path
) -> None:
    transform = {"class_path": "torchvision.transforms.v2.Resize", "init_args": {"size": [INPUT, INPUT]}}
    pre_processor = {"class_path": "anomalib.pre_processing.PreProcessor", "init_args": {"transform": transform}}
    settings = {"variant": "small", "segment_size": 8, "pre_processor": pre_processor}
    config = folder / "export.yaml"
    config.write_text(yaml.safe_dump({"model": {"class_path": "TwoStageSuperpixel", "init_args": settings}}))
    options: tuple[Any, ...] = ("--export_type", "onnx", "--export_root", folder, "--input_size", f"[{SIZE}, {SIZE}]")
    run_anomalib("export", "--config", config, "--ckpt_path", checkpoint, *options, cwd=folder)
    path = folder / "weights/onnx/model.onnx"
    assert_same(answers(OpenVINOInferencer(path, device="CPU", config=FLOAT32), predictions), predictions)


def test_int8_export_ranks_pixels_like_predict(
    exporting: TwoStageSuperpixel, engine: Engine, predictions: ImageBatch, folder: Path, tmp_path: Path
) -> None:
    calibration = datamodule(folder)
    path = engine.export(
        exporting, "openvino", export_root=tmp_path, compression_type="int8_ptq", datamodule=calibration
    )
    found = answers(OpenVINOInferencer(path, device="CPU", config=FLOAT32), predictions)
    expected = pixel_auroc(predictions.anomaly_map, predictions)
    assert pixel_auroc(found["anomaly_map"], predictions) == pytest.approx(expected, abs=0.01)
    # A ranking survives a shift of all values, but the threshold does not.
    assert (found["anomaly_map"].squeeze() - predictions.anomaly_map.squeeze()).abs().mean() < 0.05
    assert (found["pred_score"].squeeze() - predictions.pred_score).abs().median() < 0.1
    for graph in _graphs(openvino.Core().read_model(path)):
        for node in graph.get_ops():
            if node.get_type_name() == "Convolution" and node.input_value(1).shape[1] <= _FIRST_LAYER:
                assert node.input_value(0).get_node().get_type_name() != "FakeQuantize", node.get_friendly_name()
    # Quantised means that weights are stored in a byte each, not in four; the good images always are.
    template = sum(buffer.nbytes for buffer in exporting.model.template.buffers())
    weights = sum(parameter.nbytes for parameter in exporting.model.parameters())
    assert Path(path).with_suffix(".bin").stat().st_size < template + 0.4 * weights


@pytest.mark.parametrize(("template", "zoom"), [(True, 1), (False, 2)])
def test_int8_leaves_a_backbone_its_precision(
    template: bool, zoom: int, photographs: torch.Tensor, tmp_path: Path
) -> None:
    """With a memory and without, features are told apart by their distance from those that were measured in float32."""
    pre_processor = PreProcessor(Resize([INPUT * zoom, INPUT * zoom], antialias=True))
    model = TwoStageSuperpixel(
        template=template, magnification=1, zoom=zoom, pre_processor=pre_processor, visualizer=False
    ).eval()
    model.model.remember((image, number) for number, image in enumerate(pre_processor.transform(photographs[:4])))
    calibration = datamodule(tmp_path)
    path = model.to_openvino(tmp_path, compression_type="int8_ptq", datamodule=calibration)
    quantised = {
        tuple(node.input_value(1).shape)
        for graph in _graphs(openvino.Core().read_model(path))
        for node in graph.get_ops()
        if "Convolution" in node.get_type_name() and node.input_value(0).get_node().get_type_name() == "FakeQuantize"
    }
    parts = [*model.model.stage_one.modules(), *model.model.stage_two.modules()]
    own = {tuple(part.weight.shape) for part in parts if isinstance(part, torch.nn.Conv2d)}
    assert quantised
    assert quantised <= own
