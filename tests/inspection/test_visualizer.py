# SPDX-License-Identifier: Apache-2.0
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
import torch
from anomalib.cli import AnomalibCLI
from anomalib.data import ImageBatch, MVTecAD, PredictDataset
from anomalib.engine import Engine
from anomalib.loggers import AnomalibMLFlowLogger, AnomalibTensorBoardLogger
from anomalib.loggers.base import ImageLoggerBase
from anomalib.models import Padim
from anomalib.pre_processing import PreProcessor
from anomalib.visualization import ImageVisualizer
from lightning.pytorch import seed_everything
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from PIL import Image
from scipy import ndimage
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import CenterCrop, Compose, Lambda, Resize

from anomalib_twostage import StageVisualizer, TwoStageSuperpixel
from anomalib_twostage.inspection import visualizer
from anomalib_twostage.inspection.visualizer import heat_panel, image_panel, mask_panel, picture_grid
from anomalib_twostage.model.torch_model import StageMaps
from tests.integration.conftest import SIZE, write_dataset

TITLES = ["image", "ground truth", "stage one", "superpixels", "refined image", "final map"]


def make_stages(batch: int = 2) -> StageMaps:
    """Random stages; the superpixels are squares of 16 pixels."""
    maps = [torch.rand(batch, 1, SIZE, SIZE) for _ in range(5)]
    cell = torch.arange(SIZE) // 16
    labels = (cell.unsqueeze(1) * 4 + cell).expand(batch, -1, -1)
    return StageMaps(
        stage_one_logits=maps[0],
        stage_one_map=maps[1],
        labels=labels,
        pooled_map=maps[2],
        selected=torch.ones(batch, 1, SIZE, SIZE),
        refined_image=torch.rand(batch, 3, SIZE, SIZE),
        stage_two_logits=None,
        fused_map=maps[3],
        anomaly_map=maps[4],
    )


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[dict[str, np.ndarray]], str]]:
    """Panels by title, per row, and caption of every picture that is laid out."""
    pictures = []
    original = visualizer.picture_grid

    def record(rows: list, titles: list[str], caption: str = "", **options: Any) -> Image.Image:
        pictures.append(
            ([dict(zip(titles, map(np.asarray, row), strict=True)) for row in rows], caption),
        )
        return original(rows, titles, caption, **options)

    monkeypatch.setattr(visualizer, "picture_grid", record)
    return pictures


def heat(values: torch.Tensor) -> np.ndarray:
    return mpl.colormaps["inferno"](values.numpy(), bytes=True)[..., :3]


def to_bytes(image: torch.Tensor) -> np.ndarray:
    return (image.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)


class TestVisualize:
    def test_every_panel_shows_its_stage(self, drawn: list) -> None:
        stages = make_stages()
        square = torch.zeros(2, SIZE, SIZE, dtype=torch.bool)
        square[1, 20:40, 8:24] = True
        batch = ImageBatch(
            image=torch.rand(2, 3, SIZE, SIZE),
            gt_mask=square.roll(5, dims=2),
            anomaly_map=torch.rand(2, SIZE, SIZE),
            pred_mask=square,
        )
        pictures = StageVisualizer(panel_size=SIZE).visualize(batch, stages)
        assert len(pictures) == len(drawn) == 2
        (panels,), _ = drawn[1]
        assert list(panels) == TITLES
        np.testing.assert_array_equal(panels["image"], to_bytes(batch.image[1]))
        np.testing.assert_array_equal(panels["ground truth"][..., 0], batch.gt_mask[1].numpy() * 255)
        np.testing.assert_array_equal(panels["stage one"], heat(stages.stage_one_map[1, 0]))
        np.testing.assert_array_equal(panels["refined image"], to_bytes(stages.refined_image[1]))

        bordered = (panels["superpixels"] != panels["image"]).any(axis=2)
        expected = np.zeros((SIZE, SIZE), dtype=bool)
        for edge in (16, 32, 48):
            expected[edge - 1 : edge + 1] = expected[:, edge - 1 : edge + 1] = True
        # Each border is a line between two segments, on either side of it.
        assert not (bordered & ~expected).any()
        assert all((bordered[edge - 1] | bordered[edge]).all() for edge in (16, 32, 48))

        # The reported map, not the raw one, and around its mask a line that leaves the inside alone.
        changed = (panels["final map"] != heat(batch.anomaly_map[1])).any(axis=2)
        mask = square[1].numpy()
        np.testing.assert_array_equal(changed, ndimage.binary_dilation(mask) & ~ndimage.binary_erosion(mask))
        assert (panels["final map"][changed] == (0, 230, 255)).all()

    def test_what_was_looked_at_closely_is_outlined(self, drawn: list) -> None:
        looked = torch.zeros(2, 1, SIZE, SIZE)
        looked[0, 0, 10:40, 20:60] = 1
        batch = ImageBatch(image=torch.rand(2, 3, SIZE, SIZE))
        StageVisualizer(panel_size=SIZE).visualize(batch, make_stages()._replace(looked=looked))
        (panels,), _ = drawn[0]
        red = (panels["superpixels"] == (255, 60, 60)).all(axis=2)
        window = looked[0, 0].bool().numpy()
        np.testing.assert_array_equal(red, ndimage.binary_dilation(window) & ~ndimage.binary_erosion(window))
        assert not (drawn[1][0][0]["superpixels"] == (255, 60, 60)).all(axis=2).any()

    def test_what_is_not_known_is_left_out(self, drawn: list) -> None:
        stages = make_stages(batch=1)
        (picture,) = StageVisualizer(panel_size=SIZE).visualize(ImageBatch(image=torch.rand(1, 3, SIZE, SIZE)), stages)
        ((panels,), caption) = drawn[0]
        assert list(panels) == [title for title in TITLES if title != "ground truth"]
        np.testing.assert_array_equal(panels["final map"], heat(stages.anomaly_map[0, 0]))
        assert caption == ""
        assert picture.mode == "RGB"

    def test_panels_have_the_proportions_of_the_file(self, drawn: list, tmp_path: Path) -> None:
        Image.new("RGB", (300, 100)).save(tmp_path / "wide.png")
        batch = ImageBatch(image=torch.rand(1, 3, SIZE, SIZE), image_path=[str(tmp_path / "wide.png")])
        StageVisualizer(panel_size=150).visualize(batch, make_stages(1))
        StageVisualizer(panel_size=150).visualize(batch, make_stages(1), stretch=False)
        batch.image_path = [str(tmp_path / "gone.png")]
        StageVisualizer(panel_size=150).visualize(batch, make_stages(1))
        shapes = [{panel.shape for panel in rows[0].values()} for rows, _ in drawn]
        assert shapes == [{(50, 150, 3)}, {(150, 150, 3)}, {(150, 150, 3)}]

    def test_the_caption_says_file_score_verdict_and_truth(self, drawn: list) -> None:
        batch = ImageBatch(
            image=torch.rand(2, 3, SIZE, SIZE),
            image_path=["a/b/c/good/1.png", "2.png"],
            pred_score=torch.tensor([0.25, 0.75]),
            pred_label=torch.tensor([False, True]),
            gt_label=torch.tensor([True, False]),
        )
        StageVisualizer(panel_size=SIZE).visualize(batch, make_stages())
        assert [caption.split("   |   ") for _, caption in drawn] == [
            ["good/1.png", "score 0.250, normal", "truth: anomalous"],
            ["2.png", "score 0.750, anomalous", "truth: normal"],
        ]

    def test_other_batches_are_refused(self) -> None:
        with pytest.raises(TypeError, match=r"ImageBatch.*dict"):
            StageVisualizer().visualize({"image": torch.rand(1, 3, SIZE, SIZE)}, make_stages(1))


class TestPanels:
    def test_maps_beyond_their_range_are_clipped_and_nan_is_black(self) -> None:
        values = torch.tensor([[-1.0, 2.0, float("nan")]])
        panel = np.asarray(heat_panel(values, (3, 1)))
        np.testing.assert_array_equal(panel, heat(torch.tensor([[0.0, 1.0, 0.0]])))

    def test_masks_stay_black_and_white_when_resized(self) -> None:
        panel = np.asarray(mask_panel(torch.eye(3), (7, 5)))
        assert panel.shape == (5, 7, 3)
        assert set(np.unique(panel)) == {0, 255}

    def test_grey_images(self) -> None:
        image = torch.rand(1, 5, 9)
        np.testing.assert_array_equal(np.asarray(image_panel(image, (9, 5))), to_bytes(image.expand(3, -1, -1)))

    def test_half_precision(self) -> None:
        assert image_panel(torch.rand(3, 8, 8, dtype=torch.bfloat16), (8, 8)).size == (8, 8)
        assert heat_panel(torch.rand(1, 8, 8, dtype=torch.float16), (8, 8)).size == (8, 8)

    def test_the_grid_shows_every_panel_whole(self) -> None:
        colours = [[(200, 0, 0), (0, 200, 0)], [(0, 0, 200), (200, 200, 0)]]
        rows = [[Image.new("RGB", (20, 90), colour) for colour in row] for row in colours]
        pixels = np.asarray(picture_grid(rows, ["a long title", "another long title"], "a caption"))
        boxes = {}
        for colour in (colour for row in colours for colour in row):
            y, x = np.nonzero((pixels == colour).all(axis=2))
            boxes[colour] = (y.min(), x.min())
            assert (y.max() - y.min() + 1, x.max() - x.min() + 1, len(y)) == (90, 20, 1800)
        (a, b), (c, d) = ([boxes[colour] for colour in row] for row in colours)
        assert a[0] == b[0] < c[0] == d[0]
        assert a[1] == c[1] < b[1] == d[1]
        # Titles may be wider than panels, and must not run into each other: white paper between them.
        ink = (pixels[: a[0]] < 128).any(axis=2)
        assert not ink[:, b[1] - 6 : b[1]].any()


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data"))


def make_data(dataset: Path, **options: Any) -> MVTecAD:
    return MVTecAD(root=dataset, category="plate", train_batch_size=2, eval_batch_size=4, num_workers=0, **options)


def make_model(**options: Any) -> TwoStageSuperpixel:
    pre_processor = TwoStageSuperpixel.configure_pre_processor((SIZE, SIZE))
    return TwoStageSuperpixel("small", **{"segment_size": 8, "pre_processor": pre_processor, **options})


def make_engine(folder: Path, **options: Any) -> Engine:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return Engine(default_root_dir=folder, **{**quiet, **options})


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*.png")}


class TestTestAndPredict:
    def test_pictures_lie_where_anomalibs_own_would(self, dataset: Path, tmp_path: Path) -> None:
        for name, choose in (("ours", StageVisualizer), ("theirs", ImageVisualizer), ("none", bool)):
            # anomalib's visualizer keeps the folder of its first run, so each run gets its own.
            make_engine(tmp_path / name).test(make_model(visualizer=choose()), datamodule=make_data(dataset))
            data = PredictDataset(dataset / "plate/test/square")
            make_engine(tmp_path / name).predict(make_model(visualizer=choose()), dataset=data)
        assert len(files(tmp_path / "ours")) == 6 + 3
        assert files(tmp_path / "ours") == files(tmp_path / "theirs")
        assert files(tmp_path / "none") == set()

    def test_the_pictures_show_the_stages_of_the_reported_result(
        self, dataset: Path, tmp_path: Path, drawn: list
    ) -> None:
        model = make_model(visualizer=StageVisualizer(panel_size=SIZE))
        calls = []
        model.model.slic.register_forward_hook(lambda *_: calls.append(1))
        predictions = make_engine(tmp_path).predict(model, dataset=PredictDataset(dataset / "plate/test"))
        assert len(calls) == len(predictions)  # the stages are computed once
        images = torch.cat([batch.image for batch in predictions])
        with torch.no_grad():
            stages = model.model.eval().stages(images)
        for index, (rows, _) in enumerate(drawn):
            assert list(rows[0]) == [title for title in TITLES if title != "ground truth"]
            np.testing.assert_array_equal(rows[0]["image"], to_bytes(images[index]))
            # Batches of other sizes round otherwise.
            difference = rows[0]["stage one"].astype(int) - heat(stages.stage_one_map[index, 0])
            assert np.abs(difference).max() <= 4
        assert len(drawn) == 6

    def test_images_have_the_proportions_that_they_have_in_the_file(self, tmp_path: Path, drawn: list) -> None:
        Image.new("RGB", (200, 100), (90, 90, 90)).save(tmp_path / "wide.png")
        squash = Resize((SIZE, SIZE))
        for before, transform in [
            (None, squash),
            (None, Compose([Resize((80, 80)), CenterCrop((SIZE, SIZE))])),
            (CenterCrop(80), squash),  # a square of the file
            (Compose([Resize((50, 50)), CenterCrop((50, 20))]), squash),  # 80 pixels of the file wide, 100 high
            (Lambda(lambda image: image[..., :40]), squash),  # who knows
        ]:
            model = make_model(visualizer=StageVisualizer(panel_size=100), pre_processor=PreProcessor(transform))
            data = PredictDataset(tmp_path / "wide.png", transform=before)
            make_engine(tmp_path / "out").predict(model, dataset=data)
        shapes = [rows[0]["image"].shape[:2] for rows, _ in drawn]
        assert shapes == [(50, 100), (50, 100), (100, 100), (100, 80), (100, 100)]

    def test_equal_names_in_different_folders_get_pictures_of_their_own(self, tmp_path: Path) -> None:
        greys = {"a/x/1.png": 40, "b/x/1.png": 120, "b/x/2.png": 160, "c/b/x/1.png": 220}
        for name, grey in greys.items():
            (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (SIZE, SIZE), (grey,) * 3).save(tmp_path / "in" / name)
        data = PredictDataset(tmp_path / "in")
        # A process of several sees only some of the images, so the places must not depend on what came before.
        for folder, order in (("out", range(4)), ("reversed", range(3, -1, -1))):
            loader = DataLoader(data, batch_size=2, sampler=list(order), collate_fn=data.collate_fn)
            model = make_model(visualizer=StageVisualizer(SIZE, output_dir=tmp_path / folder))
            make_engine(tmp_path).predict(model, dataloaders=loader)
            places = dict(zip(["x/1.png", "b/x/1.png", "x/2.png", "c/b/x/1.png"], greys.values(), strict=True))
            assert files(tmp_path / folder) == places.keys()
            for name, grey in places.items():
                pixels = np.asarray(Image.open(tmp_path / folder / name))
                assert (pixels == grey).all(axis=2).sum() >= SIZE * SIZE

    def test_images_without_a_file_are_numbered(self, tmp_path: Path) -> None:
        class Camera(torch.utils.data.Dataset):
            def __len__(self) -> int:
                return 3

            def __getitem__(self, index: int) -> torch.Tensor:
                return torch.rand(3, SIZE, SIZE)

        loader = torch.utils.data.DataLoader(
            Camera(), batch_size=2, collate_fn=lambda images: ImageBatch(image=torch.stack(images))
        )
        visualizer = StageVisualizer(output_dir=tmp_path / "pictures")
        make_engine(tmp_path).predict(make_model(visualizer=visualizer), dataloaders=loader)
        names = {Path(name).name for name in files(tmp_path / "pictures")}
        assert names == {"0000_00.png", "0000_01.png", "0001_00.png"}

    def test_a_folder_that_cannot_be_written_is_named_before_the_run(self, dataset: Path, tmp_path: Path) -> None:
        (tmp_path / "taken").write_text("not a folder")
        model = make_model(visualizer=StageVisualizer(output_dir=tmp_path / "taken"))
        calls = []
        model.model.register_forward_pre_hook(lambda *_: calls.append(1))
        model.model.slic.register_forward_pre_hook(lambda *_: calls.append(1))
        with pytest.raises(OSError, match=r"taken.*visualizer=False"):
            make_engine(tmp_path).predict(model, dataset=PredictDataset(dataset / "plate/test"))
        with pytest.raises(OSError, match=r"taken.*visualizer=False"):
            make_engine(tmp_path, max_epochs=1).fit(model, datamodule=make_data(dataset))
        assert not calls

    def test_a_model_without_stages_is_refused(self, dataset: Path, tmp_path: Path) -> None:
        model = Padim(pre_trained=False, visualizer=StageVisualizer())
        with pytest.raises(TypeError, match=r"Padim.*ImageVisualizer"):
            make_engine(tmp_path).predict(model, dataset=PredictDataset(dataset / "plate/test"))


@pytest.mark.parametrize(("options", "message"), [({"panel_size": 8}, "panel_size.*8"), ({"log_examples": -1}, "-1")])
def test_arguments_out_of_range_are_named(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StageVisualizer(**options)


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ("", StageVisualizer),
        ("visualizer: false", type(None)),
        ("visualizer: {class_path: anomalib.visualization.ImageVisualizer}", ImageVisualizer),
        (
            "visualizer: {class_path: anomalib_twostage.StageVisualizer, init_args: {panel_size: 100}}",
            StageVisualizer,
        ),
    ],
)
def test_it_is_chosen_in_yaml(lines: str, expected: type, tmp_path: Path) -> None:
    (tmp_path / "model.yaml").write_text(
        f"model:\n  class_path: TwoStageSuperpixel\n  init_args:\n    variant: small\n    {lines}\n"
    )
    arguments = ["fit", "--config", str(tmp_path / "model.yaml"), "--data", "SampleTextures"]
    model = AnomalibCLI(args=arguments, run=False).model
    assert type(model.visualizer) is expected
    if "100" in lines:
        assert model.visualizer.panel_size == 100


class PictureRecorder(ImageLoggerBase, Logger):
    """A logger of anomalib's kind that keeps pictures in memory."""

    name, version = "recorder", 0

    def __init__(self) -> None:
        self.pictures: list[tuple[np.ndarray, str, dict]] = []

    def add_image(self, image: np.ndarray, name: str | None = None, **options: Any) -> None:
        self.pictures.append((image, name, options))

    def log_metrics(self, metrics: dict, step: int | None = None) -> None:
        pass

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        pass


class MLFlowRecorder(PictureRecorder, AnomalibMLFlowLogger):
    pass


class TestTrainingLogger:
    @staticmethod
    def fit(dataset: Path, folder: Path, logger: Any, model: dict | None = None, **data: Any) -> TwoStageSuperpixel:
        seed_everything(0)
        trained = make_model(**(model or {}))
        make_engine(folder, logger=logger, max_epochs=2).fit(trained, datamodule=make_data(dataset, **data))
        return trained

    def test_each_validation_shows_what_was_painted(
        self, dataset: Path, tmp_path: Path, drawn: list, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        trained_on = []
        original = TwoStageSuperpixel.training_step

        def step(self, batch: ImageBatch, *args: Any) -> dict:
            outputs = original(self, batch, *args)
            trained_on.append((batch.image, outputs["painted"], outputs["mask"]))
            return outputs

        monkeypatch.setattr(TwoStageSuperpixel, "training_step", step)
        logger = PictureRecorder()
        visualizer = StageVisualizer(panel_size=SIZE, log_examples=2)
        self.fit(dataset, tmp_path, logger, {"paint_probability": 1.0, "visualizer": visualizer})
        assert [(name, options) for _, name, options in logger.pictures] == [
            ("training_examples", {"global_step": 3}),
            ("training_examples", {"global_step": 6}),
        ]
        assert all(image.dtype == np.uint8 and image.shape[2] == 3 for image, *_ in logger.pictures)
        for (rows, _), (images, painted, masks) in zip(drawn, (trained_on[2], trained_on[5]), strict=True):
            assert len(rows) == 2
            order = masks.flatten(1).any(dim=1).logical_not().int().argsort(stable=True)
            for row, i in zip(rows, order, strict=True):
                assert list(row) == ["image", "painted", "mask", "stage one", "final map"]
                np.testing.assert_array_equal(row["image"], to_bytes(images[i]))
                np.testing.assert_array_equal(row["painted"], to_bytes(painted[i].detach()))
                np.testing.assert_array_equal(row["mask"][..., 0] > 0, masks[i, 0].numpy() > 0)

    def test_painted_images_come_first(self, drawn: list) -> None:
        model = make_model().model
        images, masks = torch.rand(4, 3, SIZE, SIZE), torch.zeros(4, 1, SIZE, SIZE)
        masks[2, :, 5:9] = 1
        StageVisualizer(SIZE, log_examples=2)._examples(model, images, images + 0.1, masks)
        ((first, second), _) = drawn[0]
        assert first["mask"].any()
        np.testing.assert_array_equal(first["image"], to_bytes(images[2]))
        np.testing.assert_array_equal(second["image"], to_bytes(images[0]))
        assert model.training

    def test_it_changes_neither_weights_nor_random_numbers_nor_metrics(self, dataset: Path, tmp_path: Path) -> None:
        without = self.fit(dataset, tmp_path / "without", logger=False)
        random_state = torch.get_rng_state()
        metrics = dict(without.trainer.callback_metrics)
        logger = PictureRecorder()
        observed = self.fit(dataset, tmp_path / "with", logger)
        assert logger.pictures
        assert torch.equal(torch.get_rng_state(), random_state)
        for name, value in without.state_dict().items():
            assert torch.equal(value, observed.state_dict()[name]), name
        assert metrics.keys() == observed.trainer.callback_metrics.keys()
        for name, value in metrics.items():
            assert torch.equal(value, observed.trainer.callback_metrics[name]), name

    @pytest.mark.parametrize("kind", [AnomalibTensorBoardLogger, TensorBoardLogger])
    def test_tensorboard_gets_pictures_beside_its_curves(self, kind: type, dataset: Path, tmp_path: Path) -> None:
        self.fit(dataset, tmp_path, kind(str(tmp_path / "logs"), name="run"))
        (events,) = (tmp_path / "logs").rglob("events.*")
        reader = EventAccumulator(str(events.parent)).Reload()
        assert [entry.step for entry in reader.Images("training_examples")] == [3, 6]
        assert any("train_loss" in tag for tag in reader.Tags()["scalars"])

    def test_mlflow_keeps_every_picture_under_its_own_name(self, dataset: Path, tmp_path: Path) -> None:
        logger = MLFlowRecorder()
        self.fit(dataset, tmp_path, logger)
        names = [name for _, name, _ in logger.pictures]
        assert names == ["training_examples/00000003.png", "training_examples/00000006.png"]

    @pytest.mark.parametrize("reason", ["no images", "turned off", "no visualizer"])
    def test_nothing_is_drawn_or_kept_without_a_taker(
        self, reason: str, dataset: Path, tmp_path: Path, drawn: list
    ) -> None:
        logger = CSVLogger(tmp_path / "logs") if reason == "no images" else PictureRecorder()
        chosen = {"turned off": StageVisualizer(log_examples=0), "no visualizer": False}.get(reason, True)
        model = self.fit(dataset, tmp_path, logger, {"visualizer": chosen})
        assert not drawn
        assert not getattr(logger, "pictures", [])
        assert not chosen or model.visualizer._example is None
