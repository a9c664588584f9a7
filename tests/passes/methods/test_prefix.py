"""Prefix tuning: its contract, and equality with plain torch."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

import graftc
from graftc.runtime.compiled import Compiled
from graftc.specs.errors.diagnostics import GraftError
from graftc.testing import DeploymentContract, MethodContract, largest_difference, outputs_of, perturb, same_bits
from graftc.testing.compare import inputs_for
from graftc.testing.families import tiny
from tests.kit.models import adapted

aten = torch.ops.aten


class TestPrefix(MethodContract):
    """Plain keys and values in encoders, decoders, both, and with heads that share keys."""

    adaptation: ClassVar[dict[str, Any]] = {"method": "prefix", "length": 3}


class TestReparameterized(MethodContract):
    """Keys and values that a network computes in training."""

    variant = True
    adaptation: ClassVar[dict[str, Any]] = {
        "method": "prefix",
        "length": 3,
        "reparameterization": {"hidden": 7, "width": 5},
        "dropout": 0.1,
    }


class TestPTuningV2(MethodContract):
    """P-tuning v2, with the text's positions after the prefix."""

    variant = True
    adaptation: ClassVar[dict[str, Any]] = {"method": "p_tuning_v2", "length": 4}


class TestDeployed(DeploymentContract):
    """Export and compilation of a shifted prefix."""

    adaptation: ClassVar[dict[str, Any]] = {"method": "prefix", "length": 3, "positions": "shifted"}
    families = ("gpt2", "llama", "bert", "t5")


class Plain(nn.Module):
    """An attention with grouped heads, 4 of queries and 2 of keys, masked in one of several ways."""

    def __init__(self, masked: str) -> None:
        super().__init__()
        self.masked = masked
        self.q, self.k, self.v = nn.Linear(12, 20), nn.Linear(12, 10), nn.Linear(12, 6)
        self.o = nn.Linear(12, 9)

    def heads(self, x: Tensor, projection: nn.Module, count: int) -> Tensor:
        """Return the projection of ``x`` as ``[batch, heads, sequence, width]``."""
        projected: Tensor = projection(x)
        return projected.unflatten(-1, (count, -1)).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[batch, sequence, 12]`` to ``[batch, sequence, 9]``."""
        q, k, v = self.heads(x, self.q, 4), self.heads(x, self.k, 2), self.heads(x, self.v, 2)
        k, v = (t.repeat_interleave(2, 1) for t in (k, v))
        length = x.shape[1]
        mask, causal = None, False
        if self.masked == "causal":
            causal = True
        elif self.masked == "bool":
            mask = torch.ones(length, length, dtype=torch.bool).tril()
        elif self.masked == "float":
            mask = torch.linspace(-1, 1, length, dtype=x.dtype)[None, :] * torch.ones(length, 1, dtype=x.dtype)
        out = scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
        return self.o(out.transpose(1, 2).flatten(2))


def prefixed(masked: str, **fields: Any) -> tuple[Plain, Compiled, Tensor]:
    """`Plain` in float64, its form with a perturbed prefix of 3, and an input."""
    torch.manual_seed(2)
    model, x = Plain(masked).double().eval(), torch.randn(3, 7, 12, dtype=torch.float64)
    return model, adapted(model, {"method": "prefix", "length": 3, **fields}, inputs={"x": x}, noise=0.3), x


@pytest.mark.full
@pytest.mark.parametrize("masked", ["none", "causal", "bool"])
def test_a_prefix_is_a_mixture(masked: str) -> None:
    """The output is ``(1 - l) Attn(q, K, V) + l Attn(q, P, U)``, with ``l`` the prefix's share in the softmax's sum."""
    model, compiled, x = prefixed(masked)
    tensors = compiled.adapter_state_dict()
    keys, values = (tensors[f"graftc.prefix.attn.{part}"] for part in ("keys", "values"))
    assert keys.shape == (3, 10) and values.shape == (3, 6)
    q = model.heads(x, model.q, 4)
    k, v = (model.heads(x, p, 2).repeat_interleave(2, 1) for p in (model.k, model.v))
    p, u = (model.heads(t[None], nn.Identity(), 2).repeat_interleave(2, 1) for t in (keys, values))
    length = x.shape[1]
    scores, prefix_scores = (q @ t.transpose(-1, -2) / math.sqrt(5) for t in (k, p))
    if masked != "none":
        scores = scores.masked_fill(~torch.ones(length, length, dtype=torch.bool).tril(), -torch.inf)
    share = prefix_scores.exp().sum(-1, keepdim=True)
    share = share / (share + scores.exp().sum(-1, keepdim=True))
    mixed = (1 - share) * (scores.softmax(-1) @ v) + share * (prefix_scores.softmax(-1) @ u)
    expected = model.o(mixed.transpose(1, 2).flatten(2))
    torch.testing.assert_close(compiled(x), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.slow
def test_a_bias_for_one_length_is_refused() -> None:
    """The bias has no values for keys in front of the text."""
    with pytest.raises(GraftError, match="the bias of attn for keys in front of the text") as caught:
        prefixed("float")
    assert caught.value.code == "GC017"


@pytest.mark.slow
def test_a_causal_attention_without_a_mask_stays_one() -> None:
    """The fused kernel still creates its own mask."""
    _, compiled, _ = prefixed("causal")
    (node,) = (
        n
        for n in compiled.program("eval").graph.nodes
        if n.target is aten.scaled_dot_product_attention.default and len(n.users)
    )
    assert node.args[5] is True and node.args[3] is None


@pytest.mark.full
@pytest.mark.parametrize("family", ["gpt2", "llama", "t5", "vit"])
def test_zeros_are_not_the_base(family: str) -> None:
    """Keys of zeros still take part in the softmax."""
    model = tiny(family)
    compiled = graftc.compile({"adapt": [{"method": "prefix", "length": 3}]}, model).eval()
    compiled.load_adapter_state_dict({n: torch.zeros_like(t) for n, t in compiled.adapter_state_dict().items()})
    inputs = inputs_for(compiled)
    assert largest_difference(outputs_of(compiled, inputs), outputs_of(model, inputs)) > 1e-3


@pytest.mark.full
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "t5"])
def test_a_network_is_ejected(family: str) -> None:
    """The deployed model has only the keys and values, and gives the same outputs."""
    spec = {"adapt": [{"method": "prefix", "length": 3, "reparameterization": {"hidden": 8}}]}
    compiled = graftc.compile(spec, tiny(family)).eval()
    perturb(compiled, 0.2)
    inputs = inputs_for(compiled)
    partial = compiled.merge_partially()
    deployed = partial.compiled.eval()
    assert {n.rpartition(".")[2] for n in deployed.adapter_state_dict()} == {"keys", "values"}
    assert deployed.report.trainable_parameters == compiled.report.deployed_parameters
    assert largest_difference(outputs_of(deployed, inputs), outputs_of(compiled, inputs)) <= 2e-6


@pytest.mark.full
def test_the_text_keeps_its_positions_or_not() -> None:
    """Shifting changes learned and rotary positions; on T5, whose bias depends on distances, it changes nothing."""
    for family, differs in (("bert", True), ("gpt2", True), ("llama", True), ("t5", False), ("vit", False)):
        outputs = []
        for positions in ("unshifted", "shifted"):
            compiled = graftc.compile(
                {"adapt": [{"method": "prefix", "length": 3, "positions": positions}]}, tiny(family)
            ).eval()
            outputs.append(outputs_of(compiled, inputs_for(compiled)))
        assert (largest_difference(*outputs) > 1e-3) == differs


@pytest.mark.full
@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_checkpointing(family: str) -> None:
    """A recomputed layer with a prefix gives the same gradients to the bit, whether checkpointing is requested in the
    spec or later, as by a trainer.
    """
    grads = []
    for checkpoint in (None, "layers", "later"):
        spec: dict[str, Any] = {"adapt": [{"method": "prefix", "length": 3, "dropout": 0.2, "window": "masked"}]}
        if checkpoint == "layers":
            spec["checkpoint"] = "layers"
        compiled: Any = graftc.compile(spec, tiny(family), seed=0).train()
        if checkpoint == "later":
            compiled.gradient_checkpointing_enable()
        assert all(block._graftc.checkpointing == (checkpoint is not None) for block in compiled.blocks.values())
        torch.manual_seed(5)
        compiled(**inputs_for(compiled))[0].square().mean().backward()
        grads.append([p.grad for p in compiled.parameters() if p.grad is not None])
    assert grads[0] and same_bits(grads[0], grads[1]) and same_bits(grads[0], grads[2])


@pytest.mark.full
@pytest.mark.parametrize("family", ["gpt2", "bert", "roberta"])
def test_texts_that_leave_no_room(family: str) -> None:
    """A text that fits the table of positions, but not after the prefixes, is refused; a text that fits there runs."""
    changes = {"n_positions": 20} if family == "gpt2" else {"max_position_embeddings": 20}
    model: Any = tiny(family, **changes)
    two = [{"method": "prefix", "name": n, "length": p, "positions": "shifted"} for n, p in (("near", 2), ("far", 1))]
    compiled = graftc.compile({"adapt": two}, model).eval()
    most = 17 - (2 if family == "roberta" else 0)  # RoBERTa counts from 2
    ids = torch.full((1, most + 1), 5)
    mask = torch.ones_like(ids)
    model(input_ids=ids, attention_mask=mask)
    compiled(input_ids=ids[:, :-1], attention_mask=mask[:, :-1])
    with pytest.raises(GraftError, match=r"'near' uses 2 of the 20 positions of .*(wpe|position)") as caught:
        compiled(input_ids=ids, attention_mask=mask)
    assert caught.value.code == "GC020"


@pytest.mark.full
def test_stacked_prefixes_are_one_longer() -> None:
    """The second prefix stands before the first."""
    model, _, x = prefixed("bool")
    spec = {"adapt": [{"method": "prefix", "length": 3, "name": n} for n in ("near", "far")]}
    two = graftc.compile(spec, model, {"x": x}).eval()
    perturb(two, 0.3)
    one = graftc.compile({"adapt": [{"method": "prefix", "length": 6}]}, model, {"x": x}).eval()
    tensors = two.adapter_state_dict()
    one.load_adapter_state_dict(
        {
            f"graftc.prefix.attn.{part}": torch.cat([tensors[f"graftc.{n}.attn.{part}"] for n in ("far", "near")])
            for part in ("keys", "values")
        }
    )
    torch.testing.assert_close(two(x), one(x), rtol=1e-10, atol=1e-10)


@pytest.mark.full
def test_what_cannot_have_a_prefix() -> None:
    """Each case has its code: no attention, no room in the table, a window of one size, and keys without columns."""
    cases: list[tuple[Any, dict[str, Any], str]] = [
        (nn.Sequential(nn.Linear(4, 4)), {}, "GC015"),
        (tiny("bert"), {"positions": "shifted", "length": 10_000}, "GC020"),
        (
            tiny("gpt2"),
            {"positions": "shifted", "overrides": [{"layers": 0, "length": 2}]},
            "GC020",
        ),
    ]
    for model, fields, code in cases:
        example = {"input": torch.randn(2, 4)} if isinstance(model, nn.Sequential) else None
        with pytest.raises(GraftError) as caught:
            graftc.compile({"adapt": [{"method": "prefix", "length": 3, **fields}]}, model, example)
        assert caught.value.code == code

    class Rolled(Plain):
        """An attention whose keys are other columns at the first position."""

        def heads(self, x: Tensor, projection: nn.Module, count: int) -> Tensor:
            projected = super().heads(x, projection, count)
            return torch.cat([projected[:, :, :1].flip(-1), projected[:, :, 1:]], 2)

    for plain, field, message in ((Plain("float"), "masked", "window"), (Rolled("none"), "visible", "head by head")):
        with pytest.raises(GraftError, match=message) as caught:
            spec = {"adapt": [{"method": "prefix", "length": 3, "window": field}]}
            graftc.compile(spec, plain, {"x": torch.randn(3, 7, 12)})
        assert caught.value.code == "GC017"
