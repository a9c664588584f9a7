"""Check that a base still computes what it did when an artifact was written."""

from __future__ import annotations

from graftc.compiler.capture.anchor import anchor
from graftc.compiler.capture.request import CaptureRequest
from graftc.compiler.compilation import Compilation
from graftc.passes.core.elements.calls import elements_in
from graftc.passes.core.ir.eval_mode import to_eval
from graftc.runtime.artifact.origin import are_installed
from graftc.runtime.artifact.read import Artifact
from graftc.specs.errors.diagnostics import GraftError, warn

_GRAPHS = ("tokens.eval", "tokens.train", "base.eval")
"""The graphs that may hold the base's own function, best first. Virtual tokens leave room for themselves in
`base.eval`, and keep the model as it was captured in a graph of its own: in train mode where eval mode can be derived
from it."""


def require_same_function(artifact: Artifact, compilation: Compilation) -> None:
    """Compare a base, run on sample inputs, with the graph that an artifact contains of it.

    Config and weights have been compared already, but do not contain the code, hooks and numbers of modules, which
    another release of transformers may have changed. Nothing is run if the capture is the artifact's own. The elements
    of a live model are not compared.

    Raises:
        GraftError: GC087 if the base computes something else, although the versions of the libraries are the same.

    Warns:
        GraftWarning: GC095 if it computes something else with other versions.
    """
    manifest, current = artifact.manifest, compilation.main
    written = manifest.signatures[0]
    keys = [capture.key for capture in current.captures]
    graph = next((each for each in _GRAPHS if each in written.graphs), None)
    if graph is None or elements_in(written.flags) or (all(keys) and keys == [c.key for c in written.captures]):
        return
    program = artifact.graph(graph)
    if program.mode == "train":
        program = to_eval(program)
    request = CaptureRequest.served_by(program, compilation.model, current.axes, compilation.store.aliases)
    differing = anchor(request, program, artifact.constants()).differing
    if not differing:
        return
    name = type(compilation.source).__name__
    if are_installed(manifest.versions):
        message = (
            f"{artifact.path} adapts a model other than this {name}, which computes something else: {differing[0]}"
        )
        hint = "pass the model as it was compiled: its modules, numbers and hooks"
        raise GraftError("GC087", message, hint=hint, details=differing[1:5])
    versions = manifest.versions
    warn(
        "GC095",
        f"{name} does not compute what it did when {artifact.path} was written: {differing[0]}",
        hint=f"it was written with torch {versions.torch} and transformers {versions.transformers}: evaluate it again",
    )
