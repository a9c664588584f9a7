"""Load rows from JSON Lines, CSV and TSV files, and from folders of such files."""

from __future__ import annotations

import csv
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, NoReturn, TypeAlias

from graftc.specs.errors.diagnostics import GraftError, Place, correction, nearest, nearest_beside
from graftc.specs.errors.text import quoted, shown, some
from graftc.specs.pet.pattern import LABEL
from graftc.specs.strict_json import read_json

FILE_BYTES = 4 * 1024**3
"""The maximum size of a file, in bytes."""

ROWS = 10_000_000
"""The maximum number of rows in a file."""

TEXT = 100_000
"""The maximum number of characters in a field."""

FIELDS = 1_000
"""The maximum number of fields in a row, and of columns in a table."""

_LINE = 16 * TEXT
"""The maximum number of bytes in a line of JSON."""

_FORMATS = (".jsonl", ".ndjson", ".csv", ".tsv")
_SPLITS = {"train": ("train",), "unlabelled": ("unlabelled", "unlabeled"), "test": ("test",)}
_MEANT = {"labelled": "train", "labeled": "train"} | {stem: stem for stems in _SPLITS.values() for stem in stems}
"""The stems that a misspelt file name may be intended to have, each with the stem to suggest."""

_Source: TypeAlias = str | PathLike[str]


@dataclass(frozen=True)
class TextRows:
    """The rows of a file.

    Attributes:
        rows: the fields of each row, without its label.
        labels: the index of each row's label, in the order of the logits; None if rows have no labels.
        lines: the 1-based number of the line on which each row ends.
        file: the path of the file.
        names: the labels to which the indices refer, in order; None if rows have no labels, or their names are unknown.
    """

    rows: tuple[Mapping[str, str], ...]
    labels: tuple[int, ...] | None = None
    lines: tuple[int, ...] = ()
    file: str | None = None
    names: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def subset(self, indices: Sequence[int]) -> TextRows:
        """Return the rows at these indices, in this order."""
        labels = None if self.labels is None else tuple(self.labels[i] for i in indices)
        lines = tuple(self.lines[i] for i in indices) if self.lines else ()
        return TextRows(tuple(self.rows[i] for i in indices), labels, lines, self.file, self.names)


@dataclass(frozen=True)
class PetData:
    """The data for a PET run; missing parts are None.

    Attributes:
        train: rows with labels.
        unlabelled: rows that the ensemble labels.
        test: rows with labels that are not used for training.
    """

    train: TextRows | None = None
    unlabelled: TextRows | None = None
    test: TextRows | None = None


def load_pet_data(
    source: _Source | Mapping[str, _Source], labels: Sequence[str], slots: Collection[str] = ()
) -> PetData:
    """Load rows from a folder with files ``train``, ``unlabelled`` and ``test``, or from the files in a mapping.

    Args:
        source: the folder, whose files are ``.jsonl``, ``.ndjson``, ``.csv`` or ``.tsv``; or a mapping from parts to
            paths.
        labels: the labels, in the order of the logits.
        slots: the fields that each row must have; others are left out. By default all fields are kept.

    Raises:
        GraftError: GC180 if a file does not exist, a part has two files, or the contents of a file are invalid.
    """
    files = dict(source) if isinstance(source, Mapping) else _files(Path(source))
    for name in files:
        if name not in _SPLITS:
            hint, _ = correction(name, _SPLITS, f"the parts are: {', '.join(_SPLITS)}")
            raise GraftError("GC180", f"the data has no part {quoted(name)}", hint=hint)
    parts = {name: load_rows(file, None if name == "unlabelled" else labels, slots) for name, file in files.items()}
    return PetData(**parts)


def load_rows(source: _Source, labels: Sequence[str] | None = None, slots: Collection[str] = ()) -> TextRows:
    """Load the rows of a file; empty lines are skipped.

    A ``.jsonl`` or ``.ndjson`` file has an object on each line; a ``.csv`` or ``.tsv`` file has a header. CSV cells may
    be quoted and may then contain line breaks; in TSV files, a quote is an ordinary character.

    Args:
        source: the path of the file.
        labels: the allowed values of the field `label`; None if rows are not labelled, in which case the field is
            ignored.
        slots: as for :func:`load_pet_data`.

    Raises:
        GraftError: GC180 if the file cannot be read or a line is invalid, with the number of that line.
    """
    path = Path(source)
    suffix = path.suffix.lower()
    if suffix not in _FORMATS:
        hint = f"name it {path.stem}.jsonl, .csv or .tsv"
        raise GraftError("GC180", f"the format of {quoted(path.name)} is not supported", hint=hint)
    numbers = None if labels is None else {label: index for index, label in enumerate(labels)}
    rows: list[Mapping[str, str]] = []
    row_labels: list[int] = []
    lines: list[int] = []
    try:
        if not path.is_file():
            _missing(path)
        if path.stat().st_size > FILE_BYTES:
            raise GraftError("GC180", f"{quoted(path)} has more than {FILE_BYTES:,} bytes")
        read = _json_lines(path) if suffix in (".jsonl", ".ndjson") else _table(path, suffix)
        for line, row in read:
            if len(rows) == ROWS:
                _wrong(path, line, f"there are more than {ROWS:,} rows")
            if numbers is not None:
                row_labels.append(_label(path, line, row, numbers))
            rows.append(_fields(path, line, row, slots))
            lines.append(line)
    except UnicodeDecodeError as error:
        message = f"{quoted(path)} is not UTF-8 text: byte 0x{error.object[error.start]:02x} is invalid"
        raise GraftError("GC180", message, place=Place(str(path))) from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise GraftError("GC180", f"{quoted(path)} cannot be read: {reason.lower()}") from None
    if not rows:
        header = suffix in (".csv", ".tsv") and path.stat().st_size > 0
        first = "the first line is read as the header" if header else None
        raise GraftError("GC180", f"{quoted(path)} has no rows", place=Place(str(path)), hint=first)
    given, names = (None, None) if numbers is None else (tuple(row_labels), tuple(numbers))
    return TextRows(tuple(rows), given, tuple(lines), str(path), names)


def _wrong(path: Path, line: int, message: str, hint: str | None = None) -> NoReturn:
    raise GraftError("GC180", message, place=Place(str(path), line), hint=hint) from None


def _missing(path: Path) -> NoReturn:
    if path.exists():
        raise GraftError("GC180", f"{quoted(path)} is not a regular file", hint="pass a file, or the data's folder")
    if path.is_symlink():
        message = f"{quoted(path)} is a link to {quoted(path.readlink())}, which does not exist"
        raise GraftError("GC180", message, hint="repair the link, or replace it with the file")
    near = nearest_beside(path, lambda other: other.suffix.lower() in _FORMATS)
    hint = f"did you mean {quoted(near)}?" if near is not None else None
    raise GraftError("GC180", f"there is no file {quoted(path)}", hint=hint)


def _files(folder: Path) -> dict[str, Path]:
    """Return the file for each part of the data that a folder contains."""
    try:
        names = sorted(p.name for p in folder.iterdir())
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise GraftError("GC180", f"the folder {quoted(folder)} cannot be read: {reason}") from None
    files: dict[str, Path] = {}
    for split, stems in _SPLITS.items():
        matches = [n for n in names if Path(n).stem.lower() in stems and Path(n).suffix.lower() in _FORMATS]
        if len(matches) > 1:
            raise GraftError("GC180", f"{quoted(folder)} has several files for one part: {', '.join(matches)}")
        if matches:
            files[split] = folder / matches[0]
    for name in names:
        if not (folder / name).is_dir():
            _check_name(folder, name, files)
    if not files:
        hint = "its files are train.jsonl, unlabelled.jsonl and test.jsonl, or the same as .csv or .tsv"
        raise GraftError("GC180", f"{quoted(folder)} contains no data: {some(names, 10) or 'nothing'}", hint=hint)
    return files


def _check_name(folder: Path, name: str, files: Mapping[str, Path]) -> None:
    """Refuse a file that is probably a misnamed part of the data, because training would proceed without it."""
    stem, suffix = Path(name).stem.lower(), Path(name).suffix.lower()
    known = {each for stems in _SPLITS.values() for each in stems}
    if suffix in _FORMATS:
        if stem not in known and (close := nearest(stem, _MEANT, n=1)):
            better = f"{_MEANT[close[0]]}{suffix}"
            hint = f"did you mean {quoted(better)}? Rename it, or move it to another folder"
            raise GraftError("GC180", f"{quoted(folder / name)} is not part of the data", hint=hint)
        return
    first = name.partition(".")[0].lower()
    packed = first in known and not any(first in _SPLITS[split] for split in files)
    if stem in known or packed:
        intended = first if packed else stem
        hint = f"name it {intended}.jsonl, .csv or .tsv if it has one of these formats, or move it to another folder"
        raise GraftError("GC180", f"the format of {quoted(folder / name)} is not supported", hint=hint)


def _json_lines(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Yield the objects in a JSON Lines file, with their line numbers."""
    with path.open("rb") as file:
        number = 0
        while raw := file.readline(_LINE + 1):
            number += 1
            if len(raw) > _LINE:
                _wrong(path, number, f"the line has more than {_LINE:,} bytes")
            if not raw.strip(b"\xef\xbb\xbf \t\r\n"):
                continue
            try:
                row = read_json(raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw, _LINE)
            except UnicodeDecodeError as error:
                _wrong(path, number, f"the line is not UTF-8 text: byte {error.start + 1} is invalid")
            except ValueError as error:
                _wrong(path, number, f"the line is not JSON: {str(error)[:200]}", "write an object on each line")
            if isinstance(row, dict) and len(row) > FIELDS:
                _wrong(path, number, f"the row has {len(row):,} fields, more than {FIELDS:,}")
            if not isinstance(row, dict):
                _wrong(path, number, f"the line is not an object, but {shown(row)}", 'for example {"text": "..."}')
            yield number, row


def _table(path: Path, suffix: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Yield the rows of a CSV or TSV file, with their line numbers."""
    options: dict[str, Any] = {"strict": True}
    if suffix == ".tsv":
        options |= {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, **options)
        header: list[str] | None = None
        while True:
            start = reader.line_num + 1
            previous_limit = csv.field_size_limit(_LINE)  # applies to the whole process
            try:
                cells = next(reader, None)
            except csv.Error as error:
                if "field limit" in str(error):
                    hint = 'check for an unclosed quote; a quote within quotes is written twice: ""'
                    _wrong(path, start, f"a cell has more than {TEXT:,} characters", hint)
                _wrong(path, start, f"the row cannot be read: {error}", 'a quote within quotes is written twice: ""')
            finally:
                csv.field_size_limit(previous_limit)
            if cells is None:
                return
            line = reader.line_num
            if not cells:
                continue
            if header is None:
                header = cells
                _check_header(path, line, header)
            elif len(cells) != len(header):
                hint = f"the header has: {some([quoted(name) for name in header], 20)}"
                what = "cell" if len(cells) == 1 else "cells"
                _wrong(path, line, f"the row has {len(cells)} {what}, but the header has {len(header)}", hint)
            else:
                yield line, dict(zip(header, cells, strict=True))


def _check_header(path: Path, line: int, header: list[str]) -> None:
    if len(header) > FIELDS:
        message = f"there are {len(header):,} columns, more than {FIELDS:,}"
        _wrong(path, line, message, "leave out columns that no pattern uses")
    seen: set[str] = set()
    for index, name in enumerate(header):
        if not name.strip():
            _wrong(path, line, f"column {index + 1} has no name", "the first line names the columns")
        if name in seen:
            _wrong(path, line, f"two columns have the name {quoted(name)}", "rename one")
        seen.add(name)


def _text(value: Any) -> str | None:
    """Return a field as text, or None if it is neither text nor a number."""
    if isinstance(value, str):
        return value
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _label(path: Path, line: int, row: Mapping[str, Any], numbers: Mapping[str, int]) -> int:
    if LABEL not in row:
        meant = " ".join(filter(None, (correction(LABEL, row)[0], f"its fields are: {some(list(row), 20)}")))
        _wrong(path, line, f"the row has no {quoted(LABEL)}", meant)
    label = _text(row[LABEL])
    if label is None or label not in numbers:
        hint, _ = correction(label, numbers, f"the labels are: {some(list(numbers), 20)}")
        name = shown(row[LABEL]) if label is None else quoted(label)
        _wrong(path, line, f"the verbalizer has no label {name}", hint)
    return numbers[label]


def _fields(path: Path, line: int, row: Mapping[str, Any], slots: Collection[str]) -> dict[str, str]:
    fields: dict[str, str] = {}
    for name in slots or row:
        if name == LABEL:
            continue
        if name not in row:
            hint, _ = correction(name, row, f"its fields are: {some(list(row), 20)}")
            _wrong(path, line, f"the row has no field {quoted(name)}, which a pattern uses", hint)
        text = _text(row[name])
        if text is not None and len(text) > TEXT:
            _wrong(path, line, f"{quoted(name)} has {len(text):,} characters, more than {TEXT:,}")
        if text is not None:
            fields[name] = text
        elif slots:
            _wrong(path, line, f"{quoted(name)} is {shown(row[name])}, which is not text", "write a string in quotes")
    return fields
