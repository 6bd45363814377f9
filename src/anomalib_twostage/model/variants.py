# SPDX-License-Identifier: Apache-2.0
"""The published variants of the two-stage model, and how each is built."""

from dataclasses import dataclass
from typing import Literal

from anomalib_twostage.superpixels.slic import Slic

from .refiner import SuperpixelRefiner
from .template import GoldenTemplate
from .torch_model import TwoStageSuperpixelModel
from .unet import UNet

__all__ = ["VARIANTS", "Variant", "two_stage_superpixel_model"]


@dataclass(frozen=True)
class Variant:
    """Shape of a published variant.

    Attributes:
        widths: Channels of each U-Net level, finest first.
        stem_stride: 1 for full resolution inside the networks, 2 for half.
        gate: See :class:`TwoStageSuperpixelModel`.
        threshold: Selection threshold of the refiner.
        loss: Loss of both stages.
        template: Whether there is a golden template.
        smoothing: Standard deviation of the Gaussian that smooths the final map, as a share of the segment size.
    """

    widths: tuple[int, ...]
    stem_stride: int
    gate: Literal["hard", "average"]
    threshold: float
    loss: Literal["default", "paper"]
    template: bool = True
    smoothing: float = 0.25


VARIANTS = {
    "default": Variant(widths=(32, 64, 128, 256, 256), stem_stride=2, gate="average", threshold=0.1, loss="default"),
    "small": Variant(widths=(16, 32, 64, 128, 128), stem_stride=2, gate="average", threshold=0.1, loss="default"),
    "paper": Variant(
        widths=(39, 78, 156, 312, 312, 312), stem_stride=1, gate="hard", threshold=0.5, loss="paper", template=False
    ),
}


def two_stage_superpixel_model(
    variant: str = "default",
    segment_size: int = 16,
    compactness: float = 10.0,
    in_channels: int = 3,
    gate: Literal["hard", "average"] | None = None,
    template: bool | None = None,
    num_neighbors: int = 4,
    smoothing: float | None = None,
) -> TwoStageSuperpixelModel:
    """Build a published variant.

    Args:
        variant: ``"default"``, ``"small"`` (a quarter of the cost) or ``"paper"`` (two networks of DRAEM's
            discriminative shape, 23.3 M parameters together, with the hard gate).
        segment_size: Side of a superpixel in pixels.
        compactness: Compactness of the superpixels; see :func:`~anomalib_twostage.superpixels.slic.slic`.
        in_channels: Channels of the images, 1 or 3.
        gate: How stage two's output enters the map; ``None`` takes the variant's own. See
            :class:`TwoStageSuperpixelModel`.
        template: Whether the networks see how far images are from a
            :class:`~anomalib_twostage.model.template.GoldenTemplate`; ``None`` takes the variant's own.
        num_neighbors: Nearest good images that the template compares with, 0 for none.
        smoothing: Standard deviation in pixels of the Gaussian that smooths the final map, 0 for none; ``None`` takes
            the variant's own, a quarter of the segment size or none.

    Returns:
        The model with fresh weights.

    Raises:
        ValueError: If the variant or the gate is unknown, or the smoothing or the number of neighbours negative.
    """
    if variant not in VARIANTS:
        msg = f"variant must be one of {sorted(VARIANTS)}, got {variant!r}."
        raise ValueError(msg)
    shape = VARIANTS[variant]
    gate = gate or shape.gate
    golden = None
    if shape.template if template is None else template:
        golden = GoldenTemplate(in_channels, num_neighbors)
    seen = in_channels + (golden.out_channels if golden else 0)
    return TwoStageSuperpixelModel(
        stage_one=UNet(seen, shape.widths, shape.stem_stride),
        slic=Slic(segment_size, compactness),
        refiner=SuperpixelRefiner(shape.threshold),
        stage_two=UNet(in_channels if gate == "hard" else seen + 2, shape.widths, shape.stem_stride),
        gate=gate,
        template=golden,
        smoothing=shape.smoothing * segment_size if smoothing is None else smoothing,
    )
