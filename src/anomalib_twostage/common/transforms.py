# SPDX-License-Identifier: Apache-2.0
"""What is inside a transform: torchvision's containers and whatever else holds transforms.

anomalib's ``extract_transforms_by_type`` looks at a ``Compose`` and no deeper.
"""

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn
from torchvision import transforms, tv_tensors
from torchvision.transforms import v2

__all__ = ["EACH_IS_APPLIED", "NORMALIZE", "RANDOM_APPLY", "RANDOM_CHOICE", "find_transforms", "fixed_part", "parts"]

_Kind = TypeVar("_Kind")

EACH_IS_APPLIED = (v2.Compose, v2.RandomOrder, transforms.Compose, transforms.RandomOrder, nn.Sequential)
"""Containers that apply all that is in them, of torchvision's two generations."""
RANDOM_APPLY = (v2.RandomApply, transforms.RandomApply)
RANDOM_CHOICE = (v2.RandomChoice, transforms.RandomChoice)
NORMALIZE = (v2.Normalize, transforms.Normalize)

_TRIALS = 16  # a transform that does the same so many times in a row is taken for one that always does


def parts(transform: Any) -> list[Any]:
    """Transforms inside a transform, in their order."""
    listed = getattr(transform, "transforms", None)
    if isinstance(listed, Sequence | nn.ModuleList):
        return list(listed)
    return list(transform.children()) if isinstance(transform, nn.Module) else []


def find_transforms(transform: Any, kind: type[_Kind] | tuple[type[_Kind], ...]) -> list[_Kind]:
    """Find all transforms of a type, or of several, however deep in containers.

    Args:
        transform: Transform or container; ``None`` has no parts.
        kind: Type to look for, or several.

    Returns:
        The transforms in their order.

    Example:
        >>> nested = v2.Compose([v2.RandomApply([v2.Normalize([0.5], [0.5])])])
        >>> find_transforms(nested, v2.Normalize)
        [Normalize(mean=[0.5], std=[0.5], inplace=False)]
    """
    if isinstance(transform, kind):
        return [transform]
    return [found for part in parts(transform) for found in find_transforms(part, kind)]


def fixed_part(transform: Any, image: torch.Tensor, without: type | tuple[type, ...] = ()) -> v2.Compose | None:
    """What of a transform happens to every image alike: a crop to the middle does, a random flip does not.

    Transforms are tried out on noise of the image's shape, since their classes do not say: torchvision's
    ``RandomHorizontalFlip(p=1)`` always acts alike, and transforms of one's own are not known. The random numbers of
    the program are left as they are.

    Args:
        transform: Transform or container; ``None`` has no parts.
        image: An image that it is applied to, ``(C, H, W)``.
        without: Transforms of these types are left out, whatever they do.

    Returns:
        The transforms that always do the same, or ``None`` if there are none.
    """
    with isolate_rng(include_cuda=False):
        torch.default_generator.manual_seed(0)  # the other devices' numbers are left alone
        noise = tv_tensors.Image(torch.rand(image.shape) * 0.6 + 0.2)
        kept, _ = _fixed_parts(transform, noise, without)
    return v2.Compose(kept) if kept else None


def _fixed_parts(
    transform: Any, image: torch.Tensor, without: type | tuple[type, ...]
) -> tuple[list[Any], torch.Tensor]:
    """The parts that always act alike, and the image after them."""
    if transform is None or isinstance(transform, without):
        return [], image
    if isinstance(transform, EACH_IS_APPLIED) or (isinstance(transform, RANDOM_APPLY) and transform.p >= 1):
        kept = []
        for part in parts(transform):
            more, image = _fixed_parts(part, image, without)
            kept += more
        return kept, image
    result = _apply_to_image(transform, image)
    for _ in range(_TRIALS - 1):
        again = _apply_to_image(transform, image)
        if again.shape != result.shape or not torch.equal(again, result):
            return [], image
    return [transform], result


def _apply_to_image(transform: Any, image: torch.Tensor) -> torch.Tensor:
    """Apply a transform to an image as anomalib's data sets do, with a mask where it takes one."""
    mask = tv_tensors.Mask(torch.zeros(image.shape[-2:], dtype=torch.uint8))
    try:
        result = transform(image, mask)
    except TypeError:
        result = transform(image)
    return result[0] if isinstance(result, tuple) else result
