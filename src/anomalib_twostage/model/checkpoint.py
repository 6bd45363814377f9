# SPDX-License-Identifier: Apache-2.0
"""Checkpoint files: whole or not there, checked before they are read, and without code.

Lightning writes a checkpoint to the folder for temporary files and moves it; where that folder lies on another file
system, a move is a copy, and a killed process leaves half a file. Reading, PyTorch neither names the file that it
cannot read nor looks at its checksums, and an environment variable can make it run code from it.
"""

import pickle
import zipfile
import zlib
from pathlib import Path
from typing import Any

from lightning.pytorch.plugins.io import CheckpointIO

__all__ = ["VerifiedCheckpointIO", "check_checkpoint"]

_PARTIAL = ".partial"


class VerifiedCheckpointIO(CheckpointIO):
    """Lightning plugin that writes checkpoints in one piece and reads only sound ones.

    Args:
        checkpoint_io: The plugin that does the work, with files of PyTorch's format.
    """

    def __init__(self, checkpoint_io: CheckpointIO) -> None:
        self.checkpoint_io = checkpoint_io

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, *args: Any, **kwargs: Any) -> None:
        """Write beside the file and rename, so that at any moment the old file or the new one is there, whole."""
        if _is_remote(path):
            self.checkpoint_io.save_checkpoint(checkpoint, path, *args, **kwargs)
            return
        partial = Path(f"{path}{_PARTIAL}")
        self.checkpoint_io.save_checkpoint(checkpoint, partial, *args, **kwargs)
        partial.replace(path)

    def load_checkpoint(self, path: str | Path, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Read a checkpoint of weights and plain values.

        Args:
            path: File or URL.
            args: Passed on.
            kwargs: Passed on. Objects other than weights and plain values, which could run code, are refused whatever
                the environment says, unless ``weights_only=False`` asks for them.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the file is not a whole, undamaged checkpoint.
            pickle.UnpicklingError: If the file holds other objects.
        """
        if not _is_remote(path):
            check_checkpoint(path)
        if kwargs.get("weights_only") is None:
            kwargs["weights_only"] = True
        try:
            return self.checkpoint_io.load_checkpoint(path, *args, **kwargs)
        except pickle.UnpicklingError as error:
            raise refused(path) from error

    def remove_checkpoint(self, path: str | Path) -> None:
        """Remove a checkpoint."""
        self.checkpoint_io.remove_checkpoint(path)

    def teardown(self) -> None:
        """Close whatever the plugin behind holds open."""
        self.checkpoint_io.teardown()


def check_checkpoint(path: str | Path) -> None:
    """See whether a file is a whole, undamaged Lightning checkpoint, without loading anything from it.

    Args:
        path: The file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is empty, half-written, damaged, or no checkpoint of a training.
    """
    path = Path(path)
    if not path.is_file():
        msg = f"The checkpoint {path} does not exist."
        raise FileNotFoundError(msg)
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
            content = b"".join(archive.read(name) for name in archive.namelist() if name.endswith("/data.pkl"))
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
        msg = f"The checkpoint {path} is empty, half-written or no checkpoint at all ({error}): take another one."
        raise ValueError(msg) from error
    if damaged is not None:
        msg = f"The checkpoint {path} is damaged (wrong checksum of {damaged}): take another one."
        raise ValueError(msg)
    if b"pytorch-lightning_version" not in content or b"state_dict" not in content:
        msg = (
            f"{path} is no checkpoint of a training (it may be an exported model, or bare weights): "
            "take the .ckpt file that the training wrote."
        )
        raise ValueError(msg)


def refused(path: str | Path) -> pickle.UnpicklingError:
    """The error for a file that holds more than weights and plain values."""
    return pickle.UnpicklingError(
        f"The checkpoint {path} holds other objects than weights and plain values. Loading them could run code, so it "
        "was refused."
    )


def _is_remote(path: str | Path) -> bool:
    return "://" in str(path)
