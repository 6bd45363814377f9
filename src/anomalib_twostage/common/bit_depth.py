# SPDX-License-Identifier: Apache-2.0
"""Image files of more than 8 bits a channel, which Pillow's conversion to RGB, and so anomalib, clips at 255."""

from collections.abc import Iterable
from pathlib import Path

from PIL import Image

__all__ = ["DeepFileCheck", "has_deep_channels", "refuse_deep_image"]


def has_deep_channels(image: Image.Image) -> bool:
    """Whether an image is of integers above 8 bits or of floating point, which ``convert("RGB")`` clips."""
    return image.mode.startswith(("I", "F"))


def refuse_deep_image(image: Image.Image, path: str | Path) -> None:
    """Refuse an image of more than 8 bits a channel.

    Args:
        image: The image; its file needs to be opened only, not read.
        path: Where it comes from, for the message.

    Raises:
        ValueError: If it has more than 8 bits a channel.
    """
    if has_deep_channels(image):
        msg = (
            f"{path} has more than 8 bits a channel (PIL mode {image.mode!r}), which anomalib reads as clipped at "
            "255: convert the images to 8 bits, scaled to their real range."
        )
        raise ValueError(msg)


class DeepFileCheck:
    """Refuses files of more than 8 bits a channel by what is in them, whatever their suffix, each file once."""

    def __init__(self) -> None:
        self.seen: set[str] = set()

    def __call__(self, paths: Iterable[str | Path]) -> None:
        """Look at the files that have not been seen yet; what is no file was made by a datamodule.

        Raises:
            ValueError: If one has more than 8 bits a channel.
        """
        for path in {str(path) for path in paths} - self.seen:
            if Path(path).is_file():
                with Image.open(path) as image:
                    refuse_deep_image(image, path)
            self.seen.add(path)
