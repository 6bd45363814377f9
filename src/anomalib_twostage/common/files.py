# SPDX-License-Identifier: Apache-2.0
"""Files that are whole or not there."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["written_whole"]


@contextmanager
def written_whole(path: str | Path) -> Iterator[Path]:
    """Write beside a file and rename, so that at any moment the old file or the new one is there, whole.

    If the writing fails, the old file stays and nothing else is left. A process that is killed leaves the half-written
    ``<name>.partial``, which the next writer replaces.

    Args:
        path: The file.

    Yields:
        Where to write.

    Raises:
        OSError: If the file cannot be written or replaced.

    Example:
        >>> with written_whole("table.csv") as partial:  # doctest: +SKIP
        ...     partial.write_text("a,b")
    """
    path = Path(path)
    partial = path.with_name(f"{path.name}.partial")
    try:
        yield partial
        with partial.open("rb+") as file:
            os.fsync(file.fileno())  # or a power failure leaves the new name with nothing in it
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
