# SPDX-License-Identifier: Apache-2.0
import os

import numpy as np
import pytest
import torch
from skimage import data as photographs

# Tests run side by side, one to a core; so do the programs that they start, which would wait for each other's threads.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def photograph(name: str, side: int | None = None, top: int = 0, left: int = 0) -> np.ndarray:
    """A photograph of scikit-image, or a square of it, as RGB in [0, 1]; grey ones threefold."""
    image = np.asarray(getattr(photographs, name)()) / 255
    image = np.dstack([image] * 3) if image.ndim == 2 else image[..., :3]
    return image if side is None else image[top : top + side, left : left + side]


def to_tensor(image: np.ndarray) -> torch.Tensor:
    """``(H, W, C)`` in [0, 1] as a float32 tensor ``(C, H, W)``."""
    return torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1).float()
