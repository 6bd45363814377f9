# SPDX-License-Identifier: Apache-2.0
"""What is refused before the model sees it: pixels, files, sizes."""

import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from anomalib.data import Folder, ImageItem, PredictDataset
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.transforms import v2

from anomalib_twostage.common import bit_depth
from anomalib_twostage.inspection.preview import read_images
from anomalib_twostage.model.checks import refuse_normalization
from tests.integration.conftest import SIZE

from .test_lightning_model import make_engine, make_model


class Noise(Dataset):
    """Two images of noise, the second with one pixel of another value."""

    def __init__(self, value: float) -> None:
        self.value = value

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> ImageItem:
        image = torch.full((3, SIZE, SIZE), 0.5)
        image[0, 5, 5] = self.value if index else 0.5
        return ImageItem(image=image, gt_label=torch.tensor(index), image_path=f"{index}.png")


def write_images(folder: Path, count: int = 3, deep: str | None = None) -> Path:
    """Some dark images of 8 bits, and one of 16 with the given name."""
    folder.mkdir(parents=True)
    levels = np.random.default_rng(1).integers(0, 100, (SIZE, SIZE))
    for index in range(count):
        Image.fromarray(levels.astype(np.uint8)).save(folder / f"{index}.png")
    if deep is not None:
        if deep.endswith(".pgm"):  # Pillow's own writer is older than its reader
            content = f"P5\n{SIZE} {SIZE}\n65535\n".encode() + (levels * 300).astype(">u2").tobytes()
            (folder / deep).write_bytes(content)
        else:
            Image.fromarray((levels * 300).astype(np.uint16)).save(folder / deep, format="png")
    return folder


def folder_data(folder: Path, **options) -> Folder:
    defaults = {"train_batch_size": 2, "eval_batch_size": 2, "num_workers": 0}
    defaults |= {"val_split_mode": "none", "test_split_mode": "none"}
    return Folder("parts", root=folder.parent, normal_dir=folder.name, **{**defaults, **options})


def fit(folder: Path, data: Folder, **budget) -> None:
    engine = make_engine(folder, limit_val_batches=0, **(budget or {"max_steps": 3}))
    engine.fit(make_model(template=False), datamodule=data)


@pytest.mark.parametrize(("value", "message"), [(float("nan"), r"NaN.*1\.png"), (7.0, r"\[0, 1\].*7")])
@pytest.mark.parametrize("stage", ["fit", "validate", "test", "predict"])
def test_invalid_pixels_are_refused_in_every_stage(stage: str, value: float, message: str, tmp_path: Path) -> None:
    loader = DataLoader(Noise(value), batch_size=2, collate_fn=PredictDataset.collate_fn.fget(None))
    run = getattr(make_engine(tmp_path, max_steps=1), stage)
    data = {"train_dataloaders" if stage == "fit" else "dataloaders": loader}
    with pytest.raises(ValueError, match=message):
        run(make_model(template=False), **data)


@pytest.mark.parametrize("name", ["deep.pgm", "deep.png", "deep.jpg"])
def test_files_of_16_bits_are_refused_by_what_is_in_them(name: str, tmp_path: Path) -> None:
    folder = write_images(tmp_path / "good", deep=name)
    with pytest.raises(ValueError, match=rf"{name}.*8 bits"):
        make_engine(tmp_path).predict(make_model(), dataset=PredictDataset(folder))
    with pytest.raises(ValueError, match=rf"{name}.*8 bits"):
        make_engine(tmp_path, max_steps=3, limit_val_batches=0).fit(
            make_model(template=False), datamodule=folder_data(folder)
        )
    with pytest.raises(ValueError, match=rf"{name}.*8 bits"):
        read_images(folder, (SIZE, SIZE))


def test_the_workers_of_the_data_loader_look_at_the_files(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "good", deep="deep.pgm")
    data = folder_data(folder, num_workers=1)
    with pytest.raises(ValueError, match=r"(?s)worker process.*deep\.pgm.*8 bits"):
        fit(tmp_path, data)


@pytest.mark.parametrize("workers", [0, 1])
def test_every_file_is_looked_at_once(workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, opened = write_images(tmp_path / "good"), tmp_path / "opened"

    def noting_open(path, *args):
        with opened.open("a") as file:  # a file, which the workers can write to as well
            file.write(f"{path}\n")
        return Image.open(path, *args)

    monkeypatch.setattr(bit_depth, "Image", SimpleNamespace(open=noting_open))
    data = folder_data(folder, num_workers=workers)
    fit(tmp_path, data, max_epochs=3)
    assert sorted(opened.read_text().split()) == sorted(str(path) for path in folder.iterdir())


def test_a_datamodule_is_left_as_it_was_and_nobody_is_told_of_hooks(tmp_path: Path) -> None:
    data = folder_data(write_images(tmp_path / "good"))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        fit(tmp_path, data, max_steps=1)
    assert data.external_collate_fn is None
    assert not any("on_before_batch_transfer" in str(warning.message) for warning in told)


def test_nested_normalization_is_refused() -> None:
    nested = v2.Compose([v2.Resize(SIZE), v2.Compose([v2.Normalize([0.5] * 3, [0.5] * 3)])])
    with pytest.raises(ValueError, match="Normalize"):
        refuse_normalization(nested)
    refuse_normalization(v2.Resize(SIZE))


def test_a_pre_processor_that_only_pads_says_nothing_of_the_size(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "good")
    model = make_model(template=False)
    model.pre_processor.transform = v2.Pad(8)
    model.check_known_size()
    predictions = make_engine(tmp_path).predict(model, dataset=PredictDataset(folder))
    assert predictions[0].anomaly_map.shape[-2:] == (SIZE + 16, SIZE + 16)
    model.pre_processor.transform = v2.Resize(8)
    with pytest.raises(ValueError, match="8 x 8 pixels are too small"):
        model.check_known_size()


@pytest.mark.parametrize("antialias", [True, False])
def test_what_bicubic_resizing_makes_of_good_images_is_taken(antialias: bool, tmp_path: Path) -> None:
    folder = tmp_path / "good"
    folder.mkdir()
    for index in range(3):  # hard edges overshoot most
        levels = np.kron(np.random.default_rng(index).integers(0, 2, (SIZE // 4, SIZE // 4)), np.ones((4, 4)))
        Image.fromarray((255 * levels).astype(np.uint8)).save(folder / f"{index}.png")
    resize = v2.Resize((96, 96), interpolation=v2.InterpolationMode.BICUBIC, antialias=antialias)
    image = torch.from_numpy(np.array(Image.open(folder / "0.png").convert("RGB"))).permute(2, 0, 1) / 255
    assert resize(image).min() < -0.1
    model = make_model()
    model.pre_processor.transform = resize
    make_engine(tmp_path, max_steps=2, limit_val_batches=0).fit(model, datamodule=folder_data(folder))
    assert model.model.template.mean.shape[-2:] == (96, 96)


def test_normalisation_of_either_generation_is_refused() -> None:
    for kind in (v2.Normalize, transforms.Normalize):
        with pytest.raises(ValueError, match="take Normalize out of the pre-processor"):
            refuse_normalization(torch.nn.Sequential(v2.Resize(64), kind([0.5] * 3, [0.5] * 3)))
