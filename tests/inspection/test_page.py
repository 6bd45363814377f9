# SPDX-License-Identifier: Apache-2.0
import errno
import pickle
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from anomalib.cli import AnomalibCLI
from anomalib.data import ImageBatch, InferenceBatch, NumpyImageBatch, PredictDataset, VideoBatch
from anomalib.engine import Engine
from anomalib.models import Padim
from anomalib.post_processing import PostProcessor
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import CenterCrop, Compose, Resize

from anomalib_twostage import InspectionPage, MidwayPostProcessor, TwoStageSuperpixel, find_regions, write_page
from anomalib_twostage.inspection.page.command import main

from .page_data import SIDE, huge_image, predictions, read_page
from .test_regions import Bright, files, run

SCORES, TRUTHS = [0.2, 0.9, 0.4, 0.7, 0.55], [False, True, True, True, False]


def picture(folder: Path, kind: str, key: str) -> np.ndarray:
    suffix = "png" if kind in ("maps", "truths") else "jpg"
    return np.asarray(Image.open(folder / kind / f"{key}.{suffix}"))


def contents(folder: Path) -> dict[Path, bytes]:
    """What each file in a folder holds, or the file itself."""
    return {path: path.read_bytes() for path in (folder, *folder.rglob("*")) if path.is_file()}


class TestWritePage:
    def test_every_image_with_its_score_truth_map_and_regions(self, tmp_path: Path) -> None:
        batch = predictions(SCORES, TRUTHS)
        index = write_page([batch], tmp_path / "page")
        assert index == tmp_path / "page/index.html"
        data, remarks = read_page(index.parent)
        assert (data["imageThreshold"], data["pixelThreshold"], data["mapRange"]) == (0.5, 0.5, [0, 1])
        assert remarks == []
        for i, (item, image) in enumerate(zip(batch, data["images"], strict=True)):
            assert image["score"] == float(torch.tensor(SCORES[i]))
            assert (image["truth"], image["folder"]) == (TRUTHS[i], "bad" if TRUTHS[i] else "good")
            assert (image["name"], image["path"]) == (f"{i:03}.png", batch.image_path[i])
            shades = picture(index.parent, "maps", image["key"])
            np.testing.assert_array_equal(shades, (batch.anomaly_map[i].numpy() * 255).round())
            assert (index.parent / f"truths/{image['key']}.png").exists() == TRUTHS[i] == image["truthMask"]
            if TRUTHS[i]:
                np.testing.assert_array_equal(picture(index.parent, "truths", image["key"]) > 0, batch.gt_mask[i])
            assert abs(picture(index.parent, "thumbs", image["key"]).astype(int) - 128).max() <= 1
            expected = [
                [*(edge / SIDE for edge in r.box), r.area, r.mean_score, r.peak_score] for r in find_regions(item)
            ]
            np.testing.assert_allclose(np.ravel(image["regions"]), np.ravel(expected), atol=1e-5)
            assert image["numRegions"] == len(expected) == (SCORES[i] > 0.5)

    def test_large_pictures_are_the_files_where_the_model_saw_all_of_them(self, tmp_path: Path) -> None:
        Image.new("RGB", (900, 300), (200, 30, 30)).save(tmp_path / "a.png")
        batch = predictions([0.7], image_path=[str(tmp_path / "a.png")])
        for whole, size, color in ((True, (300, 100), (200, 30, 30)), (False, (32, 32), (128, 128, 128))):
            page = write_page([batch], tmp_path / "page", picture_size=300, whole=whole).parent
            (image,) = read_page(page)[0]["images"]
            pixels = picture(page, "images", image["key"])
            assert pixels.shape[1::-1] == size
            assert abs(pixels.astype(int) - color).max() < 6
            assert image["size"] == ([900, 300] if whole else [32, 32])

    def test_deep_broken_and_huge_files_and_normalized_images_are_shown_as_the_model_saw_them(
        self, tmp_path: Path
    ) -> None:
        Image.fromarray(np.full((8, 8), 60000, np.uint16)).save(tmp_path / "deep.png")
        (tmp_path / "broken.png").write_bytes(b"no image")
        images = torch.stack(
            [
                torch.full((3, SIDE, SIDE), 0.25),
                torch.linspace(-3, 3, 3 * SIDE**2).view(3, SIDE, SIDE),
                torch.ones(3, SIDE, SIDE),
            ]
        )
        (tmp_path / "huge.bmp").write_bytes(huge_image())
        paths = [str(tmp_path / name) for name in ("deep.png", "broken.png", "huge.bmp")]
        page = write_page([predictions([0.1, 0.2, 0.3], image=images, image_path=paths)], tmp_path / "page").parent
        assert abs(picture(page, "images", "00001").astype(int) - 64).max() <= 1
        assert picture(page, "images", "00003").min() >= 254
        stretched = picture(page, "images", "00002")
        assert stretched.min() < 20
        assert stretched.max() > 235

    def test_raw_maps_share_one_scale(self, tmp_path: Path) -> None:
        batches = [predictions([scores]) for scores in (0.5, 4.0, 20.0)]
        page = write_page(batches, tmp_path / "page").parent
        data, _ = read_page(page)
        low, high = data["mapRange"]
        assert (low, high) == pytest.approx((0, 20))
        for batch, image in zip(batches, data["images"], strict=True):
            values = picture(page, "maps", image["key"]) / 255 * (high - low) + low
            np.testing.assert_allclose(values, batch.anomaly_map[0], atol=0.06)

    def test_large_maps_keep_their_peaks(self, tmp_path: Path) -> None:
        maps = torch.zeros(1, 1000, 400)
        maps[0, 500, 200] = 0.9
        page = write_page([InferenceBatch(anomaly_map=maps, pred_score=torch.tensor([0.9]))], tmp_path / "page").parent
        shades = picture(page, "maps", "00001")
        assert shades.shape == (256, 102)
        assert shades.max() == round(0.9 * 255)

    def test_items_arrays_and_bare_predictions(self, tmp_path: Path) -> None:
        batch = predictions(SCORES, TRUTHS)
        bare = InferenceBatch(anomaly_map=batch.anomaly_map.unsqueeze(1), pred_score=batch.pred_score.unsqueeze(1))
        arrays = SimpleNamespace(
            anomaly_map=batch.anomaly_map.numpy(),
            pred_mask=batch.pred_mask.unsqueeze(-1).numpy(),
            pred_score=batch.pred_score.numpy(),
        )
        expected = None
        for made_of in ([batch], list(batch), [bare], [arrays], [batch.to_numpy()]):
            data, _ = read_page(write_page(made_of, tmp_path / "page").parent)
            kept = [(image["score"], image["map"], image["regions"]) for image in data["images"]]
            expected = expected or kept
            assert kept == expected
        data, _ = read_page(write_page([bare], tmp_path / "page").parent)
        assert [image["name"] for image in data["images"]] == [f"image {i}" for i in range(1, 6)]

    @pytest.mark.parametrize("channels", [1, 3])
    def test_arrays_with_their_channels_last_are_shown_as_tensors_are(self, channels: int, tmp_path: Path) -> None:
        # Also one that is as high as others have channels.
        for sides in ((20, 24), (3, 24)):
            images = torch.rand(2, channels, *sides)
            tensors = InferenceBatch(pred_score=torch.tensor([0.2, 0.8]), anomaly_map=torch.rand(2, 32, 32))
            arrays = NumpyImageBatch(
                image=images.permute(0, 2, 3, 1).numpy(),
                pred_score=tensors.pred_score.numpy(),
                anomaly_map=tensors.anomaly_map.numpy(),
            )
            expected = write_page([SimpleNamespace(**tensors._asdict(), image=images)], tmp_path / "expected").parent
            for made_of in ([arrays], list(arrays)):
                page = write_page(made_of, tmp_path / "page").parent
                assert [image["size"] for image in read_page(page)[0]["images"]] == [list(sides[::-1])] * 2
                for kind in ("images", "thumbs"):
                    for key in ("00001", "00002"):
                        np.testing.assert_array_equal(picture(page, kind, key), picture(expected, kind, key))

    def test_names_are_data(self, tmp_path: Path) -> None:
        names = [
            "<script>alert(1)</script>.png",
            "a\"'&<!--.png",
            "\u2028 日本.png",
            "</script>",
            "bad\udcff.png",
            "a\nb.png",
        ]
        paths = [f"/x/{i}/{name}" for i, name in enumerate(names)]
        page = write_page([predictions([0.1] * 6, image_path=paths)], tmp_path / "page", title="<i>t</i>").parent
        html = (page / "index.html").read_text(encoding="utf-8")
        assert "alert" not in re.sub(r"\\u003c.*?\\u003e", "", html.replace("\\u003cscript\\u003ealert(1)", ""))
        assert "<i>" not in html
        images = read_page(page)[0]["images"]
        assert [image["path"] for image in images] == paths
        assert [image["name"] for image in images][:3] == ["script>.png", names[1], names[2]]
        assert images[0]["folder"] == "0/<script>alert(1)<"

    def test_it_needs_nothing_from_elsewhere(self, tmp_path: Path) -> None:
        page = write_page([predictions(SCORES, TRUTHS)], tmp_path / "page").parent
        for path in page.iterdir():
            if path.is_file():
                text = path.read_text(encoding="utf-8")
                assert not re.search(r"https?:|//[a-z]+\.|@import|fetch\(|XMLHttpRequest", text), path
                for name in re.findall(r'(?:src|href)="([^"{]+)"', text):
                    assert (page / name).is_file()

    def test_an_older_page_is_replaced_whole(self, tmp_path: Path) -> None:
        write_page([predictions([0.1] * 4)], tmp_path / "page")
        write_page([predictions([0.9])], tmp_path / "page")
        assert len(list((tmp_path / "page/maps").iterdir())) == 1
        assert [path.name for path in tmp_path.iterdir()] == ["page"]

    @pytest.mark.parametrize("name", [".DS_Store", "images/.DS_Store", "Thumbs.db", "images/Thumbs.db", "desktop.ini"])
    def test_a_file_manager_does_not_make_an_older_page_anything_else(self, name: str, tmp_path: Path) -> None:
        page = write_page([predictions([0.1] * 4)], tmp_path / "page").parent
        (page / name).write_text("positions of icons")
        write_page([predictions([0.9])], page)
        assert len(list((page / "maps").iterdir())) == 1

    @pytest.mark.parametrize(
        "name", ["notes.txt", "images/holiday.jpg", "images/00001.png", "maps/more/a.txt", "stages"]
    )
    def test_what_else_lies_in_an_older_page_is_kept(self, name: str, tmp_path: Path) -> None:
        page = write_page([predictions([0.1], [True])], tmp_path / "page").parent
        (page / name).parent.mkdir(exist_ok=True)
        (page / name).write_text("mine")
        before = contents(tmp_path)
        entry = name.removesuffix("/a.txt")
        with pytest.raises(FileExistsError, match=rf"{page} holds something else .*{entry}.* name another"):
            write_page([predictions([0.9])], page)
        assert contents(tmp_path) == before

    @pytest.mark.parametrize("older", [True, False])
    @pytest.mark.parametrize("name", [".", "notes.txt", "images/holiday.jpg"])
    def test_what_comes_into_the_folder_on_the_way_is_kept_and_so_is_the_new_page(
        self, name: str, older: bool, tmp_path: Path
    ) -> None:
        page, mine = tmp_path / "page", tmp_path / "page" / name
        before: dict[Path, bytes] = {}

        def batches() -> Iterator[ImageBatch]:
            yield predictions([0.1])
            if name == ".":
                shutil.rmtree(page, ignore_errors=True)
            mine.parent.mkdir(parents=True, exist_ok=True)
            mine.write_text("mine")
            before.update(contents(page))
            yield predictions([0.9])

        kept = []
        for _ in range(2):  # the second page is not kept in the place of the first
            if page.is_dir():
                shutil.rmtree(page)
            page.unlink(missing_ok=True)
            if older:
                write_page([predictions([0.3])], page)
            before.clear()
            with pytest.raises(FileExistsError, match=rf"{page}\S* came to lie .* name another") as raised:
                write_page(batches(), page)
            assert contents(page) == before
            (place,) = re.findall(r"The new page is (\S+)/index.html", str(raised.value))
            kept.append(Path(place))
            for folder in kept:
                assert [image["score"] for image in read_page(folder)[0]["images"]] == pytest.approx([0.1, 0.9])
        assert set(tmp_path.iterdir()) == {page, *kept}
        assert len(set(kept)) == 2

    def test_what_fails_leaves_the_older_page_and_nothing_else(self, tmp_path: Path) -> None:
        page = write_page([predictions([0.1])], tmp_path / "page").parent
        before = (page / "index.html").read_bytes()
        with pytest.raises(ValueError, match="nothing to sort by"):
            write_page([predictions([0.2]), SimpleNamespace(pred_label=torch.tensor([True]))], page)
        assert (page / "index.html").read_bytes() == before
        assert [path.name for path in tmp_path.iterdir()] == ["page"]


class TestWhatIsWrong:
    @pytest.mark.parametrize(
        ("batches", "error", "message"),
        [
            ([], ValueError, "no predictions"),
            (
                [InferenceBatch(pred_label=torch.tensor([True]))],
                ValueError,
                "no score.*VlmAd.*no anomaly map.*Ganomaly",
            ),
            ([InferenceBatch(pred_score=torch.rand(2), anomaly_map=torch.rand(3, 4, 4))], ValueError, "3 maps for 2"),
            ([VideoBatch(image=torch.rand(1, 2, 3, 8, 8), pred_score=torch.rand(1))], TypeError, "holds videos"),
            ([predictions([0.45, 0.2], threshold=0.4)], ValueError, r"1 of 2 .*000.png.*0.45.*image_sensitivity"),
        ],
    )
    def test_predictions(self, batches: list, error: type, message: str, tmp_path: Path) -> None:
        with pytest.raises(error, match=message):
            write_page(batches, tmp_path / "page")
        assert list(tmp_path.iterdir()) == []

    def test_folders(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        (tmp_path / "full").mkdir()
        (tmp_path / "full/precious.txt").touch()
        for name, message in (("file", "is a file"), ("full", "something else"), ("file/page", "Cannot write")):
            with pytest.raises(OSError, match=message):
                write_page([predictions([0.1])], tmp_path / name)
        assert (tmp_path / "full/precious.txt").exists()
        assert len(list(tmp_path.iterdir())) == 2

    def test_a_mount_point(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "out").mkdir()
        monkeypatch.setattr(Path, "is_mount", lambda path: path.name == "out")
        with pytest.raises(OSError, match=r"out is a mount point.*name a folder in it, such as .*out/inspection"):
            write_page([predictions([0.1])], tmp_path / "out")
        assert write_page([predictions([0.1])], tmp_path / "out/inspection").exists()

    @pytest.mark.skipif(
        not Path("/proc/self").exists(), reason="needs a folder where nobody may write, as Linux's /proc"
    )
    def test_a_place_where_nobody_may_write(self) -> None:
        with pytest.raises(OSError, match=r"Cannot write the inspection page to /proc/page \(.+\): free the place or"):
            write_page([predictions([0.1])], "/proc/page")

    @pytest.mark.parametrize("full_at", ["thumbs/00002.jpg", "maps/00002.png", "page.css", "index.html"])
    def test_a_disk_that_fills_up(self, full_at: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        page = write_page([predictions([0.1])], tmp_path / "page").parent
        before = sorted(page.rglob("*")), (page / "index.html").read_bytes()
        originals = Image.Image.save, shutil.copyfile, Path.write_text

        def full(path: Path) -> None:
            if str(path).endswith(full_at):
                raise OSError(errno.ENOSPC, "No space left on device")

        def save(self: Image.Image, path: Path, **options: object) -> None:
            full(path)
            originals[0](self, path, **options)

        def copyfile(source: Path, target: Path) -> None:
            full(target)
            originals[1](source, target)

        def write_text(self: Path, *args: str, **options: object) -> None:
            full(self)
            originals[2](self, *args, **options)

        monkeypatch.setattr(Image.Image, "save", save)
        monkeypatch.setattr(shutil, "copyfile", copyfile)
        monkeypatch.setattr(Path, "write_text", write_text)
        with pytest.raises(OSError, match=r"to .*/page \(No space left on device\): free the place or name another"):
            write_page([predictions([0.2, 0.3])], page)
        assert (sorted(page.rglob("*")), (page / "index.html").read_bytes()) == before
        assert [path.name for path in tmp_path.iterdir()] == ["page"]

    def test_settings(self, tmp_path: Path) -> None:
        for settings in ({"picture_size": 10}, {"min_area": 0}):
            with pytest.raises(ValueError, match=f"{next(iter(settings))} must be at least"):
                InspectionPage(**settings)
            with pytest.raises(ValueError, match=f"{next(iter(settings))} must be at least"):
                write_page([predictions([0.1])], tmp_path / "page", **settings)

    def test_scores_that_are_no_numbers(self, tmp_path: Path) -> None:
        data, remarks = read_page(write_page([predictions([0.2, float("nan"), 0.8])], tmp_path / "page").parent)
        assert [image["score"] for image in data["images"]] == pytest.approx([0.2, None, 0.8])
        assert remarks == [
            "1 of 3 scores are no numbers (NaN). anomalib calls such images normal; here they stand first, and count "
            "nowhere."
        ]

    def test_without_maps_or_scores(self, tmp_path: Path) -> None:
        data, (_, remark) = read_page(write_page([InferenceBatch(pred_score=torch.rand(2))], tmp_path / "page").parent)
        assert "Dfkde, Ganomaly and Dfm" in remark
        assert not any(image["map"] or image["picture"] or image["regions"] for image in data["images"])
        maps = torch.rand(2, 1, 8, 8)
        data, (_, remark) = read_page(write_page([InferenceBatch(anomaly_map=maps)], tmp_path / "page").parent)
        assert "highest value" in remark
        assert [image["score"] for image in data["images"]] == maps.amax(dim=(1, 2, 3)).tolist()

    def test_maps_that_are_no_numbers(self, tmp_path: Path) -> None:
        maps = torch.full((2, 8, 8), float("nan"))
        maps[1] = 0.6
        batch = predictions([0.7, 0.6], anomaly_map=maps, pred_mask=None)
        page = write_page([batch], tmp_path / "page").parent
        assert picture(page, "maps", "00001").max() == 0
        assert (picture(page, "maps", "00002") == 153).all()
        assert [len(image["regions"]) for image in read_page(page)[0]["images"]] == [0, 1]
        (image,) = read_page(write_page([InferenceBatch(anomaly_map=maps[:1])], page).parent)[0]["images"]
        assert image["score"] is None

    @pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")])
    def test_regions_that_are_not_finite(self, value: float, tmp_path: Path) -> None:
        batch = predictions([0.9, 0.8])
        batch.anomaly_map[0, 4:12, :8] = value
        page = write_page([batch], tmp_path / "page").parent
        data, _ = read_page(page)
        assert data["mapRange"] == [0, 1]
        assert [image["regions"][0][4:] for image in data["images"]] == [
            [64, None, None],
            pytest.approx([64, 0.8, 0.8]),
        ]
        assert (picture(page, "maps", "00001")[4:12, :8] == (255 if value > 0 else 0)).all()

    def test_files_that_were_predicted_twice_are_both_shown(self, tmp_path: Path) -> None:
        batches = [predictions([0.1, 0.2]), predictions([0.3, 0.4])]
        data, (remark,) = read_page(write_page(batches, tmp_path / "page").parent)
        assert remark == "2 files were predicted more than once; each prediction is shown."
        assert len({image["key"] for image in data["images"]}) == 4


class TestCommand:
    def test_a_file_and_a_folder_of_files(self, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
        batches = [predictions(SCORES, TRUTHS), predictions([0.3]).to_numpy()]
        torch.save(batches, tmp_path / "all.pt")
        (tmp_path / "parts").mkdir()
        for i, batch in enumerate(batches):
            torch.save(batch, tmp_path / f"parts/{i}.pt")
        images = []
        for name in ("all.pt", "parts"):
            main([str(tmp_path / name), "--out", str(tmp_path / f"page of {name}"), "--title", "Line 3"])
            assert f"Wrote {tmp_path}/page of {name}/index.html." in capsys.readouterr().out
            images.append(read_page(tmp_path / f"page of {name}")[0]["images"])
        assert images[0] == images[1]
        assert len(images[0]) == 6

    def test_predictions_without_verdicts_may_be_raw(self, tmp_path: Path) -> None:
        raw = predictions([2.4, 2.3])
        raw.pred_label = None
        torch.save(raw, tmp_path / "raw.pt")
        main([str(tmp_path / "raw.pt"), "--out", str(tmp_path / "page")])
        (remark,) = read_page(tmp_path / "page")[1]
        assert "no verdicts" in remark
        assert "0.5 is where the page begins" in remark

    def test_the_sensitivity_of_the_predictions(self, tmp_path: Path) -> None:
        torch.save(predictions([0.45, 0.2], threshold=0.4), tmp_path / "a.pt")
        main([str(tmp_path / "a.pt"), "--out", str(tmp_path / "page"), "--image_sensitivity", "0.6"])
        assert read_page(tmp_path / "page")[0]["imageThreshold"] == pytest.approx(0.4)

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("missing", "There is no missing"),
            ("empty", "The folder empty holds no .pt file"),
            ("evil.pt", "evil.pt holds more than predictions"),
            ("text.pt", "text.pt is no file of torch.save|text.pt holds more"),
            ("cut.pt", "cut.pt is no file of torch.save"),
            ("nothing.pt", "nothing.pt is no file of torch.save"),
            ("begun.pt", "begun.pt is no file of torch.save"),
            ("damaged.pt", "damaged.pt is no file of torch.save"),
            ("weights.pt", "weights.pt holds a dict"),
            ("none.pt", "There are no predictions"),
            ("verdicts.pt", "nothing to sort by.*VlmAd gives verdicts alone.*Dfkde, Ganomaly"),
        ],
    )
    def test_what_is_wrong_is_named_and_nothing_is_written(
        self, name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
    ) -> None:
        class Evil:
            def __reduce__(self) -> tuple:
                return Path.touch, (tmp_path / "executed",)

        monkeypatch.chdir(tmp_path)
        Path("empty").mkdir()
        torch.save([Evil()], "evil.pt")
        Path("text.pt").write_text("no predictions")
        torch.save(predictions(SCORES), "cut.pt")
        Path("cut.pt").write_bytes(Path("cut.pt").read_bytes()[:-2000])
        Path("nothing.pt").touch()
        Path("begun.pt").write_bytes(b"\x80\x02")
        torch.save(["name" * 9], "damaged.pt")
        Path("damaged.pt").write_bytes(Path("damaged.pt").read_bytes().replace(b"namename", b"\xffamename"))
        torch.save({"weight": torch.zeros(2)}, "weights.pt")
        torch.save([], "none.pt")
        torch.save([InferenceBatch(pred_label=torch.tensor([True]))], "verdicts.pt")
        with pytest.raises(SystemExit) as stop:
            main([name])
        assert stop.value.code == 2
        assert re.search(message, capsys.readouterr().err)
        assert not Path("executed").exists()
        assert not Path("inspection").exists()
        with pytest.raises(pickle.UnpicklingError):
            torch.load("evil.pt", weights_only=True)


@pytest.mark.filterwarnings("ignore::UserWarning")
class TestCallback:
    @pytest.mark.parametrize("stage", ["test", "predict"])
    def test_writes_a_page_of_the_post_processed_predictions(self, stage: str, tmp_path: Path) -> None:
        run(InspectionPage(picture_size=64), Bright(), files(tmp_path), tmp_path, stage)
        data, _ = read_page(tmp_path / "inspection")
        # Normalised by the post-processor: (1 - 0.5) / 2 + 0.5, and the second image is dark.
        assert [image["score"] for image in data["images"]] == pytest.approx([0.75, 0.3, 0.75, 0.75, 0.75])
        assert [len(image["regions"]) for image in data["images"]] == [2, 0, 2, 2, 2]
        assert [image["size"] for image in data["images"]] == [[90, 40]] * 5
        assert f"<title>Bright, {stage}</title>" in (tmp_path / "inspection/index.html").read_text()
        assert picture(tmp_path / "inspection", "images", "00001").shape == (28, 64, 3)

    def test_after_a_crop_it_shows_what_the_model_saw(self, tmp_path: Path) -> None:
        model = Bright(Compose([Resize((40, 60)), CenterCrop((20, 30))]))
        run(InspectionPage(tmp_path / "out"), model, files(tmp_path, 1), tmp_path, "test")
        assert read_page(tmp_path / "out")[0]["images"][0]["size"] == [30, 20]
        cropped = PredictDataset(tmp_path / "0.png", transform=CenterCrop((30, 20)))
        loader = DataLoader(cropped, collate_fn=ImageBatch.collate)
        run(InspectionPage(tmp_path / "data"), Bright(), loader, tmp_path, "test")
        assert read_page(tmp_path / "data")[0]["images"][0]["size"] == [20, 30]

    def test_the_post_processors_thresholds(self, tmp_path: Path) -> None:
        model = Bright()
        model.post_processor.image_sensitivity, model.post_processor.pixel_sensitivity = 0.2, 0.9
        run(InspectionPage(), model, files(tmp_path, 2), tmp_path, "test")
        data, _ = read_page(tmp_path / "inspection")
        assert (data["imageThreshold"], data["pixelThreshold"]) == pytest.approx((0.8, 0.1))
        assert all(image["regions"] for image in data["images"])

    def test_remarks_on_the_threshold(self, tmp_path: Path) -> None:
        model = Bright()
        state = model.post_processor.state_dict()
        model.post_processor = MidwayPostProcessor(false_alarm_rate=0.01)
        model.post_processor.load_state_dict(state)
        model.post_processor.num_good_images = 30
        run(InspectionPage(), model, files(tmp_path, 2), tmp_path, "test")
        assert read_page(tmp_path / "inspection")[1] == [
            "The model's thresholds come from 30 good images alone, for 1 % false alarms, but 30 images cannot tell "
            "rates below 3.2 %."
        ]
        model.post_processor = None
        model.configure_callbacks = list
        run(InspectionPage(), model, files(tmp_path, 2), tmp_path, "test")
        assert "no post-processor" in read_page(tmp_path / "inspection")[1][0]
        untrained = Bright()
        untrained.post_processor = PostProcessor()
        run(InspectionPage(), untrained, files(tmp_path, 2), tmp_path, "test")
        assert "were never measured" in read_page(tmp_path / "inspection")[1][0]

    def test_an_error_on_the_way_leaves_nothing(self, tmp_path: Path) -> None:
        class Failing(Bright):
            message = "on the way"

            def test_step(self, batch: ImageBatch, batch_idx: int) -> ImageBatch:
                if batch_idx == 2:
                    raise RuntimeError(self.message)
                return super().test_step(batch, batch_idx)

        batches = files(tmp_path)
        before = set(tmp_path.iterdir())
        with pytest.raises(RuntimeError, match="on the way"):
            run(InspectionPage(), Failing(), batches, tmp_path, "test")
        assert set(tmp_path.iterdir()) == before

    def test_a_folder_that_cannot_be_written_is_said_before_the_first_image(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()

        class Unreached(Bright):
            def test_step(self, batch: ImageBatch, batch_idx: int) -> ImageBatch:
                raise AssertionError

        with pytest.raises(OSError, match=r"Cannot write the inspection page to .*file/page"):
            run(InspectionPage(tmp_path / "file/page"), Unreached(), files(tmp_path, 1), tmp_path, "test")

    def test_any_model_of_anomalib_and_the_stages_of_ours(self, tmp_path: Path) -> None:
        (tmp_path / "parts").mkdir()
        for name in "ab":
            pixels = np.random.default_rng(ord(name)).integers(0, 255, (64, 64, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / f"parts/{name}.png")
        padim = Padim("resnet18", ["layer1"], pre_trained=False, n_features=8, visualizer=False)
        padim.pre_processor = Padim.configure_pre_processor((64, 64))
        padim.model.gaussian.mean = torch.zeros(8, 256)
        padim.model.gaussian.inv_covariance = torch.eye(8).expand(256, 8, 8)
        pre_processor = TwoStageSuperpixel.configure_pre_processor((64, 64))
        ours = TwoStageSuperpixel("small", segment_size=8, pre_processor=pre_processor, visualizer=False)
        for model in (padim, ours):
            engine = Engine(
                callbacks=[InspectionPage(tmp_path / "page")],
                accelerator="cpu",
                default_root_dir=tmp_path / "results",
                logger=False,
                enable_progress_bar=False,
            )
            engine.predict(model, dataset=PredictDataset(tmp_path / "parts"))
            data, _ = read_page(tmp_path / "page")
            assert [image["name"] for image in data["images"]] == ["a.png", "b.png"]
            assert all(image["map"] and image["picture"] and image["truth"] is None for image in data["images"])
            assert [image["stages"] for image in data["images"]] == [model is ours] * 2
        assert picture(tmp_path / "page", "stages", "00002").shape == (192, 576, 3)

    def test_the_command_line_takes_it(self) -> None:
        options = ["--trainer.callbacks", "anomalib_twostage.InspectionPage", "--trainer.callbacks.picture_size", "128"]
        cli = AnomalibCLI(args=["fit", "--model", "TwoStageSuperpixel", "--data", "MVTecAD", *options], run=False)
        (page,) = (c for c in cli.engine._cache.args["callbacks"] if isinstance(c, InspectionPage))
        assert page.picture_size == 128
