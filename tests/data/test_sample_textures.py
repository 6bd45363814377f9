# SPDX-License-Identifier: Apache-2.0
import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from anomalib.data import MVTecAD
from anomalib.utils.path import get_datasets_dir
from PIL import Image
from scipy import ndimage
from skimage import color
from skimage import data as photographs
from torchvision.transforms.v2 import Resize

from anomalib_twostage.data import SampleTextures, sample_textures
from anomalib_twostage.data.defects import KINDS, paint_defect
from anomalib_twostage.data.sample_textures import CATEGORIES, COUNTS, SIZE, SPLIT_COLUMN, Crop, crops, cut

SIX_KINDS = {"crack", "foreign_body", "hole", "scratch", "smear", "stain"}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All three categories, made once; tests only read them."""
    root = tmp_path_factory.mktemp("textures")
    for category in CATEGORIES:
        SampleTextures(root=root, category=category).prepare_data()
    return root


def read(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image)


def digest(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def defects(root: Path, category: str) -> list[tuple[Crop, np.ndarray, np.ndarray, np.ndarray]]:
    """Crop, clean image, defective image and mask of every defective image on disk."""
    photograph = getattr(photographs, category)()
    return [
        (crop, cut(photograph, crop), read(root / category / crop.file), read(root / category / crop.mask_file))
        for crop in crops(category)
        if crop.label != "good"
    ]


class TestFiles:
    def test_layout_and_counts(self, root: Path) -> None:
        assert set(KINDS) == SIX_KINDS
        for category in CATEGORIES:
            folder = root / category
            assert {path.name for path in folder.iterdir()} == {"train", "test", "ground_truth", "dataset.json"}
            assert len(list((folder / "train/good").glob("*.png"))) == 100
            assert len(list((folder / "test/good").glob("*.png"))) == 20
            assert {path.name for path in (folder / "test").iterdir()} == SIX_KINDS | {"good"}
            assert {path.name for path in (folder / "ground_truth").iterdir()} == SIX_KINDS
            for kind in SIX_KINDS:
                images = sorted(path.name for path in (folder / "test" / kind).iterdir())
                masks = sorted(path.name for path in (folder / "ground_truth" / kind).iterdir())
                assert images == [f"{i:03}.png" for i in range(6)]
                assert masks == [f"{i:03}_mask.png" for i in range(6)]
        assert sum(path.stat().st_size for path in root.rglob("*.png")) < 15e6

    def test_nothing_else_is_left_behind(self, root: Path) -> None:
        assert {path.name for path in root.iterdir()} == set(CATEGORIES)

    def test_manifest(self, root: Path) -> None:
        manifest = json.loads((root / "grass/dataset.json").read_text())
        expected = {"name": "SampleTextures", "version": 1, "category": "grass", "counts": COUNTS}
        assert manifest == expected

    def test_permissions_are_the_users(self, root: Path) -> None:
        (root / "brick/plain").mkdir()
        try:
            assert (root / "brick").stat().st_mode == (root / "brick/plain").stat().st_mode
        finally:
            (root / "brick/plain").rmdir()

    def test_every_image_is_rgb(self, root: Path) -> None:
        """The file mode must not give the defects away."""
        for path in [*root.glob("*/train/*/*.png"), *root.glob("*/test/*/*.png")]:
            image = read(path)
            assert image.shape == (SIZE, SIZE, 3)
            assert image.dtype == np.uint8

    def test_pixels_belong_to_the_version(self, root: Path) -> None:
        """After a deliberate change: raise VERSION and write the new sums here.

        Sums, with a tolerance, because the last bit of a sine may differ between platforms.
        """
        assert sample_textures.VERSION == 1
        sums = {}
        for category in CATEGORIES:
            painted = defects(root, category)
            good = [read(path) for path in sorted((root / category).glob("*/good/*.png"))]
            masks = sum(int((mask > 0).sum()) for *_, mask in painted)
            colours = [float(np.mean([image[..., i] for _, _, image, _ in painted])) for i in range(3)]
            sums[category] = [masks, *colours, float(np.mean(good))]
        expected = {
            "brick": [26781, 112.626, 112.385, 112.268, 111.257],
            "grass": [25680, 119.302, 119.411, 119.598, 117.166],
            "gravel": [26720, 125.676, 125.444, 125.316, 127.782],
        }
        for category in CATEGORIES:
            assert sums[category] == pytest.approx(expected[category], rel=2e-4)


class TestRegions:
    @pytest.mark.parametrize("category", CATEGORIES)
    def test_boxes_do_not_share_a_column(self, category: str) -> None:
        layout = crops(category)
        used: dict[str, set[int]] = {"train": set(), "test": set()}
        for crop in layout:
            assert 0 <= crop.top <= 512 - SIZE
            assert 0 <= crop.left <= 512 - SIZE
            used[crop.split].update(range(crop.left, crop.left + SIZE))
        assert not used["train"] & used["test"]
        assert len({(c.top, c.left, c.quarter_turns, c.mirror) for c in layout}) == len(layout)

    @pytest.mark.parametrize("category", CATEGORIES)
    def test_files_lie_where_they_should(self, root: Path, category: str) -> None:
        """Looks every good image up in the photograph, in all eight poses, without the crop boxes."""
        photograph = getattr(photographs, category)()
        rows = np.lib.stride_tricks.sliding_window_view(photograph, (1, 24))[:, :, 0]
        places: dict[bytes, list[tuple[int, int]]] = {}
        for top in range(512 - SIZE + 1):
            for left in range(512 - SIZE + 1):
                places.setdefault(rows[top, left].tobytes(), []).append((top, left))
        for split, low, high in (("train", 0, SPLIT_COLUMN), ("test", SPLIT_COLUMN, 512)):
            poses = set()
            for path in (root / category / split / "good").glob("*.png"):
                grey = read(path)[..., 0]
                found = []
                for pose in range(8):
                    upright = np.rot90(grey[:, ::-1] if pose >= 4 else grey, pose % 4)
                    for top, left in places.get(upright[0, :24].tobytes(), []):
                        if (photograph[top : top + SIZE, left : left + SIZE] == upright).all():
                            found.append((left, pose))
                assert len(found) == 1, path
                left, pose = found[0]
                assert low <= left
                assert left + SIZE <= high
                poses.add(pose)
            # Brick has an up and a down. In pose 4 a crop is mirrored left to right.
            assert poses == {0, 4} if category == "brick" else len(poses) >= 6


class TestDefects:
    @pytest.mark.parametrize("category", CATEGORIES)
    def test_masks_are_exact(self, root: Path, category: str) -> None:
        for crop, clean, defective, mask in defects(root, category):
            assert mask.dtype == np.uint8
            assert set(np.unique(mask)) == {0, 255}
            np.testing.assert_array_equal(mask > 0, (defective != clean).any(axis=-1), err_msg=crop.file)

    @pytest.mark.parametrize("category", CATEGORIES)
    def test_defects_are_visible(self, root: Path, category: str) -> None:
        for crop, clean, defective, mask in defects(root, category):
            delta = color.deltaE_cie76(color.rgb2lab(clean), color.rgb2lab(defective))[mask > 0]
            assert delta.mean() > 11.5, crop.file
            # 2.3 is just noticeable; the rest is where the paint happens to look like the surface.
            assert (delta < 2.3).mean() < 0.15, crop.file

    @pytest.mark.parametrize("category", CATEGORIES)
    def test_sizes_vary(self, root: Path, category: str) -> None:
        shares = np.array([(mask > 0).mean() for *_, mask in defects(root, category)])
        assert shares.min() > 0.003
        assert shares.max() < 0.15
        assert shares.max() / shares.min() > 4
        assert (shares < 0.02).any()
        assert (shares > 0.06).any()

    @pytest.mark.parametrize("category", CATEGORIES)
    def test_masks_are_one_defect(self, root: Path, category: str) -> None:
        """No salt and pepper: AUPRO counts every region."""
        for crop, _, _, mask in defects(root, category):
            assert ndimage.label(mask > 0, np.ones((3, 3)))[1] <= 3, crop.file

    def test_some_defects_are_coloured_and_some_are_not(self, root: Path) -> None:
        grey = [(image == image[..., :1]).all() for c in CATEGORIES for _, _, image, _ in defects(root, c)]
        assert 0.5 < np.mean(grey) < 0.95

    @pytest.mark.parametrize("kind", sorted(SIX_KINDS))
    def test_every_kind_fits_other_images(self, kind: str) -> None:
        """Other sizes and colours than those of the data set, and the input is left alone."""
        clean = photographs.chelsea()[:96, :160]
        before = clean.copy()
        for index in range(4):
            defective, mask = paint_defect(clean, kind, index, np.random.default_rng(index))
            assert defective.shape == clean.shape
            assert defective.dtype == np.uint8
            np.testing.assert_array_equal(mask, (defective != clean).any(axis=-1))
        np.testing.assert_array_equal(clean, before)

    def test_hopeless_images_are_refused(self) -> None:
        """Four pixels hold no hole of a permitted size; better no image than an image without its defect."""
        tiny = np.zeros((4, 4, 3), np.uint8)
        with pytest.raises(RuntimeError, match="'hole'"):
            paint_defect(tiny, "hole", 0, np.random.default_rng(0))


class TestMaking:
    def test_same_bytes_again_and_without_network(
        self, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(*args: object, **kwargs: object) -> None:
            msg = "the sample textures must not use the network"
            raise AssertionError(msg)

        monkeypatch.setattr(socket.socket, "connect", refuse)
        monkeypatch.setattr(socket, "getaddrinfo", refuse)
        np.random.seed(3)  # noqa: NPY002
        torch.manual_seed(3)
        SampleTextures(root=tmp_path, category="brick", seed=5).prepare_data()
        assert digest(tmp_path / "brick") == digest(root / "brick")

    def test_categories_differ(self, root: Path) -> None:
        boxes = [[(c.top, c.left) for c in crops(category)] for category in CATEGORIES]
        assert boxes[0] != boxes[1] != boxes[2]

    def test_second_call_changes_nothing(self, root: Path) -> None:
        before = {path: path.stat().st_mtime_ns for path in (root / "gravel").rglob("*")}
        SampleTextures(root=root, category="gravel").prepare_data()
        assert {path: path.stat().st_mtime_ns for path in (root / "gravel").rglob("*")} == before

    @pytest.mark.parametrize("reason", [KeyboardInterrupt(), OSError("No space left on device")])
    def test_interruption_leaves_nothing(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reason: BaseException
    ) -> None:
        written = []
        write = sample_textures._write_png

        def fail_midway(path: Path, array: np.ndarray) -> None:
            if len(written) == 130:
                raise reason
            write(path, array)
            written.append(path)

        datamodule = SampleTextures(root=tmp_path, category="brick")
        with monkeypatch.context() as patch:
            patch.setattr(sample_textures, "_write_png", fail_midway)
            with pytest.raises(type(reason)):
                datamodule.prepare_data()
        assert len(written) == 130
        assert list(tmp_path.iterdir()) == []

        datamodule.prepare_data()
        datamodule.setup()
        assert [path.name for path in tmp_path.iterdir()] == ["brick"]

    def test_no_half_folder_is_ever_in_place(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A kill at any moment leaves no category folder: it is not there while images are written."""
        seen = []
        write = sample_textures._write_png

        def watch(path: Path, array: np.ndarray) -> None:
            write(path, array)
            seen.append((tmp_path / "brick").exists())

        monkeypatch.setattr(sample_textures, "_write_png", watch)
        SampleTextures(root=tmp_path, category="brick").prepare_data()
        assert len(seen) == 192
        assert not any(seen)

    def test_slower_of_two_makers_steps_aside(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        datamodule = SampleTextures(root=tmp_path, category="brick")
        move = sample_textures._move_into_place

        def overtaken(made: Path, folder: Path) -> None:
            shutil.copytree(made, folder)
            (folder / "dataset.json").touch()
            move(made, folder)

        monkeypatch.setattr(sample_textures, "_move_into_place", overtaken)
        datamodule.prepare_data()
        assert [path.name for path in tmp_path.iterdir()] == ["brick"]

    def test_two_processes_at_once(self, root: Path, tmp_path: Path) -> None:
        """A fresh process, with another hash seed, makes the same bytes, alone and in a race with this one."""
        program = (
            "import sys, time; from pathlib import Path\n"
            "from anomalib_twostage.data import SampleTextures\n"
            "alone, root, ready, go = map(Path, sys.argv[1:])\n"
            "SampleTextures(root=alone, category='brick').prepare_data()\n"
            "datamodule = SampleTextures(root=root, category='gravel')\n"
            "ready.touch(); deadline = time.time() + 60\n"
            "while not go.exists() and time.time() < deadline: time.sleep(0.002)\n"
            "datamodule.prepare_data(); datamodule.setup(); print(len(datamodule.train_data))\n"
        )
        paths = alone, made, ready, go = [tmp_path / name for name in ("alone", "made", "ready", "go")]
        with subprocess.Popen(
            [sys.executable, "-c", program, *map(str, paths)],
            env={**os.environ, "PYTHONHASHSEED": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            try:
                deadline = time.time() + 90
                while not ready.exists() and process.poll() is None and time.time() < deadline:
                    time.sleep(0.002)
                go.touch()
                datamodule = SampleTextures(root=made, category="gravel")
                datamodule.prepare_data()
                datamodule.setup()
                output, errors = process.communicate(timeout=60)
            finally:
                process.kill()
        assert process.returncode == 0, errors
        assert output.split()[-1] == "100"
        assert len(datamodule.train_data) == 100
        assert [path.name for path in made.iterdir()] == ["gravel"]
        assert digest(made / "gravel") == digest(root / "gravel")
        assert digest(alone / "brick") == digest(root / "brick")


class TestRefusals:
    @pytest.mark.parametrize("category", ["bottle", "", "Brick"])
    def test_unknown_category(self, category: str) -> None:
        with pytest.raises(ValueError, match=rf"'{category}'.*brick, grass, gravel"):
            SampleTextures(category=category)
        with pytest.raises(ValueError, match="brick, grass, gravel"):
            crops(category)

    @pytest.mark.parametrize("harm", ["no manifest", "broken manifest", "other version", "missing image", "empty"])
    def test_folders_that_are_not_complete(self, root: Path, tmp_path: Path, harm: str) -> None:
        folder = tmp_path / "brick"
        if harm == "empty":
            folder.mkdir()
        else:
            shutil.copytree(root / "brick", folder)
        manifest = folder / "dataset.json"
        if harm == "no manifest":
            manifest.unlink()
        elif harm == "broken manifest":
            manifest.write_text(manifest.read_text()[:20])
        elif harm == "other version":
            manifest.write_text(manifest.read_text().replace('"version": 1', '"version": 0'))
        elif harm == "missing image":
            (folder / "ground_truth/stain/003_mask.png").unlink()
        before = digest(folder)
        with pytest.raises(FileExistsError, match="delete it") as caught:
            SampleTextures(root=tmp_path, category="brick").prepare_data()
        assert str(folder) in str(caught.value)
        assert digest(folder) == before

    @pytest.mark.parametrize("below", ["", "deeper"])
    def test_root_that_cannot_be_written(self, tmp_path: Path, below: str) -> None:
        (tmp_path / "file").write_text("not a folder")
        root = tmp_path / "file" / below
        with pytest.raises(OSError, match="Cannot write the sample textures") as caught:
            SampleTextures(root=root, category="brick").prepare_data()
        assert str(root) in str(caught.value)
        assert "`root`" in str(caught.value)


class TestDatamodule:
    def test_batches(self, root: Path) -> None:
        datamodule = SampleTextures(root=root, category="gravel")
        datamodule.prepare_data()
        datamodule.setup()
        assert datamodule.name == "SampleTextures"
        assert datamodule.category == "gravel"
        assert len(datamodule.train_data) == 100
        assert len(datamodule.test_data) == len(datamodule.val_data) == 56

        batch = next(iter(datamodule.train_dataloader()))
        assert batch.image.shape == (8, 3, SIZE, SIZE)
        assert batch.image.dtype == torch.float32
        assert 0 <= batch.image.min() < batch.image.max() <= 1
        assert not batch.gt_label.any()

        for loader in (datamodule.val_dataloader(), datamodule.test_dataloader()):
            masks, labels = [], []
            for batch in loader:
                assert batch.image.shape[1:] == (3, SIZE, SIZE)
                assert batch.gt_mask.dtype == torch.bool
                masks.append(batch.gt_mask)
                labels.append(batch.gt_label)
            mask, label = torch.cat(masks), torch.cat(labels)
            assert mask.shape == (56, SIZE, SIZE)
            assert label.sum() == 36
            assert torch.equal(mask.flatten(1).any(dim=1), label.bool())

    def test_anomalib_reads_it_as_mvtec(self, root: Path) -> None:
        datamodule = MVTecAD(root=root, category="grass", num_workers=0, eval_batch_size=4)
        datamodule.prepare_data()
        datamodule.setup()
        assert len(datamodule.train_data) == 100
        assert len(datamodule.test_data) == 56
        assert next(iter(datamodule.test_dataloader())).gt_mask.shape == (4, SIZE, SIZE)

    def test_augmentations_and_splits_reach_the_data(self, root: Path) -> None:
        datamodule = SampleTextures(
            root=str(root), augmentations=Resize((64, 64)), train_batch_size=3, val_split_mode="from_test", seed=1
        )
        datamodule.prepare_data()
        datamodule.setup()
        assert next(iter(datamodule.train_dataloader())).image.shape == (3, 3, 64, 64)
        assert len(datamodule.val_data) + len(datamodule.test_data) == 56

    def test_default_roots(self) -> None:
        assert SampleTextures().root == Path("datasets/SampleTextures")
        assert SampleTextures(root=None).root == get_datasets_dir() / "SampleTextures"
