"""Other files of an artifact and of a merged model, as far as they are read: certificates and records. No torch."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from graftc.runtime.artifact.fields import TEXT_BYTES, File
from graftc.runtime.artifact.manifest import damaged, first_error
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
    """A file as a model.

    Raises:
        GraftError: GC082 where it is none.
    """
    try:
        read_json(content(path, TEXT_BYTES), TEXT_BYTES)
        return model.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise damaged(where, file, first_error(error)) from error
    except (OSError, ValueError) as error:
        raise damaged(where, file, f"cannot be read: {error}") from error


def content(path: Path, most: int) -> bytes:
    """The bytes of a file, of which there may be only so many.

    Raises:
        ValueError: there are more; OSError.
    """
    with path.open("rb") as file:
        raw = file.read(most + 1)
    if len(raw) > most:
        raise ValueError(f"it has more than {most} bytes")
    return raw
