"""The eager model with the effect of adaptations on its weights, by the formulas of the papers.

Nothing here uses graftc's graphs, sites, folds or layouts: the formulas read an adaptation's fields and its tensors by
name, and change the weight of the module that the name begins with. Weights are seen as ``[..., out, in]``. The changed
weights are functions of the tensors, so gradients flow through them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tools.campaign.blocks import Rows

Fields = Mapping[str, Any]
Tensors = Mapping[str, Tensor]


class NoReferenceError(Exception):
    """The effect of an adaptation is not a known change of weights; the message says which."""


@dataclass(frozen=True)
class Weight:
    """A weight of the eager model.

    Attributes:
        name: its name in the state dict.
        layout: ``rows`` for ``[..., out, in]``, ``columns`` for ``[..., in, out]``, ``kernel`` for convolutions.
        rows: the rows in question; None for all.
    """

    name: str
    layout: str
    rows: Rows | None = None

    def seen(self, stored: Tensor) -> Tensor:
        """Return the whole weight as ``[..., out, in]``."""
        if self.layout == "columns":
            return stored.mT
        return stored.flatten(1) if self.layout == "kernel" else stored

    def index(self, stored: Tensor) -> Tensor:
        """Return the numbers of the rows."""
        total = self.seen(stored).shape[-2]
        return torch.cat([torch.arange(a, b) for a, b in self.rows or ((0, total),)])

    def put(self, stored: Tensor, operand: Tensor) -> Tensor:
        """Return the stored tensor with other rows."""
        whole = self.seen(stored).index_copy(-2, self.index(stored), operand.to(stored.dtype))
        return whole.mT if self.layout == "columns" else whole.reshape(stored.shape)


# --- formulas: fields, tensors by part, W and b -> W' and b' ------------------------------------------------------

Bias = Tensor | None
Formula = Callable[[Fields, Tensors, Tensor, Bias], tuple[Tensor, Bias]]


def _scale(spec: Fields) -> float:
    rank, alpha = spec["rank"], spec["alpha"]
    return float(alpha / (math.sqrt(rank) if spec.get("rslora") else rank))


def _lora(spec: Fields, t: Tensors, w: Tensor, b: Bias) -> tuple[Tensor, Bias]:
    update = t["B"] @ t["A"]
    if "A0" in t:
        update = update - t["B0"] @ t["A0"]
    return w + _scale(spec) * update, b


def _adalora(spec: Fields, t: Tensors, w: Tensor, b: Bias) -> tuple[Tensor, Bias]:
    return w + spec["alpha"] / (spec["rank"] + 1e-5) * (t["B"] * t["E"].unsqueeze(-2)) @ t["A"], b


def _sora(spec: Fields, t: Tensors, w: Tensor, b: Bias) -> tuple[Tensor, Bias]:
    return w + _scale(spec) * (t["B"] * t["gate"].unsqueeze(-2)) @ t["A"], b


def _adamix_lora(spec: Fields, t: Tensors, w: Tensor, b: Bias) -> tuple[Tensor, Bias]:
    share = spec["share"]
    up, down = (t[p] if share == side else t[p].mean(0) for p, side in (("B", "up"), ("A", "down")))
    return w + _scale(spec) * up @ down, b


def _dora(spec: Fields, t: Tensors, w: Tensor, b: Bias) -> tuple[Tensor, Bias]:
    v = w + _scale(spec) * t["B"] @ t["A"] if spec["direction"] else w
    norm = v.norm(dim=-1, keepdim=True)
    return t["m"].unsqueeze(-1) * v / (norm.detach() if spec["norm_gradient"] == "detached" else norm), b


def _loha(spec: Fields, t: Tensors, w: Tensor, b: Bias) -> tuple[Tensor, Bias]:
    return w + _scale(spec) * (t["B1"] @ t["A1"]) * (t["B2"] @ t["A2"]), b


def _lokr(spec: Fields, t: Tensors, w: Tensor, b: Bias) -> tuple[Tensor, Bias]:
    c, d = (t[n] if n in t else t[f"{n}B"] @ t[f"{n}A"] for n in "CD")
    if c.dim() == 2:
        return w + _scale(spec) * torch.kron(c, d), b
    return w + _scale(spec) * torch.stack([torch.kron(x, y) for x, y in zip(c, d, strict=True)]), b


def _hira(spec: Fields, t: Tensors, w: Tensor, b: Bias) -> tuple[Tensor, Bias]:
    return w * (1 + t["B"] @ t["A"]), b


def _vera(spec: Fields, t: Tensors, w: Tensor, b: Bias) -> tuple[Tensor, Bias]:
    up, down = t["B"][: w.shape[-2]], t["A"][:, : w.shape[-1]]
    return w + torch.diag(t["b"]) @ up @ torch.diag(t["d"]) @ down, b


def _rotation(skew: Tensor, spec: Fields) -> Tensor:
    one = torch.eye(skew.shape[-1], dtype=skew.dtype)
    if spec.get("cayley", "exact") == "exact":
        turned: Tensor = (one - skew) @ torch.linalg.inv(one + skew)
        return turned
    terms = max(spec["terms"], 4) if spec["terms"] > 2 else 3
    if spec["terms"] == 2:
        return one + 2 * skew
    powers = [torch.linalg.matrix_power(skew, n) for n in range(terms)]
    total: Tensor = powers[0] + 2 * sum(powers[1:-1], torch.zeros_like(one)) + powers[-1]
    return total


def _oft(spec: Fields, t: Tensors, w: Tensor, b: Bias) -> tuple[Tensor, Bias]:
    size = spec["block_size"]
    upper = _above(t["Q"], size)
    turns = _rotation(upper - upper.mT, spec).expand(*t["Q"].shape[:-2], w.shape[-1] // size, size, size)
    parts = torch.unflatten(w, -1, (-1, size))
    return torch.einsum("...onc,...nkc->...onk", parts, turns).flatten(-2), b


def _above(values: Tensor, size: int) -> Tensor:
    row, column = torch.triu_indices(size, size, 1)
    flat = values.new_zeros(*values.shape[:-1], size * size)
    return torch.unflatten(flat.index_copy(-1, row * size + column, values), -1, (size, size))


def _boft(spec: Fields, t: Tensors, w: Tensor, b: Bias) -> tuple[Tensor, Bias]:
    size, width = spec["block_size"], w.shape[-1]
    run = size // 2
    for number in range(spec["factors"]):
        q = t["Q"].select(-4, number)
        turns = _rotation((q - q.mT) / 2, spec)
        apart, order = 2**number, []
        if spec["factors"] == 1:
            order = list(range(width))
        else:
            for first in range(0, width // run, 2 * apart):
                for at in range(first, first + apart):
                    for part in (at, at + apart):
                        order += range(part * run, (part + 1) * run)
        index = torch.tensor(order)
        blocks = torch.unflatten(w.index_select(-1, index), -1, (-1, size))
        turned = torch.einsum("...onc,...nkc->...onk", blocks, turns).flatten(-2)
        w = torch.empty_like(w).index_copy(-1, index, turned)
    return t["s"].unsqueeze(-1) * w, b


def _c3a(spec: Fields, t: Tensors, w: Tensor, b: Bias) -> tuple[Tensor, Bias]:
    size = spec["block_size"]
    place = torch.arange(size)
    blocks = t["kernel"][..., (place[None, :] - place[:, None]) % size]  # [..., m, n, t, c]
    return w + blocks.transpose(-3, -2).flatten(-2).flatten(-3, -2) / w.shape[-1], b


def _gralora(spec: Fields, t: Tensors, w: Tensor, b: Bias) -> tuple[Tensor, Bias]:
    k, rank = spec["k"], spec["rank"] // spec["k"]
    rows = []
    for i in range(k):
        parts = []
        for j in range(k):
            down = t["A"][..., j, :, i * rank : (i + 1) * rank]
            up = t["B"][..., i, j * rank : (j + 1) * rank, :]
            parts.append((down @ up).mT)
        rows.append(torch.cat(parts, -1))
    update = torch.cat(rows, -2)
    if "A_hybrid" in t:
        update = update + t["B_hybrid"] @ t["A_hybrid"]
    return w + spec["alpha"] / (spec["rank"] + spec["hybrid_rank"]) * update, b


def _miss(spec: Fields, t: Tensors, w: Tensor, b: Bias) -> tuple[Tensor, Bias]:
    d, (rows, columns), r = t["D"], w.shape[-2:], spec["rank"]
    if spec["variant"] != "bat":
        o, j = torch.arange(rows) % d.shape[-1], torch.arange(columns) % r
        return w + d[..., j, :][..., o].mT, b
    bands = []
    for i in range(rows // r):
        band, own = w[..., i * r : (i + 1) * r, :], d[..., i, :, :]
        bands.append(torch.cat([p + p @ own + own for p in torch.split(band, r, -1)], -1))
    return torch.cat(bands, -2), b


def _ia3(spec: Fields, t: Tensors, w: Tensor, b: Bias) -> tuple[Tensor, Bias]:
    scale = t["l"]
    if spec["side"] == "output":
        return w * scale[:, None], None if b is None else b * scale
    if w.shape[-1] % scale.numel():
        raise NoReferenceError("ia3 on the inputs of a convolution with groups")
    return w * scale.repeat_interleave(w.shape[-1] // scale.numel()), b


FORMULAS: Mapping[str, Formula] = {
    "lora": _lora, "dylora": _lora, "adalora": _adalora, "sora": _sora, "adamix_lora": _adamix_lora, "dora": _dora,
    "loha": _loha, "lokr": _lokr, "hira": _hira, "vera": _vera, "oft": _oft, "boft": _boft, "c3a": _c3a,
    "gralora": _gralora, "miss": _miss, "ia3": _ia3,
}  # fmt: skip
"""Formulas of methods that change weights."""

STAND_INS = frozenset({"full", "last_layers", "norms", "bitfit", "rows", "child_tuning", "lt_sft", "trained"})
"""Methods whose tensors stand in for the base's own, or for some rows of them."""

SUMS = frozenset({"mask", "shira", "spiel", "diff_pruning"})
"""Methods whose tensors are added to entries of the base's own."""

WITHOUT_GRADIENTS = frozenset({"dylora", "child_tuning", "adamix_lora", "spiel", "diff_pruning", "lt_sft"})
"""Methods that draw, or change gradients, in train mode."""
