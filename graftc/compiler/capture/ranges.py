"""Determine the sizes for which a captured graph is valid.

torch.export makes every axis as dynamic as it can. If the model's code branches on a size, the export records a guard.
graftc's graphs run without guards, so an axis that a guard binds is fixed to its captured size.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import product
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch import fx

from graftc.compiler.capture.signature import Axis, is_sum
from graftc.passes.core.ir.program import InputSpec

_UNBOUNDED = 2**31
_PROBES = (5, 17, 101)
_SIZES = (*range(2, 10), 12, 15, 16, 17, 24, 31, 32, 33, 48, 63, 64, 65, 100, 127, 128, 129, 255, 256, 257)
_SOME = (2, 3, 4, 5, 6, 7, 8, 9, 16, 17, 33, 128)
_LEAST = 2
"""The smallest size of a symbol: 0 and 1 are special to torch's tracer, although the operators accept them."""


class InputSizes:
    """The sizes of a captured graph's inputs.

    Args:
        axes: the requested axes.
        placeholders: the graph's input nodes, in the same order.
    """

    def __init__(self, axes: Sequence[Axis], placeholders: Sequence[fx.Node]) -> None:
        self.axes = axes
        self.values = [node.meta["val"] for node in placeholders]
        self.environment = next(
            (size.node.shape_env for value in self.values for size in value.shape if isinstance(size, torch.SymInt)),
            None,
        )
        self.places: dict[Any, list[tuple[Axis, int]]] = {}
        for axis, value in zip(axes, self.values, strict=True):
            for dim, size in enumerate(value.shape):
                if (expr := _expression(size)) is not None:
                    self.places.setdefault(expr, []).append((axis, dim))

    @cached_property
    def _bound_and_limits(self) -> tuple[set[Any], dict[Any, int]]:
        """The bound symbols, and the limits of others; see `_bound_and_limited`."""
        return _bound_and_limited(self.environment, self.places) if self.places else (set(), {})

    def undecided(self) -> dict[str, set[int]]:
        """Return the axes, by input, that are dynamic in the graph although it is valid only for their captured size.

        These axes must be captured with fixed sizes.
        """
        undecided: dict[str, set[int]] = {}
        bound, _ = self._bound_and_limits
        for expr, places in self.places.items():
            name = self._name(expr)
            repeated = len(places) > 1 and name is None
            summed = name is not None and is_sum(name)
            if (not expr.is_symbol and not summed) or expr in bound or repeated:
                for axis, dim in places:
                    undecided.setdefault(axis.name, set()).add(dim)
        return undecided

    def specs(self) -> tuple[InputSpec, ...]:
        """Return the inputs, with the sizes that each axis may have; a named axis with only one size loses its name."""
        specs = []
        _, limits = self._bound_and_limits
        for axis, value in zip(self.axes, self.values, strict=True):
            shape: list[int | str] = []
            ranges: list[tuple[int, int | None]] = []
            for captured, size in zip(axis.sizes, value.shape, strict=True):
                symbol = _expression(size)
                if symbol is None:
                    shape.append(captured)
                    ranges.append((captured, captured))
                else:
                    shape.append(self._name(symbol) or captured)
                    ranges.append(_range(self.environment, symbol, captured, limits.get(symbol)))
            specs.append(InputSpec(axis.name, axis.dtype, tuple(shape), tuple(ranges)))
        if specs:
            specs[0] = replace(specs[0], apart=tuple(self._apart()))
        return tuple(specs)

    def _apart(self) -> Iterator[tuple[str, str]]:
        """Yield the pairs of named sizes that a guard requires to be different."""
        for guard in _guards(self.environment) if self.places else ():
            names = [self._name(side) for side in guard.args if side in self.places] if _are_two(guard) else []
            if len(names) == 2 and None not in names:
                yield str(names[0]), str(names[1])

    def _name(self, symbol: Any) -> str | None:
        """Return the name of any axis that has this size, since equal sizes share a name.

        An axis that is longer than a named one by a constant is named after it.
        """
        names = (axis.axes[dim] for axis, dim in self.places[symbol])
        name = next((name for name in names if isinstance(name, str)), None)
        if name is None or symbol.is_symbol or is_sum(name):
            return name
        more, (shorter, *others) = symbol.as_coeff_add()
        known = not others and shorter.is_symbol and shorter in self.places and more.is_Integer and more > 0
        before = self._name(shorter) if known else None
        return name if before is None else f"{before}+{more}"


def fixed_sizes(requested: Iterable[Axis], captured: Iterable[Axis]) -> list[str]:
    """Return notes on sizes that are fixed as shown because the model cannot be captured with any other sizes."""
    names = {axis.name: axis.axes for axis in captured}
    return [
        f"size {own} of axis {dim} of {axis.name} is fixed: the model cannot be captured with any other"
        for axis in requested
        for dim, (name, own) in enumerate(zip(axis.axes, names.get(axis.name, ()), strict=False))
        if isinstance(name, str) and isinstance(own, int)
    ]


def fixed_notes(axes: Sequence[Axis], inputs: Iterable[InputSpec]) -> list[str]:
    """Return notes on axes that were meant to vary but do not."""
    named = {
        name: spec.shape[dim]
        for axis, spec in zip(axes, inputs, strict=True)
        for dim, name in enumerate(axis.axes)
        if isinstance(name, str) and isinstance(spec.shape[dim], int) and not axis.as_shown
    }
    return [
        f"the graph is valid for one {name} size only, here {size}: each other size is captured when it first occurs"
        for name, size in named.items()
    ]


def _expression(size: Any) -> Any:
    """Return the symbolic expression of a size; None if the size is a constant."""
    return None if not isinstance(size, torch.SymInt) or size.node.expr.is_number else size.node.expr


def _range(environment: Any, symbol: Any, captured: int, limit: int | None) -> tuple[int, int | None]:
    """Return the smallest and the largest size of the supported range that contains the captured size.

    Args:
        environment: the sizes and guards of the trace.
        symbol, captured: the dynamic size, and its value in the trace.
        limit: the largest size that guards allow; None if they set no limit.
    """
    if not symbol.is_symbol:  # a sum of sizes that have their own ranges
        return 0, None
    bounds = environment.var_to_range[symbol]
    least, most = int(bounds.lower), [] if limit is None else [limit]
    least = least if least > _LEAST else 0
    if isinstance(bounds.upper, int | sympy.Integer) and int(bounds.upper) < _UNBOUNDED:
        most.append(int(bounds.upper))
    for guard in environment.guards:
        if isinstance(guard.expr, sympy.Ne) and symbol in guard.expr.args:
            other = next(side for side in guard.expr.args if side != symbol)
            if other.is_number and int(other) > captured:
                most.append(int(other) - 1)
            elif other.is_number and int(other) >= _LEAST:
                least = max(least, int(other) + 1)
    return least, min(most, default=None)


def _bound_and_limited(environment: Any, places: dict[Any, list[tuple[Axis, int]]]) -> tuple[set[Any], dict[Any, int]]:
    """Return the symbols that guards bind to their captured sizes, and the largest sizes of those that they only limit.

    An unnamed axis is bound by any guard except a plain range. A named axis is bound by a guard that does not hold for
    other sizes once the sizes of bound symbols are inserted: divisibility, or a product that must have a certain value
    or must not be too large. Most inequalities only distinguish sizes from 0 and 1. A limit arises, for example, if the
    last entries of a table with a fixed number of positions are read.
    """
    captured = {symbol: axis.sizes[dim] for symbol, ((axis, dim), *_) in places.items() if symbol.is_symbol}
    named = {s for s in captured if any(isinstance(axis.axes[dim], str) for axis, dim in places[s])}
    guards = [guard for guard in _guards(environment) if not (_are_two(guard) and set(guard.args) <= named)]
    bound = {symbol for guard in guards for symbol in guard.free_symbols & (captured.keys() - named)}
    limits: dict[Any, int] = {}
    guards.sort(key=lambda guard: not isinstance(guard, sympy.Eq))  # symbols bound by equalities may decide others
    for guard in guards:
        rest = guard.xreplace({symbol: sympy.Integer(captured[symbol]) for symbol in bound})
        if not isinstance(rest, sympy.core.relational.Relational):
            continue
        symbols = rest.free_symbols & captured.keys()
        if all(_holds(rest, sizes) for sizes in _tried(environment, rest)):
            continue
        (symbol,) = symbols if len(rest.free_symbols) == len(symbols) == 1 else (None,)
        most = None if symbol is None else _limit(environment, rest, captured[symbol])
        if symbol is None or most is None:
            bound |= symbols
        else:
            limits[symbol] = min(most, limits.get(symbol, most))
    return bound, limits


def _limit(environment: Any, guard: Any, captured: int) -> int | None:
    """Return the size up to which a guard on one symbol holds and beyond which it fails; None if there is none."""
    (symbol,) = guard.free_symbols
    sizes = [size for size in range(_LEAST, max(_SIZES) + 1) if _is_size(environment, symbol, size)]
    holds = [_holds(guard, (size,)) for size in sizes]
    count = sum(holds)
    return sizes[count - 1] if 0 < count < len(sizes) and all(holds[:count]) and captured <= sizes[count - 1] else None


def _guards(environment: Any) -> list[Any]:
    """Return the guards on sizes, except plain ranges."""
    guards = [environment.replace(guard.expr) for guard in environment.guards]
    return [guard for guard in guards if not (guard == sympy.true or _is_range(guard))]


def _are_two(guard: Any) -> bool:
    """Return whether a guard states that two sizes differ."""
    return isinstance(guard, sympy.Ne) and all(side.is_symbol for side in guard.args)


def _tried(environment: Any, guard: Any) -> Iterable[tuple[int, ...]]:
    """Return the symbol sizes to test a guard with: many for one or two symbols, few for more or for an equality."""
    symbols = _ordered(guard)
    if isinstance(guard, sympy.Eq) or len(symbols) > 2:
        return [tuple(number + step * i for i in range(len(symbols))) for number in _PROBES for step in (2, -2, 0)]
    most = _SIZES if len(symbols) == 1 else _SOME
    return product(*([size for size in most if _is_size(environment, symbol, size)] for symbol in symbols))


def _is_size(environment: Any, symbol: Any, size: int) -> bool:
    bounds = environment.var_to_range.get(symbol)
    return bounds is None or bool(bounds.lower <= size <= bounds.upper)


def _holds(guard: Any, sizes: tuple[int, ...]) -> bool:
    """Return whether a guard holds for these sizes of its symbols, which are in sorted order."""
    numbers = {symbol: sympy.Integer(size) for symbol, size in zip(_ordered(guard), sizes, strict=True)}
    try:
        return bool(guard.xreplace(numbers) == sympy.true)
    except ZeroDivisionError:  # the divisor may be a difference of sizes
        return False


def _ordered(guard: Any) -> list[Any]:
    return sorted(guard.free_symbols, key=str)


def _is_range(guard: Any) -> bool:
    if not isinstance(guard, sympy.core.relational.Relational) or isinstance(guard, sympy.Eq):
        return False
    sides = guard.lhs, guard.rhs
    return any(s.is_symbol for s in sides) and any(s.is_number for s in sides)
