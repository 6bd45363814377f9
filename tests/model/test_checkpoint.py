# SPDX-License-Identifier: Apache-2.0
import errno
import json
import logging
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torchvision.transforms.v2 import Compose, Pad, Resize

from anomalib_twostage import TwoStageSuperpixel
from anomalib_twostage.model.checkpoint import VerifiedCheckpointIO, check_checkpoint
from tests.integration.conftest import SIZE, write_dataset

from .test_lightning_model import make_data, make_engine, make_model


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def sound(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint as the training writes it."""
    folder = tmp_path_factory.mktemp("trained")
    engine = make_engine(folder, max_steps=2, max_epochs=-1, limit_val_batches=0)
    engine.fit(make_model(), datamodule=make_data(dataset))
    (path,) = folder.rglob("*.ckpt")
    return path


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple:
        return Path.touch, (self.trace,)


def damage(kind: str, sound: Path, path: Path, trace: Path) -> None:
    whole = sound.read_bytes()
    middle = len(whole) // 2
    if kind == "empty":
        path.write_bytes(b"")
    elif kind == "half":
        path.write_bytes(whole[:middle])
    elif kind == "all but the last bytes":
        path.write_bytes(whole[:-30])
    elif kind == "one bit":
        path.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
    elif kind == "text":
        path.write_text("not a checkpoint")
    elif kind == "bare weights":
        torch.save(torch.load(sound, weights_only=True)["state_dict"], path)
    elif kind == "a list":
        torch.save([1, 2], path)
    elif kind == "code":
        torch.save({**torch.load(sound, weights_only=True), "extra": Payload(trace)}, path)
    elif kind == "code in the old format":
        content = {"state_dict": Payload(trace), "pytorch-lightning_version": "2.6.6"}
        torch.save(content, path, _use_new_zipfile_serialization=False)
    elif kind == "bare pickle":
        path.write_bytes(pickle.dumps(Payload(trace)))


DAMAGES = {
    "empty": (ValueError, "half-written"),
    "half": (ValueError, "half-written"),
    "all but the last bytes": (ValueError, "half-written"),
    "one bit": (ValueError, "damaged"),
    "text": (ValueError, "half-written or no checkpoint"),
    "bare weights": (ValueError, "no checkpoint of a training"),
    "a list": (ValueError, "no checkpoint of a training"),
    "missing": (FileNotFoundError, "does not exist"),
    "code": (pickle.UnpicklingError, "could run code"),
    "code in the old format": (ValueError, "half-written or no checkpoint"),
    "bare pickle": (ValueError, "half-written or no checkpoint"),
}


@pytest.mark.parametrize("kind", DAMAGES)
@pytest.mark.parametrize("environment", ["", "1"], ids=["", "code allowed"])
def test_a_bad_checkpoint_is_named_and_runs_no_code(
    kind: str, environment: str, sound: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Makes PyTorch load code wherever it is not told otherwise in so many words.
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", environment)
    path, trace = tmp_path / f"{kind}.ckpt", tmp_path / "executed"
    damage(kind, sound, path, trace)
    error, words = DAMAGES[kind]
    data = make_data(dataset)
    engine = make_engine(tmp_path / "results", max_steps=3, max_epochs=-1, limit_val_batches=0)
    for load in (
        lambda: TwoStageSuperpixel.load_from_checkpoint(path),
        lambda: engine.fit(make_model(), datamodule=data, ckpt_path=path),
        lambda: engine.validate(make_model(), datamodule=data, ckpt_path=path),
        lambda: engine.test(make_model(), datamodule=data, ckpt_path=path),
        lambda: engine.predict(make_model(), datamodule=data, ckpt_path=path),
        lambda: engine.export(make_model(), export_type="torch", ckpt_path=path),
    ):
        with pytest.raises(error, match=f"{path}.*{words}"):
            load()
    assert not trace.exists()


def test_a_checkpoint_cannot_name_a_function_to_build_the_model_with(sound: Path, tmp_path: Path) -> None:
    checkpoint = torch.load(sound, weights_only=True)
    checkpoint["hyper_parameters"]["_instantiator"] = "os.path.join"
    torch.save(checkpoint, tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match=r"os\.path\.join"):
        TwoStageSuperpixel.load_from_checkpoint(tmp_path / "a.ckpt")


def test_a_sound_checkpoint_passes(sound: Path) -> None:
    check_checkpoint(sound)
    check_checkpoint(str(sound))
    assert TwoStageSuperpixel.load_from_checkpoint(sound).variant == "small"


def test_a_kill_while_writing_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Killed(BaseException):
        pass

    def copy_and_die(source: str, target: str) -> None:
        """What a move to another file system does, killed half-way."""
        content = Path(source).read_bytes()
        Path(target).write_bytes(content[: len(content) // 2])
        raise Killed

    plugin, path = VerifiedCheckpointIO(TorchCheckpointIO()), tmp_path / "model.ckpt"
    old = {"pytorch-lightning_version": "2.6.6", "state_dict": {"a": torch.ones(1000)}}
    plugin.save_checkpoint(old, path)
    monkeypatch.setattr(shutil, "move", copy_and_die)
    with pytest.raises(Killed):
        plugin.save_checkpoint({**old, "state_dict": {"a": torch.zeros(1000)}}, path)
    assert torch.equal(plugin.load_checkpoint(path)["state_dict"]["a"], torch.ones(1000))
    monkeypatch.undo()
    plugin.save_checkpoint({**old, "state_dict": {"a": torch.zeros(1000)}}, path)
    assert torch.equal(plugin.load_checkpoint(path)["state_dict"]["a"], torch.zeros(1000))
    assert [file.name for file in tmp_path.iterdir()] == ["model.ckpt"]


def test_a_full_disk_is_an_error_that_keeps_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    plugin, path = VerifiedCheckpointIO(TorchCheckpointIO()), tmp_path / "model.ckpt"
    plugin.save_checkpoint({"pytorch-lightning_version": "2.6.6", "state_dict": {}}, path)
    before = path.read_bytes()
    monkeypatch.setattr(shutil, "move", refuse)
    with pytest.raises(OSError, match="No space left"):
        plugin.save_checkpoint({"pytorch-lightning_version": "2.6.6", "state_dict": {"a": torch.ones(9)}}, path)
    assert path.read_bytes() == before


def test_the_engine_gets_its_own_plugin_back(dataset: Path, tmp_path: Path) -> None:
    engine = make_engine(tmp_path, max_steps=2, max_epochs=-1, limit_val_batches=0)
    engine.fit(make_model(), datamodule=make_data(dataset))
    assert isinstance(engine.trainer.strategy.checkpoint_io, TorchCheckpointIO)


def test_an_unfinished_write_is_beside_the_checkpoint_and_no_checkpoint(sound: Path, tmp_path: Path) -> None:
    # `*.ckpt` must not find it.
    plugin = VerifiedCheckpointIO(TorchCheckpointIO())
    seen = []

    class Spy(TorchCheckpointIO):
        def save_checkpoint(self, checkpoint, path, storage_options=None) -> None:
            seen.append(Path(path))
            super().save_checkpoint(checkpoint, path, storage_options)

    plugin.checkpoint_io = Spy()
    plugin.save_checkpoint({"state_dict": {}}, tmp_path / "model.ckpt")
    (partial,) = seen
    assert partial.parent == tmp_path
    assert partial.suffix != ".ckpt"


SETTINGS = {"segment_size": 8, "compactness": 40.0, "smoothing": 0.5, "num_neighbors": 2}
OTHERS = {"segment_size": 16, "compactness": 2.0, "smoothing": 3.0, "num_neighbors": 1}


@pytest.fixture(scope="module")
def chosen(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[TwoStageSuperpixel, Path]:
    """A model with settings of its own, trained, and its checkpoint."""
    folder = tmp_path_factory.mktemp("chosen")
    model = make_model(**SETTINGS)
    engine = make_engine(folder, max_steps=2, max_epochs=-1, limit_val_batches=0)
    engine.fit(model, datamodule=make_data(dataset))
    engine.trainer.save_checkpoint(folder / "model.ckpt")
    return model.eval(), folder / "model.ckpt"


def load(way: str, path: Path, dataset: Path, folder: Path) -> TwoStageSuperpixel:
    """Load a checkpoint into a model with other settings."""
    if way == "load_from_checkpoint":
        return TwoStageSuperpixel.load_from_checkpoint(path, **OTHERS).eval()
    model = make_model(**OTHERS)
    if way == "load_state_dict":
        model.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
    else:
        engine = make_engine(folder, max_steps=2, max_epochs=-1)  # all of them done
        getattr(engine, way)(model, datamodule=make_data(dataset), ckpt_path=path)
    return model.eval()


@pytest.mark.parametrize("way", ["load_state_dict", "load_from_checkpoint", "fit", "validate", "test", "predict"])
def test_the_settings_come_with_the_weights(
    way: str,
    chosen: tuple[TwoStageSuperpixel, Path],
    dataset: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    trained, path = chosen
    model = load(way, path, dataset, tmp_path)
    images = torch.rand(2, 3, SIZE, SIZE)
    with torch.no_grad():
        expected, answer = trained.model(images), model.model(images)
    assert torch.equal(expected.anomaly_map, answer.anomaly_map)
    assert torch.equal(expected.pred_score, answer.pred_score)
    (message,) = {record.message for record in caplog.records if record.levelno == logging.WARNING}
    for name, value in SETTINGS.items():
        assert f"{name}={value} instead of {OTHERS[name]}" in message


def test_a_checkpoint_of_a_loaded_model_names_the_settings_that_hold(
    chosen: tuple[TwoStageSuperpixel, Path], dataset: Path, tmp_path: Path
) -> None:
    engine = make_engine(tmp_path, max_steps=3, max_epochs=-1, limit_val_batches=0)
    engine.fit(make_model(**OTHERS), datamodule=make_data(dataset), ckpt_path=chosen[1])
    engine.trainer.save_checkpoint(tmp_path / "again.ckpt")
    assert SETTINGS.items() <= torch.load(tmp_path / "again.ckpt", weights_only=True)["hyper_parameters"].items()


def test_nothing_is_said_where_the_settings_agree(
    chosen: tuple[TwoStageSuperpixel, Path], caplog: pytest.LogCaptureFixture
) -> None:
    TwoStageSuperpixel.load_from_checkpoint(chosen[1])
    assert not caplog.records


def earlier(path: Path, target: Path) -> Path:
    """A checkpoint as it was before the settings came with the weights."""
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["state_dict"]["model._extra_state"] = torch.tensor(2)
    checkpoint["hyper_parameters"] |= {**SETTINGS, "smoothing": None}
    torch.save(checkpoint, target)
    return target


def test_an_earlier_checkpoint_is_taken_by_what_it_was_made_with(
    chosen: tuple[TwoStageSuperpixel, Path], dataset: Path, tmp_path: Path
) -> None:
    model, path = make_model(**OTHERS), earlier(chosen[1], tmp_path / "earlier.ckpt")
    make_engine(tmp_path).predict(model, datamodule=make_data(dataset), ckpt_path=path)
    assert model.model.stage == 2
    assert {**SETTINGS, "smoothing": 2.0}.items() <= model.model.settings.items()


def test_weights_with_an_unknown_setting_are_refused() -> None:
    weights = make_model().model.state_dict()
    state = json.dumps({"stage": 1, "magic": 3}).encode()
    weights["_extra_state"] = torch.tensor(list(state), dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"magic.*update"):
        make_model().model.load_state_dict(weights)


@pytest.mark.parametrize("zoom", [1, 3])
def test_nothing_is_said_where_the_checkpoint_replaces_a_size_that_nobody_chose(
    zoom: int, caplog: pytest.LogCaptureFixture
) -> None:
    trained = TwoStageSuperpixel(zoom=zoom, pre_processor=PreProcessor(Resize((384, 576))))
    checkpoint = {"state_dict": trained.state_dict(), "hyper_parameters": {}}
    trained.on_save_checkpoint(checkpoint)
    model = TwoStageSuperpixel(zoom=zoom)
    model.on_load_checkpoint(checkpoint)
    assert model.input_size == (384, 576)
    assert not caplog.records


@pytest.mark.parametrize("component", ["pre_processor", "post_processor"])
def test_a_processor_that_the_checkpoint_replaces_is_named(
    component: str, chosen: tuple[TwoStageSuperpixel, Path], caplog: pytest.LogCaptureFixture
) -> None:
    own = {
        "pre_processor": PreProcessor(Resize((96, 96))),
        "post_processor": PostProcessor(image_sensitivity=0.9),
    }[component]
    model = TwoStageSuperpixel.load_from_checkpoint(chosen[1], **{component: own})
    assert model.input_size == (SIZE, SIZE)
    assert model.post_processor.image_sensitivity == 0.5
    (message,) = (record.message for record in caplog.records)
    assert component in message


def saved(model: TwoStageSuperpixel) -> dict[str, Any]:
    """What a checkpoint holds of a model, as far as loading looks at it."""
    checkpoint = {"state_dict": model.state_dict(), "hyper_parameters": dict(model.hparams)}
    model.on_save_checkpoint(checkpoint)
    return checkpoint


def test_a_pre_processor_that_cannot_be_saved_is_asked_for(caplog: pytest.LogCaptureFixture) -> None:
    def padded() -> PreProcessor:
        return PreProcessor(Compose([Pad(16), Resize((80, 80))]))

    checkpoint = saved(TwoStageSuperpixel("small", pre_processor=padded()))
    caplog.clear()
    model = TwoStageSuperpixel("small", pre_processor=padded())
    model.on_load_checkpoint(checkpoint)
    assert model.pre_processor.transform(torch.zeros(1, 3, 32, 64)).shape[-2:] == (80, 80)
    assert not caplog.records
    for own in (True, PreProcessor(Resize((64, 64)))):
        model = TwoStageSuperpixel("small", pre_processor=own)
        before = model.pre_processor.transform
        model.on_load_checkpoint(checkpoint)
        assert model.pre_processor.transform is before
        (message,) = (record.message for record in caplog.records)
        assert re.search(r"Pad.*could not be saved.*goes on with.*Resize", message, re.DOTALL)
        caplog.clear()
    model = TwoStageSuperpixel("small")
    model.on_load_checkpoint(saved(TwoStageSuperpixel("small", pre_processor=PreProcessor(None))))
    assert model.pre_processor.transform is None  # was chosen, and is taken over


def test_a_backbone_of_equal_shapes_and_other_features_is_refused() -> None:
    checkpoint = saved(TwoStageSuperpixel(backbone="efficientnet_lite0"))
    TwoStageSuperpixel(backbone="efficientnet_lite0").on_load_checkpoint(checkpoint)
    with pytest.raises(
        ValueError, match=r"backbone 'efficientnet_lite0', the model looks through 'tf_efficientnet_lite0'"
    ):
        TwoStageSuperpixel().on_load_checkpoint(checkpoint)
    own = saved(TwoStageSuperpixel())
    for name in ("weights/lite0.pth", "efficientnet_lite0_offline"):  # the same network by other names
        TwoStageSuperpixel(backbone=name).on_load_checkpoint(own)


def test_numbers_of_numpy_are_saved_as_pythons(tmp_path: Path) -> None:
    options = {"segment_size": np.int64(8), "compactness": np.float32(10), "smoothing": np.float32(0.5)}
    checkpoint = saved(TwoStageSuperpixel("small", learning_rate=np.float32(1e-3), **options))
    torch.save(checkpoint, tmp_path / "model.ckpt")
    checkpoint = torch.load(tmp_path / "model.ckpt", weights_only=True)
    assert checkpoint["hyper_parameters"]["learning_rate"] == pytest.approx(1e-3)
    model = TwoStageSuperpixel("small")
    model.load_state_dict(checkpoint["state_dict"])
    assert (model.model.slic.segment_size, model.model.smoothing) == (8, 0.5)


def test_testing_leaves_the_random_numbers_of_a_later_training_alone(
    chosen: tuple[TwoStageSuperpixel, Path], dataset: Path, tmp_path: Path
) -> None:
    class Seen(Callback):
        state: torch.Tensor

        def on_train_start(self, trainer, pl_module) -> None:
            self.state = torch.get_rng_state()

    def drawn(tested: bool) -> torch.Tensor:
        model, seen = make_model(**SETTINGS), Seen()
        if tested:
            make_engine(tmp_path).test(model, datamodule=make_data(dataset), ckpt_path=chosen[1])
        seed_everything(5)
        options = {"max_steps": 1, "max_epochs": -1, "limit_val_batches": 0}
        make_engine(tmp_path, callbacks=[seen], **options).fit(model, datamodule=make_data(dataset))
        return seen.state

    assert torch.equal(drawn(tested=True), drawn(tested=False))


@pytest.mark.integration
def test_the_command_refuses_code(sound: Path, dataset: Path, tmp_path: Path) -> None:
    path, trace = tmp_path / "code.ckpt", tmp_path / "executed"
    damage("code", sound, path, trace)
    command = [Path(sys.executable).with_name("anomalib"), "predict", "--model", "TwoStageSuperpixel"]
    command += ["--model.variant", "small", "--data", dataset / "plate/test/good", "--ckpt_path", path]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"}
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode != 0
    # The console folds long lines.
    assert "could run code" in " ".join((run.stdout + run.stderr).split())
    assert not trace.exists()
