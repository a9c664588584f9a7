"""Functions that the single-graph formats share."""

from __future__ import annotations

from pathlib import Path

from graftc.files.tensors.writing import save_tensors
from graftc.runtime.export.graph_options import companions_of
from graftc.runtime.export.module import ExportModule


def write_inputs(module: ExportModule, path: Path) -> None:
    """Write the adaptations' tensors that are inputs of a graph beside it, in one file per adaptation."""
    beside = companions_of(path, module.adaptations)
    for name, tensors in module.adaptations.items():
        save_tensors(tensors, path.with_name(beside[name]))
