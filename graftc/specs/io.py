"""Read specs from files and text, and write them."""

from __future__ import annotations

import re
import stat
from collections.abc import Callable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import ValidationError

from graftc.specs.bare_entries import bare_entries
from graftc.specs.base_model import Document, SpecModel
from graftc.specs.document import Spec
from graftc.specs.errors.calls import public
from graftc.specs.errors.diagnostics import GraftError, Place, nearest
from graftc.specs.errors.text import quoted
from graftc.specs.foreign import check_config, is_foreign, translated
from graftc.specs.limits import check_limits
from graftc.specs.regular_files import open_regular
from graftc.specs.source import FILE, Source, beyond, core_resolvers, read_json, read_toml, read_yaml
from graftc.specs.spec_errors import explain

T = TypeVar("T", bound=Document)
Format = Literal["yaml", "json", "toml"]
_FORMATS: dict[str, Format] = {".yaml": "yaml", ".yml": "yaml", ".json": "json", ".toml": "toml"}
_BREAK = re.compile("[\x85\u2028\u2029]")
"""Line breaks of YAML 1.1 that are not line breaks of YAML 1.2; within double quotes they are escaped."""
_READERS = {"yaml": read_yaml, "json": read_json, "toml": read_toml}


FromConfig = Callable[[object, str], Spec]
"""A function that converts a PEFT config to a spec; the second argument names where the config was read from."""


@public("graftc.load_spec")
def load_spec(source: Spec | Mapping[str, Any] | str | PathLike[str], from_config: FromConfig | None = None) -> Spec:
    """Load the spec in a file (``.yaml``, ``.yml``, ``.json`` or ``.toml``) or a mapping; return a Spec unchanged.

    A config of PEFT, as an object, a mapping or a file, becomes the equivalent spec.

    Args:
        source: the spec.
        from_config: a function that converts a PEFT config to a spec; by default the conversion that suits any
            model.

    Raises:
        GraftError: GC006 if there is no such file, GC001 if it cannot be read, GC002 to GC012 if it is invalid; with
            file, line and column, and the corrected line if one can be guessed; GC073 for several configs of PEFT,
            GC111 for one that cannot be read, GC112 for one that has no equivalent.
    """
    if isinstance(source, Spec):
        return source
    if is_foreign(source):
        return (from_config or _for_any_model)(source, "the config")
    if isinstance(source, Mapping):
        return Spec.model_validate(dict(source))
    text, format = read_spec_file(source)
    return parse_spec(text, format=format, file=str(source), from_config=from_config)


def early_spec(source: Path) -> Spec | Path:
    """Return the spec in a file; for a PEFT config, which is converted once there is a model, return the path.

    Raises:
        GraftError: as `load_spec`.
    """
    configs: list[object] = []

    def note(config: object, where: str) -> Spec:
        configs.append(config)
        check_config(config, where)
        return Spec.model_construct(adapt=())

    loaded = load_spec(source, note)
    return source if configs else loaded


def _for_any_model(config: object, where: str) -> Spec:
    return Spec.model_validate(translated(config, where))


def read_spec_file(source: object, kind: str = "Spec", parser: str = "parse_spec") -> tuple[str, Format]:
    """Return the text of a file, and the format according to its name.

    Args:
        source: a path; anything else is an error.
        kind, parser: the class and the function that messages suggest instead.

    Raises:
        GraftError: GC006 if there is no such file, GC001 if it cannot be read.
    """
    if isinstance(source, str) and "\n" in source:
        raise GraftError("GC006", "expected a path to a spec, not its text", hint=f"use {parser}(text)")
    if not isinstance(source, str | PathLike):
        if (error := bare_entries(source)) is not None:
            raise error
        raise GraftError("GC006", f"a spec must be a {kind}, a mapping or a path, not {type(source).__name__}")
    path = Path(source)
    return _read(path), _format_of(path)


def parse_spec(
    text: str, *, format: Format = "yaml", file: str | None = None, from_config: FromConfig | None = None
) -> Spec:
    """Parse the spec in a text. ``file`` is named in errors; ``from_config`` is as for `load_spec`.

    Raises:
        GraftError: the same as for :func:`load_spec`.
    """
    data, source = parse_document(text, format, file, "version: 1 and adapt: [...]", bare_entries)
    if is_foreign(data):
        return (from_config or _for_any_model)(data, source.file or "the config")
    return checked(Spec, data, source)


def parse_document(
    text: str,
    format: Format,
    file: str | None,
    start: str,
    refused: Callable[[object], GraftError | None] = lambda data: None,
) -> tuple[dict[str, Any], Source]:
    """Return the mapping in a text, and the positions of its values.

    Args:
        text: YAML, JSON or TOML.
        format: the format of the text.
        file: the file named in errors.
        start: the first fields of such a document, for the hint.
        refused: a function that returns the error for contents that resemble such a document.

    Raises:
        GraftError: the error that ``refused`` returns; GC001 if it cannot be read, GC009 if it exceeds the limits.
    """
    data, source = _READERS[format](text.removeprefix("\ufeff"), file)
    if not isinstance(data, dict):
        if (error := refused(data)) is not None:
            raise source.locate(error)
        what = "is empty" if data is None else f"is a {'list' if isinstance(data, list) else 'plain value'}"
        place = Place(file, 1, 1) if data is not None else Place(file)
        raise GraftError("GC001", f"a spec is a mapping, but this {what}", place=place, hint=f"it starts with {start}")
    return data, source


def checked(kind: type[T], data: dict[str, Any], source: Source) -> T:
    """Return the validated document of a class, together with its source; errors contain the places of invalid values.

    Raises:
        GraftError: GC002 to GC012, and the errors of the class.
    """
    try:
        check_limits(data)
        # The validator itself, not model_validate: locating the places needs the original ValidationError.
        document: T = kind.__pydantic_validator__.validate_python(data)
    except ValidationError as error:
        raise source.locate(explain(error, kind, data)) from None
    except GraftError as error:
        raise source.locate(error) from None
    document._source = source  # noqa: SLF001
    return document


def _format_of(path: Path) -> Format:
    format = _FORMATS.get(path.suffix.lower())
    if format is None:
        hint = f"name it {path.stem}.yaml, .json or .toml"
        raise GraftError(
            "GC001", f"the format of {quoted(path.name)} is not recognised", place=Place(str(path)), hint=hint
        )
    return format


def _read(path: Path) -> str:
    try:
        kind = path.stat().st_mode
        if not (stat.S_ISREG(kind) or stat.S_ISDIR(kind)):  # a pipe or a device, which may never end
            raise GraftError("GC006", f"{quoted(path)} is not a regular file", hint="pass a file that has the spec")
        with open_regular(path) as file:  # it may have been replaced since it was checked
            content = file.read(FILE + 1)
        if len(content) > FILE:
            raise beyond(f"the spec has more than {FILE:,} bytes", Place(str(path)))
        return content.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except FileNotFoundError:
        raise GraftError("GC006", f"there is no file {quoted(path)}", hint=_neighbours(path)) from None
    except IsADirectoryError:
        inner = path / "spec.yaml"
        hint = f"did you mean {quoted(inner)}?" if inner.is_file() else None
        raise GraftError("GC006", f"{quoted(path)} is a folder", hint=hint) from None
    except UnicodeDecodeError as error:
        place = Place(str(path))
        raise GraftError("GC001", f"not UTF-8 text: byte {error.start} does not fit", place=place) from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise GraftError("GC006", f"{quoted(path)} cannot be read: {reason.lower()}") from None


def _neighbours(path: Path) -> str | None:
    try:
        names = [p.name for p in path.parent.iterdir() if p.suffix.lower() in _FORMATS]
    except OSError:
        return f"there is no folder {quoted(path.parent)}"
    close = nearest(path.name, names, n=1)
    return f"did you mean {quoted(path.parent / close[0])}?" if close else None


def dump_spec(spec: Spec) -> str:
    """Return the spec as YAML that :func:`parse_spec` reads back as an equal spec. Defaults are omitted."""
    return write_yaml(plain_spec(spec))


def plain_spec(spec: Spec) -> dict[str, Any]:
    """Return the spec as plain data that is read back as an equal spec. Defaults are omitted."""
    data: dict[str, Any] = {
        "version": spec.version,
        "adapt": [plain(a, "name", "method") for a in spec.adapt],
    }
    return data | {k: v for k, v in plain(spec).items() if k not in data}


def write_yaml(data: dict[str, Any]) -> str:
    """Return plain data as YAML that readers of YAML 1.1 and of YAML 1.2 read alike: ``1:6`` and ``no`` are quoted."""
    import yaml

    # Quoted is what any of these types would claim: the inherited ones are those of YAML 1.1.
    dumper: Any = type("Dumper", (yaml.SafeDumper,), {"ignore_aliases": lambda self, data: True})
    dumper.add_representer(
        str,
        lambda self, text: self.represent_scalar("tag:yaml.org,2002:str", text, '"' if _BREAK.search(text) else None),
    )
    for tag, pattern, firsts in core_resolvers():
        dumper.add_implicit_resolver(tag, pattern, firsts)
    text: str = yaml.dump(data, Dumper=dumper, sort_keys=False, default_flow_style=None, width=110, allow_unicode=True)
    return text


def plain(model: SpecModel, *always: str) -> dict[str, Any]:
    """Return the fields in ``always`` and those that differ from their defaults, as plain data without tuples."""
    kept = model.model_dump(mode="json", exclude_defaults=True)
    return {
        f: kept[f] if f in kept else getattr(model, f) for f in type(model).model_fields if f in kept or f in always
    }
