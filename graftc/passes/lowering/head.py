"""Recognise heads over a vocabulary followed by a cross-entropy, by data flow, from the loss backwards.

The operations on all logits (casts, moves of rows, a scale, a cap) come first, then the sum of linear maps from which
the logits are computed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import fx

from graftc.compat.operators import TO_COPY, UNSAFE_VIEW
from graftc.passes.core.ir.program import provenance
from graftc.passes.core.ir.shapes import expression
from graftc.passes.core.ops.head_loss import MEAN

aten = torch.ops.aten

_SAME = frozenset(
    {
        aten.to.dtype,
        aten.to.device,
        aten.to.dtype_layout,
        TO_COPY,
        aten.type_as.default,
        aten.contiguous.default,
        aten.clone.default,
        aten.alias.default,
    }
)
"""Operators that change only how values are stored."""

VIEWS = (aten.view.default, aten.reshape.default, UNSAFE_VIEW)
_MOVES = (*VIEWS, aten.flatten.using_ints, aten.slice.Tensor, aten.index.Tensor)
_FACTORS = (aten.mul.Tensor, aten.mul.Scalar)
_QUOTIENTS = (aten.div.Tensor, aten.div.Scalar)
_SUMS = (aten.add.Tensor, aten.sub.Tensor)


class NoMatchError(Exception):
    """Raised with the reason why a loss is left unchanged."""


@dataclass(frozen=True)
class Term:
    """One of the linear maps whose results add up to the logits.

    Attributes:
        x: the input, ``[..., in]``.
        weight: the matrix, ``[columns, in]``; None for a bias, which is then ``x``, ``[..., columns]``.
        turned: whether the weight is ``[in, columns]``.
        factor: the scalar by which its result is multiplied.
        moves: the operators that move rows after the map, the last one first.
        start, stop: the range of its columns that is used.
        to: the position in the vocabulary at which that range begins.
    """

    x: fx.Node
    weight: fx.Node | None
    factor: float
    moves: tuple[fx.Node, ...]
    start: int
    stop: int
    to: int = 0
    turned: bool = False

    @property
    def end(self) -> int:
        """The end of its range in the vocabulary."""
        return self.to + self.stop - self.start


@dataclass
class LossHead:
    """The computation that produces a loss.

    Attributes:
        loss: the cross-entropy.
        chain: all nodes between the maps' inputs and the loss.
        terms: the linear maps; those that cover the vocabulary come first.
        biases: the other addends.
        scale, cap: as in `graftc.passes.core.ops.head_loss`.
        place: the path of the module that owns the head.
    """

    loss: fx.Node
    chain: set[fx.Node] = field(default_factory=set)
    terms: list[Term] = field(default_factory=list)
    biases: list[Term] = field(default_factory=list)
    scale: float = 1.0
    cap: float | None = None
    place: str = ""


@dataclass(frozen=True)
class Loss:
    """The arguments of a cross-entropy."""

    logits: fx.Node
    labels: fx.Node
    weight: Any
    reduction: int
    ignored: int
    smoothing: float


def _args(node: fx.Node) -> tuple[Any, ...]:
    return node.args


def loss_of(node: fx.Node) -> Loss | None:
    """Return the arguments of a cross-entropy; None for other nodes."""
    if node.target is aten.cross_entropy_loss.default:
        return Loss(*_filled(node, (None, MEAN, -100, 0.0)))
    if node.target in (aten.nll_loss.default, aten.nll_loss_nd.default):
        logits, labels, weight, reduction, ignored = _filled(node, (None, MEAN, -100))
        if logits.target is aten.log_softmax.int and logits.args[1] in (-1, logits.meta["val"].dim() - 1):
            return Loss(logits, labels, weight, reduction, ignored, 0.0)
    return None


def _filled(node: fx.Node, defaults: tuple[Any, ...]) -> list[Any]:
    """Return the arguments of a loss, with defaults for those that are not given."""
    names = ("weight", "reduction", "ignore_index", "label_smoothing")[: len(defaults)]
    given = dict(zip(names, _args(node)[2:], strict=False))
    return [*_args(node)[:2], *{**dict(zip(names, defaults, strict=True)), **given, **node.kwargs}.values()]


def read_head(head: LossHead) -> None:
    """Trace a loss back to the linear maps from which it is computed, and fill in ``head``.

    Raises:
        NoMatchError: if there is no head over a vocabulary, or none that the operator supports.
    """
    loss = loss_of(head.loss)
    assert loss is not None
    node, outer = loss.logits, 1.0
    moves: tuple[fx.Node, ...] = ()
    if loss.weight is not None:
        raise NoMatchError("classes have weights")
    if loss.labels.meta["val"].is_floating_point() or loss.labels.meta["val"].dim() != 1:
        raise NoMatchError("labels are not token ids, one for each row")
    if node.target is aten.log_softmax.int:
        head.chain.add(node)
        node = _args(node)[0]
    while True:
        step = _step(node, moves, outer)
        if node.target is aten.tanh.default and head.cap is None:
            head.cap, step = outer, (_args(node)[0], moves, 1.0)
        if step is None:
            break
        head.chain.add(node)
        node, moves, outer = step
    head.scale = outer if head.cap is None else outer * head.cap
    if head.cap is not None and head.cap <= 0:
        raise NoMatchError("logits are capped at a number that is not positive")
    _collect(head, node, 1.0, moves)
    _order(head, width_of(loss.logits))
    _require_unread(head)


def _step(
    node: fx.Node, moves: tuple[fx.Node, ...], factor: float
) -> tuple[fx.Node, tuple[fx.Node, ...], float] | None:
    """Step back by one operator; return None unless it is a cast, a move of rows or a scaling."""
    source = _args(node)[0] if _args(node) else None
    if not isinstance(source, fx.Node):
        return None
    if node.target in _SAME and source.meta["val"].is_floating_point() and node.meta["val"].is_floating_point():
        return source, moves, factor
    if node.target in _MOVES and _of_rows(node, source):
        return source, (*moves, node), factor
    if node.target in _FACTORS + _QUOTIENTS:
        number = _args(node)[1]
        if isinstance(number, int | float):
            return source, moves, factor * number if node.target in _FACTORS else factor / number
    return None


def _of_rows(node: fx.Node, source: fx.Node) -> bool:
    """Return whether a move of rows leaves the vocabulary axis unchanged."""
    axes, width = source.meta["val"].dim(), width_of(source)
    if width_of(node) != width:
        return False
    if node.target in VIEWS:
        sizes = _args(node)[1]
        return isinstance(sizes, list | tuple) and isinstance(sizes[-1], int) and sizes[-1] in (width, -1)
    if node.target is aten.flatten.using_ints:
        return len(_args(node)) > 2 and _args(node)[2] not in (-1, axes - 1)
    if node.target is aten.index.Tensor:
        indices = _args(node)[1]
        assert isinstance(indices, list | tuple)
        used = sum(i.meta["val"].dim() if i.meta["val"].dtype == torch.bool else 1 for i in indices if i is not None)
        return None not in indices and used < axes
    return (_args(node)[1] if len(_args(node)) > 1 else 0) not in (-1, axes - 1)


def width_of(node: fx.Node) -> int:
    """Return the number of values in a row.

    Raises:
        NoMatchError: if it is not fixed.
    """
    shape = node.meta["val"].shape
    width = expression(shape[-1]) if len(shape) else None
    if not isinstance(width, int):
        raise NoMatchError("the number of logits in a row is not fixed")
    return width


def _collect(head: LossHead, node: fx.Node, factor: float, moves: tuple[fx.Node, ...]) -> None:
    """Add to ``head`` the linear maps whose results add up to a node."""
    width = width_of(node)
    if node.meta["val"].dim() == 1 or all(expression(size) == 1 for size in node.meta["val"].shape[:-1]):
        head.biases.append(Term(node, None, factor, (), 0, width))
        return
    head.chain.add(node)
    step = _step(node, moves, factor)
    if step is not None:
        source, moves, factor = step
        _collect(head, source, factor, moves)
    elif node.target in _SUMS and all(isinstance(arg, fx.Node) for arg in _args(node)[:2]):
        alpha: Any = node.kwargs.get("alpha", 1)
        alpha = alpha if node.target is aten.add.Tensor else -alpha
        for source, own in zip(_args(node)[:2], (factor, factor * alpha), strict=True):
            _collect(head, source, own, moves)
    elif node.target is aten.cat.default and _is_last(node, 1):
        to = 0
        for source in _args(node)[0]:
            _within(head, partial(_put, to=to), source, factor, moves)
            to += width_of(source)
    elif node.target is aten.slice.Tensor and _is_last(node, 1) and len(_args(node)) <= 4:
        source = _args(node)[0]
        start, stop, _ = slice(*_args(node)[2:]).indices(width_of(source))
        _within(head, partial(_cut, start=start, stop=stop), source, factor, moves)
    elif (linear := linear_of(node)) is not None:
        x, weight, bias, turned = linear
        head.terms.append(Term(x, weight, factor, moves, 0, width, turned=turned))
        head.place = head.place or str(node.meta.get("module", ""))
        if bias is not None:
            head.biases.append(Term(bias, None, factor, (), 0, width))
    else:
        head.place = head.place or str(node.meta.get("module", ""))
        owner = provenance(node)
        who = f"{owner['adaptation']!r} adapts the head with" if owner else "between the head and the loss there is"
        raise NoMatchError(f"{who} {node.target}, which is not a linear map")


def _within(
    head: LossHead, change: Callable[[Term], Term], node: fx.Node, factor: float, moves: tuple[fx.Node, ...]
) -> None:
    """Run `_collect` on the node that computes the logits for part of the vocabulary; apply ``change`` to its terms."""
    inner = LossHead(head.loss, head.chain)
    _collect(inner, node, factor, moves)
    head.terms += [change(term) for term in inner.terms]
    head.biases += [change(term) for term in inner.biases]
    head.place = head.place or inner.place


def _put(term: Term, to: int) -> Term:
    """Return a term shifted to a part of the vocabulary that begins at ``to``."""
    return replace(term, to=term.to + to)


def _cut(term: Term, start: int, stop: int) -> Term:
    """Return the part of a term between two positions in the vocabulary, relative to the first of them."""
    low, high = max(start, term.to), max(start, term.to, min(stop, term.end))
    return replace(term, start=term.start + low - term.to, stop=term.start + high - term.to, to=low - start)


def _is_last(node: fx.Node, at: int) -> bool:
    axis = _args(node)[at] if len(_args(node)) > at else 0
    return axis in (-1, node.meta["val"].dim() - 1)


def linear_of(node: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node | None, bool] | None:
    """Return the input, weight and bias of a linear map, and whether the weight is ``[in, columns]``.

    Return None for other nodes.
    """
    x: Any
    weight: Any
    bias: Any = None
    if node.target is aten.linear.default:
        x, weight, bias = (*_args(node), None)[:3]
    elif node.target is aten.addmm.default and not node.kwargs:
        bias, x, weight = _args(node)
        if bias.meta["val"].dim() != 1:
            return None
    elif node.target in (aten.mm.default, aten.matmul.default):
        x, weight = _args(node)
    else:
        return None
    plain = weight.meta["val"].dim() == 2 and weight.meta["val"].is_floating_point()
    return (x, weight, bias, node.target is not aten.linear.default) if plain else None


def _order(head: LossHead, vocabulary: int) -> None:
    """Put the terms that cover the vocabulary first, in vocabulary order."""
    left, filled = [term for term in head.terms if term.stop > term.start], 0
    first: list[Term] = []
    while filled < vocabulary:
        widest = max((t for t in left if t.to == filled), key=lambda t: t.end, default=None)
        if widest is None:
            raise NoMatchError("part of the logits is not computed by linear maps")
        left.remove(widest)
        first.append(widest)
        filled = widest.end
    head.terms = first + left
    width = max(width_of(term.x) for term in head.terms)
    if vocabulary <= width:
        raise NoMatchError(f"{vocabulary} logits are no more than the {width} values they are computed from")


def _require_unread(head: LossHead) -> None:
    """Check that only the loss and the caller read the logits.

    Raises:
        NoMatchError: if another node reads them.
    """
    known = {*head.chain, head.loss}
    for node in sorted(head.chain):
        for user in node.users:
            if user not in known and user.op != "output":
                raise NoMatchError(f"{user.target} reads the logits as well")
