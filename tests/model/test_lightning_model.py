# SPDX-License-Identifier: Apache-2.0
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from anomalib import LearningType
from anomalib.data import ImageBatch, MVTecAD, PredictDataset
from anomalib.engine import Engine
from anomalib.models import Padim
from anomalib.pre_processing import PreProcessor
from lightning.pytorch import Callback, seed_everything
from PIL import Image
from torchvision.transforms.v2 import Compose, Normalize, Resize

from anomalib_twostage import InspectionPage, TwoStageSuperpixel
from tests.integration.conftest import SIZE, write_dataset

BATCHES = 3  # 6 images in batches of 2


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data"))


def make_data(dataset: Path, **options: Any) -> MVTecAD:
    return MVTecAD(root=dataset, category="plate", train_batch_size=2, eval_batch_size=3, num_workers=0, **options)


def make_model(size: int = SIZE, **options: Any) -> TwoStageSuperpixel:
    options = {"variant": "small", "segment_size": 8, "visualizer": False, **options}
    return TwoStageSuperpixel(pre_processor=TwoStageSuperpixel.configure_pre_processor((size, size)), **options)


def make_engine(folder: Path, **options: Any) -> Engine:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return Engine(default_root_dir=folder, **quiet, **options)


class Recorder(Callback):
    """Notes the stage of every optimiser step."""

    def __init__(self) -> None:
        self.stages: list[int] = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        self.stages.append(pl_module.model.stage)


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        ({"max_epochs": 4}, [1] * 6 + [2] * 6),
        ({"max_steps": 8, "max_epochs": -1}, [1] * 4 + [2] * 4),
        ({"max_epochs": 2, "limit_train_batches": 2}, [1] * 2 + [2] * 2),
        ({"max_epochs": 4, "accumulate_grad_batches": 3}, [1] * 2 + [2] * 2),
        ({"max_epochs": 2, "limit_train_batches": 1}, [1, 2]),
    ],
)
def test_stages_share_the_real_budget(budget: dict, expected: list[int], dataset: Path, tmp_path: Path) -> None:
    recorder = Recorder()
    engine = make_engine(tmp_path, callbacks=[recorder], limit_val_batches=0, **budget)
    engine.fit(make_model(stage_one_fraction=0.5), datamodule=make_data(dataset))
    assert recorder.stages == expected


def test_a_run_without_end_is_refused(dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no end.*max_epochs \(now -1\)"):
        make_engine(tmp_path, max_epochs=-1).fit(make_model(), datamodule=make_data(dataset))


def test_stage_one_is_frozen_while_stage_two_learns(dataset: Path, tmp_path: Path) -> None:
    class Snapshot(Callback):
        before: dict[str, torch.Tensor]

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
            if pl_module.model.stage == 2 and not hasattr(self, "before"):
                self.before = {name: value.clone() for name, value in pl_module.model.named_parameters()}
                self.before |= {name: value.clone() for name, value in pl_module.model.named_buffers()}

    snapshot, model = Snapshot(), make_model(stage_one_fraction=0.5)
    make_engine(tmp_path, callbacks=[snapshot], max_epochs=4).fit(model, datamodule=make_data(dataset))
    after = dict(model.model.named_parameters()) | dict(model.model.named_buffers())
    changed = {name for name, value in snapshot.before.items() if not torch.equal(value, after[name])}
    assert changed
    assert all(name.startswith("stage_two.") for name in changed)
    assert {name for name, _ in model.model.stage_two.named_parameters("stage_two")} <= changed


@pytest.mark.parametrize("interrupted_after", [1, 3])
def test_a_resumed_run_ends_bit_for_bit_like_an_uninterrupted_one(
    interrupted_after: int, dataset: Path, tmp_path: Path
) -> None:
    class Interruption(Callback):
        def on_train_epoch_end(self, trainer, pl_module) -> None:
            if trainer.current_epoch + 1 == interrupted_after:
                trainer.save_checkpoint(tmp_path / "interrupted.ckpt")

    def run(**options: Any) -> TwoStageSuperpixel:
        seed_everything(0)
        model = make_model(stage_one_fraction=0.5)
        if options:
            torch.rand(7)  # the second process need not have drawn the same numbers so far
        engine = make_engine(tmp_path, callbacks=[Interruption()], max_epochs=4, limit_val_batches=0)
        engine.fit(model, datamodule=make_data(dataset), **options)
        return model

    whole, resumed = run(), run(ckpt_path=tmp_path / "interrupted.ckpt")
    assert resumed.model.stage == 2
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name


def test_a_new_training_takes_a_new_template(dataset: Path, tmp_path: Path) -> None:
    model = make_model()
    model.model.template.fit(torch.ones(2, 3, SIZE, SIZE))
    make_engine(tmp_path, max_steps=2, limit_val_batches=0).fit(model, datamodule=make_data(dataset))
    assert model.model.template.mean.mean() < 0.9


@pytest.mark.parametrize(
    ("options", "has_one"),
    [({"variant": "scratch"}, True), ({"variant": "scratch", "template": False}, False), ({"variant": "paper"}, False)],
)
def test_the_template_is_the_variants_unless_chosen(options: dict, has_one: bool) -> None:
    assert (TwoStageSuperpixel(**options).model.template is not None) == has_one


@pytest.mark.parametrize(("variant", "own"), [("default", 1.0), ("scratch", 4.0), ("small", 4.0), ("paper", 0.0)])
def test_the_smoothing_is_the_variants_unless_chosen(variant: str, own: float) -> None:
    assert TwoStageSuperpixel(variant).model.smoothing == own
    assert TwoStageSuperpixel(variant, smoothing=2.5).model.smoothing == 2.5


@pytest.mark.parametrize(("variant", "own"), [("small", "average"), ("paper", "hard")])
def test_the_gate_is_the_variants_unless_chosen(variant: str, own: str) -> None:
    assert make_model(variant=variant).model.gate == own
    for gate in ("hard", "average"):
        model = make_model(variant=variant, gate=gate).model
        assert model.gate == gate
        model.start_stage_two()
        assert model.eval()(torch.rand(1, 3, SIZE, SIZE)).anomaly_map.shape == (1, 1, SIZE, SIZE)


def test_a_texture_folder_is_needed_for_training_only(dataset: Path, tmp_path: Path) -> None:
    model = make_model(texture_dir=str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        make_engine(tmp_path, max_epochs=1).fit(model, datamodule=make_data(dataset))
    results = make_engine(tmp_path).test(model, datamodule=make_data(dataset))
    assert 0 <= results[0]["image_AUROC"] <= 1


def test_learning_rate_rises_and_falls_once_per_stage(dataset: Path, tmp_path: Path) -> None:
    class Rates(Callback):
        def __init__(self) -> None:
            self.rates: list[float] = []

        def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
            self.rates.append(optimizer.param_groups[0]["lr"])

    rates = Rates()
    model = make_model(stage_one_fraction=0.5, learning_rate=0.01)
    engine = make_engine(tmp_path, callbacks=[rates], max_epochs=14, limit_val_batches=0)
    engine.fit(model, datamodule=make_data(dataset))
    first, second = np.array(rates.rates[:21]), np.array(rates.rates[21:])
    for stage in (first, second):
        assert stage.max() == pytest.approx(0.01, rel=0.05)
        assert stage[-1] < 0.0005
        assert (np.diff(stage[stage.argmax() :]) < 0).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variant": "huge"}, "variant.*'huge'"),
        ({"loss": "l1"}, "loss.*'l1'"),
        ({"gate": "soft"}, "gate.*'soft'"),
        ({"paint": "oil"}, "paint.*'oil'"),
        ({"segment_size": 0}, "segment_size.*0"),
        ({"segment_size": SIZE + 1}, f"segment_size.*{SIZE + 1}"),
        ({"compactness": 0.0}, "compactness.*0"),
        ({"stage_one_fraction": 1.0}, "stage_one_fraction.*1.0"),
        ({"stage_one_fraction": 0.0}, "stage_one_fraction.*0.0"),
        ({"paint_probability": 1.2}, "paint_probability.*1.2"),
        ({"learning_rate": 0.0}, "learning_rate.*0.0"),
        ({"learning_rate": float("inf")}, "learning_rate.*inf"),
        ({"smoothing": float("inf")}, "smoothing.*inf"),
        ({"compactness": float("inf")}, "compactness.*inf"),
        ({"size": 32}, "32 x 32.*at least 64"),
    ],
)
def test_arguments_out_of_range_are_named_at_once(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_model(**options)


def test_normalisation_in_the_pre_processor_is_refused_before_training(dataset: Path, tmp_path: Path) -> None:
    transform = Compose([Resize((SIZE, SIZE)), Normalize([0.5] * 3, [0.5] * 3)])
    model = TwoStageSuperpixel(variant="small", pre_processor=PreProcessor(transform))
    with pytest.raises(ValueError, match="Normalize"):
        make_engine(tmp_path, max_epochs=1).fit(model, datamodule=make_data(dataset))


def test_a_checkpoint_of_another_variant_is_refused_by_name(dataset: Path, tmp_path: Path) -> None:
    engine = make_engine(tmp_path, max_steps=1, max_epochs=-1, limit_val_batches=0)
    engine.fit(make_model(), datamodule=make_data(dataset))
    engine.trainer.save_checkpoint(tmp_path / "small.ckpt")
    with pytest.raises(ValueError, match=r"'default'.*'small'"):
        TwoStageSuperpixel.load_from_checkpoint(tmp_path / "small.ckpt", variant="default")
    with pytest.raises(ValueError, match="template=True"):
        TwoStageSuperpixel.load_from_checkpoint(tmp_path / "small.ckpt", template=False)
    assert TwoStageSuperpixel.load_from_checkpoint(tmp_path / "small.ckpt").variant == "small"


def test_a_checkpoint_cannot_run_code(dataset: Path, tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple:
            return Path.touch, (tmp_path / "executed",)

    content = {"state_dict": {}, "pytorch-lightning_version": "2.6.6", "hyper_parameters": Payload()}
    torch.save(content, tmp_path / "evil.ckpt")
    with pytest.raises(pickle.UnpicklingError):
        TwoStageSuperpixel.load_from_checkpoint(tmp_path / "evil.ckpt")
    with pytest.raises(pickle.UnpicklingError):
        make_engine(tmp_path).test(make_model(), datamodule=make_data(dataset), ckpt_path=tmp_path / "evil.ckpt")
    assert not (tmp_path / "executed").exists()


@pytest.fixture
def grey_levels() -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (SIZE, SIZE), dtype=np.uint8)


def test_greyscale_and_rgba_files_are_read_like_rgb(grey_levels: np.ndarray, tmp_path: Path) -> None:
    rgb = np.dstack([grey_levels] * 3)
    Image.fromarray(rgb).save(tmp_path / "a.png")
    Image.fromarray(grey_levels).save(tmp_path / "b.png")
    Image.fromarray(np.dstack([rgb, np.full_like(grey_levels, 255)])).save(tmp_path / "c.png")
    predictions = make_engine(tmp_path).predict(make_model(), dataset=PredictDataset(tmp_path))
    maps = [prediction.anomaly_map for prediction in predictions]
    torch.testing.assert_close(maps[1], maps[0])
    torch.testing.assert_close(maps[2], maps[0])


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"not an image")
    with pytest.raises(OSError, match=r"broken\.png"):
        make_engine(tmp_path).predict(make_model(), dataset=PredictDataset(tmp_path))


@pytest.mark.parametrize("empty", [True, False])
def test_empty_and_missing_data_folders_are_named(empty: bool, tmp_path: Path) -> None:
    folder = tmp_path / "parts"
    if empty:
        folder.mkdir()
    with pytest.raises((ValueError, FileNotFoundError, RuntimeError), match="parts"):
        PredictDataset(folder)


def test_maps_and_scores_keep_their_ranking_through_the_post_processor(dataset: Path, tmp_path: Path) -> None:
    model = make_model()
    engine = make_engine(tmp_path, max_epochs=1)
    engine.fit(model, datamodule=make_data(dataset))
    batches = engine.predict(model, datamodule=make_data(dataset))
    predicted = ImageBatch.collate([item for batch in batches for item in batch])
    assert predicted.anomaly_map.dtype == torch.float32
    for values in (predicted.anomaly_map, predicted.pred_score):
        assert values.min() >= 0
        assert values.max() <= 1
    model.eval()
    with torch.no_grad():
        raw = torch.cat([model.model(batch.image).anomaly_map for batch in batches]).flatten()
    shown = predicted.anomaly_map.flatten()
    order = raw.argsort()
    assert (shown[order].diff() >= 0).all()


def test_maps_of_the_stages_are_kept_only_while_somebody_draws_them(dataset: Path, tmp_path: Path) -> None:
    class Witness(Callback):
        def __init__(self) -> None:
            self.kept: list[bool] = []

        def on_validation_batch_end(self, trainer, pl_module, *args) -> None:
            self.kept.append(pl_module.last_stages is not None)

        on_test_batch_end = on_predict_batch_end = on_validation_batch_end

    def kept(method: str, **options: Any) -> set[bool]:
        witness, data = Witness(), make_data(dataset)
        engine = make_engine(tmp_path, callbacks=[witness, *options.pop("callbacks", [])])
        getattr(engine, method)(options.pop("model", model), datamodule=data, **options)
        return set(witness.kept)

    model = make_model()
    for method in ("validate", "test", "predict"):
        assert kept(method) == {False}
    assert kept("predict", callbacks=[InspectionPage()]) == {True}
    assert kept("predict") == {False}  # the page was another run's
    assert kept("predict", model=make_model(visualizer=True)) == {True}


@pytest.mark.parametrize("variant", ["small", "default"])
def test_a_compiled_model_is_trained_and_validated_alike(variant: str, dataset: Path, tmp_path: Path) -> None:
    def run(*, compiled: bool) -> tuple[dict[str, torch.Tensor], Any]:
        seed_everything(0)
        # AdamW's first step is as long for a gradient next to zero, which rounds differently: so short steps.
        model = make_model(variant=variant, learning_rate=2e-4)
        engine = make_engine(tmp_path, max_steps=1, limit_val_batches=1)
        # Inductor's kernels are another project's business, and take a minute.
        engine.fit(torch.compile(model, backend="aot_eager") if compiled else model, datamodule=make_data(dataset))
        return model.state_dict(), engine.trainer.callback_metrics["train_loss"]

    torch._dynamo.reset()
    (plain, loss), (compiled, compiled_loss) = run(compiled=False), run(compiled=True)
    torch.testing.assert_close(compiled_loss, loss)
    for name, value in plain.items():
        torch.testing.assert_close(compiled[name], value, equal_nan=True, msg=lambda text, name=name: f"{name}: {text}")


def test_it_is_a_one_class_model_with_anomalibs_defaults() -> None:
    model = TwoStageSuperpixel()
    assert model.learning_type is LearningType.ONE_CLASS
    assert model.input_size == (256, 256)
    # Another set of metrics than the built-in models' would break `anomalib benchmark`, whose table has one header.
    assert [metric.name for metric in model.evaluator.test_metrics] == [
        metric.name for metric in Padim(pre_trained=False).evaluator.test_metrics
    ]
    assert "max_epochs" not in model.trainer_arguments
