"""Reading records, and the bad inputs under "Data" by their names."""

from __future__ import annotations

import csv
import json
import string
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlora.common.data import formats
from fedlora.common.data.records import (
    Columns,
    Records,
    UnitIndex,
    read_label_lists,
    read_label_set,
    read_records,
    unit_groups,
)
from fedlora.common.data.values import one_spelling
from fedlora.common.errors import BadInput

ROWS = [
    {"text": "good loan", "label": 1, "who": "ann", "answer": "yes"},
    {"text": 'größe, "naïve"\nline', "label": 0, "who": "bob", "answer": "no"},
    {"text": "bad card", "label": 1, "who": "ann", "answer": "12"},
]
COLUMNS = Columns("text", label="label", unit="who")
LABELS = ("0", "1")


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_csv(path: Path, rows: list[dict[str, Any]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


WRITERS = {".jsonl": write_jsonl, ".csv": write_csv, ".parquet": write_parquet}


def fault(
    path: Path, columns: Columns = COLUMNS, labels: tuple[str, ...] = LABELS, **more: Any
) -> str:
    """The one line that reading `path` ends in."""
    with pytest.raises(BadInput) as caught:
        read_records(path, columns, labels, **more)
    (line,) = str(caught.value).splitlines()
    return line


@pytest.mark.parametrize("ending", WRITERS)
def test_the_three_formats_read_alike(ending: str, tmp_path: Path) -> None:
    path = WRITERS[ending](tmp_path / f"a{ending}", ROWS)
    columns = Columns("text", response="answer", label="label", unit="who", more=("who",))
    records = read_records(path, columns, LABELS)
    assert records.texts == [row["text"] for row in ROWS]
    assert records.responses == ["yes", "no", "12"]
    assert records.labels is not None and records.labels.tolist() == [1, 0, 1]
    assert records.units == records.columns["who"] == ["ann", "bob", "ann"]
    assert (len(records), records.where) == (3, f"a{ending}")
    assert read_label_set(path, "label") == LABELS
    assert read_label_set(path, "who") == ("ann", "bob")


def test_part_of_a_file_keeps_its_row_numbers(tmp_path: Path) -> None:
    records = read_records(write_jsonl(tmp_path / "a.jsonl", ROWS), COLUMNS, LABELS)
    part = records.take(np.array([2, 1]))
    again = part.take(np.array([0]), "validation")
    assert again.texts == ["bad card"]
    assert (part.texts, part.units) == (["bad card", ROWS[1]["text"]], ["ann", "bob"])
    assert (records.place(0), part.place(0), again.place(0)) == (
        "a.jsonl row 1",
        "a.jsonl row 3",
        "validation row 3",
    )


# Bad inputs by name. Each writes a file and says what a person reads.

Bad = tuple[str, Callable[[Path], Any], str]


def _text(text: str | bytes) -> Callable[[Path], Any]:
    return lambda path: path.write_bytes(text.encode() if isinstance(text, str) else text)


def _rows(*rows: dict[str, Any]) -> Callable[[Path], Any]:
    return lambda path: WRITERS[path.suffix](path, list(rows))


BAD: dict[str, Bad] = {
    "data-empty": ("a.jsonl", _text(""), "a.jsonl: found no records, expected at least one"),
    "data-empty-lines": (
        "a.jsonl",
        _text("\n\n"),
        "a.jsonl: found no records, expected at least one",
    ),
    "data-empty-csv": (
        "a.csv",
        _text("text,label,who\n"),
        "a.csv: found no records, expected at least one",
    ),
    "data-not-utf8": (
        "a.jsonl",
        _text(
            b'{"text": "a", "label": 0, "who": "b"}\n{"text": "caf\xe9", "label": 0, "who": "b"}\n'
        ),
        "a.jsonl line 2: found a byte that is not UTF-8 at 13, expected UTF-8",
    ),
    "data-not-utf8-csv": (
        "a.csv",
        _text(b"text,label,who\ncaf\xe9,0,b\n"),
        "a.csv line 2: found a byte that is not UTF-8 at 3, expected UTF-8",
    ),
    "data-missing-column": (
        "a.parquet",
        _rows({"body": "a", "label": 0, "who": "b"}),
        'a.parquet: found columns ["body", "label", "who"], expected "text" among them',
    ),
    "data-missing-column-jsonl": (
        "a.jsonl",
        _rows(ROWS[0], {"text": "a", "who": "b"}),
        'a.jsonl row 2: found columns ["text", "who"], expected "label" among them',
    ),
    "data-unit-column-missing": (
        "a.csv",
        _text("text,label\na,0\n"),
        'a.csv: found columns ["label", "text"], expected "who" among them',
    ),
    "data-column-twice": (
        "a.csv",
        _text("text,label,who,text\na,0,b,c\n"),
        'a.csv: found column "text" twice, expected it once',
    ),
    "data-null-label": (
        "a.jsonl",
        _rows(ROWS[0], ROWS[1] | {"label": None}),
        "a.jsonl row 2 label: found nothing, expected a value",
    ),
    "data-null-label-parquet": (
        "a.parquet",
        _rows(ROWS[0], ROWS[1], ROWS[2] | {"label": None}),
        "a.parquet row 3 label: found nothing, expected a value",
    ),
    "data-null-label-csv": (
        "a.csv",
        _text("text,label,who\na,,b\n"),
        "a.csv row 1 label: found nothing, expected a value",
    ),
    "data-null-label-nan": (
        "a.jsonl",
        _text('{"text": "a", "label": NaN, "who": "b"}'),
        "a.jsonl row 1 label: found nothing, expected a value",
    ),
    "data-null-unit": (
        "a.jsonl",
        _rows(ROWS[0] | {"who": ""}),
        "a.jsonl row 1 who: found nothing, expected a value",
    ),
    "data-float-unit": (
        "a.jsonl",
        _rows(ROWS[0] | {"who": 1.0}),
        "a.jsonl row 1 who: found float, expected text or an integer",
    ),
    "data-null-text": (
        "a.parquet",
        _rows(ROWS[0], ROWS[1] | {"text": None}),
        "a.parquet row 2 text: found nothing, expected text or an integer",
    ),
    "data-bytes-text": (
        "a.parquet",
        _rows(ROWS[0] | {"text": b"abc"}),
        "a.parquet row 1 text: found bytes, expected text or an integer",
    ),
    "data-half-surrogate": (
        "a.jsonl",
        _text('{"text": "\\ud800", "label": 0, "who": "b"}'),
        "a.jsonl row 1 text: found half a surrogate pair, expected text or an integer",
    ),
    "data-label-outside-0..k": (
        "a.jsonl",
        _rows(ROWS[0], ROWS[1] | {"label": 2}),
        "a.jsonl row 2 label: found 2, expected one of the 2 public labels 0, 1",
    ),
    "data-label-negative": (
        "a.csv",
        _rows(ROWS[0], ROWS[1] | {"label": -1}),
        'a.csv row 2 label: found "-1", expected one of the 2 public labels 0, 1',
    ),
    "data-label-bool": (
        "a.jsonl",
        _rows(ROWS[0] | {"label": True}),
        "a.jsonl row 1 label: found true, expected one of the 2 public labels 0, 1",
    ),
    "data-not-json": (
        "a.jsonl",
        _text('{"text": '),
        (
            "a.jsonl line 1: found no JSON (Expecting value: line 1 column 10 (char 9)), expected"
            " an object"
        ),
    ),
    "data-not-an-object": (
        "a.jsonl",
        _text("[1]\n"),
        "a.jsonl line 1: found list, expected an object",
    ),
    "data-csv-fields": (
        "a.csv",
        _text("text,label,who\na,0\n"),
        "a.csv line 2: found 2 fields, expected 3 as in the header",
    ),
    "data-csv-open-quote": (
        "a.csv",
        _text('text,label,who\n"a,0,b\n'),
        "a.csv line 2: found no CSV (unexpected end of data), expected fields",
    ),
    "data-ending": (
        "a.txt",
        _text("a"),
        "a.txt: found .txt, expected one of .jsonl, .json, .csv, .tsv, .parquet, .arrow, .sqlite,"
        " .sqlite3, .db, or with .gz",
    ),
}


@pytest.mark.parametrize(("name", "write", "expected"), BAD.values(), ids=BAD.keys())
def test_bad_data(name: str, write: Callable[[Path], Any], expected: str, tmp_path: Path) -> None:
    write(tmp_path / name)
    assert fault(tmp_path / name) == expected


@pytest.mark.parametrize(
    "ending", [".jsonl", ".csv"], ids=["data-line-100MB", "data-line-100MB-csv"]
)
def test_long_line(ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"a{ending}"
    with path.open("wb") as stream:
        stream.write(b"text,label,who\n" if ending == ".csv" else b"\n")
        stream.truncate(100_000_000)  # one line of zeros; the file system keeps no block for it
    line = fault(path)
    assert (
        line
        == f"{path.name} line 2: found more than {formats.MAX_LINE_BYTES} bytes, expected fewer"
    )


@pytest.mark.parametrize(
    "number", ["9" * 5_000, "9" * 19, "٣", "007"], ids=["5000", "19", "arabic", "zeros"]
)
def test_digits_in_csv_text_stay_text(number: str, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(f"text,label,who\n{number},1,b\n", encoding="utf-8")
    assert read_records(tmp_path / "a.csv", COLUMNS, LABELS).texts == [number]


@pytest.mark.parametrize(
    "direct", [True, False], ids=["data-symlink-outside-root", "data-path-outside-root"]
)
def test_outside_root(direct: bool, tmp_path: Path) -> None:
    root = tmp_path / "node"
    root.mkdir()
    outside = write_jsonl(tmp_path / "a.jsonl", ROWS)
    (root / "a.jsonl").symlink_to(outside)
    path = root / "a.jsonl" if direct else root / ".." / "a.jsonl"
    assert (
        fault(path, root=root)
        == "a.jsonl: leads to a place outside node, expected a file inside it"
    )
    (root / "b.jsonl").symlink_to(write_jsonl(root / "c.jsonl", ROWS))
    (tmp_path / "link").symlink_to(root)
    for way_in in (root, tmp_path / "link"):
        assert len(read_records(way_in / "b.jsonl", COLUMNS, LABELS, root=way_in)) == 3


def test_too_large_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_parquet(tmp_path / "a.parquet", [ROWS[0] | {"text": "a" * 100_000}] * 50)
    monkeypatch.setattr(formats, "MAX_FILE_BYTES", 20_000)
    assert path.stat().st_size < 20_000, "small on disk, large once unpacked"
    unpacked = fault(path)
    assert "bytes, expected at most 20000" in unpacked and unpacked.startswith("a.parquet: found ")
    assert "bytes, expected at most 20000" in fault(write_jsonl(tmp_path / "a.jsonl", ROWS * 200))


@pytest.mark.parametrize("kept", [0, 4, 100, -1])
def test_truncated_parquet(kept: int, tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", ROWS)
    path.write_bytes(path.read_bytes()[:kept])
    assert fault(path).startswith("a.parquet: can't be read (")


def test_no_such_file(tmp_path: Path) -> None:
    assert (
        fault(tmp_path / "a.csv") == f"{tmp_path}/a.csv: found no such file, expected one of"
        " .jsonl, .json, .csv, .tsv, .parquet, .arrow, .sqlite, .sqlite3, .db"
    )
    with pytest.raises(BadInput, match="found no such file"):
        read_label_set(tmp_path / "a.csv", "label")


def test_labels_need_a_public_set(tmp_path: Path) -> None:
    """An empty set must not turn into labels that the training file made up."""
    path = write_jsonl(tmp_path / "a.jsonl", ROWS)
    assert (
        fault(path, labels=())
        == "a.jsonl label: found no public label set, expected one to read labels against"
    )


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (
            ["spam", "ham", "spam "],
            'test.jsonl label: found "spam" and "spam ", which differ in white space, case or'
            " Unicode form only, expected one spelling, or both in [data] labels",
        ),
        (
            ["É", "e", "e\u0301"],
            'test.jsonl label: found "e\u0301" and "É", which differ in white space, case or'
            " Unicode form only, expected one spelling, or both in [data] labels",
        ),
        ([0, 0], "test.jsonl label: found 1 labels, expected 2 to 100000"),
        (["a", None], "test.jsonl row 2 label: found nothing, expected a value"),
        ([1.5, 0], "test.jsonl row 1 label: found float, expected text or an integer"),
        ([], "test.jsonl: found no records, expected at least one"),
        (
            ["1.0", "0.5", "0"],
            "test.jsonl label: found numbers such as 0.5, expected names or integers; task ="
            ' "regression" learns numbers, and [data] labels may list them as names',
        ),
        ([" ", "a"], 'test.jsonl label: found " ", expected a name that is seen'),
    ],
)
def test_bad_label_set(labels: list[Any], expected: str, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "test.jsonl", [{"label": label} for label in labels])
    with pytest.raises(BadInput) as caught:
        read_label_set(path, "label")
    assert caught.value.faults == (expected,)


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ([1, 0, 1], ("0", "1")),
        ([99213, 43239, 5], ("5", "43239", "99213")),  # codes are names: the values that occur
        ([-1, 1], ("-1", "1")),
        (["10", "9"], ("10", "9")),
        (["042", "250.5"], ("042", "250.5")),  # no number begins so: codes
    ],
)
def test_a_label_set_is_what_occurs(
    labels: list[Any], expected: tuple[str, ...], tmp_path: Path
) -> None:
    path = write_jsonl(tmp_path / "test.jsonl", [{"label": label} for label in labels])
    assert read_label_set(path, "label") == expected


def test_numbers_may_be_listed_as_names(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("text,label\nt,1.0\n", encoding="utf-8")
    with pytest.raises(BadInput, match=r"found numbers such as 1\.0"):
        read_label_set(path, "label")
    records = read_records(path, Columns("text", label="label"), ("0.0", "1.0"))
    assert records.labels is not None and records.labels.tolist() == [1]


def test_a_label_of_a_list_is_named_by_its_place(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"labels": ["a"]}, {"labels": ["a", None]}])
    with pytest.raises(BadInput, match="row 2 labels row 2 of its list: found nothing"):
        read_label_lists(path, "labels")


def test_a_label_that_is_spelt_otherwise_is_named_with_the_public_one(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "t", "label": "Spam "}])
    assert fault(path, Columns("text", label="label"), ("ham", "spam")) == (
        'a.jsonl row 1 label: found "Spam ", expected one of the 2 public labels ham, spam; did'
        ' you mean "spam"?'
    )


# Units


@given(st.lists(st.sampled_from("abcdef")))
def test_unit_groups_hold_every_record_once(names: list[str]) -> None:
    units = unit_groups(names)
    assert sorted(units.records.tolist()) == list(range(len(names)))
    assert len(units) == len(set(names))
    for unit in range(len(units)):
        mine = units.records[units.offsets[unit] : units.offsets[unit + 1]].tolist()
        assert mine == [record for record, name in enumerate(names) if name == names[mine[0]]]


SPELLINGS = ("José  García", "jose\u0301 garcía", " JOSÉ\u00a0GARCÍA\t", "Jos\u00e9\u200b García")


def test_a_unit_that_is_spelled_in_several_ways_is_one(tmp_path: Path) -> None:
    names = (*SPELLINGS, "Ann", "ann", "Bob")
    rows = [{"text": "t", "label": 0, "who": name} for name in names]
    for ending, write in WRITERS.items():
        records = read_records(write(tmp_path / f"a{ending}", rows), COLUMNS, LABELS)
        assert records.units is not None and len(set(records.units)) == 3
        assert unit_groups(records.units).offsets.tolist() == [0, 4, 6, 7]
        assert records.respelled == 2 and "2 units were spelled" in records.spellings
        assert records.take(np.array([1, 2])).spellings == records.spellings
    plain = read_records(write_csv(tmp_path / "b.csv", ROWS), COLUMNS, LABELS)
    assert plain.respelled == 0 and plain.spellings == ""


@pytest.mark.parametrize(
    "mark", [*"\u00ad\u034f\u115f\u180b\u200d\u2800\u3164\ufe0f\uffa0\U000e0100\U000e0041"]
)
def test_a_unit_can_not_be_split_by_what_nobody_sees(mark: str) -> None:
    """Before: six of seven were units of their own, each with the whole ε."""
    for name in (f"Ann Lee{mark}", f"{mark}Ann Lee", f"An{mark}n Lee"):
        assert one_spelling(name) == "ann lee"


def test_a_whole_number_and_the_same_with_a_fraction_of_nothing_are_one_unit(
    tmp_path: Path,
) -> None:
    """As shards are saved of which one had a gap; alone it stays as it is."""
    for who, expected in (("7 7.0 8.0 7.5", ["7", "7", "8.0", "7.5"]), ("7.0 7.00", ["7", "7"])):
        lines = [f"t,0,{name}" for name in who.split()]
        (tmp_path / "a.csv").write_text("\n".join(["text,label,who", *lines]), encoding="utf-8")
        records = read_records(tmp_path / "a.csv", COLUMNS, LABELS)
        assert records.units == expected and records.respelled == 1


def test_a_unit_of_which_nothing_is_seen_is_none(tmp_path: Path) -> None:
    rows = [{"text": "t", "label": 0, "who": name} for name in ("a", " \u200b")]
    found = fault(write_jsonl(tmp_path / "a.jsonl", rows))
    assert found == "a.jsonl row 2 who: found nothing visible, expected a value"


@given(st.text(), st.sampled_from(["NFC", "NFD", "NFKC", "NFKD"]))
def test_a_units_one_spelling_stays_and_knows_no_form(name: str, form: Any) -> None:
    assert one_spelling(one_spelling(name)) == one_spelling(name)
    assert one_spelling(unicodedata.normalize(form, name)) == one_spelling(name)
    assert one_spelling(f"\t {name}\u00a0 ") == one_spelling(name)


@given(st.text(string.ascii_letters + string.digits + "-_", min_size=1))
def test_other_names_are_other_units(name: str) -> None:
    assert one_spelling(name) == name.lower() != one_spelling(name + "0")


@given(st.integers(0, 50))
def test_without_units_each_record_is_its_own(records: int) -> None:
    units = unit_groups(None, records)
    assert units.offsets.tolist() == list(range(records + 1))
    assert units.records.tolist() == list(range(records))


def test_no_unit_at_all() -> None:
    assert len(unit_groups([])) == len(unit_groups(None, 0)) == 0


@given(st.lists(st.text(max_size=20), min_size=1, max_size=10))
def test_any_text_survives_a_file(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str]
) -> None:
    clean = [text.replace("\r", "").replace("\0", "") for text in texts]
    folder = tmp_path_factory.mktemp("any")
    for ending, write in WRITERS.items():
        path = write(folder / f"a{ending}", [{"text": text, "n": 1} for text in clean])
        assert read_records(path, Columns("text")).texts == clean


# Real data


@pytest.mark.parametrize("name", ["ag_news", "banking77", "clinc150"])
def test_real_classification(name: str, shared_data: Path) -> None:
    folder = shared_data / name
    labels = read_label_set(folder / "test.parquet", "label")
    train = read_records(folder / "train.parquet", Columns("text", label="label"), labels)
    sizes = {"ag_news": (68_659, 4), "banking77": (10_003, 77), "clinc150": (15_000, 150)}
    assert (len(train), len(labels)) == sizes[name]
    assert train.labels is not None and set(train.labels.tolist()) == set(range(len(labels)))


def test_real_language_model(shared_data: Path) -> None:
    columns = Columns("text", response="answer", more=("institute",))
    records = read_records(shared_data / "medquad" / "train.parquet", columns)
    assert len(records) == 14_766 and records.responses is not None and records.labels is None
    assert isinstance(records, Records) and isinstance(unit_groups(None, len(records)), UnitIndex)
    assert all(records.responses) and len(set(records.columns["institute"])) > 1
