# SPDX-License-Identifier: Apache-2.0
"""The transforms of data sets, also of those wrapped in others, as in ``torch.utils.data.Subset``."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

from torch.utils.data import Dataset

__all__ = ["datasets_in", "transforms_of", "with_transforms"]

_NAMES = ("augmentations", "transform")  # of anomalib's data sets for training and evaluation, and for prediction


def datasets_in(dataset: Any) -> Iterator[Any]:
    """A data set, and all those that it wraps."""
    if not isinstance(dataset, Dataset):
        return
    yield dataset
    for value in vars(dataset).values():
        for inner in value if isinstance(value, list | tuple) else [value]:
            yield from datasets_in(inner)


def transforms_of(dataset: Any) -> Iterator[tuple[Any, str]]:
    """Where the transforms of a data set are kept: data set and name of the attribute, for all inside it."""
    for part in datasets_in(dataset):
        for name in _NAMES:
            if vars(part).get(name) is not None:
                yield part, name


def with_transforms(dataset: Any, change: Callable[[Any], Any]) -> Any:
    """A shallow copy of a data set with changed transforms, and so of the data sets inside it.

    Args:
        dataset: Data set; it is left as it is.
        change: What makes the new transform of the old one, or ``None`` for none.

    Returns:
        The copy.
    """
    clone = copy.copy(dataset)
    for name, value in vars(dataset).items():
        if name in _NAMES and value is not None:
            setattr(clone, name, change(value))
        elif isinstance(value, Dataset):
            setattr(clone, name, with_transforms(value, change))
        elif isinstance(value, list | tuple) and any(isinstance(inner, Dataset) for inner in value):
            inside = [with_transforms(inner, change) if isinstance(inner, Dataset) else inner for inner in value]
            setattr(clone, name, inside)
    return clone
