"""LoRA's spec."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graftc.specs.claims import FoldKind, SiteKind
from graftc.specs.errors.diagnostics import GraftError
from graftc.specs.methods.lora import LoRA
from graftc.specs.target import Target

TARGET = Target(role=["attn.q", "attn.v"])


def test_defaults() -> None:
    spec = LoRA(target=TARGET)
    assert (spec.method, spec.rank, spec.alpha, spec.rslora) == ("lora", 8, 16.0, False)
    assert (spec.dropout, spec.init, spec.bias, spec.overrides) == (0.0, "kaiming", "none", ())


def test_claims() -> None:
    assert LoRA.claims.sites == {SiteKind.LINEAR, SiteKind.EMBEDDING, SiteKind.EXPERTS}
    assert LoRA.claims.identity_at_init and LoRA.claims.folds is FoldKind.EXACT and LoRA.claims.bankable
    assert "Hu et al. 2021" in LoRA.paper and LoRA.tag() == "lora"


@given(st.integers(1, 512), st.floats(0.01, 1e4))
def test_scaling(rank: int, alpha: float) -> None:
    assert LoRA(target=TARGET, rank=rank, alpha=alpha).scaling == alpha / rank
    assert LoRA(target=TARGET, rank=rank, alpha=alpha, rslora=True).scaling == alpha / math.sqrt(rank)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("rank", 0, "rank must be at least 1, not 0"),
        ("rank", -4, "rank must be at least 1, not -4"),
        ("alpha", 0, "alpha must be greater than 0, not 0"),
        ("dropout", 1, "dropout must be less than 1, not 1"),
        ("dropout", -0.1, "dropout must be at least 0, not -0.1"),
        (
            "init",
            "pisa",
            "init must be 'kaiming', 'gaussian', 'random', 'orthogonal', 'pissa', 'olora', 'loftq', 'eva' "
            "or 'lora_ga', not 'pisa'",
        ),
        ("bias", "some", "bias must be 'none', 'lora_only' or 'all', not 'some'"),
        ("method", "dora", "method must be 'lora', not 'dora'"),
    ],
)
def test_bounds(field: str, value: object, message: str) -> None:
    with pytest.raises(GraftError) as caught:
        LoRA.model_validate({"target": {"role": "attn.q"}, field: value})
    assert (caught.value.code, caught.value.message) == ("GC002", message)


def test_a_misspelt_choice_names_the_nearest() -> None:
    with pytest.raises(GraftError) as caught:
        LoRA(target=TARGET, init="pisa")  # type: ignore[arg-type]
    assert caught.value.fix == ("pisa", "pissa") and caught.value.hint == "did you mean 'pissa'?"
