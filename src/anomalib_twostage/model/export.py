# SPDX-License-Identifier: Apache-2.0
"""Exports that see what the model sees: resizing that every runtime knows, and INT8 for the networks alone.

anomalib resizes with antialiasing while it trains, tests and predicts, and without while it exports, because ONNX
runtimes lack it or, like OpenVINO, silently leave it out. And a graph keeps whatever size is computed from its example
image. An export then sees other pixels than the model learned from, and gives other maps. Here a graph resizes by
matrix products, and where its sizes depend on those of the images, it asks for them.

Left alone, NNCF also quantises what lies between and behind the networks. With 256 values for its distances SLIC breaks
down, and with 256 values for the maps most normal pixels tie. A network's first convolution sees images in [0, 1]
beside deviations in [-3, 3]: one scale for both leaves the image some forty values, and shifts whole maps. All the
computing is in the other convolutions anyway. A backbone keeps its precision too: how far its features are from those
in memory was measured in it, and its rounding would be a distance of its own.
"""

import logging
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from anomalib.data import AnomalibDataModule, ImageBatch
from anomalib.data.transforms import ExportableCenterCrop
from anomalib.deploy import CompressionType
from anomalib.metrics import F1Score
from anomalib.models.components.base.export_mixin import ExportMixin
from anomalib.pre_processing import PreProcessor
from torch.nn import functional
from torchmetrics import Metric
from torchvision.transforms.v2 import CenterCrop, Compose, InterpolationMode, Lambda, Resize, Transform

from anomalib_twostage.common.resize import AntialiasedResize

__all__ = ["FaithfulExport", "exportable_transform"]

logger = logging.getLogger(__name__)

# What a network consists of, and what NNCF must see to quantise its convolutions.
_NETWORK_TYPES = {"Concat", "Constant", "Convolution", "Interpolate", "MaxPool", "Parameter", "Relu", "Result"}
_FIRST_LAYER = 11  # channels that a first convolution sees at most: image, two kinds of deviations, two maps
_FEW_IMAGES = 300  # NNCF's advice
_PILLOW = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}  # numbers by which torchvision knows them as well


class FaithfulExport(ExportMixin):
    """Exports that answer like ``Engine.predict``. Stands before ``AnomalibModule`` among a model's bases."""

    training: bool
    train: Callable[[bool], Any]

    def to_torch(self, *args: Any, **kwargs: Any) -> Path:
        """Export to torch as anomalib does, except that images are transformed as in training."""
        pre_processor = getattr(self, "pre_processor", None)
        if isinstance(pre_processor, PreProcessor):
            pre_processor.export_transform = pre_processor.transform
        return super().to_torch(*args, **kwargs)

    def to_onnx(
        self,
        export_root: Path | str,
        model_file_name: str = "model",
        input_size: tuple[int, int] | None = None,
        **kwargs: Any,
    ) -> Path:
        """Export to ONNX as anomalib does, which is also the first step to OpenVINO, with two exceptions.

        Images are resized as in training, and the opset is the lowest that holds the graph (18) unless told otherwise.

        Args:
            export_root: Folder below which the file goes.
            model_file_name: Name of the file, without suffix.
            input_size: Height and width of the images; by default any, as long as the pre-processor resizes to a
                given height and width.
            **kwargs: Arguments of ``torch.onnx.export``.

        Returns:
            The file.

        Raises:
            ValueError: If the pre-processor cannot be exported, or only for a given size and none is given.
        """
        pre_processor = getattr(self, "pre_processor", None)
        if isinstance(pre_processor, PreProcessor):
            pre_processor.export_transform = exportable_transform(pre_processor.transform, input_size)
        elif pre_processor is None:
            exportable_transform(None, input_size)
        kwargs.setdefault("opset_version", 18)
        trains = self.training
        try:
            return super().to_onnx(export_root, model_file_name, input_size, **kwargs)
        finally:
            self.train(trains)

    def _compress_ov_model(
        self,
        model: Any,
        compression_type: CompressionType | None = None,
        datamodule: AnomalibDataModule | None = None,
        metric: Metric | None = None,
        task: Any = None,
        max_drop: float = 0.01,
    ) -> Any:
        """Compress an OpenVINO model as anomalib does, but quantise nothing besides the two networks.

        anomalib calls NNCF without a way to hand over what is left alone.
        """
        model = model.clone()  # without the loose ends of the conversion, on which NNCF stumbles
        if compression_type not in (CompressionType.INT8_PTQ, CompressionType.INT8_ACQ):
            return super()._compress_ov_model(model, compression_type, datamodule, metric, task, max_drop)
        import nncf

        if datamodule is None:
            msg = f"Compression type {compression_type} calibrates with images: hand over a datamodule."
            raise ValueError(msg)
        if not 0 <= max_drop <= 1:
            msg = f"max_drop must be between 0 and 1, got {max_drop}."
            raise ValueError(msg)
        datamodule.setup("fit")
        shape = model.input(0).partial_shape
        if shape[0].is_static:
            datamodule.eval_batch_size = shape[0].get_length()
        loader = datamodule.val_dataloader()
        if len(loader.dataset) < _FEW_IMAGES:
            logger.warning("NNCF advises %d images for calibration, found %d.", _FEW_IMAGES, len(loader.dataset))
        calibration, scope = nncf.Dataset(loader, _image_of), _besides_networks(model)
        if compression_type == CompressionType.INT8_PTQ:
            return nncf.quantize(model, calibration, ignored_scope=scope)
        return nncf.quantize_with_accuracy_control(
            model,
            calibration,
            nncf.Dataset(datamodule.test_dataloader()),
            partial(_score, metric or F1Score(fields=["pred_label", "gt_label"])),
            max_drop=max_drop,
            ignored_scope=scope,
        )


def exportable_transform(transform: Transform | None, input_size: tuple[int, int] | None = None) -> Transform | None:
    """Make a transform exportable as anomalib does, except that the result is the same as before.

    Args:
        transform: Transform of a pre-processor. It is left as it is.
        input_size: Height and width of the images, or ``None`` if they may have any.

    Returns:
        A transform for the same images, or ``None`` for ``None``.

    Raises:
        ValueError: If no graph can hold the transform, or none for images of any size and ``input_size`` is ``None``.
    """
    size = None if input_size is None else (input_size[0], input_size[1])
    exportable = []
    for part in _parts(transform):
        before = size
        if size is not None:
            height, width = part(torch.zeros(1, 3, *size)).shape[-2:]
            size = height, width
        elif isinstance(part, Resize) and len(part.size or ()) == 2:
            size = part.size[0], part.size[1]
        if isinstance(part, Resize):
            exportable.append(_resize(part, size))
        elif isinstance(part, CenterCrop):
            if before is None:
                raise _size_needed(part)
            exportable.append(ExportableCenterCrop(part.size))
        else:
            exportable.append(part)
    if size is None:
        raise _size_needed(transform)
    return None if transform is None else Compose(exportable)


def _parts(transform: Transform | None) -> Iterable[Transform]:
    if isinstance(transform, Compose):
        for part in transform.transforms:
            yield from _parts(part)
    elif transform is not None:
        yield transform


def _resize(resize: Resize, size: tuple[int, int] | None) -> Transform:
    """The same resizing for a graph, to the height and width that it comes to."""
    if size is None:
        raise _size_needed(resize)
    mode = resize.interpolation
    mode = mode.value if isinstance(mode, InterpolationMode) else _PILLOW.get(mode, mode)
    if mode in ("nearest", "nearest-exact") or (mode in ("bilinear", "bicubic") and not resize.antialias):
        return Lambda(partial(functional.interpolate, size=size, mode=mode))
    if mode in ("bilinear", "bicubic"):
        return AntialiasedResize(size, mode)
    msg = f"Resizing with interpolation {mode!r} cannot be exported: train with bilinear or bicubic."
    raise ValueError(msg)


def _size_needed(transform: Transform | None) -> ValueError:
    what = "The model" if transform is None else type(transform).__name__
    return ValueError(
        f"{what} does not bring images of any size to one fixed size, so a graph has to know theirs: give input_size, "
        "their height and width in pixels (--input_size '[480, 640]' on the command line), or let the pre-processor "
        "resize to a height and a width first."
    )


def _image_of(batch: ImageBatch) -> torch.Tensor:
    assert isinstance(batch.image, torch.Tensor)
    return batch.image


def _besides_networks(model: Any) -> Any:
    """NNCF's ignored scope: all but the networks' convolutions, of these the first of each network, and a backbone.

    Args:
        model: OpenVINO model that is going to be quantised.
    """
    import nncf

    nodes = [node for graph in _graphs(model) for node in graph.get_ops()]
    types = sorted({node.get_type_name() for node in nodes} - _NETWORK_TYPES)
    convolutions = [node for node in nodes if node.get_type_name() == "Convolution"]
    first = {node.get_friendly_name() for node in convolutions if node.input_value(1).shape[1] <= _FIRST_LAYER}
    backbone = set().union(*map(_of_backbone, _graphs(model)))
    return nncf.IgnoredScope(names=sorted(first | backbone), types=types, validate=False)


def _graphs(model: Any) -> Iterator[Any]:
    """An OpenVINO model, and what runs in it only if something is so."""
    yield model
    for node in model.get_ops():
        if node.get_type_name() == "If":
            for branch in range(2):
                yield from _graphs(node.get_function(branch))


def _of_backbone(model: Any) -> set[str]:
    """Names of a backbone's convolutions: those before its features are compared with what is known of good images."""
    waiting = [node for node in model.get_ops() if node.get_type_name() == "MatMul" or _of_template(node)]
    seen: set[str] = set()
    names: set[str] = set()
    while waiting:
        node = waiting.pop()
        if node.get_friendly_name() in seen:
            continue
        seen.add(node.get_friendly_name())
        if node.get_type_name() == "Convolution":
            names.add(node.get_friendly_name())
        waiting += [value.get_node() for value in node.input_values()]
    return names


def _of_template(node: Any) -> bool:
    """Whether a node computes with what the template holds: a backbone's weights, their statistics, patches."""
    constants = (value.get_node() for value in node.input_values())
    return any(one.get_type_name() == "Constant" and "template." in one.get_friendly_name() for one in constants)


def _score(metric: Metric, model: Any, batches: Iterable[ImageBatch]) -> float:
    """What a metric says of a compiled OpenVINO model."""
    metric.reset()
    for batch in batches:
        answer = model(_image_of(batch))
        names = [next(iter(names)) for names in answer.names()]
        values = [torch.from_numpy(value) for value in answer.to_tuple()]
        shaped = [value.squeeze(1) if value.ndim == 4 else value.flatten() for value in values]
        fields = dict(zip(names, shaped, strict=True))
        metric.update(batch.update(**fields))
    return float(metric.compute())
