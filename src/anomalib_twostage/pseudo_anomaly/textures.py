# SPDX-License-Identifier: Apache-2.0
"""Photographs to paint with, decoded once and kept as bytes."""

import logging
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from skimage import data as photographs
from torchvision.transforms.v2 import functional as transforms

from anomalib_twostage.common.bit_depth import has_deep_channels
from anomalib_twostage.common.spacing import evenly_spaced

__all__ = ["builtin_textures", "folder_textures"]

logger = logging.getLogger(__name__)

_SIDE = 256
_MAX_TEXTURES = 512  # 96 MiB
_LONGEST = 4  # times the shorter side; the rest would be cropped anyway, and a line of pixels scaled up fills memory
_WHITE = (1.0, 255.0, 65535.0)  # of pictures in floating point
_SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}

# In scikit-image's wheel, never downloaded. Its brick, grass and gravel are left out: they are the sample data
# set, and paint of the same material would be a defect that nobody can see.
_BUILTIN = ("astronaut", "camera", "chelsea", "coffee", "coins", "hubble_deep_field", "moon", "page", "rocket", "text")


def _square(image: torch.Tensor) -> torch.Tensor:
    """Scale the shorter side of a uint8 image ``(C, H, W)`` to the texture side and crop the centre."""
    height, width = image.shape[-2:]
    longest = _LONGEST * min(height, width)
    image = transforms.center_crop(image, [min(height, longest), min(width, longest)])
    image = transforms.resize(image, [_SIDE], antialias=True)
    return transforms.center_crop(image, [_SIDE, _SIDE])


def _read_rgb(image: Image.Image) -> np.ndarray:
    """Pixels as uint8 ``(H, W, 3)``; Pillow alone would clip 16 bits and floating point at 255."""
    if has_deep_channels(image):
        grey = np.nan_to_num(np.asarray(image, dtype=np.float32), nan=0.0, posinf=0.0, neginf=0.0)
        # Integers fill their 16 bits; for floating point the picture itself has to tell what white is.
        highest = grey.max()
        white = next((white for white in _WHITE if highest <= white), highest) if image.mode == "F" else _WHITE[-1]
        grey = (grey / white * 255).round().clip(0, 255).astype(np.uint8)
        return np.dstack([grey] * 3)
    return np.asarray(image.convert("RGB"))


def builtin_textures() -> torch.Tensor:
    """Load the photographs that scikit-image ships.

    Returns:
        uint8 ``(N, 3, 256, 256)``.
    """
    images = []
    for name in _BUILTIN:
        array = np.asarray(getattr(photographs, name)())
        image = torch.from_numpy(array.copy())
        image = image.expand(3, -1, -1) if image.ndim == 2 else image[..., :3].permute(2, 0, 1)
        images.append(_square(image))
    return torch.stack(images)


def folder_textures(folder: str | Path) -> torch.Tensor:
    """Load the images of a folder and its subfolders, such as DTD.

    At most 512 are kept, evenly spaced over the sorted names, so that memory stays below 100 MiB. Files that cannot be
    read are skipped with a warning. Links to files are followed, links to folders are not. Grey images of 16 bits or
    in floating point keep their range: up to 65535, or up to the first of 1, 255, 65535 and their own maximum that
    holds them.

    Args:
        folder: Folder to search.

    Returns:
        uint8 ``(N, 3, 256, 256)``.

    Raises:
        FileNotFoundError: If the folder does not exist or holds no readable image.
    """
    folder = Path(folder)
    if not folder.is_dir():
        msg = f"The texture folder {str(folder)!r} does not exist; give a folder of images or leave it out."
        raise FileNotFoundError(msg)
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in _SUFFIXES and path.is_file())
    images = []
    for path in (paths[index] for index in evenly_spaced(len(paths), _MAX_TEXTURES)):
        try:
            with Image.open(path) as image:
                array = _read_rgb(image)
        except Exception as error:  # Pillow's decoders raise many kinds on broken files, SyntaxError among them
            logger.warning("Skipping the texture %s, which cannot be read: %s", path, error)
            continue
        images.append(_square(torch.from_numpy(array.copy()).permute(2, 0, 1)))
    if not images:
        suffixes = ", ".join(sorted(_SUFFIXES))
        msg = f"The texture folder {str(folder)!r} holds no readable image ({suffixes}); fill it or leave it out."
        raise FileNotFoundError(msg)
    return torch.stack(images)
