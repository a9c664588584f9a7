"""Random inputs for a Program, used by certificates, exports and tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from graftc.compiler.capture.past import CAPACITY
from graftc.compiler.capture.signature import SEQUENCE, TARGET, is_sum, size_of
from graftc.passes.core.ir.past_inputs import of_cache
from graftc.passes.core.ir.program import Program
from graftc.passes.core.weights.store import Store

aten = torch.ops.aten
_ROOM = 4
"""The number of tokens for which a cache of fixed length has room beside those of the call; one of them is in it."""


def random_inputs(
    program: Program,
    store: Store,
    seed: int = 0,
    sizes: Sequence[int] = (3, 9),
    config: Any = None,
    *,
    front: bool = True,
    fixed_sizes: Mapping[str, int] | None = None,
) -> dict[str, Tensor]:
    """Return random inputs for a Program: indices within their tables, masks, and normally distributed floats.

    The rows of a batch differ in the position of their padding: at the start, in the middle, at the end, nowhere, and
    so on.

    Args:
        program: the Program that takes the inputs.
        store: the Store of its tensors, on whose device the inputs are created.
        seed: the seed for the values.
        sizes: sizes of the named axes in order of occurrence; the last one applies to all further axes. If the graph
            does not support the size of an axis, the axis gets the nearest supported one.
        config: the model's config, which names the padding and end tokens. Each text ends with the end token, which
            occurs nowhere else, since some heads look for it.
        front: whether padding may be at the start. Under a causal mask, such padding attends to nothing, and its
            attention result depends on the kernel: zeros in torch, a mean elsewhere.
        fixed_sizes: sizes of named axes to which ``sizes`` does not apply.
    """
    return samples_on(store.device(), program, seed, sizes, config, front=front, fixed_sizes=fixed_sizes)


def samples_on(
    device: torch.device,
    program: Program,
    seed: int,
    sizes: Sequence[int],
    config: Any,
    *,
    front: bool = True,
    fixed_sizes: Mapping[str, int] | None = None,
) -> dict[str, Tensor]:
    """Return the same inputs as `random_inputs`, on a given device."""
    generator = torch.Generator().manual_seed(seed)
    axes = _sizes(program, sizes, fixed_sizes or {})
    inputs: dict[str, Tensor] = {}
    for spec, node in zip(program.inputs, program.placeholders(), strict=True):
        rows = None if spec.dtype.is_floating_point else _table_rows(node)
        shape = [size_of(size, axes) if isinstance(size, str) else size for size in spec.shape]
        if spec.dtype.is_floating_point:
            value = torch.randn(shape, generator=generator).to(spec.dtype)
        elif rows is not None:
            value = torch.randint(0, rows, shape, generator=generator, dtype=spec.dtype)
            value = _with_padding(value, rows, config, front)
        else:
            value = torch.ones(shape, dtype=spec.dtype)
            if value.dim() == 2:
                value[_padding(*shape, front=front)] = 0
        inputs[spec.name] = value.to(device)
    return inputs


def _sizes(program: Program, sizes: Sequence[int], fixed_sizes: Mapping[str, int]) -> dict[str, int]:
    """Return the size of every named axis that is not a sum of others."""
    axes: dict[str, int] = {}
    for spec in program.inputs:
        for dim, name in enumerate(spec.shape):
            if isinstance(name, str) and not is_sum(name):
                low, high = spec.ranges[dim] if spec.ranges else (0, None)
                wanted = fixed_sizes.get(name, max(sizes[min(len(axes), len(sizes) - 1)], low))
                axes.setdefault(name, wanted if high is None else min(wanted, high))
    if CAPACITY in axes and CAPACITY not in fixed_sizes:
        axes[CAPACITY] = axes.get(TARGET, axes.get(SEQUENCE, _longest(program))) + _ROOM
    return axes


def _longest(program: Program) -> int:
    """Return the largest number of tokens among inputs whose number of tokens is fixed."""
    sizes = [spec.shape[1] for spec in program.inputs if len(spec.shape) > 1 and not of_cache(spec.name)]
    return max((size for size in sizes if isinstance(size, int)), default=1)


def _padding(rows: int, length: int, *, front: bool) -> Tensor:
    """Return the mask of the padding in a batch of texts, ``bool[rows, length]``."""
    count, middle = max(0, min(2, (length - 1) // 3)), length // 2
    padding = torch.zeros(rows, length, dtype=torch.bool)
    behind = slice(length - count, length)
    places = (slice(0, count) if front else behind, slice(middle, middle + count), behind)
    for row, place in enumerate(places):
        padding[row::4, place] = True
    return padding


def _with_padding(numbers: Tensor, rows: int, config: Any, front: bool) -> Tensor:
    """Return token ids with padding and the end token inserted."""
    if numbers.dim() != 2:
        return numbers
    end, pad = (_token(config, name, rows) for name in ("eos_token_id", "pad_token_id"))
    padding = _padding(*numbers.shape, front=front)
    if end is not None and rows > 1:
        numbers = torch.where(numbers == end, (end + 1) % rows, numbers)
        last = torch.arange(numbers.shape[1]).mul(~padding).amax(1, keepdim=True)
        numbers = numbers.scatter(1, last, end)
    if pad is not None and pad != end:
        numbers = torch.where(padding, pad, numbers)
    return numbers


def _token(config: Any, name: str, rows: int) -> int | None:
    number = getattr(config, name, None)
    return number if isinstance(number, int) and 0 <= number < rows else None


def within_tables(program: Program, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return inputs that were created for another Program, with indices within the tables of this one.

    An adapted graph may add to the positions that it gets, so that fewer of them are left than in the base's.
    """
    rows = {str(node.target): _table_rows(node) for node in program.placeholders()}
    return {name: value if (bound := rows.get(name)) is None else value % bound for name, value in inputs.items()}


def _table_rows(node: fx.Node) -> int | None:
    """Return the number of rows of the table, or slots of the bank, that an input indexes; None if there is neither."""
    for user in node.users:
        if user.target is aten.add.Tensor and isinstance(user.args[1], int) and (rows := _table_rows(user)) is not None:
            return rows - user.args[1]
        if user.target is aten.index_select.default and user.args[2] is node:
            return int(user.args[0].meta["val"].shape[0])  # type: ignore[union-attr]
        if user.target is aten.embedding.default and isinstance(user.args[0], fx.Node):
            return int(user.args[0].meta["val"].shape[0])
        if user.target in (aten.view.default, aten.reshape.default) and (rows := _table_rows(user)) is not None:
            return rows
    return None
