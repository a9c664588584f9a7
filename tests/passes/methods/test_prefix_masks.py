"""Masks and biases for a prefix, compared with plain torch, and attentions that are written out."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

import graftc
from graftc.runtime.compiled import Compiled
from graftc.specs.errors.diagnostics import GraftError
from graftc.testing import largest_difference, outputs_of, perturb
from graftc.testing.compare import inputs_for
from graftc.testing.families import tiny
from tests.kit.models import adapted

aten = torch.ops.aten
LENGTH, WINDOW = 3, 4


class Attending(nn.Module):
    """A causal attention of two heads over ``[rows, tokens, 8]``, with a mask, a bias or capped scores.

    Args:
        kind: the kind of mask: ``window``, ``relative`` (a table of distances), ``alibi`` or ``capped``.
        fused: whether the attention is a single call.
    """

    def __init__(self, kind: str, fused: bool) -> None:
        super().__init__()
        self.kind, self.fused = kind, fused
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))
        self.table = nn.Embedding(64, 2)

    def mask(self, tokens: Tensor) -> Tensor:
        """Return the mask ``[rows, heads or 1, tokens, tokens]``: booleans for a window, a bias otherwise."""
        count = tokens.shape[1]
        places = torch.arange(count)
        distance = places[:, None] - places[None, :]
        seen = (distance >= 0)[None, None] & tokens.bool()[:, None, None, :]
        if self.kind == "window":
            return seen & (distance < WINDOW)
        bias = torch.zeros(1, 1, count, count, dtype=self.q.weight.dtype)
        if self.kind == "relative":
            bias = self.table(distance.abs().clamp(max=63)).permute(2, 0, 1)[None]
        elif self.kind == "alibi":
            bias = -distance.abs() * torch.tensor([0.5, 0.25], dtype=bias.dtype)[:, None, None]
        return bias.masked_fill(~seen, torch.finfo(bias.dtype).min)

    def heads(self, x: Tensor) -> Tensor:
        """Return ``x`` as ``[rows, heads, tokens, width]``."""
        return x.view(*x.shape[:2], 2, 4).transpose(1, 2)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        """Return the heads' results."""
        if self.fused:
            return scaled_dot_product_attention(q, k, v, attn_mask=mask)
        scores = q @ k.transpose(-1, -2) / 2
        if self.kind == "capped":
            scores = 0.7 * torch.tanh(scores / 0.7)
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
        return torch.softmax(scores, -1) @ v

    def forward(self, inputs_embeds: Tensor, attention_mask: Tensor) -> Tensor:
        """Map ``[rows, tokens, 8]`` and a mask of tokens ``[rows, tokens]`` to ``[rows, tokens, 8]``."""
        q, k, v = (self.heads(p(inputs_embeds)) for p in (self.q, self.k, self.v))
        out = self.attend(q, k, v, self.mask(attention_mask))
        result: Tensor = self.o(out.transpose(1, 2).flatten(2))
        return result


def example() -> dict[str, Tensor]:
    """Two rows, one of them with padding at the end."""
    mask = torch.ones(2, 9, dtype=torch.int64)
    mask[1, 7:] = 0
    return {"inputs_embeds": torch.randn(2, 9, 8, dtype=torch.float64), "attention_mask": mask}


def prefixed(kind: str, fused: bool, adapt: Any = None, **fields: Any) -> tuple[Attending, Compiled, dict[str, Tensor]]:
    """The model in float64, its form with a perturbed prefix, and inputs."""
    torch.manual_seed(4)
    model, inputs = Attending(kind, fused).double().eval(), example()
    entries = adapt or [{"method": "prefix", "length": LENGTH, **fields}]
    return model, adapted(model, *entries, inputs=inputs, noise=0.5), inputs


def expected(model: Attending, tensors: dict[str, Tensor], inputs: dict[str, Tensor], visible: bool) -> Tensor:
    """Return the output if the prefix is seen like tokens in front: the model's own mask for ``LENGTH`` more tokens."""
    x, tokens = inputs["inputs_embeds"], inputs["attention_mask"]
    rows = x.shape[0]
    mask = model.mask(torch.cat([tokens.new_ones(rows, LENGTH), tokens], 1))[:, :, LENGTH:]
    if visible and mask.dtype == torch.bool:
        mask = torch.cat([torch.ones_like(mask[..., :LENGTH]), mask[..., LENGTH:]], -1)
    q, k, v = (model.heads(p(x)) for p in (model.q, model.k, model.v))
    prefix = [
        model.heads(tensors[f"graftc.prefix.attn.{part}"][None]).expand(rows, -1, -1, -1) for part in ("keys", "values")
    ]
    out = model.attend(q, torch.cat([prefix[0], k], 2), torch.cat([prefix[1], v], 2), mask)
    result: Tensor = model.o(out.transpose(1, 2).flatten(2))
    return result


@pytest.mark.full
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "written out"])
@pytest.mark.parametrize(
    ("kind", "window"),
    [("window", "visible"), ("window", "masked"), ("relative", "visible"), ("alibi", "masked"), ("capped", "visible")],
)
def test_a_prefix_is_seen_as_tokens_would_be(kind: str, fused: bool, window: str) -> None:
    """Windows hide it or not, tables of distances and ALiBi continue in front of the text, and a cap applies to it."""
    model, compiled, inputs = prefixed(kind, fused, window=window)
    actual = compiled(**inputs)
    target = expected(model, dict(compiled.adapter_state_dict()), inputs, window == "visible")
    torch.testing.assert_close(actual, target, rtol=1e-10, atol=1e-10)
    if kind == "window":
        other = expected(model, dict(compiled.adapter_state_dict()), inputs, window != "visible")
        assert largest_difference([actual], [other]) > 1e-3


@pytest.mark.full
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "written out"])
@pytest.mark.parametrize(("kind", "window"), [("window", "visible"), ("window", "masked"), ("relative", "visible")])
def test_two_prefixes_are_one_longer(kind: str, fused: bool, window: str) -> None:
    """A mask that has been extended once is extended again."""
    both = [{"method": "prefix", "length": n, "name": name, "window": window} for n, name in ((1, "near"), (2, "far"))]
    _, two, inputs = prefixed(kind, fused, both)
    _, one, _ = prefixed(kind, fused, window=window)
    tensors = two.adapter_state_dict()
    one.load_adapter_state_dict(
        {
            f"graftc.prefix.attn.{part}": torch.cat([tensors[f"graftc.{n}.attn.{part}"] for n in ("far", "near")])
            for part in ("keys", "values")
        }
    )
    torch.testing.assert_close(two(**inputs), one(**inputs), rtol=1e-10, atol=1e-10)


class Masked(nn.Module):
    """A causal attention of four heads that is written out, with its mask in one of the forms that models use.

    Args:
        way: the way in which keys are hidden.
        fixed: whether the model accepts only nine tokens.
    """

    def __init__(self, way: str, fixed: bool) -> None:
        super().__init__()
        self.way, self.fixed = way, fixed
        self.table, self.mix = nn.Embedding(50, 32), nn.Linear(9, 9)
        self.q, self.k, self.v, self.o = (nn.Linear(32, 32) for _ in range(4))
        self.register_buffer("triangle", torch.ones(64, 64, dtype=torch.bool).tril())

    def scores(self, scores: Tensor, tokens: Tensor) -> Tensor:
        """Return the scores ``[batch, heads, queries, keys]`` with the mask applied."""
        rows, keys = scores.shape[2:]
        places, low = torch.arange(keys), torch.finfo(scores.dtype).min
        seen = (places <= torch.arange(keys - rows, keys)[:, None]) & tokens.bool()[:, None, None, :]
        kept = seen.to(scores.dtype)
        if self.way == "distances":
            return (scores + places * 0.3).masked_fill(~seen, low)
        if self.way == "true is seen":
            return torch.where(seen, scores, torch.tensor(low))
        if self.way == "true is hidden":
            return torch.where(~seen, torch.tensor(low), scores)
        if self.way == "bool of a bias":
            return scores.masked_fill(torch.where(seen, 0.0, low).to(torch.bool), low)
        if self.way == "buffer":
            visible = self.triangle[keys - rows : keys, :keys] & tokens.bool()[:, None, None, :]
            return torch.where(visible, scores, torch.full([], low))
        if self.way == "bias":
            return scores + torch.zeros(1, 1, rows, keys).masked_fill(~seen, low)
        if self.way == "bias of -10,000":
            return scores + (1 - kept) * -1e4
        return scores * kept - 1e4 * (1 - kept) if self.way == "product" else scores.masked_fill(~seen, low)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, front: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Return ``[batch, tokens, 32]``; ``front`` contains keys and values to put before those of the text."""
        x = self.table(input_ids)
        if self.fixed:
            x = x + self.mix(x.transpose(1, 2)).transpose(1, 2)
        q, k, v = (m(x).unflatten(-1, (4, 8)).transpose(1, 2) for m in (self.q, self.k, self.v))
        if front is not None:
            k, v = torch.cat([front[0], k], 2), torch.cat([front[1], v], 2)
            attention_mask = torch.cat([attention_mask.new_ones(len(x), LENGTH), attention_mask], 1)
        scores = self.scores(q @ k.transpose(-1, -2) / math.sqrt(8), attention_mask)
        outputs: Tensor = x + self.o((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
        return outputs


WAYS = ("filled", "true is seen", "true is hidden", "bool of a bias", "buffer", "bias", "bias of -10,000")


@pytest.mark.slow
@pytest.mark.sample(
    "filled-fixed", "true is seen-fixed", "bool of a bias-varying", "distances-varying", "distances-fixed"
)
@pytest.mark.parametrize("fixed", [False, True], ids=["varying", "fixed"])
@pytest.mark.parametrize("way", [*WAYS, "product", "distances"])
def test_what_true_says_in_a_mask(way: str, fixed: bool) -> None:
    """A prefix acts like keys and values in front, whichever bool hides a key; a bias unknown there raises GC017."""
    torch.manual_seed(0)
    model = Masked(way, fixed).eval()
    ids = torch.randint(0, 50, (3, 9))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    given = {"input_ids": ids, "attention_mask": mask}
    spec = {"adapt": [{"method": "prefix", "length": LENGTH, "target": {"role": "attn"}}]}
    if fixed and way in ("distances", "product"):
        with pytest.raises(GraftError) as caught:
            graftc.compile(spec, model, given)
        assert caught.value.code == "GC017"
        return
    compiled = graftc.compile(spec, model, given).eval()
    perturb(compiled)
    tensors = [t for _, t in sorted(compiled.adapter_state_dict().items())]
    keys, values = (t.view(1, LENGTH, 4, 8).transpose(1, 2).expand(3, -1, -1, -1) for t in tensors)
    with torch.no_grad():
        expected = model(ids, mask, (keys, values))
        torch.testing.assert_close(compiled(**given), expected, atol=1e-5, rtol=1e-5)
        assert largest_difference([model(**given)], [expected]) > 1e-2


@pytest.mark.slow
@pytest.mark.sample("llama", "t5")
@pytest.mark.parametrize("family", ["llama", "t5", "mixtral"])
def test_layers_share_one_mask(family: str) -> None:
    """The mask is extended as often as the model creates it, and where it does, instead of once per layer."""

    def masks(compiled: Compiled, base: bool) -> list[str]:
        """Return the module of each mask."""
        graph = compiled.compilation.program("eval", "base" if base else "adapted").graph
        calls = graph.find_nodes(op="call_function", target=aten.scaled_dot_product_attention.default)
        return sorted(n.meta["module"] for n in {n.args[3] for n in calls if n.users})

    compiled = graftc.compile({"adapt": [{"method": "prefix", "length": LENGTH, "window": "masked"}]}, tiny(family))
    assert masks(compiled, False) == masks(compiled, True)


@pytest.mark.full
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "t5"])
def test_written_out_is_fused(family: str) -> None:
    """A model gives the same outputs when loaded with either implementation."""
    outputs = []
    for implementation in ("sdpa", "eager"):
        model = tiny(family, attn_implementation=implementation)
        compiled = graftc.compile({"adapt": [{"method": "prefix", "length": LENGTH}]}, model).eval()
        perturb(compiled, 0.3)
        outputs.append(outputs_of(compiled, inputs_for(compiled)))
    assert largest_difference(*outputs) <= 1e-5


@pytest.mark.full
@pytest.mark.parametrize("positions", ["unshifted", "shifted"])
def test_positions_that_are_given(positions: str) -> None:
    """A window's mask does not depend on whether the model or the caller counts positions."""
    config: dict[str, Any] = {"sliding_window": WINDOW, "max_position_embeddings": 64}
    spec = {"adapt": [{"method": "prefix", "length": LENGTH, "positions": positions, "window": "masked"}]}
    compiled = graftc.compile(spec, tiny("mixtral", **config)).eval()
    inputs = inputs_for(compiled)
    rows, tokens = inputs["input_ids"].shape
    given = torch.arange(tokens).expand(rows, tokens)
    assert (
        largest_difference(outputs_of(compiled, inputs), outputs_of(compiled, {**inputs, "position_ids": given}))
        <= 1e-5
    )


@pytest.mark.full
def test_a_mask_that_is_given() -> None:
    """A mask of pairs passed in a call says nothing about keys in front, so every query sees the prefix."""
    compiled = graftc.compile({"adapt": [{"method": "prefix", "length": LENGTH}]}, tiny("llama")).eval()
    inputs = inputs_for(compiled)
    rows, tokens = inputs["input_ids"].shape
    inputs["attention_mask"] = torch.ones_like(inputs["attention_mask"])
    pairs = torch.ones(tokens, tokens, dtype=torch.bool).tril().expand(rows, 1, -1, -1)
    given = outputs_of(compiled, {**inputs, "attention_mask": pairs})
    assert largest_difference(given, outputs_of(compiled, inputs)) <= 1e-5
