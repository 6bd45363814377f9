# SPDX-License-Identifier: Apache-2.0
"""Write an inspection page of predictions that lie on disk.

    python -m anomalib_twostage.inspect predictions.pt --out inspection

The predictions are what `Engine.predict` or an inferencer of anomalib returned, saved with `torch.save`: one batch or
a list of batches. A folder of such files is read in the order of their names, and needs the memory of one file at a
time. What a callback of the trainer saves batch by batch, such as Lightning's `BasePredictionWriter`, is raw: the
post-processor has not seen it yet, so scores are not normalised and there are no verdicts.
"""

import argparse
import pickle
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from anomalib.data import ImageBatch, ImageItem, InferenceBatch, NumpyImageBatch, NumpyImageItem
from torchvision import tv_tensors

from .writer import write_page

__all__ = ["main", "read_saved"]


def read_saved(path: str | Path) -> Iterator[Any]:
    """Read predictions that were saved with ``torch.save``. No code from the file runs.

    Args:
        path: A file, or a folder of files whose names end in ``.pt``.

    Yields:
        Batch by batch.

    Raises:
        FileNotFoundError: If there is no such file, or no file in the folder.
        ValueError: If a file holds something else.
    """
    path = Path(path)
    if not path.exists():
        msg = f"There is no {path}: save what Engine.predict returns with torch.save."
        raise FileNotFoundError(msg)
    files = sorted(path.glob("*.pt")) if path.is_dir() else [path]
    if not files:
        msg = f"The folder {path} holds no .pt file: save what Engine.predict returns there with torch.save."
        raise FileNotFoundError(msg)
    for file in files:
        yield from _batches(_load(file), file)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; see the module's docstring and ``--help``.

    Args:
        arguments: Arguments of the command; by default those of the process.
    """
    parser = argparse.ArgumentParser(
        prog="python -m anomalib_twostage.inspect",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("predictions", type=Path, help="file, or folder of .pt files")
    parser.add_argument("--out", type=Path, default=Path("inspection"), help="folder of the page (%(default)s)")
    parser.add_argument(
        "--image_sensitivity", type=float, default=0.5, help="what the verdicts were made with (%(default)s)"
    )
    parser.add_argument(
        "--pixel_sensitivity", type=float, default=0.5, help="what the masks were made with (%(default)s)"
    )
    parser.add_argument("--title", default="Inspection", help="headline of the page (%(default)s)")
    parser.add_argument("--picture_size", type=int, default=512, help="longer side of large pictures (%(default)s)")
    parser.add_argument("--min_area", type=int, default=1, help="smallest region in pixels of the map (%(default)s)")
    parser.add_argument(
        "--cropped", action="store_true", help="the model saw a part of each file only: show that, not the file"
    )
    options = vars(parser.parse_args(arguments))
    try:
        index = write_page(
            read_saved(options.pop("predictions")),
            options.pop("out"),
            whole=not options.pop("cropped"),
            **options,
        )
    except (OSError, TypeError, ValueError) as error:
        parser.error(str(error))
    print(f"Wrote {index}.")


def _allowed() -> AbstractContextManager[None]:
    """What a file may hold besides tensors and plain values: anomalib's predictions, and arrays."""
    kinds = [ImageBatch, ImageItem, InferenceBatch, NumpyImageBatch, NumpyImageItem]
    tensors = [tv_tensors.Image, tv_tensors.Mask]
    rebuild = np.zeros(0).__reduce__()[0]
    arrays = [rebuild, np.ndarray, np.dtype, *{type(np.dtype(name)) for name in ("f2", "f4", "f8", "u1", "i8", "?")}]
    names: list[Any] = [*kinds, *tensors, *arrays]
    return torch.serialization.safe_globals(names)


def _load(file: Path) -> Any:
    try:
        with _allowed():
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        msg = f"{file} holds more than predictions, and no code from it is run: {_first_line(error)}"
        raise ValueError(msg) from error
    except OSError:
        raise
    except Exception as error:  # damaged files make the unpickler raise many kinds, some of them without a word
        msg = f"{file} is no file of torch.save, or is damaged: {_first_line(error)}"
        raise ValueError(msg) from error


def _first_line(error: Exception) -> str:
    """What an error says in its first line, or its kind if it says nothing."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def _batches(content: Any, file: Path) -> Iterator[Any]:
    """Batches however deep they lie; Lightning makes a list per data loader of several."""
    if isinstance(content, list) or type(content) is tuple:
        for part in content:
            yield from _batches(part, file)
    elif hasattr(content, "pred_score") or hasattr(content, "anomaly_map"):
        yield content
    else:
        msg = f"{file} holds a {type(content).__name__} where predictions of anomalib are looked for."
        raise ValueError(msg)
