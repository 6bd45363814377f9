# SPDX-License-Identifier: Apache-2.0
import copy
import gc
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import pytest
import torch
from anomalib import LearningType
from anomalib.data import ImageBatch, InferenceBatch
from anomalib.metrics import F1AdaptiveThreshold
from anomalib.models.components import AnomalibModule
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from lightning.pytorch import Callback, Trainer
from torch import nn
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import CenterCrop, Compose, Normalize, Resize

from anomalib_twostage import SuperpixelPostProcessor, slic
from tests.conftest import photograph, to_tensor

SIDE = 48
IMAGENET = Normalize(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])


class Inner(nn.Module):
    """Calls grainy deviation from mid-grey an anomaly."""

    def forward(self, images: torch.Tensor) -> torch.Tensor | InferenceBatch:
        anomaly_map = (images - 0.5).abs().mean(dim=1, keepdim=True)
        if self.training:
            return anomaly_map
        return InferenceBatch(pred_score=anomaly_map.mean(dim=(1, 2, 3)), anomaly_map=anomaly_map)


class Host(AnomalibModule):
    def __init__(self, pre_processor: Any = True, post_processor: Any = True) -> None:
        super().__init__(pre_processor, post_processor, evaluator=False, visualizer=False)
        self.model = Inner()

    def validation_step(self, batch: ImageBatch, *args: object) -> ImageBatch:
        return batch.update(**self.model(batch.image)._asdict())

    @property
    def trainer_arguments(self) -> dict[str, Any]:
        return {}

    @property
    def learning_type(self) -> LearningType:
        return LearningType.ONE_CLASS


def pictures(count: int = 3, side: int = SIDE) -> torch.Tensor:
    return torch.stack([to_tensor(photograph("astronaut", side, 60 * i, 100 + 20 * i)) for i in range(count)])


def snapped(images: torch.Tensor, maps: torch.Tensor, segment_size: int = 8) -> torch.Tensor:
    """Maps ``(B, 1, H, W)``, averaged over each superpixel by NumPy."""
    planes = []
    for labels, values in zip(slic(images, segment_size=segment_size).numpy(), maps.double().numpy(), strict=True):
        sums = np.bincount(labels.ravel(), values.ravel())
        planes.append((sums / np.bincount(labels.ravel()))[labels])
    return torch.from_numpy(np.stack(planes)).unsqueeze(1).float()


def refined(images: torch.Tensor, blend: float = 0.5) -> torch.Tensor:
    """What a host without pre-processor should answer."""
    raw = Inner().eval()(images).anomaly_map
    return (1 - blend) * raw + blend * snapped(images, raw)


def post_processor(**options: Any) -> SuperpixelPostProcessor:
    return SuperpixelPostProcessor(segment_size=8, **options)


class TestRefine:
    @pytest.mark.parametrize("blend", [0.25, 0.5, 1.0])
    def test_averages_over_superpixels(self, blend: float) -> None:
        images, maps = pictures(), torch.randn(3, 1, SIDE, SIDE)
        expected = (1 - blend) * maps + blend * snapped(images, maps)
        torch.testing.assert_close(post_processor(blend=blend).refine(images, maps), expected)

    def test_keeps_shape_and_dtype(self) -> None:
        images, maps = pictures(), torch.rand(3, 1, SIDE, SIDE)
        expected = post_processor().refine(images, maps)
        flat = post_processor().refine(images, maps.squeeze(1))
        half = post_processor().refine(images, maps.half())
        assert flat.shape == (3, SIDE, SIDE)
        torch.testing.assert_close(flat.unsqueeze(1), expected)
        assert half.dtype == torch.float16
        torch.testing.assert_close(half.float(), expected, atol=2e-3, rtol=0)

    def test_images_are_resized_to_smaller_maps(self) -> None:
        images = pictures(1, side=32).repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
        maps = torch.rand(1, 1, 32, 32)
        expected = (maps + snapped(pictures(1, side=32), maps)) / 2
        torch.testing.assert_close(post_processor().refine(images, maps), expected)

    def test_a_defect_gets_the_edges_of_the_image(self) -> None:
        image = torch.full((1, 3, SIDE, SIDE), 0.2)
        image[..., 16:32, 16:32] = 0.8
        blurred = torch.zeros(1, 1, SIDE, SIDE)
        blurred[..., 18:35, 13:30] = 1.0  # as large, but not where it should be
        truth = image[:, :1] > 0.5
        answer = post_processor(blend=1.0).refine(image, blurred) > 0.5
        overlap = [(mask & truth).sum() / (mask | truth).sum() for mask in (blurred > 0.5, answer)]
        assert overlap[0] < 0.6
        assert overlap[1] > 0.9

    @pytest.mark.parametrize("images", [pictures(1) * 255, IMAGENET(pictures(1)), pictures(1) * torch.nan])
    def test_refuses_images_out_of_range(self, images: torch.Tensor) -> None:
        with pytest.raises(ValueError, match=r"reads images in \[0, 1\], got values from"):
            post_processor().refine(images, torch.rand(1, 1, SIDE, SIDE))

    def test_an_empty_batch_has_an_empty_answer(self) -> None:
        assert post_processor().refine(pictures(1)[:0], torch.rand(0, 1, SIDE, SIDE)).shape == (0, 1, SIDE, SIDE)

    def test_refuses_superpixels_larger_than_the_image(self) -> None:
        with pytest.raises(ValueError, match="longer image side 8, got 16"):
            SuperpixelPostProcessor(16).refine(torch.rand(1, 3, 8, 8), torch.rand(1, 1, 8, 8))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"blend": 0.0}, "blend must be above 0 and at most 1, got 0.0"),
        ({"blend": 1.5}, "got 1.5"),
        ({"segment_size": 0}, "segment_size must be at least 1 pixel, got 0"),
        ({"compactness": 0.0}, "compactness must be .*, got 0.0"),
        ({"compactness": float("inf")}, "compactness must be .*, got inf"),
    ],
)
def test_settings_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SuperpixelPostProcessor(**options)


class TestForward:
    def test_refines_what_the_model_sees_now(self) -> None:
        model = Host(False, post_processor()).eval()
        first, second = pictures(1), pictures().flip(3)
        for images in (first, second, first):
            torch.testing.assert_close(model(images).anomaly_map, refined(images))

    def test_image_scores_stay_the_models_own(self) -> None:
        images = pictures()
        plain, model = Host(False).eval(), Host(False, post_processor()).eval()
        assert torch.equal(model(images).pred_score, plain(images).pred_score)

    @pytest.mark.parametrize(
        "container",
        [
            lambda *parts: Compose([*parts]),
            lambda *parts: Compose([Compose([*parts])]),
            nn.Sequential,
            lambda *parts: Compose([nn.Sequential(*parts)]),
        ],
        ids=["Compose", "Compose in Compose", "Sequential", "Sequential in Compose"],
    )
    @pytest.mark.parametrize("contrast", [1.0, 0.1])  # the second stays about in [0, 1] when normalised
    def test_sees_images_without_normalisation(self, container: Callable[..., Any], contrast: float) -> None:
        crop = [Resize((SIDE + 8, SIDE + 8), antialias=False), CenterCrop(SIDE)]
        transform = container(*crop, IMAGENET)
        model = Host(PreProcessor(transform), post_processor(blend=1.0)).eval()
        images = pictures(side=96) * contrast + 0.5 * (1 - contrast)
        raw = Inner().eval()(transform(images)).anomaly_map
        # Rounding in the normalisation and back moves a pixel between segments at most.
        difference = (model(images).anomaly_map - snapped(Compose(crop)(images), raw)).abs()
        assert (difference > 1e-4).float().mean() < 0.002

    def test_thresholds_the_refined_map(self) -> None:
        images = pictures()
        model = Host(False, post_processor(enable_normalization=False)).eval()
        model.post_processor._pixel_threshold.fill_(0.2)
        model.post_processor.pixel_sensitivity = 0.5
        model.post_processor.enable_normalization = False
        answer = model(images)
        threshold = model.post_processor.normalized_pixel_threshold
        assert torch.equal(answer.pred_mask, answer.anomaly_map > threshold)
        torch.testing.assert_close(answer.anomaly_map, refined(images))

    def test_the_post_processor_can_come_late_and_go(self) -> None:
        model, images = Host(False).eval(), pictures(1)
        plain = model(images).anomaly_map
        model.post_processor = post_processor()
        torch.testing.assert_close(model(images).anomaly_map, refined(images))
        model.post_processor = post_processor(blend=1.0)
        torch.testing.assert_close(model(images).anomaly_map, refined(images, blend=1.0))
        model.model = Inner().eval()
        torch.testing.assert_close(model(images).anomaly_map, refined(images, blend=1.0))
        model.post_processor = PostProcessor()
        assert torch.equal(model(images).anomaly_map, plain)
        model.post_processor = None
        assert type(model(images)) is InferenceBatch

    def test_copies_and_pickles_are_independent(self) -> None:
        model, images = Host(False, post_processor()).eval(), pictures(1)
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        for twin in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
            twin.post_processor.blend = 1.0
            torch.testing.assert_close(twin(images).anomaly_map, refined(images, blend=1.0))
        torch.testing.assert_close(model(images).anomaly_map, refined(images))

    def test_a_copy_serves_another_model(self) -> None:
        first, images = Host(False, post_processor()), pictures(1)
        second = Host(False, copy.deepcopy(first.post_processor)).eval()
        third = Host(False, first.post_processor).eval()
        torch.testing.assert_close(second(images).anomaly_map, refined(images))
        torch.testing.assert_close(third(images).anomaly_map, refined(images))

    def test_it_looks_out_for_models_only_while_it_lives(self) -> None:
        def watchers() -> int:
            hooks = torch.nn.modules.module._global_module_registration_hooks.values()
            return [hook.__module__ for hook in hooks].count(SuperpixelPostProcessor.__module__)

        gc.collect()
        before = watchers()  # those of other tests, whose models fixtures or compilers may still hold
        model = Host(False, post_processor())
        assert watchers() == before + 1
        del model
        gc.collect()
        assert watchers() == before

    def test_training_sees_the_models_own_output(self) -> None:
        model, images = Host(False, post_processor()).train(), pictures()
        assert torch.equal(model.model(images), Inner()(images))

    def test_predictions_without_image_are_refused(self) -> None:
        with pytest.raises(RuntimeError, match=r"needs the image, .* as `post_processor`"):
            post_processor()(InferenceBatch(anomaly_map=torch.rand(1, 1, SIDE, SIDE)))

    def test_models_without_map_are_refused(self) -> None:
        class Scores(nn.Module):
            def forward(self, images: torch.Tensor) -> InferenceBatch:
                return InferenceBatch(pred_score=images.mean(dim=(1, 2, 3)))

        model = Host(False, post_processor()).eval()
        model.model = Scores()
        with pytest.raises(ValueError, match="this model predicts none"):
            model(pictures())

    def test_host_has_the_same_weights(self) -> None:
        assert Host(False).state_dict().keys() == Host(False, post_processor()).state_dict().keys()


def batches(masks: bool = True) -> list[ImageBatch]:
    """Two batches; the defect is what is brighter than 0.7."""
    images = pictures(4)
    truth = (images.mean(dim=1) > 0.7).to(torch.uint8)
    truth[0] = 0
    return [
        ImageBatch(
            image=images[i : i + 2],
            gt_mask=truth[i : i + 2] if masks else None,
            gt_label=truth[i : i + 2].flatten(1).any(dim=1) if masks else None,
        )
        for i in (0, 2)
    ]


class Recorder(Callback):
    """Keeps what the model answered, which the post-processor then changes in place."""

    def __init__(self) -> None:
        self.batches: list[ImageBatch] = []

    def on_test_batch_end(self, trainer: Trainer, model: Host, outputs: ImageBatch, *args: object) -> None:
        self.batches.append(outputs)

    on_predict_batch_end = on_test_batch_end


def trainer(folder: Path, *callbacks: Callback) -> Trainer:
    return Trainer(
        callbacks=list(callbacks),
        accelerator="cpu",
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )


def validated(folder: Path, **options: Any) -> Host:
    model = Host(PreProcessor(Compose([Resize((SIDE, SIDE)), IMAGENET])), post_processor(**options))
    trainer(folder).validate(model, DataLoader(batches(), batch_size=None), verbose=False)
    return model


@pytest.mark.filterwarnings("ignore::UserWarning")
class TestTrainer:
    def test_statistics_are_those_of_refined_maps(self, tmp_path: Path) -> None:
        model = Host(False, post_processor())
        trainer(tmp_path).validate(model, DataLoader(batches(), batch_size=None), verbose=False)
        metric = F1AdaptiveThreshold(fields=["anomaly_map", "gt_mask"])
        maps = [refined(batch.image) for batch in batches()]
        for batch, anomaly_map in zip(batches(), maps, strict=True):
            metric.update(batch.update(anomaly_map=anomaly_map))
        torch.testing.assert_close(model.post_processor.pixel_threshold, metric.compute(), atol=1e-5, rtol=0)
        torch.testing.assert_close(model.post_processor.pixel_max, torch.cat(maps).max())
        torch.testing.assert_close(model.post_processor.pixel_min, torch.cat(maps).min())

    @pytest.mark.parametrize("stage", ["test", "predict"])
    def test_answers_as_forward_does(self, stage: str, tmp_path: Path) -> None:
        model, recorder = validated(tmp_path), Recorder()
        getattr(trainer(tmp_path, recorder), stage)(model, DataLoader(batches(), batch_size=None))
        for batch, original in zip(recorder.batches, batches(), strict=True):
            with torch.no_grad():
                answer = model.eval()(original.image)
            torch.testing.assert_close(batch.anomaly_map, answer.anomaly_map.squeeze(1))
            assert torch.equal(batch.pred_mask, answer.pred_mask.squeeze(1))
            torch.testing.assert_close(batch.pred_score, answer.pred_score)

    def test_models_without_map_are_refused(self, tmp_path: Path) -> None:
        class Scorer(Host):
            def validation_step(self, batch: ImageBatch, *args: object) -> ImageBatch:
                return batch.update(pred_score=batch.image.mean(dim=(1, 2, 3)))

        with pytest.raises(ValueError, match="this model predicts none"):
            trainer(tmp_path).validate(Scorer(False, post_processor()), DataLoader(batches(), batch_size=None))


@pytest.mark.filterwarnings("ignore::UserWarning")
class TestCheckpoint:
    def test_brings_the_post_processor_back(self, tmp_path: Path) -> None:
        model = validated(tmp_path, blend=0.75, compactness=5.0, pixel_sensitivity=0.6)
        model.trainer.save_checkpoint(tmp_path / "model.ckpt")
        loaded = Host.load_from_checkpoint(tmp_path / "model.ckpt").eval()
        settings = loaded.post_processor.checkpoint_config()
        assert isinstance(loaded.post_processor, SuperpixelPostProcessor)
        assert settings == model.post_processor.checkpoint_config()
        assert (settings["segment_size"], settings["compactness"], settings["blend"]) == (8, 5.0, 0.75)
        images = pictures()
        with torch.no_grad():
            for one, other in zip(loaded(images), model.eval()(images), strict=True):
                assert torch.equal(one, other)

    def test_weights_fit_without_it(self, tmp_path: Path) -> None:
        model = validated(tmp_path)
        model.trainer.save_checkpoint(tmp_path / "model.ckpt")
        plain = Host.load_from_checkpoint(tmp_path / "model.ckpt", post_processor=True).eval()
        assert type(plain.post_processor) is PostProcessor
        assert torch.equal(plain.post_processor.pixel_threshold, model.post_processor.pixel_threshold)

    def test_thresholds_of_unrefined_maps_are_reported(self, tmp_path: Path) -> None:
        model = Host(False)
        run = trainer(tmp_path)
        run.validate(model, DataLoader(batches(), batch_size=None), verbose=False)
        run.save_checkpoint(tmp_path / "plain.ckpt")
        with pytest.warns(UserWarning, match=r"saved without SuperpixelPostProcessor: .*Engine.validate"):
            loaded = Host.load_from_checkpoint(tmp_path / "plain.ckpt", post_processor=post_processor(blend=0.75))
        assert loaded.post_processor.blend == 0.75

    def test_settings_out_of_range_are_refused(self) -> None:
        with pytest.raises(ValueError, match="blend must be above 0 and at most 1, got 7"):
            post_processor().load_checkpoint_config({"blend": 7})


@pytest.mark.filterwarnings("ignore")
def test_exported_model_refines_what_it_is_given(tmp_path: Path) -> None:
    model = validated(tmp_path).eval()
    path = model.to_onnx(tmp_path, opset_version=18)
    # OpenVINO computes in bfloat16 where the processor can, and that moves pixels between superpixels.
    exported = openvino.Core().compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    for images in (pictures(3), pictures(2).flip(2)):
        answer = exported(images.numpy())
        with torch.no_grad():
            expected = model(images)
        # Where a pixel is as near to two centres, rounding decides.
        difference = (torch.from_numpy(answer["anomaly_map"]) - expected.anomaly_map).abs()
        assert (difference > 1e-4).float().mean() < 0.002
        torch.testing.assert_close(torch.from_numpy(answer["pred_score"]), expected.pred_score)
