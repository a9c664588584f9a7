"""Options and companion files that the single-graph formats share. Does not load torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from graftc.runtime.export.exporter import ExportOption
from graftc.specs.errors.arguments import as_names


def _names(given: Any) -> tuple[str, ...]:
    return tuple(dict.fromkeys(as_names(given))) if given else ()


_OPSETS = range(18, 24)


def _opset(given: Any) -> int:
    number = int(given) if str(given).isdecimal() else -1
    if number not in _OPSETS:
        raise ValueError(f"it must be from {_OPSETS[0]} to {_OPSETS[-1]}")
    return number


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
    needs="inputs",
)
OPSET = ExportOption(
    "opset",
    f"The version of ONNX operators, from {_OPSETS[0]} to {_OPSETS[-1]}, which is the default; before 23, attention, "
    "rotary positions and RMS norms are many operators",
    default=_OPSETS[-1],
    read=_opset,
)
LOGITS = ExportOption(
    "logits",
    "The tokens for which logits are computed, the last of each row or all of a call's",
    ("last", "all"),
    default="last",
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
