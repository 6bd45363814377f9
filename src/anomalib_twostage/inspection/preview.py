# SPDX-License-Identifier: Apache-2.0
"""See what the painters make of your own good images, before any training.

    python -m anomalib_twostage.preview path/to/good --out preview.png --image_size 256

It is what training makes of them: each image in varied light, then painted. One row per image: the image; then for
Perlin and for superpixel paint what came out, its mask, and the largest difference that the paint makes over the
channels, from black for none to bright for half the range and more.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from anomalib.data.utils.image import is_image_file
from lightning.fabric.utilities.seed import max_seed_value
from PIL import Image
from torchvision.transforms.v2 import functional as transforms

from anomalib_twostage.common.bit_depth import has_deep_channels, refuse_deep_image
from anomalib_twostage.common.spacing import evenly_spaced
from anomalib_twostage.pseudo_anomaly import PerlinAnomaly, PseudoAnomalyTransform, SuperpixelAnomaly, training_images

from .visualizer import heat_panel, image_panel, mask_panel, picture_grid

__all__ = ["draw_paint", "main", "read_images"]

_LONGEST_PANEL = 192  # pixels; seven panels side by side should fit on a screen
_SMALLEST_IMAGE = 64  # what the small and the default variant need
_LARGEST_IMAGE = 8192  # a row of larger panels does not fit into memory


def read_images(folder: str | Path, image_size: tuple[int, int] = (256, 256), count: int = 8) -> torch.Tensor:
    """Read images as the model's default pre-processor would hand them to it.

    Args:
        folder: Folder of images, searched with its subfolders.
        image_size: Height and width in pixels.
        count: Number of images, evenly spaced over the sorted names; fewer if there are fewer.

    Returns:
        ``(B, 3, H, W)`` float32 in [0, 1].

    Raises:
        FileNotFoundError: If the folder is missing or holds no image.
        NotADirectoryError: If it is a file.
        ValueError: If a file cannot be read or has more than 8 bits a channel.
    """
    folder = Path(folder)
    if folder.is_file():
        msg = f"{folder} is a file: give the folder that holds the good images."
        raise NotADirectoryError(msg)
    if not folder.is_dir():
        msg = f"The folder {folder} does not exist: give a folder of good images."
        raise FileNotFoundError(msg)
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and is_image_file(path))
    if not paths:
        msg = f"The folder {folder} holds no image that anomalib reads, such as .png, .jpg, .bmp or .tif."
        raise FileNotFoundError(msg)
    return torch.stack([_read(paths[index], image_size) for index in evenly_spaced(len(paths), count)])


def draw_paint(
    images: torch.Tensor, painters: dict[str, PseudoAnomalyTransform]
) -> tuple[Image.Image, dict[str, torch.Tensor]]:
    """Paint images with each painter, as training does, and draw the outcome.

    Args:
        images: ``(B, C, H, W)`` float in [0, 1], 1 or 3 channels.
        painters: Painters by the name that the picture is to show.

    Returns:
        The picture, one row per image, and by name the share of painted pixels per image, ``(B,)`` in [0, 1].
    """
    height, width = images.shape[-2:]
    scale = min(1.0, _LONGEST_PANEL / max(height, width))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    titles = ["image"]
    rows = [[image_panel(image, size)] for image in images]
    shares = {}
    for name, painter in painters.items():
        lit, painted, masks = training_images(images, painter)
        titles += [name, "mask", "difference"]
        for row, before, after, mask in zip(rows, lit, painted, masks, strict=True):
            difference = (after - before).abs().amax(dim=0)
            row += [image_panel(after, size), mask_panel(mask, size), heat_panel(2 * difference, size)]
        shares[name] = masks.mean(dim=(1, 2, 3))
    return picture_grid(rows, titles), shares


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; see the module's docstring and ``--help``.

    Args:
        arguments: Arguments of the command; by default those of the process.
    """
    parser = argparse.ArgumentParser(
        prog="python -m anomalib_twostage.preview",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, help="folder of good images")
    parser.add_argument("--out", type=Path, default=Path("preview.png"), help="picture to write (%(default)s)")
    parser.add_argument(
        "--image_size", type=int, nargs="+", default=[256], help="side, or height and width, in pixels (256)"
    )
    parser.add_argument("--texture_dir", type=Path, help="folder of images to paint with, as in the model")
    parser.add_argument(
        "--opacity", type=float, nargs=2, default=(0.2, 1.0), help="lowest and highest opacity of the paint (0.2 1.0)"
    )
    parser.add_argument("--count", type=int, default=8, help="images to paint (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="another seed paints otherwise (%(default)s)")
    options = parser.parse_args(arguments)
    try:
        shares = _preview(options)
    except (OSError, TypeError, ValueError) as error:
        parser.error(str(error))
    for name, share in shares.items():
        print(f"{name}: {share.mean():.1%} of the pixels painted, {share.min():.1%} to {share.max():.1%} an image")
    print(f"Wrote {options.out}.")


def _preview(options: argparse.Namespace) -> dict[str, torch.Tensor]:
    sides = options.image_size
    if not 1 <= len(sides) <= 2 or min(sides) < _SMALLEST_IMAGE or max(sides) > _LARGEST_IMAGE:
        msg = f"--image_size must be one or two numbers from {_SMALLEST_IMAGE} to {_LARGEST_IMAGE}, got {sides}."
        raise ValueError(msg)
    if not 0 <= options.seed <= max_seed_value:
        msg = f"--seed must be from 0 to {max_seed_value}, got {options.seed}."
        raise ValueError(msg)
    if options.count < 1:
        msg = f"--count must be at least 1, got {options.count}."
        raise ValueError(msg)
    if not options.out.parent.is_dir():
        msg = f"The folder {options.out.parent} of --out does not exist: make it first."
        raise FileNotFoundError(msg)
    if options.out.suffix.lower() not in (".png", ".jpg", ".jpeg"):
        msg = f"--out must end in .png or .jpg, got {options.out}."
        raise ValueError(msg)
    if options.out.is_dir():
        msg = f"{options.out} of --out is a folder: give the name of a picture in it."
        raise IsADirectoryError(msg)
    if options.out.resolve().is_relative_to(options.folder.resolve()):
        msg = f"{options.out} of --out lies among the images, which a training would read: name another place."
        raise ValueError(msg)
    images = read_images(options.folder, (sides[0], sides[-1]), options.count)
    torch.manual_seed(options.seed)
    settings = {"probability": 1.0, "opacity": tuple(options.opacity), "texture_dir": options.texture_dir}
    painters = {"Perlin paint": PerlinAnomaly(**settings), "superpixel paint": SuperpixelAnomaly(**settings)}
    picture, shares = draw_paint(images, painters)
    picture.save(options.out)
    return shares


def _read(path: Path, image_size: tuple[int, int]) -> torch.Tensor:
    try:
        with Image.open(path) as file:
            pixels = file if has_deep_channels(file) else file.convert("RGB")
    except Exception as error:  # Pillow's decoders raise many kinds on broken files, and on very large ones
        msg = f"Cannot read {path} as an image ({error}): repair it or take it out of the folder."
        raise ValueError(msg) from error
    refuse_deep_image(pixels, path)
    image = transforms.to_dtype(transforms.to_image(pixels), torch.float32, scale=True)
    return transforms.resize(image.as_subclass(torch.Tensor), list(image_size), antialias=True)
