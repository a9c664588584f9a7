"""Options and companion files that the single-graph formats share. Does not load torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from graftc.runtime.export.exporter import ExportOption
from graftc.specs.errors.arguments import as_names


def _names(given: Any) -> tuple[str, ...]:
    return tuple(dict.fromkeys(as_names(given))) if given else ()


EXAMPLE_INPUTS = ExportOption("example_inputs", "A call whose signature is exported, by name or in order")
INPUTS = ExportOption(
    "inputs",
    "An adaptation whose tensors become inputs of the graph, with their values in a file",
    default=(),
    read=_names,
    flag="--inputs",
)


ADAPTER_FORMAT = ExportOption(
    "adapter_format",
    "The format of the files with the inputs' values",
    ("safetensors", "onnx_adapter"),
    default="safetensors",
)


def adapter_files(options: Mapping[str, Any], prefix: str) -> dict[str, str]:
    """Return, by adaptation, the name of the file with the values of an adaptation that is an input.

    Args:
        options: the options of the export.
        prefix: what precedes the adaptation's name in the file's.
    """
    suffix = options.get("adapter_format", ADAPTER_FORMAT.default)
    return {name: f"{prefix}{name}.{suffix}" for name in options.get("inputs", ())}


def beside_graph(path: Path, options: Mapping[str, Any]) -> Sequence[str]:
    """Return the names of files that may be written beside a graph."""
    return (f"{path.name}.data", *adapter_files(options, f"{path.name}.").values())
