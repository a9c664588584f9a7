"""Read updates from a graftc artifact; its manifest lists adapted rows, its base graph shows how they are stored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from graftc.compiler.capture.identity.fingerprint import Identity, config_digest, settings_of, tensor_digest
from graftc.files.tensors.folder import Refusal, TensorFolder
from graftc.passes.core.ir.program import Program
from graftc.passes.core.ir.shapes import DTYPE_NAMES
from graftc.passes.core.method.capabilities import RowWise
from graftc.passes.core.method.registry import method_for
from graftc.passes.core.sites.readers import linear_use
from graftc.passes.core.sites.uses import Experts, Lookup, Use
from graftc.passes.core.weights.names import adapter_name
from graftc.passes.core.weights.weight_slice import Layout, WeightSlice
from graftc.records.places import AdaptedPlace
from graftc.runtime.artifact.manifest import ADAPTERS
from graftc.runtime.artifact.read import Artifact
from graftc.runtime.sources.models import config_of_folder
from graftc.runtime.streaming.names import FileNames
from graftc.runtime.streaming.update import AdapterUpdates, Replacement, SiteUpdate
from graftc.specs.base import MethodSpec
from graftc.specs.errors.diagnostics import GraftError, warn
from graftc.specs.io import dump_spec


def artifact_updates(artifact: Artifact, checkpoint: TensorFolder) -> AdapterUpdates:
    """Return the changes that an artifact makes to a checkpoint.

    Raises:
        GraftError: GC022 for a weight that has other readers, GC050 for an adaptation that does not fold, GC084 for
            damaged tensors, GC087 if the checkpoint is not the artifact's base, GC103 if the model itself is needed.
    """
    _check_folds(artifact)
    names = FileNames(checkpoint, artifact.manifest.base.aliases)
    names.fit(name for name, tensor in artifact.manifest.base.tensors.items() if tensor.parameter)
    _check_base(artifact, checkpoint, names)
    _note_other_config(artifact, checkpoint)
    tensors = _tensors(artifact)
    graph = artifact.graph("base.eval")
    uses = _Uses(graph, artifact.manifest.base.aliases)
    specs = {spec.name or "": spec for spec in artifact.spec.adapt}
    copies = {record.tensor for record in artifact.manifest.trained}
    places = [place for place in artifact.manifest.sites if not copies.issuperset(place.tensors.values())]
    for place in places:
        if method_for(place.method).stands_in:
            what = f"{place.adaptation!r} changes single entries of {place.module}.{place.name}"
            raise GraftError("GC103", what, hint="merge in memory, without --stream")
    updates = [_update(artifact, place, specs, uses, tensors, names) for place in places]
    base = artifact.manifest.base
    return AdapterUpdates(
        "artifact",
        tuple(updates),
        tuple(_replacements(artifact, tensors, names)),
        artifact.manifest.digest,
        base.fingerprint,
        dump_spec(artifact.spec),
        tuple(uses.readers),
    )


def _check_folds(artifact: Artifact) -> None:
    """Refuse an artifact that changes more than stored weights."""
    spec = artifact.spec
    if artifact.manifest.kept:
        kept = artifact.manifest.kept[0]
        raise GraftError("GC050", kept.reason)
    if spec.base.quantize is not None:
        message = f"the spec of {artifact.path} quantises the base, whose files have different values"
        raise GraftError("GC103", message, hint="merge in memory, without --stream: graftc merge DIR --base full")
    if spec.compose or spec.tokens is not None or spec.untie:
        what = (
            "combines adaptations" if spec.compose else "adds tokens" if spec.tokens is not None else "unties tensors"
        )
        raise GraftError("GC103", f"the spec of {artifact.path} {what}, which needs the model")


def _tensors(artifact: Artifact) -> Mapping[str, Tensor]:
    """Return an artifact's adapter tensors, each checked against the manifest."""
    where, listed = f"{artifact.path} has changed since it was written", artifact.manifest.adapters
    hint = "copy it again"
    stored = TensorFolder(artifact.path / ADAPTERS, Refusal("GC084", hint=hint))
    if other := sorted(stored.entries.keys() ^ listed.keys()):
        raise GraftError("GC084", f"{where}: other tensors than listed: {', '.join(other[:3])}", hint=hint)
    wrong = []
    for name, record in listed.items():
        tensor = stored[name]
        if (DTYPE_NAMES.get(tensor.dtype), tuple(tensor.shape)) != (record.dtype, record.shape):
            wrong.append(f"{name} has a dtype or shape other than listed")
        elif tensor_digest(tensor) != record.sha256:
            wrong.append(f"{name} has values other than listed")
    if wrong:
        raise GraftError("GC084", f"{where}: {wrong[0]}", hint=hint, details=wrong[1:10])
    return stored


def _check_base(artifact: Artifact, checkpoint: TensorFolder, names: FileNames) -> None:
    """Check a checkpoint's tensors against those that the artifact was created from.

    Raises:
        GraftError: GC087, which lists every difference.
    """
    wrong = differing_tensors(artifact, checkpoint, names)
    if wrong:
        message = f"{artifact.path} adapts a model other than {checkpoint.path}: {wrong[0]}"
        more = [f"... and {len(wrong) - 20} more"] if len(wrong) > 20 else []
        hint = "name the base, in the dtype in which it was adapted: --model MODEL; merge in memory if its class"
        hint += " names tensors differently from its files, or if it creates tensors that they lack, such as a new head"
        raise GraftError("GC087", message, hint=hint, details=[*wrong[1:20], *more])


def _note_other_config(artifact: Artifact, checkpoint: TensorFolder) -> None:
    """Compare the config of a checkpoint's folder, if transformers can read it, with that of the artifact's base.

    Warns:
        GraftWarning: GC096 if they differ, as the merged folder gets the checkpoint's.
    """
    if not (checkpoint.path / "config.json").is_file():
        return
    try:
        config = config_of_folder(checkpoint.path, str(checkpoint.path))
    except GraftError:
        return
    own, other = artifact.identity, Identity(config_digest(config), {}, settings=settings_of(config))
    if own.config != other.config:
        message = f"the merged folder gets the config of {checkpoint.path}, which is not the one that was adapted: "
        hint = "merge in memory to keep the settings that were adapted: leave --stream out"
        warn("GC096", message + own.other_config(other), hint=hint)


def differing_tensors(artifact: Artifact, checkpoint: TensorFolder, names: FileNames) -> list[str]:
    """Return readable descriptions of the tensors in which a checkpoint differs from an artifact's base."""
    base, replaced = artifact.manifest.base, artifact.replaced
    differences = []
    for name, record in base.tensors.items():
        own = names.find(name)
        if own is None:
            if record.parameter:
                differences.append(f"it has no {name}")
            continue
        stored = checkpoint.entries[own]
        shape = f"{record.dtype}[{', '.join(map(str, record.shape))}]"
        if (stored.dtype.lower(), stored.shape) != (record.dtype, record.shape):
            differences.append(f"{own} is {str(stored).lower()}, not {shape}")
        elif name not in replaced and tensor_digest(checkpoint[own], full=base.full) != record.sha256:
            differences.append(f"{own} has different values")
    checkpoint.release()
    return differences


class _Uses:
    """A graph's linear maps, by the tensors that they read."""

    def __init__(self, graph: Program, aliases: Mapping[str, str]) -> None:
        self._aliases = aliases
        self._uses: dict[str, list[Use]] = {}
        self.readers: dict[str, int] = {}
        for node in graph.graph.nodes:
            if node.op == "get_attr":
                name = self.canonical(str(node.target))
                self.readers[name] = self.readers.get(name, 0) + len(node.users)
            elif (use := linear_use(node)) is not None:
                self._uses.setdefault(self.canonical(use.weight.tensor), []).append(use)

    def canonical(self, name: str) -> str:
        """Return the name that owns a tensor."""
        return self._aliases.get(name, name)

    def of(self, name: str, *, lookup: bool) -> Use | None:
        """Return the first map that reads a tensor, as a lookup table or as a matrix; None if there is none."""
        candidates = self._uses.get(self.canonical(name), ())
        return next((use for use in candidates if isinstance(use, Lookup) is lookup), None)


def _update(
    artifact: Artifact,
    place: AdaptedPlace,
    specs: Mapping[str, MethodSpec],
    uses: _Uses,
    tensors: Mapping[str, Tensor],
    names: FileNames,
) -> SiteUpdate:
    site = f"{place.module}.{place.name}".lstrip(".") + (f"[{place.part}]" if place.part else "")
    tensor = f"{place.module}.{place.name}".lstrip(".")
    lookup = place.kind == "embedding"
    use = uses.of(tensor, lookup=lookup)
    if use is None or isinstance(use, Experts) or use.leading:
        what = "experts" if use is not None else f"no stored weight of its own ({place.kind})"
        raise GraftError("GC103", f"{place.adaptation!r} adapts {what} at {site}")
    if uses.readers[uses.canonical(tensor)] > place.uses:
        raise GraftError(
            "GC022",
            f"{place.adaptation!r} would fold into {site}, which something else also reads",
            hint="folding would change both; leave the site out, or give the module its own weight with untie:",
        )
    depth = artifact.depths.get(place.stack)
    spec = specs[place.adaptation].for_site(place.module, place.roles, place.layer, depth=depth)
    method = method_for(spec.method)
    if use.weight.layout is Layout.KERNEL and method.reads_channels(spec):
        raise GraftError("GC103", f"{place.adaptation!r} reads channels at {site}, so it does not fold into a matrix")
    if isinstance(method, RowWise):
        spec = method.standing_alone(spec, place.roles)
    own, bias = use.weight.at(place.rows), use.bias
    parts = {part: tensors[name] for part, name in place.tensors.items()} | _shared(tensors, place.adaptation)
    return SiteUpdate(
        place.adaptation,
        spec,
        site,
        _in_file(own, names),
        None if bias is None else _in_file(bias.at(own.rows), names),
        lookup,
        lambda: parts,
    )


def _in_file(own: WeightSlice, names: FileNames) -> WeightSlice:
    return WeightSlice(names.of(own.tensor), own.shape, own.layout, own.rows)


def _shared(tensors: Mapping[str, Tensor], adaptation: str) -> dict[str, Tensor]:
    """Return the tensors that an adaptation shares among all its sites, by part."""
    prefix = adapter_name("", adaptation) + "."
    return {name.removeprefix(prefix): tensors[name] for name in tensors if name.startswith(prefix)}


def _replacements(artifact: Artifact, tensors: Mapping[str, Tensor], names: FileNames) -> Sequence[Replacement]:
    replacements = []
    for record in artifact.manifest.trained:
        if record.rows is not None:
            raise GraftError("GC103", f"{record.owner!r} trains some rows of {record.base}")
        replacements.append(Replacement(record.owner, record.base, names.of(record.base), tensors[record.tensor]))
    return replacements
