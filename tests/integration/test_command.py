# SPDX-License-Identifier: Apache-2.0
"""The stock `anomalib` command, with nothing but the installed plugin."""

from pathlib import Path

import numpy as np
import openvino
import pytest
import torch
import yaml
from anomalib.data import ImageBatch, MVTecAD, PredictDataset
from anomalib.deploy import OpenVINOInferencer
from anomalib.engine import Engine
from PIL import Image

from anomalib_twostage import TwoStageSuperpixel

from .conftest import SIZE, run_anomalib

pytestmark = pytest.mark.integration


def test_train_fits_both_stages_then_tests_and_writes_pictures(trained: Path) -> None:
    state = torch.load(trained / "checkpoint", weights_only=True)["state_dict"]
    assert int(state["model._extra_state"]) == 2
    pictures = [Image.open(path) for path in sorted((trained / "results").rglob("images/**/*.png"))]
    assert len(pictures) == 6
    assert all(picture.width > picture.height for picture in pictures)


def test_fit_then_validate_then_test_from_the_checkpoint(config: Path, trained: Path, tmp_path: Path) -> None:
    root = ("--default_root_dir", tmp_path / "results")
    run_anomalib("fit", "--config", config, *root, cwd=tmp_path)
    assert list(tmp_path.rglob("*.ckpt"))
    run_anomalib("validate", "--config", config, *root, "--ckpt_path", trained / "checkpoint", cwd=tmp_path)
    output = run_anomalib("test", "--config", config, *root, "--ckpt_path", trained / "checkpoint", cwd=tmp_path)
    for metric in ("image_AUROC", "image_F1Score", "pixel_AUROC", "pixel_F1Score"):
        assert metric in output


@pytest.mark.parametrize("target", ["plate/test/square", "plate/test/square/000.png"])
def test_predict_a_folder_and_a_single_image(
    target: str, config: Path, dataset: Path, trained: Path, tmp_path: Path
) -> None:
    settings = yaml.safe_load(config.read_text())
    settings["data"] = str(dataset / target)
    own = tmp_path / "predict.yaml"
    own.write_text(yaml.safe_dump(settings))
    root = ("--default_root_dir", tmp_path / "results")
    run_anomalib("predict", "--config", own, *root, "--ckpt_path", trained / "checkpoint", cwd=tmp_path)
    pictures = list((tmp_path / "results").rglob("images/**/*.png"))
    assert len(pictures) == (1 if target.endswith(".png") else 3)


def test_benchmark_within_a_budget_from_the_environment(config: Path, tmp_path: Path) -> None:
    settings = yaml.safe_load(config.read_text())
    # anomalib's benchmark takes plain values only, so the pre-processor is the default's.
    del settings["model"]["init_args"]["pre_processor"]
    benchmark = {"seed": 0, "model": settings["model"], "data": settings["data"]}
    own = tmp_path / "benchmark.yaml"
    own.write_text(yaml.safe_dump({"accelerator": ["cpu"], "benchmark": benchmark}))
    run_anomalib("benchmark", "--config", own, cwd=tmp_path, PL_TRAINER_MAX_EPOCHS="2")
    (table,) = tmp_path.rglob("results.csv")
    header, row = table.read_text().splitlines()
    result = dict(zip(header.split(","), row.split(","), strict=True))
    assert result["model.class_path"] == "TwoStageSuperpixel"
    assert 0 <= float(result["pixel_AUROC"]) <= 1


@pytest.fixture(scope="module")
def images(dataset: Path) -> torch.Tensor:
    paths = sorted((dataset / "plate/test").rglob("*.png"))
    arrays = [np.asarray(Image.open(path).convert("RGB")) for path in paths]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 255


@pytest.fixture(scope="module")
def predictions(dataset: Path, trained: Path) -> ImageBatch:
    """What `Engine.predict` says of every test image."""
    model = TwoStageSuperpixel.load_from_checkpoint(trained / "checkpoint", visualizer=False)
    data = PredictDataset(dataset / "plate/test")
    batches = Engine(accelerator="cpu", logger=False, enable_progress_bar=False).predict(model, dataset=data)
    assert batches is not None
    items = [item for batch in batches for item in batch]
    items.sort(key=lambda item: item.image_path)
    return ImageBatch.collate(items)


def export(trained: Path, config: Path, folder: Path, kind: str, *options: str) -> Path:
    arguments = ("--config", config, "--ckpt_path", trained / "checkpoint", "--export_type", kind)
    run_anomalib("export", *arguments, "--export_root", folder, *options, cwd=folder)
    suffix = {"torch": "pt", "onnx": "onnx", "openvino": "xml"}[kind]
    (path,) = folder.rglob(f"model.{suffix}")
    return path


@pytest.fixture(scope="module")
def export_config(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    # The export command takes a data module only for quantisation.
    settings = yaml.safe_load(config.read_text())
    del settings["data"]
    path = tmp_path_factory.mktemp("export") / "export.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def assert_same(predictions: ImageBatch, maps: np.ndarray, scores: np.ndarray, labels: np.ndarray) -> None:
    # Wide, because the surfaces are pure noise: there the last bit decides which superpixel a pixel joins.
    tolerance = 1e-2
    expected = predictions.anomaly_map.numpy().squeeze()
    assert np.abs(maps.squeeze() - expected).mean() <= tolerance
    np.testing.assert_allclose(scores.squeeze(), predictions.pred_score.numpy(), atol=tolerance)
    # anomalib's threshold is one of the validation scores. The images on it, here the defects, which all score alike,
    # get their labels from rounding.
    decided = np.abs(predictions.pred_score.numpy() - 0.5) > tolerance
    assert decided.sum() >= len(decided) / 2
    np.testing.assert_array_equal(labels.squeeze().astype(bool)[decided], predictions.pred_label.numpy()[decided])


def test_export_to_torch_answers_like_predict(
    trained: Path, export_config: Path, images: torch.Tensor, predictions: ImageBatch, tmp_path: Path
) -> None:
    path = export(trained, export_config, tmp_path, "torch")
    # Our own file: anomalib's torch export is a pickle of the whole model by design.
    model = torch.load(path, weights_only=False)["model"].eval()
    with torch.no_grad():
        answer = model(images)
    assert_same(predictions, answer.anomaly_map.numpy(), answer.pred_score.numpy(), answer.pred_label.numpy())


def test_export_to_onnx_answers_like_predict(
    trained: Path, export_config: Path, images: torch.Tensor, predictions: ImageBatch, tmp_path: Path
) -> None:
    path = export(trained, export_config, tmp_path, "onnx", "--input_size", f"[{SIZE}, {SIZE}]")
    # OpenVINO reads ONNX files as they are.
    answer = openvino.Core().compile_model(str(path), "CPU")(images.numpy())
    assert_same(predictions, answer["anomaly_map"], answer["pred_score"], answer["pred_label"])


def test_export_to_openvino_answers_like_predict(
    trained: Path,
    export_config: Path,
    dataset: Path,
    predictions: ImageBatch,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)  # OpenVINO leaves a cache where it runs
    path = export(trained, export_config, tmp_path, "openvino")
    inferencer = OpenVINOInferencer(path, device="CPU")
    answers = [inferencer.predict(path) for path in sorted((dataset / "plate/test").rglob("*.png"))]
    maps = np.concatenate([answer.anomaly_map for answer in answers])
    scores = np.concatenate([np.atleast_1d(answer.pred_score) for answer in answers])
    labels = np.concatenate([np.atleast_1d(answer.pred_label) for answer in answers])
    assert_same(predictions, maps, scores, labels)


def test_the_datamodule_takes_a_painter_from_yaml(config: Path, tmp_path: Path) -> None:
    settings = yaml.safe_load(config.read_text())
    painter = {"class_path": "anomalib_twostage.SuperpixelAnomaly", "init_args": {"probability": 1.0}}
    settings["data"]["init_args"]["train_augmentations"] = painter
    settings["trainer"]["max_epochs"] = 1
    own = tmp_path / "painted.yaml"
    own.write_text(yaml.safe_dump(settings))
    run_anomalib("fit", "--config", own, "--default_root_dir", tmp_path / "results", cwd=tmp_path)
    assert list(tmp_path.rglob("*.ckpt"))


def test_datamodule_from_python_takes_a_painter(dataset: Path) -> None:
    from anomalib_twostage import PerlinAnomaly

    data = MVTecAD(
        root=dataset,
        category="plate",
        train_batch_size=6,
        num_workers=0,
        train_augmentations=PerlinAnomaly(probability=1.0),
    )
    data.setup()
    batch = next(iter(data.train_dataloader()))
    assert batch.gt_mask.any(dim=(1, 2)).float().mean() > 0.5
