# SPDX-License-Identifier: Apache-2.0
"""Two-stage superpixel anomaly detection for anomalib.

Stage one marks suspicious pixels, SLIC superpixels widen them to whole patches, and stage two draws the anomaly map
from those patches alone. With this package installed, the ``anomalib`` command knows the model by name.

One shape convention holds everywhere:

- images are ``(B, C, H, W)``, float in [0, 1];
- maps (anomaly maps, masks) are ``(B, 1, H, W)``, float in [0, 1];
- label maps are ``(B, H, W)``, int64, dense per image in ``0 .. K-1``.

Single images ``(C, H, W)`` are accepted where torchvision transforms accept them.

Example:
    >>> from anomalib.data import MVTecAD
    >>> from anomalib.engine import Engine
    >>> from anomalib_twostage import TwoStageSuperpixel
    >>> Engine().train(model=TwoStageSuperpixel(), datamodule=MVTecAD(category="tile"))  # doctest: +SKIP
"""

from importlib.metadata import version

from anomalib_twostage_plugin import register

from .data import SampleTextures
from .inspection.page.callback import InspectionPage
from .inspection.page.writer import write_page
from .inspection.painted_defects import PaintedDefects
from .inspection.regions import Region, RegionWriter, find_regions, write_regions
from .inspection.threshold import MidwayPostProcessor
from .inspection.visualizer import StageVisualizer
from .model.lightning_model import TwoStageSuperpixel
from .model.loss import PaperLoss, SegmentationLoss
from .model.refiner import SuperpixelRefiner
from .model.template import GoldenTemplate
from .model.torch_model import TwoStageSuperpixelModel
from .model.unet import UNet
from .pseudo_anomaly import PerlinAnomaly, PseudoAnomaly, SuperpixelAnomaly
from .superpixels.post_processor import SuperpixelPostProcessor
from .superpixels.slic import Slic, slic

__all__ = [
    "GoldenTemplate",
    "InspectionPage",
    "MidwayPostProcessor",
    "PaintedDefects",
    "PaperLoss",
    "PerlinAnomaly",
    "PseudoAnomaly",
    "Region",
    "RegionWriter",
    "SampleTextures",
    "SegmentationLoss",
    "Slic",
    "StageVisualizer",
    "SuperpixelAnomaly",
    "SuperpixelPostProcessor",
    "SuperpixelRefiner",
    "TwoStageSuperpixel",
    "TwoStageSuperpixelModel",
    "UNet",
    "__version__",
    "find_regions",
    "slic",
    "write_page",
    "write_regions",
]

__version__ = version("anomalib-twostage")

register()  # where PyTorch's autoload of plugins is off
