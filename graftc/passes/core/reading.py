"""What a base computes when it reads given tokens: for tensors that start from activations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from graftc.passes.canonicalise import takes_device
from graftc.passes.core.program import InputSpec, Program, follow, map_nodes
from graftc.passes.core.store import Store
from graftc.passes.mode import to_eval
from graftc.specs.diagnostics import GraftError, Place


def read_tokens(program: Program, store: Store, tokens: Sequence[int], wanted: Sequence[fx.Node]) -> list[Tensor]:
    """Values of nodes when the base, in eval mode, reads one row of tokens: without anything that was inserted so far.

    Both stacks of an encoder-decoder model read them.

    Args:
        program: the base's graph, with or without adaptations.
        store: its tensors.
        tokens: their ids.
        wanted: nodes of the base.

    Raises:
        GraftError: GC039 for a token that the vocabulary does not have; GC017 where the graph takes something else than
            tokens, or no row of so many.
    """
    made = to_eval(program)
    origin = {edit.after: edit.before for edit in made.edits}
    names = {node.name: node for node in made.graph.nodes}
    device = next((t.device for _, t in store.base()), torch.device("cpu"))
    values: dict[fx.Node, Any] = {
        node: _input(spec, tokens).to(device) for spec, node in zip(made.inputs, made.placeholders(), strict=True)
    }
    targets = [follow(names[node.name], origin) for node in wanted]
    try:
        with torch.no_grad():
            for node in _needed(targets, origin):
                if node not in values:
                    values[node] = _value(node, values, origin, store, device)
    except IndexError as error:
        _check_ids(made, tokens)
        raise _refused(f"no row of {len(tokens)} tokens goes through it: {error}") from error
    except RuntimeError as error:
        raise _refused(f"no row of {len(tokens)} tokens goes through it: {error}") from error
    return [values[node] for node in targets]


def _value(
    node: fx.Node, values: dict[fx.Node, Any], origin: dict[fx.Node, fx.Node], store: Store, device: torch.device
) -> Any:
    if node.op == "get_attr":
        return store.get(str(node.target)).detach()
    args, kwargs = map_nodes((node.args, dict(node.kwargs)), lambda n: values[follow(n, origin)])
    if takes_device(node.target):
        kwargs = {**kwargs, "device": device}
    return node.target(*args, **kwargs)  # type: ignore[operator]


def _needed(targets: Sequence[fx.Node], origin: dict[fx.Node, fx.Node]) -> list[fx.Node]:
    found: set[fx.Node] = set()
    pending = list(targets)
    while pending:
        node = pending.pop()
        if node not in found:
            found.add(node)
            pending += [follow(source, origin) for source in node.all_input_nodes]
    return sorted(found)


def _input(spec: InputSpec, tokens: Sequence[int]) -> Tensor:
    if spec.dtype.is_floating_point and not spec.name.endswith("mask"):
        raise _refused(f"it takes {spec.name}, which no tokens give")
    if spec.name.endswith("input_ids"):
        return torch.tensor([tokens], dtype=spec.dtype)
    if spec.name.endswith("position_ids"):
        return torch.arange(len(tokens), dtype=spec.dtype)[None]
    fill = torch.ones if spec.name.endswith("mask") else torch.zeros
    return fill(1, len(tokens), dtype=spec.dtype)


def _check_ids(program: Program, tokens: Sequence[int]) -> None:
    """Raise GC039 for a token that the first table, which the tokens are looked up in, has no row for."""
    lookups = program.graph.find_nodes(op="call_function", target=torch.ops.aten.embedding.default)
    rows = min((int(node.args[0].meta["val"].shape[0]) for node in lookups if _reads_tokens(node)), default=None)
    for index, number in enumerate(tokens):
        if rows is not None and not 0 <= number < rows:
            message = f"token {number} is not in the vocabulary, whose ids end at {rows - 1}"
            raise GraftError("GC039", message, place=Place(path=f"init_tokens[{index}]"))


def _reads_tokens(lookup: fx.Node) -> bool:
    source = lookup.args[1]
    return isinstance(source, fx.Node) and source.op == "placeholder" and str(source.target).endswith("input_ids")


def _refused(reason: str) -> GraftError:
    message = f"nothing can start from what the model reads: {reason}"
    return GraftError("GC017", message, place=Place(path="init"), hint="leave out init and init_tokens")
