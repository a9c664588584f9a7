"""Load compiled models from artifacts: the spec is compiled again, at the same sites, with the stored tensors."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from itertools import chain

import torch
from torch import Tensor, nn

from graftc.compiler.capture.identity.fingerprint import identify
from graftc.compiler.capture.interface import device_of
from graftc.compiler.capture.signature import inputs_of_axes
from graftc.compiler.compilation import Compilation, StoredSignature
from graftc.compiler.inspect.snapshot import adapter_tensors, site_records
from graftc.compiler.missing_weights import require_weights
from graftc.compiler.pipeline import StartingPoint, compile_model
from graftc.compiler.quantised_sources.recorded_packing import packed_as
from graftc.compiler.resolution import Resolution
from graftc.compiler.signatures import add_signature
from graftc.compiler.stored_signatures import compile_stored
from graftc.passes.core import progress
from graftc.passes.core.build.initial import Initial
from graftc.passes.core.elements.calls import elements_in
from graftc.passes.core.ir import program_key as keys
from graftc.passes.core.ir.printer import structural_hash
from graftc.records.passes import PassRecord
from graftc.records.places import AdaptedPlace
from graftc.runtime.artifact.manifest import MANIFEST, SignatureRecord, damaged
from graftc.runtime.artifact.read import Artifact, open_artifact
from graftc.runtime.compiled import Compiled, make_compiled
from graftc.runtime.loading.base import find_base
from graftc.runtime.loading.checkpoint import checkpoint_file, load_checkpoint
from graftc.runtime.loading.same_function import require_same_function
from graftc.runtime.sources.models import load_as_built
from graftc.specs.errors.arguments import absolute_path
from graftc.specs.errors.diagnostics import GraftError


def load(path: str | os.PathLike[str], model: nn.Module | str | None = None, *, cache: bool = True) -> Compiled:
    """Load a compiled model from an artifact, its base and its adapter tensors, or from a trainer's checkpoint.

    See `graftc.load`.
    """
    with progress.working("loading", absolute_path(path).name):
        if (file := checkpoint_file(path)) is not None:
            return load_checkpoint(file, model, cache=cache)
        artifact = open_artifact(path)
        return load_artifact(artifact, base_of(artifact, model), cache=cache)


def base_of(artifact: Artifact, model: nn.Module | str | None = None) -> nn.Module:
    """Return an artifact's base: the given model, or by default the one that the artifact names.

    Raises:
        GraftError: GC086 if the base does not exist, GC087 if it is a different model, GC089 if it lacks tensors.
    """
    if model is None:
        model = find_base(artifact.manifest.base.place, artifact.path)
    elif isinstance(model, str):
        model = load_as_built(model, artifact.manifest.base.built)
    return check_base(artifact, model)


def check_base(artifact: Artifact, model: nn.Module) -> nn.Module:
    """Check that a model is the base from which an artifact was made.

    Returns:
        The model, packed if the base was; see `graftc.compiler.quantised_sources.recorded_packing.packed_as`. If an
        adaptation chose codes, they follow from the original weights, so the model is returned as it was given.

    Raises:
        GraftError: GC087, with the differences, for a different model; GC089 if its checkpoint lacks tensors.
    """
    expected = artifact.identity
    if device_of(model).type == "meta":
        raise GraftError("GC087", "the base is on the meta device, so its weights cannot be compared")
    manifest, original = artifact.manifest, model
    model = packed_as(model, expected.packings)
    identity = identify(model, full=expected.full, replaced=artifact.replaced)
    if identity.tensors.keys() == expected.tensors.keys():
        trained = (record.base for record in manifest.trained if record.rows is None)
        require_weights(model, trained, lambda name: manifest.base.aliases.get(name, name))
    differences = expected.differences(identity)
    if differences:
        message = f"{artifact.path} adapts a model other than this {type(model).__name__}: {differences[0]}"
        more = [f"... and {len(differences) - 5} more"] if len(differences) > 5 else []
        raise GraftError(
            "GC087",
            message,
            hint="name the base: --model MODEL, or graftc.load(path, model=...)"
            + (", quantised as it was" if expected.packings else ""),
            details=[*differences[1:5], *more],
        )
    return original if manifest.requantised else model


def load_artifact(artifact: Artifact, model: nn.Module, *, cache: bool = True, recapture: bool = False) -> Compiled:
    """Compile an artifact's spec again.

    Args:
        artifact: the artifact to load.
        model: its base, which has been checked.
        cache: whether to look up and keep captured graphs in the user's cache folder.
        recapture: whether to capture the model again even if the artifact's own graphs could be used.

    Raises:
        GraftError: GC084 for tensors that have no place in the spec, GC087 if the base computes something else, GC088
            if the spec now adapts different sites.
    """
    values = artifact.tensors()
    known = {} if recapture else artifact.captures(device_of(model))
    first, *others = range(len(artifact.manifest.signatures))
    flags = [signature.flags for signature in artifact.manifest.signatures]
    compilation = compile_model(
        artifact.spec,
        model,
        artifact.axes(first),
        flags=flags[first],
        start=StartingPoint(artifact.manifest.seed, cache, values, known),
    )
    choices = chain.from_iterable(artifact.manifest.signatures[number].choices for number in others)
    if unknown := [name for name in choices if name not in compilation.controls]:
        raise damaged(str(artifact.path), MANIFEST, f"lists {unknown[0]}, which selects nothing")
    incomplete = not values.keys() <= dict(adapter_tensors(compilation.store)).keys()
    compilation.table.stored += [_stored(artifact, number, values if incomplete else {}) for number in others]
    # The layers of a live model look for their graphs among all signatures.
    if recapture or incomplete or any(map(elements_in, flags)):
        compile_stored(compilation)
    check_passes(artifact, compilation)
    check_places(artifact, compilation)
    _check_codes(artifact, compilation)
    _take_values(artifact, compilation, values)
    check_graphs(artifact, first, compilation, compilation.main)
    require_same_function(artifact, compilation)
    return make_compiled(compilation)


def _stored(artifact: Artifact, number: int, values: Mapping[str, Tensor]) -> StoredSignature:
    """Return a signature of an artifact by its number.

    Args:
        artifact: the artifact.
        number: the signature's number in the manifest.
        values: the values of tensors, by name, that only this signature or others behind the first one have.
    """
    entry, axes = artifact.manifest.signatures[number], artifact.axes(number)

    def compiled(compilation: Compilation) -> None:
        count = len(compilation.signatures)
        initial = Initial(compilation.seed, values, narrow=compilation.narrow)
        signature = add_signature(compilation, axes, entry.flags, entry.choices, initial)
        if len(compilation.signatures) == count:
            raise damaged(str(artifact.path), MANIFEST, "lists a signature twice")
        check_graphs(artifact, number, compilation, compilation.signatures[signature])

    return StoredSignature(inputs_of_axes(axes, entry.flags), compiled)


def check_passes(artifact: Artifact, compilation: Compilation) -> None:
    """Check that the plugins' passes that rewrite graphs are the same as when the artifact was written.

    With a different version of a plugin, as with a different version of torch, only the sites must be the same.

    Raises:
        GraftError: GC077, with the name of the pass, if a pass is missing or new.
    """

    def rewriting(passes: Iterable[PassRecord]) -> dict[tuple[str, str, str], PassRecord]:
        return {(own.pipeline, own.name, own.distribution): own for own in passes if own.rewrites}

    before, now = rewriting(artifact.passes), rewriting(compilation.main.passes)
    for key in before.keys() ^ now.keys():
        own = before.get(key) or now[key]
        if key in before:
            message = f"{artifact.path} has graphs rewritten by {own}, which is not installed"
            hint = f"pip install {own.distribution}=={own.version}"
        else:
            message = f"{own} rewrites graphs, but {artifact.path} was written without it"
            hint = f"uninstall {own.distribution}, or compile the spec again"
        raise GraftError("GC077", message, hint=hint)


def check_places(artifact: Artifact, compilation: Compilation) -> None:
    """Check that a spec still adapts the sites recorded in an artifact.

    Raises:
        GraftError: GC088, with the new and the missing sites, if it does not.
    """
    before, now = _places(artifact.manifest.sites), _places(site_records(compilation))
    gone, new = [p for p in before if p not in now], [p for p in now if p not in before]
    if gone or new or before != now:
        written = artifact.manifest.versions
        details = [*(f"missing: {p}" for p in gone[:3]), *(f"new: {p}" for p in new[:3])] or ["in a different order"]
        raise GraftError(
            "GC088",
            f"{artifact.path} adapts {len(before)} places, but its spec selects different ones here",
            hint=f"it was written with graftc {written.graftc}, torch {written.torch}, "
            f"transformers {written.transformers}",
            details=details,
        )


def _check_codes(artifact: Artifact, compilation: Compilation) -> None:
    """Check that a spec that packs the base again has packed the recorded weights in the recorded way.

    Raises:
        GraftError: GC088 if it has not.
    """
    if artifact.manifest.requantised or compilation.chosen_codes:
        expected = artifact.identity
        differences = expected.differences(compilation.identity(full=expected.full))
        if compilation.chosen_codes != set(artifact.manifest.requantised):
            differences.append("its adaptations choose the codes of other weights")
        if differences:
            message = f"the spec of {artifact.path} packs another base: {differences[0]}"
            raise GraftError("GC088", message, hint="compile the spec again", details=differences[1:5])


def _places(records: Iterable[AdaptedPlace]) -> list[str]:
    return [f"{r.adaptation}: {r.key} {r.rows or ''}".strip() for r in records]


def _take_values(artifact: Artifact, compilation: Compilation, values: Mapping[str, Tensor]) -> None:
    """Copy the constants that methods store in addition to parameters, and check that all tensors match."""
    own = dict(adapter_tensors(compilation.store))
    other = sorted(own.keys() ^ values.keys())
    if other:
        what = "has no" if other[0] in own else "has a tensor without a place,"
        raise GraftError("GC084", f"{artifact.path} {what} {other[0]}", details=other[1:5])
    with torch.no_grad():
        for name, tensor in own.items():
            if not isinstance(tensor, nn.Parameter):
                tensor.copy_(values[name])


def check_graphs(artifact: Artifact, number: int, compilation: Compilation, current: Resolution) -> None:
    """Check that the artifact's own captures still result in the graphs that it contains for a signature.

    Raises:
        GraftError: GC088, with the name of the first graph that differs.
    """
    signature = artifact.manifest.signatures[number]
    if [c.key for c in current.captures] != [c.key for c in signature.captures] or not current.captures[0].key:
        return  # with different versions of the libraries, only the sites must be the same
    if (other := different_graph(signature, compilation, current.signature)) is not None:
        message = f"{artifact.path} has a different {other} graph from the one that its spec results in"
        raise GraftError("GC088", message, hint="compile the spec again")


def different_graph(kept: SignatureRecord, compilation: Compilation, signature: keys.Signature) -> str | None:
    """Return the name of the first graph of a signature that differs from the Compilation's; None if all are equal."""
    programs, canonical = compilation.graphs(signature), compilation.store.canonical
    for kind, graph in kept.graphs.items():
        if kind not in programs or structural_hash(programs[kind], canonical) != graph.structure:
            return kind
    return None
