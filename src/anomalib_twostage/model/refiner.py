# SPDX-License-Identifier: Apache-2.0
"""Superpixel refinement: from a noisy anomaly map to whole patches of the image.

The paper compares stage one's prediction with superpixels of the input and takes every superpixel that the
prediction touches as a whole. It leaves "touches" open. Here a superpixel is touched when stage one's mean over
it reaches a threshold. Pixels that reach the threshold on their own are kept as well, with a margin, so that a
defect cut by a segment border keeps its rim on the far side.
"""

from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional

from anomalib_twostage.superpixels.pooling import superpixel_mean

__all__ = ["RefinedImage", "SuperpixelRefiner"]


class RefinedImage(NamedTuple):
    """What the refiner hands to stage two.

    Attributes:
        image: The image where selected, zero elsewhere, ``(B, C, H, W)``.
        selected: 1 where selected, 0 elsewhere, ``(B, 1, H, W)`` float32.
        pooled: Stage one's map averaged over each superpixel, ``(B, 1, H, W)`` float32 in [0, 1].
    """

    image: torch.Tensor
    selected: torch.Tensor
    pooled: torch.Tensor


class SuperpixelRefiner(nn.Module):
    """Select the superpixels that stage one touched and blank the rest of the image.

    A superpixel whose mean is NaN is selected, so that what cannot be judged does not pass for good. With nothing
    above the threshold (a clean image, or a defect that stage one missed entirely) nothing is
    selected and the refined image is all zero.

    Args:
        threshold: Mean of stage one's map over a superpixel from which it is selected, in (0, 1).
        margin: Pixels kept around every pixel that reaches the threshold on its own.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> refiner = SuperpixelRefiner(threshold=0.5)
        >>> labels = torch.arange(64).reshape(1, 8, 8) // 16
        >>> refiner(torch.rand(1, 3, 8, 8), torch.zeros(1, 1, 8, 8), labels, max_segments=4).selected.sum()
        tensor(0.)
    """

    def __init__(self, threshold: float = 0.5, margin: int = 2) -> None:
        super().__init__()
        if not 0 < threshold < 1:
            msg = f"threshold must be between 0 and 1, got {threshold}."
            raise ValueError(msg)
        if margin < 0:
            msg = f"margin must be 0 pixels or more, got {margin}."
            raise ValueError(msg)
        self.threshold = threshold
        self.margin = margin

    def forward(
        self,
        images: torch.Tensor,
        anomaly_map: torch.Tensor,
        labels: torch.Tensor,
        max_segments: int,
    ) -> RefinedImage:
        """Refine images by stage one's maps.

        Args:
            images: ``(B, C, H, W)``.
            anomaly_map: Stage one's maps ``(B, 1, H, W)`` in [0, 1].
            labels: Superpixels of the images ``(B, H, W)``, int64.
            max_segments: Upper bound of the number of labels.

        Returns:
            The refined image, what was selected, and the pooled map; see :class:`RefinedImage`.

        Raises:
            TypeError: If the labels are not int64.
            ValueError: If the shapes do not fit.
        """
        if not torch.compiler.is_compiling() and (len(images), *images.shape[2:]) != labels.shape:
            msg = (
                "Images must be (B, C, H, W) and their labels (B, H, W), "
                f"got shapes {tuple(images.shape)} and {tuple(labels.shape)}."
            )
            raise ValueError(msg)
        pooled = superpixel_mean(anomaly_map, labels, max_segments)
        touched = (anomaly_map >= self.threshold).float()
        rim = functional.max_pool2d(touched, kernel_size=2 * self.margin + 1, stride=1, padding=self.margin)
        # Put this way, a superpixel of NaN is selected: it must not pass for good.
        selected = torch.maximum(1 - (pooled < self.threshold).float(), rim)
        return RefinedImage(image=images * selected.to(images.dtype), selected=selected, pooled=pooled)

    def extra_repr(self) -> str:
        """Show the settings in ``print(model)``."""
        return f"threshold={self.threshold}, margin={self.margin}"
