"""Writing a graph as ONNX or ``.pt2``: checked after writing, and renamed into place when it is complete."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from graftc.files.tensors.writing import save_tensors
from graftc.files.writing import check_destination, staged
from graftc.passes.core.ir.program_key import Signature
from graftc.records.certificate import Certificate
from graftc.runtime.export.inputs import companions_of
from graftc.runtime.export.metadata import metadata
from graftc.runtime.export.module import ExportModule
from graftc.runtime.export.onnx import prepare_onnx
from graftc.runtime.export.pt2 import prepare_pt2
from graftc.runtime.model.model_runner import ModelRunner

Format = Literal["onnx", "pt2"]


class FoldEvidence(NamedTuple):
    """The information about a fold in an export.

    Attributes:
        certificate: the certificate of the fold.
        folded: names of the adaptations that have gone into the weights.
    """

    certificate: Certificate | None = None
    folded: Sequence[str] = ()


UNFOLDED = FoldEvidence()
"""The evidence in an export if nothing has been folded."""


def export_model(
    runner: ModelRunner,
    path: Path,
    format: Format,
    signature: Signature,
    evidence: FoldEvidence,
    *,
    inputs: Sequence[str] = (),
    force: bool = False,
) -> Path:
    """Export a compiled or merged model.

    Args:
        runner: the Runner of the model to export, in eval mode.
        path: the file to write; nothing exists there until it is complete and checked.
        format: ``"onnx"`` (weights in ``<name>.data`` beside it if they are large) or ``"pt2"``.
        signature: the signature to export.
        inputs: names of the adaptations whose tensors are inputs of the graph, each with its values in a file beside
            ``path``.
        evidence: the evidence of a fold to put into the file.
        force: if true, replace what exists there.

    Raises:
        GraftError: GC060 if exporting or checking fails, GC061 if a package is missing, GC063 if ``path`` exists, GC064
            if it cannot be written, GC065 for an input that the graph does not read, GC091 for an unknown one.
    """
    prepare = prepare_onnx if format == "onnx" else prepare_pt2
    inputs = list(dict.fromkeys(inputs))
    beside = companions_of(path, inputs)
    companions = (f"{path.name}.data", *beside.values())
    check_destination(path, force=force, companions=companions)
    module = ExportModule(runner, signature, inputs, apart=format == "onnx")
    write = prepare(module, metadata(runner, module.program, inputs, *evidence))
    with staged(path, force=force, companions=companions) as file:
        write(file)
        for name, tensors in module.adaptations.items():
            save_tensors(tensors, file.with_name(beside[name]))
    return path
