# SPDX-License-Identifier: Apache-2.0
from pathlib import Path

import pytest

from anomalib_twostage.benchmark.table import COLUMNS, FINAL, ResultsTable, Row, RunKey, read_rows

KEY = RunKey("ours, small", "bottle", 0)


def rows_of(key: RunKey, value: float = 0.5, *, maps: tuple[str, ...] = ("stage one", FINAL)) -> list[Row]:
    metrics = {"pixel AUROC": value, "pixel AP": None, "AUPRO": 0.25, "image AUROC": 1.0}
    rows: list[Row] = [{**key._asdict(), "map": name, **metrics} for name in maps]
    rows[-1].update(
        {"model": "TwoStageSuperpixel", "steps": 7, "settings": {"trainer": {"max_steps": 7}, "a": 'b,"c"'}}
    )
    return rows


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A table of two runs."""
    path = tmp_path / "results" / "table.csv"
    with ResultsTable(path) as table:
        table.add(rows_of(KEY))
        table.add(rows_of(KEY._replace(seed=1)))
    return path


def test_rows_come_back_as_they_were_written(path: Path) -> None:
    rows, left_out = read_rows(path)
    assert left_out == []
    assert [(row["seed"], row["map"]) for row in rows] == [(0, "stage one"), (0, FINAL), (1, "stage one"), (1, FINAL)]
    assert rows[1]["label"] == "ours, small"
    assert (rows[1]["pixel AUROC"], rows[1]["pixel AP"]) == (0.5, None)
    assert rows[1]["settings"] == {"trainer": {"max_steps": 7}, "a": 'b,"c"'}


def test_rewriting_changes_nothing(path: Path) -> None:
    before = path.read_text()
    with ResultsTable(path) as table:
        table.add(rows_of(KEY._replace(seed=2)))
    assert path.read_text().startswith(before)
    assert len(read_rows(path)[0]) == 6


@pytest.mark.parametrize("cut", [1, 2, 40, 120])
def test_half_written_line_is_named_and_its_run_redone(path: Path, cut: int) -> None:
    path.write_text(path.read_text()[:-cut])
    with ResultsTable(path) as table:
        assert "line 5 is half-written: 'ours, small" in " ".join(table.left_out).replace("'\"", "'")
        assert any("ours, small, bottle, seed 1 has no row of its final map" in text for text in table.left_out)
        assert table.run(KEY) is not None
        assert table.run(KEY._replace(seed=1)) is None
        table.add(rows_of(KEY._replace(seed=1)))
    rows, left_out = read_rows(path)
    assert (len(rows), left_out) == (4, [])


def test_damaged_file_is_kept_beside_the_mended_one(path: Path) -> None:
    lines = path.read_text().splitlines(keepends=True)
    lines[2] = lines[2].replace("0.25", "0.2x")
    path.write_text("".join(lines))
    with ResultsTable(path) as table:
        assert not path.with_name("table.csv.damaged").exists()  # nothing is lost yet
        table.add(rows_of(KEY._replace(seed=2)))
        table.add(rows_of(KEY._replace(seed=3)))
    assert path.with_name("table.csv.damaged").read_text() == "".join(lines)
    assert {row["seed"] for row in read_rows(path)[0]} == {1, 2, 3}


@pytest.mark.parametrize("damage", [("0.25", "0.2x"), ("TwoStageSuperpixel,", ""), ('"{""trainer""', '"{""trainer')])
def test_damaged_line_in_the_middle_is_named(path: Path, damage: tuple[str, str]) -> None:
    lines = path.read_text().splitlines(keepends=True)
    lines[2] = lines[2].replace(*damage)
    path.write_text("".join(lines))
    rows, left_out = read_rows(path)
    assert [row["seed"] for row in rows] == [1, 1]
    assert "line 3 is damaged" in left_out[0]


def test_header_cut_short_is_an_empty_table(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_text(",".join(COLUMNS)[:50])
    rows, left_out = read_rows(path)
    assert rows == []
    assert "line 1 is half-written" in left_out[0]


def test_other_file_is_refused_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "other.csv"
    path.write_text("category,seed\nbrick,0\n")
    with pytest.raises(ValueError, match=r"other\.csv is not a table of this command.*category,seed"):
        ResultsTable(path)
    assert path.read_text() == "category,seed\nbrick,0\n"


def test_run_that_is_there_twice_is_refused(path: Path) -> None:
    path.write_text(path.read_text() + path.read_text().splitlines(keepends=True)[-1])
    with pytest.raises(ValueError, match=r"seed 1, map 'final' twice; the second time in line 6"):
        read_rows(path)


def test_one_writer_at_a_time(path: Path) -> None:
    with ResultsTable(path), pytest.raises(RuntimeError, match="Another process is writing"):
        ResultsTable(path)
    ResultsTable(path).close()


def test_failed_write_leaves_the_old_table(path: Path) -> None:
    before = path.read_text()
    with ResultsTable(path) as table:
        with pytest.raises(ValueError, match="must not hold a line break: label"):
            table.add(rows_of(RunKey("two\nlines", "bottle", 0)))
        with pytest.raises(ValueError, match="not in fieldnames"):
            table.add([{**rows_of(KEY._replace(seed=5))[-1], "colour": "red"}])
        with pytest.raises(ValueError, match="last row of a run must be that of its map 'final'"):
            table.add(rows_of(KEY._replace(seed=5), maps=(FINAL, "stage one")))
    assert path.read_text() == before


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("folder.csv", r"folder\.csv is a folder: give --out a file"),
        ("file/table.csv", r"Cannot write .*file/table\.csv"),
    ],
)
def test_a_place_that_is_taken_is_named(name: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "folder.csv").mkdir()
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(OSError, match=message):
        ResultsTable(tmp_path / name)
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.name != "file"]
