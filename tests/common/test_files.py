# SPDX-License-Identifier: Apache-2.0
from pathlib import Path

import pytest

from anomalib_twostage.common.files import written_whole


def test_the_old_file_stays_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_text("old")
    with written_whole(path) as partial:
        partial.write_text("new")
        assert path.read_text() == "old"
        assert partial.parent == tmp_path
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("table.csv", "new")]


def test_a_failure_leaves_the_old_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_text("old")

    def fail() -> None:
        with written_whole(path) as partial:
            partial.write_text("ha")
            msg = "on purpose"
            raise RuntimeError(msg)

    with pytest.raises(RuntimeError, match="on purpose"):
        fail()
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("table.csv", "old")]


def test_a_folder_in_its_place_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="folder"), written_whole(tmp_path / "folder") as partial:
        partial.write_text("new")
    assert [file.name for file in tmp_path.iterdir()] == ["folder"]
