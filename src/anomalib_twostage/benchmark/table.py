# SPDX-License-Identifier: Apache-2.0
"""The table of results: a CSV file that a killed run cannot spoil."""

import csv
import io
import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from filelock import FileLock, Timeout

from anomalib_twostage.common.files import written_whole

__all__ = ["COLUMNS", "FINAL", "KEYS", "METRICS", "ResultsTable", "Row", "RunKey", "read_rows", "row_key"]

FINAL = "final"
METRICS = ("pixel AUROC", "pixel AP", "AUPRO", "image AUROC")
KEYS = ("label", "category", "seed", "map")
COLUMNS = (
    *KEYS,
    *METRICS,
    # From here on the cells of the other maps of a run are empty: these are the cost of the whole model.
    "model",
    "parameters",
    "GFLOPs",
    "max seconds",
    "steps",
    "images",
    "training seconds",
    "training images/s",
    "inference ms",
    "inference batch",
    "inference images/s",
    "peak memory MiB",
    "device",
    "threads",
    "precision",
    "python",
    "torch",
    "anomalib",
    "anomalib-twostage",
    "settings",
)

Row = dict[str, Any]


class RunKey(NamedTuple):
    """What tells one training from another."""

    label: str
    category: str
    seed: int

    def __str__(self) -> str:
        return f"{self.label}, {self.category}, seed {self.seed}"


def row_key(row: Row) -> RunKey:
    """The run that a row is of."""
    return RunKey(row["label"], row["category"], row["seed"])


def read_rows(path: Path) -> tuple[list[Row], list[str]]:
    """Read a table, and tell apart what cannot be trusted.

    Args:
        path: CSV file, as written by :class:`ResultsTable`.

    Returns:
        The rows of finished runs, and one sentence for each line that was left out: half-written, damaged, or of a
        run whose row of the final map, the last one, is missing.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is no such table, or holds a row twice.
    """
    *lines, unfinished = path.read_bytes().decode("utf-8", errors="replace").split("\n")
    header = ",".join(COLUMNS)
    left_out: list[str] = []
    if unfinished:
        left_out.append(f"{path}, line {len(lines) + 1} is half-written: {_excerpt(unfinished)}")
    if not lines and header.startswith(unfinished):
        return [], left_out
    if not lines or lines[0].rstrip("\r") != header:
        msg = f"{path} is not a table of this command: its first line is {_excerpt((lines or [unfinished])[0])}."
        raise ValueError(msg)

    rows: dict[tuple[RunKey, str], Row] = {}
    for number, line in enumerate(lines[1:], start=2):
        row = _parse(line.rstrip("\r"))
        if row is None:
            left_out.append(f"{path}, line {number} is damaged: {_excerpt(line)}")
            continue
        name = (row_key(row), row["map"])
        if name in rows:
            msg = f"{path} holds {name[0]}, map {name[1]!r} twice; the second time in line {number}."
            raise ValueError(msg)
        rows[name] = row

    finished = {key for key, name in rows if name == FINAL}
    unfinished_runs = {key: None for key, _ in rows if key not in finished}
    left_out += [f"{path}: {key} has no row of its final map" for key in unfinished_runs]
    return [row for (key, _), row in rows.items() if key in finished], left_out


class ResultsTable:
    """A table of results that one process fills, run by run.

    Every change writes the whole (small) file anew beside the old one and then puts it in its place, so that the file
    is always complete, whenever the process is killed. Lines that some other accident left half-written are named in
    :attr:`left_out` and are not in :attr:`rows`; before the first change the file as it was is copied to
    :attr:`damaged`.

    Args:
        path: CSV file; it need not exist.

    Raises:
        RuntimeError: If another process is filling the same file.
        ValueError: If the file is no such table.
        OSError: If the path is a folder, or cannot be written.

    Example:
        >>> with ResultsTable(Path("results.csv")) as table:  # doctest: +SKIP
        ...     table.add(rows)
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = FileLock(f"{path}.lock")
        if path.is_dir():
            msg = f"{path} is a folder: give --out a file, such as {path / 'results.csv'}."
            raise IsADirectoryError(msg)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=0)
        except Timeout as error:
            msg = f"Another process is writing {path}: wait for it, or write to another file (--out)."
            raise RuntimeError(msg) from error
        except OSError as error:
            msg = f"Cannot write {path} ({error.strerror or error}): free the place or write to another file (--out)."
            raise OSError(msg) from error
        self.rows: list[Row] = []
        self.left_out: list[str] = []
        try:
            if path.exists():
                self.rows, self.left_out = read_rows(path)
        except BaseException:
            self.close()
            raise

    def run(self, key: RunKey) -> Row | None:
        """The row of the final map of a run, or ``None`` if the run is not in the table."""
        return next((row for row in self.rows if row_key(row) == key and row["map"] == FINAL), None)

    @property
    def damaged(self) -> Path:
        """Copy of a file with lines that are left out."""
        return self.path.with_name(f"{self.path.name}.damaged")

    def add(self, rows: Iterable[Row]) -> None:
        """Add the rows of one run; the file holds all of them or none.

        Raises:
            ValueError: If a row names an unknown column, or the last row is not that of the final map.
        """
        added = list(rows)
        if not added or added[-1]["map"] != FINAL:
            msg = f"The last row of a run must be that of its map {FINAL!r}."
            raise ValueError(msg)
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(_to_text(row) for row in (*self.rows, *added))
        if self.left_out:
            shutil.copy2(self.path, self.damaged)
            self.left_out = []
        with written_whole(self.path) as partial:
            partial.write_text(text.getvalue(), encoding="utf-8", newline="")
        self.rows += added

    def close(self) -> None:
        """Let other processes write the file."""
        self._lock.release()

    def __enter__(self) -> "ResultsTable":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def _to_text(row: Row) -> dict[str, str]:
    texts = {}
    for name, value in row.items():
        text = json.dumps(value) if isinstance(value, dict) else "" if value is None else str(value)
        if "\n" in text or "\r" in text:
            msg = f"A cell must not hold a line break: {name} is {text!r}."
            raise ValueError(msg)
        texts[name] = text
    return texts


def _parse(line: str) -> Row | None:
    """The row of a line, numbers as numbers, or ``None`` if it is damaged."""
    try:
        (cells,) = csv.reader([line], strict=True)
        row: Row = dict(zip(COLUMNS, cells, strict=True))
        row["seed"] = int(row["seed"])
        for name in METRICS:
            row[name] = None if row[name] == "" else float(row[name])
        if row["settings"]:
            row["settings"] = json.loads(row["settings"])
    except (csv.Error, ValueError):
        return None
    return row


def _excerpt(line: str) -> str:
    return repr(line if len(line) <= 60 else f"{line[:57]}...")
