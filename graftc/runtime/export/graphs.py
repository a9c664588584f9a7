"""Functions that the single-graph formats share."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from graftc.compiler.capture.identity.fingerprint import identify
from graftc.runtime.export.graph_options import adapter_files
from graftc.runtime.export.job import ExportJob
from graftc.runtime.export.module import ExportModule
from graftc.runtime.onnx_generation.adapter_files import write_adapter


def write_inputs(job: ExportJob, modules: Collection[ExportModule], files: Mapping[str, Path]) -> None:
    """Write the values of adaptations that are inputs of graphs.

    Args:
        job: the export.
        modules: the graphs.
        files: the file of each adaptation.
    """
    base = identify(job.simplest.compilation.source).fingerprint if files else ""
    for name, file in files.items():
        file.parent.mkdir(exist_ok=True)
        every = ((fqn, module.values[fqn]) for module in modules for fqn in module.adaptations.get(name, ()))
        write_adapter(dict(every), file, base)


def beside(job: ExportJob, path: Path) -> dict[str, Path]:
    """Return the files with the inputs' values beside a single graph, by adaptation."""
    return {name: path.with_name(file) for name, file in adapter_files(job.options, f"{path.name}.").items()}
