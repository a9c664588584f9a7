"""Read PET specs from files and text, and write them."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from typing import Any

from graftc.specs.io import Format, checked, parse_document, plain, plain_spec, read_spec_file, write_yaml
from graftc.specs.pet.document import PetSpec


def load_pet_spec(source: PetSpec | Mapping[str, Any] | str | PathLike[str]) -> PetSpec:
    """Load the PET spec in a file (``.yaml``, ``.yml``, ``.json``, ``.toml``) or a mapping; return a PetSpec unchanged.

    Raises:
        GraftError: GC006 if there is no such file, GC001 if it cannot be read, GC002 to GC012 and GC175 to GC177 if it
            is invalid; with file, line and column, and the corrected line if one can be guessed.
    """
    if isinstance(source, PetSpec):
        return source
    if isinstance(source, Mapping):
        return PetSpec.model_validate(dict(source))
    text, format = read_spec_file(source, "PetSpec", "parse_pet_spec")
    return parse_pet_spec(text, format=format, file=str(source))


def parse_pet_spec(text: str, *, format: Format = "yaml", file: str | None = None) -> PetSpec:
    """Parse the PET spec in a text. ``file`` is named in errors.

    Raises:
        GraftError: the same as for :func:`load_pet_spec`.
    """
    data, source = parse_document(text, format, file, "patterns: [...] and verbalizer: {...}")
    return checked(PetSpec, data, source)


def dump_pet_spec(spec: PetSpec) -> str:
    """Return the PET spec as YAML that :func:`parse_pet_spec` reads back as an equal spec.

    Defaults are omitted, except names of patterns.
    """
    data = {"version": spec.version, **plain(spec)}
    data["patterns"] = [plain(pattern, "name") for pattern in spec.patterns]
    if "spec" in data:
        data["spec"] = plain_spec(spec.spec)
    if "classifier" in data:
        data["classifier"] = plain(spec.classifier)
        if "spec" in data["classifier"]:
            data["classifier"]["spec"] = plain_spec(spec.classifier.spec)
    return write_yaml(data)
