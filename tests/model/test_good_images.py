# SPDX-License-Identifier: Apache-2.0
"""The template is of good images: cropped and resized as in training, without paint and chance, however wrapped."""

import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset
from torchvision.transforms import v2

from anomalib_twostage import PerlinAnomaly
from anomalib_twostage.model.checks import FileCheck
from anomalib_twostage.model.good_images import good_images, image_number
from tests.integration.conftest import write_dataset

from .test_lightning_model import make_data, make_engine, make_model


class Wrapper(Dataset):
    """A data set of one's own around another."""

    def __init__(self, inside: Dataset) -> None:
        self.inside = inside

    def __len__(self) -> int:
        return len(self.inside)

    def __getitem__(self, index: int) -> Any:
        return self.inside[index]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data"))


def files(dataset: Path) -> torch.Tensor:
    """The training images, read without anomalib, ``(6, 3, 64, 64)``."""
    paths = sorted((dataset / "plate" / "train" / "good").iterdir())
    images = torch.stack([torch.from_numpy(np.array(Image.open(path).convert("RGB"))) for path in paths])
    return images.permute(0, 3, 1, 2) / 255


def training_set(dataset: Path, augmentations: Any) -> Dataset:
    data = make_data(dataset, train_augmentations=augmentations)
    data.setup()
    return data.train_data


@pytest.mark.parametrize("name", ["train_augmentations", "augmentations"])
def test_the_template_is_of_cropped_images_without_paint_and_chance(name: str, dataset: Path, tmp_path: Path) -> None:
    paint = [v2.RandomApply([PerlinAnomaly(probability=1.0)])] if name == "train_augmentations" else []
    change = v2.Compose([v2.CenterCrop(40), v2.RandomHorizontalFlip(), v2.ColorJitter(brightness=0.5), *paint])
    model = make_model()
    data = make_data(dataset, **{name: change})
    make_engine(tmp_path, max_steps=1, limit_val_batches=0).fit(model, datamodule=data)
    images = model.pre_processor.transform(files(dataset)[..., 12:52, 12:52])
    assert torch.allclose(model.model.template.mean, images.mean(dim=0), atol=1e-5)
    assert torch.allclose(model.model.template.spread, images.std(dim=0, correction=0), atol=1e-5)


@pytest.mark.parametrize(
    ("wrap", "chosen"),
    [
        (lambda data: Subset(data, [4, 1]), [4, 1]),
        (lambda data: Wrapper(Subset(data, [3])), [3]),
        (lambda data: ConcatDataset([Subset(data, [5]), data]), [5, 0, 1, 2, 3, 4, 5]),
    ],
)
def test_wrapped_data_sets_are_read_without_paint(
    wrap: Callable[[Dataset], Dataset], chosen: list[int], dataset: Path
) -> None:
    paint = v2.Compose([v2.CenterCrop(48), PerlinAnomaly(probability=1.0)])
    data = training_set(dataset, paint)
    images = torch.stack([image for image, _ in good_images(wrap(data), 100, None, FileCheck())])
    assert torch.allclose(images, files(dataset)[chosen][..., 8:56, 8:56])
    assert data.augmentations is paint


def test_the_template_of_a_wrapped_data_set_is_without_paint(dataset: Path, tmp_path: Path) -> None:
    data = training_set(dataset, PerlinAnomaly(probability=1.0))
    loader = DataLoader(Subset(data, [0, 2]), batch_size=2, collate_fn=data.collate_fn)
    model = make_model()
    make_engine(tmp_path, max_steps=1).fit(model, train_dataloaders=loader)
    assert torch.allclose(model.model.template.mean, files(dataset)[[0, 2]].mean(dim=0), atol=1e-5)


def test_of_many_images_some_evenly_spaced_ones_are_read(dataset: Path) -> None:
    images = torch.stack(
        [image for image, _ in good_images(training_set(dataset, None), 3, v2.Resize((30, 40)), FileCheck())]
    )
    assert torch.allclose(images, v2.Resize((30, 40))(files(dataset)[::2]), atol=1e-6)


def test_every_file_name_has_a_number_of_its_own() -> None:
    paths = ["good/1.png", "good/ü 日本.png", os.fsdecode(b"good/\xff.png"), "good/\ud800.png"]
    assert len({image_number(path) for path in paths}) == 4
    assert [image_number(path) for path in paths[:2]] == [zlib.crc32(path.encode("utf-8")) for path in paths[:2]]


class Nameless(Wrapper):
    """Images that do not say which files they are from."""

    def __getitem__(self, index: int) -> Any:
        item = self.inside[index]
        item.image_path = None
        return item


@pytest.mark.parametrize(("kind", "told"), [(Wrapper, False), (Nameless, True)])
def test_images_that_cannot_be_known_again_are_told(
    kind: type[Wrapper], told: bool, dataset: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    inside = training_set(dataset, None)
    loader = DataLoader(kind(inside), 3, collate_fn=inside.collate_fn)
    engine = make_engine(tmp_path, max_steps=3, limit_val_batches=0)
    engine.fit(make_model(variant="default"), train_dataloaders=loader)
    assert caplog.text.count("have no image_path, so the template cannot know them again") == told


@pytest.mark.parametrize("moved", [False, True])
def test_a_run_that_goes_on_with_moved_images_says_so(
    moved: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = write_dataset(tmp_path / "here")
    engine = make_engine(tmp_path, max_steps=2, limit_val_batches=0)
    engine.fit(make_model(variant="default"), datamodule=make_data(root))
    engine.trainer.save_checkpoint(tmp_path / "two.ckpt")
    if moved:
        root = root.rename(tmp_path / "there")
    engine = make_engine(tmp_path, max_steps=3, limit_val_batches=0)
    engine.fit(make_model(variant="default"), datamodule=make_data(root), ckpt_path=tmp_path / "two.ckpt")
    assert caplog.text.count("The run goes on with other files") == moved
