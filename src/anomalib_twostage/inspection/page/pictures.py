# SPDX-License-Identifier: Apache-2.0
"""The picture files of the inspection page.

Maps are grey PNGs: the page colors them and draws their contours itself, at the threshold of the moment, by SVG
filters. A script cannot read the pixels of a file, but a filter may.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import colormaps
from PIL import Image
from torch.nn import functional

from anomalib_twostage.common.bit_depth import has_deep_channels
from anomalib_twostage.inspection.visualizer import heat_panel, image_panel, superpixel_panel

from .records import Prediction

__all__ = ["heat_tables", "save_map", "save_mask", "save_pictures", "save_stages", "stretch_map"]

_THUMB = 192  # longer side of a thumbnail in pixels
_MAP = 256  # longer side of a map or mask in pixels
_JPEG: dict[str, Any] = {"format": "JPEG", "quality": 85}
_OVERSHOOT = 0.1  # resizing may leave [0, 1] by this much; normalized images leave it by more


def heat_tables(stops: int = 17) -> dict[str, str]:
    """The color map of the package's other pictures, for an SVG filter: values by channel R, G and B."""
    colors = colormaps["inferno"](np.linspace(0, 1, stops))
    return {channel: " ".join(f"{value:.3f}" for value in colors[:, i]) for i, channel in enumerate("RGB")}


def save_pictures(
    prediction: Prediction, whole: bool, longest: int, large: Path, thumb: Path
) -> tuple[int, int] | None:
    """Save an image twice, as JPEG: large and as thumbnail.

    Args:
        prediction: The image; its file is shown if the model saw the whole of it, else what the model saw.
        whole: Whether the model saw the whole file.
        longest: Longer side of the large picture in pixels; smaller images keep their size.
        large: File of the large picture.
        thumb: File of the thumbnail.

    Returns:
        Width and height of what is shown, before it is made smaller; ``None`` if there is no image.
    """
    found = _from_file(prediction.path, longest) if whole and prediction.path else None
    if found is None and prediction.image is not None:
        found = _from_tensor(prediction.image)
    if found is None:
        return None
    picture, size = found
    picture.thumbnail((longest, longest))
    picture.save(large, **_JPEG)
    picture.thumbnail((_THUMB, _THUMB))
    picture.save(thumb, **_JPEG)
    return size


def save_map(values: np.ndarray, path: Path) -> tuple[float, float]:
    """Save a map ``(H, W)`` as a grey PNG, NaN as black.

    Maps that are larger than the page needs keep their peaks when they shrink.

    Returns:
        The values that are black and white: 0 and 1 if all lie between, else the lowest and the highest.
    """
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
    if low >= 0 and high <= 1:
        low, high = 0.0, 1.0
    shrunk = _shrink_by_peaks(np.nan_to_num(values, nan=low, posinf=high, neginf=low))
    _save_grey(shrunk, low, high, path)
    return low, high


def stretch_map(path: Path, old: tuple[float, float], new: tuple[float, float]) -> None:
    """Rewrite a saved map for other values of black and white."""
    with Image.open(path) as file:
        values = np.asarray(file, dtype=np.float32) / 255 * (old[1] - old[0]) + old[0]
    _save_grey(values, *new, path)


def save_mask(mask: np.ndarray, path: Path) -> None:
    """Save a mask ``(H, W)``, bool, as a black and white PNG; small marks stay when it shrinks."""
    _save_grey(_shrink_by_peaks(mask.astype(np.float32)), 0.0, 1.0, path)


def save_stages(stages: Any, index: int, size: tuple[int, int], path: Path) -> None:
    """Save stage one's map, the borders of the superpixels and the refined image side by side, as JPEG.

    Args:
        stages: What has ``stage_one_map`` ``(B, 1, H, W)``, ``labels`` ``(B, H, W)`` and ``refined_image``
            ``(B, C, H, W)``, and may have ``looked``, see
            :func:`~anomalib_twostage.inspection.visualizer.superpixel_panel`.
        index: Which of the batch.
        size: Width and height of the image, whose proportions the panels get.
        path: File to write.
    """
    scale = _THUMB / max(size)
    width, height = (max(1, round(side * scale)) for side in size)
    refined = image_panel(stages.refined_image[index], (width, height))
    first = heat_panel(stages.stage_one_map[index], (width, height))
    panels = [first, superpixel_panel(first, stages, index), refined]
    strip = Image.new("RGB", (3 * width, height))
    for i, panel in enumerate(panels):
        strip.paste(panel, (i * width, 0))
    strip.save(path, **_JPEG)


def _from_file(path: str, longest: int) -> tuple[Image.Image, tuple[int, int]] | None:
    """The image of a file of 8 bits a channel, as RGB, and its width and height.

    ``None`` if there is no file, as for images made in memory, or none that can be shown.
    """
    try:
        with Image.open(path) as file:
            if has_deep_channels(file):
                return None  # PIL would clip it
            size = file.size
            file.draft("RGB", (longest, longest))  # a JPEG much larger than needed is decoded small
            return file.convert("RGB"), size
    except Exception:  # Pillow's decoders raise many kinds on broken files, and on very large ones
        return None


def _from_tensor(image: torch.Tensor) -> tuple[Image.Image, tuple[int, int]]:
    """An image ``(C, H, W)`` as RGB, and its width and height.

    One that is not in [0, 1], because it was normalized, is stretched to it.
    """
    image = image.float() if image.is_floating_point() else image.float() / 255
    image = (image[:3] if len(image) >= 3 else image[:1]).nan_to_num(0.0)
    low, high = image.amin(), image.amax()
    if low < -_OVERSHOOT or high > 1 + _OVERSHOOT:
        image = (image - low) / (high - low)
    size = (image.shape[-1], image.shape[-2])
    return image_panel(image, size), size


def _shrink_by_peaks(values: np.ndarray) -> np.ndarray:
    """Shrink ``(H, W)`` so far that the longer side is what the page needs."""
    scale = _MAP / max(values.shape)
    if scale >= 1:
        return values
    size = [max(1, round(side * scale)) for side in values.shape]
    return functional.adaptive_max_pool2d(torch.from_numpy(values).float()[None], size)[0].numpy()


def _save_grey(values: np.ndarray, black: float, white: float, path: Path) -> None:
    shares = (values - black) / ((white - black) or 1)
    Image.fromarray((shares.clip(0, 1) * 255).round().astype(np.uint8)).save(path, format="PNG")
