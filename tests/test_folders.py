# SPDX-License-Identifier: Apache-2.0
"""Image folders as they are found: odd names, links, loops, files that are no images."""

from pathlib import Path

import numpy as np
import pytest
from anomalib.data import Folder, PredictDataset
from PIL import Image

from tests.model.test_lightning_model import make_engine, make_model

NAMES = ["a b.png", "größe 日本.png", "new\nline.png", "-dash.png", "'\".png", "%s {x}.png", "$HOME;x.png"]


def save(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(len(path.name)).normal(120, 10, (64, 64, 3)).clip(0, 255)
    Image.fromarray(pixels.astype(np.uint8)).save(path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Nine images: odd names, one in a subfolder, one behind a link; and a loop of links, a text and a database."""
    folder = tmp_path / "parts" / "good"
    for name in NAMES:
        save(folder / name)
    save(folder / "sub/s.png")
    (folder / "link.png").symlink_to(save(tmp_path / "elsewhere.png"))
    (folder / "sub/loop").symlink_to(folder)
    (folder / "notes.txt").write_text("no image")
    (folder / "Thumbs.db").write_bytes(b"no image")
    return folder


def test_odd_folders_are_trained_on_and_predicted_with_a_picture_of_each_image(folder: Path, tmp_path: Path) -> None:
    model = make_model(visualizer=True)
    data = Folder("parts", root=folder.parent, normal_dir="good", train_batch_size=3, eval_batch_size=2, num_workers=0)
    make_engine(tmp_path / "fit", max_steps=3, max_epochs=-1).fit(model, datamodule=data)
    engine = make_engine(tmp_path / "results")
    predictions = engine.predict(model, dataset=PredictDataset(folder))
    paths = {Path(path).name for batch in predictions for path in batch.image_path}
    assert paths == {*NAMES, "s.png", "link.png"}
    assert {path.name for path in (tmp_path / "results").rglob("images/**/*.png")} == paths


@pytest.mark.parametrize("kind", ["empty", "text", "broken link", "float"])
def test_a_file_that_cannot_be_used_is_named(kind: str, folder: Path, tmp_path: Path) -> None:
    path = folder / ("bad.tif" if kind == "float" else "bad.png")
    if kind == "empty":
        path.touch()
    elif kind == "text":
        path.write_text("no image")
    elif kind == "broken link":
        path.symlink_to("nowhere")
    else:
        Image.fromarray(np.ones((64, 64), np.float32)).save(path)
    with pytest.raises((OSError, ValueError), match=path.name):
        make_engine(tmp_path).predict(make_model(), dataset=PredictDataset(folder))
