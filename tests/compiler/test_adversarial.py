"""Deliberately adversarial architectures: each place is resolved correctly, or reported as unresolved."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graftc.compiler.capture.signature import Axis
from graftc.records.roles import Finding
from tests.compiler.perturbation import attention_of, moved, noise, own_rows, perturbed, stored_rows
from tests.compiler.structure_cases import VALUES, Captured, captured
from tests.compiler.structure_models import HEADS, INNER, D

TRICKS = ("einsum", "lerp", "twice", "functional", "dropout")
VARIANTS = [(), *((t,) for t in TRICKS), TRICKS]


class Block(nn.Module):
    """One layer; each trick changes how it is written."""

    def __init__(self, tricks: tuple[str, ...]) -> None:
        super().__init__()
        self.tricks = tricks
        self.norm, self.second_norm = nn.LayerNorm(D), nn.LayerNorm(D)
        self.query, self.key, self.value, self.out = (nn.Linear(D, D) for _ in range(4))
        self.up, self.down = nn.Linear(D, INNER), nn.Linear(INNER, D)
        self.store = nn.ModuleList([nn.Linear(D, D), nn.Linear(D, D)])

    def heads(self, x: Tensor, linear: nn.Linear) -> Tensor:
        if "einsum" in self.tricks:
            weight = linear.weight.view(HEADS, D // HEADS, D)
            projected = torch.einsum("bld,hcd->blhc", x, weight) + linear.bias.view(HEADS, -1)
            return F.dropout(projected, 0.1, True) if "dropout" in self.tricks else projected
        projected = linear(x)
        if "dropout" in self.tricks:
            projected = F.dropout(projected, 0.1, True)
        return projected.view(*x.shape[:2], HEADS, D // HEADS)

    def values(self, x: Tensor) -> Tensor:
        if "functional" not in self.tricks:
            return self.heads(x, self.value)
        projected = F.linear(x, self.store[0].weight, self.store[0].bias)  # type: ignore[arg-type]
        if "dropout" in self.tricks:
            projected = F.dropout(projected, 0.1, True)
        return projected.view(*x.shape[:2], HEADS, D // HEADS)

    def attend(self, x: Tensor) -> Tensor:
        query, value = self.heads(x, self.query), self.values(x)
        key = self.heads(x, self.query if "twice" in self.tricks else self.key)
        if "einsum" in self.tricks:
            weights = torch.einsum("blhc,bmhc->bhlm", query, key).mul(0.3).softmax(-1)
            mixed = torch.einsum("bhlm,bmhc->blhc", weights, value)
        else:
            query, key, value = (t.transpose(1, 2) for t in (query, key, value))
            mixed = F.scaled_dot_product_attention(query, key, value).transpose(1, 2)
        if "functional" in self.tricks:
            return F.linear(mixed.flatten(2), self.store[1].weight)  # type: ignore[arg-type]
        if "einsum" in self.tricks:
            return torch.einsum("blhc,dhc->bld", mixed, self.out.weight.view(D, HEADS, D // HEADS))
        projected: Tensor = self.out(mixed.flatten(2))
        return projected

    def join(self, x: Tensor, branch: Tensor) -> Tensor:
        return torch.lerp(x, branch, 0.4) if "lerp" in self.tricks else x + branch

    def forward(self, x: Tensor) -> Tensor:
        x = self.join(x, self.attend(self.norm(x)))
        y = self.second_norm(x)
        inner = F.silu(self.up(y))
        return self.join(x, self.down(inner * self.up(y) if "twice" in self.tricks else inner))


class Adversarial(nn.Module):
    def __init__(self, tricks: tuple[str, ...]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(tricks) for _ in range(2)])
        self.head = nn.Linear(D, 7)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(x)
        return logits


def adversarial(tricks: tuple[str, ...]) -> Captured:
    torch.manual_seed(0)
    return captured(Adversarial(tricks), VALUES)


def first_attention(model: Captured) -> Any:
    return next(iter(model.flow.attentions.values()))


def claims(model: Captured, attention: Any) -> dict[tuple[str, int], set[str]]:
    """Map parameter and row to the operands of an attention that the findings claim for them."""
    claimed: dict[tuple[str, int], set[str]] = {}
    for letter in "qkv":
        for finding in model.structure.having(f"attn.{letter}"):
            if finding.parameter is not None and attention_of(model, finding) is attention:
                for row in own_rows(model, finding).tolist():
                    claimed.setdefault((finding.parameter, row), set()).add(letter)
    return claimed


def truth(model: Captured, attention: Any) -> dict[tuple[str, int], set[str]]:
    """Map each row of each stored matrix to the operands that it changes, for an attention in the first layer."""
    base = model.run()
    changing: dict[tuple[str, int], set[str]] = {}
    for node, linear in model.flow.linears.items():
        if not model.flow.is_above(node, attention.node) or linear.parameter is None:
            continue
        probe = Finding("attn.q", "linear", node, "", linear.parameter, None, None, "", 0, "")  # type: ignore[arg-type]
        for row in range(stored_rows(model, probe)):
            change = perturbed(model, probe, torch.tensor([row]), noise)
            letters = moved(model, base, change, attention)
            if letters:
                changing.setdefault((linear.parameter, row), set()).update(letters)
    return changing


def unresolved_parameters(model: Captured) -> set[str]:
    """Return the parameters that unresolved entries are about."""
    modules = {u.module for u in model.structure.unresolved if u.reason}
    nodes = [n for n in model.flow.linears if n.meta["module"] in modules]
    return {str(p.target) for n in nodes for p in model.flow.parameters(model.flow.linears[n].weight)}


def check(model: Captured) -> None:
    """Check that every row that changes an operand of the first attention is claimed for exactly that, or reported."""
    attention = first_attention(model)
    claimed, real = claims(model, attention), truth(model, attention)
    reported = unresolved_parameters(model)
    for place, letters in claimed.items():
        assert letters == real.get(place), place
    for (parameter, row), letters in real.items():
        assert claimed.get((parameter, row)) == letters or parameter in reported, (parameter, row)


def by_role(model: Captured, layer: int = 0) -> dict[str, set[tuple[str | None, Any]]]:
    places: dict[str, set[tuple[str | None, Any]]] = {}
    for f in model.structure.findings:
        if f.layer == layer and f.parameter is not None and f.kind != "norm":
            places.setdefault(f.role, set()).add((f.parameter, f.rows))
    return places


@pytest.mark.full
@pytest.mark.parametrize("tricks", VARIANTS, ids="+".join)
def test_claimed_rows_are_what_moves(tricks: tuple[str, ...]) -> None:
    check(adversarial(tricks))


@pytest.mark.full
@pytest.mark.parametrize("tricks", VARIANTS, ids="+".join)
def test_all_tricks_are_resolved(tricks: tuple[str, ...]) -> None:
    model = adversarial(tricks)
    for layer in (0, 1):
        names = {"attn.q": "query", "attn.k": "key", "attn.v": "value", "attn.o": "out"}
        names |= {"ffn.up": "up", "ffn.down": "down"}
        if "twice" in tricks:
            names |= {"attn.k": "query", "ffn.gate": "up"}
        if "functional" in tricks:
            names |= {"attn.v": "store.0", "attn.o": "store.1"}
        expected = {role: {(f"blocks.{layer}.{name}.weight", None)} for role, name in names.items()}
        assert by_role(model, layer) == expected
    assert model.structure.unresolved == ()
    assert [s.roles for s in model.structure.sublayers] == [("attn.sublayer",), ("ffn.sublayer",)] * 2


@pytest.mark.full
@pytest.mark.parametrize("tricks", VARIANTS, ids="+".join)
def test_sublayers_join_as_the_model_does(tricks: tuple[str, ...]) -> None:
    model = adversarial(tricks)
    values = model.run()
    for sublayer in model.structure.sublayers:
        stream, branch = values[sublayer.stream], values[sublayer.branch]
        expected = torch.lerp(stream, branch, 0.4) if "lerp" in tricks else stream + branch
        torch.testing.assert_close(values[sublayer.sum], expected)


@pytest.mark.slow
def test_the_check_sees_a_wrong_claim() -> None:
    model = adversarial(())
    attention = first_attention(model)
    claimed, real = claims(model, attention), truth(model, attention)
    assert claimed == real
    parameter = next(p for p, _ in claimed)
    assert real[parameter, 3] == {"q"}
    claimed[parameter, 3] = {"k"}
    assert claimed != real


# --- what cannot be resolved is reported -----------------------------------------------------------------------


class Hidden(nn.Module):
    """Weights computed in the forward pass, per-head weights in a 3-D tensor, or gates that depend on data, by kind."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.query, self.key, self.value, self.out = (nn.Linear(D, D, bias=False) for _ in range(4))
        self.low, self.high = nn.Parameter(torch.randn(D, 3)), nn.Parameter(torch.randn(3, D))
        self.heads = nn.Parameter(torch.randn(HEADS, D, D // HEADS))
        self.gate = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.query(x), self.key(x), self.value(x)
        if self.kind == "product":
            query = F.linear(x, self.query.weight + self.low @ self.high)
        if self.kind == "permuted":
            query = F.linear(x, self.query.weight.flip(0))
        query, key, value = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in (query, key, value))
        if self.kind == "per head":
            value = x.unsqueeze(1) @ self.heads
        mixed = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        if self.kind == "gated":
            return torch.lerp(x, self.out(mixed), torch.sigmoid(self.gate(x)))
        if self.kind == "feature map":
            weights = key.softmax(-2).transpose(-1, -2) @ value
            mixed = (query.softmax(-1) @ weights).transpose(1, 2).flatten(2)
        return x + self.out(mixed)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["product", "permuted", "per head", "gated"])
def test_hidden_weights_are_right_or_reported(kind: str) -> None:
    torch.manual_seed(0)
    model = captured(Hidden(kind), VALUES)
    check(model)
    reasons = {u.module: u.reason for u in model.structure.unresolved}
    if kind == "product":
        assert "computed from low and high and query.weight" in reasons[""]
    if kind == "per head":
        assert "a 3-D weight" in reasons[""]
        assert not model.structure.having("experts")
    if kind == "permuted":
        assert not reasons


@pytest.mark.slow
def test_a_softmax_that_is_no_attention_makes_no_mixer() -> None:
    model = captured(Hidden("feature map"), VALUES)
    assert not model.structure.having("mixer") and not model.structure.having("attn.v")
    assert {u.module for u in model.structure.unresolved} == {"query", "key", "value", "out"}


# --- PyTorch's own attention -----------------------------------------------------------------------------------

OTHER = Axis("y", torch.float32, ("batch", "target_sequence", D))


class Own(nn.Module):
    """`nn.MultiheadAttention` in a residual block."""

    def __init__(self, *, cross: bool, batch_first: bool, kdim: int | None = None, need_weights: bool = True) -> None:
        super().__init__()
        self.cross, self.batch_first, self.need_weights = cross, batch_first, need_weights
        self.memory = nn.Linear(D, kdim or D)
        self.attention = nn.MultiheadAttention(D, HEADS, batch_first=batch_first, kdim=kdim, vdim=kdim)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        other = self.memory(y) if self.cross else x
        if not self.batch_first:
            x, other = x.transpose(0, 1), other.transpose(0, 1)
        mixed: Tensor = x + self.attention(x, other, other, need_weights=self.need_weights)[0]
        return mixed if self.cross else mixed + y.sum()


@pytest.mark.full
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize(("cross", "kdim"), [(False, None), (True, None), (True, 28)])
def test_multihead_attention(cross: bool, kdim: int | None, batch_first: bool, need_weights: bool) -> None:
    torch.manual_seed(0)
    model = captured(Own(cross=cross, batch_first=batch_first, kdim=kdim, need_weights=need_weights), [*VALUES, OTHER])
    actual = {f.role.rpartition("attn.")[2]: (f.parameter, f.rows) for f in model.structure.having("attn.q")}
    actual |= {
        f.role.rpartition("attn.")[2]: (f.parameter, f.rows) for x in "kvo" for f in model.structure.having(f"attn.{x}")
    }
    if kdim is None:
        runs = {letter: ((i * D, (i + 1) * D),) for i, letter in enumerate("qkv")}
        expected: dict[str, Any] = {letter: ("attention.in_proj_weight", rows) for letter, rows in runs.items()}
    else:
        expected = {letter: (f"attention.{letter}_proj_weight", None) for letter in "qkv"}
    assert actual == expected | {"o": ("attention.out_proj.weight", None)}
    assert ("cross" in next(iter(model.structure.having("attn.q"))).role) == cross
    if not cross:
        check(model)


@pytest.mark.full
@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_transformer_encoder_layer(norm_first: bool, batch_first: bool) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(D, HEADS, INNER, batch_first=batch_first, norm_first=norm_first)
    model = captured(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), named("src"))
    check(model)
    for i in (0, 1):
        assert by_role(model, i) == packed(f"layers.{i}", "self_attn") | feed_forward(f"layers.{i}")
    for sublayer in model.structure.sublayers:
        assert (sublayer.post_norm is None) == norm_first
        assert (sublayer.normed is sublayer.stream) != norm_first


@pytest.mark.full
@pytest.mark.parametrize("norm_first", [True, False])
def test_transformer_decoder_layer(norm_first: bool) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerDecoderLayer(D, HEADS, INNER, batch_first=True, norm_first=norm_first)
    memory = Axis("memory", torch.float32, ("batch", "target_sequence", D))
    model = captured(nn.TransformerDecoder(layer, 2), [*named("tgt"), memory])
    expected = packed("layers.0", "self_attn") | feed_forward("layers.0")
    crossing = {role.replace("attn", "cross.attn"): w for role, w in packed("layers.0", "multihead_attn").items()}
    assert by_role(model) == {f"decoder.{role}": w for role, w in (expected | crossing).items()}
    assert [s.roles for s in model.structure.sublayers][:3] == [
        ("decoder.attn.sublayer",),
        ("decoder.cross.attn.sublayer",),
        ("decoder.ffn.sublayer",),
    ]


def named(name: str) -> list[Axis]:
    return [Axis(name, VALUES[0].dtype, VALUES[0].axes)]


def packed(layer: str, name: str) -> dict[str, set[tuple[str | None, Any]]]:
    weight = f"{layer}.{name}.in_proj_weight"
    rows = {f"attn.{letter}": {(weight, ((i * D, (i + 1) * D),))} for i, letter in enumerate("qkv")}
    return {**rows, "attn.o": {(f"{layer}.{name}.out_proj.weight", None)}}


def feed_forward(layer: str) -> dict[str, set[tuple[str | None, Any]]]:
    return {"ffn.up": {(f"{layer}.linear1.weight", None)}, "ffn.down": {(f"{layer}.linear2.weight", None)}}
