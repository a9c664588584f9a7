"""The independent check of roles: change the rows that a finding claims, and see which values change."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from graftc.compiler.roles.structure import Finding
from tests.compiler.structure_cases import Captured


def axes_of_rows(model: Captured, finding: Finding) -> tuple[int, ...]:
    """Return the axes of the stored parameter that count its rows."""
    linear = model.flow.linears[finding.node]
    # Expressions read a stored matrix directly or transposed, and always end up with ``[out, in]``.
    return linear.out_axes if linear.weight.op == "get_attr" else (0,)


def oriented(model: Captured, finding: Finding) -> Tensor:
    """Return the stored parameter as ``[out, in]``, as a view if the axes allow one."""
    assert finding.parameter is not None
    weight, rows = model.tensors[finding.parameter], axes_of_rows(model, finding)
    others = [axis for axis in range(weight.dim()) if axis not in rows]
    count = int(torch.tensor([weight.shape[axis] for axis in rows]).prod())
    return weight.permute(*rows, *others).reshape(count, -1)


def stored_rows(model: Captured, finding: Finding) -> int:
    return oriented(model, finding).shape[0]


def perturbed(model: Captured, finding: Finding, rows: Tensor, change: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """Return the stored parameter, by name, with some rows changed."""
    assert finding.parameter is not None
    weight, axes = model.tensors[finding.parameter], axes_of_rows(model, finding)
    others = [axis for axis in range(weight.dim()) if axis not in axes]
    seen = oriented(model, finding)
    changed = seen.index_copy(0, rows, change(seen.index_select(0, rows)))
    moved_axes = [*axes, *others]
    stacked = changed.reshape([weight.shape[axis] for axis in moved_axes])
    return {finding.parameter: stacked.permute([moved_axes.index(axis) for axis in range(weight.dim())]).contiguous()}


def own_rows(model: Captured, finding: Finding) -> Tensor:
    if finding.rows is None:
        return torch.arange(stored_rows(model, finding))
    return torch.cat([torch.arange(a, b) for a, b in finding.rows])


def noise(own: Tensor) -> Tensor:
    return own + torch.randn(own.shape, generator=torch.Generator().manual_seed(1))


def moved(model: Captured, base: Mapping[fx.Node, Any], changed: Mapping[str, Tensor], attention: Any) -> set[str]:
    """Return the operands of an attention that change."""
    values = model.run(changed)
    operands = {"q": attention.query, "k": attention.key, "v": attention.value}
    return {letter for letter, node in operands.items() if not torch.equal(base[node], values[node])}


def attention_of(model: Captured, finding: Finding) -> Any:
    """Return the attention that a finding's evidence names."""
    name = finding.evidence.split("reaches ")[1].split(" through")[0].split(",")[0]
    return next(a for a in model.flow.attentions.values() if a.name == name)
