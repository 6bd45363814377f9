# SPDX-License-Identifier: Apache-2.0
"""Every YAML snippet of the pages, run through the command line's own parser as far as one training step."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from anomalib.cli import AnomalibCLI

from .conftest import SIZE, blocks, write_dataset

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SNIPPETS = [(page.name, text) for page in PAGES for text in blocks(page.read_text(), "yaml")]

RESIZE = {"class_path": "torchvision.transforms.v2.Resize", "init_args": {"size": [SIZE, SIZE]}}
SMALL = {"pre_processor": {"class_path": "anomalib.pre_processing.PreProcessor", "init_args": {"transform": RESIZE}}}
# What a snippet leaves to the reader, and what makes it small enough for a test.
OURS = {"class_path": "TwoStageSuperpixel", "init_args": {**SMALL, "variant": "small", "segment_size": 8}}
PADIM = {"class_path": "Padim", "init_args": {**SMALL, "pre_trained": False}}
DATA = {
    "class_path": "anomalib.data.Folder",
    "init_args": {
        "name": "parts",
        "normal_dir": "path/to/good",
        "abnormal_dir": "path/to/defective",
        "train_batch_size": 2,
        "num_workers": 0,
    },
}
TRAINER = {
    "max_steps": 1,
    "limit_val_batches": 0,
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder where the snippets' paths exist."""
    folder = tmp_path_factory.mktemp("yaml")
    plate = write_dataset(folder / "data", good=1, defective=4) / "plate"
    for name in ("good", "textures"):
        shutil.copytree(plate / "train/good", folder / "path/to" / name)
    shutil.copytree(plate / "test/square", folder / "path/to/defective")
    return folder


def merged(base: Any, snippet: Any) -> Any:
    """The snippet, and what it lacks from the base."""
    if not (isinstance(base, dict) and isinstance(snippet, dict)):
        return snippet
    return {**base, **{key: merged(base.get(key), value) for key, value in snippet.items()}}


@pytest.mark.parametrize(("page", "text"), SNIPPETS, ids=[page for page, _ in SNIPPETS])
def test_a_snippet_trains(page: str, text: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snippet = yaml.safe_load(text)
    model = PADIM if snippet.get("model", {}).get("class_path") == "Padim" else OURS
    settings = merged({"model": model, "data": DATA, "trainer": TRAINER}, snippet)
    monkeypatch.chdir(folder)
    Path("settings.yaml").write_text(yaml.safe_dump(settings))
    cli = AnomalibCLI(args=["fit", "--config", "settings.yaml", "--default_root_dir", "results"])
    assert cli.engine.trainer.global_step == 1


def test_the_snippets_are_found() -> None:
    assert len(SNIPPETS) >= 4
