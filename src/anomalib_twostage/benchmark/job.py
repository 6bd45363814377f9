# SPDX-License-Identifier: Apache-2.0
"""One training of a comparison, as a job of anomalib's pipelines."""

import json
import re
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pandas as pd
from anomalib.pipelines.components import Job
from tqdm import tqdm

from .table import METRICS, ResultsTable, Row, RunKey
from .worker import RunSettings

__all__ = ["ComparisonJob", "RunFailedError", "recorded_settings"]

# Not `-m`: the package has imported the module by then, and Python would warn.
_WORKER = "from anomalib_twostage.benchmark.worker import main; main()"


class RunFailedError(RuntimeError):
    """A training ended without results."""


class ComparisonJob(Job):
    """Train and measure one model in a process of its own, and put its rows into the table.

    Args:
        settings: What to train.
        table: Where the rows go as soon as they are there.
        title: What to call the run on the terminal.
    """

    name = "comparison"

    def __init__(self, settings: RunSettings, table: ResultsTable, title: str) -> None:
        self.settings = settings
        self.table = table
        self.title = title

    @property
    def key(self) -> RunKey:
        """Name of the run in the table."""
        return RunKey(self.settings["label"], self.settings["category"], self.settings["seed"])

    @property
    def log(self) -> Path:
        """What the training printed."""
        name = "-".join(re.sub(r"[^\w.]+", "_", str(part)) for part in self.key)
        return self.table.path.with_name(f"{self.table.path.stem}_logs") / f"{name}.log"

    def run(self, task_id: int | None = None) -> list[Row]:
        """Train and measure.

        Args:
            task_id: Unused; a job has the machine to itself, or its figures of speed would mean nothing.

        Returns:
            The rows that were added to the table.

        Raises:
            RunFailedError: If the training failed; the message names its log.
        """
        del task_id
        tqdm.write(f"{self.title} (log: {self.log})")
        rows = self._rows_of_worker()
        if rows is None:
            msg = f"{self.key} failed: {self._last_words()} (all of it in {self.log})"
            tqdm.write(msg)
            raise RunFailedError(msg)
        rows[-1]["settings"] = recorded_settings(self.settings)
        self.table.add(rows)
        final = rows[-1]
        metrics = ", ".join(f"{name} {value:.3f}" for name, value in _metrics(final).items())
        tqdm.write(f"{self.title}: {metrics}; {final['steps']} steps in {final['training seconds']:.0f} s")
        return rows

    @staticmethod
    def collect(results: list[list[Row]]) -> pd.DataFrame:
        """All rows that were added."""
        return pd.DataFrame([row for rows in results for row in rows])

    @staticmethod
    def save(results: pd.DataFrame) -> None:
        """Nothing is left to do: each training is saved as it ends."""

    def _rows_of_worker(self) -> list[Row] | None:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        rows: list[Row] | None = None
        command = [sys.executable, "-c", _WORKER]
        with (
            self.log.open("w", encoding="utf-8") as log,
            subprocess.Popen(
                command,
                stdin=subprocess.PIPE,  # stays open: the process ends when this end of it is gone
                stdout=subprocess.PIPE,
                stderr=log,
                encoding="utf-8",
                start_new_session=True,
            ) as process,
            tqdm(leave=False, disable=None) as bar,
        ):
            assert process.stdin is not None
            assert process.stdout is not None
            try:
                with suppress(BrokenPipeError):  # it has ended already; its log says why
                    process.stdin.write(json.dumps(self.settings) + "\n")
                    process.stdin.flush()
                for line in process.stdout:
                    message = json.loads(line)
                    if "rows" in message:
                        rows = message["rows"]
                    else:
                        bar.set_description(message["phase"], refresh=False)
                        bar.total = message["steps"]
                        bar.update(message["step"] - bar.n)
                process.wait()  # before its standard input closes
            except BaseException:
                process.kill()
                raise
        return rows

    def _last_words(self) -> str:
        lines = [line for line in self.log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
        return lines[-1].strip() if lines else "it ended without a word"


def recorded_settings(settings: RunSettings) -> dict[str, Any]:
    """What is to be the same when a table is continued. Of paths only the name: data may move.

    Args:
        settings: What to train.

    Returns:
        Model, data without category, trainer and maximum of seconds.
    """
    init_args = {name: value for name, value in settings["data"].get("init_args", {}).items() if name != "category"}
    recorded = {
        "model": settings["model"],
        "data": {**settings["data"], "init_args": init_args},
        "trainer": settings["trainer"],
        "max_seconds": settings["max_seconds"],
    }
    return _without_folders(recorded)


def _without_folders(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_folders(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_without_folders(item) for item in value]
    if isinstance(value, str) and ("/" in value or "\\" in value):
        return Path(value.replace("\\", "/")).name
    return value


def _metrics(row: Row) -> dict[str, float]:
    return {name: row[name] for name in METRICS if row[name] is not None}
