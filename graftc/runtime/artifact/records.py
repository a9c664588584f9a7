"""Read the other files of artifacts, certificates, and read and write the records of merged models."""

from __future__ import annotations

import errno
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import ValidationError

from graftc.compiler.resolve.tokens import TOKENS
from graftc.compiler.resolve.train import TRAIN
from graftc.records.certificate import Certificate, require_consistent
from graftc.records.reading import from_json
from graftc.runtime.artifact.fields import MANIFEST_BYTES, TEXT_BYTES, Digest, File
from graftc.runtime.artifact.manifest import SCHEMA_VERSION, Versions, damaged, first_error, sealed, unsealed
from graftc.runtime.artifact.origin import origin
from graftc.runtime.artifact.places import RECORD
from graftc.specs.document import Spec
from graftc.specs.errors.border import library_errors
from graftc.specs.errors.text import quoted
from graftc.specs.io import parse_spec
from graftc.specs.records.record import Record
from graftc.specs.regular_files import read_regular
from graftc.specs.strict_json import read_json


@dataclass(frozen=True)
class MergedAdapter(Record, closed=True):
    """The adapter that was merged, if it was read from a folder."""

    kind: Literal["artifact", "peft"]
    """The kind of folder."""

    sha256: Digest
    """Of the adapter."""


@dataclass(frozen=True)
class MergedRecord(Record, closed=True):
    """The record of its origin in a merged model's folder."""

    merged: Literal["graftc"]
    """The kind of record."""

    schema_version: Literal[1]
    """Version of this format."""

    spec: str
    """The spec that was merged, or PEFT's config, as text."""

    base: Digest | Literal[""]
    """Fingerprint of the base; empty if the adapter does not record one."""

    certificate: Certificate
    """The certificate of the fold."""

    files: Mapping[str, File]
    """The files of the folder, by name, except for this record and `README.md`, which can be added and edited."""

    digest: Digest
    """SHA-256 of this record without its digest."""

    adapter: MergedAdapter | None = None
    """The adapter; null for a merge in memory."""

    versions: Versions | None = None
    """The versions and the code that wrote it; null in older records."""


def write_merged_record(
    folder: Path, spec: str, certificate: Certificate, files: Mapping[str, Any], **adapter: str
) -> None:
    """Write the record of a merged model next to its weights.

    Args:
        folder: the folder of the merged model.
        spec: the spec, or PEFT's config, as text.
        certificate: the certificate of the fold, with the base's fingerprint.
        files: size and digest of every file in the folder.
        adapter: the fields of `MergedAdapter`; none for a merge in memory.
    """
    data = {
        "merged": "graftc",
        "schema_version": SCHEMA_VERSION,
        "spec": spec,
        "base": certificate.fingerprint,
        "versions": origin(),
        **({"adapter": adapter} if adapter else {}),
        "certificate": certificate.to_json(),
        "files": dict(files),
    }
    (folder / RECORD).write_text(sealed(data), encoding="utf-8", newline="\n")


def read_merged_record(folder: Path, where: str) -> MergedRecord:
    """Read the record of a merged model.

    Args:
        folder: the folder of the merged model.
        where: the folder named in errors.

    Raises:
        GraftError: GC080 if another program wrote the file, GC081 for a newer format, GC082 if it is damaged, or if its
            parts do not agree.
    """
    unsealed(content(folder / RECORD, MANIFEST_BYTES), where, "merged", SCHEMA_VERSION, RECORD)
    record = read_record(MergedRecord, folder / RECORD, where, RECORD)
    if record.base != record.certificate.fingerprint:
        raise damaged(where, RECORD, "names a base other than the certificate's")
    return record


def merged_spec(record: MergedRecord, where: str) -> Spec | None:
    """Return the spec of a merged model's record; None if what was merged was an adapter of PEFT.

    Raises:
        GraftError: GC082 if it lacks an adaptation that the certificate covers, or is not a config of PEFT where it
            should be one; the errors of `parse_spec`.
    """
    if record.adapter is not None and record.adapter.kind == "peft":
        with library_errors("GC082", f"{where} is damaged: {RECORD} contains no config of PEFT"):
            if not isinstance(read_json(record.spec.encode(), TEXT_BYTES), dict):
                raise ValueError("it is not a mapping")
        return None
    spec = parse_spec(record.spec, file=f"the spec in {Path(where) / RECORD}")
    unknown = [name for name in record.certificate.folded if name not in (*spec.owners, TRAIN, TOKENS)]
    if unknown:
        raise damaged(where, RECORD, f"certifies {quoted(unknown[0])}, which is not in its spec")
    return spec


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
