# SPDX-License-Identifier: Apache-2.0
import csv
import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from anomalib.data import MVTecAD
from anomalib.engine import Engine
from anomalib.pipelines.components.base import pipeline as anomalib_pipeline
from anomalib.pre_processing import PreProcessor
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.accelerators import CPUAccelerator
from PIL import Image
from sklearn.metrics import average_precision_score, roc_auc_score
from torchvision.transforms.v2 import Resize

from anomalib_twostage import TwoStageSuperpixel
from anomalib_twostage.benchmark import Comparison, ComparisonJob, worker
from anomalib_twostage.benchmark.job import recorded_settings
from anomalib_twostage.benchmark.table import ResultsTable, read_rows
from tests.integration.conftest import SIZE, write_dataset

STEPS = 4
MODELS = ("ours", "narrow Draem")


class Waits(Callback):
    """Thirty seconds pass before the first step, and three in each."""

    clock = 0.0

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        Waits.clock += 30

    def on_train_batch_end(self, *arguments: object) -> None:
        Waits.clock += 3


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Results go below the test's own folder, and the loggers of the test run stay as they are."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(anomalib_pipeline, "redirect_logs", lambda file: None)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """Two models, small enough for seconds on a CPU."""
    write_dataset(tmp_path / "datasets")
    (tmp_path / "textures").mkdir()
    Image.fromarray(np.full((32, 32, 3), 90, np.uint8)).save(tmp_path / "textures/grey.png")
    resize = {"class_path": "torchvision.transforms.v2.Resize", "init_args": {"size": [SIZE, SIZE]}}
    pre_processor = {"class_path": "anomalib.pre_processing.PreProcessor", "init_args": {"transform": resize}}
    ours = {"variant": "small", "segment_size": 8, "pre_processor": pre_processor}
    draem = {"width_divisor": 32, "dtd_dir": "${dtd_dir}", "pre_processor": pre_processor}
    settings = {
        "out": "out/table.csv",
        "dtd_dir": "./textures",
        "models": {
            "ours": {"class_path": "TwoStageSuperpixel", "init_args": ours},
            "narrow Draem": {"class_path": "NarrowDraem", "init_args": draem},
        },
        "categories": ["plate"],
        "seeds": [0],
        "data": {
            "class_path": "MVTecAD",
            "init_args": {"root": "./datasets", "train_batch_size": 3, "eval_batch_size": 4, "num_workers": 0},
        },
        "trainer": {"max_steps": STEPS, "accelerator": "cpu"},
    }
    path = tmp_path / "comparison.yaml"
    path.write_text(yaml.safe_dump(settings, sort_keys=False))
    return path


def compare(config: Path, *options: str) -> None:
    Comparison().run(Comparison.get_parser().parse_args(["--config", str(config), *options]))


def planned(config: Path, *options: str) -> list[worker.RunSettings]:
    comparison = Comparison()
    arguments = comparison.get_parser().parse_args(["--config", str(config), *options])
    runners = comparison._setup_runners(comparison._get_args(arguments))
    jobs = list(runners[0].generator(comparison._get_args(arguments)["comparison"]))
    comparison._table.close()
    return [job.settings for job in jobs]


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replaces the trainings by a made-up row; returns the names of those that were asked for."""
    asked: list[str] = []

    def rows(job: ComparisonJob) -> list[dict[str, Any]] | None:
        asked.append(str(job.key))
        job.log.parent.mkdir(parents=True, exist_ok=True)
        job.log.write_text("Traceback\nValueError: no such luck\n\n")
        if job.settings["seed"] == 13:
            return None
        metrics = dict.fromkeys(("pixel AUROC", "pixel AP", "AUPRO", "image AUROC"), 0.5)
        return [{**job.key._asdict(), "map": "final", **metrics, "steps": STEPS, "training seconds": 1.0}]

    monkeypatch.setattr(ComparisonJob, "_rows_of_worker", rows)
    return asked


def keys(path: str | Path = "out/table.csv") -> list[tuple[str, str, int]]:
    return [(row["label"], row["category"], row["seed"]) for row in read_rows(Path(path))[0]]


def test_each_model_runs_on_each_category_with_each_seed(config: Path, trained: list[str], tmp_path: Path) -> None:
    write_dataset(tmp_path / "more")
    (tmp_path / "more/plate").rename(tmp_path / "datasets/tray")
    compare(config, "--categories", "plate", "tray", "--seeds", "0", "4")
    runs = [
        (label, category, seed)
        for seed in (0, 4)
        for category in ("plate", "tray")
        for label in ("ours", "narrow Draem")
    ]
    assert keys() == runs
    assert trained == [f"{label}, {category}, seed {seed}" for label, category, seed in runs]


def test_what_is_in_the_table_is_not_repeated(config: Path, trained: list[str]) -> None:
    compare(config, "--labels", "ours")
    compare(config, "--seeds", "0", "1")
    compare(config, "--seeds", "0", "1")
    names = [("ours", 0), ("narrow Draem", 0), ("ours", 1), ("narrow Draem", 1)]
    assert trained == [f"{label}, plate, seed {seed}" for label, seed in names]
    assert len(set(keys())) == len(keys()) == 4


def test_half_written_line_is_redone(config: Path, trained: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    compare(config)
    table = Path("out/table.csv")
    table.write_text(table.read_text()[:-30])
    trained.clear()
    compare(config)
    assert trained == ["narrow Draem, plate, seed 0"]
    assert "line 3 is half-written" in capsys.readouterr().err
    assert keys() == [("ours", "plate", 0), ("narrow Draem", "plate", 0)]


def test_a_continued_comparison_shows_all_its_trainings(
    config: Path, trained: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_dataset(tmp_path / "more")
    (tmp_path / "more/plate").rename(tmp_path / "datasets/tray")
    compare(config, "--labels", "narrow Draem")
    compare(config, "--labels", "ours")
    capsys.readouterr()
    compare(config, "--labels", "ours", "--categories", "plate", "tray")
    shown = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [line.split(" | ")[0] for line in shown] == ["| category", "| plate", "| tray", "| **mean**"]
    assert not any("Draem" in line for line in shown)  # was not asked for
    compare(config, "--labels", "ours", "--categories", "plate", "tray")
    assert "| **mean** | ours |" in capsys.readouterr().out  # nothing was left to train
    assert len(trained) == 3


def test_failure_is_told_and_the_others_run(
    config: Path, trained: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(RuntimeError, match=r"2 of 4 trainings failed: ours, plate, seed 13; narrow Draem"):
        compare(config, "--seeds", "13", "1")
    assert [seed for *_, seed in keys()] == [1, 1]
    assert "ours, plate, seed 13 failed: ValueError: no such luck" in capsys.readouterr().out


def test_changed_settings_are_not_mixed(config: Path, trained: list[str], tmp_path: Path) -> None:
    compare(config)
    with pytest.raises(ValueError, match=r"ours, plate, seed 0 with other settings: trainer\.max_steps 4 \(now 5\)"):
        compare(config, "--trainer.max_steps", "5")
    with pytest.raises(ValueError, match=r"trainer\.precision None \(now bf16-mixed\)"):
        compare(config, "--trainer.precision", "bf16-mixed")
    changed = tmp_path / "changed.yaml"
    changed.write_text(config.read_text().replace("segment_size: 8", "segment_size: 4"))
    with pytest.raises(ValueError, match=r"model\.init_args\.segment_size 8 \(now 4\)"):
        compare(changed)
    whole = yaml.safe_load(config.read_text())
    whole["models"]["ours"]["init_args"].pop("pre_processor")
    changed.write_text(yaml.safe_dump(whole))
    with pytest.raises(ValueError, match=r"model\.init_args\.pre_processor {'class_path'.*} \(now True\)"):
        compare(changed)
    whole = yaml.safe_load(config.read_text())
    whole["models"]["ours"]["init_args"]["painter"] = {"class_path": "anomalib_twostage.PerlinAnomaly"}
    changed.write_text(yaml.safe_dump(whole))
    with pytest.raises(ValueError, match=r"model\.init_args\.painter None \(now {'class_path'.*PerlinAnomaly"):
        compare(changed)
    (tmp_path / "datasets").rename(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").joinpath("datasets").mkdir()
    (tmp_path / "elsewhere/plate").rename(tmp_path / "elsewhere/datasets/plate")
    compare(config, "--data.root", "elsewhere/datasets")  # moved, but the same
    assert len(trained) == 2


def test_no_folder_of_this_machine_is_recorded(config: Path, tmp_path: Path) -> None:
    (ours, draem) = planned(config, "--data.root", str(tmp_path / "datasets"), "--dtd_dir", str(tmp_path / "textures"))
    assert ours["data"]["init_args"]["root"] == str(tmp_path / "datasets")
    assert draem["model"]["init_args"]["dtd_dir"] == str(tmp_path / "textures")
    recorded = recorded_settings(draem)
    assert recorded["model"]["init_args"]["dtd_dir"] == "textures"
    assert recorded["data"]["init_args"]["root"] == "datasets"
    assert str(tmp_path) not in json.dumps(recorded)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        (["--data.root", "nowhere"], FileNotFoundError, r"no folder nowhere.plate: set data\.root"),
        (["--categories", "plat"], FileNotFoundError, r"no folder datasets.plat"),
        (["--dtd_dir", "nowhere"], FileNotFoundError, r"narrow Draem paints with the images in dtd_dir=nowhere"),
        (["--labels", "theirs"], ValueError, r"No model is labelled theirs; the configuration has ours, narrow Draem"),
        (["--trainer.max_steps", "-1"], ValueError, r"either trainer\.max_steps.*or max_seconds"),
        (["--max_seconds", "5"], ValueError, r"got max_steps=4 and max_seconds=5"),
        (["--max_seconds", "inf", "--trainer.max_steps", "-1"], ValueError, r"max_seconds=inf"),
        (["--seeds", "0", str(2**40)], ValueError, rf"from 0 to {2**32 - 1}, got {2**40}"),
        (["--seeds", "-1"], ValueError, r"got -1"),
        (["--out", "datasets"], OSError, r"datasets is a folder: give --out a file, such as datasets.results\.csv"),
        (["--models", "{}"], ValueError, "nothing to run"),
        (["--trainer.devices", "2"], ValueError, r"one device.*trainer\.devices=2.*trainer\.devices 1"),
        (["--trainer.devices", "[0, 1]"], ValueError, r"trainer\.devices=\[0, 1\]"),
        (["--trainer.devices", "-1"], ValueError, r"trainer\.devices=-1"),
        (["--data", "Folder", "--data.name", "a", "--data.normal_dir", "b"], ValueError, r"Folder has no categories"),
    ],
)
def test_mistakes_are_named_before_anything_is_trained(
    config: Path, trained: list[str], options: list[str], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        compare(config, *options)
    assert trained == []


def test_results_need_a_file(config: Path, trained: list[str]) -> None:
    config.write_text(config.read_text().replace("out: out/table.csv", ""))
    with pytest.raises(ValueError, match=r"--out results\.csv"):
        compare(config)
    assert trained == []


@pytest.mark.parametrize("name", ["ablation", "ablation_cpu", "comparison", "comparison_cpu"])
def test_shipped_configurations_are_valid(name: str, tmp_path: Path) -> None:
    path = Path(__file__).parents[2] / f"configs/benchmark/{name}.yaml"
    parser = Comparison.get_parser()
    arguments = parser.parse_args(["--config", str(path), "--dtd_dir", "photographs"])
    painters = [
        value
        for model in arguments.models.values()
        for name, value in model.init_args.items()
        if name in ("dtd_dir", "texture_dir") and value is not None
    ]
    assert bool(painters) == name.startswith("comparison")  # the ablation paints with what is built in
    assert {str(value) for value in painters} <= {"photographs"}
    assert arguments.trainer.max_steps > 0


def test_seconds_become_steps_of_a_timed_training(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (settings,) = planned(config, "--trainer.max_steps", "-1", "--max_seconds", "100", "--labels", "ours")
    asked: list[int] = []

    def train(settings: worker.RunSettings, steps: int, report: Callable[[int], None]) -> worker._Trained:
        asked.append(steps)
        # Twenty seconds pass before the first step. The first steps take a second each, later ones half.
        seconds = 20 + steps * (1.0 if len(asked) == 1 else 0.5)
        device = torch.device("cpu")
        return worker._Trained(None, None, device, "32", steps, 2, steps * 3, seconds, 20)  # type: ignore[arg-type]

    monkeypatch.setattr(worker, "_train", train)
    assert worker._affordable_steps(settings, 100.0, lambda *_: None) == 160
    assert asked[1] == 10  # no more than a tenth of the time, and no more than two epochs, but ten


@pytest.mark.integration
def test_time_before_the_first_step_is_told_apart(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A single callback, as the command line makes it, is taken too."""
    settings = planned(config, "--trainer.max_steps", "2", "--trainer.accelerator", "cpu", "--labels", "ours")[0]
    settings["trainer"]["callbacks"] = {"class_path": f"{__name__}.Waits"}
    Waits.clock = 0.0
    monkeypatch.setattr(worker, "time", SimpleNamespace(perf_counter=lambda: Waits.clock))
    trained = worker._train(settings, 2, lambda _: None)
    assert (trained.seconds_before, trained.seconds) == (30.0, 36.0)


@pytest.mark.integration
def test_a_training_has_one_device(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CPUAccelerator, "auto_device_count", staticmethod(lambda: 4))  # as of GPUs, which are taken all
    settings = planned(config, "--trainer.accelerator", "cpu", "--trainer.max_steps", "1")[0]
    assert worker.run(settings, lambda *_: None)[-1]["steps"] == 1


def test_metrics_are_those_of_the_last_steps_model(config: Path) -> None:
    (settings,) = planned(config, "--labels", "ours", "--seeds", "3")
    steps: list[tuple[str, int, int]] = []
    rows = worker.run(settings, lambda *step: steps.append(step))
    assert steps == [("training", n + 1, STEPS) for n in range(STEPS)] + [("measuring", STEPS, STEPS)]

    seed_everything(3, workers=True)
    resize = PreProcessor(transform=Resize((SIZE, SIZE), antialias=True))
    model = TwoStageSuperpixel(variant="small", segment_size=8, pre_processor=resize)
    data = MVTecAD(root="datasets", category="plate", train_batch_size=3, eval_batch_size=4, num_workers=0)
    Engine(max_steps=STEPS, accelerator="cpu", limit_val_batches=0, enable_progress_bar=False).fit(model, data)
    with torch.no_grad():
        tested = [(model.model.eval().stages(batch.image), batch) for batch in data.test_dataloader()]
    assert model.model.stage == 2
    masks = torch.cat([batch.gt_mask for _, batch in tested]).flatten().int()
    smooth = model.model.smooth  # stages like the final map, so that the rows differ by the method's parts alone
    of_stages = {
        "stage one": lambda stages: smooth(stages.stage_one_map),
        "superpixel mean": lambda stages: smooth(stages.pooled_map),
        "without stage two": lambda stages: smooth((stages.stage_one_map + stages.pooled_map) / 2),
        "not smoothed": lambda stages: stages.fused_map,
        "final": lambda stages: stages.anomaly_map,
    }
    assert [row["map"] for row in rows] == list(of_stages)
    for row, of in zip(rows, of_stages.values(), strict=True):
        maps = torch.cat([of(stages) for stages, _ in tested])
        maps = maps.flatten()
        assert row["pixel AUROC"] == pytest.approx(roc_auc_score(masks, maps), abs=1e-4)
        assert row["pixel AP"] == pytest.approx(average_precision_score(masks, maps), abs=1e-4)
    final = rows[-1]
    assert (final["steps"], final["images"]) == (STEPS, STEPS * 3)
    assert final["parameters"] == sum(parameter.numel() for parameter in model.model.parameters())
    assert final["training images/s"] == pytest.approx(final["images"] / final["training seconds"], rel=0.05)
    assert final["peak memory MiB"] > 100


@pytest.mark.integration
def test_killed_comparison_is_completed_by_the_same_command(config: Path) -> None:
    # The first training is over when the killing begins.
    first, _ = planned(config)
    rows = worker.run(first, lambda *_: None)
    rows[-1]["settings"] = recorded_settings(first)
    with ResultsTable(Path("out/table.csv")) as table:
        table.add(rows)

    command = [sys.executable, "-m", "anomalib_twostage.benchmark", "--config", str(config)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            lines.append(line)
            if line.startswith("[2/2] narrow Draem, plate, seed 0 (log:"):
                process.send_signal(signal.SIGKILL)
                break
    assert "2 trainings, 1 of them in out/table.csv already" in "".join(lines)
    assert len(keys()) == 5

    compare(config)
    with Path("out/table.csv").open(newline="") as file:
        written = [(row["label"], row["map"]) for row in csv.DictReader(file)]
    maps = ["stage one", "superpixel mean", "without stage two", "not smoothed", "final"]
    assert written == [*(("ours", name) for name in maps), ("narrow Draem", "final")]
    (*_, before, draem) = read_rows(Path("out/table.csv"))[0]
    assert before["settings"]["trainer"] == draem["settings"]["trainer"] == {"accelerator": "cpu", "max_steps": STEPS}
    assert (draem["model"], draem["steps"], draem["images"]) == ("NarrowDraem", str(STEPS), str(STEPS * 3))


@pytest.mark.integration
def test_training_ends_when_nobody_waits_for_it(config: Path) -> None:
    (settings,) = planned(config, "--labels", "ours", "--trainer.max_steps", "1000000")
    command = [sys.executable, "-c", "from anomalib_twostage.benchmark.worker import main; main()"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps(settings).encode() + b"\n")
            process.stdin.flush()
            assert json.loads(process.stdout.readline()) == {"phase": "training", "step": 1, "steps": 1000000}
            process.stdin.close()
            assert process.wait(timeout=60) == 1
        finally:
            process.kill()
