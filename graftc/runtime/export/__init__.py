"""Exports: ONNX and ``.pt2``, each checked after writing and renamed into place when it is complete."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from graftc.compiler.capture.identity.fingerprint import identify
from graftc.passes.core.ir.program import Program, provenance
from graftc.passes.core.ir.program_key import Signature
from graftc.passes.core.weights.names import owner_of
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
    folded: Sequence[str] = (),
    force: bool = False,
) -> Path:
    """Export a compiled or merged model.

    Args:
        runner: what to export, in eval mode.
        path: the file to write; nothing is there until it is complete and checked.
        format: ``"onnx"`` (weights in ``<name>.data`` beside it where they are large) or ``"pt2"``.
        signature: the one to export.
        inputs: adaptations whose tensors are inputs of the graph, each with its values in a file beside ``path``.
        certificate: what the file says of a fold.
        folded: whose adaptations have gone into the weights.
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
    write = prepare(module, metadata(runner, module.program, inputs, certificate, folded))
    with staged(path, force=force, companions=companions) as file:
        write(file)
        for name, tensors in module.adaptations.items():
            save_tensors(tensors, file.with_name(beside[name]))
    return path


def metadata(
    runner: ModelRunner,
    program: Program,
    inputs: Sequence[str] = (),
    certificate: Certificate | None = None,
    folded: Sequence[str] = (),
) -> dict[str, str]:
    """What an exported file says of itself: spec, base fingerprint, names of classes in the order of logits,
    certificate, adaptations that are inputs, and where each adaptation is that the file has: ``"folded"`` into the
    weights, a ``"constant"`` of the graph, or an ``"input"``.

    Args:
        runner: what is exported.
        program: its graph in the file.
        inputs: adaptations that are inputs.
        certificate: of the fold.
        folded: whose adaptations have gone into the weights.
    """
    compilation = runner._compilation
    places = dict.fromkeys(folded, "folded") | {
        name: "input" if name in inputs else "constant" for name in adaptations_in(program)
    }
    entries = {
        "graftc.adaptations": json.dumps(places),
        "graftc.spec": dump_spec(compilation.spec),
        "graftc.fingerprint": identify(compilation.source, replaced=compilation.replaced).fingerprint,
    }
    labels = Built.of(compilation.model).labels or ()
    if any(not label.startswith("LABEL_") for label in labels):  # which is what transformers calls those without a name
        entries["graftc.labels"] = json.dumps(labels)
    if inputs:
        entries["graftc.inputs"] = json.dumps(list(inputs))
    if certificate is not None:
        entries["graftc.certificate"] = json.dumps(certificate.to_json(), sort_keys=True)
    return entries


def adaptations_in(program: Program) -> list[str]:
    """Adaptations that a graph has something of: nodes, or tensors that it reads."""
    found: dict[str, None] = {}
    for node in program.graph.nodes:
        made = provenance(node)
        owner = owner_of(str(node.target)) if node.op == "get_attr" else (made or {}).get("adaptation")
        if owner:
            found[owner] = None
    return list(found)


__all__ = ["adaptations_in", "export_model", "metadata"]
