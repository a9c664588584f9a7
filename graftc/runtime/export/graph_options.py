"""Options and companion files that the single-graph formats share. Does not load torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from graftc.runtime.export.exporter import ExportOption
from graftc.specs.errors.arguments import as_names


def _names(given: Any) -> tuple[str, ...]:
    return tuple(dict.fromkeys(as_names(given))) if given else ()


EXAMPLE_INPUTS = ExportOption("example_inputs", "A call whose signature is exported, by name or in order")
INPUTS = ExportOption(
    "inputs",
    "An adaptation whose tensors become inputs of the graph, with their values in a file beside it",
    default=(),
    read=_names,
    flag="--inputs",
)


def companions_of(path: Path, names: Iterable[str]) -> dict[str, str]:
    """Return, by adaptation, the name of the file beside an export that holds the adaptation's tensors."""
    return {name: f"{path.name}.{name}.safetensors" for name in names}


def beside_graph(path: Path, options: Mapping[str, Any]) -> Sequence[str]:
    """Return the names of files that may be written beside a graph."""
    return (f"{path.name}.data", *companions_of(path, options["inputs"]).values())
