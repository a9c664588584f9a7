"""Find where a model looks up tokens, and the inputs that accept token embeddings instead."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from graftc.compiler.capture.interface import parameters
from graftc.passes.core.ir.program import Program

_INPUTS = {"input_ids": "inputs_embeds", "decoder_input_ids": "decoder_inputs_embeds"}


@dataclass(frozen=True)
class TokenEmbeddings:
    """The token embeddings of one sequence, in one Program.

    Attributes:
        ids: the input with the token ids.
        embeds: the input that takes token embeddings instead.
        role: ``embed.token``, prefixed with the sequence's stack if there are two stacks.
        module: path of the module that looks up the tokens.
        node: the node that computes the embeddings.
    """

    ids: str
    embeds: str
    role: str
    module: str
    node: fx.Node


def token_embeddings(model: nn.Module, program: Program) -> list[TokenEmbeddings]:
    """Return a Program's token lookups, one per sequence that the model also accepts as embeddings."""
    pair = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
    known = parameters(model)
    inputs = {str(node.target): node for node in program.placeholders()}
    lookups = []
    for ids, embeds in _INPUTS.items():
        if ids not in inputs or embeds not in known:
            continue
        stack = "decoder" if ids.startswith("decoder_") else "encoder" if pair else ""
        module = looking_up(model, stack)
        paths = [path for path, own in model.named_modules(remove_duplicate=False) if own is module]
        node = _value(program.graph, paths, inputs[ids])
        if node is not None:
            role = f"{stack}.embed.token".lstrip(".")
            lookups.append(TokenEmbeddings(ids, embeds, role, str(node.meta["module"]), node))
    return lookups


def looking_up(model: nn.Module, stack: str = "") -> Any:
    """Return the module that looks up tokens, by transformers' convention; None if the model does not follow it."""
    owner: Any = model
    try:
        if stack:
            owner = owner.get_encoder() if stack == "encoder" else owner.get_decoder()
        return owner.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None


def output_head(model: Any) -> Any:
    """Return the head over the vocabulary, by transformers' convention; None if there is none."""
    try:
        return model.get_output_embeddings()
    except (AttributeError, NotImplementedError):
        return None


def _value(graph: fx.Graph, paths: Sequence[str], ids: fx.Node) -> fx.Node | None:
    """Return the last value that a module, under any of its paths, computes from ``ids``; None if there is none."""
    below: set[fx.Node] = {ids}
    last = None
    for node in graph.nodes:
        if node.op == "call_function" and not below.isdisjoint(node.all_input_nodes):
            below.add(node)
            path = str(node.meta.get("module", ""))
            if any(path == own or path.startswith(f"{own}.") for own in paths):
                last = node
    return last
