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

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from anomalib_twostage.plugin import WatchedPackage, register

if TYPE_CHECKING:
    from anomalib_twostage.data import SampleTextures
    from anomalib_twostage.lightning_model import TwoStageSuperpixel
    from anomalib_twostage.loss import PaperLoss, SegmentationLoss
    from anomalib_twostage.pseudo_anomaly import PerlinAnomaly, PseudoAnomaly, SuperpixelAnomaly
    from anomalib_twostage.refiner import SuperpixelRefiner
    from anomalib_twostage.regions import Region, RegionWriter, find_regions, write_regions
    from anomalib_twostage.slic import Slic, slic
    from anomalib_twostage.superpixel_post_processor import SuperpixelPostProcessor
    from anomalib_twostage.template import GoldenTemplate
    from anomalib_twostage.torch_model import TwoStageSuperpixelModel
    from anomalib_twostage.unet import UNet
    from anomalib_twostage.visualizer import StageVisualizer

    __version__: str

__all__ = [
    "GoldenTemplate",
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
    "write_regions",
]

# Every program that imports torch imports this file (see plugin.py), so the names are resolved on first use.
_SUBMODULES = {
    "GoldenTemplate": "template",
    "PaperLoss": "loss",
    "PerlinAnomaly": "pseudo_anomaly",
    "PseudoAnomaly": "pseudo_anomaly",
    "Region": "regions",
    "RegionWriter": "regions",
    "SampleTextures": "data",
    "SegmentationLoss": "loss",
    "Slic": "slic",
    "StageVisualizer": "visualizer",
    "SuperpixelAnomaly": "pseudo_anomaly",
    "SuperpixelPostProcessor": "superpixel_post_processor",
    "SuperpixelRefiner": "refiner",
    "TwoStageSuperpixel": "lightning_model",
    "TwoStageSuperpixelModel": "torch_model",
    "UNet": "unet",
    "find_regions": "regions",
    "slic": "slic",
    "write_regions": "regions",
}


class _Face(WatchedPackage):
    """Module class that keeps the function ``slic`` where the import system would put the submodule ``slic``.

    That is what an eager ``from anomalib_twostage.slic import slic`` in this file would do.
    """

    def __setattr__(self, name: str, value: object) -> None:
        super().__setattr__(name, value)
        if name == "slic" and isinstance(value, ModuleType):
            self.slic = value.slic


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        value = version("anomalib-twostage")
    elif name in _SUBMODULES:
        value = getattr(import_module(f"{__name__}.{_SUBMODULES[name]}"), name)
    else:
        msg = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(msg)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


sys.modules[__name__].__class__ = _Face
register()
