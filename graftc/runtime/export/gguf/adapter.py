"""Export LoRA adapters as GGUF, for a base in that format."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from graftc.runtime.export.gguf.families import architecture, family_of, heads_of, stored
from graftc.runtime.export.gguf.writing import Entry, GgufFile, name_of, package
from graftc.runtime.interop.layouts.plain import PlainAdapter, Update
from graftc.specs.errors.diagnostics import GraftError
from graftc.specs.methods.alora import ALoRA
from graftc.specs.methods.lora import LoRA

if TYPE_CHECKING:
    from graftc.compiler.compilation import Compilation


def adapter_file(adapter: PlainAdapter, config: Any) -> GgufFile:
    """Return a LoRA adapter's file: ``<tensor>.lora_a`` as ``[rank, in]``, ``<tensor>.lora_b`` as ``[out, rank]``.

    llama.cpp scales the product of two factors by ``adapter.lora.alpha`` over their rank; any other scale that a site
    needs is absorbed into its ``lora_b``. Its server reads ``adapter.alora.invocation_tokens``, from which on an aLoRA
    acts.

    Args:
        adapter: the adapter, keyed by its maps' paths in transformers.
        config: the base's config.

    Raises:
        GraftError: GC060 for a model type or a map that GGUF cannot store, GC061 without the package.
    """
    gguf = package()
    family = family_of(config)
    if adapter.has_experts:
        raise GraftError("GC060", "adapters for experts cannot be written as GGUF", hint="merge them into the model")
    names = gguf.get_tensor_name_map(architecture(gguf, family), config.num_hidden_layers)
    heads = heads_of(config)
    first = next(iter(adapter.updates.values()))
    alpha = first.scale * first.rank
    entries: list[Entry] = []
    for place, update in adapter.updates.items():
        name = name_of(names, f"{place}.weight")
        _require_own(name, place, tied=bool(getattr(config, "tie_word_embeddings", False)))
        update = update.scaled(alpha / update.rank) if update.scale * update.rank != alpha else update
        # The rows of an embedding table are tokens, and llama.cpp looks up rows of lora_a.
        down = update.down.T if update.table else update.down
        up = stored(family, heads, f"{place}.", update.up)
        for word, value in (("lora_a", down), ("lora_b", up)):
            entries.append(Entry.of(f"{name}.{word}", value))

    keys, invocation = gguf.Keys.Adapter, list(adapter.invocation)

    def fill(writer: Any) -> None:
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(keys.TYPE, "lora")
        writer.add_float32(keys.LORA_ALPHA, float(alpha))
        if invocation:
            kinds = gguf.GGUFValueType
            writer.add_key_value(keys.ALORA_INVOCATION_TOKENS, invocation, kinds.ARRAY, sub_type=kinds.UINT32)

    return GgufFile(family.arch, entries, fill, {keys.ALORA_INVOCATION_TOKENS: invocation} if invocation else {})


def _require_own(name: str, place: str, *, tied: bool) -> None:
    """Raise if an update is for only one use of a tied table, which a file stores once for both uses.

    If a model has no separate head, llama.cpp multiplies by the table and treats an update to the embedding as one to
    the head. The sizes of such an update do not fit, which terminates a server at its first request.

    Raises:
        GraftError: GC060.
    """
    uses = {"output.weight": ("the embedding table", "head"), "token_embd.weight": ("the head", "embedding")}
    if tied and name in uses:
        other, own = uses[name]
        hint = f"leave the {own} out, or untie the head (untie: in the spec) and export the merged model"
        raise GraftError("GC060", f"{place} is tied to {other} and has no tensor of its own", hint=hint)


def plain_of(compilation: Compilation) -> PlainAdapter:
    """Return a compiled model's LoRAs as plain updates to whole modules; a module's LoRAs are placed side by side.

    aLoRAs must all have the same invocation.

    Raises:
        GraftError: GC066 for anything that is not plain LoRA or aLoRA, and for adaptations that begin at different
            tokens.
    """
    updates: dict[str, Update] = {}
    begins = {getattr(adaptation, "invocation", ()): adaptation for adaptation in compilation.spec.adapt}
    if len(begins) > 1:
        names = [str(adaptation.name) for adaptation in begins.values()]
        raise _no_lora(names[0], f"does not begin to act at the same token as {names[1]!r}")
    if compilation.tensor_edits.copies():
        owner = compilation.tensor_edits.copies()[0]
        raise _no_lora(owner.owner, f"trains {owner.own.tensor} in full")
    if compilation.requantised:
        message = f"the codes of {min(compilation.requantised)} were chosen together with the adapter"
        raise GraftError("GC066", message, hint='merge it with base="full" (--base full), or set loftq_iterations: 1')
    if compilation.spec.compose:
        raise _no_lora(compilation.spec.compose[0].members[0], "is part of a composition")
    for resolved in compilation.main.resolved:
        for site, spec in resolved.places:
            parts = compilation.parts[resolved.name].get(site.key, {})
            if not isinstance(spec, LoRA | ALoRA) or "A0" in parts:
                raise _no_lora(resolved.name, f"is not plain LoRA at {site.key}")
            if site.key.name != "weight" or site.own.leading or len(site.own.shape) != 2:  # type: ignore[attr-defined]
                raise GraftError("GC060", f"a GGUF adapter cannot store {site.key}", hint="merge it into the model")
            update = _whole(compilation, site, parts, spec)
            previous = updates.get(site.key.module)
            updates[site.key.module] = update if previous is None else previous.beside(update)
    if not updates:
        raise GraftError("GC066", "the model has no LoRA", hint="export the merged model")
    return PlainAdapter(updates, invocation=next(iter(begins)))


def _whole(compilation: Compilation, site: Any, parts: Mapping[str, str], spec: LoRA | ALoRA) -> Update:
    """Return a site's factors, with zeros for the other rows of its module."""
    down, up = (compilation.store.full(parts[part]).detach() for part in ("A", "B"))
    if not site.own.whole:
        own, up = up, up.new_zeros(site.own.total, up.shape[-1])
        rows = [row for start, end in site.own.spans for row in range(start, end)]
        up[torch.tensor(rows)] = own
    return Update(down, up, spec.scaling, table="embed" in site.roles)


def _no_lora(name: str, what: str) -> GraftError:
    hint = "compiled.convert() turns adaptations of linear maps into LoRA; a merged model is exported whole"
    return GraftError("GC066", f"{name!r} {what}", hint=hint)
