# SPDX-License-Identifier: Apache-2.0
"""The stock `anomalib` command, with nothing but the installed plugin."""

from pathlib import Path

import pytest
import yaml
from anomalib.data import MVTecAD
from PIL import Image

from anomalib_twostage import TwoStageSuperpixel

from .conftest import run_anomalib

pytestmark = pytest.mark.integration


def test_train_fits_both_stages_then_tests_and_writes_pictures(trained: Path) -> None:
    assert TwoStageSuperpixel.load_from_checkpoint(trained / "checkpoint").model.stage == 2
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
