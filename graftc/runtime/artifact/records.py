"""Read the other files of artifacts and of merged models: certificates and records."""

from __future__ import annotations

import errno
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from graftc.records.certificate import Certificate, require_consistent
from graftc.records.reading import from_json
from graftc.runtime.artifact.fields import TEXT_BYTES, File
from graftc.runtime.artifact.manifest import damaged, first_error
from graftc.specs.records.record import Record
from graftc.specs.regular_files import read_regular
from graftc.specs.strict_json import read_json


@dataclass(frozen=True)
class MergedRecord(Record):
    """The parts of a merged model's record that are read."""

    files: Mapping[str, File]
    """The files of the folder, by name."""

    certificate: Certificate
    """The certificate of the fold."""


R = TypeVar("R")


def read_record(cls: type[R], path: Path, where: str, file: str) -> R:
    """Read a file as a record.

    Raises:
        GraftError: GC082 if the file does not contain a valid record.
    """
    try:
        raw = content(path, TEXT_BYTES)
        data = read_json(raw, TEXT_BYTES)
        record = from_json(cls, raw)
        if isinstance(record, Certificate):
            require_consistent(record, data)
        elif isinstance(record, MergedRecord):
            require_consistent(record.certificate, data["certificate"])
        return record
    except ValidationError as error:
        raise damaged(where, file, first_error(error)) from error
    except (OSError, ValueError) as error:
        raise damaged(where, file, f"cannot be read: {error}") from error


def content(path: Path, most: int) -> bytes:
    """Return the contents of a file of at most ``most`` bytes.

    Raises:
        ValueError: if the file is larger, or is not a regular file; the message is the reason, without the path.
        OSError: if the file cannot be read.
    """
    try:
        return read_regular(path, most)
    except OSError as error:
        if error.errno not in (errno.EFBIG, errno.EINVAL):
            raise
        raise ValueError(error.strerror) from error
