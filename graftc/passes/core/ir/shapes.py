"""Symbolic shapes: print them, evaluate them for chosen sizes, and recreate them from text."""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

from graftc.compat.fake_tensors import FakeTensorMode
from graftc.compat.symbols import ConstantSource, FloorDiv, Max, Min, Mod
from graftc.passes.core.ir.program import Program

DTYPE_NAMES: dict[torch.dtype, str] = {
    torch.float64: "f64",
    torch.float32: "f32",
    torch.bfloat16: "bf16",
    torch.float16: "f16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "bool",
    torch.complex64: "c64",
}
DTYPES: dict[str, torch.dtype] = {name: dtype for dtype, name in DTYPE_NAMES.items()}


def expression(size: Any) -> Any:
    """Return the sympy expression of a symbolic size, or the plain number for a constant."""
    value = size.node.expr if isinstance(size, torch.SymInt | torch.SymBool | torch.SymFloat) else size
    return int(value) if isinstance(value, sympy.Integer) else value


class SymbolNames:
    """Stable names ``s0, s1, ...`` for a Program's symbols, numbered in the order in which they occur in its inputs."""

    def __init__(self, program: Program) -> None:
        self._names: dict[sympy.Symbol, sympy.Symbol] = {}
        self._memo: dict[Any, str] = {}
        for node in program.placeholders():
            value = node.meta.get("val")
            for size in value.shape if isinstance(value, torch.Tensor) else ():
                self._register(expression(size))

    def _register(self, expr: Any) -> None:
        for symbol in sorted(getattr(expr, "free_symbols", ()), key=str):
            if symbol not in self._names:
                self._names[symbol] = sympy.Symbol(f"s{len(self._names)}", integer=True, positive=True)

    @property
    def symbols(self) -> dict[sympy.Symbol, str]:
        """The stable names, keyed by captured symbol."""
        return {symbol: str(name) for symbol, name in self._names.items()}

    def size(self, size: Any) -> str:
        """Return one size as text."""
        expr = expression(size)
        if expr not in self._memo:
            self._register(expr)
            self._memo[expr] = str(expr.xreplace(self._names) if isinstance(expr, sympy.Basic) else expr)
        return self._memo[expr]

    def type(self, value: Any) -> str:
        """Return a value's type as text: ``f32[s0, s1, 384]``, a symbolic size, or a tuple of those."""
        if isinstance(value, torch.Tensor):
            dims = ", ".join(self.size(size) for size in value.shape)
            return f"{DTYPE_NAMES.get(value.dtype, str(value.dtype))}[{dims}]"
        if isinstance(value, list | tuple):
            return "(" + ", ".join(self.type(item) for item in value) + ")"
        if value is None:
            return "none"
        if isinstance(value, torch.SymInt | int) and not isinstance(value, bool):
            return f"int {self.size(value)}"
        return type(value).__name__


class Sizes:
    """Evaluates symbolic sizes for given values of the symbols; each expression is evaluated once."""

    def __init__(self, assign: Callable[[str], int]) -> None:
        self._assign = assign
        self._memo: dict[Any, Any] = {}

    def size(self, size: Any) -> Any:
        """Return one size as a number; numbers computed from sizes by division or roots are `float`."""
        expr = expression(size)
        if isinstance(expr, int | float):
            return expr
        if expr not in self._memo:
            number = expr.subs({symbol: self._assign(str(symbol)) for symbol in expr.free_symbols})
            self._memo[expr] = float(number) if isinstance(size, torch.SymFloat) else int(number)
        return self._memo[expr]

    def shape(self, value: torch.Tensor) -> tuple[int, ...]:
        """Return a tensor's shape as numbers."""
        return tuple(self.size(size) for size in value.shape)


_CALLS: Mapping[str, tuple[Any, Callable[..., int]]] = {
    "FloorDiv": (FloorDiv, operator.floordiv),
    "Mod": (Mod, operator.mod),
    "Max": (Max, max),
    "Min": (Min, min),
}
_OPERATORS: Mapping[type[ast.operator], tuple[Any, Callable[[int, int], int]]] = {
    ast.Add: (operator.add, operator.add),
    ast.Sub: (operator.sub, operator.sub),
    ast.Mult: (operator.mul, operator.mul),
    ast.FloorDiv: _CALLS["FloorDiv"],
    ast.Mod: _CALLS["Mod"],
    ast.Pow: (operator.pow, operator.pow),
}
"""The implementations of each operator for sympy expressions and for integers."""
_LONGEST, _DEEPEST, _LARGEST = 1000, 40, 2**63
_SYMBOL = re.compile(r"[a-z]\d{1,4}", re.ASCII)
_SYMBOLS = 256


def _fake_mode() -> FakeTensorMode:
    """Return a fake tensor mode without a call cache, which costs more than it saves if sizes are symbolic.

    The cache would cost a tenth of the compile time, or a third if sequences are lengthened.
    """
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    mode.cache_enabled = False
    return mode


@dataclass
class FakeContext:
    """Recreates fake tensors and symbolic sizes from text, all in one shape environment.

    The parser accepts only names, integers, ``+ - * // % **`` and four functions.

    Attributes:
        mode: the mode of the fake tensors.
        most: the largest number of symbols, which bounds the time that text from a file can take.
    """

    mode: FakeTensorMode = field(default_factory=_fake_mode)
    most: int = _SYMBOLS
    _symbols: dict[str, Any] = field(default_factory=dict)
    _sizes: dict[str, Any] = field(default_factory=dict)
    _tensors: dict[tuple[Any, ...], torch.Tensor] = field(default_factory=dict)

    def symbol(self, name: str) -> Any:
        """Return the symbol called ``name``, created with its own hint on first use."""
        if name not in self._symbols:
            if len(self._symbols) >= self.most:
                raise ValueError("not a size: too many symbols")
            self._symbols[name] = self._env.create_symbol(
                3 + 4 * len(self._symbols),
                ConstantSource(f"graftc_{name}"),
                dynamic_dim=DimDynamic.DYNAMIC,
                constraint_dim=None,
                do_not_specialize_zero_one=True,
            )
        return self._symbols[name]

    def size(self, text: str) -> Any:
        """Return the size that text represents: an `int` or a symbolic size."""
        if text not in self._sizes:
            if len(text) > _LONGEST:
                raise ValueError(f"not a size: {text[:20]}...")
            expr, value = self._parse(ast.parse(text, mode="eval").body)
            self._sizes[text] = value if expr.is_number else self._env.create_symintnode(expr, hint=value)
        return self._sizes[text]

    @property
    def _env(self) -> ShapeEnv:
        assert self.mode.shape_env is not None
        return self.mode.shape_env

    def _parse(self, node: ast.expr, depth: int = 0) -> tuple[Any, int]:
        """Return an expression and its value for its symbols' hints.

        Depth and value are limited, so that text cannot create arbitrarily large numbers.
        """
        if depth > _DEEPEST:
            raise ValueError("not a size: nested too deeply")
        parsed = self._parsed(node, depth)
        if abs(parsed[1]) >= _LARGEST:
            raise ValueError("not a size: too large")
        return parsed

    def _parsed(self, node: ast.expr, depth: int) -> tuple[Any, int]:
        if isinstance(node, ast.Name) and _SYMBOL.fullmatch(node.id):
            symbol = self.symbol(node.id)
            return symbol, int(self._env.backed_var_to_val[symbol])
        if isinstance(node, ast.Constant) and type(node.value) is int:
            return sympy.Integer(node.value), node.value
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            expr, value = self._parse(node.operand, depth + 1)
            return -expr, -value
        if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
            (a, left), (b, right) = self._parse(node.left, depth + 1), self._parse(node.right, depth + 1)
            if isinstance(node.op, ast.Pow) and not (b.is_Integer and 0 <= right <= 8):
                raise ValueError(f"not a size: the exponent is {right}")
            symbolic, apply = _OPERATORS[type(node.op)]
            return symbolic(a, b), apply(left, right)
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id in _CALLS
            and not node.keywords
        ):
            symbolic, apply = _CALLS[node.func.id]
            parsed = [self._parse(argument, depth + 1) for argument in node.args]
            return symbolic(*(expr for expr, _ in parsed)), int(apply(*(value for _, value in parsed)))
        raise ValueError(f"not a size: {ast.unparse(node)[:40]}")

    def tensor(self, dtype: torch.dtype, shape: tuple[str, ...], device: torch.device) -> torch.Tensor:
        """Return a fake tensor; equal dtype, shape and device give the same object."""
        key = (dtype, shape, device)
        if key not in self._tensors:
            sizes = [self.size(text) for text in shape]
            with self.mode:
                self._tensors[key] = torch.empty(sizes, dtype=dtype, device=device)
        return self._tensors[key]


def same_type(one: Any, other: Any) -> bool:
    """Return whether two values are tensors of the same dtype and shape."""
    if not (isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor)) or one.dtype != other.dtype:
        return False
    return list(map(expression, one.shape)) == list(map(expression, other.shape))


def types_of(value: Any) -> Any:
    """Return a call's arguments with shapes and dtypes instead of values, for use as a cache key."""
    if isinstance(value, torch.fx.Node):
        return _type(value.meta["val"])
    if isinstance(value, list | tuple):
        return tuple(types_of(v) for v in value)
    if isinstance(value, dict):
        return tuple((k, types_of(v)) for k, v in value.items())
    return (type(value), value)


def _type(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return (value.dtype, value.device, tuple(expression(size) for size in value.shape))
    if isinstance(value, list | tuple):
        return tuple(_type(v) for v in value)
    return expression(value)


def fake_mode_of(program: Program) -> FakeTensorMode:
    """Return the fake tensor mode to which a Program's values belong."""
    modes = (getattr(node.meta.get("val"), "fake_mode", None) for node in program.graph.nodes)
    mode = next((mode for mode in modes if isinstance(mode, FakeTensorMode)), None)
    if mode is None:
        raise ValueError("the program has no fake tensors")
    return mode


def raw_bytes(tensor: torch.Tensor) -> memoryview:
    """Return a tensor's elements in order, as raw bytes; the tensor must not be on the meta device."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
