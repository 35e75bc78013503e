"""Data as it lies: every format, zipped or not, alone, in folders and by a glob, reads alike."""

from __future__ import annotations

import csv
import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest

from fedlora.common.data import formats
from fedlora.common.data.data_file import (
    columns_of,
    file_digest,
    files_stamp,
    named_data,
    origin_of,
    parts_of,
)
from fedlora.common.errors import BadInput

ROWS = [{"text": "größe\tund\nlänge", "n": 1}, {"text": 'a "b", c', "n": 22}]
TABLE = {"text": [row["text"] for row in ROWS], "n": [1, 22]}


def _lines(path: Path) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")


def _array(path: Path) -> None:
    path.write_text("\ufeff " + json.dumps(ROWS, indent=1, ensure_ascii=False), encoding="utf-8")


def _table(mark: str) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        with path.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, ["text", "n"], delimiter=mark)
            writer.writeheader()
            writer.writerows(ROWS)

    return write


def _arrow(kind: str) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        table = pyarrow.Table.from_pylist(ROWS)
        with getattr(pyarrow.ipc, f"new_{kind}")(path, table.schema) as writer:
            writer.write_table(table)

    return write


def _parquet(path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)


FORMATS: dict[str, tuple[str, Callable[[Path], None]]] = {
    "lines": ("a.jsonl", _lines),
    "a list": ("a.json", _array),
    "lines in json": ("a.json", _lines),
    "commas": ("a.csv", _table(",")),
    "tabs": ("a.tsv", _table("\t")),
    "parquet": ("a.parquet", _parquet),
    "arrow's stream": ("a.arrow", _arrow("stream")),
    "arrow's file": ("a.arrow", _arrow("file")),
}


def zipped(path: Path) -> Path:
    """The file in its place, packed, under an upper-case ending."""
    target = path.with_name(path.name.upper() + ".GZ")
    target.write_bytes(gzip.compress(path.read_bytes()))
    path.unlink()
    return target


@pytest.mark.parametrize(("name", "write"), FORMATS.values(), ids=FORMATS.keys())
def test_every_format_reads_alike(name: str, write: Callable[[Path], None], tmp_path: Path) -> None:
    write(tmp_path / name)
    assert columns_of(tmp_path / name, ("text", "n"), tmp_path) == TABLE
    assert columns_of(zipped(tmp_path / name), ("n", "text"), tmp_path) == TABLE


def test_a_folder_is_its_parts(tmp_path: Path) -> None:
    """As Spark leaves one: parts in subfolders, and what is none beside them."""
    folder = tmp_path / "train.parquet"
    for part in ("year=2/part-1.parquet", "year=1/part-0.parquet"):
        (folder / part).parent.mkdir(parents=True)
        _parquet(folder / part)
    for aside in ("_SUCCESS", "year=1/.part-0.parquet.crc", "_temporary/0/part-9.parquet"):
        (folder / aside).parent.mkdir(parents=True, exist_ok=True)
        (folder / aside).write_text("")
    assert [part.name for part in parts_of(folder)] == ["part-0.parquet", "part-1.parquet"]
    assert columns_of(folder, ("n",), tmp_path) == {"n": [1, 22, 1, 22]}


def test_a_folder_of_shards_leaves_media_to_the_tables(tmp_path: Path) -> None:
    """As `imagefolder` lies: shards, and images that they name; what is neither is refused."""
    folder = tmp_path / "data"
    for name in ("shard-0.parquet", "images/b/shard-1.parquet"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        _parquet(folder / name)
    before = origin_of(folder), files_stamp(folder)
    for name in ("images/a.PNG", "images/b/c.jpeg", "sounds/d.wav"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"medium")
    assert columns_of(folder, ("n",), tmp_path) == {"n": [1, 22, 1, 22]}
    assert (origin_of(folder), files_stamp(folder)) == before
    (folder / "notes.txt").write_text("")
    with pytest.raises(BadInput, match=r"notes.txt: found .txt, expected one of"):
        parts_of(folder)
    for path in (folder / "notes.txt", *folder.rglob("*.parquet")):
        path.unlink()
    with pytest.raises(BadInput, match="found no data files"):
        parts_of(folder)


def test_shards_by_a_glob(tmp_path: Path) -> None:
    for place in (1, 0):
        _lines(tmp_path / f"train-{place}.jsonl")
    _lines(tmp_path / "test-0.jsonl")
    assert columns_of(tmp_path / "train-*.jsonl", ("n",), None) == {"n": [1, 22, 1, 22]}
    with pytest.raises(BadInput, match="found no data files"):
        columns_of(tmp_path / "dev-*.jsonl", ("n",), None)


def test_what_datasets_saved(tmp_path: Path) -> None:
    """`save_to_disk` leaves a stream of Arrow, its state, and caches that are no data."""
    split = tmp_path / "saved" / "train"
    split.mkdir(parents=True)
    _arrow("stream")(split / "data-00000-of-00001.arrow")
    _arrow("stream")(split / "cache-1.arrow")
    state = {"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}
    (split / "state.json").write_text(json.dumps(state))
    (split / "dataset_info.json").write_text("{}")
    assert columns_of(split, ("text", "n"), tmp_path) == TABLE
    (split.parent / "dataset_dict.json").write_text('{"splits": ["train"]}')
    with pytest.raises(BadInput, match="folder of the splits train, expected one of them"):
        columns_of(split.parent, ("text",), None)
    (split / "state.json").write_text("{}")
    with pytest.raises(BadInput, match="found no list of data files"):
        columns_of(split, ("text",), None)


def test_a_part_that_leads_out_is_refused(tmp_path: Path) -> None:
    _lines(tmp_path / "outside.jsonl")
    folder = tmp_path / "root" / "data"
    folder.mkdir(parents=True)
    (folder / "a.jsonl").symlink_to(tmp_path / "outside.jsonl")
    with pytest.raises(BadInput, match="leads to a place outside root"):
        columns_of(folder, ("text",), tmp_path / "root")


@pytest.mark.parametrize(
    ("name", "data", "fault"),
    [
        ("a.jsonl.gz", b"no gzip", "can't be unpacked"),
        ("a.csv.gz", gzip.compress(b"text\na\n" * 99, mtime=0)[:-9], "can't be unpacked"),
        ("a.arrow", b"ARROW1", "expected Arrow"),
        ("a.json", b"[1]", "row 1: found int, expected an object"),
        ("a.json", b"[{", "expected a list of objects"),
        ("a.JSON", b"{", "line 1: found no JSON"),
    ],
)
def test_files_that_are_refused(name: str, data: bytes, fault: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(BadInput, match=fault) as caught:
        columns_of(tmp_path / name, ("text",), None)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("kind", "value"),
    [(pyarrow.timestamp("ns"), 1), (pyarrow.time64("ns"), 1), (pyarrow.timestamp("s"), 10**15)],
    ids=str,
)
def test_a_time_that_python_has_no_value_for_is_one_line(
    kind: pyarrow.DataType, value: int, tmp_path: Path
) -> None:
    """As pandas and Spark write them: a finer one, and one of a year beyond 9999."""
    times = pyarrow.array([value]).cast(kind)
    pyarrow.parquet.write_table(pyarrow.table({"text": times}), tmp_path / "a.parquet")
    with pytest.raises(BadInput, match=r"a\.parquet: can't be read"):
        columns_of(tmp_path / "a.parquet", ("text",), None)


def test_a_small_file_does_not_unpack_to_a_huge_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(formats, "MAX_FILE_BYTES", 10_000)
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(b"text\n" + b"a\n" * 20_000, mtime=0))
    with pytest.raises(BadInput, match="unpacked: found 10001 bytes, expected at most 10000"):
        columns_of(tmp_path / "a.csv.gz", ("text",), None)


def test_a_stamp_moves_with_every_part(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    stamps = [files_stamp(folder)]  # of nothing
    folder.mkdir()
    assert files_stamp(folder) == stamps[0]
    changes: list[Callable[[], object]] = [
        lambda: _lines(folder / "a.jsonl"),
        lambda: _lines(folder / "b.jsonl"),
        lambda: (folder / "b.jsonl").rename(folder / "c.jsonl"),
        lambda: os.utime(folder / "c.jsonl", ns=(1, 1)),
        lambda: (folder / "c.jsonl").write_text("x"),
    ]
    for change in changes:
        change()
        stamps.append(files_stamp(folder))
        assert files_stamp(folder) == stamps[-1], "nothing was changed"
    assert len(set(stamps)) == len(stamps)
    (folder / "c.jsonl").unlink()
    assert files_stamp(folder) == stamps[1]


def test_a_digest_is_of_every_part(tmp_path: Path) -> None:
    def digests(*paths: Path) -> set[str]:
        return {file_digest(path) for path in paths}

    folder = tmp_path / "data"
    folder.mkdir()
    _lines(folder / "a.jsonl")
    alone, whole = file_digest(folder / "a.jsonl"), file_digest(folder)
    _lines(folder / "b.jsonl")
    two = file_digest(folder)
    (folder / "b.jsonl").rename(folder / "c.jsonl")
    assert len({alone, whole, two} | digests(folder)) == 4


def test_small_shards_that_are_equal_do_not_make_data_the_same(tmp_path: Path) -> None:
    for name, rows in (("a", 1_000), ("b", 2_000)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "part-0.csv").write_text("text\n")  # a writer's empty one
        (tmp_path / name / "part-1.csv").write_text("text\n" + f"{name} row\n" * rows)
    ours, theirs = (dict(origin_of(tmp_path / name).files) for name in "ab")
    assert sorted(map(bool, ours.values())) == [False, True]
    assert not set(filter(None, ours.values())) & set(theirs.values())


@pytest.mark.parametrize(
    ("lies", "said"),
    [
        ("nothing", "found no such file, expected one of .jsonl"),
        ("link", "found a link that leads to no file, expected one of .jsonl"),
        ("folder", "found no data files, expected at least one of .jsonl"),
        ("Makefile", "Makefile: found no ending, expected one of .jsonl"),
        ("below a file", "found no such file, expected one of .jsonl"),
    ],
)
def test_a_path_that_means_no_data_is_one_line_with_its_field(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lies: str, said: str
) -> None:
    monkeypatch.chdir(tmp_path)  # a path that is too long for a line is cut
    path = Path("a.csv")
    if lies == "link":
        path.symlink_to("nowhere.csv")
    elif lies == "below a file":
        path.touch()
        path = path / "b.csv"
    elif lies != "nothing":
        path.mkdir()
    if lies == "Makefile":
        (path / lies).touch()
    with pytest.raises(BadInput) as caught:
        named_data(str(path), "[data] test")
    (line,) = caught.value.faults
    assert line.startswith(f'[data] test = "{path}: '.replace(": ", '": ') + said), line


def test_what_a_folder_holds_is_not_left_out_unsaid(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shard that is a link to nowhere, and a folder that this user may not look into."""
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "1.csv").touch()
    assert parts_of(tmp_path) == (tmp_path / "a" / "1.csv",)
    lost = tmp_path / "a" / "2.csv"
    lost.symlink_to("nowhere.csv")
    with pytest.raises(BadInput, match=f"^{lost}: found a link that leads to no file"):
        parts_of(tmp_path)
    lost.unlink()
    listed = os.scandir

    def closed(place: str) -> object:
        if Path(place).name == "b":
            raise PermissionError(13, "Permission denied", str(place))
        return listed(place)

    monkeypatch.setattr(os, "scandir", closed)
    with pytest.raises(BadInput, match=r"a/b: can't be read \(Permission denied\), expected"):
        parts_of(tmp_path)
