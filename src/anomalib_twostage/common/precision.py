# SPDX-License-Identifier: Apache-2.0
"""Full precision inside mixed precision."""

from contextlib import AbstractContextManager, nullcontext

import torch

__all__ = ["autocast_is_on", "full_precision"]


def autocast_is_on(device: torch.device) -> bool:
    """Whether a device computes in mixed precision; some know none, and PyTorch refuses to be asked about them."""
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)


def full_precision(device: torch.device) -> AbstractContextManager[object]:
    """Switch autocast off for a device while the context lasts; float32 then stays float32.

    Where autocast is off already nothing is switched: an export traces no autocast, and could not hold one.
    """
    return torch.autocast(device.type, enabled=False) if autocast_is_on(device) else nullcontext()
