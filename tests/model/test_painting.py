# SPDX-License-Identifier: Apache-2.0
"""One way to train: however the painter comes to the model, it paints resized images in varied light."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from anomalib.data import AnomalibDataModule, Folder, ImageBatch
from lightning.pytorch import Callback, seed_everything
from torch import nn
from torch.utils.data import DataLoader, Subset
from torchvision.transforms import v2

from anomalib_twostage import PerlinAnomaly, PseudoAnomaly, SuperpixelAnomaly, TwoStageSuperpixel
from anomalib_twostage.inspection.preview import draw_paint
from tests.integration.conftest import SIZE, write_dataset

from .test_lightning_model import make_data, make_engine, make_model

Settings = dict[str, Any]


class TrainedOn(Callback):
    """Notes what is trained on, and with which painter."""

    def __init__(self) -> None:
        self.images, self.painted, self.masks = [], [], []
        self.painter: nn.Module | None = None

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.images.append(batch.image)
        self.painted.append(outputs["painted"])
        self.masks.append(outputs["mask"])
        self.painter = pl_module.painter

    @property
    def share(self) -> float:
        """Share of images with paint."""
        return torch.cat(self.masks).amax(dim=(1, 2, 3)).mean().item()


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data"), train=12)


def folder_data(dataset: Path, **options: Any) -> Folder:
    """Images without masks."""
    plate = dataset / "plate"
    return Folder("parts", root=plate, normal_dir="train/good", abnormal_dir="test/square", train_batch_size=4,
                  num_workers=0, **options)  # fmt: skip


def fit(folder: Path, data: AnomalibDataModule, model: TwoStageSuperpixel | None = None, **budget: Any) -> TrainedOn:
    seen = TrainedOn()
    engine = make_engine(folder, callbacks=[seen], limit_val_batches=0, **(budget or {"max_epochs": 1}))
    engine.fit(make_model(template=False) if model is None else model, datamodule=data)
    return seen


@pytest.mark.parametrize("make", [make_data, folder_data], ids=["masks", "no masks"])
def test_a_painter_of_the_data_trains_as_one_of_the_model(make: Callable, dataset: Path, tmp_path: Path) -> None:
    def run(painter: Settings, augmentations: Settings) -> TrainedOn:
        seed_everything(1)
        model = make_model(template=False, **painter)
        torch.manual_seed(2)
        return fit(tmp_path, make(dataset, **augmentations), model, max_steps=2, max_epochs=-1)

    settings = {"probability": 1.0, "opacity": (0.5, 0.9)}
    of_model = run({"painter": SuperpixelAnomaly(**settings)}, {})
    of_data = run({}, {"train_augmentations": v2.Compose([SuperpixelAnomaly(**settings)])})
    assert torch.cat(of_model.masks).any()
    for name in ("images", "painted", "masks"):
        for one, other in zip(getattr(of_model, name), getattr(of_data, name), strict=True):
            assert torch.equal(one, other), name


def test_painters_in_containers_paint_once(dataset: Path, tmp_path: Path) -> None:
    augmentations = v2.RandomApply([PerlinAnomaly(probability=1.0)], p=0.3)
    data = make_data(dataset, train_augmentations=augmentations)
    data.num_workers = 1  # the data set's painters have to stand aside before it starts
    seen = fit(tmp_path, data, max_epochs=3)
    assert len(torch.cat(seen.masks)) == 36
    assert 0.05 < seen.share < 0.55
    assert data.train_data.augmentations.transforms[0] is augmentations


@pytest.mark.parametrize("make", [make_data, folder_data], ids=["masks", "no masks"])
@pytest.mark.parametrize(
    ("name", "painted"),
    [("augmentations", "validation"), ("val_augmentations", "validation"), ("test_augmentations", "test")],
)
def test_images_that_are_called_good_are_never_painted(
    name: str, painted: str, make: Callable, dataset: Path, tmp_path: Path
) -> None:
    options = {"val_split_mode": "from_test"} if name == "test_augmentations" else {}  # not the same as the test images
    data = make(dataset, **{name: v2.Compose([v2.RandomApply([PerlinAnomaly()])])}, **options)
    with pytest.raises(ValueError, match=rf"paint the {painted} images.*train_augmentations"):
        make_engine(tmp_path, max_steps=1).fit(make_model(), datamodule=data)
    with pytest.raises(ValueError, match=r"paint the .* images.*train_augmentations"):
        make_engine(tmp_path).test(make_model(), datamodule=data)


def test_the_data_sets_painter_is_found_in_a_data_loader(dataset: Path, tmp_path: Path) -> None:
    data = folder_data(dataset, train_augmentations=PerlinAnomaly(probability=1.0, opacity=(1.0, 1.0)))
    data.setup()
    loader = DataLoader(Subset(data.train_data, [0, 1]), batch_size=2, num_workers=1, collate_fn=ImageBatch.collate)
    seen = TrainedOn()
    engine = make_engine(tmp_path, callbacks=[seen], max_epochs=1)
    engine.fit(make_model(template=False), train_dataloaders=loader)
    assert seen.painter.opacity == (1.0, 1.0)


def test_images_that_come_with_masks_are_lit_and_not_painted_again(dataset: Path, tmp_path: Path) -> None:
    class Stripe(v2.Transform):
        """A painter of one's own."""

        def forward(self, image: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            image, mask = image.clone(), mask.clone()
            image[:, 3:9], mask[3:9] = 1.0, 1
            return image, mask

    seen = fit(tmp_path, make_data(dataset, train_augmentations=Stripe()), make_model(paint_probability=1.0))
    stripe = torch.zeros(SIZE, SIZE)
    stripe[3:9] = 1
    trained_on = (torch.cat(part) for part in (seen.images, seen.painted, seen.masks))
    for image, painted, mask in zip(*trained_on, strict=True):
        assert torch.equal(mask[0], stripe)
        assert 0.001 < (painted - image).abs().mean() < 0.2


def test_clean_images_are_painted_by_default(dataset: Path, tmp_path: Path) -> None:
    seen = fit(tmp_path, make_data(dataset), make_model(template=False, paint_probability=1.0))
    assert seen.share > 0.7
    assert type(seen.painter) is PseudoAnomaly


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"paint": "both"}, PseudoAnomaly),
        ({"paint": "perlin"}, PerlinAnomaly),
        ({"paint": "superpixel"}, SuperpixelAnomaly),
        ({"painter": SuperpixelAnomaly(probability=0.4)}, SuperpixelAnomaly),
    ],
)
def test_the_painter_can_be_chosen(options: Settings, expected: type, dataset: Path, tmp_path: Path) -> None:
    if "paint" in options:
        options = {**options, "paint_probability": 0.4}
    model = make_model(template=False, **options)
    seen = fit(tmp_path, make_data(dataset), model, max_steps=1)
    assert type(seen.painter) is expected
    assert seen.painter.probability == 0.4
    assert model.painter is options.get("painter")


def test_which_painter_wins_is_said(dataset: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = make_model(template=False, painter=PerlinAnomaly())
    assert not caplog.records
    seen = fit(tmp_path, make_data(dataset, train_augmentations=SuperpixelAnomaly()), model, max_steps=1)
    assert type(seen.painter) is SuperpixelAnomaly
    assert "The data set's painter takes the place of the model's" in caplog.text
    with caplog.at_level(logging.WARNING):
        make_model(painter=PerlinAnomaly(), paint="superpixel")
    assert "takes the place of paint, paint_probability and texture_dir" in caplog.text


def test_paint_stays_out_of_checkpoints_and_exports(dataset: Path, tmp_path: Path) -> None:
    model = make_model(template=False, painter=PerlinAnomaly(probability=0.4))
    engine = make_engine(tmp_path, max_steps=1, limit_val_batches=0)
    engine.fit(model, datamodule=make_data(dataset))
    engine.trainer.save_checkpoint(tmp_path / "model.ckpt")
    loaded = TwoStageSuperpixel.load_from_checkpoint(tmp_path / "model.ckpt")  # refuses objects
    assert loaded.painter is None
    assert "painter" not in loaded.hparams
    exported = torch.load(engine.export(model, "torch", export_root=tmp_path), weights_only=False)["model"]
    assert not any(isinstance(part, PerlinAnomaly) for part in exported.modules())
    assert model.painter.probability == 0.4


def test_the_preview_shows_what_is_trained_on() -> None:
    images, painter = torch.rand(3, 3, SIZE, SIZE), PerlinAnomaly(probability=1.0)
    model = make_model(painter=painter)
    model.log = lambda *_, **__: None  # there is no trainer
    torch.manual_seed(3)
    trained_on = model.training_step(ImageBatch(image=images), 0)
    torch.manual_seed(3)
    _, shares = draw_paint(images, {"paint": painter})
    assert shares["paint"].sum() > 0
    torch.testing.assert_close(shares["paint"], trained_on["mask"].mean(dim=(1, 2, 3)))
