# SPDX-License-Identifier: Apache-2.0
"""The published variants of the two-stage model, and how each is built."""

import logging
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from anomalib_twostage.superpixels.slic import Slic

from .backbone import DEFAULT_BACKBONE, Backbone
from .decoder import Decoder
from .feature_model import FeatureTemplate, FeatureTwoStageModel
from .refiner import SuperpixelRefiner
from .template import GoldenTemplate
from .torch_model import TwoStageSuperpixelModel
from .unet import UNet
from .zoom import ZoomedTwoStageModel

__all__ = ["VARIANTS", "Variant", "two_stage_superpixel_model", "variant_of"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Variant:
    """Shape of a published variant.

    Attributes:
        widths: Channels of each level: of a U-Net, finest first; of decoders of features, coarsest first, with the
            last for a stage two that looks closer.
        gate: See :class:`TwoStageSuperpixelModel`.
        threshold: Selection threshold of the refiner.
        loss: Loss of both stages.
        stem_stride: Of a U-Net: 1 for full resolution inside the networks, 2 for half.
        features: Whether the stages look at the features of a backbone; otherwise at the image.
        template: Whether there is a golden template.
        segment_size: Side of a superpixel in pixels.
        smoothing: Standard deviation of the Gaussian that smooths the final map, as a share of the segment size.
        magnification: How many times as large a backbone sees images.
    """

    widths: tuple[int, ...]
    gate: Literal["hard", "average"] = "average"
    threshold: float = 0.1
    loss: Literal["default", "paper"] = "default"
    stem_stride: int = 2
    features: bool = False
    template: bool = True
    segment_size: int = 16
    smoothing: float = 0.25
    magnification: float = 1.0


VARIANTS = {
    "default": Variant(widths=(64, 64, 32, 24), features=True, segment_size=8, smoothing=0.125, magnification=1.5),
    "scratch": Variant(widths=(32, 64, 128, 256, 256)),
    "small": Variant(widths=(16, 32, 64, 128, 128)),
    "paper": Variant(
        widths=(39, 78, 156, 312, 312, 312),
        stem_stride=1,
        gate="hard",
        threshold=0.5,
        loss="paper",
        template=False,
        smoothing=0.0,
    ),
}

_OF_LENGTHS = (32, 32, 32, 24)  # channels of a decoder that sees a few lengths and maps, coarsest first


def variant_of(variant: str, backbone: str | Path | None) -> str:
    """The variant that is meant: without a backbone the one that has one is trained from scratch.

    Raises:
        ValueError: If the variant is unknown.
    """
    if variant not in VARIANTS:
        msg = f"variant must be one of {sorted(VARIANTS)}, got {variant!r}."
        raise ValueError(msg)
    if VARIANTS[variant].features and backbone is None:
        logger.info("Without a backbone the variant is 'scratch'.")
        return "scratch"
    return variant


def two_stage_superpixel_model(
    variant: str = "default",
    segment_size: int | None = None,
    compactness: float = 10.0,
    in_channels: int = 3,
    gate: Literal["hard", "average"] | None = None,
    template: bool | None = None,
    num_neighbors: int = 4,
    smoothing: float | None = None,
    backbone: str | Path | None = DEFAULT_BACKBONE,
    place_deviation: bool = True,
    zoom: int = 1,
    zoom_windows: int = 8,
    magnification: float | None = None,
) -> TwoStageSuperpixelModel:
    """Build a published variant.

    Args:
        variant: ``"default"``, which looks through a pretrained backbone; ``"scratch"``, which learns all from random
            weights; ``"small"``, a quarter of that; or ``"paper"`` (two networks of DRAEM's discriminative shape, 23.3
            M parameters together, with the hard gate).
        segment_size: Side of a superpixel in pixels; 1 takes every pixel for itself. ``None`` takes the variant's own.
        compactness: Compactness of the superpixels; see :func:`~anomalib_twostage.superpixels.slic.slic`.
        in_channels: Channels of the images, 1 or 3.
        gate: How stage two's output enters the map; ``None`` takes the variant's own. See
            :class:`TwoStageSuperpixelModel`.
        template: Whether the networks see how far images are from the good ones: a
            :class:`~anomalib_twostage.model.template.GoldenTemplate`, or the memories of a
            :class:`~anomalib_twostage.model.feature_model.FeatureTemplate`; ``None`` takes the variant's own.
        num_neighbors: Nearest good images that a golden template compares with, 0 for none.
        smoothing: Standard deviation in pixels of the Gaussian that smooths the final map, 0 for none; ``None`` takes
            the variant's own: an eighth of the segment size for ``"default"``, none for ``"paper"``, else a quarter.
        backbone: Of ``"default"``: see :class:`~anomalib_twostage.model.backbone.Backbone`. ``None`` trains from
            scratch, which is ``"scratch"``. Other variants have none.
        place_deviation: Of ``"default"``: whether features are compared with the mean of their place, or of all places.
        zoom: Of ``"default"``: pixels of the image to one of those that stage one sees; stage two looks closer, see
            :class:`~anomalib_twostage.model.zoom.ZoomedTwoStageModel`. 1 shows both the same.
        zoom_windows: Windows of an image that stage two looks at, at most, if there is a zoom.
        magnification: Of ``"default"``: how many times as large the backbone sees images, or, with a zoom, the reduced
            ones. ``None`` takes 1.5. Other variants have none.

    Returns:
        The model with fresh weights.

    Raises:
        ValueError: If the variant, the gate or the backbone is unknown, the smoothing or the number of neighbours
            negative, the zoom not a whole number from 1 to 16, or above 1 without a backbone, or the magnification
            below 1, or above 1 without a backbone.
    """
    shape = VARIANTS[variant_of(variant, backbone)]
    gate = gate or shape.gate
    template = shape.template if template is None else template
    segment_size = shape.segment_size if segment_size is None else segment_size
    slic, refiner = Slic(segment_size, compactness), SuperpixelRefiner(shape.threshold)
    smoothing = shape.smoothing * segment_size if smoothing is None else smoothing
    magnification = shape.magnification if magnification is None else magnification
    if zoom != 1 and not shape.features:
        msg = f"zoom={zoom} needs variant 'default' with a backbone: the others have nothing to look closer with."
        raise ValueError(msg)
    if magnification != 1 and not shape.features:
        msg = f"magnification={magnification} needs variant 'default' with a backbone: resize to larger images instead."
        raise ValueError(msg)
    if shape.features:
        assert backbone is not None
        features = FeatureTemplate(
            Backbone(backbone), template, place_deviation, magnification=magnification, means=zoom == 1
        )
        levels, widths = (features.length_channels, _OF_LENGTHS) if zoom == 1 else (features.channels, shape.widths)
        detail = (4 if template else 2) + (0 if zoom == 1 else in_channels)
        return (FeatureTwoStageModel if zoom == 1 else partial(ZoomedTwoStageModel, zoom=zoom, windows=zoom_windows))(
            stage_one=Decoder(features.channels, shape.widths[:-1], stride=4),
            slic=slic,
            refiner=refiner,
            stage_two=Decoder((*levels, 4 * detail), widths, stride=2),
            gate=gate,
            template=features,
            smoothing=smoothing,
        )
    golden = GoldenTemplate(in_channels, num_neighbors) if template else None
    seen = in_channels + (golden.out_channels if golden else 0)
    return TwoStageSuperpixelModel(
        stage_one=UNet(seen, shape.widths, shape.stem_stride),
        slic=slic,
        refiner=refiner,
        stage_two=UNet(in_channels if gate == "hard" else seen + 2, shape.widths, shape.stem_stride),
        gate=gate,
        template=golden,
        smoothing=smoothing,
    )
