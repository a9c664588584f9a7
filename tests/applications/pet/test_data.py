"""Rows from files: three formats, folders of such files, and the lines that errors name."""

from __future__ import annotations

import csv
import json
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from graftc.applications.pet import data as module
from graftc.applications.pet.data import PetData, TextRows, load_pet_data, load_rows
from graftc.specs.errors.diagnostics import GraftError
from tests.kit.refusals import refused

LABELS = ("space", "hockey")
LIMIT = csv.field_size_limit()


def put(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def line(error: GraftError) -> int | None:
    assert error.place is not None
    return error.place.line


CELLS = st.text(st.characters(codec="utf-8", exclude_characters="\r\n\x00"), max_size=12)
ROWS = st.lists(st.tuples(CELLS, CELLS, st.sampled_from(LABELS)), min_size=1, max_size=5)


@pytest.mark.slow
@given(rows=ROWS)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=50)
def test_all_formats_hold_the_same(rows: list[tuple[str, str, str]], tmp_path: Path) -> None:
    header = ("text", "title", "label")
    lines = [json.dumps(dict(zip(header, row, strict=True)), ensure_ascii=False) for row in rows]
    put(tmp_path / "a.jsonl", "\n".join(lines))
    with (tmp_path / "a.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    loaded = [load_rows(tmp_path / name, LABELS) for name in ("a.jsonl", "a.csv")]
    if not any("\t" in cell for row in rows for cell in row):
        put(tmp_path / "a.tsv", "".join("\t".join(row) + "\n" for row in (header, *rows)))
        loaded.append(load_rows(tmp_path / "a.tsv", LABELS))
    for part in loaded:
        assert part.rows == tuple({"text": text, "title": title} for text, title, _ in rows)
        assert part.labels == tuple(LABELS.index(label) for _, _, label in rows)
        assert len(part) == len(rows) == len(part.lines)


def test_cells_over_several_lines_and_marks_of_order(tmp_path: Path) -> None:
    path = put(tmp_path / "a.csv", '\ufefftext,label\n"a\n""b"", c",space\n\nd,hockey\n')
    loaded = load_rows(path, LABELS)
    assert loaded == TextRows(({"text": 'a\n"b", c'}, {"text": "d"}), (0, 1), (3, 5), str(path), LABELS)
    assert load_rows(put(tmp_path / "a.jsonl", '\ufeff{"text": "a"}\r\n\r\n{"text": "b"}')).lines == (1, 3)
    assert load_rows(put(tmp_path / "a.tsv", 'text\n"a\n')).rows == ({"text": '"a'},)


def test_numbers_are_text_and_other_fields_are_left_out(tmp_path: Path) -> None:
    path = put(tmp_path / "a.jsonl", '{"text": "a", "year": 1999, "more": [1], "none": null, "label": 1}')
    loaded = load_rows(path, ["0", "1"])
    assert loaded.rows == ({"text": "a", "year": "1999"},) and loaded.labels == (1,)
    assert load_rows(path, slots=["year"]).rows == ({"year": "1999"},)
    assert load_rows(path).labels is load_rows(path).names is None


def test_numbers_are_of_the_labels_that_were_given(tmp_path: Path) -> None:
    path = put(tmp_path / "a.jsonl", '{"text": "a", "label": "space"}')
    loaded = [load_rows(path, labels) for labels in (["space", "hockey"], ["hockey", "space"])]
    assert [rows.names and rows.names[rows.labels[0]] for rows in loaded if rows.labels] == ["space", "space"]
    assert [rows.labels for rows in loaded] == [(0,), (1,)]


@pytest.mark.parametrize("text", ["😀", "\\ud83d", "\\\\ud83d\\ude00", "a😀b\ud7ff", '"\\'])
def test_escapes_are_read(text: str, tmp_path: Path) -> None:
    row = {"text": text, text: "key"}
    path = put(tmp_path / "a.jsonl", json.dumps(row) + "\n" + json.dumps(row, ensure_ascii=False))
    assert load_rows(path).rows == (row, row)


def test_a_part_of_rows() -> None:
    rows = TextRows(({"text": "a"}, {"text": "b"}, {"text": "c"}), (0, 1, 0), (2, 3, 4), "f", LABELS)
    assert rows.subset([2, 0]) == TextRows(({"text": "c"}, {"text": "a"}), (0, 0), (4, 2), "f", LABELS)
    assert TextRows(({"text": "a"},)).subset([0]) == TextRows(({"text": "a"},))


def test_folders_and_named_files(tmp_path: Path) -> None:
    put(tmp_path / "train.jsonl", '{"text": "a", "label": "hockey"}')
    put(tmp_path / "unlabeled.csv", "text,label\nb,never read\n")
    put(tmp_path / "notes.txt", "")
    put(tmp_path / "more.csv", "")
    put(tmp_path / "train.jsonl.bak", "")
    (tmp_path / "train.d").mkdir()
    data = load_pet_data(tmp_path, LABELS, ["text"])
    assert isinstance(data, PetData) and data.test is None
    assert data.train is not None and data.train.labels == (1,)
    assert data.unlabelled is not None and data.unlabelled.rows == ({"text": "b"},)
    assert data.unlabelled.labels is None
    same = load_pet_data(
        {"train": tmp_path / "train.jsonl", "unlabelled": tmp_path / "unlabeled.csv"}, LABELS, ["text"]
    )
    assert same == data


def test_folders_that_cannot_be_used(tmp_path: Path) -> None:
    def failing(source: Any) -> GraftError:
        with pytest.raises(GraftError) as caught:
            load_pet_data(source, LABELS)
        assert caught.value.code == "GC180"
        return caught.value

    assert "contains no data" in failing(tmp_path).message
    assert "no such file" in failing(tmp_path / "none").message
    put(tmp_path / "train.csv", "text\na")
    put(tmp_path / "train.jsonl", "{}")
    assert "several files for one part: train.csv, train.jsonl" in failing(tmp_path).message
    assert failing({"trian": tmp_path}).hint == "did you mean 'train'?"
    assert failing(put(tmp_path / "file", "")).message.endswith("not a directory")


@pytest.mark.parametrize(
    ("name", "said", "hint"),
    [
        ("train.json", "the format of", "name it train.jsonl, .csv or .tsv"),
        ("Test.txt", "the format of", "name it test.jsonl"),
        ("train", "the format of", "name it train.jsonl"),
        ("train.jsonl.gz", "the format of", "name it train.jsonl"),
        ("trian.jsonl", "is not part of the data", "did you mean 'train.jsonl'?"),
        ("unlabeled_.csv", "is not part of the data", "did you mean 'unlabeled.csv'?"),
        ("labelled.csv", "is not part of the data", "did you mean 'train.csv'?"),
    ],
)
def test_no_part_is_passed_over(name: str, said: str, hint: str, tmp_path: Path) -> None:
    put(tmp_path / "unlabelled.jsonl", '{"text": "a"}')
    put(tmp_path / name, '{"text": "a", "label": "space"}')
    with pytest.raises(GraftError) as caught:
        load_pet_data(tmp_path, LABELS)
    assert caught.value.code == "GC180" and said in caught.value.message and name in caught.value.message
    assert caught.value.hint.startswith(hint)


@pytest.mark.parametrize(
    ("name", "content", "number", "said"),
    [
        ("a.jsonl", '{"text": "a"}\n{"text": ', 2, "the line is not JSON"),
        ("a.jsonl", '{"text": "a"}\n\n["a"]', 3, "the line is not an object"),
        ("a.jsonl", '{"text": "a", "text": "b"}', 1, "a key is repeated"),
        ("a.jsonl", '{"text": "\\ud800"}', 1, "half a character"),
        ("a.jsonl", '{"text": "a"}\n{"text": "\\ude00\\ud83d"}', 2, "half a character"),
        ("a.jsonl", '{"text": [{"\\udfff": 1}]}', 1, "half a character"),
        ("a.jsonl", '{"text": NaN}', 1, "not JSON"),
        ("a.jsonl", "[" * 100_000, 1, "nested too deeply"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}', 2, "not UTF-8"),
        ("a.jsonl", '{"text": null}', 1, "'text' is null, which is not text"),
        ("a.jsonl", '{"txt": "a"}', 1, "no field 'text', which a pattern uses"),
        ("a.csv", "text,b\na,b\nc\n", 3, "the row has 1 cell, but the header has 2"),
        ("a.csv", "text,b\na,b,c\n", 2, "the row has 3 cells, but the header has 2"),
        ("a.csv", 'text,b\n"a"c,b\n', 2, "the row cannot be read"),
        ("a.csv", 'text,b\nx,y\n"a,b\n', 3, "the row cannot be read"),
        ("a.csv", "text,text\na,b\n", 1, "two columns have the name 'text'"),
        ("a.csv", "text,\na,b\n", 1, "column 2 has no name"),
        ("a.csv", "txt\na\n", 2, "no field 'text'"),
        ("a.csv", "text\n" + "a" * 200_000, 2, "has 200,000 characters, more than 100,000"),
        ("a.csv", 'text\n"' + "a\n" * 900_000, 2, "a cell has more than 100,000 characters"),
        ("a.csv", "text\n" + "a" * 110_000, 2, "has 110,000 characters, more than 100,000"),
        ("a.csv", b"text\n\xff\n", None, "not UTF-8 text: byte 0xff"),
        ("a.csv", "", None, "has no rows"),
        ("a.tsv", "text\tlabel\n", None, "has no rows"),
        ("a.jsonl", "\n\n", None, "has no rows"),
    ],
)
def test_rows_that_cannot_be_used(
    name: str, content: str | bytes, number: int | None, said: str, tmp_path: Path
) -> None:
    error = refused(load_rows, put(tmp_path / name, content), code="GC180", slots=["text"])
    assert said in error.message and line(error) == number
    assert len(str(error)) < 2_000 and csv.field_size_limit() == LIMIT


def test_a_file_of_one_line_has_a_header_only(tmp_path: Path) -> None:
    assert (
        "the first line is read as the header"
        in refused(load_rows, put(tmp_path / "a.csv", "the moon,space\n"), code="GC180").hint
    )
    assert "first line" not in refused(load_rows, put(tmp_path / "a.jsonl", "\n"), code="GC180").hint


@pytest.mark.parametrize(
    ("label", "said", "hint"),
    [
        ('"hokey"', "no label 'hokey'", "did you mean 'hockey'?"),
        ('"x"', "no label 'x'", "the labels are: space, hockey"),
        ("true", "no label true", "the labels are: space, hockey"),
        ('" space"', "no label ' space'", "did you mean 'space'?"),
    ],
)
def test_labels_that_are_not_there(label: str, said: str, hint: str, tmp_path: Path) -> None:
    path = put(tmp_path / "a.jsonl", f'{{"text": "a", "label": "space"}}\n{{"text": "a", "label": {label}}}')
    error = refused(load_rows, path, LABELS, code="GC180")
    assert said in error.message and error.hint == hint and line(error) == 2


def test_rows_without_labels(tmp_path: Path) -> None:
    error = refused(load_rows, put(tmp_path / "a.csv", "text,Label\na,space"), LABELS, code="GC180")
    assert error.message == "the row has no 'label'" and error.hint.startswith("did you mean 'Label'?")


def test_files_that_are_not_there(tmp_path: Path) -> None:
    put(tmp_path / "train.jsonl", "{}")
    assert "train.jsonl" in refused(load_rows, tmp_path / "trian.jsonl", code="GC180").hint
    assert refused(load_rows, tmp_path / "data.txt", code="GC180").hint == "name it data.jsonl, .csv or .tsv"
    (tmp_path / "b.csv").mkdir()
    assert "not a regular file" in refused(load_rows, tmp_path / "b.csv", code="GC180").message
    (tmp_path / "c.csv").symlink_to("gone.csv")
    assert refused(load_rows, tmp_path / "c.csv", code="GC180").message.endswith(
        "is a link to 'gone.csv', which does not exist"
    )
    assert refused(load_rows, "a\0.csv", code="GC180").message.startswith("there is no file")
    assert refused(load_rows, tmp_path / "none" / "a.csv", code="GC180").code == "GC180"


def test_sizes_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = put(tmp_path / "a.csv", "text\na\nb\nc\n")
    monkeypatch.setattr(module, "ROWS", 2)
    assert line(refused(load_rows, path, code="GC180")) == 4
    monkeypatch.setattr(module, "FILE_BYTES", 5)
    assert "more than 5 bytes" in refused(load_rows, path, code="GC180").message
    monkeypatch.setattr(module, "FILE_BYTES", 1_000)
    monkeypatch.setattr(module, "_LINE", 20)
    error = refused(load_rows, put(tmp_path / "a.jsonl", '{"text": "a"}\n{"text": "abcdefghijklmnop"}'), code="GC180")
    assert line(error) == 2 and "more than 20 bytes" in error.message


@pytest.mark.slow
@pytest.mark.parametrize("columns", [1_001, 1_000_000])
@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl"])
def test_rows_have_so_many_fields(tmp_path: Path, columns: int, suffix: str) -> None:
    file = tmp_path / f"train{suffix}"
    names = [f"c{n}" for n in range(columns)]
    if suffix == ".jsonl":
        names = names[:100_000]  # a longer line is refused for its length
        file.write_text(json.dumps(dict.fromkeys(names, "x")) + "\n")
    else:
        mark = {".csv": ",", ".tsv": "\t"}[suffix]
        file.write_text(f"{mark.join(names)}\n{mark.join('x' * columns)}\n")
    started = time.process_time()
    with pytest.raises(GraftError) as caught:
        load_rows(file, ["a"])
    assert caught.value.code == "GC180" and time.process_time() - started < 2


def test_a_thousand_columns_are_read(tmp_path: Path) -> None:
    names = [f"c{n}" for n in range(1_000)]
    (tmp_path / "train.csv").write_text(f"{','.join(names)}\n{','.join('x' * 1_000)}\n")
    assert len(load_rows(tmp_path / "train.csv").rows[0]) == 1_000
