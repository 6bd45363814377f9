# SPDX-License-Identifier: Apache-2.0
"""The comparison: every model on every category with every seed, under one budget."""

import json
import math
import sys
from collections.abc import Generator, Iterator
from inspect import signature
from pathlib import Path
from typing import Any

import pandas as pd
from anomalib.data import MVTecAD
from anomalib.models import AnomalibModule
from anomalib.pipelines.components import JobGenerator, Pipeline, Runner
from anomalib.pipelines.components.runners import SerialRunner
from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import PositiveFloat
from lightning.fabric.utilities.seed import max_seed_value
from lightning.pytorch import Trainer

from .job import ComparisonJob, recorded_settings
from .summary import quality_table
from .table import ResultsTable, RunKey, row_key
from .worker import RunSettings, add_run_arguments

__all__ = ["Comparison", "ComparisonJobGenerator"]

_FOLDERS_TO_PAINT_WITH = ("dtd_dir", "texture_dir")


class ComparisonJobGenerator(JobGenerator):
    """Generate one job for each training that is not in the table yet.

    Args:
        table: Table of results.
    """

    def __init__(self, table: ResultsTable) -> None:
        self.table = table

    @property
    def job_class(self) -> type[ComparisonJob]:
        """The class of the jobs."""
        return ComparisonJob

    def generate_jobs(
        self,
        args: dict | None = None,
        prev_stage_result: Any = None,
    ) -> Generator[ComparisonJob, None, None]:
        """Generate the jobs, one seed after the other, so that a comparison that is stopped early compares something.

        Args:
            args: Configuration, as the parser of :class:`Comparison` reads it.
            prev_stage_result: Unused.
        """
        del prev_stage_result
        runs = _runs(args or {})
        for number, settings in enumerate(runs, start=1):
            key = _key(settings)
            if self.table.run(key) is None:
                yield ComparisonJob(settings, self.table, title=f"[{number}/{len(runs)}] {key}")


class Comparison(Pipeline):
    """Train models on the same images under the same budget, and write what they reach into one table.

    A training that is in the table is not repeated, so the same command continues a comparison that was stopped,
    however it was stopped.

    Example:
        >>> arguments = Comparison.get_parser().parse_args(["--config", "comparison.yaml"])  # doctest: +SKIP
        >>> Comparison().run(arguments)  # doctest: +SKIP
    """

    def __init__(self) -> None:
        self._table: ResultsTable | None = None
        self._runs: list[RunSettings] = []

    def run(self, args: Namespace | None = None) -> None:
        """Run what is not in the table yet.

        Args:
            args: What the parser returned; by default it parses the command line.

        Raises:
            RuntimeError: If a training failed, after all others had their turn, or if another process is writing
                the table.
            OSError: If images are missing, or the table cannot be written. Nothing is downloaded in the middle of a
                comparison.
            ValueError: If the configuration is contradictory, or not that of the rows in the table.
        """
        try:
            super().run(args)
            assert self._table is not None  # made in _setup_runners
            keys = [_key(settings) for settings in self._runs]
            missing = [str(key) for key in keys if self._table.run(key) is None]
            rows = [row for row in self._table.rows if row_key(row) in keys]
        finally:
            if self._table is not None:
                self._table.close()
        if rows:  # those that were there before as well: their mean is over all categories
            print(quality_table(pd.DataFrame(rows)))
        if missing:
            msg = f"{len(missing)} of {len(self._runs)} trainings failed: {'; '.join(missing)}. Run the command again."
            raise RuntimeError(msg)
        print(f"All {len(self._runs)} trainings are in {self._table.path}.")

    @staticmethod
    def get_parser(parser: ArgumentParser | None = None) -> ArgumentParser:
        """Build the parser of the command line and of configuration files.

        Args:
            parser: Parser to add the arguments to; by default a new one, which knows ``${...}`` in values.
        """
        if parser is None:
            # Interpolation after the command line is read, so that it can override what is interpolated.
            parser = ArgumentParser(
                prog="python -m anomalib_twostage.benchmark",
                description="Train and measure models on the same images under the same budget.",
                parser_mode="omegaconf+",
            )
        parser.add_argument("--config", action="config", help="Configuration file.")
        parser.add_argument("--out", type=Path, help="CSV file of the results. It is continued if it exists.")
        parser.add_argument("--models", type=dict[str, AnomalibModule], help="The models, by their label in the table.")
        parser.add_argument("--labels", nargs="+", type=str, help="Run these models only.")
        parser.add_argument("--categories", nargs="+", type=str, help="Categories of the data.")
        parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="Seeds.")
        parser.add_argument("--dtd_dir", type=str, help="For ${dtd_dir} in the configuration: folder of textures.")
        parser.add_argument(
            "--max_seconds",
            type=PositiveFloat | None,
            help="Give each model as many optimiser steps as take about so long, instead of trainer.max_steps.",
        )
        add_run_arguments(parser)
        return parser

    def _get_args(self, args: Namespace | None) -> dict:
        parser = self.get_parser()
        if args is None:
            args = parser.parse_args()
        config = json.loads(parser.dump(args, format="json", skip_none=False))
        # Of the trainer's many arguments only those that were set.
        defaults = signature(Trainer).parameters
        config["trainer"] = {
            name: value for name, value in config["trainer"].items() if value != defaults[name].default
        }
        return {ComparisonJob.name: config}

    def _setup_runners(self, args: dict) -> list[Runner]:
        config = args[ComparisonJob.name]
        self._runs = _runs(config)
        _check_budget(config)
        _check_devices(config)
        _check_folders(self._runs)
        self._table = ResultsTable(Path(config["out"]))
        for sentence in self._table.left_out:
            print(
                f"{sentence}. It is left out; the file as it is will be kept in {self._table.damaged}.", file=sys.stderr
            )
        for settings in self._runs:
            _check_same(self._table, settings)
        done = sum(self._table.run(_key(settings)) is not None for settings in self._runs)
        print(f"{len(self._runs)} trainings, {done} of them in {self._table.path} already.")
        return [SerialRunner(ComparisonJobGenerator(self._table))]


def _key(settings: RunSettings) -> RunKey:
    return RunKey(settings["label"], settings["category"], settings["seed"])


def _runs(config: dict[str, Any]) -> list[RunSettings]:
    """All trainings of a configuration, done or not, seed by seed."""
    outside = [seed for seed in config["seeds"] if not 0 <= seed <= max_seed_value]
    if outside:
        # Lightning would draw another one and go on.
        msg = f"Seeds must be from 0 to {max_seed_value}, got {', '.join(map(str, outside))}."
        raise ValueError(msg)
    models = config["models"] or {}
    unknown = [label for label in config["labels"] or () if label not in models]
    if unknown:
        msg = f"No model is labelled {', '.join(unknown)}; the configuration has {', '.join(models)}."
        raise ValueError(msg)
    data = config["data"]
    init_args = data.get("init_args", {})
    own = init_args.get("category") or init_args.get("name") or data["class_path"].rsplit(".", 1)[-1]
    runs: list[RunSettings] = [
        RunSettings(
            label=label,
            category=category,
            seed=seed,
            model=models[label],
            data={**data, "init_args": {**init_args, "category": category}} if "category" in init_args else data,
            trainer=config["trainer"],
            max_seconds=config["max_seconds"],
        )
        for seed in config["seeds"]
        for category in config["categories"] or [own]
        for label in config["labels"] or models
    ]
    if not runs:
        msg = "There is nothing to run: the configuration needs at least one entry in models and one in seeds."
        raise ValueError(msg)
    if config["categories"] and "category" not in init_args:
        msg = f"{data['class_path']} has no categories: take `categories` out of the configuration."
        raise ValueError(msg)
    return runs


def _check_budget(config: dict[str, Any]) -> None:
    steps = config["trainer"].get("max_steps", -1)
    if config["out"] is None:
        msg = "Say where the results go: --out results.csv."
        raise ValueError(msg)
    if (steps > 0) == (config["max_seconds"] is not None) or config["max_seconds"] == math.inf:
        msg = (
            "The budget is either trainer.max_steps, optimiser steps, or max_seconds, seconds of training; "
            f"got max_steps={steps} and max_seconds={config['max_seconds']}."
        )
        raise ValueError(msg)


def _check_devices(config: dict[str, Any]) -> None:
    """Refuse several devices: what they cost would not be what one costs, and a worker cannot start others."""
    devices = config["trainer"].get("devices", 1)
    if devices not in (1, "1", "auto") and not (isinstance(devices, list) and len(devices) == 1):
        msg = (
            f"A training of a comparison has one device, got trainer.devices={devices}: "
            "give --trainer.devices 1, or [3] for the fourth GPU."
        )
        raise ValueError(msg)


def _check_folders(runs: list[RunSettings]) -> None:
    """Ask for the images before hours of training, and instead of downloading them in the middle."""
    for settings in runs:
        data = settings["data"].get("init_args", {})
        if settings["data"]["class_path"].rsplit(".", 1)[-1] == MVTecAD.__name__:
            folder = Path(data["root"]) / settings["category"]
            if not folder.is_dir():
                msg = f"There is no folder {folder}: set data.root and categories to images in the layout of MVTec AD."
                raise FileNotFoundError(msg)
        for name in _FOLDERS_TO_PAINT_WITH:
            texture_dir = settings["model"].get("init_args", {}).get(name)
            if texture_dir is not None and not any(Path(texture_dir).rglob("*.*")):
                msg = (
                    f"{settings['label']} paints with the images in {name}={texture_dir}, but there are none: "
                    "put DTD or any other photographs there, or set --dtd_dir."
                )
                raise FileNotFoundError(msg)


def _check_same(table: ResultsTable, settings: RunSettings) -> None:
    """Refuse to call rows done that were measured with other settings."""
    row = table.run(_key(settings))
    if row is None:
        return
    changes = ", ".join(_changes(row["settings"], recorded_settings(settings)))
    if changes:
        msg = (
            f"{table.path} holds {_key(settings)} with other settings: {changes}. "
            "Give the changed model another label, or write to another file (--out)."
        )
        raise ValueError(msg)


def _changes(before: Any, now: Any, name: str = "") -> Iterator[str]:
    """What differs between two settings, in words."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in sorted({*before, *now}):
            path = f"{name}.{key}" if name else key
            # Arguments that only one of the two knows belong to another version of the package, but for the trainer, of
            # which only those are recorded that were set.
            if path.startswith("trainer.") or (key in before and key in now):
                yield from _changes(before.get(key), now.get(key), path)
    elif before != now:
        yield f"{name} {before} (now {now})"
