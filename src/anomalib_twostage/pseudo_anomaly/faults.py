# SPDX-License-Identifier: Apache-2.0
"""Imitated faults of stage one.

On the paint it was trained on, stage one makes few mistakes, and none of the kind it makes on real defects. Stage
two is there to mend these: parts of a defect that are missing, and noise outside. So it has to see them.
"""

import torch

from .perlin import random_perlin_noise
from .random import choose, log_uniform, uniform

__all__ = ["imitate_faults"]


def imitate_faults(logits: torch.Tensor) -> torch.Tensor:
    """Tear holes into stage one's maps, add noise to them, and fade them.

    Args:
        logits: Stage one's logits ``(B, 1, H, W)``.

    Returns:
        Logits of the same shape: per image weaker or stronger as a whole, half of them with holes, half with
        false alarms. From the device's global random generator.
    """
    batch, _, height, width = logits.shape
    device = logits.device

    def patches() -> torch.Tensor:
        frequency = log_uniform(batch, 3.0, 24.0, device=device)
        noise = random_perlin_noise(height, width, torch.stack([frequency, frequency], dim=1), frequency)
        level = uniform(batch, 0.0, 1.5, device=device).view(-1, 1, 1)
        depth = uniform(batch, 1.0, 6.0, device=device) * choose(batch, 0.5, device=device)
        return (noise > level).unsqueeze(1) * depth.view(-1, 1, 1, 1)

    positive = (logits > 0).to(logits.dtype)
    fade = uniform(batch, -3.0, 0.5, device=device).view(-1, 1, 1, 1)
    return logits + positive * (fade - patches()) + (1 - positive) * patches()
