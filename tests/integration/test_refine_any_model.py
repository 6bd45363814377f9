# SPDX-License-Identifier: Apache-2.0
"""Superpixel refinement and region lists of a built-in model, through the stock command."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from anomalib.models import Padim
from skimage.io import imread

from anomalib_twostage import SuperpixelPostProcessor

from .conftest import SIZE, run_anomalib

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def padim_config(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The complete configuration, with Padim for the model."""
    settings = yaml.safe_load(config.read_text())
    settings["model"] = {
        "class_path": "Padim",
        "init_args": {
            "pre_trained": False,
            "pre_processor": settings["model"]["init_args"]["pre_processor"],
            "post_processor": {
                "class_path": "anomalib_twostage.SuperpixelPostProcessor",
                "init_args": {"segment_size": 8, "blend": 0.75, "pixel_sensitivity": 0.6},
            },
        },
    }
    writer = {"class_path": "anomalib_twostage.RegionWriter", "init_args": {"min_area": 5}}
    settings["trainer"]["callbacks"] = [writer]
    path = tmp_path_factory.mktemp("padim_config") / "padim.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


@pytest.fixture(scope="module")
def padim(padim_config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the run after `anomalib train`."""
    folder = tmp_path_factory.mktemp("padim")
    run_anomalib("train", "--config", padim_config, "--default_root_dir", folder, cwd=folder)
    return (folder / "Padim/MVTecAD/plate/latest").resolve()


def checkpoint(run: Path) -> Path:
    return run / "weights/lightning/model.ckpt"


def test_regions_of_the_test_images(padim: Path, dataset: Path) -> None:
    with (padim / "regions_test.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    squares = sorted((dataset / "plate/test/square").glob("*.png"))
    for path in squares:
        truth = imread(dataset / "plate/ground_truth/square" / f"{path.stem}_mask.png") > 0
        y, x = (int(axis.mean()) for axis in np.nonzero(truth))
        first = next(row for row in rows if Path(row["image_path"]).samefile(path))
        # Map and file are alike in size, and the first region of an image is that with the highest peak.
        assert int(first["x_min"]) == int(first["image_x_min"]) <= x < int(first["image_x_max"]) <= SIZE
        assert int(first["y_min"]) == int(first["image_y_min"]) <= y < int(first["image_y_max"]) <= SIZE
        assert int(first["area"]) >= 5


def test_checkpoint_brings_the_refinement_to_the_export(
    padim: Path, padim_config: Path, dataset: Path, tmp_path: Path
) -> None:
    model = Padim.load_from_checkpoint(checkpoint(padim), map_location="cpu").eval()
    processor = model.post_processor
    assert isinstance(processor, SuperpixelPostProcessor)
    assert (processor.segment_size, processor.blend, processor.pixel_sensitivity) == (8, 0.75, 0.6)

    settings = yaml.safe_load(padim_config.read_text())
    config = tmp_path / "export.yaml"
    config.write_text(yaml.safe_dump({"model": settings["model"]}))
    options = ("--ckpt_path", checkpoint(padim), "--export_type", "torch", "--export_root", tmp_path)
    run_anomalib("export", "--config", config, *options, cwd=tmp_path)
    exported = torch.load(tmp_path / "weights/torch/model.pt", map_location="cpu", weights_only=False)["model"].eval()
    images = torch.from_numpy(imread(dataset / "plate/test/square/000.png") / 255).permute(2, 0, 1)[None].float()
    with torch.no_grad():
        refined, answer = model(images), exported(images)
        exported.post_processor.blend = 1e-9
        unrefined = exported(images)
    torch.testing.assert_close(answer.anomaly_map, refined.anomaly_map)
    assert (unrefined.anomaly_map - answer.anomaly_map).abs().mean() > 1e-3
