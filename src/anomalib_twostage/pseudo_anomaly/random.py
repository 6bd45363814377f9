# SPDX-License-Identifier: Apache-2.0
"""Random numbers per image, drawn on the device so that nothing waits for the host."""

import math

import torch

__all__ = ["choose", "log_uniform", "to_device", "uniform"]


def uniform(count: int, low: float, high: float, *, device: torch.device) -> torch.Tensor:
    """Draw ``(count,)`` float32 evenly from ``low`` to ``high``."""
    return torch.empty(count, device=device).uniform_(low, high)


def log_uniform(count: int, low: float, high: float, *, device: torch.device) -> torch.Tensor:
    """Draw ``(count,)`` float32 from ``low`` to ``high``, evenly in the logarithm: every scale alike."""
    return uniform(count, math.log(low), math.log(high), device=device).exp()


def choose(count: int, probability: float, *, device: torch.device) -> torch.Tensor:
    """Draw ``(count,)`` bool, true with the given probability."""
    return torch.rand(count, device=device) < probability


def to_device(drawn: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Send what was drawn on the host to the device, without waiting until it is there."""
    return drawn.to(device, non_blocking=True)
