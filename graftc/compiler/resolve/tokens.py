"""Make room for added tokens in a source model, and find the sites that read their rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from graftc.compiler.resolve.sitetable import SiteTable, site_of
from graftc.compiler.resolve.token_embeddings import looking_up, output_head
from graftc.compiler.resolve.untie import sharing_copy
from graftc.passes.core.sites.sites import LinearSite, SiteKey
from graftc.passes.core.sites.uses import Lookup
from graftc.passes.core.weights.store import Store
from graftc.passes.core.weights.weight_slice import WeightSlice
from graftc.specs.base import OWNERS
from graftc.specs.document import Tokens
from graftc.specs.errors.diagnostics import GraftError, Place

TOKENS = OWNERS["tokens"]
"""Name of the owner of the rows of a spec's ``tokens``."""


def with_room(model: nn.Module, tokens: Tokens) -> nn.Module:
    """Return ``model`` itself if its table already has the new rows, otherwise a copy with a longer table and head.

    The copy shares all other storage. Each new row starts as the mean of the existing rows. The model is not changed.

    Raises:
        GraftError: GC018 if the model's table cannot be determined or resized, or if the first new id would leave a
            gap.
    """
    table = _table(model)
    entries = table.shape[0]
    first = entries if tokens.first is None else tokens.first
    needed = first + len(tokens.add)
    if first > entries:
        raise GraftError(
            "GC018",
            f"the first new id is {first}, which leaves a gap: the table has {entries} entries",
            place=Place(path="tokens.first"),
            hint=f"leave first out, or set it to at most {entries}",
        )
    if needed <= entries:
        return model
    longer = sharing_copy(model)
    if not hasattr(longer, "resize_token_embeddings"):
        raise _cannot(model)
    devices = [table.device] if table.device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.no_grad():
        longer.resize_token_embeddings(needed, mean_resizing=False)
        for module in longer.modules():  # resizing sets it for the root alone
            if vars(module).get("vocab_size") == entries:
                vars(module)["vocab_size"] = needed
        for tensor in {id(t): t for t in (_table(longer), _head(longer)) if t is not None}.values():
            if tensor.device.type != "meta" and tensor.shape[0] == needed:
                tensor[entries:] = tensor[:entries].float().mean(0).to(tensor.dtype)
    return longer  # type: ignore[no-any-return]


def token_sites(
    model: nn.Module, store: Store, table: SiteTable, tokens: Tokens, *, optional: bool = False
) -> list[tuple[WeightSlice, list[LinearSite]]]:
    """Return, for each tensor with new rows, these rows and all of their readers in one Program.

    Args:
        model: the model, with room for the new rows.
        store: the model's tensors.
        table: the Program's sites.
        tokens: the new tokens.
        optional: whether the Program may look up no tokens.

    Raises:
        GraftError: GC018 if new rows cannot be inserted at one of a tensor's readers, GC031 if the Program looks up no
            tokens.
    """
    tables: list[tuple[WeightSlice, list[LinearSite]]] = []
    parameters = reversed(list(model.named_parameters(remove_duplicate=False)))  # the first name of each parameter wins
    names = {id(parameter): store.canonical(name) for name, parameter in parameters}
    tensors = [t for t in (_table(model), _head(model)) if t is not None]
    for tensor in {id(t): t for t in tensors}.values():
        first = tokens.first if tokens.first is not None else tensor.shape[0] - len(tokens.add)
        name = names[id(tensor)]
        rows = WeightSlice.every(name, tensor).at(((first, first + len(tokens.add)),))
        sites = _readers(table, rows)
        others = table.read_elsewhere(sites) if sites else None
        if others:
            raise GraftError("GC018", f"{name} is also read by {others}, where new rows cannot be added", place=_PLACE)
        if not sites and tensor is tensors[0] and not optional:
            inputs = ", ".join(table.program.signature)
            raise GraftError(
                "GC031",
                f"with the inputs {inputs} the model looks up no tokens, but the spec adds some",
                hint="call the model with token ids",
            )
        if sites:
            tables.append((rows, sites))
    return tables


_PLACE = Place(path="tokens")


def _readers(table: SiteTable, rows: WeightSlice) -> list[LinearSite]:
    return [
        site_of(use, SiteKey(*owner, use=index), use.weight if isinstance(use, Lookup) else use.weight.at(rows.rows))
        for owner, uses in table.uses.items()
        for index, use in enumerate(uses)
        if use.weight.tensor == rows.tensor
    ]


def _table(model: Any) -> torch.Tensor:
    weight = getattr(looking_up(model), "weight", None)
    if not isinstance(weight, torch.Tensor):
        raise _cannot(model)
    return weight


def _head(model: Any) -> torch.Tensor | None:
    weight = getattr(output_head(model), "weight", None)
    return weight if isinstance(weight, torch.Tensor) else None


def _cannot(model: nn.Module) -> GraftError:
    return GraftError(
        "GC018",
        f"cannot find or resize the token embedding table of {type(model).__name__}",
        place=_PLACE,
        hint="the model needs get_input_embeddings and resize_token_embeddings, as in transformers",
    )
