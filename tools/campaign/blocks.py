"""The modules of `grammar`'s blocks."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "tanh": torch.tanh,
}
Rows = tuple[tuple[int, int], ...]
"""Ascending runs of rows."""


class Part(nn.Module):
    """A block. ``roles`` has the path of each role's map, or of its parameter, and its rows; None for all rows."""

    def __init__(self) -> None:
        super().__init__()
        self.roles: dict[str, tuple[str, Rows | None]] = {}
        self.stacked: dict[str, str] = {}
        """The layout of each stack of experts: ``rows`` for ``[experts, out, in]``, ``columns`` for its transpose."""


def _columns(size: int, rows: int) -> nn.Module:
    """Return one of GPT-2's maps, whose weight is ``[in, out]``."""
    module: nn.Module = Conv1D(rows, size)  # type: ignore[no-untyped-call]
    return module


class MLP(Part):
    """Two maps around an activation; GPT-2's transposed maps in ``columns``."""

    def __init__(self, width: int, inner: int, activation: str, bias: bool, *, columns: bool = False) -> None:
        super().__init__()
        self.up = _columns(width, inner) if columns else nn.Linear(width, inner, bias)
        self.down = _columns(inner, width) if columns else nn.Linear(inner, width, bias)
        self.activation = ACTIVATIONS[activation]

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[batch, positions, width]`` to the same shape, as every block does."""
        x = x.contiguous()  # GPT-2's maps view their input as rows
        result: Tensor = self.down(self.activation(self.up(x)))
        return result


class Gated(Part):
    """A gated feed-forward part, with both inner maps separate."""

    def __init__(self, width: int, inner: int, activation: str, bias: bool) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(width, inner, bias), nn.Linear(width, inner, bias)
        self.down = nn.Linear(inner, width, bias)
        self.activation = ACTIVATIONS[activation]

    def forward(self, x: Tensor) -> Tensor:
        """See `MLP.forward`."""
        result: Tensor = self.down(self.activation(self.gate(x)) * self.up(x))
        return result


class FusedGated(Part):
    """A gated feed-forward part whose inner maps are halves, or every other row, of one weight."""

    def __init__(self, width: int, inner: int, activation: str, bias: bool, interleaved: bool) -> None:
        super().__init__()
        self.both, self.down = nn.Linear(width, 2 * inner, bias), nn.Linear(inner, width, bias)
        self.activation, self.interleaved = ACTIVATIONS[activation], interleaved

    def forward(self, x: Tensor) -> Tensor:
        """See `MLP.forward`."""
        both = self.both(x)
        gate, up = (both[..., ::2], both[..., 1::2]) if self.interleaved else both.chunk(2, -1)
        result: Tensor = self.down(self.activation(gate) * up)
        return result


class Sliced(Part):
    """Two products with slices of one weight, as `nn.MultiheadAttention` has them."""

    def __init__(self, width: int, inner: int, activation: str, bias: bool) -> None:
        super().__init__()
        self.both, self.down = nn.Linear(width, 2 * inner, bias), nn.Linear(inner, width, bias)
        self.activation, self.inner = ACTIVATIONS[activation], inner
        self.roles = {"ffn.gate": ("both", ((0, inner),)), "ffn.up": ("both", ((inner, 2 * inner),))}

    def forward(self, x: Tensor) -> Tensor:
        """See `MLP.forward`."""
        weight, n = self.both.weight, self.inner
        bias: Tensor | None = self.both.bias
        first = F.linear(x, weight[:n], None if bias is None else bias[:n])
        second = F.linear(x, weight[n:], None if bias is None else bias[n:])
        result: Tensor = self.down(self.activation(first) * second)
        return result


class Attention(Part):
    """An attention over positions whose projections are stored in one of five ways."""

    def __init__(self, width: int, form: str, heads: int, groups: int, causal: bool, by_hand: bool, bias: bool) -> None:
        super().__init__()
        self.form, self.heads, self.groups, self.causal, self.by_hand = form, heads, groups, causal, by_hand
        self.size = size = width // heads
        self.prefixes: tuple[tuple[Tensor, Tensor], ...] = ()
        """Keys and values in front of those of the positions, each ``[length, groups * size]``; set by references."""
        narrow = groups * size
        self.o = nn.Linear(width, width, bias)
        if form in ("contiguous", "interleaved"):
            self.qkv = nn.Linear(width, width + 2 * narrow, bias)
        elif form == "in_proj":
            self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
            nn.init.xavier_uniform_(self.in_proj_weight)
            runs = {p: ((i * width, (i + 1) * width),) for i, p in enumerate("qkv")}
            self.roles = {f"attn.{p}": ("in_proj_weight", rows) for p, rows in runs.items()}
        else:
            self.q = nn.Linear(width, width, bias)
            self.v = nn.Linear(width, narrow, bias)
            if form == "separate":
                self.k = nn.Linear(width, narrow, bias)
        if form == "separate":
            self.roles = {f"attn.{part}": (part, None) for part in "qkvo"}
        elif form == "contiguous":
            edges = (0, width, width + narrow, width + 2 * narrow)
            self.roles = {f"attn.{p}": ("qkv", ((edges[i], edges[i + 1]),)) for i, p in enumerate("qkv")}
        elif form == "interleaved":
            for i, p in enumerate("qkv"):
                rows = tuple(((3 * h + i) * size, (3 * h + i + 1) * size) for h in range(heads))
                self.roles[f"attn.{p}"] = ("qkv", rows)

    def forward(self, x: Tensor) -> Tensor:
        """See `MLP.forward`."""
        q, k, v = self._projected(x)
        for keys, values in self.prefixes:
            parts = [torch.unflatten(t, -1, (-1, self.size)).transpose(0, 1) for t in (keys, values)]
            k, v = (torch.cat([p.expand(len(x), -1, -1, -1), t], 2) for p, t in zip(parts, (k, v), strict=True))
        if self.groups < self.heads:
            k, v = (t.repeat_interleave(self.heads // self.groups, 1) for t in (k, v))
        if self.by_hand:
            scores = q @ k.mT / self.size**0.5
            if self.causal:
                scores = scores.masked_fill(_later(q, k), float("-inf"))
            mixed = scores.softmax(-1) @ v
        else:
            behind = ~_later(q, k) if self.causal and self.prefixes else None
            mixed = F.scaled_dot_product_attention(q, k, v, behind, is_causal=self.causal and behind is None)
        result: Tensor = self.o(mixed.transpose(1, 2).flatten(-2))
        return result

    def _projected(self, x: Tensor) -> list[Tensor]:
        size = self.size
        if self.form == "interleaved":
            return list(self.qkv(x).unflatten(-1, (self.heads, 3 * size)).transpose(1, 2).chunk(3, -1))
        if self.form == "contiguous":
            parts = self.qkv(x).split([self.heads * size, self.groups * size, self.groups * size], -1)
        elif self.form == "in_proj":
            parts = tuple(F.linear(x, weight) for weight in self.in_proj_weight.chunk(3))
        else:
            q = self.q(x)
            parts = (q, self.k(x) if self.form == "separate" else q, self.v(x))
        return [part.unflatten(-1, (-1, size)).transpose(1, 2) for part in parts]


def _later(q: Tensor, k: Tensor) -> Tensor:
    """Return which keys a causal attention hides from which queries; none of a prefix."""
    positions, every = q.shape[2], k.shape[2]
    return torch.ones(positions, every, dtype=torch.bool, device=q.device).triu(1 + every - positions)


class Convolution(Part):
    """A convolution over positions and one of one point, back to the stream's width."""

    def __init__(self, width: int, inner: int, kernel: int, groups: int, bias: bool) -> None:
        super().__init__()
        self.wide = nn.Conv1d(width, inner, kernel, padding=kernel // 2, groups=groups, bias=bias)
        self.point = nn.Conv1d(inner, width, 1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """See `MLP.forward`."""
        result: Tensor = self.point(torch.tanh(self.wide(x.mT))).mT
        return result


class ImageConvolution(Part):
    """Two convolutions over positions and features, as over an image of one channel."""

    def __init__(self, width: int, channels: int, bias: bool) -> None:
        super().__init__()
        self.wide = nn.Conv2d(1, channels, 3, padding=1, bias=bias)
        self.point = nn.Conv2d(channels, 1, (1, 3), padding=(0, 1), bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """See `MLP.forward`."""
        result: Tensor = self.point(torch.tanh(self.wide(x.unsqueeze(1)))).squeeze(1)
        return result


class Recurrent(Part):
    """A map whose weight is used at every step: at each position a few times, or once for each position in turn."""

    def __init__(self, width: int, inner: int, form: str, steps: int) -> None:
        super().__init__()
        self.read, self.again = nn.Linear(width, inner), nn.Linear(inner, inner, False)
        self.write = nn.Linear(inner, width)
        if form == "gated":
            self.gate = nn.Linear(width + inner, inner)
        self.form, self.steps = form, steps

    def forward(self, x: Tensor) -> Tensor:
        """See `MLP.forward`."""
        features = self.read(x)
        if self.form == "over_time":
            state, states = torch.zeros_like(features[:, 0]), []
            for at in range(features.shape[1]):
                state = torch.tanh(features[:, at] + self.again(state))
                states.append(state)
            return self.write(torch.stack(states, 1))  # type: ignore[no-any-return]
        state = torch.tanh(features)
        for _ in range(self.steps):
            new = torch.tanh(features + self.again(state))
            if self.form == "gated":
                gate = torch.sigmoid(self.gate(torch.cat([x, state], -1)))
                new = gate * state + (1 - gate) * new
            state = new
        result: Tensor = self.write(state)
        return result


class Experts(Part):
    """Experts of which a router chooses some for each position; all are computed, and the others count zero."""

    up: Tensor
    down: Tensor

    def __init__(self, width: int, experts: int, chosen: int, inner: int, form: str, activation: str) -> None:
        super().__init__()
        self.router = nn.Linear(width, experts, False)
        self.form, self.chosen, self.activation = form, chosen, ACTIVATIONS[activation]
        if form == "list":
            self.each = nn.ModuleList([MLP(width, inner, activation, False) for _ in range(experts)])
        else:
            self.stacked = dict.fromkeys(("up", "down"), "rows" if form == "batched" else "columns")
            shapes = ((experts, inner, width), (experts, width, inner))
            for name, shape in zip(("up", "down"), shapes, strict=True):
                stored = shape if form == "batched" else (shape[0], shape[2], shape[1])
                setattr(self, name, nn.Parameter(torch.randn(stored) / shape[2] ** 0.5))

    def forward(self, x: Tensor) -> Tensor:
        """See `MLP.forward`."""
        scores = self.router(x).softmax(-1)
        best = scores.topk(self.chosen, -1)
        gates = torch.zeros_like(scores).scatter(-1, best.indices, best.values)
        if self.form == "list":
            return torch.stack([expert(x) * gates[..., i, None] for i, expert in enumerate(self.each)]).sum(0)
        up, down = (weight.mT if self.form == "batched" else weight for weight in (self.up, self.down))
        hidden = self.activation(torch.bmm(x.flatten(0, 1).expand(up.shape[0], -1, -1), up))
        mixed: Tensor = torch.unflatten(torch.bmm(hidden, down), 1, x.shape[:2])
        return (mixed * gates.movedim(-1, 0).unsqueeze(-1)).sum(0)


class Twice(Part):
    """One map that is used at two places."""

    def __init__(self, width: int, activation: str, bias: bool) -> None:
        super().__init__()
        self.map, self.activation = nn.Linear(width, width, bias), ACTIVATIONS[activation]

    def forward(self, x: Tensor) -> Tensor:
        """See `MLP.forward`."""
        result: Tensor = self.map(self.activation(self.map(x)))
        return result


class Turned(Part):
    """A map and its transpose, which is the same parameter under another name.

    An adaptation of the map does not reach the transpose, and a tensor that stands in for the weight reaches both.
    """

    def __init__(self, width: int, inner: int, activation: str, bias: bool) -> None:
        super().__init__()
        self.map, self.activation = nn.Linear(width, inner, bias), ACTIVATIONS[activation]
        self.back = self.map.weight

    def forward(self, x: Tensor) -> Tensor:
        """See `MLP.forward`."""
        return F.linear(self.activation(self.map(x)), self.back.T)


PARTS: Mapping[str, Callable[..., Part]] = {
    "mlp": MLP,
    "gated": Gated,
    "fused_gated": FusedGated,
    "sliced": Sliced,
    "columns": lambda width, inner, activation, bias: MLP(width, inner, activation, bias, columns=True),
    "attention": Attention,
    "convolution": Convolution,
    "image_convolution": ImageConvolution,
    "recurrent": Recurrent,
    "experts": Experts,
    "twice": Twice,
    "turned": Turned,
}
