"""Compute the base's activations for given tokens, from which tensors are initialised."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, fx

from graftc.passes.core.ir.cleaning import on_device
from graftc.passes.core.ir.eval_mode import to_eval
from graftc.passes.core.ir.program import InputSpec, Program, above, follow, map_nodes
from graftc.passes.core.weights.store import Store
from graftc.specs.errors.diagnostics import GraftError, Place


def read_tokens(program: Program, store: Store, tokens: Sequence[int], wanted: Sequence[fx.Node]) -> list[Tensor]:
    """Return the values that nodes have when the base, in eval mode, processes a single row of tokens.

    Adaptations inserted so far are ignored. In an encoder-decoder model, both stacks read the tokens.

    Args:
        program: the base's graph, with or without adaptations.
        store: the Store that holds its tensors.
        tokens: the token ids.
        wanted: the nodes of the base whose values are returned.

    Raises:
        GraftError: GC039 for a token that is not in the vocabulary; GC017 if the graph needs inputs that cannot be
            derived from tokens, or does not accept a row of that length.
    """
    eval_program = to_eval(program)
    origin = {edit.after: edit.before for edit in eval_program.edits}
    names = {node.name: node for node in eval_program.graph.nodes}
    device = store.device()
    inputs = {
        node: _input(spec, tokens).to(device)
        for spec, node in zip(eval_program.inputs, eval_program.placeholders(), strict=True)
    }
    targets = [follow(names[node.name], origin) for node in wanted]
    try:
        return computed(targets, inputs.__getitem__, store.get, device, origin)
    except IndexError as error:
        _check_ids(eval_program, tokens)
        raise _refused(f"it cannot process a row of {len(tokens)} tokens: {error}") from error
    except RuntimeError as error:
        raise _refused(f"it cannot process a row of {len(tokens)} tokens: {error}") from error


@torch.no_grad()
def computed(
    nodes: Sequence[fx.Node],
    given: Callable[[fx.Node], Tensor],
    tensor: Callable[[str], Tensor],
    device: torch.device | None = None,
    links: Mapping[fx.Node, fx.Node] = MappingProxyType({}),
) -> list[Tensor]:
    """Compute the values of nodes.

    Args:
        nodes: the nodes whose values are returned; everything that they depend on is computed as well.
        given: a function that returns the value of a graph input.
        tensor: a function that returns the Store tensor with a given name.
        device: the device to compute on; by default, torch's default device.
        links: a mapping from nodes to the nodes that are read instead, for example from each edit's *after* to its
            *before*.
    """
    values: dict[fx.Node, Any] = {}
    for node in above(nodes, sources=lambda node: [follow(source, links) for source in node.all_input_nodes]):
        if node.op == "placeholder":
            values[node] = given(node)
        elif node.op == "get_attr":
            values[node] = tensor(str(node.target)).detach()
        else:
            args, kwargs = map_nodes((node.args, dict(node.kwargs)), lambda n: values[follow(n, links)])
            args, kwargs = on_device(node.target, args, kwargs, device)
            values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
    return [values[node] for node in nodes]


def unknown_token(number: int, entries: int, path: str) -> GraftError:
    """Return the error for a token that is not in the vocabulary.

    Args:
        number: the token's id.
        entries: the size of the vocabulary.
        path: the token's path within the adaptation.
    """
    message = f"token {number} is not in the vocabulary, whose ids end at {entries - 1}"
    return GraftError("GC039", message, place=Place(path=path))


def _input(spec: InputSpec, tokens: Sequence[int]) -> Tensor:
    if spec.dtype.is_floating_point and not spec.name.endswith("mask"):
        raise _refused(f"it needs {spec.name}, which cannot be derived from tokens")
    if spec.name.endswith("input_ids"):
        return torch.tensor([tokens], dtype=spec.dtype)
    if spec.name.endswith("position_ids"):
        return torch.arange(len(tokens), dtype=spec.dtype)[None]
    fill = torch.ones if spec.name.endswith("mask") else torch.zeros
    return fill(1, len(tokens), dtype=spec.dtype)


def _check_ids(program: Program, tokens: Sequence[int]) -> None:
    """Raise GC039 for a token id that has no row in the smallest table in which tokens are looked up."""
    lookups = program.graph.find_nodes(op="call_function", target=torch.ops.aten.embedding.default)
    rows = min((int(node.args[0].meta["val"].shape[0]) for node in lookups if _reads_tokens(node)), default=None)
    for index, number in enumerate(tokens):
        if rows is not None and not 0 <= number < rows:
            raise unknown_token(number, rows, f"init_tokens[{index}]")


def _reads_tokens(lookup: fx.Node) -> bool:
    source = lookup.args[1]
    return isinstance(source, fx.Node) and source.op == "placeholder" and str(source.target).endswith("input_ids")


def _refused(reason: str) -> GraftError:
    message = f"tensors cannot be initialised from the model's activations: {reason}"
    return GraftError("GC017", message, place=Place(path="init"), hint="leave out init and init_tokens")
