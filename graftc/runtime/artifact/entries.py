"""Create the entries of a compiled model's manifest, and the texts of its graphs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from graftc.compiler.capture.capture import Capture
from graftc.compiler.capture.identity.fingerprint import Identity, tensor_digest
from graftc.compiler.inspect.snapshot import TensorRecord
from graftc.passes.core.ir.printer import structural_hash
from graftc.passes.core.ir.program import Program
from graftc.passes.core.ir.shapes import DTYPE_NAMES
from graftc.passes.core.ir.stored.serialise import SerialisationError, program_to_json
from graftc.passes.core.weights.sharding import gathered
from graftc.passes.core.weights.store import Store
from graftc.runtime.artifact.built import built_of
from graftc.runtime.artifact.manifest import canonical_json
from graftc.runtime.model.adapted import AdaptedRunner
from graftc.runtime.sources.reference import Reference
from graftc.specs.errors.diagnostics import warn


def base(compiled: AdaptedRunner, reference: Reference, identity: Identity) -> dict[str, Any]:
    """Return the entry for the base."""
    source, store = compiled.compilation.source, Store.mirror(compiled.compilation.source)
    built = built_of(source)
    return {
        "kind": reference.kind,
        "reference": reference.text,
        "relative": reference.relative,
        "revision": reference.revision,
        "model": f"{type(source).__module__}.{type(source).__qualname__}",
        "labels": built.labels,
        "settings": dict(built.settings),
        "dtype": str(compiled.dtype).removeprefix("torch."),
        "config": identity.config,
        "fingerprint": identity.fingerprint,
        "full": identity.full,
        "tensors": {
            name: {
                "dtype": tensor.dtype,
                "shape": list(tensor.shape),
                "sha256": tensor.digest,
                "parameter": tensor.parameter,
            }
            for name, tensor in identity.tensors.items()
        },
        "aliases": dict(store.aliases),
    }


def tensors(by_name: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the table of the tensors in one file."""
    return {
        name: {
            "dtype": record.dtype,
            "shape": list(record.shape),
            "trainable": record.trainable,
            "sha256": tensor_digest(gathered(tensor)),
        }
        for name, tensor in by_name.items()
        for record in (TensorRecord.of(tensor),)
    }


def places(compiled: AdaptedRunner) -> dict[str, Any]:
    """Return the entries for adapted sites and for trained base tensors."""
    shot = compiled.snapshot
    return {"sites": [place.to_json() for place in shot.sites], "trained": [copy.to_json() for copy in shot.trained]}


def signatures(compiled: AdaptedRunner) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Return the entries for all signatures, and the texts of their graphs, by file."""
    texts: dict[str, str] = {}
    compilation = compiled.compilation
    store = compilation.store
    entries = []
    for number, compiled_signature in enumerate(compilation.signatures.values()):
        programs = compilation.graphs(compiled_signature.signature)
        base, adapted = programs["base.train"], programs["train"]
        graphs: dict[str, Any] = {}
        try:
            own = {f"programs/{number}.{kind}.json": (kind, program) for kind, program in programs.items()}
            texts |= {file: canonical_json(program_to_json(program)) for file, (_, program) in own.items()}
            graphs = {
                kind: {"file": file, "structure": structural_hash(program, store.canonical)}
                for file, (kind, program) in own.items()
            }
        except SerialisationError as error:
            warn("GC092", f"the artifact has no graphs to inspect: {error} cannot be stored in a file")
        entries.append(
            {
                "inputs": [
                    {"name": axis.name, "dtype": DTYPE_NAMES[axis.dtype], "axes": list(axis.axes)}
                    for axis in compiled_signature.axes
                ],
                "flags": [list(flag) for flag in base.flags],
                "choices": [s.name for s in adapted.inputs if s.name in compilation.controls],
                "captures": [_capture(capture, programs) for capture in compiled_signature.captures],
                "graphs": graphs,
            }
        )
    return entries, texts


def _capture(capture: Capture, programs: Mapping[str, Program]) -> dict[str, Any]:
    return {
        "graph": next(name for name, program in programs.items() if program is capture.program),
        "key": capture.key,
        "notes": list(capture.notes),
        "constants": sorted(capture.constants),
    }


def constants(compiled: AdaptedRunner) -> dict[str, Tensor]:
    """Return the tensors to which graphs refer in addition to the model's and graftc's own."""
    captures = [c for signature in compiled.compilation.signatures.values() for c in signature.captures]
    return {name: tensor for c in captures for name, tensor in sorted(c.constants.items())}
