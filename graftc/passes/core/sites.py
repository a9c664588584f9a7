"""Sites: typed views of the places in one Program that a method can adapt."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from graftc.passes.core.rows import Rows
from graftc.specs.claims import SiteKind

aten = torch.ops.aten


@dataclass(frozen=True, order=True)
class SiteKey:
    """The same place in every Program of a Compilation.

    Attributes:
        module: path of the owning module.
        name: parameter name or value role within it.
        part: which rows of a fused tensor, by the last word of their role; empty for the whole tensor.
        use: which use of the tensor, for layers that are used several times.
    """

    module: str
    name: str
    part: str = ""
    use: int = 0

    def __str__(self) -> str:
        text = f"{self.module}.{self.name}" if self.module else self.name
        text += f"[{self.part}]" if self.part else ""
        return f"{text}#{self.use}" if self.use else text


@dataclass(eq=False)
class Site:
    """A place in one Program.

    Attributes:
        key: the place, the same in every Program.
        roles: what it does in the architecture, most specific first; empty where only its name is known.
        layer: index of its layer, None outside the layers.
        stack: path of the layer list it belongs to.
    """

    key: SiteKey
    roles: tuple[str, ...] = ()
    layer: int | None = None
    stack: str = ""
    kind: SiteKind = field(default=SiteKind.VALUE, kw_only=True)


@dataclass(eq=False)
class LinearUse:
    """One linear map in one Program: ``y = x W^T + b``, whatever operator computes it.

    Attributes:
        node: the base's own call.
        weight, bias: Store names; bias is None where there is none.
        transposed: whether the Store holds the weight as ``[in, out]``.
        in_features, out_features: of the whole weight.
        output: the node that stands for the result now, after the edits so far.
    """

    node: fx.Node
    weight: str
    bias: str | None
    transposed: bool
    in_features: int
    out_features: int
    output: fx.Node
    input_index: int

    @property
    def input(self) -> fx.Node:
        """What the map reads now."""
        source = self.node.args[self.input_index]
        assert isinstance(source, fx.Node)
        return source


@dataclass(eq=False)
class LinearSite(Site):
    """Rows of a linear map. Orientation, fusion and bias are hidden: the weight is always the site's own rows of
    ``[out, in]``."""

    use: LinearUse = field(kw_only=True)
    rows: Rows = field(kw_only=True)

    @property
    def in_features(self) -> int:
        """Width of the input."""
        return self.use.in_features

    @property
    def out_features(self) -> int:
        """Number of the site's own output rows."""
        return self.rows.count

    @property
    def dtype(self) -> torch.dtype:
        """Element type of the weight."""
        dtype: torch.dtype = self.use.node.meta["val"].dtype
        return dtype


@dataclass(eq=False)
class AttentionSite(Site):
    """An attention node."""

    node: fx.Node = field(kw_only=True)


@dataclass(eq=False)
class ParameterSite(Site):
    """A base tensor as a whole.

    Attributes:
        tensor: its Store name.
    """

    tensor: str = field(kw_only=True)


def linear_use(node: fx.Node) -> LinearUse | None:
    """The linear map that ``node`` computes from a stored weight, or None."""
    read = _READERS.get(node.target) if node.op == "call_function" else None
    return read(node) if read is not None else None


def _stored(value: Any) -> str | None:
    return str(value.target) if isinstance(value, fx.Node) and value.op == "get_attr" else None


def _make(node: fx.Node, x: int, weight: Any, bias: Any, *, transposed: bool) -> LinearUse | None:
    name = _stored(weight)
    if name is None or weight.meta["val"].dim() != 2 or (bias is not None and _stored(bias) is None):
        return None
    if _stored(node.args[x]) is not None:
        return None
    rows, columns = (int(size) for size in weight.meta["val"].shape)
    width = (rows, columns) if transposed else (columns, rows)
    bias_name = None if bias is None else _stored(bias)
    return LinearUse(node, name, bias_name, transposed, *width, output=node, input_index=x)


def _linear(node: fx.Node) -> LinearUse | None:
    bias = node.args[2] if len(node.args) > 2 else None
    return _make(node, 0, node.args[1], bias, transposed=False)


def _addmm(node: fx.Node) -> LinearUse | None:
    if node.kwargs:
        return None
    return _make(node, 1, node.args[2], node.args[0], transposed=True)


def _matmul(node: fx.Node) -> LinearUse | None:
    return _make(node, 0, node.args[1], None, transposed=True)


_READERS: dict[Any, Any] = {
    aten.linear.default: _linear,
    aten.addmm.default: _addmm,
    aten.mm.default: _matmul,
    aten.matmul.default: _matmul,
}
