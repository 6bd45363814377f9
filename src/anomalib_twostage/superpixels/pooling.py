# SPDX-License-Identifier: Apache-2.0
"""Means over superpixels."""

import torch

__all__ = ["superpixel_mean"]


def superpixel_mean(values: torch.Tensor, labels: torch.Tensor, max_segments: int) -> torch.Tensor:
    """Replace every pixel by the mean over its superpixel.

    Args:
        values: Maps ``(B, 1, H, W)``, floating point.
        labels: Superpixel labels ``(B, H, W)``, int64 in ``0 .. max_segments - 1``.
        max_segments: Upper bound of the number of labels; a plain number, so that nothing waits for the device.

    Returns:
        Maps ``(B, 1, H, W)``, float32, constant over each superpixel. NaN spreads over its superpixel and no further.

    Raises:
        TypeError: If the labels are not int64.
        ValueError: If the shapes do not fit.
    """
    # Sizes are symbols while the model is traced for export, where a comparison would freeze them.
    if not torch.compiler.is_compiling():
        _check(values, labels)
    flat_labels = labels.flatten(1)
    flat_values = values.float().flatten(1)
    zeros = torch.zeros(labels.shape[0], max_segments, dtype=torch.float32, device=values.device)
    sums = zeros.scatter_add(1, flat_labels, flat_values)
    counts = zeros.scatter_add(1, flat_labels, torch.ones_like(flat_values))
    return (sums / counts.clamp_min(1.0)).gather(1, flat_labels).reshape(values.shape)


def _check(values: torch.Tensor, labels: torch.Tensor) -> None:
    if labels.dtype != torch.int64:
        msg = f"labels must be int64, got {labels.dtype}."
        raise TypeError(msg)
    batch, *size = labels.shape
    if labels.ndim != 3 or values.shape != (batch, 1, *size):
        msg = (
            "Maps must be (B, 1, H, W) and their labels (B, H, W), "
            f"got shapes {tuple(values.shape)} and {tuple(labels.shape)}."
        )
        raise ValueError(msg)
