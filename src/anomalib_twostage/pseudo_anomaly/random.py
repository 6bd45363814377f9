# SPDX-License-Identifier: Apache-2.0
"""Random numbers per image, drawn on the device so that nothing waits for the host."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["choose", "fixed_seed", "log_uniform", "to_device", "uniform"]


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


@contextmanager
def fixed_seed(seed: int, device: torch.device) -> Iterator[None]:
    """Draw the same random numbers each time, on the host and a device, and then go on as if none had been drawn."""
    module = None if device.type in ("cpu", "meta") else torch.get_device_module(device)
    of = () if device.type == "mps" else (device,)  # of MPS there is one, and its functions do not ask which
    host, there = torch.get_rng_state(), module and module.get_rng_state(*of)
    try:
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed all devices
        if module:
            module.manual_seed(seed)
        yield
    finally:
        torch.set_rng_state(host)
        if module:
            module.set_rng_state(there, *of)
