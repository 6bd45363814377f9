# SPDX-License-Identifier: Apache-2.0
"""The walk-through, from a folder of good images to an exported model's findings, at tiny size."""

import csv
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from anomalib_twostage import SampleTextures

pytestmark = pytest.mark.integration

SCRIPT = Path(__file__).parents[2] / "examples/walkthrough.py"


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folders: 30 good images, 5 defective ones, all wider than high."""
    folder = tmp_path_factory.mktemp("parts")
    SampleTextures(root=folder / "textures", category="gravel").prepare_data()
    textures = folder / "textures/gravel"
    good = sorted((textures / "train/good").glob("*.png"))[:30]
    defective = sorted((textures / "test/foreign_body").glob("*.png"))[:5]
    for name, paths in (("good", good), ("defective", defective)):
        (folder / name).mkdir()
        for path in paths:
            Image.open(path).crop((0, 0, 120, 90)).save(folder / name / path.name)
    return folder


@pytest.fixture(scope="module")
def out(images: Path) -> Path:
    (command,) = re.findall(r"^    python (.*)$", SCRIPT.read_text(), flags=re.MULTILINE)
    command = command.replace("examples/walkthrough.py", str(SCRIPT)).replace("path/to/", "")
    tiny = ["--variant", "small", "--image_size", "64", "--segment_size", "8", "--steps", "40", "--threshold", "0.4"]
    result = subprocess.run(
        [sys.executable, *command.split(), *tiny],
        cwd=images,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, (result.stdout + result.stderr)[-4000:]
    (images / "printed.txt").write_text(result.stdout)
    return images / "walkthrough"


def test_every_step_leaves_what_the_script_says(out: Path) -> None:
    promised = re.findall(r"^    (\d_\S+?)/? ", SCRIPT.read_text(), flags=re.MULTILINE)
    assert len(promised) == 6
    assert sorted(path.name for path in out.iterdir()) == sorted(promised)
    assert Image.open(out / "1_paint.png").width > 400
    assert list((out / "2_run").rglob("*.ckpt"))
    assert list((out / "2_run").rglob("events.*"))


def test_the_page_shows_a_picture_of_every_image_that_was_not_trained_on(out: Path) -> None:
    sources = re.findall(r'src="(.*?)"', (out / "3_pictures.html").read_text())
    assert len(sources) == len(set(sources)) == 30 // 5 + 5
    for source in sources:
        picture = Image.open(out / source)
        assert picture.width > 4 * picture.height  # stages of images that are wider than high
    assert sum("defective/" in source for source in sources) == 5


def test_the_scores_are_those_of_the_pictures_and_the_count_is_right(out: Path) -> None:
    rows = [line.split() for line in (out / "4_scores.txt").read_text().splitlines()]
    assert len(rows) == 11
    scores = [float(score) for score, *_ in rows]
    assert scores == sorted(scores)
    found = sum(float(score) > 0.4 and kind == "defective" for score, kind, _ in rows)
    alarms = sum(float(score) > 0.4 and kind == "good" for score, kind, _ in rows)
    printed = (out.parent / "printed.txt").read_text()
    assert f"{found} of 5 defective images found, {alarms} false alarms on 6 good ones" in printed


def test_the_exported_model_uses_the_threshold(out: Path) -> None:
    # Its agreement with the trained model is tested elsewhere: after these few steps all scores are alike, and scaling
    # by their range magnifies rounding.
    printed = (out.parent / "printed.txt").read_text()
    verdicts = re.findall(r"^(\S+\.png): (anomalous|normal), score ([01]\.\d+)$", printed, flags=re.MULTILINE)
    assert [name for name, *_ in verdicts] == sorted(path.name for path in (out.parent / "defective").iterdir())
    for name, verdict, score in verdicts:
        assert (verdict == "anomalous") == (float(score) > 0.4), name


def test_the_regions_are_tabulated_and_drawn_in_pixels_of_the_file(out: Path) -> None:
    with (out / "6_camera/regions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert rows
    for path in sorted((out.parent / "defective").iterdir()):
        before, after = (np.asarray(Image.open(file).convert("RGB")) for file in (path, out / "6_camera" / path.name))
        expected = np.zeros(before.shape[:2], dtype=bool)
        for row in rows:
            if Path(row["image_path"]).name == path.name:
                left, top, right, bottom = (int(row[f"image_{edge}"]) for edge in ("x_min", "y_min", "x_max", "y_max"))
                assert 0 <= left < right <= 120
                assert 0 <= top < bottom <= 90
                # Pillow's rectangle includes its last pixels, and its line of two pixels lies inside.
                frame = np.zeros_like(expected)
                frame[top : bottom + 1, left : right + 1] = True
                frame[top + 2 : bottom - 1, left + 2 : right - 1] = False
                expected |= frame
        assert (after[expected] == (255, 0, 0)).all()
        np.testing.assert_array_equal(after[~expected], before[~expected])
