# SPDX-License-Identifier: Apache-2.0
"""Tables of the benchmarks that train: a repeated command goes on where it was stopped, but with the same settings."""

import json
import sys
from pathlib import Path
from typing import Any

import pandas as pd

from anomalib_twostage.common.files import written_whole

_COLUMN = "settings"


def read_rows(table: Path, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows that the same command has left in a table; none if there is no table.

    Args:
        table: CSV file.
        settings: What decides the figures, beside the columns that name a row.

    Raises:
        SystemExit: If the table was filled with other settings, or does not say with which.
    """
    if not table.exists():
        return []
    rows = pd.read_csv(table, dtype={"category": str})  # some are called 01
    for text in rows.get(_COLUMN, pd.Series([""])).fillna("").unique():
        before = json.loads(text or "{}")
        differing = [name for name in settings if before.get(name) != settings[name]]
        if differing:
            changes = ", ".join(f"{name} {before.get(name)} (now {settings[name]})" for name in differing)
            sys.exit(f"Error: {table} holds figures of other settings: {changes}. Write to another file (--out).")
    return rows.drop(columns=_COLUMN).to_dict("records")


def write_rows(table: Path, rows: list[dict[str, Any]], settings: dict[str, Any], **form: Any) -> None:
    """Write all rows with their settings, for :func:`read_rows`; ``form`` goes to :meth:`pandas.DataFrame.to_csv`."""
    with written_whole(table) as partial:
        pd.DataFrame(rows).assign(**{_COLUMN: json.dumps(settings)}).to_csv(partial, index=False, **form)
