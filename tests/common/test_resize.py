# SPDX-License-Identifier: Apache-2.0
import openvino
import pytest
import torch
from torchvision.transforms.v2 import CenterCrop, Compose, InterpolationMode, Resize, ToDtype

from anomalib_twostage.common.resize import AntialiasedResize, exportable_transform


@pytest.mark.parametrize("old", [(300, 200), (129, 64), (64, 63), (50, 61), (2, 700)])
@pytest.mark.parametrize("new", [(64, 64), (97, 31)])
def test_resizes_like_torchvision(old: tuple[int, int], new: tuple[int, int]) -> None:
    images = torch.rand(2, 3, *old)
    expected = Resize(list(new), antialias=True)(images)
    torch.testing.assert_close(AntialiasedResize(new)(images), expected, atol=1e-6, rtol=0)


def test_the_right_size_passes_untouched() -> None:
    images = torch.rand(2, 3, 40, 30)
    assert AntialiasedResize((40, 30))(images) is images


def test_one_export_resizes_any_size(tmp_path: object) -> None:
    resize = AntialiasedResize((32, 24))
    path = f"{tmp_path}/resize.onnx"
    sizes = dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC)
    torch.onnx.export(resize, (torch.rand(2, 3, 50, 40),), path, dynamo=True, dynamic_shapes={"inputs": (sizes,)})
    compiled = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    for shape in ((1, 3, 90, 41), (3, 3, 32, 24), (2, 3, 20, 200)):
        images = torch.rand(*shape)
        found = torch.from_numpy(compiled(images.numpy())[0])
        torch.testing.assert_close(found, Resize([32, 24], antialias=True)(images), atol=1e-5, rtol=0)


def test_transforms_keep_their_order_and_the_original_its_antialiasing() -> None:
    original = Compose([ToDtype(torch.float32, scale=True), Resize([48, 32], antialias=True)])
    exportable = exportable_transform(original)
    assert isinstance(exportable, Compose)
    image = torch.randint(0, 256, (1, 3, 120, 70), dtype=torch.uint8)
    torch.testing.assert_close(exportable(image), original(image), atol=1e-6, rtol=0)
    assert original.transforms[1].antialias


@pytest.mark.parametrize(
    "transform",
    [
        Resize([32, 32], antialias=False),
        Resize([32, 32], interpolation=InterpolationMode.NEAREST),
        Resize(32),
        CenterCrop(32),
    ],
    ids=["not antialiased", "nearest", "shorter side", "crop"],
)
def test_the_rest_is_left_to_anomalib(transform: torch.nn.Module) -> None:
    exportable = exportable_transform(transform)
    assert not isinstance(exportable, AntialiasedResize)
    images = torch.rand(1, 3, 40, 40)
    assert exportable(images).shape == transform(images).shape


@pytest.mark.parametrize("interpolation", ["bilinear", InterpolationMode.BILINEAR, 2])
def test_bilinear_goes_by_any_name(interpolation: str | InterpolationMode | int) -> None:
    if isinstance(interpolation, str):
        transform = Resize([32, 32])
        transform.interpolation = interpolation  # older versions of torchvision refuse the name as argument
    else:
        transform = Resize([32, 32], interpolation=interpolation)
    assert isinstance(exportable_transform(transform), AntialiasedResize)


def test_no_transform_stays_none() -> None:
    assert exportable_transform(None) is None
