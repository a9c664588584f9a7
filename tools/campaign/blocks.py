"""The modules of `grammar`'s descriptions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from graftc.testing import randomise, tiny
from tools.campaign.grammar import Block, Layer, Model

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "tanh": torch.tanh,
}
Rows = tuple[tuple[int, int], ...]
"""Ascending runs of rows."""


class Part(nn.Module):
    """A block. ``roles`` has the rows of each role's weight, by the weight's path in the block; None for all rows."""

    def __init__(self) -> None:
        super().__init__()
        self.roles: dict[str, tuple[str, Rows | None]] = {}
        self.stacked: dict[str, str] = {}
        """The layout of each stack of experts: ``rows`` for ``[experts, out, in]``, ``columns`` for its transpose."""


class MLP(Part):
    """Two maps around an activation; GPT-2's transposed maps in ``columns``."""

    def __init__(self, width: int, inner: int, activation: str, bias: bool, *, columns: bool = False) -> None:
        super().__init__()
        self.up = Conv1D(inner, width) if columns else nn.Linear(width, inner, bias)
        self.down = Conv1D(width, inner) if columns else nn.Linear(inner, width, bias)
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

    def forward(self, x: Tensor) -> Tensor:
        """See `MLP.forward`."""
        weight, bias, n = self.both.weight, self.both.bias, self.inner
        first = F.linear(x, weight[:n], None if bias is None else bias[:n])
        second = F.linear(x, weight[n:], None if bias is None else bias[n:])
        result: Tensor = self.down(self.activation(first) * second)
        return result


class Attention(Part):
    """An attention over positions whose projections are stored in one of five ways."""

    def __init__(
        self, width: int, form: str, heads: int, groups: int, causal: bool, by_hand: bool, bias: bool
    ) -> None:
        super().__init__()
        self.form, self.heads, self.groups, self.causal, self.by_hand = form, heads, groups, causal, by_hand
        self.size = size = width // heads
        narrow = groups * size
        self.o = nn.Linear(width, width, bias)
        if form in ("contiguous", "interleaved"):
            self.qkv = nn.Linear(width, width + 2 * narrow, bias)
        elif form == "in_proj":
            self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
            nn.init.xavier_uniform_(self.in_proj_weight)
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
            runs = [tuple(((3 * h + i) * size, (3 * h + i + 1) * size) for h in range(heads)) for i in range(3)]
            self.roles = {f"attn.{p}": ("qkv", rows if heads > 1 else rows[:1]) for p, rows in zip("qkv", runs)}

    def forward(self, x: Tensor) -> Tensor:
        """See `MLP.forward`."""
        q, k, v = self._projected(x)
        if self.groups < self.heads:
            k, v = (t.repeat_interleave(self.heads // self.groups, 1) for t in (k, v))
        if self.by_hand:
            scores = q @ k.mT / self.size**0.5
            if self.causal:
                hidden = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
                scores = scores.masked_fill(hidden, float("-inf"))
            mixed = scores.softmax(-1) @ v
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
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
        given = self.read(x)
        if self.form == "over_time":
            state, states = torch.zeros_like(given[:, 0]), []
            for at in range(given.shape[1]):
                state = torch.tanh(given[:, at] + self.again(state))
                states.append(state)
            return self.write(torch.stack(states, 1))  # type: ignore[no-any-return]
        state = torch.tanh(given)
        for _ in range(self.steps):
            new = torch.tanh(given + self.again(state))
            if self.form == "gated":
                gate = torch.sigmoid(self.gate(torch.cat([x, state], -1)))
                new = gate * state + (1 - gate) * new
            state = new
        result: Tensor = self.write(state)
        return result


class Experts(Part):
    """Experts of which a router chooses some for each position; all are computed, and the others count zero."""

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
        up, down = (w.mT if self.form == "batched" else w for w in (self.up, self.down))
        hidden = self.activation(torch.bmm(x.flatten(0, 1).expand(up.shape[0], -1, -1), up))
        mixed = torch.bmm(hidden, down).unflatten(1, x.shape[:2])
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


def _norm(kind: str, width: int) -> nn.Module:
    return {"layer": nn.LayerNorm, "rms": nn.RMSNorm}.get(kind, lambda width: nn.Identity())(width)


class Stage(nn.Module):
    """A layer: blocks, each behind a norm and beside a residual."""

    def __init__(self, width: int, layer: Layer) -> None:
        super().__init__()
        self.norms = nn.ModuleDict({_name(b, i): _norm(layer.norm, width) for i, b in enumerate(layer.blocks)})
        self.parts = nn.ModuleDict({_name(b, i): PARTS[b.kind](width, **b.options) for i, b in enumerate(layer.blocks)})
        self.scale, self.runs = layer.scale, layer.runs

    def forward(self, x: Tensor) -> Tensor:
        """See `MLP.forward`."""
        for _ in range(self.runs):
            for name, part in self.parts.items():
                added = part(self.norms[name](x))
                x = x + (added if self.scale == 1 else added * self.scale)
        return x


def _name(block: Block, number: int) -> str:
    return f"{block.kind}{number}"


class Grown(nn.Module):
    """The model of a description that is no library's."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.kind, self.tied, width = model.input, model.outputs == 0, model.width
        if model.input == "tokens":
            self.embed = nn.Embedding(model.vocabulary, width)
        elif model.input == "features":
            self.stem = nn.Linear(model.vocabulary, width)
        else:
            self.patches = nn.Conv2d(model.vocabulary, width, 2, stride=2)
        self.positions = nn.Embedding(model.positions, width) if model.positions else None
        self.layers = nn.ModuleList()
        for layer in model.layers:
            stages = [Stage(width, layer) for _ in range(layer.copies)]
            if layer.tied:
                for stage in stages[1:]:
                    _tie(stage, stages[0])
            self.layers.extend(stages)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, model.outputs or model.vocabulary, bias=model.outputs > 0)
        if self.tied:
            self.head.weight = self.embed.weight
        self.pool = nn.Linear(width, 3) if model.pooled else None

    def forward(self, inputs: Tensor, mask: Tensor | None = None) -> Any:
        """Return scores ``[batch, positions, outputs]``, in a mapping if there is a second output, ``[batch, 3]``.

        Args:
            inputs: ids ``[batch, positions]``, features ``[batch, positions, features]``, or an image ``[batch,
                channels, height, width]``.
            mask: a factor for every position, ``[batch, positions]``.
        """
        if self.kind == "tokens":
            x = self.embed(inputs)
        elif self.kind == "features":
            x = self.stem(inputs)
        else:
            x = self.patches(inputs).flatten(2).mT
        if self.positions is not None:
            x = x + self.positions(torch.arange(x.shape[1], device=x.device))
        if mask is not None:
            x = x * mask.unsqueeze(-1)
        for stage in self.layers:
            x = stage(x)
        x = self.norm(x)
        logits: Tensor = self.head(x)
        return logits if self.pool is None else {"logits": logits, "pooled": torch.tanh(self.pool(x.mean(1)))}


def _tie(stage: Stage, first: Stage) -> None:
    """Let a stage share the first weight of another, under all of its names."""
    shared = next(p for p in first.parts.parameters() if p.dim() > 1)
    for name, parameter in first.parts.named_parameters(remove_duplicate=False):
        if parameter is shared:
            path, _, last = name.rpartition(".")
            setattr(stage.parts.get_submodule(path), last, shared)


def build(model: Model, dtype: torch.dtype = torch.float64) -> nn.Module:
    """Return the module of a description in eval mode and frozen; the same description has the same weights."""
    if model.family is not None:
        return tiny(model.family, seed=model.seed, dtype=dtype, **model.config).requires_grad_(False)
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(model.seed)
        grown = Grown(model)
    return randomise(grown, seed=model.seed).to(dtype).eval().requires_grad_(False)


def inputs_of(model: Model, built: nn.Module, sizes: tuple[int, int], seed: int = 0) -> dict[str, Tensor]:
    """Return random inputs for a model of the grammar.

    Args:
        model: the description.
        built: its module, whose dtype the inputs have.
        sizes: batch, and positions; an image has twice as many rows, and four columns.
        seed: the seed of the values.
    """
    generator = torch.Generator().manual_seed(seed)
    batch, length = sizes
    dtype = next(built.parameters()).dtype
    if model.input == "tokens":
        inputs = torch.randint(0, model.vocabulary, sizes, generator=generator)
    else:
        shape = (batch, length, model.vocabulary)
        shape = (batch, model.vocabulary, 2 * length, 4) if model.input == "image" else shape  # type: ignore[assignment]
        inputs = torch.randn(shape, generator=generator).to(dtype)
    given = {"inputs": inputs}
    if model.masked:
        positions = 2 * length if model.input == "image" else length
        given["mask"] = torch.rand((batch, positions), generator=generator).to(dtype)
    return given
