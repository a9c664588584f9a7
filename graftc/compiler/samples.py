"""Random inputs for a Program: what certificates, exports and tests run it on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from graftc.passes.core.program import Program
from graftc.passes.core.store import Store

aten = torch.ops.aten


def sample_inputs(
    program: Program, store: Store, seed: int = 0, sizes: Sequence[int] = (2, 9), config: Any = None
) -> dict[str, Tensor]:
    """Random inputs for a Program: indices within their table, masks with padding at the end, normal floats.

    Args:
        program: whose inputs.
        store: where its tensors live: inputs are on their device.
        seed: of the values.
        sizes: of the named axes in the order met; the last one holds for all further ones.
        config: the model's config. Texts end with the end token that it names, and have it nowhere else, since some
            heads look for it.
    """
    generator = torch.Generator().manual_seed(seed)
    device = next((t.device for _, t in store.base()), torch.device("cpu"))
    axes: dict[str, int] = {}
    inputs: dict[str, Tensor] = {}
    for spec, node in zip(program.inputs, program.placeholders(), strict=True):
        shape = []
        for size in spec.shape:
            if isinstance(size, str):
                axes.setdefault(size, sizes[min(len(axes), len(sizes) - 1)])
            shape.append(axes[size] if isinstance(size, str) else size)
        if spec.dtype.is_floating_point:
            value = torch.randn(shape, generator=generator).to(spec.dtype)
        elif (rows := _table_rows(node)) is not None:
            value = _ended(torch.randint(0, rows, shape, generator=generator, dtype=spec.dtype), rows, config)
        else:
            value = torch.ones(shape, dtype=spec.dtype)
            if len(shape) == 2 and shape[1] > 2:
                value[-1, -2:] = 0
        inputs[spec.name] = value.to(device)
    return inputs


def _ended(numbers: Tensor, rows: int, config: Any) -> Tensor:
    end = getattr(config, "eos_token_id", None)
    if numbers.dim() != 2 or not isinstance(end, int) or not 0 <= end < rows or rows < 2:
        return numbers
    numbers = torch.where(numbers == end, (end + 1) % rows, numbers)
    numbers[:, -1] = end
    return numbers


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
