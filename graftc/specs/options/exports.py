"""The options of each export format: one that a format does not declare is refused, never ignored. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

from graftc.specs.errors.arguments import as_names, kind_of
from graftc.specs.errors.diagnostics import GraftError

__all__ = ["FORMATS", "ExportOption", "FileType", "FormatOptions", "format_of", "misplaced", "options_for"]

ExportOption = Literal["example_inputs", "inputs", "dtype", "server", "max_rank"]
FileType = Literal["f32", "f16", "bf16"]


@dataclass(frozen=True)
class FormatOptions:
    """The options of one format.

    Attributes:
        options: the options that it takes.
        instead: what to do instead, for options that users may well expect of it.
    """

    options: tuple[ExportOption, ...] = ()
    instead: Mapping[str, str] = field(default_factory=dict)


FORMATS: Mapping[str, FormatOptions] = MappingProxyType(
    {
        "onnx": FormatOptions(("example_inputs", "inputs")),
        "onnx-generate": FormatOptions(
            instead={
                "inputs": 'one graph without a cache takes adaptations as inputs: format "onnx"',
                "example_inputs": "the graphs that generate have inputs of their own",
            }
        ),
        "pt2": FormatOptions(("example_inputs", "inputs")),
        "gguf": FormatOptions(
            ("dtype",),
            {"inputs": "the LoRAs of a compiled model that is not merged are a file of their own"},
        ),
        "peft": FormatOptions(("server", "max_rank"), {"inputs": "the folder has the adapters alone, and no graph"}),
    }
)
"""Every format by its name."""


def format_of(name: Any) -> FormatOptions:
    """Return a format by its name.

    Raises:
        GraftError: GC060 if the format is unknown.
    """
    options = FORMATS.get(name) if isinstance(name, str) else None
    if options is None:
        hint = "graphs are onnx, onnx-generate or pt2; adapters and merged models may also be peft or gguf"
        raise GraftError("GC060", f"format {name!r} is unknown", hint=hint)
    return options


def misplaced(name: str, given: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the options that are given although the format does not take them, each with a remedy.

    Args:
        name: name of the format.
        given: options by name; one that is None, empty or False counts as not given.
    """
    format = format_of(name)
    for option, value in given.items():
        empty = isinstance(value, str | list | tuple | dict) and not value
        if option in format.options or value is None or value is False or empty:
            continue
        takers = [other for other, own in FORMATS.items() if option in own.options]
        yield option, format.instead.get(option, f"leave it out: it is an option of {' and '.join(takers)}")


def options_for(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of an export, checked.

    Raises:
        GraftError: GC060 for an unknown format, GC073 for an option that it does not take, or for a value that the
            option does not allow.
    """
    for option, hint in misplaced(name, given):
        raise GraftError("GC073", f"the format {name!r} takes no {option}", hint=hint)
    options: dict[str, Any] = {
        option: given[option] for option in format_of(name).options if given.get(option) is not None
    }
    if "inputs" in options:
        options["inputs"] = as_names(options["inputs"]) if options["inputs"] else ()
    rank = options.get("max_rank", 1)
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        shown = kind_of(rank) if not isinstance(rank, int) else repr(rank)
        raise GraftError("GC073", f"max_rank is {shown}", hint="give a whole number from 1")
    if "max_rank" in options and "server" not in options:
        raise GraftError("GC073", "max_rank is a limit of a server", hint='name it: server="vllm"')
    return options
