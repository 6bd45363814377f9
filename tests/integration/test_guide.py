# SPDX-License-Identifier: Apache-2.0
"""Every command and snippet of the user guide, as printed, at tiny size."""

import re
import runpy
import shlex
import shutil
import sys
import warnings
from pathlib import Path

import pytest
from anomalib.cli import AnomalibCLI

from anomalib_twostage import SuperpixelAnomaly

from .conftest import blocks, command_with, run, write_dataset

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs/guide.md").read_text()
TINY = "--trainer.max_steps=2 --trainer.val_check_interval=2"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder where the guide's paths exist."""
    folder = tmp_path_factory.mktemp("guide")
    plate = write_dataset(folder / "data", train=10, good=1, defective=4) / "plate"
    shutil.copytree(plate / "train/good", folder / "path/to/good")
    shutil.copytree(plate / "test/square", folder / "path/to/defective")
    shutil.copytree(plate / "test/square", folder / "path/to/camera")
    return folder


@pytest.fixture(scope="module")
def trained(folder: Path) -> Path:
    """The folder after the guide's training command."""
    run(f"{command_with(GUIDE, 'anomalib train')} {TINY}", folder)
    return folder


def run_here(command: str, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Run a line of `python -m` or `python -c` in this process, which spares the imports of another."""
    python, option, argument, *rest = shlex.split(command)
    assert python == "python"
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", [argument, *rest])
    if option == "-c":
        exec(argument, {})
    else:
        assert option == "-m"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # the module may have been imported by other tests
            runpy.run_module(argument, run_name="__main__")


def test_preview(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    run_here(command_with(GUIDE, "anomalib_twostage.preview"), monkeypatch, folder)
    assert "of the pixels painted" in capsys.readouterr().out
    assert (folder / "preview.png").is_file()


def test_training_leaves_pictures_and_logs_where_the_guide_says(trained: Path) -> None:
    assert "The run lies in `results/TwoStageSuperpixel/parts/latest`." in GUIDE
    latest = trained / "results/TwoStageSuperpixel/parts/latest"
    assert list((latest / "images").rglob("*.png"))
    assert (latest / "weights/lightning/model.ckpt").is_file()
    # The command of the guide stays in front and serves; this one looks at the same logs and ends.
    assert "training_examples" in run(f"{command_with(GUIDE, 'tensorboard')} --inspect", trained)


def test_predict(trained: Path) -> None:
    (writer,) = re.findall(r"`(--trainer\.callbacks \S+)`", GUIDE)
    run(f"{command_with(GUIDE, 'anomalib predict')} {writer}", trained)
    assert list((trained / "results").rglob("regions_predict.csv"))
    (pictures,) = re.findall(r"The pictures lie in `(.*?)`\.", GUIDE)
    assert len(list((trained / pictures).rglob("*.png"))) == 4


def test_export_and_inference(trained: Path) -> None:
    # In the guide's order and in one process, which spares the imports of the second.
    (trained / "snippets.py").write_text("\n".join(blocks(GUIDE, "python")))
    output = run("python snippets.py", trained)
    verdicts = re.findall(r"^(\d+)\.png: (anomalous|normal), score (0\.\d+|1\.000)$", output, flags=re.MULTILINE)
    assert len(verdicts) == 4
    for _, verdict, score in verdicts:
        assert (verdict == "anomalous") == (float(score) > 0.6)
    regions = re.findall(r"^003\.png: Box\(.*\), (\d+) pixels of the map, peak (\S+)$", output, flags=re.MULTILINE)
    assert all(int(area) >= 4 and float(peak) > 0.5 for area, peak in regions)


def test_sample_textures(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_here(command_with(GUIDE, "SampleTextures"), monkeypatch, folder)
    for name in ("datasets/SampleTextures/gravel/train/good", "datasets/SampleTextures/gravel/test/hole"):
        assert f"`{name}`" in GUIDE
        assert list((folder / name).glob("*.png"))


def test_inline_options_parse() -> None:
    (off,) = re.findall(r"`(--model\.visualizer false)`", GUIDE)
    (other,) = re.findall(r"`(--model\.visualizer anomalib\.\S+)`", GUIDE)
    (painter,) = re.findall(r"`(--model\.painter .*?)`", GUIDE)
    for options, expected in (("", "StageVisualizer"), (off, "NoneType"), (other, "ImageVisualizer")):
        arguments = ["fit", "--model", "TwoStageSuperpixel", *options.split(), *painter.split(), "--data", "MVTecAD"]
        cli = AnomalibCLI(args=arguments, run=False)
        assert type(cli.model.visualizer).__name__ == expected
        assert type(cli.model.painter) is SuperpixelAnomaly
        assert cli.model.painter.probability == 0.7


def test_the_walkthrough_is_called_as_it_says_itself() -> None:
    # tests/integration/test_walkthrough.py runs it.
    assert command_with(GUIDE, "walkthrough") in (ROOT / "examples/walkthrough.py").read_text()
    assert (ROOT / re.findall(r"`(\S+walkthrough\.py)`", GUIDE)[0]).is_file()


def test_every_command_is_covered() -> None:
    covered = ("walkthrough", "SampleTextures;", "_twostage.preview", "anomalib train", "tensorboard --", "predict")
    for command in blocks(GUIDE, "bash"):
        assert sum(word in command for word in covered) == 1, command
