# SPDX-License-Identifier: Apache-2.0
"""Superpixel refinement for any anomalib model: its anomaly map, snapped to the image.

A post-processor has to do without the image in one place. In validation, test and prediction it is a callback and gets
the whole batch. In the model's forward pass, which is also what is exported, anomalib hands it the predictions alone.
There a forward hook on the inner model adds the image to its predictions; nothing is kept between two calls, so
nothing can be stale, and a trace sees the image as what it is, a result of the input. anomalib tells a post-processor
nothing of its model either, so each looks out, as long as it lives, for a model that takes it.
"""

import warnings
import weakref
from functools import partial
from typing import Any

import torch
from anomalib.data import Batch, InferenceBatch
from anomalib.post_processing import PostProcessor
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.nn import functional
from torch.nn.modules.module import register_module_module_registration_hook

from anomalib_twostage.common.transforms import NORMALIZE, find_transforms

from .pooling import superpixel_mean
from .slic import Slic

__all__ = ["SuperpixelPostProcessor"]

_OVERSHOOT = 0.5  # resizing with a cubic filter leaves [0, 1] a little; normalised images leave it by far


class SuperpixelPostProcessor(PostProcessor):
    """Post-processor that snaps a model's anomaly map to the superpixels of the image.

    The anomaly map is averaged over each superpixel, and the result is mixed with the map itself. This happens before
    anything else: thresholds and normalisation are those of the refined map. It holds in validation, test and
    prediction, in the model's forward pass, and in exported models. Image scores stay the model's own.

    Superpixels are cut from what the inner model sees, after the pre-processor's resizing and cropping and before its
    ``Normalize``, and have their size in those pixels. A model that tiles its input is refined as a whole.

    Every model with an anomaly map and RGB or grey images can be refined. It has the same weights with and without, so
    checkpoints fit both ways; but thresholds in a checkpoint belong to the maps that they were measured on. A
    checkpoint saved with this post-processor brings it back in ``load_from_checkpoint``, and with it in
    ``anomalib export --ckpt_path``. As with anomalib's own post-processors, the settings in a checkpoint win.

    Args:
        segment_size: Side of a superpixel in pixels.
        compactness: Compactness of the superpixels; see :func:`~anomalib_twostage.superpixels.slic.slic`.
        blend: Share of the superpixel average in the refined map, above 0 and up to 1; the rest is the model's map.
        **kwargs: Arguments of anomalib's ``PostProcessor``.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> from anomalib.models import Padim
        >>> from anomalib_twostage import SuperpixelPostProcessor
        >>> model = Padim(pre_trained=False, post_processor=SuperpixelPostProcessor(segment_size=12))
    """

    def __init__(self, segment_size: int = 16, compactness: float = 10.0, blend: float = 0.5, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.segment_size = segment_size
        self.compactness = compactness
        self.blend = blend
        self._apply_settings()
        self._look_out()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over the state of a copy or pickle."""
        super().__setstate__(state)
        self._look_out()

    def refine(self, images: torch.Tensor, anomaly_map: torch.Tensor) -> torch.Tensor:
        """Snap anomaly maps to the superpixels of their images.

        Args:
            images: ``(B, C, H, W)``, 1 or 3 channels, floating point in [0, 1]. Where the maps have another size, the
                images are resized to it.
            anomaly_map: ``(B, 1, H, W)`` or ``(B, H, W)``, floating point, in any range.

        Returns:
            Refined maps, of the shape and dtype of the given ones.

        Raises:
            TypeError: If the images are not floating point.
            ValueError: If the images have another shape, are not in [0, 1], or are smaller than a superpixel.
        """
        _check_range(images)
        height, width = anomaly_map.shape[-2:]
        if images.shape[-2:] != anomaly_map.shape[-2:]:
            images = functional.interpolate(images, size=(height, width), mode="bilinear")
        raw = anomaly_map.reshape(-1, 1, height, width).float()
        snapped = superpixel_mean(raw, self.slic(images), self.slic.max_segments(height, width))
        return torch.lerp(raw, snapped, self.blend).to(anomaly_map.dtype).reshape(anomaly_map.shape)

    def forward(self, predictions: InferenceBatch) -> InferenceBatch:
        """Refine and post-process the predictions of the model that this post-processor belongs to.

        Args:
            predictions: What the inner model returned, with ``anomaly_map`` ``(B, 1, H, W)`` or ``(B, H, W)``.

        Returns:
            See anomalib's ``PostProcessor``; ``anomaly_map`` is refined.

        Raises:
            RuntimeError: If the predictions do not come from the inner model of an anomalib model that has this
                post-processor.
            ValueError: If there is no anomaly map, or the images cannot be segmented (see :meth:`refine`).
        """
        if not isinstance(predictions, _PredictionsOfImage):
            msg = (
                "SuperpixelPostProcessor needs the image, and these predictions come without: give it to an anomalib "
                "model as `post_processor` and call that model, or call `refine(images, anomaly_map)` first and "
                "anomalib's PostProcessor then."
            )
            raise RuntimeError(msg)
        images = _without_normalisation(predictions.image, predictions.pre_processor)
        refined = self.refine(images, _map_of(predictions))
        return super().forward(InferenceBatch(**{**predictions._asdict(), "anomaly_map": refined}))

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *args: Any, **kwargs: Any
    ) -> None:
        """Refine the batch, then collect thresholds and the range of values.

        Raises:
            ValueError: If there is no anomaly map, or the images cannot be segmented (see :meth:`refine`).
        """
        self._refine_batch(pl_module, outputs)
        super().on_validation_batch_end(trainer, pl_module, outputs, *args, **kwargs)

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *args: Any, **kwargs: Any
    ) -> None:
        """Refine the batch, then normalise and threshold it.

        Raises:
            ValueError: If there is no anomaly map, or the images cannot be segmented (see :meth:`refine`).
        """
        self._refine_batch(pl_module, outputs)
        super().on_test_batch_end(trainer, pl_module, outputs, *args, **kwargs)

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *args: Any, **kwargs: Any
    ) -> None:
        """Refine the batch, then normalise and threshold it.

        Raises:
            ValueError: If there is no anomaly map, or the images cannot be segmented (see :meth:`refine`).
        """
        self._refine_batch(pl_module, outputs)
        super().on_predict_batch_end(trainer, pl_module, outputs, *args, **kwargs)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Name this class in the checkpoint, so that ``load_from_checkpoint`` builds it again."""
        del trainer
        parameters = checkpoint.setdefault(pl_module.CHECKPOINT_HYPER_PARAMS_KEY, {})
        parameters["post_processor"] = _Rebuilt()

    @property
    def _checkpoint_config_keys(self) -> tuple[str, ...]:
        return (*super()._checkpoint_config_keys, "segment_size", "compactness", "blend")

    def load_checkpoint_config(self, config: dict[str, Any]) -> None:
        """Restore the settings from a checkpoint.

        Args:
            config: What ``checkpoint_config`` returned. If it is that of another post-processor, a warning says that
                its thresholds are not those of refined maps.

        Raises:
            ValueError: If a setting is out of range.
        """
        super().load_checkpoint_config(config)
        self._apply_settings()
        if "blend" not in config:
            msg = (
                "The checkpoint was saved without SuperpixelPostProcessor: its thresholds and range of values belong "
                "to maps that were not refined. Validate the model on your data (Engine.validate) to measure them anew."
            )
            warnings.warn(msg, stacklevel=2)

    def _apply_settings(self) -> None:
        if not 0 < self.blend <= 1:
            msg = f"blend must be above 0 and at most 1, got {self.blend}."
            raise ValueError(msg)
        self.slic = Slic(self.segment_size, self.compactness)

    def _look_out(self) -> None:
        """Give the inner model of whatever takes this post-processor its hook, whichever of the two comes first."""
        this = weakref.ref(self)

        def introduce(host: nn.Module, name: str, submodule: nn.Module | None) -> None:
            modules = {**host._modules, name: submodule} if name in ("model", "post_processor") else {}
            inner = modules.get("model")
            if inner is None or modules.get("post_processor") is not this():
                return
            hooks = [hook for hook in inner._forward_hooks.values() if isinstance(hook, partial)]
            if not any(hook.func is _add_image and hook.args == (host,) for hook in hooks):
                inner.register_forward_hook(partial(_add_image, host), with_kwargs=True)

        weakref.finalize(self, register_module_module_registration_hook(introduce).remove)

    def _refine_batch(self, pl_module: LightningModule, batch: Batch) -> None:
        assert isinstance(batch.image, torch.Tensor)
        images = _without_normalisation(batch.image, getattr(pl_module, "pre_processor", None))
        batch.anomaly_map = self.refine(images, _map_of(batch))


class _PredictionsOfImage(InferenceBatch):
    """Predictions that carry, beside their fields, what they were made from."""

    image: torch.Tensor  # as the inner model saw it
    pre_processor: nn.Module | None


class _Rebuilt:
    """Stands for a post-processor in a checkpoint: loaded, it is a new one, whose settings come from the checkpoint."""

    def __reduce__(self) -> tuple[type[SuperpixelPostProcessor], tuple[()]]:
        return SuperpixelPostProcessor, ()


def _add_image(
    host: nn.Module, inner: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> InferenceBatch | None:
    """Forward hook of the inner model: hand the image on with the predictions, if the host's post-processor needs it.

    In training, models return other things than predictions.
    """
    del inner
    if not isinstance(output, InferenceBatch):
        return None
    if not isinstance(getattr(host, "post_processor", None), SuperpixelPostProcessor):
        return None
    predictions = _PredictionsOfImage(*output)
    predictions.image = args[0] if args else next(iter(kwargs.values()))
    predictions.pre_processor = getattr(host, "pre_processor", None)
    return predictions


def _map_of(predictions: Batch | InferenceBatch) -> torch.Tensor:
    anomaly_map = predictions.anomaly_map
    if anomaly_map is None:
        msg = (
            "SuperpixelPostProcessor refines anomaly maps, and this model predicts none: use anomalib's own "
            "PostProcessor for it."
        )
        raise ValueError(msg)
    assert isinstance(anomaly_map, torch.Tensor)
    return anomaly_map


def _without_normalisation(images: torch.Tensor, pre_processor: nn.Module | None) -> torch.Tensor:
    """Undo every ``Normalize`` of the pre-processor. What else it does is geometry, in which both orders are alike."""
    for normalise in reversed(find_transforms(getattr(pre_processor, "transform", None), NORMALIZE)):
        mean = torch.tensor(normalise.mean, dtype=images.dtype, device=images.device).view(-1, 1, 1)
        std = torch.tensor(normalise.std, dtype=images.dtype, device=images.device).view(-1, 1, 1)
        images = images * std + mean
    return images


def _check_range(images: torch.Tensor) -> None:
    # An exported graph cannot stop at a value.
    if torch.compiler.is_compiling() or not images.is_floating_point() or images.numel() == 0:
        return
    low, high = (float(value) for value in images.detach().float().aminmax())
    if not (low >= -_OVERSHOOT and high <= 1 + _OVERSHOOT):
        msg = (
            f"SuperpixelPostProcessor reads images in [0, 1], got values from {low:.3g} to {high:.3g}. It undoes the "
            "Normalize of the model's pre-processor only: move normalisation there from datamodule or augmentations."
        )
        raise ValueError(msg)


# A checkpoint may name this class: calling it without arguments runs nothing of the checkpoint.
torch.serialization.add_safe_globals([SuperpixelPostProcessor])
