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
from tests.inspection.page_data import read_page

from .conftest import blocks, command_with, run, write_dataset

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs/guide.md").read_text()
INSPECTION = (ROOT / "docs/inspection.md").read_text()
TINY = "--trainer.max_steps=2 --trainer.val_check_interval=2"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder where the guide's paths exist."""
    folder = tmp_path_factory.mktemp("guide")
    plate = write_dataset(folder / "data", train=30, good=1, defective=4) / "plate"
    shutil.copytree(plate / "train/good", folder / "path/to/good")
    shutil.copytree(plate / "test/square", folder / "path/to/defective")
    shutil.copytree(plate / "test/square", folder / "path/to/camera")
    return folder


@pytest.fixture(scope="module")
def trained(folder: Path) -> Path:
    """The folder after the guide's command to train with good images alone."""
    run(f"{command_with(GUIDE, 'false_alarm_rate')} {TINY}", folder)
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


def test_thirty_good_images_give_a_page_and_a_threshold(trained: Path) -> None:
    assert "The run lies in `results/TwoStageSuperpixel/parts/latest`." in GUIDE
    latest = trained / "results/TwoStageSuperpixel/parts/latest"
    assert (latest / "weights/lightning/model.ckpt").is_file()
    assert len(list((latest / "images").rglob("*.png"))) == 9
    data, remarks = read_page(latest / "inspection")
    assert remarks == ["The model's thresholds come from 9 good images alone, for 10 % false alarms."]
    assert data["imageThreshold"] == 0.5
    assert [image["truth"] for image in data["images"]] == [False] * 9
    # The threshold stands where one in ten is called defective; these nine gave it, and none is above.
    assert max(image["score"] for image in data["images"]) <= 0.5


def test_training_with_defective_images_is_logged(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "path").symlink_to(folder / "path")
    run(f"{command_with(GUIDE, 'abnormal_dir')} {TINY}", tmp_path)
    data, remarks = read_page(tmp_path / "results/TwoStageSuperpixel/parts/latest/inspection")
    assert not any("good images alone" in remark for remark in remarks)
    assert {image["truth"] for image in data["images"]} == {True, False}
    # The command of the guide stays in front and serves; this one looks at the same logs and ends.
    assert "training_examples" in run(f"{command_with(GUIDE, 'tensorboard')} --inspect", tmp_path)


def test_predict(trained: Path) -> None:
    (writer,) = re.findall(r"`(--trainer\.callbacks\+ \S+)`", GUIDE)
    run(f"{command_with(GUIDE, 'anomalib predict')} {writer}", trained)
    assert list((trained / "results").rglob("regions_predict.csv"))
    pictures, page = re.findall(r"The pictures lie in `(.*?)`, the page in `(.*?)`\.", GUIDE)[0]
    assert len(list((trained / pictures).rglob("*.png"))) == 4
    data, _ = read_page(trained / page)
    assert [image["name"] for image in data["images"]] == [f"{i:03}.png" for i in range(4)]
    assert [image["truth"] for image in data["images"]] == [None] * 4


def test_the_commands_of_the_inspection_page(trained: Path) -> None:
    shutil.copy(trained / "results/TwoStageSuperpixel/parts/latest/weights/lightning/model.ckpt", trained / "path/to")
    run(command_with(INSPECTION, "anomalib test"), trained)
    assert "`results/TwoStageSuperpixel/parts/latest/inspection`" in INSPECTION
    tested, _ = read_page(trained / "results/TwoStageSuperpixel/parts/latest/inspection")
    assert any(image["truth"] for image in tested["images"])
    (snippet,) = (block for block in blocks(INSPECTION, "python") if "torch.save" in block)
    (trained / "save.py").write_text(snippet)
    run("python save.py", trained)
    run(command_with(INSPECTION, "anomalib_twostage.inspect"), trained)
    data, remarks = read_page(trained / "inspection")
    assert [image["name"] for image in data["images"]] == [f"{i:03}.png" for i in range(4)]
    assert remarks == []


def test_export_and_inference(trained: Path) -> None:
    # In the guide's order and in one process, which spares the imports of the second.
    # Peaks to the last digit: one just above the threshold must not look like one on it.
    code = "\n".join(blocks(GUIDE, "python")).replace("{region.peak_score:.3f}", "{region.peak_score!r}")
    (trained / "snippets.py").write_text(code)
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
    (size,) = re.findall(r"`(--model\.pre_processor .*?)`", GUIDE, flags=re.DOTALL)
    for options, expected in (("", "StageVisualizer"), (off, "NoneType"), (other, "ImageVisualizer")):
        arguments = [
            "fit",
            "--model",
            "TwoStageSuperpixel",
            *options.split(),
            *painter.split(),
            "--data",
            "MVTecAD",
            *size.split(),
        ]
        cli = AnomalibCLI(args=arguments, run=False)
        assert type(cli.model.visualizer).__name__ == expected
        assert type(cli.model.painter) is SuperpixelAnomaly
        assert cli.model.painter.probability == 0.7
        assert cli.model.input_size == (512, 512)


def test_the_walkthrough_is_called_as_it_says_itself() -> None:
    # tests/integration/test_walkthrough.py runs it.
    assert command_with(GUIDE, "walkthrough") in (ROOT / "examples/walkthrough.py").read_text()
    assert (ROOT / re.findall(r"`(\S+walkthrough\.py)`", GUIDE)[0]).is_file()


def test_every_command_is_covered() -> None:
    covered = (
        "walkthrough",
        "SampleTextures;",
        "_twostage.preview",
        "false_alarm_rate",
        "abnormal_dir",
        "tensorboard --",
        "predict",
    )
    for command in blocks(GUIDE, "bash"):
        assert sum(word in command for word in covered) == 1, command
