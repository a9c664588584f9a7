"""Build the metadata of an exported file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import NamedTuple

from graftc.compiler.capture.identity.fingerprint import identify
from graftc.passes.core.ir.program import Program, provenance
from graftc.passes.core.weights.names import owner_of
from graftc.records.certificate import Certificate
from graftc.runtime.artifact.built import built_of
from graftc.runtime.export.exchange import Exchange, essence
from graftc.runtime.model.model_runner import ModelRunner
from graftc.runtime.onnx_generation.graphs import BASE_OF_INPUTS
from graftc.specs.io import dump_spec


class FoldEvidence(NamedTuple):
    """Information about a fold in an export.

    Attributes:
        certificate: the fold's certificate.
        folded: names of the adaptations that were folded into the weights.
    """

    certificate: Certificate | None = None
    folded: Sequence[str] = ()


UNFOLDED = FoldEvidence()
"""The evidence in an export without a fold."""


def metadata(
    runner: ModelRunner, program: Program, evidence: FoldEvidence, exchange: Exchange | None = None
) -> dict[str, str]:
    """Return an exported file's metadata.

    It consists of the spec, the base fingerprint, class names in the order of the logits, the certificate, the
    adaptations that are inputs, with the specs for which the graph is built, and each adaptation's place in the file:
    ``"folded"`` into the weights, a ``"constant"`` in the graph, or an ``"input"``.

    Args:
        runner: the Runner of the exported model.
        program: its graph in the file.
        evidence: the evidence for a fold.
        exchange: the adaptations that are inputs.
    """
    compilation, inputs = runner.compilation, exchange.names if exchange else ()
    places = dict.fromkeys(evidence.folded, "folded") | {
        name: "input" if name in inputs else "constant" for name in adaptations_in(program)
    }
    entries = {
        "graftc.adaptations": json.dumps(places),
        "graftc.spec": dump_spec(compilation.spec),
        "graftc.fingerprint": compilation.identity().fingerprint,
    }
    labels = built_of(compilation.model).labels or ()
    if any(not label.startswith("LABEL_") for label in labels):  # transformers' names for unnamed labels
        entries["graftc.labels"] = json.dumps(labels)
    if exchange:
        entries["graftc.inputs"] = json.dumps(list(inputs))
        entries[BASE_OF_INPUTS] = identify(compilation.source).fingerprint
        entries["graftc.inputs.specs"] = json.dumps({name: essence(spec) for name, spec in exchange.specs.items()})
    if evidence.certificate is not None:
        entries["graftc.certificate"] = json.dumps(evidence.certificate.to_json(), sort_keys=True)
    return entries


def adaptations_in(program: Program) -> list[str]:
    """Return the adaptations that own nodes in a graph or tensors that it reads."""
    names: dict[str, None] = {}
    for node in program.graph.nodes:
        origin = provenance(node)
        owner = owner_of(str(node.target)) if node.op == "get_attr" else (origin or {}).get("adaptation")
        if owner:
            names[owner] = None
    return list(names)
