"""Exports: ONNX and ``.pt2``, each checked after writing and renamed into place when it is complete."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from graftc.compiler.capture.fingerprint import identify
from graftc.passes.core.ir.program_key import Signature
from graftc.runtime.files import check_destination, staged
from graftc.runtime.reference import Built
from graftc.specs.io import dump_spec

if TYPE_CHECKING:
    from graftc.compiler.folding.certificate import Certificate
    from graftc.runtime.model.runner import ModelRunner

Format = Literal["onnx", "pt2"]


def export_model(
    runner: ModelRunner,
    path: Path,
    format: Format,
    signature: Signature,
    *,
    inputs: Sequence[str] = (),
    certificate: Certificate | None = None,
    force: bool = False,
) -> Path:
    """Export a compiled or merged model.

    Args:
        runner: what to export, in eval mode.
        path: the file to write; nothing is there until it is complete and checked.
        format: ``"onnx"`` (weights in ``<name>.data`` beside it where they are large) or ``"pt2"``.
        signature: the one to export.
        inputs: adaptations whose tensors are inputs of the graph, each with its values in a file beside ``path``.
        certificate: what the file says of itself.
        force: replace what is there.

    Raises:
        GraftError: GC060 when exporting or checking fails, GC061 when a package is missing, GC063 when ``path``
            exists, GC064 when it cannot be written, GC065 for an input that the graph does not read, GC091 for an
            unknown one.
    """
    from graftc.runtime.export.inputs import companions_of
    from graftc.runtime.export.module import ExportModule
    from graftc.runtime.tensor_files import save_tensors

    if format == "onnx":
        from graftc.runtime.export.onnx import prepare_onnx as prepare
    else:
        from graftc.runtime.export.pt2 import prepare_pt2 as prepare
    inputs = list(dict.fromkeys(inputs))
    beside = companions_of(path, inputs)
    companions = (f"{path.name}.data", *beside.values())
    check_destination(path, force=force, companions=companions)
    module = ExportModule(runner, signature, inputs, apart=format == "onnx")
    write = prepare(module, metadata(runner, inputs, certificate))
    with staged(path, force=force, companions=companions) as file:
        write(file)
        for name, tensors in module.adaptations.items():
            save_tensors(tensors, file.with_name(beside[name]))
    return path


def metadata(runner: ModelRunner, inputs: Sequence[str] = (), certificate: Certificate | None = None) -> dict[str, str]:
    """What an exported file says of itself: spec, base fingerprint, names of classes in the order of logits,
    adaptations that are inputs, certificate."""
    compilation = runner._compilation
    found = {
        "graftc.spec": dump_spec(compilation.spec),
        "graftc.fingerprint": identify(compilation.source, replaced=compilation.replaced).fingerprint,
    }
    labels = Built.of(compilation.model).labels or ()
    if any(not label.startswith("LABEL_") for label in labels):  # which is what transformers calls those without a name
        found["graftc.labels"] = json.dumps(labels)
    if inputs:
        found["graftc.inputs"] = json.dumps(list(inputs))
    if certificate is not None:
        found["graftc.certificate"] = json.dumps(certificate.to_json(), sort_keys=True)
    return found


__all__ = ["export_model", "metadata"]
