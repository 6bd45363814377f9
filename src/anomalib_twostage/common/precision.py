# SPDX-License-Identifier: Apache-2.0
"""Full precision inside mixed precision."""

from contextlib import AbstractContextManager, nullcontext

import torch

__all__ = ["full_precision"]


def full_precision(device: torch.device) -> AbstractContextManager[object]:
    """Switch autocast off for a device while the context lasts; float32 then stays float32.

    Where autocast is off already nothing is switched: an export traces no autocast, and could not hold one.
    """
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()
