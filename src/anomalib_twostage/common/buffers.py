# SPDX-License-Identifier: Apache-2.0
"""Buffers whose sizes follow the images that a module was fitted to."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

__all__ = ["resize_buffers"]


def resize_buffers(module: nn.Module, state_dict: dict[str, Any], prefix: str, kept: Mapping[str, int | None]) -> None:
    """Give buffers the shapes of what is about to be loaded into them.

    Args:
        module: Module of the buffers.
        state_dict: What is about to be loaded.
        prefix: What the names in it begin with.
        kept: Per buffer the dimension that must be the same, or ``None``; where it is not, or the number of dimensions
            differs, the buffer stays as it is, and loading fails. Buffers that the module lacks are passed over.
    """
    for name, dimension in kept.items():
        saved, own = state_dict.get(f"{prefix}{name}"), module._buffers.get(name)
        if saved is None or own is None or saved.ndim != own.ndim:
            continue
        if dimension is None or saved.shape[dimension] == own.shape[dimension]:
            setattr(module, name, torch.empty_like(saved, device=own.device, dtype=own.dtype))
