# SPDX-License-Identifier: Apache-2.0
"""What goes on while a graph is made."""

import torch

__all__ = ["is_exporting"]


def is_exporting() -> bool:
    """Whether the model is being traced for a file. PyTorch 2.6 cannot tell, and does not export it either."""
    return hasattr(torch.compiler, "is_exporting") and torch.compiler.is_exporting()
