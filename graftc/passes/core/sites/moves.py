"""A table of the operators that only move entries, and a way to run them on numbers that represent the entries.

The origin of a value's entries is needed for several purposes: to find the columns of a projection that belong to a
head, the rows of a stored weight that a product reads, or to determine which operand of the product that computes
scores contains the keys. In each case, the entries are numbered and the same operators run on the numbers. Callers
decide which entries to number, what is known about the other operands, and which groups of operators may occur.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from enum import Enum, auto
from typing import Any

import torch
from torch import Tensor, fx

from graftc.passes.core.sites.calls import op_name

aten = torch.ops.aten

HOLE = -1
"""The number of an entry whose origin is unknown, or that was added by padding."""


class Move(Enum):
    """The effect of an operator on the entries of its first operand."""

    COPY = auto()
    """Leaves the entries in place."""
    CAST = auto()
    """Leaves the entries in place, possibly with another dtype."""
    RESHAPE = auto()
    """Changes the shape, but not the order of the entries."""
    BROADCAST = auto()
    """Repeats the entries along new axes or axes of size 1, without copying."""
    PERMUTE = auto()
    """Changes the order of axes."""
    REORDER = auto()
    """Changes the order of the entries, each of which occurs once in the result."""
    CUT = auto()
    """Selects a part that the arguments determine."""
    SPLIT = auto()
    """Returns a list of several parts."""
    ITEM = auto()
    """Selects one of several results."""
    REPEAT = auto()
    """Repeats the entries in new memory, or in overlapping windows."""
    JOIN = auto()
    """Joins several operands; the first argument is the list of them."""
    FILL = auto()
    """Copies the entries, with a part replaced by the second operand."""
    PAD = auto()
    """Surrounds the entries with padding."""
    PICK = auto()
    """Selects whole slices along axes, by the indices in another operand."""
    GATHER = auto()
    """Selects single entries, as another operand determines."""


_NAMES: Mapping[Move, str] = {
    Move.COPY: "contiguous clone detach alias lift_fresh_copy",
    Move.CAST: "to _to_copy type_as",
    Move.RESHAPE: "view reshape _unsafe_view view_as reshape_as flatten unflatten unsqueeze squeeze ravel",
    Move.BROADCAST: "expand expand_as broadcast_to",
    Move.PERMUTE: "transpose permute t numpy_T mT mH matrix_H adjoint swapaxes swapdims movedim moveaxis",
    Move.REORDER: "roll flip pixel_shuffle pixel_unshuffle channel_shuffle",
    Move.CUT: "slice select narrow diagonal",
    Move.SPLIT: """
        split split_with_sizes chunk tensor_split unbind unsafe_split unsafe_split_with_sizes unsafe_chunk
        hsplit vsplit dsplit
        """,
    Move.ITEM: "getitem",
    Move.REPEAT: "repeat repeat_interleave tile unfold",
    Move.JOIN: "cat stack concat concatenate hstack vstack dstack column_stack",
    Move.FILL: "slice_scatter select_scatter diagonal_scatter",
    Move.PAD: "pad constant_pad_nd",
    Move.PICK: "index index_select",
    Move.GATHER: "gather take_along_dim masked_select",
}

MOVES: Mapping[str, Move] = {name: move for move, names in _NAMES.items() for name in names.split()}
"""The groups of all operators that only move entries, by name (`op_name`)."""

_COPIED: Mapping[str, Callable[..., Any]] = {
    "view": aten.reshape.default,
    "_unsafe_view": aten.reshape.default,
    "view_as": aten.reshape_as.default,
}
"""Replacements for operators that require views: numbers are mostly broadcast, so they may need a copy where the real
tensor does not."""

BREAKS = (RuntimeError, IndexError, TypeError, ValueError)
"""Exceptions that `moved` raises if the operator cannot run on the numbers."""


def names_of(*moves: Move) -> frozenset[str]:
    """Return the names of all operators in the given groups."""
    return frozenset(name for name, move in MOVES.items() if move in moves)


def move_of(node: fx.Node) -> Move | None:
    """Return the group of the operator that a node calls; None unless it calls an operator that only moves entries."""
    return MOVES.get(op_name(node))


def moved(node: fx.Node, operand: Callable[[Any], Any]) -> Any:
    """Return the numbers of a node's entries.

    Args:
        node: a call of an operator in `MOVES`.
        operand: a function that returns the numbers that represent the entries of a node among the arguments: a tensor
            of the node's shape, ``int64`` or complex, or a list of such tensors. For a symbolic size it returns the
            size; if nothing is known, None. It is called only for operands that the operator reads: for a copy, only
            for the first argument.

    Returns:
        A tensor of the node's shape, or a list of tensors, with `HOLE` in place of padding; the result may share memory
        with the operands' numbers. None if the operator is not in the table, or if nothing is known about an operand
        that it reads.

    Raises:
        RuntimeError, IndexError, TypeError, ValueError: raised by the operator itself if sizes do not fit (`BREAKS`).
    """
    move, name = move_of(node), op_name(node)
    if move is None:
        return None
    if move in (Move.COPY, Move.CAST):
        return operand(node.args[0])
    if move is Move.ITEM:
        parts, at = operand(node.args[0]), node.args[1]
        return parts[at] if isinstance(parts, list | tuple) and isinstance(at, int) else parts
    unknown: list[Any] = []

    def known(leaf: Any) -> Any:
        """Return the numbers that represent a node or a symbolic size; anything else is returned unchanged."""
        numbers = operand(leaf) if isinstance(leaf, fx.Node | torch.SymInt) else leaf
        if numbers is None and leaf is not None:
            unknown.append(leaf)
        return numbers

    args, kwargs = fx.node.map_aggregate((node.args, node.kwargs), known)
    if unknown:
        return None
    if move is Move.PAD:
        return aten.constant_pad_nd.default(args[0], args[1], HOLE)
    target = _COPIED.get(name, node.target)
    assert callable(target)
    return target(*args, **kwargs)


def moved_along(
    steps: Iterable[tuple[Any, fx.Node]],
    numbers: Tensor,
    size: Callable[[Any], int | None] = lambda leaf: None,
    passing: Collection[str] = (),
) -> Tensor | None:
    """Return the numbers at the end of a chain of calls.

    Args:
        steps: the calls, each preceded by the operand that the current numbers represent.
        numbers: the numbers at the beginning.
        size: a function that returns the size represented by any other operand of a call; None if that is not a size.
            By default, calls may not read anything else.
        passing: names of other operators that leave entries in place.

    Returns:
        The numbers; None if a call is not in the table, reads anything else, or cannot run.
    """
    current: Any = numbers
    for source, node in steps:
        if op_name(node) in passing:
            continue

        def operand(leaf: Any, source: Any = source, stored: Any = current) -> Any:
            return stored if leaf is source else size(leaf)

        try:
            current = moved(node, operand)
        except BREAKS:
            return None
        if current is None:
            return None
    return current if isinstance(current, Tensor) else None
