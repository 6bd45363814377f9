# SPDX-License-Identifier: Apache-2.0
import copy
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from anomalib.callbacks import ModelCheckpoint
from anomalib.data import InferenceBatch, MVTecAD
from anomalib.engine import Engine
from lightning.pytorch import Trainer, seed_everything

from anomalib_twostage import TwoStageSuperpixel
from anomalib_twostage.model.torch_model import pack_state
from anomalib_twostage.model.variants import two_stage_superpixel_model
from anomalib_twostage.model.zoom import WindowGrid, Windows, ZoomedTwoStageModel, _Sample
from tests.integration.conftest import write_dataset

HEIGHT, WIDTH = 201, 290  # neither is a multiple of the zoom or of a core
ZOOM = 2


def all_windows(grid: WindowGrid, batch: int = 1) -> Windows:
    place = torch.arange(batch * grid.rows * grid.columns)
    image, place = place // (grid.rows * grid.columns), place % (grid.rows * grid.columns)
    return Windows(image, place // grid.columns, place % grid.columns)


def good_images(count: int = 4, height: int = HEIGHT, width: int = WIDTH) -> Iterator[tuple[torch.Tensor, int]]:
    generator = torch.Generator().manual_seed(1)
    y, x = torch.arange(height).view(-1, 1), torch.arange(width).view(1, -1)
    stripes = 0.5 + 0.2 * torch.sin(x / 5.0) * torch.cos(y / 7.0)
    for number in range(count):
        yield (stripes + 0.02 * torch.randn(3, height, width, generator=generator)).clamp(0, 1), number


def with_spots(image: torch.Tensor, *places: tuple[int, int]) -> torch.Tensor:
    """White spots of 12 x 12 pixels."""
    image = image.clone()
    for y, x in places:
        image[:, y : y + 12, x : x + 12] = 1.0
    return image


@pytest.fixture(scope="module")
def zoomed() -> ZoomedTwoStageModel:
    torch.manual_seed(0)
    model = two_stage_superpixel_model("default", zoom=ZOOM, zoom_windows=3).eval()
    assert isinstance(model, ZoomedTwoStageModel)
    model.remember(good_images())
    model.start_stage_two()
    with torch.no_grad():
        model.stage_one.head.bias.fill_(-8.0)  # untrained, it would suspect everything
    return model


@pytest.mark.parametrize(("height", "width"), [(HEIGHT, WIDTH), (96, 97), (40, 300), (64, 64)])
def test_the_weights_of_all_windows_add_up_to_one(height: int, width: int) -> None:
    grid = WindowGrid(height, width, core=32, margin=16)
    windows = all_windows(grid, batch=2)
    weights = grid.weights(windows)
    total = grid.write(torch.ones_like(weights), windows, weights, batch=2)
    torch.testing.assert_close(total, torch.ones(2, 1, height, width))


def test_what_is_cut_and_written_back_is_the_same() -> None:
    grid = WindowGrid(70, 110, core=32, margin=16)
    windows, images = all_windows(grid, batch=3), torch.rand(3, 1, 70, 110)
    again = grid.write(grid.cut(images, windows), windows, grid.weights(windows), batch=3)
    torch.testing.assert_close(again, images)


def test_a_window_is_a_piece_of_the_mirrored_image() -> None:
    images = torch.rand(2, 3, 70, 110)
    grid = WindowGrid(70, 110, core=32, margin=16)
    padded = torch.nn.functional.pad(images, (16, 34, 16, 42), mode="reflect")
    found = grid.cut(images, Windows(torch.tensor([1, 0]), torch.tensor([2, 0]), torch.tensor([3, 0])))
    assert torch.equal(found[0], padded[1, :, 64 : 64 + 64, 96 : 96 + 64])
    assert torch.equal(found[1], padded[0, :, :64, :64])


def test_a_sample_is_bounded_and_takes_from_everywhere() -> None:
    sample = _Sample(10)
    for number in range(100):
        sample.add(torch.full((7, 1, 2, 2), float(number)), number)
    kept = list(sample)
    assert 10 <= len(kept) <= 20
    assert all((window == number).all() for window, number in kept)
    numbers = torch.tensor([number for _, number in kept])
    assert numbers.min() < 10
    assert numbers.max() >= 90
    assert numbers.diff().max() <= 15


def test_stage_one_looks_at_means_of_pixels(zoomed: ZoomedTwoStageModel) -> None:
    image = torch.rand(1, 3, 200, 290)
    expected = image.view(1, 3, 100, 2, 145, 2).mean(dim=(3, 5))
    torch.testing.assert_close(zoomed.reduce(image), expected)
    assert zoomed.reduce(torch.rand(1, 3, HEIGHT, WIDTH)).shape == (1, 3, 101, 145)


def test_maps_have_the_size_of_the_image(zoomed: ZoomedTwoStageModel) -> None:
    image = with_spots(next(good_images())[0], (30, 40)).unsqueeze(0)
    with torch.no_grad():
        stages, answer = zoomed.stages(image), zoomed(image)
    for name, value in stages._asdict().items():
        assert value is None or value.shape[-2:] == (HEIGHT, WIDTH), name
    torch.testing.assert_close(answer.anomaly_map, stages.anomaly_map)
    assert answer.pred_score == zoomed.score(stages.anomaly_map)


def test_where_nothing_is_suspicious_stage_one_has_the_word(
    zoomed: ZoomedTwoStageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zoomed.stage_two, "forward", lambda *_: pytest.fail("stage two ran"))
    monkeypatch.setattr("anomalib_twostage.model.zoom._FAR", 1.0)
    image = next(good_images())[0].unsqueeze(0)
    with torch.no_grad():
        stages = zoomed.stages(image)
        seen = zoomed.seen(image)
    base = zoomed.smooth(zoomed.weigh(zoomed.stage_one_logits(image, seen).sigmoid(), seen.distance))
    assert not stages.looked.any()
    large = torch.nn.functional.interpolate(base, scale_factor=2, mode="bilinear")[..., :HEIGHT, :WIDTH]
    torch.testing.assert_close(stages.anomaly_map, large, atol=1e-3, rtol=0)


def test_a_map_scores_like_the_same_map_reduced(zoomed: ZoomedTwoStageModel) -> None:
    small = torch.rand(3, 1, 40, 50)
    large = small.repeat_interleave(ZOOM, dim=2).repeat_interleave(ZOOM, dim=3)
    torch.testing.assert_close(zoomed.score(large), two_stage_superpixel_model("default").score(small))


@pytest.mark.parametrize("place", [(0, 0), (0, WIDTH - 12), (HEIGHT - 12, 0), (HEIGHT - 12, WIDTH - 12), (90, 140)])
def test_a_defect_is_looked_at_wherever_it_lies(zoomed: ZoomedTwoStageModel, place: tuple[int, int]) -> None:
    y, x = place
    with torch.no_grad():
        stages = zoomed.stages(with_spots(next(good_images())[0], place).unsqueeze(0))
    assert stages.looked[0, 0, y : y + 12, x : x + 12].min() > 0.45  # on a border, two windows share it
    assert stages.anomaly_map[0, 0, y : y + 12, x : x + 12].mean() > 2 * stages.anomaly_map.mean()


def test_where_it_did_not_look_closer_the_map_is_stage_ones(zoomed: ZoomedTwoStageModel) -> None:
    model = copy.deepcopy(zoomed)
    model.windows = 1
    image = with_spots(next(good_images())[0], (20, 20)).unsqueeze(0)
    with torch.no_grad():
        stages = model.stages(image)
        model.stage = 1
        before = model.stages(image).anomaly_map
    assert 0 < (stages.looked > 0).float().mean() < 0.5
    elsewhere = stages.looked == 0
    assert torch.equal(stages.anomaly_map[elsewhere], before[elsewhere])
    inside = stages.looked == 1
    assert (stages.anomaly_map[inside] != before[inside]).float().mean() > 0.9


@pytest.mark.parametrize(("bias", "weight"), [(-20.0, 2 / 3), (20.0, 1.0)])
def test_in_a_window_the_mean_of_the_distances_weighs_like_one_elsewhere(
    zoomed: ZoomedTwoStageModel, bias: float, weight: float
) -> None:
    model = copy.deepcopy(zoomed)
    with torch.no_grad():
        for network in (model.stage_one, model.stage_two):
            network.head.weight.zero_()
            network.head.bias.fill_(bias)
        images = with_spots(next(good_images())[0], (100, 200)).unsqueeze(0)
        stages = model.stages(images)
        grid = model._grid(HEIGHT, WIDTH)
        windows = all_windows(grid)
        near = model.close_template(grid.cut(images, windows)).distance
    near = grid.write(near, windows, grid.weights(windows), 1)
    inside = stages.looked > 0.999
    assert inside.any()
    expected = weight * (stages.distance + near) / 2
    torch.testing.assert_close(stages.fused_map[inside], expected[inside], atol=0.01, rtol=0)


def test_stage_two_continues_from_stage_one(zoomed: ZoomedTwoStageModel) -> None:
    model = copy.deepcopy(zoomed)
    model.start_stage_one()
    with torch.no_grad():
        for parameter in model.stage_two.parameters():
            parameter.fill_(7.0)
    model.start_stage_two()
    own = model.stage_two.state_dict()
    for name, value in model.stage_one.state_dict().items():
        if not name.startswith("head."):
            assert torch.equal(own[name], value), name


def test_more_suspicious_windows_than_it_may_look_at_are_told(
    zoomed: ZoomedTwoStageModel, caplog: pytest.LogCaptureFixture
) -> None:
    model = copy.deepcopy(zoomed)
    model.end_run()
    caplog.clear()
    good = next(good_images())[0]
    crowded = with_spots(good, (10, 10), (10, 140), (10, 270), (180, 10), (180, 270))
    with torch.no_grad():
        stages = model.stages(torch.stack([with_spots(good, (40, 40)), crowded]))
    share = (model._grid(HEIGHT, WIDTH).side ** 2) / (HEIGHT * WIDTH)
    assert (stages.looked > 0).float().mean(dim=(1, 2, 3)).max() < model.windows * share
    model.end_run()
    assert [record.args for record in caplog.records] == [(1, 2, 3)]
    model.end_run()
    assert len(caplog.records) == 1


def test_an_image_gets_the_same_map_in_any_batch(zoomed: ZoomedTwoStageModel) -> None:
    good = next(good_images())[0]
    images = torch.stack([good, with_spots(good, (100, 200)), with_spots(good, (20, 20), (150, 30))])
    with torch.no_grad():
        together = zoomed(images).anomaly_map
        alone = torch.cat([zoomed(image.unsqueeze(0)).anomaly_map for image in images])
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=0)


def test_stage_two_learns_from_painted_windows(zoomed: ZoomedTwoStageModel) -> None:
    model = copy.deepcopy(zoomed).train()
    images = torch.stack([image for image, _ in good_images(3)])
    mask = torch.zeros(3, 1, HEIGHT, WIDTH)
    for image, (y, x) in enumerate(((5, 5), (180, 270), (100, 150))):
        images[image, :, y : y + 8, x : x + 8] = 1.0
        mask[image, :, y : y + 8, x : x + 8] = 1.0
    logits, target = model.learned_logits(images, mask, torch.arange(3))
    assert logits.shape == target.shape == (6, 1, 160, 160)
    assert (target[0::2].flatten(1).sum(dim=1) >= 64).all()  # more where the edge mirrors them
    logits.sum().backward()
    assert any(parameter.grad is not None for parameter in model.stage_two.parameters())
    assert all(parameter.grad is None for parameter in model.stage_one.parameters())


def test_stage_one_learns_from_reduced_images(zoomed: ZoomedTwoStageModel) -> None:
    model = copy.deepcopy(zoomed).train()
    model.start_stage_one()
    images, mask = torch.rand(2, 3, HEIGHT, WIDTH), torch.zeros(2, HEIGHT, WIDTH)
    mask[0, 200, 289] = 1
    small, small_mask = model.to_be_painted(images, mask)
    assert small.shape[-2:] == small_mask.shape[-2:] == (101, 145)
    assert small_mask.nonzero().tolist() == [[0, 0, 100, 144]]
    logits, target = model.learned_logits(small, small_mask)
    assert logits.shape == target.shape == (2, 1, 101, 145)


def test_everything_travels_in_the_state_dict(zoomed: ZoomedTwoStageModel) -> None:
    file = io.BytesIO()
    torch.save(zoomed.state_dict(), file)
    file.seek(0)
    other = two_stage_superpixel_model("default", zoom=ZOOM).eval()
    other.load_state_dict(torch.load(file, weights_only=True))
    image = with_spots(next(good_images())[0], (30, 40), (150, 200)).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(other(image).anomaly_map, zoomed(image).anomaly_map)


def test_a_training_is_resumed_as_if_it_had_not_been_stopped(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path / "data")

    def fit(name: str, **options: Any) -> TwoStageSuperpixel:
        seed_everything(0)
        size = TwoStageSuperpixel.configure_pre_processor((128, 160))
        model = TwoStageSuperpixel(zoom=ZOOM, zoom_windows=2, stage_one_fraction=0.5, pre_processor=size)
        data = MVTecAD(root=dataset, category="plate", train_batch_size=2, eval_batch_size=3, num_workers=0)
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
        keep = ModelCheckpoint(dirpath=tmp_path / name, every_n_train_steps=3, filename="{step}")
        engine = Engine(default_root_dir=tmp_path / name, max_steps=4, limit_val_batches=0, callbacks=[keep], **quiet)
        engine.fit(model, datamodule=data, **options)
        engine.trainer.save_checkpoint(tmp_path / f"{name}.ckpt")
        if name == "resumed":
            engine.test(model, datamodule=data)
            assert len(list((tmp_path / name).rglob("*.png"))) == len(data.test_data)
        return model

    through = fit("through")
    resumed = fit("resumed", ckpt_path=tmp_path / "through" / "step=3.ckpt")
    own = resumed.model.state_dict()
    for name, value in through.model.state_dict().items():
        assert torch.equal(own[name], value), name
    again = TwoStageSuperpixel.load_from_checkpoint(tmp_path / "resumed.ckpt").eval()
    images = torch.rand(1, 3, 128, 160)
    with torch.no_grad():
        assert torch.equal(again.model(images).anomaly_map, resumed.eval().model(images).anomaly_map)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"zoom": 0}, "zoom must be a whole number from 1 to 16, got 0"),
        ({"zoom": 17}, "from 1 to 16, got 17"),
        ({"zoom": 2.5}, "from 1 to 16, got 2.5"),
        ({"zoom": 2.0}, "from 1 to 16, got 2.0"),
        ({"zoom": 2, "zoom_windows": 0}, "zoom_windows must be a whole number, 1 or more, got 0"),
        ({"zoom": 2, "zoom_windows": 1.5}, "1 or more, got 1.5"),
        ({"zoom": 2, "zoom_windows": float("inf")}, "1 or more, got inf"),
        ({"variant": "small", "num_neighbors": 2.5}, "num_neighbors must be a whole number, 0 or more, got 2.5"),
        ({"zoom": 2, "gate": "hard"}, "gate='hard'"),
        ({"zoom": 2, "variant": "small"}, "zoom=2 needs variant 'default'"),
        ({"zoom": 2, "backbone": None}, "zoom=2 needs variant 'default'"),
    ],
)
def test_what_is_no_zoom_or_number_is_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        two_stage_superpixel_model(**arguments)
    with pytest.raises(ValueError, match=message):
        TwoStageSuperpixel(**arguments)


def test_a_trained_model_may_look_at_more_windows(tmp_path: Path) -> None:
    size = TwoStageSuperpixel.configure_pre_processor((128, 160))
    model = TwoStageSuperpixel(zoom=ZOOM, zoom_windows=2, pre_processor=size)
    trainer = Trainer(logger=False, accelerator="cpu")
    trainer.strategy.connect(model)
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    assert TwoStageSuperpixel.load_from_checkpoint(tmp_path / "two.ckpt").model.windows == 2
    assert TwoStageSuperpixel.load_from_checkpoint(tmp_path / "two.ckpt", zoom_windows=5).model.windows == 5


def test_weights_of_before_leave_the_number_of_windows_alone() -> None:
    model = two_stage_superpixel_model("default", zoom=ZOOM, zoom_windows=3)
    before = pack_state({"stage": 2, **model.settings, "windows": 8})
    model.set_extra_state(before)
    assert (model.stage, model.windows) == (2, 3)


def test_a_traced_graph_looks_at_the_same_windows(zoomed: ZoomedTwoStageModel) -> None:
    good = next(good_images())[0]
    images = torch.stack([with_spots(good, (100, 200)), with_spots(good, (20, 20), (150, 30))])
    with torch.no_grad():
        graph = torch.export.export(zoomed, (images,), strict=False).module()
        expected, found = zoomed(images), InferenceBatch(*graph(images))
    torch.testing.assert_close(found.anomaly_map, expected.anomaly_map, atol=1e-4, rtol=0)
    torch.testing.assert_close(found.pred_score, expected.pred_score, atol=1e-4, rtol=0)


def test_an_exported_graph_spends_nothing_on_windows_where_nothing_is_suspicious(zoomed: ZoomedTwoStageModel) -> None:
    images = torch.stack([image for image, _ in good_images(2)])
    with torch.no_grad():
        graph = torch.export.export(zoomed, (images,), strict=False).graph
    called = [node for node in graph.nodes if node.op == "call_function"]
    assert any("cond" in str(node.target) for node in called)
    written = [node.meta["val"].numel() for node in called if "scatter_add" in str(node.target)]
    assert written  # to pool over superpixels of the reduced images
    assert max(written) < images[:, 0].numel()


class _Looked(torch.fx.Interpreter):
    """Runs an exported graph and counts the windows of the branches that it takes."""

    count = 0

    def run_node(self, node: torch.fx.Node) -> Any:
        if "cond" in str(node.target):
            (wanted, _, _, operands), _ = self.fetch_args_kwargs_from_env(node)
            if wanted:
                (windows,) = {len(value) for value in operands if value.dtype == torch.bool and value.ndim == 1}
                self.count += windows
        return super().run_node(node)


@pytest.fixture(scope="module")
def exported(zoomed: ZoomedTwoStageModel) -> tuple[ZoomedTwoStageModel, torch.fx.GraphModule]:
    model = copy.deepcopy(zoomed)
    model.windows = 6
    with torch.no_grad():
        return model, torch.export.export(model, (torch.rand(1, 3, HEIGHT, WIDTH),), strict=False).module()


@pytest.mark.parametrize(
    ("spots", "least", "most"), [([], 0, 0), ([(40, 40)], 1, 1), ([(40, 40), (150, 240), (40, 240)], 2, 4)]
)
def test_an_exported_graph_looks_at_few_windows_where_few_are_suspicious(
    exported: tuple[ZoomedTwoStageModel, torch.fx.GraphModule], spots: list[tuple[int, int]], least: int, most: int
) -> None:
    model, graph = exported
    image = with_spots(next(good_images())[0], *spots).unsqueeze(0)
    looked = _Looked(graph)
    with torch.no_grad():
        expected, found = model(image), InferenceBatch(*looked.run(image))
    assert least <= looked.count <= most
    torch.testing.assert_close(found.anomaly_map, expected.anomaly_map, atol=1e-4, rtol=0)
