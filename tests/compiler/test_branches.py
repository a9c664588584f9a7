"""Roles in branches without a plain attention or feed-forward, in models written by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graftc.compiler.capture.signature import Axis
from tests.compiler.perturbation import attention_of, moved, noise, own_rows, perturbed
from tests.compiler.structure_cases import VALUES, Captured, captured
from tests.compiler.structure_models import HEADS, INNER, D

LENGTH = 6
FIXED = [Axis("x", torch.float32, ("batch", LENGTH, D))]
IMAGES = [Axis("x", torch.float32, ("batch", 8, 6, 6))]


def roles(model: Captured) -> dict[str, set[str | None]]:
    """Map each role to its parameters, without norms."""
    parameters: dict[str, set[str | None]] = {}
    for f in model.structure.findings:
        if f.role not in ("norm", "attn"):
            parameters.setdefault(f.role, set()).add(f.parameter)
    return parameters


def reasons(model: Captured) -> dict[str, str]:
    return {u.module: u.reason for u in model.structure.unresolved}


def weights(*names: str) -> set[str | None]:
    return {f"{name}.weight" for name in names}


class TokenMixing(nn.Module):
    """Linear maps over positions, then over channels."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(LENGTH, 10), nn.Linear(10, LENGTH)
        self.up, self.down = nn.Linear(D, INNER), nn.Linear(INNER, D)
        self.norm, self.last = nn.LayerNorm(D), nn.LayerNorm(D)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.second(F.gelu(self.first(self.norm(x).transpose(1, 2)))).transpose(1, 2)
        return x + self.down(F.gelu(self.up(self.last(x))))


@pytest.mark.slow
def test_maps_over_positions_are_mixers() -> None:
    model = captured(TokenMixing(), FIXED)
    assert roles(model) == {"mixer": weights("first", "second"), "ffn.up": weights("up"), "ffn.down": weights("down")}
    assert reasons(model) == {}
    assert [s.roles for s in model.structure.sublayers] == [(), ("ffn.sublayer",)]


class LinearAttention(nn.Module):
    """Attention that sums keys and values before it applies queries, a running sum, or a Fourier transform, by kind."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.a, self.b, self.c, self.out = (nn.Linear(D, D) for _ in range(4))
        self.gate = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        a, b, c = (F.elu(m(x)) + 1 for m in (self.a, self.b, self.c))
        if self.kind == "product":
            mixed = a @ (b.transpose(1, 2) @ c)
        elif self.kind == "running":
            mixed = a * torch.cumsum(b * c, 1)
        else:
            mixed = a * torch.fft.fft(torch.fft.fft(b * c, dim=-1), dim=1).real
        return x + self.out(mixed) * torch.sigmoid(self.gate(x))


@pytest.mark.slow
def test_sums_without_a_softmax_are_mixers() -> None:
    for kind in ("product", "running", "fourier"):
        model = captured(LinearAttention(kind), VALUES)
        assert roles(model) == {"mixer": weights("a", "b", "c", "out")}, kind
        assert set(reasons(model)) == {"gate"}, kind


class Pooled(nn.Module):
    """Additive attention: values are weighted by a softmax over positions and summed."""

    def __init__(self) -> None:
        super().__init__()
        self.scores, self.value, self.out, self.query = (
            nn.Linear(D, 1),
            nn.Linear(D, D),
            nn.Linear(D, D),
            nn.Linear(D, D),
        )

    def forward(self, x: Tensor) -> Tensor:
        context = (self.value(x) * self.scores(x).softmax(1)).sum(1, keepdim=True)
        return x + self.out(torch.relu(self.query(x)) * context)


def test_a_sum_weighed_by_a_softmax_is_neither_feed_forward_nor_mixer() -> None:
    model = captured(Pooled(), VALUES)
    assert roles(model) == {}
    assert set(reasons(model)) == {"value", "out", "scores", "query"}
    assert "applies softmax weights" in reasons(model)["value"]


class Convolutional(nn.Module):
    """Channels first: an inverted bottleneck, then a feed-forward of 1x1 convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(8, 8, 3, padding=1)
        self.expand, self.deep, self.project = (
            nn.Conv2d(8, 16, 1),
            nn.Conv2d(16, 16, 3, 1, 1, groups=16),
            nn.Conv2d(16, 8, 1),
        )
        self.up, self.down = nn.Conv2d(8, 24, 1, groups=2), nn.Conv2d(24, 8, 1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.project(F.relu(self.deep(F.relu(self.expand(x)))))
        x = x + self.down(F.relu(self.up(x)))
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


def test_channels_are_followed_where_they_come_first() -> None:
    model = captured(Convolutional(), IMAGES)
    assert roles(model) == {
        "mixer": weights("expand", "deep", "project"),
        "ffn.up": weights("up"),
        "ffn.down": weights("down"),
        "head": weights("head"),
    }
    assert set(reasons(model)) == {"stem"}


class ChannelsFirst(nn.Module):
    """Attention over an image, with queries, keys and values in one grouped 1x1 convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.fused, self.out = nn.Conv2d(D, 3 * D, 1, groups=3), nn.Conv2d(D, D, 1)

    def forward(self, x: Tensor) -> Tensor:
        image = x.transpose(1, 2).unflatten(-1, (2, LENGTH // 2))
        heads = self.fused(image).flatten(2).unflatten(1, (HEADS, 3, D // HEADS)).transpose(-1, -2)
        query, key, value = heads.unbind(2)
        mixed = F.scaled_dot_product_attention(query, key, value).transpose(-1, -2)
        return (image + self.out(mixed.reshape(image.shape))).flatten(2)


def test_a_fused_convolution_is_split_by_rows() -> None:
    torch.manual_seed(0)
    model = captured(ChannelsFirst(), FIXED)
    base = model.run()
    size = D // HEADS
    for place, letter in enumerate("qkv"):
        (finding,) = model.structure.having(f"attn.{letter}")
        starts = [head * 3 * size + place * size for head in range(HEADS)]
        assert finding.parameter == "fused.weight"
        assert finding.rows == tuple((start, start + size) for start in starts)
        change = perturbed(model, finding, own_rows(model, finding), noise)
        assert moved(model, base, change, attention_of(model, finding)) == {letter}
    assert [f.parameter for f in model.structure.having("attn.o")] == ["out.weight"]


class Deep(nn.Module):
    """A stored query that weights the outputs of the layers so far: an attention without projections."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(1, D))
        self.up, self.down, self.head = nn.Linear(D, INNER), nn.Linear(INNER, D), nn.Linear(D, 7)

    def forward(self, x: Tensor) -> Tensor:
        branch = self.down(F.relu(self.up(x)))
        layers = torch.stack([x, x + branch, branch], 2)
        weights = (layers @ self.query.t()).transpose(-1, -2).softmax(-1)
        logits: Tensor = self.head((weights @ layers).squeeze(2))
        return logits


@pytest.mark.slow
def test_a_weighted_mean_of_layers_gives_no_projections() -> None:
    model = captured(Deep(), VALUES)
    assert not any(model.structure.having(f"attn.{letter}") for letter in "qkvo")
    assert roles(model)["ffn.up"] == weights("up") and roles(model)["ffn.down"] == weights("down")


class Filled(nn.Module):
    """Keys are assembled by copies, half from one map and half from another; values are broadcast."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.one, self.two, self.out = (nn.Linear(D, D) for _ in range(4))
        self.value = nn.Linear(D, D // HEADS)

    def forward(self, x: Tensor) -> Tensor:
        size, half = D // HEADS, D // HEADS // 2
        query, one, two = (m(x).unflatten(-1, (HEADS, size)) for m in (self.query, self.one, self.two))
        key = torch.slice_scatter(one, two[..., :half], -1, 0, half)
        value = self.value(x).unsqueeze(2).broadcast_to(query.shape)
        mixed = F.scaled_dot_product_attention(*(t.movedim(2, 1) for t in (query, key, value)))
        return x + self.out(mixed.movedim(1, 2).flatten(2))


@pytest.mark.slow
def test_copies_and_broadcasts_are_followed() -> None:
    model = captured(Filled(), VALUES)
    size, half = D // HEADS, D // HEADS // 2
    assert {f.parameter: f.rows for f in model.structure.having("attn.k")} == {
        "one.weight": tuple((h * size + half, (h + 1) * size) for h in range(HEADS)),
        "two.weight": tuple((h * size, h * size + half) for h in range(HEADS)),
    }
    assert [(f.parameter, f.rows) for f in model.structure.having("attn.v")] == [("value.weight", None)]
    assert set(reasons(model)) == {"one", "two"}


class Reversed(nn.Module):
    """Scores with keys first, so the softmax runs over rows."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.one, self.two, self.three, self.out = (nn.Linear(D, D) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (m(x).unflatten(-1, (HEADS, -1)) for m in (self.one, self.two, self.three))
        if self.kind == "letters":
            weights = torch.einsum("bkhd,bqhd->bhkq", key, query).softmax(-2)
            mixed = torch.einsum("bhkq,bkhd->bqhd", weights, value)
        else:
            query, key, value = (t.transpose(1, 2) for t in (query, key, value))
            scores = key @ query.transpose(-1, -2)
            if self.kind == "rows":
                mixed = scores.softmax(-2).transpose(-1, -2) @ value
            elif self.kind == "turned":
                mixed = (scores.transpose(-1, -2) * 0.3).softmax(-1) @ value
            else:
                mixed = (value.transpose(-1, -2) @ scores.softmax(-2)).transpose(-1, -2)
            mixed = mixed.transpose(1, 2)
        return x + self.out(mixed.flatten(2))


@pytest.mark.full
def test_queries_are_what_the_softmax_does_not_run_over() -> None:
    for kind in ("letters", "rows", "turned", "values first"):
        model = captured(Reversed(kind), VALUES)
        names = {"attn.q": "one", "attn.k": "two", "attn.v": "three", "attn.o": "out"}
        assert roles(model) == {role: weights(name) for role, name in names.items()}, kind


class Routed(nn.Module):
    """Experts as separate modules, chosen by a sigmoid router, beside a shared expert with a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.gate = nn.Linear(D, 3), nn.Linear(D, 1)
        self.ups = nn.ModuleList([nn.Linear(D, INNER) for _ in range(4)])
        self.downs = nn.ModuleList([nn.Linear(INNER, D) for _ in range(4)])

    def forward(self, x: Tensor) -> Tensor:
        scores = torch.sigmoid(self.router(x))
        values, places = scores.topk(2, -1)
        weights = torch.zeros_like(scores).scatter(-1, places, values)
        outputs = [down(F.silu(up(x))) for up, down in zip(self.ups, self.downs, strict=True)]
        routed = sum(weights[..., i : i + 1] * outputs[i] for i in range(3))
        return x + routed + torch.sigmoid(self.gate(x)) * outputs[3]


@pytest.mark.slow
def test_experts_that_are_modules_are_feed_forwards() -> None:
    model = captured(Routed(), VALUES)
    assert roles(model) == {
        "router": weights("router"),
        "ffn.up": weights(*(f"ups.{i}" for i in range(4))),
        "ffn.down": weights(*(f"downs.{i}" for i in range(4))),
    }
    assert "gate on its residual branch" in reasons(model)["gate"]


class Scaled(nn.Module):
    """A stream scaled by a stored vector, and a branch scaled by a number in the same call."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((D,), 0.5))
        self.up, self.down = nn.Linear(D, INNER), nn.Linear(INNER, D)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.add(self.scale * x, self.down(F.relu(self.up(x))), alpha=0.25)
        return torch.addcmul(x, self.scale, self.down(F.relu(self.up(x))))


def test_a_scaled_stream_and_a_weight_used_twice() -> None:
    model = captured(Scaled(), VALUES)
    actual = [(f.role, f.parameter, f.use) for f in model.structure.findings]
    assert actual == [(f"ffn.{n}", f"{n}.weight", use) for use in (0, 1) for n in ("up", "down")]
    assert [(s.roles, s.use) for s in model.structure.sublayers] == [(("ffn.sublayer",), 0), (("ffn.sublayer",), 1)]
    first, second = model.structure.sublayers
    assert second.stream is first.sum and first.normed.op == "placeholder" and second.normed is first.sum
