"""Certificates of these methods can fail: every wrong fold is caught at its site."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import graftc
from graftc.passes.core.ops.circulants import matrix_of
from graftc.passes.core.weights.folds import FoldStep, WeightFold
from graftc.passes.core.weights.weight_slice import WeightSlice
from graftc.passes.methods.c3a import C3AMethod
from graftc.passes.methods.gralora import GraLoRAMethod
from graftc.passes.methods.hira import HiRAMethod
from graftc.passes.methods.ia3 import IA3Method
from graftc.passes.methods.loha import LoHaMethod
from graftc.passes.methods.lokr import LoKrMethod
from graftc.passes.methods.miss import MiSSMethod
from graftc.passes.methods.oft import OFTMethod
from graftc.passes.methods.vera import VeRAMethod
from graftc.specs.errors.diagnostics import GraftError
from graftc.testing import perturb
from graftc.testing.families import tiny
from tests.kit.models import adapted
from tests.kit.refusals import refused

WITHOUT_LIMIT = 1e9
"""An output budget that nothing exceeds, so that only the evidence at the sites is left."""
SQUARE = {"role": "attn.k"}
"""BERT's keys, which are square, so that transposed updates fit."""
Wrong = Callable[[Tensor, Tensor, dict[str, Tensor]], tuple[Tensor, Tensor]]


def reasons_against(
    entry: dict[str, Any], monkeypatch: pytest.MonkeyPatch, method: Any, wrong: Wrong
) -> tuple[str, ...]:
    """Fold with ``wrong`` instead of the method's own function, after certifying that one, and return the reasons."""
    compiled = adapted("bert", entry, noise=0.2)
    assert compiled.merge().certificate.passed

    def fold(self: Any, spec: Any, site: Any, tensors: Any) -> WeightFold:
        return WeightFold(lambda weight, bias: wrong(weight, bias, tensors))  # type: ignore[arg-type]

    monkeypatch.setattr(method, "fold", fold)
    return refused(compiled.merge, budget=WITHOUT_LIMIT, code="GC051").details


IA3: dict[str, Wrong] = {
    "columns for rows": lambda w, b, t: (w * t["l"], b * t["l"]),
    "without bias": lambda w, b, t: (w * t["l"][:, None], b),
    "divided": lambda w, b, t: (w / t["l"][:, None], b / t["l"]),
    "rolled": lambda w, b, t: (w * t["l"].roll(1)[:, None], b * t["l"].roll(1)),
}


@pytest.mark.full
@pytest.mark.parametrize("name", IA3)
def test_ia3(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reasons = reasons_against({"method": "ia3", "target": SQUARE}, monkeypatch, IA3Method, IA3[name])
    assert len(reasons) == 2 and all("attention.self.key" in reason for reason in reasons)


@pytest.mark.slow
def test_ia3_input_with_bias(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bias is not scaled with the input, even if its width would allow it."""
    entry = {"method": "ia3", "target": SQUARE, "side": "input"}
    assert reasons_against(entry, monkeypatch, IA3Method, lambda w, b, t: (w * t["l"], b * t["l"]))


VERA: dict[str, Wrong] = {
    "last columns": lambda w, b, t: (w + t["b"][:, None] * (t["B"][:48] * t["d"]) @ t["A"][:, -48:], b),
    "without d": lambda w, b, t: (w + t["b"][:, None] * t["B"][:48] @ t["A"][:, :48], b),
    "b on columns": lambda w, b, t: (w + (t["B"][:48] * t["d"]) @ t["A"][:, :48] * t["b"], b),
}


@pytest.mark.slow
@pytest.mark.sample("last columns", "b on columns")
@pytest.mark.parametrize("name", VERA)
def test_vera(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The inner width makes A wider than the part that the keys use."""
    entry = {"method": "vera", "target": {"role": ["attn.k", "ffn.down"]}, "rank": 8}

    def wrong(weight: Tensor, bias: Tensor, tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        if weight.shape[1] == 48:
            return VERA[name](weight, bias, tensors)
        down = (tensors["B"] * tensors["d"]) @ tensors["A"]
        return weight + tensors["b"][:, None] * down, bias

    reasons = reasons_against(entry, monkeypatch, VeRAMethod, wrong)
    assert len(reasons) == 2 and all("attention.self.key" in reason for reason in reasons)


LOHA: dict[str, Wrong] = {
    "matrix product": lambda w, b, t: (w + 2 * (t["B1"] @ t["A1"]) @ (t["B2"] @ t["A2"]), b),
    "without scale": lambda w, b, t: (w + (t["B1"] @ t["A1"]) * (t["B2"] @ t["A2"]), b),
    "scaled twice": lambda w, b, t: (w + 4 * (t["B1"] @ t["A1"]) * (t["B2"] @ t["A2"]), b),
}


@pytest.mark.full
@pytest.mark.parametrize("name", LOHA)
def test_loha(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = {"method": "loha", "target": SQUARE, "rank": 4, "alpha": 8}
    assert reasons_against(entry, monkeypatch, LoHaMethod, LOHA[name])


OFT: dict[str, Wrong] = {
    "without rotation": lambda w, b, t: (w, b),
    "rotated back": lambda w, b, t: (w @ _rotated(t["Q"]), b),
    "rotated outputs": lambda w, b, t: (_rotated(t["Q"]) @ w, b),
    "with the bias": lambda w, b, t: (w @ _rotated(t["Q"]).T, _rotated(t["Q"]) @ b),
}


def _rotated(upper: Tensor) -> Tensor:
    q = torch.ops.graftc.skew(upper, 8)
    one = torch.eye(8, dtype=q.dtype)
    return torch.block_diag(*(torch.linalg.solve(one + q, one - q)))


@pytest.mark.full
@pytest.mark.parametrize("name", OFT)
def test_oft(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = {"method": "oft", "target": SQUARE, "block_size": 8, "cayley": "exact"}
    assert reasons_against(entry, monkeypatch, OFTMethod, OFT[name])


LOKR: dict[str, Wrong] = {
    "factors swapped": lambda w, b, t: (w + 2 * torch.kron(t["DB"] @ t["DA"], t["C"]), b),
    "transposed": lambda w, b, t: (w + 2 * torch.kron(t["C"], t["DB"] @ t["DA"]).T, b),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LOKR)
def test_lokr(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = {"method": "lokr", "target": SQUARE, "rank": 2, "alpha": 4}
    assert reasons_against(entry, monkeypatch, LoKrMethod, LOKR[name])


MISS: dict[str, Wrong] = {
    "turned": lambda w, b, t: (w + t["D"].repeat(6, 1), b),
    "shards of neighbours": lambda w, b, t: (w + t["D"].repeat_interleave(6, 0).T, b),
    "first shard only": lambda w, b, t: (w + torch.nn.functional.pad(t["D"], (0, 0, 0, 40)).T, b),
}


HIRA: dict[str, Wrong] = {
    "without the weight": lambda w, b, t: (w + t["B"] @ t["A"], b),
    "matrix product": lambda w, b, t: (w + w @ (t["B"] @ t["A"]), b),
    "transposed": lambda w, b, t: (w + w * (t["B"] @ t["A"]).T, b),
    "bias as well": lambda w, b, t: (w + w * (t["B"] @ t["A"]), b * (1 + t["B"].sum(-1))),
}


@pytest.mark.full
@pytest.mark.parametrize("name", MISS)
def test_miss(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = {"method": "miss", "target": SQUARE, "rank": 8}
    assert reasons_against(entry, monkeypatch, MiSSMethod, MISS[name])


BAT: dict[str, Wrong] = {
    "product alone": lambda w, b, t: (w + (w.reshape(6, 48, 8) @ t["D"]).reshape(48, 48), b),
    "product turned": lambda w, b, t: (
        w + (w.reshape(6, 48, 8) @ t["D"].mT).reshape(48, 48) + t["D"].repeat(1, 1, 6).reshape(48, 48),
        b,
    ),
}


@pytest.mark.full
@pytest.mark.parametrize("name", BAT)
def test_bat(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = {"method": "miss", "target": SQUARE, "rank": 8, "variant": "bat"}
    assert reasons_against(entry, monkeypatch, MiSSMethod, BAT[name])


@pytest.mark.parametrize("name", HIRA)
def test_hira(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert reasons_against({"method": "hira", "target": SQUARE, "rank": 4}, monkeypatch, HiRAMethod, HIRA[name])


def granular(order: str) -> Wrong:
    """Return a fold that takes the parts of both factors' ranks in some order of the letters of blocks."""

    def change(weight: Tensor, bias: Tensor, tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        a, b = tensors["A"].unflatten(-1, (2, -1)), tensors["B"].unflatten(-2, (2, -1))  # type: ignore[no-untyped-call]
        return weight + torch.einsum(order, a, b).reshape(weight.shape), bias

    return change


GRALORA: dict[str, Wrong] = {
    "rows and columns swapped": granular("jciq,ijqo->jcio"),
    "parts of A swapped": granular("icjq,ijqo->iojc"),
    "parts of B swapped": granular("jciq,jiqo->iojc"),
}


@pytest.mark.full
@pytest.mark.parametrize("name", GRALORA)
def test_gralora(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = {"method": "gralora", "target": SQUARE, "rank": 4, "alpha": 4}
    assert reasons_against(entry, monkeypatch, GraLoRAMethod, GRALORA[name])


C3A: dict[str, Wrong] = {
    "kernels reversed": lambda w, b, t: (w + matrix_of(t["kernel"].flip(-1)) / 48, b),
    "transposed": lambda w, b, t: (w + matrix_of(t["kernel"]).T / 48, b),
    "without scale": lambda w, b, t: (w + matrix_of(t["kernel"]), b),
}


@pytest.mark.full
@pytest.mark.parametrize("name", C3A)
def test_c3a(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert reasons_against({"method": "c3a", "target": SQUARE, "block_size": 8}, monkeypatch, C3AMethod, C3A[name])


@pytest.mark.slow
def test_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    """A trained scale that is added to the base's instead of replacing it is caught."""
    compiled = graftc.compile({"adapt": [{"method": "norms"}]}, tiny("llama")).eval()
    perturb(compiled)
    assert compiled.merge().certificate.passed

    def added(adaptation: str, site: str, own: WeightSlice, value: Callable[[], Tensor]) -> FoldStep:
        return FoldStep(adaptation, site, own, None, lambda w, b: (w + value().double(), b), True)

    monkeypatch.setattr(FoldStep, "of_copy", added)
    with pytest.raises(GraftError) as error:
        compiled.merge(budget=WITHOUT_LIMIT)
    assert error.value.code == "GC051"
    assert len(error.value.details) == 5
