"""Random inputs for a Program: what certificates, exports and tests run it on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from graftc.compiler.capture.signature import is_sum, size_of
from graftc.passes.core.ir.program import Program
from graftc.passes.core.weights.store import Store

aten = torch.ops.aten


def random_inputs(
    program: Program,
    store: Store,
    seed: int = 0,
    sizes: Sequence[int] = (3, 9),
    config: Any = None,
    *,
    front: bool = True,
    held: Mapping[str, int] | None = None,
) -> dict[str, Tensor]:
    """Random inputs for a Program: indices within their table, masks, normal floats. The rows of a batch differ in
    where their padding stands: in front, inside, behind, nowhere, and so on.

    Args:
        program: whose inputs.
        store: where its tensors live: inputs are on their device.
        seed: of the values.
        sizes: of the named axes in the order met; the last one holds for all further ones. An axis that the graph holds
            for other sizes of gets the nearest.
        config: the model's config. Padding has the number that it names. Texts end with the end token that it names,
            and have it nowhere else, since some heads look for it.
        front: whether padding may stand in front. Under a causal mask its rows see nothing then, and what attention
            gives for them is up to the kernel: zeros in torch, a mean elsewhere.
        held: sizes of named axes that are not up to ``sizes``.
    """
    device = store.device()
    return samples_on(device, program, seed, sizes, config, front=front, held=held)


def samples_on(
    device: torch.device,
    program: Program,
    seed: int,
    sizes: Sequence[int],
    config: Any,
    *,
    front: bool = True,
    held: Mapping[str, int] | None = None,
) -> dict[str, Tensor]:
    """`random_inputs`, on a device."""
    generator = torch.Generator().manual_seed(seed)
    axes = _sizes(program, sizes, held or {})
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


def _sizes(program: Program, sizes: Sequence[int], held: Mapping[str, int]) -> dict[str, int]:
    """The size of every named axis that is not a sum of others."""
    axes: dict[str, int] = {}
    for spec in program.inputs:
        for dim, name in enumerate(spec.shape):
            if isinstance(name, str) and not is_sum(name):
                low, high = spec.ranges[dim] if spec.ranges else (0, None)
                wanted = held.get(name, max(sizes[min(len(axes), len(sizes) - 1)], low))
                axes.setdefault(name, wanted if high is None else min(wanted, high))
    return axes


def _padding(rows: int, length: int, *, front: bool) -> Tensor:
    """Where a batch of texts has padding, ``bool[rows, length]``."""
    count = min(2, (length - 1) // 3)
    padding = torch.zeros(rows, length, dtype=torch.bool)
    if count < 1:
        return padding
    middle = length // 2
    behind = slice(length - count, length)
    places = (slice(0, count) if front else behind, slice(middle, middle + count), behind)
    for row in range(rows):
        if row % 4 < len(places):
            padding[row, places[row % 4]] = True
    return padding


def _with_padding(numbers: Tensor, rows: int, config: Any, front: bool) -> Tensor:
    """Texts with their padding and the end token."""
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


def _table_rows(node: fx.Node) -> int | None:
    """Rows of the table, or slots of the bank, that an input indexes."""
    for user in node.users:
        if user.target is aten.index_select.default and user.args[2] is node:
            return int(user.args[0].meta["val"].shape[0])  # type: ignore[union-attr]
        if user.target is aten.embedding.default and isinstance(user.args[0], fx.Node):
            return int(user.args[0].meta["val"].shape[0])
        if user.target in (aten.view.default, aten.reshape.default) and (found := _table_rows(user)) is not None:
            return found
    return None
