"""Operators that only move entries: one table of them, and one way to run them on numbers that represent the entries.

The origin of a value's entries is needed in several places: to find the columns of a projection that belong to a head,
the rows of a stored weight that a product reads, or the operand of a product of scores that contains the keys. In each
case the entries are numbered and the same operators run on the numbers. Callers decide what is numbered, what is known
about the other operands, and which groups of operators may occur.
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
"""Stands for an entry that nothing is known of, or that padding adds."""


class Move(Enum):
    """The effect of an operator on the entries of its first operand."""

    COPY = auto()
    """Leaves them where they are."""
    CAST = auto()
    """Leaves them where they are, perhaps in another type."""
    RESHAPE = auto()
    """Gives them another shape, in the same order."""
    BROADCAST = auto()
    """Repeats them along new axes or axes of size 1, in place."""
    PERMUTE = auto()
    """Changes the order of axes."""
    REORDER = auto()
    """Changes the order of entries, each of which occurs once in the result."""
    CUT = auto()
    """Takes a part, which the arguments tell."""
    SPLIT = auto()
    """Gives several parts, as a list."""
    ITEM = auto()
    """Takes one of several results."""
    REPEAT = auto()
    """Repeats them in new memory, or in windows that overlap."""
    JOIN = auto()
    """Puts several operands beside each other; the first operand is the list of them."""
    FILL = auto()
    """Copies them, with a part replaced by the second operand."""
    PAD = auto()
    """Surrounds them with others."""
    PICK = auto()
    """Takes whole lines along axes, which another operand numbers."""
    GATHER = auto()
    """Takes single entries, which another operand tells."""


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
"""Every such operator by its name (`op_name`)."""

_COPIED: Mapping[str, Callable[..., Any]] = {
    "view": aten.reshape.default,
    "_unsafe_view": aten.reshape.default,
    "view_as": aten.reshape_as.default,
}
"""Numbers are mostly broadcast views, which cost no memory: they may have to be copied where the real tensor is not."""

BREAKS = (RuntimeError, IndexError, TypeError, ValueError)
"""What `moved` raises where the operator does not run on these numbers."""


def names_of(*moves: Move) -> frozenset[str]:
    """Return the names of all operators in some groups."""
    return frozenset(name for name, move in MOVES.items() if move in moves)


def move_of(node: fx.Node) -> Move | None:
    """Return the group of the operator that a node calls, or None if it calls none or does more than move entries."""
    return MOVES.get(op_name(node))


def moved(node: fx.Node, operand: Callable[[Any], Any]) -> Any:
    """Return the numbers of a node's entries.

    Args:
        node: a call of an operator in `MOVES`.
        operand: a function that returns, for a node (or symbolic size) among the arguments, the numbers that represent
            its entries: a tensor of its shape, ``int64`` or complex, or a list of those; for a size, the size as a
            number; None if nothing is known about it. It is called only for what the operator reads: for a copy, only
            for the first argument.

    Returns:
        A tensor of the node's shape, or a list of them, with `HOLE` in place of padding; it may share memory with the
        operands'. None if the operator is not in the table, or if nothing is known about an operand that it reads.

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
        steps: the calls, each with the one of its operands that the numbers so far represent.
        numbers: the numbers at the beginning.
        size: a function that returns the value of anything else that a call reads, as a number; None if it is not one.
            By default nothing else may be read.
        passing: names of other operators that leave entries where they are.

    Returns:
        The numbers; None if a call is not in the table, reads anything else, or does not run.
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
