# SPDX-License-Identifier: Apache-2.0
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from anomalib.data import AnomalibDataModule, MVTecAD
from jsonargparse import ArgumentParser
from PIL import Image
from scipy import ndimage
from skimage.color import deltaE_cie76, rgb2lab
from skimage.measure import label, regionprops
from torch import nn
from torchvision import tv_tensors
from torchvision.transforms import v2

from anomalib_twostage.pseudo_anomaly import (
    PerlinAnomaly,
    PseudoAnomaly,
    PseudoAnomalyTransform,
    SuperpixelAnomaly,
    paint,
    painters,
    training_images,
)
from tests.conftest import photograph, to_tensor
from tests.integration.conftest import SIZE, write_dataset

KINDS = (PerlinAnomaly, SuperpixelAnomaly, PseudoAnomaly)
MATERIALS = ("brick", "gravel", "grass", "astronaut", "coffee", "chelsea")


@pytest.fixture(params=KINDS, ids=lambda kind: kind.__name__)
def kind(request: pytest.FixtureRequest) -> type[PseudoAnomalyTransform]:
    return request.param


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    """Pieces of photographs, ``(64, 3, 96, 96)``."""
    generator = np.random.default_rng(0)
    pieces = []
    for i in range(64):
        picture = photograph(MATERIALS[i % len(MATERIALS)])
        top, left = (generator.integers(side - 96) for side in picture.shape[:2])
        pieces.append(to_tensor(picture[top : top + 96, left : left + 96]))
    return torch.stack(pieces)


def delta_e(before: torch.Tensor, after: torch.Tensor) -> np.ndarray:
    """CIE76 difference per pixel ``(B, H, W)`` of images ``(B, 3, H, W)``, by scikit-image."""
    lab = [rgb2lab(images.permute(0, 2, 3, 1).double().numpy()) for images in (before, after)]
    return deltaE_cie76(*lab)


def draw_masks(kind: type[PseudoAnomalyTransform], images: torch.Tensor, rounds: int) -> np.ndarray:
    painter = kind(probability=1.0)
    return np.concatenate([painter(images)[1].numpy()[:, 0] for _ in range(rounds)]) > 0


# What is painted


def test_an_image_changes_exactly_where_the_mask_is_one(kind: type[PseudoAnomalyTransform], images) -> None:
    painted, mask = kind(probability=1.0)(images)
    assert painted.shape == images.shape
    assert mask.shape == (64, 1, 96, 96)
    assert mask.dtype == torch.float32
    assert set(mask.unique().tolist()) == {0.0, 1.0}
    assert torch.equal((painted != images).any(dim=1, keepdim=True), mask == 1)


def test_every_painted_pixel_can_be_seen(kind: type[PseudoAnomalyTransform], images) -> None:
    painted, mask = kind(probability=1.0)(images)
    difference = delta_e(images, painted)[mask[:, 0].numpy() == 1]
    assert len(difference) > 10_000
    assert (difference < 2.3).mean() < 0.001
    assert difference.mean() > 10


def test_painted_pixels_can_be_seen_after_rounding_to_bytes(kind: type[PseudoAnomalyTransform], images) -> None:
    before = (images * 255).round().byte()
    painted, mask = kind(probability=1.0)(before)
    difference = delta_e(before / 255, painted / 255)[mask[:, 0].numpy() == 1]
    assert (difference < 2.3).mean() < 0.01
    assert torch.equal(painted[(mask == 0).expand_as(painted)], before[(mask == 0).expand_as(before)])


def test_values_stay_in_range(kind: type[PseudoAnomalyTransform], images) -> None:
    contrasty = (images - 0.5).mul(4).add(0.5).clamp(0, 1)
    painted, _ = kind(probability=1.0)(contrasty)
    assert painted.min() >= 0
    assert painted.max() <= 1


def test_fainter_opacity_changes_less(kind: type[PseudoAnomalyTransform], images) -> None:
    means = []
    for opacity in ((0.05, 0.1), (0.9, 1.0)):
        torch.manual_seed(0)
        painted, mask = kind(probability=1.0, opacity=opacity)(images)
        means.append(delta_e(images, painted)[mask[:, 0].numpy() == 1].mean())
    assert means[0] < 0.75 * means[1]


def test_paint_comes_from_the_texture_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.fromarray(np.full((32, 32, 3), (255, 0, 255), np.uint8)).save(tmp_path / "magenta.png")
    monkeypatch.setattr(paint, "_SHARES", (0.0, 0.0, 1.0, 0.0))  # photographs only, in their own colours
    monkeypatch.setattr(painters, "tint", lambda colours, *_: colours)
    painter = PerlinAnomaly(probability=1.0, opacity=(1.0, 1.0), texture_dir=tmp_path)
    assert painter.textures.shape == (1, 3, 256, 256)
    painted, mask = painter(torch.zeros(16, 3, 64, 64))
    inside = painted.permute(0, 2, 3, 1)[mask[:, 0] == 1]
    assert (inside[:, 1] == 0).all()
    torch.testing.assert_close(inside[:, 0], inside[:, 2])
    assert inside[:, 0].median() > 0.5  # less than one only where paint thins out towards the border
    assert inside[:, 0].max() == 1


# How often


def test_probability_zero_leaves_images_alone(kind: type[PseudoAnomalyTransform], images) -> None:
    painted, mask = kind(probability=0.0)(images)
    assert torch.equal(painted, images)
    assert not mask.any()


def test_probability_one_paints_nearly_all(kind: type[PseudoAnomalyTransform], images) -> None:
    # Paint that nobody would see is left out; measured, 96 to 100 % of the images keep some.
    painter = kind(probability=1.0)
    share = np.mean([painter(images)[1].flatten(1).any(dim=1).float().mean().item() for _ in range(3)])
    assert share > 0.93


def test_probability_one_half_paints_about_half(kind: type[PseudoAnomalyTransform], images) -> None:
    small = nn.functional.interpolate(images, 40).repeat(7, 1, 1, 1)
    share = kind(probability=0.5)(small)[1].flatten(1).any(dim=1).float().mean().item()
    deviation = (0.25 / len(small)) ** 0.5
    assert share == pytest.approx(0.49, abs=4 * deviation)  # a few per cent of the paint would not be seen


def test_the_default_probability_is_one_half() -> None:
    assert PseudoAnomaly().probability == 0.5


# Breadth


def mean_width(mask: np.ndarray) -> float:
    """Four times the mean distance to the border: the width, for a strip."""
    return 4 * float(ndimage.distance_transform_edt(np.pad(mask, 1))[1:-1, 1:-1][mask].mean()) - 2


def test_masks_span_two_orders_of_magnitude(kind: type[PseudoAnomalyTransform], images) -> None:
    areas = draw_masks(kind, images, 4).sum(axis=(1, 2))
    assert len(areas) >= 200
    assert areas.max() / areas[areas > 0].min() > 100


def test_perlin_shapes_are_thin_and_compact(images) -> None:
    largest = [max(regionprops(label(mask)), key=lambda r: r.area) for mask in draw_masks(PerlinAnomaly, images, 4)
               if mask.any()]  # fmt: skip
    large = [region for region in largest if region.area >= 60]
    thin = [r for r in large if mean_width(r.image) < 4 and max(r.image.shape) > 40]
    compact = [r for r in large if r.solidity > 0.85]
    assert len(thin) >= 0.08 * len(large)
    assert len(compact) >= 0.1 * len(large)


def test_superpixel_shapes_are_small_and_large_clusters(images) -> None:
    areas = np.concatenate(
        [[region.area for region in regionprops(label(mask))] for mask in draw_masks(SuperpixelAnomaly, images, 4)]
    )
    assert (areas > 40 * 40).sum() >= 3
    assert ((areas > 16) & (areas < 144)).sum() >= 20


def test_shapes_are_everywhere_in_the_image(kind: type[PseudoAnomalyTransform], images) -> None:
    frequency = draw_masks(kind, images, 4).mean(axis=0)
    blocks = frequency.reshape(4, 24, 4, 24).mean(axis=(1, 3))
    assert blocks.min() > 0.35 * blocks.mean()


def test_shapes_prefer_the_object_to_the_background(kind: type[PseudoAnomalyTransform]) -> None:
    objects = torch.full((800, 3, 64, 64), 0.9)
    objects[..., 8:24, 8:24] = torch.rand(800, 3, 16, 16) * 0.5
    painter = kind()
    shapes = torch.cat([painter.shapes(some) for some in objects.split(50)]).float()
    assert shapes[..., 8:24, 8:24].mean() > 1.2 * shapes[..., 40:56, 40:56].mean()  # the same place, turned


def test_images_of_a_batch_are_painted_differently(kind: type[PseudoAnomalyTransform], images) -> None:
    _, mask = kind(probability=1.0)(images[:1].expand(16, -1, -1, -1))
    different = (mask.flatten(1).unsqueeze(0) != mask.flatten(1).unsqueeze(1)).any(dim=2)
    assert different.sum() >= 16 * 15 - 2  # two may be empty


def test_both_painters_take_part(monkeypatch: pytest.MonkeyPatch) -> None:
    # Each marks its images with a row of its own.
    def row(number: int):
        def shapes(self, images: torch.Tensor) -> torch.Tensor:
            mask = torch.zeros(len(images), 1, *images.shape[-2:], dtype=torch.bool)
            mask[:, :, number] = True
            return mask

        return shapes

    monkeypatch.setattr(PerlinAnomaly, "shapes", row(0))
    monkeypatch.setattr(SuperpixelAnomaly, "shapes", row(1))
    shapes = PseudoAnomaly(probability=1.0).shapes(torch.rand(200, 3, 8, 8))
    assert (shapes.sum(dim=(1, 2, 3)) == 8).all()
    assert 70 < shapes[:, 0, 0, 0].sum() < 130


def test_superpixel_shapes_are_whole_superpixels(monkeypatch: pytest.MonkeyPatch, images) -> None:
    labels = torch.arange(96).div(11, rounding_mode="floor")
    labels = (labels.unsqueeze(1) * 9 + labels).expand(64, -1, -1)

    class Known(nn.Module):
        def __init__(self, *arguments: object, **options: object) -> None:
            super().__init__()

        def max_segments(self, height: int, width: int) -> int:
            return 81

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return labels

    monkeypatch.setattr(painters, "Slic", Known)
    shapes = SuperpixelAnomaly(probability=1.0).shapes(images)
    assert shapes.flatten(1).any(dim=1).float().mean() > 0.8
    assert shapes.float().mean() < 0.8
    for number in range(81):
        segment = shapes[:, 0][:, labels[0] == number]
        assert (segment.all(dim=1) | ~segment.any(dim=1)).all()


def test_superpixel_shapes_follow_the_edges_of_the_image() -> None:
    # Stripes of two colours: a border of a superpixel of the image itself runs along a stripe.
    stripes = torch.where(torch.arange(96) % 24 < 12, 0.2, 0.8).expand(200, 3, 96, 96).contiguous()
    shapes = SuperpixelAnomaly(probability=1.0).shapes(stripes)[:, 0]
    change = (shapes[..., 1:] != shapes[..., :-1]).sum(dim=(0, 1)).float()
    at_edge = (torch.arange(1, 96) % 12) == 0
    assert change[at_edge].mean() > 3 * change[~at_edge].mean()


# What goes in and out


@pytest.mark.parametrize("shape", [(3, 40, 52), (2, 3, 40, 52), (1, 40, 52), (2, 1, 40, 52)])
def test_an_image_alone_gives_image_and_mask(kind: type[PseudoAnomalyTransform], shape: tuple[int, ...]) -> None:
    painted, mask = kind(probability=1.0)(torch.rand(shape))
    assert painted.shape == shape
    assert mask.shape == (*shape[:-3], 1, *shape[-2:])


@pytest.mark.parametrize(
    ("image_shape", "mask_shape"),
    [
        ((3, 40, 52), (40, 52)),
        ((3, 40, 52), (1, 40, 52)),
        ((2, 3, 40, 52), (2, 40, 52)),
        ((2, 3, 40, 52), (2, 1, 40, 52)),
        ((1, 40, 52), (40, 52)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8, torch.bool, torch.int64])
def test_a_given_mask_keeps_its_shape_and_type_and_is_added_to(
    image_shape: tuple[int, ...], mask_shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    given = torch.zeros(mask_shape, dtype=dtype)
    given[..., 3:7, 4:9] = 1
    image = torch.rand(image_shape)
    painted, mask = PerlinAnomaly(probability=1.0)(image, given)
    assert mask.shape == mask_shape
    assert mask.dtype == dtype
    changed = (painted != image).any(dim=-3).reshape(mask_shape)
    assert changed.any()
    assert torch.equal(mask.bool(), changed | given.bool())
    assert not given.bool()[..., 10:, :].any()  # the given mask itself is not written to


def test_a_tuple_counts_as_image_and_mask() -> None:
    image, mask = torch.rand(3, 40, 52), torch.zeros(40, 52)
    results = []
    for inputs in ((image, mask), ((image, mask),)):
        torch.manual_seed(0)
        results.append(PerlinAnomaly(probability=1.0)(*inputs))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_painters_compose() -> None:
    torch.manual_seed(0)
    image = torch.rand(3, 64, 64)
    painted, mask = v2.Compose([PerlinAnomaly(probability=1.0), SuperpixelAnomaly(probability=1.0)])(image)
    # Where the second paints over the first it might restore a pixel, which in float does not happen.
    assert torch.equal((painted != image).any(dim=0, keepdim=True), mask == 1)


def test_types_of_torchvision_are_kept(kind: type[PseudoAnomalyTransform]) -> None:
    image = tv_tensors.Image(torch.rand(3, 40, 52))
    painted, mask = kind(probability=1.0)(image, tv_tensors.Mask(torch.zeros(40, 52)))
    assert type(painted) is tv_tensors.Image
    assert type(mask) is tv_tensors.Mask
    painted, mask = kind(probability=1.0)(image)
    assert type(painted) is tv_tensors.Image


@pytest.mark.parametrize("shape", [(3, 40, 52), (1, 40, 52), (2, 3, 40, 52)])
@pytest.mark.parametrize("wrap", [torch.Tensor.clone, tv_tensors.Image], ids=["tensor", "Image"])
@pytest.mark.parametrize("given", [False, True], ids=["no mask", "mask"])
def test_transforms_after_the_painter_move_image_and_mask_together(
    given: bool, wrap: Callable[[torch.Tensor], torch.Tensor], shape: tuple[int, ...]
) -> None:
    image = wrap(torch.rand(shape))
    masks = [tv_tensors.Mask(torch.zeros(*shape[:-3], 1, *shape[-2:]))] if given else []
    flip = v2.Compose([PerlinAnomaly(probability=1.0), v2.RandomHorizontalFlip(p=1.0)])
    painted, mask = flip(image, *masks)
    assert type(mask) is tv_tensors.Mask
    assert mask.any()
    assert torch.equal((painted != image.flip(-1)).any(dim=-3, keepdim=True), mask == 1)


def test_training_goes_on_with_plain_tensors(kind: type[PseudoAnomalyTransform]) -> None:
    made = training_images(torch.rand(2, 3, 40, 52), kind(probability=1.0))
    assert [type(part) for part in made] == [torch.Tensor] * 3


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.bfloat16, torch.float64])
def test_the_image_keeps_its_precision(kind: type[PseudoAnomalyTransform], dtype: torch.dtype, images) -> None:
    given = (images * 255).byte() if dtype == torch.uint8 else images.to(dtype)
    painted, mask = kind(probability=1.0)(given)
    assert painted.dtype == dtype
    outside = (mask == 0).expand_as(given)
    assert torch.equal(painted[outside], given[outside])
    inside = (mask == 1)[:, 0]
    assert (painted != given).any(dim=1)[inside].float().mean() > 0.99
    scale = 255 if dtype == torch.uint8 else 1
    assert painted.min() >= 0
    assert painted.max() <= scale


def test_values_that_float32_cannot_hold_survive_outside_the_mask() -> None:
    image = torch.rand(3, 64, 64, dtype=torch.float64)
    painted, mask = PerlinAnomaly(probability=1.0)(image)
    outside = (mask == 0).expand_as(image)
    assert not torch.equal(image.float().double(), image)
    assert torch.equal(painted[outside], image[outside])


def test_a_grey_image_is_painted_grey(kind: type[PseudoAnomalyTransform], images) -> None:
    grey = images.mean(dim=1, keepdim=True)
    painted, mask = kind(probability=1.0)(grey)
    assert torch.equal(painted != grey, mask == 1)
    difference = delta_e(grey.expand(-1, 3, -1, -1), painted.expand(-1, 3, -1, -1))[mask[:, 0].numpy() == 1]
    assert (difference < 2.3).mean() < 0.001


def test_layout_and_gradients_of_the_input_do_not_matter(kind: type[PseudoAnomalyTransform]) -> None:
    image = torch.rand(2, 3, 40, 52)
    results = []
    for given in (image, image.contiguous(memory_format=torch.channels_last), image.clone().requires_grad_()):
        torch.manual_seed(0)
        results.append(kind(probability=1.0)(given))
    for painted, mask in results[1:]:
        assert (mask != results[0][1]).float().mean() < 1e-3
        assert (painted - results[0][0]).abs().median() == 0
        assert ((painted - results[0][0]).abs() > 1e-4).float().mean() < 1e-3


def test_the_given_image_is_not_written_to(kind: type[PseudoAnomalyTransform]) -> None:
    image = torch.rand(2, 3, 40, 52)
    copy = image.clone()
    kind(probability=1.0)(image)
    assert torch.equal(image, copy)


def test_autocast_changes_nothing(kind: type[PseudoAnomalyTransform]) -> None:
    image, results = torch.rand(2, 3, 40, 52), []
    for enabled in (False, True):
        torch.manual_seed(0)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            results.append(kind(probability=1.0)(image))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_a_seed_repeats_the_paint(kind: type[PseudoAnomalyTransform], images) -> None:
    painter, results = kind(), []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        results.append(painter(images))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    assert not torch.equal(results[0][1], results[2][1])


@pytest.mark.parametrize("size", [(3, 3), (5, 5), (8, 70), (70, 8), (33, 1)])
def test_small_and_long_images_are_painted(size: tuple[int, int]) -> None:
    for painter in (PerlinAnomaly(probability=1.0), SuperpixelAnomaly(probability=1.0)):
        image = torch.rand(4, 3, *size)
        painted, mask = painter(image)
        assert torch.equal((painted != image).any(dim=1, keepdim=True), mask == 1)


def test_an_empty_batch_stays_empty(kind: type[PseudoAnomalyTransform]) -> None:
    painted, mask = kind(probability=1.0)(torch.rand(0, 3, 16, 16))
    assert painted.shape == (0, 3, 16, 16)
    assert mask.shape == (0, 1, 16, 16)


def test_textures_are_not_saved(kind: type[PseudoAnomalyTransform]) -> None:
    assert kind().state_dict() == {}


# As train_augmentations of anomalib


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data"))


def make_data(dataset: Path, painter: v2.Transform, **options: object) -> MVTecAD:
    return MVTecAD(root=dataset, category="plate", train_batch_size=6, num_workers=0, train_augmentations=painter,
                   **options)  # fmt: skip


def test_a_datamodule_paints_its_training_images(kind: type[PseudoAnomalyTransform], dataset: Path) -> None:
    plain = make_data(dataset, v2.Identity())
    data = make_data(dataset, kind(probability=1.0))
    for one in (plain, data):
        one.setup()
    untouched = {path: image for batch in plain.train_dataloader() for path, image in zip(batch.image_path, batch.image,
                 strict=True)}  # fmt: skip
    batch = next(iter(data.train_dataloader()))
    assert batch.gt_mask.shape == (6, SIZE, SIZE)
    assert batch.gt_mask.any(dim=(1, 2)).sum() >= 4
    for path, image, mask in zip(batch.image_path, batch.image, batch.gt_mask, strict=True):
        assert torch.equal((image != untouched[path]).any(dim=0), mask.bool())


def widened(masks: torch.Tensor) -> torch.Tensor:
    """Masks with a pixel more on every side, which the interpolation of the image reaches."""
    return nn.functional.max_pool2d(masks.float().unsqueeze(1), 5, stride=1, padding=2).squeeze(1) > 0


def test_painted_images_and_masks_are_resized_together(dataset: Path) -> None:
    torch.manual_seed(0)
    data = make_data(dataset, v2.Compose([PerlinAnomaly(probability=1.0, opacity=(1.0, 1.0)), v2.Resize((40, 48))]))
    data.setup()
    batch = next(iter(data.train_dataloader()))
    assert batch.image.shape == (6, 3, 40, 48)
    assert batch.gt_mask.shape == (6, 40, 48)
    # The surface is grey noise around 120 with a deviation of 8: the strongest changes are inside the masks.
    change = (batch.image - 120 / 255).abs().amax(dim=1)
    assert (change[batch.gt_mask.bool()] > 0.2).float().mean() > 0.1
    assert (change[~widened(batch.gt_mask.bool())] > 0.2).float().mean() < 0.01


@pytest.mark.parametrize("module", ["anomalib_twostage", "anomalib_twostage.pseudo_anomaly"])
def test_yaml_names_a_painter_by_its_class_path(module: str, kind: type[PseudoAnomalyTransform], dataset: Path) -> None:
    parser = ArgumentParser()
    parser.add_subclass_arguments(AnomalibDataModule, "data")
    painter = {
        "class_path": f"{module}.{kind.__name__}",
        "init_args": {"probability": 0.25, "opacity": [0.5, 0.75]},
    }
    settings = {"root": str(dataset), "category": "plate", "train_augmentations": painter}
    text = yaml.safe_dump({"data": {"class_path": "anomalib.data.MVTecAD", "init_args": settings}})
    made = parser.instantiate_classes(parser.parse_string(text)).data.train_augmentations
    assert type(made) is kind
    assert made.probability == 0.25
    assert made.opacity == (0.5, 0.75)


# What is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"probability": -0.1}, r"probability.*-0\.1"),
        ({"probability": 1.5}, r"probability.*1\.5"),
        ({"opacity": (0.0, 1.0)}, r"opacity.*\(0\.0, 1\.0\)"),
        ({"opacity": (0.8, 0.3)}, r"opacity.*\(0\.8, 0\.3\)"),
        ({"opacity": (0.5, 1.2)}, r"opacity.*\(0\.5, 1\.2\)"),
        ({"opacity": (0.5,)}, r"opacity.*\(0\.5,\)"),
    ],
)
def test_settings_out_of_range_are_named(kind: type[PseudoAnomalyTransform], options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(**options)


def test_a_missing_texture_folder_is_named(kind: type[PseudoAnomalyTransform], tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no_textures_here"):
        kind(texture_dir=tmp_path / "no_textures_here")


@pytest.mark.parametrize(
    ("inputs", "error", "message"),
    [
        ((np.zeros((8, 8, 3)),), TypeError, "ndarray"),
        ((torch.zeros(3, 8, 8), "mask"), TypeError, "str"),
        ((), TypeError, "at most one mask"),
        ((torch.zeros(3, 8, 8),) * 3, TypeError, "at most one mask"),
        ((torch.zeros(3, 8, 8, dtype=torch.int32),), TypeError, "torch.int32"),
        ((torch.zeros(4, 8, 8),), ValueError, r"\(4, 8, 8\)"),
        ((torch.zeros(8, 8),), ValueError, r"\(8, 8\)"),
        ((torch.zeros(3, 8, 8), torch.zeros(8, 9)), ValueError, r"\(8, 9\).*\(3, 8, 8\)"),
        ((torch.zeros(3, 8, 10), torch.zeros(10, 8)), ValueError, r"\(10, 8\).*\(3, 8, 10\)"),
    ],
)  # fmt: skip
def test_wrong_input_is_named(inputs: tuple, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        PerlinAnomaly(probability=1.0)(*inputs)
