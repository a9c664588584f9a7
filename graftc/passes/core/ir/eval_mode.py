"""Derive the eval Program from the train Program by making the changes that torch's ``eval()`` would have made."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import fx

import graftc.passes.core.ops.decompositions  # noqa: F401, registers the operators
from graftc.passes.core.ir.cleaning import remove_dead
from graftc.passes.core.ir.edits import Edits
from graftc.passes.core.ir.program import Program, follow, provenance
from graftc.passes.core.ir.routes import is_pick
from graftc.passes.core.ir.updates import updates
from graftc.passes.core.weights.names import adapter_name

aten = torch.ops.aten
_DROPOUTS = (torch.ops.graftc.masked_dropout.default, torch.ops.graftc.seeded_dropout.default)
_DROPPING = (
    *_DROPOUTS,
    aten.dropout.default,
    aten.feature_dropout.default,
    aten.alpha_dropout.default,
    aten.scaled_dot_product_attention.default,
    torch.ops.graftc.rescale.default,
)
"""The operators whose dropout a probability of 0 disables; other effects of a module's mode remain."""
_PROBABILITY: dict[object, int] = {aten.dropout.default: 1, aten.scaled_dot_product_attention.default: 4}
"""The position of the dropout probability among an operator's arguments."""
ATTENTION: Mapping[str, Any] = {
    "query": None,
    "key": None,
    "value": None,
    "attn_mask": None,
    "dropout_p": 0.0,
    "is_causal": False,
}
"""The positional arguments of a call to fused attention, with their defaults."""

_SILENT = ":dropout"


def silent(path: str) -> str:
    """Return the entry that a train-mode module with dropouts set to zero has in a set of eval-mode paths."""
    return path + _SILENT


def moded(program: Program) -> set[str]:
    """Return the paths of the modules whose mode affects a train Program; dropouts of probability 0 are ignored."""
    calls = (n for n in program.graph.nodes if n.op == "call_function" and n.target in RULES)
    return {_place(node)[0] for node in calls if dropout_probability(node) != 0}


def dropout_probability(node: fx.Node) -> object:
    """Return the dropout probability of an ATen dropout or attention, or None for other nodes."""
    if (position := _PROBABILITY.get(node.target)) is None:
        return None
    return node.args[position] if len(node.args) > position else node.kwargs.get("dropout_p", 0.0)


def dropouts(program: Program) -> dict[str, float]:
    """Return the adaptations' dropout probabilities, by the paths of the modules that represent them."""
    nodes = (n for n in program.graph.nodes if n.op == "call_function" and n.target in _DROPOUTS)
    placed = ((_place(n), float(n.args[2])) for n in nodes)
    return {path: p for (path, inserted), p in placed if inserted}


def _place(node: fx.Node) -> tuple[str, bool]:
    """Return the path of the module whose mode a node depends on, and whether the node belongs to an adaptation.

    An adaptation's dropout has its own path, below the path of its site.
    """
    module, owner = str(node.meta.get("module", "")), provenance(node)
    dropped = owner is not None and node.target in (*_DROPOUTS, torch.ops.graftc.rescale.default)
    path = adapter_name(module, owner["adaptation"], "dropout") if owner is not None and dropped else module
    return path, owner is not None


def to_eval(
    program: Program, *, keep: Collection[object] = (), only: Collection[str] | None = None, base: bool = True
) -> Program:
    """Return a new Program in eval mode.

    Dropout and stochastic depth are removed, attention has no dropout, and batch normalisation uses its running
    statistics and does not count batches. A test asserts that the result has the same hash as a direct capture in eval
    mode.

    Args:
        program: the train Program, which is not changed.
        keep: operators that are left in train mode.
        only: paths of modules that are in eval mode while the others are in train mode, and `silent` entries; by
            default, all modules are in eval mode.
        base: whether the base's nodes are converted as well; if false, only inserted nodes are.
    """
    result = program.copy(mode="eval" if only is None else program.mode)
    erased: dict[fx.Node, fx.Node] = {}
    for node in list(result.graph.nodes):
        place, inserted = _place(node)
        applies = only is None or place in only
        applies = applies or (node.target in _DROPPING and only is not None and silent(place) in only)
        applies = applies and node.op == "call_function" and (base or inserted)
        rule = RULES.get(node.target) if applies and node.target not in keep else None
        if rule is not None:
            erased |= rule(node) or {}
    edits = result.edits.mapped(lambda n: follow(n, erased))
    result.edits = Edits(edit for edit in edits if edit.before is not edit.after)
    remove_dead(result)
    result.updates = updates(result.graph)
    return result


Replaced = dict[fx.Node, fx.Node] | None
"""The nodes that a rule has erased, each with its replacement, or None."""


def _replace(node: fx.Node, source: Any) -> Replaced:
    """Make a node's readers read another node, and erase the original node."""
    assert isinstance(source, fx.Node)
    node.replace_all_uses_with(source)
    node.graph.erase_node(node)
    return {node: source}


def _erase(node: fx.Node) -> Replaced:
    """Replace a node with its first argument, and erase it."""
    return _replace(node, node.args[0])


def _attention(node: fx.Node) -> None:
    defaults = tuple(ATTENTION.values())
    args = list({**ATTENTION, **dict(zip(ATTENTION, node.args, strict=False)), "dropout_p": 0.0}.values())
    while len(args) > 3 and args[-1] == defaults[len(args) - 1]:
        args.pop()
    node.args = tuple(args)
    node.kwargs = {k: v for k, v in node.kwargs.items() if k != "dropout_p"}


def _batch_norm(node: fx.Node) -> None:
    node.update_arg(5, False)


def _counter(node: fx.Node) -> Replaced:
    """Remove the in-place batch counter: a buffer plus one."""
    source = node.args[0]
    counts = isinstance(source, fx.Node) and str(source.target).endswith("num_batches_tracked")
    return _erase(node) if counts else None


def _drop_path(node: fx.Node) -> Replaced:
    """Replace stochastic depth, ``(x / keep) * floor(uniform + keep)``, with ``x``."""
    erased: dict[fx.Node, fx.Node] = {}
    source = node.args[0]
    operands = source.args if isinstance(source, fx.Node) and source.target is aten.add.Tensor else ()
    if not any(isinstance(x, fx.Node) and x.target is aten.rand.default for x in operands):
        return None
    for user in list(node.users):
        scaled = next((x for x in user.args if x is not node), None)
        if user.target is aten.mul.Tensor and isinstance(scaled, fx.Node) and scaled.target is aten.div.Tensor:
            erased |= _replace(user, scaled.args[0]) or {}
    return erased


def _drawn(node: fx.Node) -> Replaced:
    """Replace a number that an adaptation draws in train mode with the number that it uses when deployed."""
    source = node.args[0]
    deployed = provenance(node) is not None and isinstance(source, fx.Node) and source.op == "get_attr"
    return _erase(node) if deployed else None


def _mean_of_experts(node: fx.Node) -> None:
    """Replace the choice of one expert in train mode with the mean of all experts."""
    if is_pick(node):
        node.target, node.args = aten.mean.dim, (node.args[0], [0], True)


def _detached(node: fx.Node) -> Replaced:
    """Remove a `detach` that an adaptation chooses at random, since eval mode makes no random choice.

    A value that is always detached stays detached.
    """
    chooses = provenance(node) is not None and any(user.target is aten.where.self for user in node.users)
    return _erase(node) if chooses else None


def _alike(node: fx.Node) -> Replaced:
    """Remove an adaptation's choice between a value and its detached copy, once both are the same node."""
    _, a, b = node.args
    return _replace(node, a) if provenance(node) is not None and a is b else None


def _lost(node: fx.Node) -> None:
    """Clear the argument for gate noise, or for the part that dropout removes: eval mode has neither."""
    node.update_arg(4, None)


RULES: dict[object, Callable[[fx.Node], Replaced]] = {
    aten.dropout.default: _erase,
    torch.ops.graftc.masked_dropout.default: _erase,
    torch.ops.graftc.seeded_dropout.default: _erase,
    torch.ops.graftc.grad_mask.default: _erase,
    torch.ops.graftc.rescale.default: _lost,
    torch.ops.graftc.gated_weight.default: _lost,
    aten.feature_dropout.default: _erase,
    aten.alpha_dropout.default: _erase,
    aten.scaled_dot_product_attention.default: _attention,
    aten.batch_norm.default: _batch_norm,
    aten.add_.Tensor: _counter,
    aten.floor.default: _drop_path,
    aten.randint_like.low_dtype: _drawn,
    aten.index_select.default: _mean_of_experts,
    aten.detach.default: _detached,
    aten.where.self: _alike,
}
