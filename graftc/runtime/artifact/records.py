"""Certificates and records: other files of artifacts and of merged models, as far as they are read."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from graftc.runtime.artifact.fields import TEXT_BYTES, File
from graftc.runtime.artifact.manifest import damaged, first_error
from graftc.specs.regular_files import read_regular
from graftc.specs.strict_json import read_json

__all__ = ["KeptCertificate", "MergedRecord", "content", "read_model"]


class KeptCertificate(BaseModel):
    """What is read of the certificate of a fold; there is more in it, for people."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True, allow_inf_nan=False)

    class SiteRecord(BaseModel):
        """One folded place."""

        model_config = ConfigDict(frozen=True, extra="ignore", strict=True)

        site: str

    passed: bool
    base_structure: str
    structure: str
    additions: tuple[str, ...]
    dtype: str
    fingerprint: str
    sites: tuple[SiteRecord, ...]
    outputs: dict[str, float]


class MergedRecord(BaseModel):
    """What is read of the record of a merged model."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)

    files: dict[str, File]
    certificate: KeptCertificate


Read = TypeVar("Read", bound=BaseModel)


def read_model(model: type[Read], path: Path, where: str, file: str) -> Read:
    """Read a file as a pydantic model.

    Raises:
        GraftError: GC082 if it is not a record.
    """
    try:
        raw = content(path, TEXT_BYTES)
        read_json(raw, TEXT_BYTES)
        return model.model_validate_json(raw)
    except ValidationError as error:
        raise damaged(where, file, first_error(error)) from error
    except (OSError, ValueError) as error:
        raise damaged(where, file, f"cannot be read: {error}") from error


def content(path: Path, most: int) -> bytes:
    """Return the bytes of a file, which may have at most ``most``.

    Raises:
        ValueError: if it has more, or is not a regular file; the message is the reason, without the path.
        OSError: if it cannot be read.
    """
    try:
        return read_regular(path, most)
    except OSError as error:
        if error.errno not in (errno.EFBIG, errno.EINVAL):
            raise
        raise ValueError(error.strerror) from error
