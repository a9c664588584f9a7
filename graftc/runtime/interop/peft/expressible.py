"""Check that a peft checkpoint can express a compiled model; the errors name what it cannot express."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from graftc.compiler.compilation import Compilation
from graftc.compiler.resolve.resolver import Resolved
from graftc.compiler.roles.windows import may_have_windows
from graftc.passes.core.sites.sites import AttentionSite, LinearSite, Site
from graftc.runtime.interop.peft.base import base_of, computes_otherwise
from graftc.runtime.interop.peft.folder import ADDED
from graftc.runtime.interop.peft.pairs import is_parameter, is_projection, repeats, table_of, trains_rows
from graftc.specs.base import MethodSpec
from graftc.specs.compose import Stack
from graftc.specs.errors.diagnostics import GraftError, Place
from graftc.specs.errors.text import shown, some
from graftc.specs.methods.lora import LoRA
from graftc.specs.peft import PeftFormat

_TASKS = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
}
_WITH_HEAD = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")
"""Tasks for which peft trains a head without being told to."""


def task_of(compilation: Compilation, saved: Sequence[str] = ()) -> str | None:
    """Return a model's task in peft; None if it has none, or if peft would expect a trained head that is missing."""
    kind = type(base_of(compilation)).__name__
    task = next((task for ending, task in _TASKS.items() if kind.endswith(ending)), None)
    return None if task in _WITH_HEAD and not saved else task


def refuse_inexpressible(compilation: Compilation, main: Resolved, others: Sequence[Resolved]) -> None:
    """Raise if peft has no field or key for any part of the model.

    Raises:
        GraftError: GC115, which names that part.
    """
    spec = compilation.spec
    for composition in spec.compose:
        if not isinstance(composition, Stack):
            what = f"the composition {composition.name!r} ({composition.kind})"
            raise _error(
                what, "compose", "combine its members into one adaptation (compiled.combine), or fix one of them"
            )
    if compilation.requantised:
        what = f"an adapter of a base whose codes were chosen together with it ({min(compilation.requantised)})"
        raise _error(what, "base", 'merge it with base="full" (--base full), or set loftq_iterations: 1')
    if spec.tokens:
        raise _error("the spec's tokens", "tokens", "merge the model instead")
    table = table_of(main.spec)
    if spec.layer_replication and "layer_replication" not in table.document:
        what = f"layer_replication together with {main.spec.method}"
        raise _error(what, "layer_replication", "merge the model instead")
    by_rows = [own.name for own in (main, *others) if trains_rows(table_of(own.spec))]
    if spec.untie and by_rows:
        raise _error(f"untie together with {by_rows[0]!r}: PEFT ties trained rows", "untie", "leave it out")
    if spec.train and trains_rows(table_of(main.spec)):
        raise _error(f"train together with {main.spec.method}", "train", "add a LoRA, with which PEFT can train both")
    for resolved in (main, *others):
        table = table_of(resolved.spec)
        index = next(number for number, own in enumerate(spec.adapt) if own.name == resolved.name)
        _check_called(compilation, resolved, index)
        _check_sites(resolved, index)
        _check_parameters(compilation, resolved, table, index)
        _check_groups(resolved, table, index)
        _check_layers(compilation, resolved, table, index)
        _check_attentions(compilation, resolved, index)
        _check_options(resolved, table, f"adapt[{index}]", _without_effect(compilation, resolved))
    _check_virtual(compilation, main)


def _error(what: str, path: str, hint: str) -> GraftError:
    return GraftError("GC115", f"PEFT cannot express {what}", place=Place(path=path), hint=hint)


def _check_sites(resolved: Resolved, index: int) -> None:
    parts = [str(site.key) for site, _ in resolved.places if site.key.part]
    if parts:
        what = f"adaptations of some rows of a fused weight: {some(parts, 3)}"
        raise _error(what, f"adapt[{index}].target", "adapt the whole module, by its path instead of a role")
    used = [str(site.key) for site, _ in resolved.places if isinstance(site, LinearSite) and site.key.use]
    if used:
        raise _error(f"a single use of a weight: {some(used, 3)}", f"adapt[{index}].target", "merge it")


def own_places(compilation: Compilation, resolved: Resolved) -> list[tuple[Site, MethodSpec]]:
    """Return the places that peft's config names, which exclude the output projections of attention modules.

    peft adapts those projections along with their modules.
    """
    modules = dict(base_of(compilation).named_modules(remove_duplicate=False))
    return [(site, spec) for site, spec in resolved.places if not is_projection(site.key.module, modules)]


def _check_attentions(compilation: Compilation, resolved: Resolved, index: int) -> None:
    """Check that both projections of each `nn.MultiheadAttention` are adapted in the way that peft adapts them.

    peft adapts both with the same rank, and adds the output projection's update twice.
    """
    modules = dict(base_of(compilation).named_modules(remove_duplicate=False))
    places = [(site.key.module, spec) for site, spec in resolved.places]
    inner = {path.rpartition(".")[0]: spec for path, spec in places if is_projection(path, modules)}
    outer = {path: spec for path, spec in places if isinstance(modules.get(path), nn.MultiheadAttention)}
    for path in dict.fromkeys((*inner, *outer)):
        first, second = (own.get(path) for own in (outer, inner))
        if first is None or second is None:
            raise _error(f"only one of the projections of {path}", f"adapt[{index}].target", "adapt both")
        sizes = [(getattr(spec, "rank", None), getattr(spec, "scaling", None)) for spec in (first, second)]
        if not isinstance(first, LoRA) or sizes[1] != (sizes[0][0], ADDED * first.scaling):
            what = f"{path} with these ranks and scalings: PEFT adds its output projection's update {ADDED} times"
            hint = f"give {path}.out_proj the same rank and {ADDED} times the alpha"
            raise _error(what, f"adapt[{index}].overrides", hint)


def _check_parameters(compilation: Compilation, resolved: Resolved, table: PeftFormat, index: int) -> None:
    """Check the places that peft adapts as parameters: it supports only LoRA there, without dropout."""
    for site, spec in resolved.places:
        if is_parameter(compilation, site):
            if not table.parameters:
                raise _error(f"{spec.method} at the parameter {site.key}", f"adapt[{index}].target", "use lora there")
            if getattr(spec, "dropout", 0):
                raise _error(f"dropout at the parameter {site.key}", f"adapt[{index}].dropout", "leave it out")


def _check_called(compilation: Compilation, resolved: Resolved, index: int) -> None:
    """Raise if a site's weight is read without calling its module.

    peft adapts the output of a module's forward, so the adaptation silently has no effect if the module is not called.
    """
    modules = dict(base_of(compilation).named_modules(remove_duplicate=False))
    for site, _ in own_places(compilation, resolved):
        if not isinstance(site, LinearSite) or is_parameter(compilation, site):
            continue
        if modules.get(str(site.use.node.meta["module"])) is not modules[site.key.module]:
            what = f"an adaptation of {site.key.module}, whose weight the model reads without calling the module"
            raise _error(what, f"adapt[{index}].target", "merge the model: PEFT would load it but not apply it")


def _check_groups(resolved: Resolved, table: PeftFormat, index: int) -> None:
    """Raise for factors within the groups of a convolution.

    The first factor of peft's LoRA reads the channels of all groups.
    """
    if not any(part.form == "down" and part.key.startswith("lora") for part in table.parts.values()):
        return
    for site, spec in resolved.places:
        if isinstance(site, LinearSite) and site.use.grouped and not getattr(spec, "across_groups", False):
            what = f"factors within the groups of {site.key}"
            raise _error(what, f"adapt[{index}].across_groups", "set across_groups, or merge it")


def _check_layers(compilation: Compilation, resolved: Resolved, table: PeftFormat, index: int) -> None:
    """Raise for modules that peft does not adapt with this method, or where it computes something else."""
    modules = dict(base_of(compilation).named_modules(remove_duplicate=False))
    for site, spec in own_places(compilation, resolved):
        module = modules.get(site.key.module)
        if not isinstance(site, LinearSite) or module is None or is_parameter(compilation, site):
            continue
        names = {kind.__name__ for kind in type(module).__mro__}
        if (table.layers and not names & table.layers) or computes_otherwise(module, table):
            groups = " with groups" if getattr(module, "groups", 1) != 1 else ""
            what = f"{spec.method} at {site.key.module}, a {type(module).__name__}{groups}"
            raise _error(what, f"adapt[{index}].target", "leave it out, or merge it")


def _without_effect(compilation: Compilation, resolved: Resolved) -> frozenset[str]:
    """Return the fields that have no effect on this model, whatever their values."""
    if getattr(resolved.spec, "window", "masked") == "masked" or may_have_windows(base_of(compilation)):
        return frozenset()
    return frozenset({"window"})


def _check_options(resolved: Resolved, table: PeftFormat, where: str, ignored: frozenset[str]) -> None:
    """Check a spec's fields against those of peft's config, except fields without effect."""
    specs = [spec for _, spec in resolved.places]
    said = {*table.fields.values(), *table.patterns.values(), *(own.field for own in table.lists.values())}
    varies = {*table.patterns.values(), *(own.field for own in table.lists.values()), *table.training}
    for field in type(resolved.spec).model_fields:
        if field in ("name", "method", "target", "overrides", *ignored):
            continue
        values = list(dict.fromkeys(_hashable(getattr(spec, field)) for spec in specs))
        if field in said and field not in varies and len(values) > 1:
            raise _error(f"a {field} that differs among sites", f"{where}.overrides", "use one value for all sites")
        if field not in said and field not in table.training:
            expected = table.constant.get(field, type(resolved.spec).model_fields[field].get_default())
            if values != [_hashable(expected)]:
                what = f"{field}: {shown(getattr(specs[0], field))} of {resolved.spec.method}"
                raise _error(what, f"{where}.{field}", f"it always has {field}: {shown(expected)}")
    for theirs, meanings in table.values.items():
        ours, known = table.fields[theirs], {*meanings.values(), *table.unnamed.get(theirs, ())}
        strange = [getattr(spec, ours) for spec in specs if getattr(spec, ours) not in known]
        if strange:
            raise _error(f"{ours}: {shown(strange[0])}", f"{where}.{ours}", "merge it")


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _check_virtual(compilation: Compilation, main: Resolved) -> None:
    """Raise for virtual tokens that peft cannot express.

    It supports one kind of virtual tokens per task, and its classifiers pool one of the tokens.
    """
    if table_of(main.spec).joined is None:
        return
    task = task_of(compilation, ["any"])
    where = "adapt[0]"
    if task not in ("CAUSAL_LM", "SEQ_2_SEQ_LM"):
        what = f"virtual tokens of {type(base_of(compilation)).__name__}: PEFT's classifiers pool one of them"
        raise _error(what, where, "save it as an artifact, or export it to ONNX")
    if repeats(compilation, main):
        what = "a separate prefix for each layer of an encoder-decoder model: PEFT's table repeats"
        raise _error(what, where, "save it as an artifact, or export it to ONNX")
    if task == "SEQ_2_SEQ_LM" and any("decoder" in role for site, _ in main.places for role in site.roles):
        raise _error("virtual tokens of a decoder behind an encoder", where, "add them to the encoder's text only")
    names = compilation.parts[main.name]
    shapes = {tuple(compilation.store.get(name).shape) for site, _ in main.places for name in names[site.key].values()}
    if len(shapes) > 1:
        raise _error("prefixes of different sizes", where, "use one length for all layers")
    layers = getattr(getattr(base_of(compilation), "config", None), "num_hidden_layers", len(main.places))
    if isinstance(main.places[0][0], AttentionSite) and layers != len(main.places):
        raise _error(f"a prefix in {len(main.places)} of {layers} layers", f"{where}.target", "adapt every layer")
