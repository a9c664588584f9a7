"""Pairs of a compiled model's tensors and their counterparts in peft's file, for both directions.

The keys are derived from the compiled sites and the methods' tables, so that reading and writing a checkpoint use the
same pairs.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import accumulate

from torch import Tensor, nn

from graftc.compat.modules import parameters_of
from graftc.compiler.compilation import Compilation
from graftc.compiler.resolve.resolver import Resolved
from graftc.compiler.resolve.train import TRAIN
from graftc.passes.core.grouping import grouped_pairs
from graftc.passes.core.sites.sites import AttentionSite, EmbeddingSite, LinearSite, Site, SiteKey
from graftc.passes.core.weights.weight_slice import Layout
from graftc.records.files import PeftTensor
from graftc.runtime.hooks.embeddings import path_by_getter
from graftc.runtime.interop.peft.base import base_of
from graftc.runtime.interop.peft.forms import Shaped, to_ours, to_theirs
from graftc.runtime.interop.peft.keys import MODEL, ROOT, tensor_key
from graftc.specs.base import MethodSpec
from graftc.specs.claims import FoldKind
from graftc.specs.errors.diagnostics import GraftError
from graftc.specs.foreign.config import beside
from graftc.specs.peft import Form, PeftFormat


@dataclass(frozen=True)
class Pair:
    """A tensor of a compiled model and its counterpart in peft's file.

    Attributes:
        key: peft's key.
        tensor: name of the tensor in the Store.
        site: the site, as text; empty for a tensor that belongs to the adaptation as a whole.
        part: the method's part that the tensor stores.
        form, shaped: how the tensor is stored in the file.
        rank: the rank axis of graftc's tensor, which is padded with zeros; None if there is none.
        start: where the pair begins along `axis` in a tensor that several pairs share; None if it is not shared.
        axis: the axis along which a shared tensor is divided.
        shared: whether it belongs to the adaptation as a whole.
        again: whether the tensor already has a pair, under another name of a tied tensor.
        repeats: the key of the tensor's first pair if several modules share it, and the file repeats it for each.
    """

    key: str
    tensor: str
    site: str
    part: str
    form: Form = "same"
    shaped: Shaped = field(default_factory=Shaped)
    rank: int | None = None
    start: int | None = None
    axis: int = 0
    shared: bool = False
    again: bool = False
    repeats: str = ""

    def read(self, theirs: Tensor, like: Tensor, order: tuple[int, ...] | None = None) -> Tensor:
        """Return graftc's tensor, read from peft's.

        Raises:
            ValueError: if the shape does not fit the form.
        """
        if self.start is not None:
            if theirs.dim() != like.dim() or self.start + like.shape[self.axis] > theirs.shape[self.axis]:
                raise ValueError(f"{list(theirs.shape)} is too small")
            return theirs.narrow(self.axis, self.start, like.shape[self.axis])
        return to_ours(self.form, theirs, replace(self.shaped, order=order))

    def write(self, ours: Tensor) -> Tensor:
        """Return peft's tensor, made from graftc's; for a shared tensor, this pair's part of it."""
        return to_theirs(self.form, ours, self.shaped)


def table_of(spec: MethodSpec) -> PeftFormat:
    """Return the table that defines how a method is written.

    A subclass of a method that peft has counts as a different method.

    Raises:
        GraftError: GC115 if peft does not have the method.
    """
    table = vars(type(spec)).get("peft")
    if not isinstance(table, PeftFormat):
        message = f"PEFT does not have the method {spec.method} of {spec.name!r}"
        way_out = "merge it, or save" if spec.claims.folds is FoldKind.EXACT else "save"
        raise GraftError("GC115", message, hint=f"{way_out} the model as an artifact")
    return table


def trains_rows(table: PeftFormat) -> bool:
    """Return whether a method trains table rows."""
    return any(part.form == "rows" for part in table.parts.values())


def is_listed_at(site: Site, spec: MethodSpec, table: PeftFormat) -> bool:
    """Return whether a module list in peft's config names a site's module."""
    return any(own.value(spec, site.roles) == own.listed for own in table.lists.values())


def pairs_of(compilation: Compilation, *, older: bool = False, named: Collection[str] = frozenset()) -> list[Pair]:
    """Return the pairs for all tensors that peft's file must have for a compiled model, in the spec's order.

    Args:
        compilation: the compiled model.
        older: whether the experts' factors are laid out as PEFT up to 0.18 wrote them.
        named: parameters that a config names itself (`target_parameters`), whether or not peft adapts their modules.

    Raises:
        GraftError: GC115 for a method or a tensor that peft does not have.
    """
    main, others = split(compilation)
    prefix = MODEL if table_of(main.spec).joined is None else ROOT
    copies = {edit.trained: edit.own.tensor for edit in compilation.tensor_edits.copies()}
    wrapped: dict[str, int] = {}
    pairs: list[Pair] = []
    turned = _Turned(compilation, older, named)
    for resolved in (main, *others):
        pairs += _of(compilation, resolved, copies, wrapped, prefix, nested=resolved is not main, turned=turned)
    for site, names in compilation.parts.get(TRAIN, {}).items():
        for part, name in names.items():
            pairs.append(_plain(copies[name], name, site, part, wrapped, prefix))
            for tied in compilation.store.tied(copies[name]):
                pairs.append(replace(_plain(tied, name, site, part, wrapped, prefix), again=True))
    return pairs


def split(compilation: Compilation) -> tuple[Resolved, list[Resolved]]:
    """Return the adaptation that peft's config describes, and those that train table rows alongside it.

    Raises:
        GraftError: GC115 for adaptations that no single config can express.
    """
    rows = beside()[0]
    every = list(compilation.main.resolved)
    for resolved in every:
        table_of(resolved.spec)  # raises for what peft does not have
    if not every:
        hint = "merge it, or save the model as an artifact"
        raise GraftError("GC115", "PEFT has no adapter that consists of trained modules only", hint=hint)
    mains = [resolved for resolved in every if type(resolved.spec) is not rows]
    mains = mains or every[:1]
    others = [resolved for resolved in every if resolved is not mains[0]]
    if len(mains) > 1 or any(type(other.spec) is not rows for other in others):
        names = ", ".join(resolved.name for resolved in every)
        hint = "combine them into one (compiled.combine), or fold all but one"
        raise GraftError("GC115", f"one PEFT adapter cannot represent several adaptations: {names}", hint=hint)
    return mains[0], others


def _of(
    compilation: Compilation,
    resolved: Resolved,
    copies: Mapping[str, str],
    wrapped: dict[str, int],
    prefix: str,
    *,
    nested: bool,
    turned: _Turned,
) -> Iterator[Pair]:
    table = table_of(resolved.spec)
    parts = compilation.parts.get(resolved.name, {})
    sites = {site.key: (site, spec) for site, spec in resolved.places}
    if table.joined is not None:
        yield from _joined(compilation, resolved, table)
        return
    depths = _depths(compilation, [site for site, _ in resolved.places])
    first: dict[str, str] = {}
    for place in sites:
        wrapped[place.module] = wrapped.get(place.module, 0) + 1
    for key, names in parts.items():
        if key is None:
            for part, name in names.items():
                if part in table.shared:
                    yield Pair(f"{ROOT}{table.shared[part]}", name, "", part, shared=True)
                elif not compilation.store.is_buffer(name):
                    raise GraftError("GC115", f"PEFT has no {part!r} of {resolved.spec.method}")
            continue
        site, spec = sites.get(key, (None, resolved.spec))
        for part, name in names.items():
            own = table.parts.get(part)
            if own is not None and site is not None:
                shaped = _shaped(site, spec, table, turned)
                if shaped.turned:
                    own = next(other for other in table.parts.values() if other.form == _OPPOSITE.get(own.form))
                suffix = own.key if not isinstance(site, EmbeddingSite) or own.table is None else own.table
                suffix = own.nested if nested and own.nested is not None else suffix
                module = table_path(compilation, key) if own.form == "rows" else key.module
                at = tensor_key(module, suffix, depths[key], prefix=prefix, wrapped=wrapped)
                pair = Pair(at, name, str(key), part, own.form, shaped, own.rank)
                if own.group is not None and name in first:
                    pair = replace(pair, again=True, repeats=first[name])
                first.setdefault(name, at)
                yield pair
                if own.form == "rows" and not nested:
                    others = (other for other in _names(compilation, key) if other != module)
                    for other in others:
                        yield replace(pair, key=tensor_key(other, suffix, prefix=prefix), again=True)
            elif name in copies:
                yield _plain(copies[name], name, key, part, wrapped, prefix)
            elif part not in table.derived and not compilation.store.is_buffer(name):
                raise GraftError("GC115", f"PEFT has no {part!r} of {resolved.spec.method} at {key}")


def _names(compilation: Compilation, key: SiteKey) -> dict[str, None]:
    """Return the paths of the modules that hold a place's tensor."""
    name = f"{key.module}.{key.name}"
    return dict.fromkeys(each.rpartition(".")[0] for each in (name, *compilation.store.tied(name)))


def table_path(compilation: Compilation, key: SiteKey) -> str:
    """Return the path of the module whose rows peft trains.

    If several modules share a table, this is the path of the input embeddings, to which peft ties the others.
    """
    names = _names(compilation, key)
    path = path_by_getter(base_of(compilation), "get_input_embeddings") if len(names) > 1 else None
    return path if path is not None and path in names else key.module


def _plain(base: str, name: str, site: SiteKey | None, part: str, wrapped: Mapping[str, int], prefix: str) -> Pair:
    module, _, last = base.rpartition(".")
    key = tensor_key(module, last, wrapped.get(module, 0), prefix=prefix, wrapped=wrapped)
    return Pair(key, name, str(site), part)


def is_adapted(module: nn.Module) -> bool:
    """Return whether peft adapts a module that is targeted by name; otherwise a config has to name the parameter."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.MultiheadAttention, Conv1D))


def is_parameter(compilation: Compilation, site: Site) -> bool:
    """Return whether peft needs the name of a site's parameter.

    It does for modules that hold several experts' matrices, and for classes that it does not adapt.
    """
    if not isinstance(site, LinearSite):
        return False
    return bool(site.leading) or not is_adapted(base_of(compilation).get_submodule(site.key.module))


def is_projection(path: str, modules: Mapping[str, nn.Module]) -> bool:
    """Return whether a module is the output projection of an attention module that peft adapts as a whole."""
    around, _, last = path.rpartition(".")
    return last == "out_proj" and isinstance(modules.get(around), nn.MultiheadAttention)


_OPPOSITE: Mapping[Form, Form] = {"down": "up", "up": "down"}


@dataclass(frozen=True)
class _Turned:
    """Determines the sites where peft's first factor is at the output instead of the input.

    The attributes are the arguments of `pairs_of`.
    """

    compilation: Compilation
    older: bool
    named: Collection[str]

    def at(self, site: LinearSite) -> bool:
        """Return whether peft's first factor is at the output of a site.

        For experts, peft uses an attribute of their module (`is_transposed`), which not every class with weights
        ``[experts, in, out]`` has, and which older releases assume to be set. Any other parameter that is adapted by
        its name is treated as ``[out, in]``.
        """
        module, columns = base_of(self.compilation).get_submodule(site.key.module), site.own.layout is Layout.COLUMNS
        if site.leading:
            return bool(self.older or getattr(module, "is_transposed", False)) != columns
        return columns and (f"{site.key.module}.{site.key.name}" in self.named or not is_adapted(module))


def _shaped(site: Site, spec: MethodSpec, table: PeftFormat, turned: _Turned) -> Shaped:
    inward = is_listed_at(site, spec, table)
    if not isinstance(site, LinearSite):
        return Shaped(inward=inward)
    kernel = site.own.shape[2:] if site.own.layout is Layout.KERNEL else ()
    experts = site.leading[0] if site.leading else None
    rows = site.own.layout is Layout.ROWS and not site.leading
    matrix = (site.out_features, site.in_features) if rows else None
    return Shaped(experts, tuple(kernel), inward, turned=turned.at(site), matrix=matrix)


def _depths(compilation: Compilation, sites: list[Site]) -> dict[SiteKey, int]:
    """Return the number of other adapters that wrap each site; the first of a module's parameters is innermost."""
    depths: dict[SiteKey, int] = {}
    for module, keys in grouped_pairs((site.key.module, site.key) for site in sites).items():
        if len(keys) > 1:
            order = list(parameters_of(compilation.store.owner(module)))
            keys = sorted(keys, key=lambda key: order.index(key.name) if key.name in order else len(order))
        depths |= {key: len(keys) - 1 - number for number, key in enumerate(keys)}
    return depths


def _joined(compilation: Compilation, resolved: Resolved, table: PeftFormat) -> Iterator[Pair]:
    """Yield the pairs for virtual tokens: the parts of all sites lie side by side in one tensor, layer by layer."""
    assert table.joined is not None
    key, axis = table.joined
    names, count = compilation.parts[resolved.name], len(table.parts)
    places = [(site.key, part) for site, _ in resolved.places for part in table.parts]
    sizes = [compilation.store.get(names[site][part]).shape[axis] for site, part in places]
    starts = [0, *accumulate(sizes)]
    # In an encoder-decoder model, peft repeats its table until there are four runs for each layer, of which a layer's
    # own attention reads the first two (see ``docs/peft.md``).
    step = 2 * count if repeats(compilation, resolved) else count
    for number, (site, part) in enumerate(places):
        layer, index = divmod(number, count)
        start = starts[step * layer % len(places) + index]
        yield Pair(key, names[site][part], str(site), part, start=start, axis=axis)


def repeats(compilation: Compilation, resolved: Resolved) -> bool:
    """Return whether peft's table is read with repetitions, as by the attention layers of an encoder-decoder model."""
    attends = any(isinstance(site, AttentionSite) for site, _ in resolved.places)
    return attends and bool(getattr(getattr(compilation.model, "config", None), "is_encoder_decoder", False))


def peft_tensors(pairs: Iterable[Pair]) -> tuple[PeftTensor, ...]:
    """Return a record for each pair."""
    return tuple(PeftTensor(pair.key, pair.site, pair.part, pair.tensor) for pair in pairs)
