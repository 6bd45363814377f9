# SPDX-License-Identifier: Apache-2.0
"""Every command and snippet of the README, as printed, at tiny size. The two install commands are run by .ci/run."""

import re
import shutil
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from PIL import Image

from .conftest import blocks, command_with, run, write_dataset

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
TINY = "--trainer.max_epochs=1 --trainer.limit_train_batches=2 --trainer.check_val_every_n_epoch=1"
TINY_STEPS = "--trainer.max_steps=2 --trainer.val_check_interval=2"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder where the README's paths exist."""
    folder = tmp_path_factory.mktemp("readme")
    mvtec = folder / "path/to/MVTecAD"
    write_dataset(mvtec, train=4, good=2, defective=2)
    (mvtec / "plate").rename(mvtec / "bottle")
    shutil.copytree(mvtec / "bottle/train/good", folder / "path/to/images/good")
    shutil.copytree(mvtec / "bottle/test/square", folder / "path/to/images/defective")
    (folder / "configs").symlink_to(ROOT / "configs")
    return folder


@pytest.fixture(scope="module")
def checkpoint(folder: Path) -> Path:
    """What the README's MVTec AD command leaves behind, where the README's next commands look for it."""
    run(f"{command_with(README, '--data MVTecAD')} {TINY_STEPS} --data.num_workers=0", folder)
    (saved,) = (folder / "results/TwoStageSuperpixel/MVTecAD").rglob("*.ckpt")
    target = folder / "path/to/model.ckpt"
    shutil.copy(saved, target)
    return target


def test_train_on_own_images(folder: Path) -> None:
    run(f"{command_with(README, '--data Folder')} {TINY}", folder)
    assert list((folder / "results/TwoStageSuperpixel/parts").rglob("*.ckpt"))


def test_predict_own_images(folder: Path, checkpoint: Path) -> None:
    assert checkpoint.exists()
    run(command_with(README, "anomalib predict"), folder)
    assert len(list((folder / "results").rglob("images/**/defective/*.png"))) >= 2


def test_export(folder: Path, checkpoint: Path) -> None:
    assert checkpoint.exists()
    run(command_with(README, "anomalib export"), folder)
    assert list((folder / "results").rglob("*.xml"))


def test_benchmark(folder: Path) -> None:
    # Padim downloads its backbone and Draem takes seconds an image: without the one, and on a tiny data set.
    command = command_with(README, "anomalib benchmark").replace("MAX_STEPS=600", "MAX_STEPS=1")
    name = command.split()[-1]
    settings = yaml.safe_load((ROOT / name).read_text())
    models = settings["benchmark"]["model"]["class_path"]
    assert models["grid"] == ["TwoStageSuperpixel", "Draem", "Padim"]
    models["grid"].remove("Padim")
    data = {"root": "path/to/MVTecAD", "category": "bottle", "train_batch_size": 2, "num_workers": 0}
    settings["benchmark"]["data"] = {"class_path": "MVTecAD", "init_args": data}
    (folder / "benchmark.yaml").write_text(yaml.safe_dump(settings))
    shutil.copytree(folder / "path/to/images", folder / "datasets/dtd", dirs_exist_ok=True)
    run(command.replace(name, "benchmark.yaml"), folder)
    (table,) = (folder / "runs").rglob("results.csv")
    assert len(table.read_text().splitlines()) == 3


def test_preview(folder: Path) -> None:
    run(command_with(README, "anomalib_twostage.preview"), folder)
    with Image.open(folder / "preview.png") as picture:
        assert picture.height > picture.width / 3  # all four images


def test_comparison(folder: Path) -> None:
    tiny = "--labels default --categories bottle --seeds 0 --trainer.max_steps 2 --trainer.accelerator cpu"
    run(f"{command_with(README, 'anomalib_twostage.benchmark')} {tiny} --data.num_workers 0", folder)
    (table,) = (folder / "results").glob("peers*.csv")
    assert len(table.read_text().splitlines()) == 7  # the head and six maps


@pytest.mark.parametrize("number", range(len(blocks(README, "python"))))
def test_python_snippet(number: int, folder: Path) -> None:
    code = blocks(README, "python")[number].replace("max_steps=600", "max_steps=1")
    script = folder / f"snippet_{number}.py"
    script.write_text(code)
    run(f"python {script.name}", folder)


def test_sizes_from_the_command_line() -> None:
    from anomalib.cli import AnomalibCLI

    (options,) = re.findall(r"`(--data\.eval_batch_size .*?)`", README, flags=re.DOTALL)
    arguments = ["fit", "--model", "TwoStageSuperpixel", "--data", "MVTecAD", *options.split()]
    cli = AnomalibCLI(args=arguments, run=False)
    assert cli.model.input_size == (512, 512)
    assert cli.datamodule.eval_batch_size == 4


def test_the_wheel_of_the_readme_is_the_one_that_is_built() -> None:
    (name,) = re.findall(r"pip install path/to/(\S+\.whl)", README)
    assert name == f"anomalib_twostage-{version('anomalib-twostage')}-py3-none-any.whl"


def test_no_index_is_asked_for_the_package() -> None:
    texts = [
        README,
        *(path.read_text() for part in ("docs", "src", "examples") for path in (ROOT / part).rglob("*.[mp][dy]")),
    ]
    asked = [line for text in texts for line in re.findall(r"pip install[^`\n]*", text) if "anomalib-twostage" in line]
    assert asked
    assert all("anomalib-twostage @ git+" in line for line in asked)


def test_every_command_is_covered() -> None:
    covered = (
        "pip install",
        "--data Folder",
        "--data MVTecAD",
        "anomalib predict",
        "anomalib export",
        "anomalib benchmark",
        "anomalib_twostage.preview",
        "anomalib_twostage.benchmark",
    )
    for command in blocks(README, "bash"):
        assert sum(word in command for word in covered) == 1, command


# The comparisons' own are tested in tests/benchmark.
CONFIGURATIONS = [path for path in sorted((ROOT / "configs").rglob("*.yaml")) if "\nmodels:" not in path.read_text()]


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda path: path.name)
def test_configurations_for_cpus_ask_for_no_type_that_a_cpu_may_lack(path: Path) -> None:
    text = path.read_text()
    if path.stem.endswith("_cpu") or yaml.safe_load(text).get("trainer", {}).get("accelerator") == "cpu":
        assert yaml.safe_load(text)["trainer"].get("precision", "32-true") == "32-true"


@pytest.mark.parametrize("path", CONFIGURATIONS, ids=lambda path: path.name)
def test_configurations_parse(path: Path) -> None:
    from anomalib.cli import AnomalibCLI
    from anomalib.data import get_datamodule
    from anomalib.models import get_model

    settings = yaml.safe_load(path.read_text())
    if "benchmark" in settings:
        for name in settings["benchmark"]["model"]["class_path"]["grid"]:
            assert name in {"Draem", "Padim"} or get_model({"class_path": name}).name == name
        assert get_datamodule({"class_path": settings["benchmark"]["data"]["class_path"]}).name
    else:
        arguments = ["fit", "--config", str(path), *(() if "data" in settings else ("--data", "SampleTextures"))]
        cli = AnomalibCLI(args=arguments, run=False)
        assert type(cli.model).__name__ == "TwoStageSuperpixel"
        trainer = settings["trainer"]
        assert trainer["max_steps"] % trainer["val_check_interval"] == 0
