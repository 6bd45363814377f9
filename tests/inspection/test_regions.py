# SPDX-License-Identifier: Apache-2.0
import csv
import json
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from anomalib.data import ImageBatch, InferenceBatch, PredictDataset
from anomalib.post_processing import PostProcessor
from lightning.pytorch import LightningModule, Trainer
from PIL import Image
from scipy import ndimage
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import (
    CenterCrop,
    ColorJitter,
    Compose,
    Lambda,
    Normalize,
    Pad,
    RandomCrop,
    RandomHorizontalFlip,
    Resize,
    Transform,
)

from anomalib_twostage.inspection.regions import Box, Region, RegionWriter, find_regions, write_regions


def two_squares() -> torch.Tensor:
    """A map with a faint square of 4 x 6 pixels and a bright one of 2 x 2."""
    anomaly_map = torch.zeros(20, 30)
    anomaly_map[3:7, 10:16] = 0.6
    anomaly_map[15:17, 1:3] = 0.8
    anomaly_map[15, 1] = 1.0
    return anomaly_map


class TestFindRegions:
    def test_boxes_areas_and_scores(self) -> None:
        bright, faint = find_regions(two_squares(), threshold=0.5)
        assert (bright.box, bright.area) == (Box(x_min=1, y_min=15, x_max=3, y_max=17), 4)
        assert (faint.box, faint.area) == (Box(x_min=10, y_min=3, x_max=16, y_max=7), 24)
        assert (bright.peak_score, faint.peak_score) == pytest.approx((1.0, 0.6))
        assert (bright.mean_score, faint.mean_score) == pytest.approx((0.85, 0.6))

    def test_agrees_with_scipy(self) -> None:
        values = ndimage.gaussian_filter(np.random.default_rng(0).random((80, 100)), 2).astype(np.float32)
        mask = values > 0.5
        labels, count = ndimage.label(mask, structure=np.ones((3, 3)))
        numbers = range(1, count + 1)
        slices = ndimage.find_objects(labels)
        expected = {
            (x.start, y.start, x.stop, y.stop): (area, mean, peak)
            for (y, x), area, mean, peak in zip(
                slices,
                ndimage.sum_labels(mask, labels, numbers),
                ndimage.mean(values, labels, numbers),
                ndimage.maximum(values, labels, numbers),
                strict=True,
            )
        }
        found = find_regions(values, threshold=0.5)
        assert count > 5
        assert {tuple(r.box): pytest.approx((r.area, r.mean_score, r.peak_score)) for r in found} == expected
        assert [r.peak_score for r in found] == sorted((peak for *_, peak in expected.values()), reverse=True)

    def test_pixels_that_touch_at_a_corner_are_one_region(self) -> None:
        assert [region.area for region in find_regions(torch.eye(5), threshold=0.5)] == [5]

    def test_the_threshold_itself_is_normal(self) -> None:
        assert find_regions(torch.full((4, 4), 0.5), threshold=0.5) == []

    def test_a_post_processors_threshold_is_a_tensor(self) -> None:
        threshold = PostProcessor().normalized_pixel_threshold
        assert find_regions(two_squares(), threshold=threshold) == find_regions(two_squares(), threshold=0.5)

    def test_small_regions_are_left_out(self) -> None:
        areas = [[r.area for r in find_regions(two_squares(), threshold=0.5, min_area=a)] for a in (4, 5, 24, 25)]
        assert areas == [[4, 24], [24], [24], []]

    def test_a_batch_uses_its_mask_and_its_paths(self) -> None:
        maps = torch.stack([two_squares(), torch.zeros(20, 30), two_squares().flip(1)])
        masks = maps > 0.7
        batch = ImageBatch(
            image=torch.rand(3, 3, 20, 30), anomaly_map=maps, pred_mask=masks, image_path=["a.png", "b.png", "c.png"]
        )
        regions = find_regions(batch)
        assert [(r.image_path, r.box) for r in regions] == [
            ("a.png", Box(1, 15, 3, 17)),
            ("c.png", Box(27, 15, 29, 17)),
        ]
        assert [r.area for r in find_regions(batch, threshold=0.5)] == [4, 24, 4, 24]

    def test_one_item_a_batch_and_a_bare_prediction_agree(self) -> None:
        maps = torch.stack([two_squares(), two_squares().flip(0)])
        batch = ImageBatch(image=torch.rand(2, 3, 20, 30), anomaly_map=maps, pred_mask=maps > 0.5)
        bare = InferenceBatch(anomaly_map=maps.unsqueeze(1), pred_mask=maps.unsqueeze(1) > 0.5)
        items = [region for item in batch for region in find_regions(item)]
        assert len(items) == 4
        assert items == find_regions(batch) == find_regions(bare) == find_regions(maps.numpy(), threshold=0.5)
        assert find_regions(batch.to_numpy()) == items

    def test_masks_with_their_channel_last(self) -> None:
        maps = two_squares().unsqueeze(0)
        prediction = SimpleNamespace(anomaly_map=maps.numpy(), pred_mask=(maps > 0.5).unsqueeze(-1).numpy())
        assert find_regions(prediction) == find_regions(maps, threshold=0.5)

    def test_boxes_are_scaled_to_the_file_and_cover_the_region(self) -> None:
        anomaly_map = torch.zeros(20, 30)
        anomaly_map[3:7, 10:16] = 1.0
        (region,) = find_regions(anomaly_map, threshold=0.5, image_sizes=[(47, 100)])
        # 10 * 100 / 30 = 33.3, 3 * 47 / 20 = 7.05, 16 * 100 / 30 = 53.3, 7 * 47 / 20 = 16.45
        assert region.image_box == Box(33, 7, 54, 17)
        (region,) = find_regions(anomaly_map, threshold=0.5, image_sizes=[(20, 30)])
        assert region.image_box == region.box

    def test_half_precision(self) -> None:
        assert [r.area for r in find_regions(two_squares().half(), threshold=0.5)] == [4, 24]

    @pytest.mark.parametrize(
        ("prediction", "options", "message"),
        [
            (torch.zeros(4, 4), {}, "give a threshold"),
            (InferenceBatch(pred_score=torch.zeros(1)), {"threshold": 0.5}, "this InferenceBatch has none"),
            (torch.zeros(2, 3, 4, 4), {"threshold": 0.5}, r"got shape \(2, 3, 4, 4\)"),
            (torch.zeros(4, 4), {"threshold": 0.5, "min_area": 0}, "min_area must be at least 1 pixel, got 0"),
            (torch.zeros(2, 4, 4), {"threshold": 0.5, "image_sizes": [None]}, "1 image_sizes for 2 anomaly maps"),
            (
                InferenceBatch(anomaly_map=torch.zeros(1, 1, 4, 4), pred_mask=torch.zeros(1, 1, 2, 2) > 0),
                {},
                "must be alike",
            ),
        ],
    )
    def test_what_does_not_fit_is_refused(self, prediction: object, options: dict, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            find_regions(prediction, **options)


REGIONS = [
    Region("a, b.png", Box(1, 2, 3, 4), Box(10, 20, 30, 40), 4, 0.1234567890123, 0.5),
    Region("ü.png", Box(0, 0, 5, 5), None, 25, 0.25, 1.0),
]
BOX = ["x_min", "y_min", "x_max", "y_max"]
COLUMNS = ["image_path", *BOX, *(f"image_{edge}" for edge in BOX), "area", "mean_score", "peak_score"]


class TestWriteRegions:
    def test_csv(self, tmp_path: Path) -> None:
        write_regions(REGIONS, tmp_path / "new/regions.csv")
        with (tmp_path / "new/regions.csv").open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            first, second = reader
        assert reader.fieldnames == COLUMNS
        assert list(first.values())[:9] == ["a, b.png", "1", "2", "3", "4", "10", "20", "30", "40"]
        assert list(first.values())[9:] == ["4", "0.1234567890123", "0.5"]
        assert list(second.values()) == ["ü.png", "0", "0", "5", "5", "", "", "", "", "25", "0.25", "1.0"]

    def test_json(self, tmp_path: Path) -> None:
        write_regions(REGIONS, tmp_path / "regions.json")
        first, second = json.loads((tmp_path / "regions.json").read_text(encoding="utf-8"))
        assert list(first) == COLUMNS
        assert list(first.values()) == ["a, b.png", 1, 2, 3, 4, 10, 20, 30, 40, 4, 0.1234567890123, 0.5]
        assert list(second.values()) == ["ü.png", 0, 0, 5, 5, None, None, None, None, 25, 0.25, 1.0]

    def test_sizes_in_numbers_of_numpy(self, tmp_path: Path) -> None:
        sizes = [tuple(np.array([40, 90]))]
        write_regions(find_regions(two_squares(), threshold=0.5, image_sizes=sizes), tmp_path / "a.json")
        assert [region["image_x_max"] for region in json.loads((tmp_path / "a.json").read_text())] == [9, 48]

    def test_no_regions(self, tmp_path: Path) -> None:
        write_regions([], tmp_path / "regions.csv")
        write_regions([], tmp_path / "regions.json")
        assert (tmp_path / "regions.csv").read_text().strip() == ",".join(COLUMNS)
        assert json.loads((tmp_path / "regions.json").read_text()) == []

    def test_file_names_that_are_no_text(self, tmp_path: Path) -> None:
        names = [os.fsdecode(b"a\xff.png"), "\ud800.png", "ü\U0001f600.png"]
        regions = [replace(REGIONS[0], image_path=name) for name in names]
        write_regions(regions, tmp_path / "regions.csv")
        write_regions(regions, tmp_path / "regions.json")
        table = pd.read_csv(tmp_path / "regions.csv")
        assert table["image_path"].tolist() == ["a\\udcff.png", "\\ud800.png", "ü\U0001f600.png"]
        rows = json.loads((tmp_path / "regions.json").read_text(encoding="utf-8"))
        assert [row["image_path"] for row in rows] == names

    def test_scores_that_are_not_finite(self, tmp_path: Path) -> None:
        values = [float("inf"), -float("inf"), float("nan"), 0.5]
        regions = [replace(REGIONS[0], mean_score=value, peak_score=value) for value in values]
        write_regions(regions, tmp_path / "regions.csv")
        write_regions(regions, tmp_path / "regions.json")
        table = pd.read_csv(tmp_path / "regions.csv")
        for name in ("mean_score", "peak_score"):
            np.testing.assert_array_equal(table[name], values)

        def refuse(constant: str) -> None:
            raise AssertionError(constant)

        rows = json.loads((tmp_path / "regions.json").read_text(encoding="utf-8"), parse_constant=refuse)
        assert [(row["mean_score"], row["peak_score"]) for row in rows] == [(None, None)] * 3 + [(0.5, 0.5)]

    def test_a_file_is_replaced_whole_or_not_at_all(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = tmp_path / "regions.json"
        write_regions(REGIONS, path)
        before = path.read_text(encoding="utf-8")

        def full_disk(place: Path, text: str, **options: object) -> None:
            with place.open("w") as file:
                file.write(text[:2])
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(Path, "write_text", full_disk)
            with pytest.raises(OSError, match=r"Cannot write regions to .*regions.json \(No space left on device\)"):
                write_regions(REGIONS[:1], path)
        assert path.read_text(encoding="utf-8") == before
        assert list(tmp_path.iterdir()) == [path]
        write_regions(REGIONS[:1], path)
        assert len(json.loads(path.read_text(encoding="utf-8"))) == 1

    def test_other_formats_are_refused(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"as .csv or .json, got 'regions.xml'"):
            write_regions(REGIONS, tmp_path / "regions.xml")


class Bright(LightningModule):
    """Predicts the brightness of the image, by way of anomalib's post-processor."""

    def __init__(self, transform: object = None) -> None:
        super().__init__()
        self.model = torch.nn.Identity()
        self.pre_processor = SimpleNamespace(transform=transform)
        self.post_processor = PostProcessor()
        for name in ("pixel_min", "image_min"):
            setattr(self.post_processor, name, torch.tensor(0.0))
        for name in ("pixel_max", "image_max"):
            setattr(self.post_processor, name, torch.tensor(2.0))
        for name in ("_pixel_threshold", "_image_threshold"):
            setattr(self.post_processor, name, torch.tensor(0.5))

    def configure_callbacks(self) -> list:
        return [self.post_processor]

    def test_step(self, batch: ImageBatch, batch_idx: int) -> ImageBatch:
        transform = self.pre_processor.transform
        maps = (batch.image if transform is None else transform(batch.image)).mean(dim=1)
        return batch.update(anomaly_map=maps, pred_score=maps.amax(dim=(1, 2)))

    def predict_step(self, batch: ImageBatch, batch_idx: int) -> ImageBatch:
        return self.test_step(batch, batch_idx)


def files(folder: Path, count: int = 5) -> list[ImageBatch]:
    """Batches of one or two images of 20 x 30 pixels, with files of 40 x 90 pixels; the second one is all dark."""
    paths = [folder / f"{i}.png" for i in range(count)]
    for path in paths:
        Image.new("RGB", (90, 40)).save(path)
    images = torch.stack([two_squares().roll(i, dims=1).expand(3, -1, -1) for i in range(count)])
    images[1:2] = 0.1
    return [
        ImageBatch(image=images[i : i + 2], image_path=[str(path) for path in paths[i : i + 2]])
        for i in range(0, count, 2)
    ]


def run(writer: RegionWriter, model: Bright, batches: list[ImageBatch] | DataLoader, folder: Path, stage: str) -> None:
    trainer = Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        callbacks=[writer],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    data = batches if isinstance(batches, DataLoader) else DataLoader(batches, batch_size=None)
    getattr(trainer, stage)(model, data)


@pytest.mark.filterwarnings("ignore::UserWarning")
class TestRegionWriter:
    @pytest.mark.parametrize("stage", ["test", "predict"])
    def test_writes_the_regions_of_the_post_processed_maps(self, stage: str, tmp_path: Path) -> None:
        run(RegionWriter(file_format="json"), Bright(), files(tmp_path), tmp_path, stage)
        rows = json.loads((tmp_path / f"regions_{stage}.json").read_text())
        assert [Path(row["image_path"]).name for row in rows] == [f"{i}.png" for i in (0, 0, 2, 2, 3, 3, 4, 4)]
        # The lower square moves to the right with the number of the image, and is the brighter one.
        assert [row["x_min"] for row in rows[::2]] == [1, 3, 4, 5]
        assert [row["area"] for row in rows[::2]] == [4] * 4
        # Normalised by the post-processor: (1 - 0.5) / 2 + 0.5.
        assert [row["peak_score"] for row in rows[::2]] == pytest.approx([0.75] * 4)
        box = [rows[0][f"image_{edge}"] for edge in Box._fields]
        assert box == [3, 30, 9, 34]  # of (1, 15, 3, 17), threefold and twofold
        assert not list(tmp_path.glob("*.csv"))

    def test_settings(self, tmp_path: Path) -> None:
        # 0.8 becomes 0.65, so that of the bright square only one pixel is left, and nothing of the faint one.
        writer = RegionWriter(threshold=0.7, output_dir=tmp_path / "out")
        run(writer, Bright(), files(tmp_path), tmp_path, "test")
        with (tmp_path / "out/regions_test.csv").open(newline="") as file:
            assert [row["area"] for row in csv.DictReader(file)] == ["1"] * 4
        writer = RegionWriter(min_area=5, output_dir=tmp_path / "out")
        run(writer, Bright(), files(tmp_path), tmp_path, "test")
        with (tmp_path / "out/regions_test.csv").open(newline="") as file:
            assert [row["area"] for row in csv.DictReader(file)] == ["24"] * 4

    def test_a_second_run_starts_anew(self, tmp_path: Path) -> None:
        writer = RegionWriter()
        for count in (5, 3):
            run(writer, Bright(), files(tmp_path, count), tmp_path, "test")
        assert len((tmp_path / "regions_test.csv").read_text().splitlines()) == 1 + 4

    @pytest.mark.parametrize(
        ("before", "transform", "known"),
        [
            (None, None, True),
            (None, Compose([Resize((20, 30)), Normalize([0.0] * 3, [1.0] * 3)]), True),
            (None, Compose([Resize((40, 90)), CenterCrop((24, 60)), Resize((48, 30))]), True),
            (CenterCrop((30, 60)), Resize((60, 60)), True),
            (Compose([Compose([Pad(6)]), ColorJitter(0.01)]), Resize((52, 51)), True),
            (RandomHorizontalFlip(1.0), Resize((20, 45)), True),
            (RandomCrop((39, 88)), Resize((20, 45)), False),
            (Lambda(lambda image: image[..., 2:, 2:]), Resize((20, 45)), False),
        ],
    )
    @pytest.mark.parametrize("stage", ["test", "predict"])
    def test_boxes_in_the_file_hold_the_defect(
        self, stage: str, before: Transform | None, transform: Transform | None, known: bool, tmp_path: Path
    ) -> None:
        picture = np.full((40, 90, 3), 20, np.uint8)
        picture[16:22, 57:64] = 255
        Image.fromarray(picture).save(tmp_path / "0.png")
        loader = DataLoader(PredictDataset(tmp_path / "0.png", transform=before), collate_fn=ImageBatch.collate)
        run(RegionWriter(threshold=0.6), Bright(transform), loader, tmp_path, stage)
        with (tmp_path / f"regions_{stage}.csv").open(newline="") as file:
            (row,) = csv.DictReader(file)
        box = [row[f"image_{edge}"] for edge in Box._fields]
        if known:
            # Within what one pixel of the map and of the resizing covers.
            assert np.abs(np.array(box, dtype=int) - (57, 16, 64, 22)).max() <= 3
        else:
            assert box == [""] * 4

    def test_images_without_a_file(self, tmp_path: Path) -> None:
        batches = files(tmp_path, 1)
        (tmp_path / "0.png").unlink()
        run(RegionWriter(), Bright(), batches, tmp_path, "test")
        with (tmp_path / "regions_test.csv").open(newline="") as file:
            assert {row["image_x_max"] for row in csv.DictReader(file)} == {""}

    def test_of_several_processes_each_image_counts_once(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def regions_of(path: str | None, shift: float) -> list[Region]:
            # In batches of another size, scores differ in their last bits.
            return [Region(path, Box(x, 0, x + 4, 4), None, 16, 0.6 + shift, 0.7 + shift) for x in (0, 8)]

        shares = [
            [*regions_of("a.png", 0), *regions_of("c.png", 0), *regions_of(None, 0)],
            [*regions_of("b.png", 0), *regions_of("a.png", 6e-8), *regions_of(None, 0)],
        ]

        def gather(result: list, share: list) -> None:
            assert share == shares[0]
            result[:] = shares

        monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
        writer = RegionWriter(file_format="json")
        writer._regions = shares[0]
        trainer = SimpleNamespace(world_size=2, is_global_zero=True, default_root_dir=tmp_path)
        writer.finish(trainer, Bright(), "test")
        rows = json.loads((tmp_path / "regions_test.json").read_text())
        paths = ["a.png", "a.png", "c.png", "c.png", None, None, "b.png", "b.png", None, None]
        assert [row["image_path"] for row in rows] == paths
        assert [row["x_min"] for row in rows] == [0, 8] * 5

    @pytest.mark.parametrize(
        ("options", "message"),
        [({"min_area": 0}, "got 0"), ({"file_format": "xml"}, r"as .csv or .json, got 'regions.xml'")],
    )
    def test_settings_out_of_range_are_refused(self, options: dict, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            RegionWriter(**options)
