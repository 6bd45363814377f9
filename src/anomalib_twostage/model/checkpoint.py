# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: whole or not there, checked before they are read, without code, and with all that goes on from them.

Lightning writes a checkpoint to the folder for temporary files and moves it; where that folder lies on another file
system, a move is a copy, and a killed process leaves half a file. Reading, PyTorch neither names the file that it
cannot read nor looks at its checksums, and an environment variable can make it run code from it.
"""

import inspect
import logging
import pickle
import re
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.plugins.io import CheckpointIO
from lightning.pytorch.trainer.states import TrainerFn

from anomalib_twostage.common.files import written_whole

from .backbone import network_name
from .torch_model import TwoStageSuperpixelModel, pack_state
from .variants import VARIANTS

__all__ = ["ResumableCheckpoints", "VerifiedCheckpointIO", "check_checkpoint"]

logger = logging.getLogger(__name__)

_RESUMED = ("global_step", "two_stage_random_state", "two_stage_switch")  # what a resumed run takes from a checkpoint
_UNSAVED = "two_stage_unsaved_transform"
_FIRST_WEIGHT = re.compile(r"model\.stage_one\.(encoder|blocks)\.\d+\.0\.weight")


class ResumableCheckpoints(LightningModule):
    """Checkpoints with all that goes on from them. Stands before ``AnomalibModule`` among a model's bases."""

    model: TwoStageSuperpixelModel
    variant: str
    default_size: tuple[int, int]
    _resumed: dict[str, Any] | None = None  # what the checkpoint of a run says of how to go on

    def save_hyperparameters(self, *args: Any, ignore: Any = None, frame: Any = None, **kwargs: Any) -> None:
        """Save the arguments as Lightning does, without the painter, which is no plain data."""
        frame = frame or inspect.currentframe().f_back  # type: ignore[union-attr]  # whose arguments they are
        super().save_hyperparameters(*args, ignore=[*(ignore or []), "painter"], frame=frame, **kwargs)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save with the weights what a resumed run needs to paint and learn as it would have done uninterrupted."""
        super().on_save_checkpoint(checkpoint)
        made = checkpoint["hyper_parameters"]
        made.update({k: v for k, v in self.model.settings.items() if k in self.hparams})
        made.update({k: v.item() for k, v in made.items() if isinstance(v, np.generic)})  # NumPy's are no plain values
        _keep_unsaved_transform(self, checkpoint)
        checkpoint["two_stage_random_state"] = _get_random_state(self.device)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that the checkpoint fits, and note how a resumed run goes on.

        Raises:
            ValueError: If the checkpoint is of another variant, width or backbone.
        """
        _name_replaced_processors(self, checkpoint)
        _name_unsaved_transform(self, checkpoint)
        super().on_load_checkpoint(checkpoint)
        _add_settings(checkpoint)
        _check_fit(checkpoint, self.state_dict(), self.variant)
        _check_backbone(checkpoint, self.model)
        if self._trainer is not None and self.trainer.state.fn is TrainerFn.FITTING:
            self._resumed = {name: checkpoint[name] for name in _RESUMED if name in checkpoint}

    def resume(self) -> int | None:
        """Go on where the checkpoint of a resumed run ended: with its random numbers, if it was one process.

        Returns:
            The step by which stage two had begun, ``None`` if it had not.
        """
        resumed, self._resumed = self._resumed or {}, None
        # One saved state would make every process of a distributed run paint alike.
        if self.trainer.world_size == 1 and "two_stage_random_state" in resumed:
            _set_random_state(resumed["two_stage_random_state"], self.device)
        return resumed.get("two_stage_switch", resumed.get("global_step")) if self.model.stage == 2 else None

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]  # anomalib's signature, with what is passed on left open
        cls, checkpoint_path: str | Path, *args: Any, **kwargs: Any
    ) -> Any:
        """Load a trained model. No code from the checkpoint runs, unless ``weights_only=False`` asks for it.

        Args:
            checkpoint_path: File of Lightning's checkpoint.
            args: As in anomalib.
            kwargs: As in anomalib; further arguments replace those that the model was made with, but for the settings
                that come with the weights, such as ``smoothing``: set those on the loaded model's ``model``.

        Returns:
            The model.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the file is half-written, damaged or no checkpoint, or of another variant than asked for.
            pickle.UnpicklingError: If the file holds other objects than weights and plain values.
        """
        if isinstance(checkpoint_path, str | Path) and not _is_remote(checkpoint_path):
            check_checkpoint(checkpoint_path)
        try:
            return super().load_from_checkpoint(checkpoint_path, *args, **kwargs)
        except pickle.UnpicklingError as error:
            raise _refused(checkpoint_path) from error


class VerifiedCheckpointIO(CheckpointIO):
    """Lightning plugin that writes checkpoints in one piece and reads only sound ones.

    Args:
        checkpoint_io: The plugin that does the work, with files of PyTorch's format.
    """

    def __init__(self, checkpoint_io: CheckpointIO) -> None:
        self.checkpoint_io = checkpoint_io

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, *args: Any, **kwargs: Any) -> None:
        """Write beside the file and rename, so that at any moment the old file or the new one is there, whole."""
        if _is_remote(path):
            self.checkpoint_io.save_checkpoint(checkpoint, path, *args, **kwargs)
            return
        with written_whole(path) as partial:
            self.checkpoint_io.save_checkpoint(checkpoint, partial, *args, **kwargs)

    def load_checkpoint(self, path: str | Path, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Read a checkpoint of weights and plain values.

        Args:
            path: File or URL.
            args: Passed on.
            kwargs: Passed on. Objects other than weights and plain values, which could run code, are refused whatever
                the environment says, unless ``weights_only=False`` asks for them.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the file is not a whole, undamaged checkpoint.
            pickle.UnpicklingError: If the file holds other objects.
        """
        if not _is_remote(path):
            check_checkpoint(path)
        if kwargs.get("weights_only") is None:
            kwargs["weights_only"] = True
        try:
            return self.checkpoint_io.load_checkpoint(path, *args, **kwargs)
        except pickle.UnpicklingError as error:
            raise _refused(path) from error

    def remove_checkpoint(self, path: str | Path) -> None:
        """Remove a checkpoint."""
        self.checkpoint_io.remove_checkpoint(path)

    def teardown(self) -> None:
        """Close whatever the plugin behind holds open."""
        self.checkpoint_io.teardown()


def check_checkpoint(path: str | Path) -> None:
    """See whether a file is a whole, undamaged Lightning checkpoint, without loading anything from it.

    Args:
        path: The file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is empty, half-written, damaged, or no checkpoint of a training.
    """
    path = Path(path)
    if not path.is_file():
        msg = f"The checkpoint {path} does not exist."
        raise FileNotFoundError(msg)
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
            content = b"".join(archive.read(name) for name in archive.namelist() if name.endswith("/data.pkl"))
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
        msg = f"The checkpoint {path} is empty, half-written or no checkpoint at all ({error}): take another one."
        raise ValueError(msg) from error
    if damaged is not None:
        msg = f"The checkpoint {path} is damaged (wrong checksum of {damaged}): take another one."
        raise ValueError(msg)
    if b"pytorch-lightning_version" not in content or b"state_dict" not in content:
        msg = (
            f"{path} is no checkpoint of a training (it may be an exported model, or bare weights): "
            "take the .ckpt file that the training wrote."
        )
        raise ValueError(msg)


def _check_fit(checkpoint: dict[str, Any], weights: dict[str, Any], variant: str) -> None:
    """See whether the networks of a checkpoint are those of a model.

    Args:
        checkpoint: The checkpoint.
        weights: The model's state dict.
        variant: The model's variant.

    Raises:
        ValueError: If they are of another variant or width.
    """
    saved = checkpoint["state_dict"]
    differing = [
        name
        for name, value in weights.items()
        if name.startswith("model.stage_") and (name not in saved or saved[name].shape != value.shape)
    ]
    if differing:
        widths = tuple(len(saved[name]) for name in sorted(saved) if _FIRST_WEIGHT.fullmatch(name))
        features = any(name.startswith("model.template.backbone.") for name in saved)
        trained = next(
            (
                name
                for name, shape in VARIANTS.items()
                if shape.features == features and shape.widths[: len(widths)] == widths
            ),
            "unknown",
        )
        memory = "model.template.memories." if features else "model.template."
        template = any(name.startswith(memory) for name in saved)
        msg = (
            f"The checkpoint does not fit variant {variant!r}: it is of variant {trained!r} with widths {widths} and "
            f"template={template}, and {len(differing)} weights differ. Build the model with the checkpoint's variant, "
            "backbone, gate, template, num_neighbors and zoom; if it is of an earlier version, train again."
        )
        raise ValueError(msg)


def _check_backbone(checkpoint: dict[str, Any], model: TwoStageSuperpixelModel) -> None:
    """See whether a checkpoint's features are those of a model. Networks with the same weights may pad differently.

    Raises:
        ValueError: If they are of another backbone.
    """
    own = getattr(model.template, "backbone", None)
    trained = checkpoint.get("hyper_parameters", {}).get("backbone")
    if own is not None and trained is not None and network_name(trained) != network_name(own.name):
        msg = (
            f"The checkpoint was trained with backbone {str(trained)!r}, the model looks through {own.name!r}: "
            "build it with the checkpoint's."
        )
        raise ValueError(msg)


def _add_settings(checkpoint: dict[str, Any]) -> None:
    """Give weights of a version that kept no settings with them those that the checkpoint's model was made with."""
    weights, made = checkpoint["state_dict"], checkpoint.get("hyper_parameters", {})
    stage = weights.get("model._extra_state")
    if stage is None or stage.ndim > 0:
        return
    names = ("gate", "smoothing", "segment_size", "compactness", "num_neighbors")
    settings = {name: made[name] for name in names if name in made}
    shape = VARIANTS.get(made.get("variant"))
    if shape is not None and settings.get("smoothing", 0) is None:
        settings["smoothing"] = shape.smoothing * made["segment_size"]
    settings = {name: value for name, value in settings.items() if value is not None}
    weights["model._extra_state"] = pack_state({"stage": int(stage), **settings})


def _name_replaced_processors(model: Any, checkpoint: dict[str, Any]) -> None:
    """Log which settings of a model's pre- and post-processor the checkpoint replaces, as anomalib lets it."""
    defaults = {
        "pre_processor": lambda: model.configure_pre_processor(model.default_size),
        "post_processor": model.configure_post_processor,
    }
    for name, make_default in defaults.items():
        own, saved = getattr(model, name), checkpoint.get(f"anomalib_{name}_config")
        if saved is None:
            continue
        if own is None:
            logger.warning("The checkpoint was trained with a %s; the model has none, and goes on without.", name)
        elif hasattr(own, "checkpoint_config"):
            default = make_default().checkpoint_config()
            for key, value in own.checkpoint_config().items():
                if key in saved and value not in (saved[key], default.get(key)):
                    logger.warning(
                        "The checkpoint's %s is taken over: %s=%s instead of %s.", name, key, saved[key], value
                    )


def _keep_unsaved_transform(model: Any, checkpoint: dict[str, Any]) -> None:
    """Note the pre-processor's transform where anomalib cannot save it and, loading, would put none in its place."""
    transform = getattr(model.pre_processor, "transform", None)
    config = checkpoint.get("anomalib_pre_processor_config")
    if transform is not None and config is not None and config.get("transform") is None:
        del checkpoint["anomalib_pre_processor_config"]
        checkpoint[_UNSAVED] = repr(transform)


def _name_unsaved_transform(model: Any, checkpoint: dict[str, Any]) -> None:
    """Log that a model's own transform stays where the checkpoint's could not be saved, and is another."""
    own = repr(getattr(model.pre_processor, "transform", None))
    if checkpoint.get(_UNSAVED, own) != own:
        logger.warning(
            "The pre-processor of the training, %s, could not be saved in the checkpoint: hand it over with the model, "
            "which goes on with %s.",
            *(checkpoint[_UNSAVED], own),
        )


def _get_random_state(device: torch.device) -> dict[str, torch.Tensor]:
    """The state of the random numbers that a training on a device draws."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def _set_random_state(state: dict[str, torch.Tensor], device: torch.device) -> None:
    """Continue the random numbers where ``_get_random_state`` saw them."""
    torch.set_rng_state(state["cpu"].cpu())
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)


def _refused(path: str | Path) -> pickle.UnpicklingError:
    """The error for a file that holds more than weights and plain values."""
    return pickle.UnpicklingError(
        f"The checkpoint {path} holds other objects than weights and plain values. Loading them could run code, so it "
        "was refused."
    )


def _is_remote(path: str | Path) -> bool:
    return "://" in str(path)
