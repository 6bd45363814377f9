# SPDX-License-Identifier: Apache-2.0
"""What is exported sees the images that the model sees in `Engine.predict`; whole files: tests/integration."""

import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from anomalib.data.transforms import SquarePad
from anomalib.pre_processing import PreProcessor
from torchvision.transforms.v2 import CenterCrop, Compose, InterpolationMode, Resize, ToDtype, Transform

from anomalib_twostage import TwoStageSuperpixel
from anomalib_twostage.model.export import exportable_transform
from tests.integration.conftest import write_dataset

from .test_lightning_model import make_data, make_engine

SIZES = [(180, 140), (128, 220), (80, 66)]  # of images; some larger, some smaller than what the model gets


def make_model(transform: Transform | None) -> TwoStageSuperpixel:
    pre_processor = False if transform is None else PreProcessor(transform)
    return TwoStageSuperpixel("small", segment_size=8, pre_processor=pre_processor, visualizer=False).eval()


def exported(model: TwoStageSuperpixel, folder: Path, patch: pytest.MonkeyPatch, **options: Any) -> torch.nn.Module:
    """The pre-processing that an export to ONNX traces, as the traced graph."""
    call: dict[str, Any] = {}
    patch.setattr(torch.onnx, "export", lambda **given: call.update(given))
    model.to_onnx(folder, **options)
    (axes,) = call["dynamic_shapes"]
    shapes = (dict.fromkeys(axes, torch.export.Dim.AUTO),)
    program = torch.export.export(model.pre_processor, call["args"], dynamic_shapes=shapes)
    # Runtimes lack these, or silently leave the antialiasing out.
    assert not [node for node in program.graph.nodes if "_aa" in str(node.target)]
    return program.module()


@pytest.mark.parametrize(
    "transform",
    [
        Resize((96, 64)),
        Resize((96, 64), interpolation=InterpolationMode.BICUBIC),
        Resize((96, 64), antialias=False),
        Resize((96, 64), interpolation=InterpolationMode.NEAREST),
        Compose([ToDtype(torch.float32), Resize((96, 96)), CenterCrop(64)]),
        Compose([SquarePad(), Compose([Resize((160, 160)), Resize(64)])]),
    ],
    ids=["pair", "bicubic", "plain", "nearest", "crop", "several"],
)
def test_an_export_for_any_size_resizes_like_predict(
    transform: Transform, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = exported(make_model(transform), tmp_path, monkeypatch)
    for size in SIZES:
        images = torch.rand(2, 3, *size)
        torch.testing.assert_close(graph(images), transform(images), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("transform", "size"),
    [
        (Resize(96), SIZES[0]),
        (Resize(96), SIZES[1]),
        (Resize([96], max_size=120), SIZES[1]),
        (Resize(96, interpolation=InterpolationMode.BICUBIC), SIZES[2]),
        (Resize(96, interpolation=InterpolationMode.NEAREST), SIZES[0]),
        (Compose([Resize(96), CenterCrop(64)]), SIZES[1]),
        (Compose([CenterCrop(120), Resize((64, 64))]), SIZES[2]),
        (CenterCrop(100), SIZES[0]),
    ],
    ids=["upright", "wide", "longer side", "bicubic", "nearest", "then crop", "crop first", "crop alone"],
)
def test_an_export_for_one_size_resizes_like_predict(
    transform: Transform, size: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = exported(make_model(transform), tmp_path, monkeypatch, input_size=size)
    images = torch.rand(2, 3, *size)
    torch.testing.assert_close(graph(images), transform(images), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("transform", "name"),
    [
        (Resize(96), "Resize"),
        (Compose([SquarePad(), Resize(96, max_size=120)]), "Resize"),
        (Compose([CenterCrop(120), Resize((64, 64))]), "CenterCrop"),
        (SquarePad(), "fixed size"),
        (None, "fixed size"),
    ],
    ids=["shorter side", "longer side", "crop first", "no resizing", "no pre-processor"],
)
def test_what_depends_on_the_size_asks_for_it_by_name(transform: Transform | None, name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"{name}.*input_size"):
        make_model(transform).to_onnx(tmp_path)
    assert not list(tmp_path.iterdir())


def test_without_pre_processor_a_size_is_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    monkeypatch.setattr(torch.onnx, "export", lambda **given: called.append(given["args"][0].shape))
    make_model(None).to_onnx(tmp_path, input_size=(64, 80))
    assert called == [(2, 3, 64, 80)]


@pytest.mark.parametrize("training", [True, False])
def test_a_model_goes_on_after_an_export_as_before(
    training: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.onnx, "export", lambda **given: None)
    model = make_model(Resize((96, 96))).train(training)
    model.to_onnx(tmp_path)
    assert (model.training, model.model.stage_two.training) == (training, training)


def test_interpolation_that_no_graph_can_hold_is_refused_by_name(tmp_path: Path) -> None:
    resize = Resize((96, 96))
    resize.interpolation = InterpolationMode.LANCZOS  # older versions of torchvision refuse it for tensors
    model = make_model(None)
    model.pre_processor = PreProcessor(resize)
    with pytest.raises(ValueError, match=r"lanczos.*bilinear or bicubic"):
        model.to_onnx(tmp_path)


@pytest.mark.parametrize("transform", [Resize(96), Resize((96, 64), interpolation=InterpolationMode.BICUBIC)])
def test_a_torch_file_answers_like_predict(transform: Transform, tmp_path: Path) -> None:
    model = make_model(transform)
    loaded = torch.load(model.to_torch(tmp_path), weights_only=False)["model"]
    images = torch.rand(2, 3, 180, 140)
    with torch.no_grad():
        expected = model.post_processor(model.model(transform(images)))
        torch.testing.assert_close(loaded(images).anomaly_map, expected.anomaly_map)


def test_a_torch_file_of_a_model_just_trained_holds_nothing_of_the_training(tmp_path: Path) -> None:
    model = make_model(Resize((64, 64)))
    make_engine(tmp_path, max_steps=2, limit_val_batches=0).fit(model, datamodule=make_data(write_dataset(tmp_path)))
    with zipfile.ZipFile(model.to_torch(tmp_path)) as file:
        (pickled,) = (file.read(name) for name in file.namelist() if name.endswith("data.pkl"))
    assert b"TwoStageSuperpixel" in pickled
    assert b"torch.optim" not in pickled


@pytest.mark.parametrize("interpolation", ["bilinear", InterpolationMode.BILINEAR, 2])
def test_interpolations_go_by_any_name(interpolation: str | InterpolationMode | int) -> None:
    resize = Resize([64, 64])
    resize.interpolation = interpolation  # older versions of torchvision refuse the name as argument
    images = torch.rand(1, 3, 150, 90)
    torch.testing.assert_close(exportable_transform(resize)(images), Resize([64, 64])(images), atol=1e-6, rtol=0)


def test_the_original_transform_stays_as_it_is() -> None:
    original = Compose([ToDtype(torch.float32, scale=True), Resize([48, 32], antialias=True), CenterCrop(30)])
    image = torch.randint(0, 256, (1, 3, 120, 70), dtype=torch.uint8)
    torch.testing.assert_close(exportable_transform(original)(image), original(image), atol=1e-6, rtol=0)
    assert original.transforms[1].antialias
    assert isinstance(original.transforms[2], CenterCrop)
