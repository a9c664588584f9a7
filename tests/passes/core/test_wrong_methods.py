"""Mistakes in the code of a method: coded errors that name the method, wherever the mistake is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import graftc
from graftc.passes.core.method.folding import fold_at
from graftc.passes.core.method.registry import _checked, method_for
from graftc.passes.core.sites.sites import LinearSite, NormSite, Site
from graftc.passes.core.weights.folds import Keep, TensorFold, WeightFold, weight_fold
from graftc.passes.methods.ia3 import IA3Method
from graftc.passes.methods.lora import LoRAMethod
from graftc.passes.methods.norms import NormsMethod
from graftc.specs.errors.diagnostics import GraftError
from graftc.specs.registry import method_specs
from graftc.testing.families import tiny

SCALE: dict[str, Any] = {"method": "ia3", "target": {"role": ["attn.k", "ffn.down"]}}

WRONG: dict[str, tuple[Callable[..., Any], str]] = {
    "part": (lambda t: weight_fold(lambda w: w * t["scale"]), "requests the tensor 'scale'; the site has: l"),
    "part at once": (lambda t: Keep(t["scale"]), "requests the tensor 'scale'; the site has: l"),
    "shape": (
        lambda t: weight_fold(lambda w: w[:1]),
        r"returns the weight with shape \[1, \d+\], expected \[\d+, \d+\]",
    ),
    "bias": (
        lambda t: WeightFold(lambda w, b: (w, torch.zeros(1))),
        r"returns the bias with shape \[1\], expected",
    ),
    "product": (lambda t: weight_fold(lambda w: w @ w @ t["l"][:3, None]), "fails: RuntimeError"),
    "arithmetic": (lambda t: weight_fold(lambda w: w * (1 // 0)), "fails: ZeroDivisionError"),
    "whole numbers": (lambda t: weight_fold(lambda w: w.long()), "returns the weight as torch.int64"),
    "half the digits": (lambda t: weight_fold(lambda w: w.float()), "torch.float32, expected torch.float64"),
    "no pair": (lambda t: WeightFold(lambda w, b: w), "must return a pair of a weight and a bias"),
    "no tensor": (lambda t: weight_fold(lambda w: None), "returns NoneType for the weight, expected a tensor"),
    "no fold": (lambda t: t["l"], "returns Tensor, which is not a fold"),
    "no such tensor": (lambda t: TensorFold({"scale": lambda w: w}), "changes 'scale'; the site has: weight, bias"),
    "tensor of another shape": (
        lambda t: TensorFold({"weight": lambda w: w[:1]}),
        r"returns 'weight' with shape \[1, ",
    ),
}


@pytest.mark.slow
@pytest.mark.sample("part", "shape", "product", "half the digits", "no tensor", "no such tensor")
@pytest.mark.parametrize(("fold", "message"), WRONG.values(), ids=WRONG)
def test_a_wrong_fold_is_an_error_of_the_method(
    fold: Callable[..., Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(IA3Method, "fold", lambda self, spec, site, tensors: fold(tensors))
    compiled = graftc.compile({"adapt": [SCALE]}, tiny("bert")).eval()
    with pytest.raises(GraftError, match=message) as caught:
        compiled.merge()
    assert caught.value.code == "GC071"
    assert caught.value.message.startswith("the fold of 'ia3' at bert.encoder.layer.0.")


def test_a_fold_that_is_traced_is_looked_at_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fold is checked as well if a DoRA on top of it writes it into the graph."""
    monkeypatch.setattr(IA3Method, "fold", lambda self, *args: weight_fold(lambda w: w * args[2]["scale"]))
    dora = {"method": "dora", "target": SCALE["target"]}
    with pytest.raises(GraftError, match=r"the fold of 'ia3' at .* requests the tensor 'scale'") as caught:
        graftc.compile({"adapt": [SCALE, dora]}, tiny("bert"))
    assert caught.value.code == "GC071"


@pytest.mark.slow
def test_a_weight_is_changed_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(NormsMethod, "fold", lambda self, *args: weight_fold(lambda w: w))
    compiled = graftc.compile({"adapt": [{"method": "norms"}]}, tiny("bert")).eval()
    with pytest.raises(GraftError, match="changes a weight, but the site has none") as caught:
        compiled.merge()
    assert caught.value.code == "GC071"


def test_running_out_of_memory_is_no_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    def fold(*args: Any) -> WeightFold:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(IA3Method, "fold", fold)
    with pytest.raises(torch.OutOfMemoryError):
        fold_at(IA3Method(), graftc.load_spec({"adapt": [SCALE]}).adapt[0], Site(None), {})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "wrong", [IndexError("no such row"), ZeroDivisionError("division by zero")], ids=["index", "zero"]
)
@pytest.mark.parametrize("composed", [False, True], ids=["alone", "composed"])
@pytest.mark.parametrize("function", ["prepare", "insert"])
def test_what_cannot_be_inserted_names_its_method(
    function: str, composed: bool, wrong: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: Any) -> None:
        raise wrong

    monkeypatch.setattr(LoRAMethod, function, fails)
    entries = [{"method": "lora", "rank": 2, "name": name, "target": {"role": "attn.q"}} for name in ("a", "b")]
    spec = (
        {"adapt": entries, "compose": {"average": ["a", "b"], "of": "outputs"}} if composed else {"adapt": entries[:1]}
    )
    with pytest.raises(GraftError, match=f"'lora' cannot be inserted.*: {type(wrong).__name__}: ") as caught:
        graftc.compile(spec, tiny("bert"))
    assert caught.value.code == "GC071" and ("attention.self.query" in caught.value.message) == (function == "insert")


def test_what_is_inserted_has_the_type_of_the_values(monkeypatch: pytest.MonkeyPatch) -> None:
    def wider(self: LoRAMethod, spec: Any, site: Any, shared: Any, build: Any) -> None:
        output = build.output(site)
        build.add(site, build.call(torch.ops.aten.to.dtype, output, torch.float64))

    monkeypatch.setattr(LoRAMethod, "insert", wider)
    with pytest.raises(
        GraftError, match=r"'lora' .* at bert.* torch.float64 values to replace torch.float32 values"
    ) as caught:
        graftc.compile({"adapt": [{"method": "lora", "target": {"role": "attn.q"}}]}, tiny("bert"))
    assert caught.value.code == "GC071"


def test_sites_are_those_of_the_base_class() -> None:
    assert method_for("lora").site_classes == (LinearSite,)
    assert method_for("norms").site_classes == (NormSite,)
    assert method_for("he_parallel").site_classes == method_for("bottleneck").site_classes
    assert all(method_for(tag).site_classes for tag in method_specs())


def test_claims_of_other_sites_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A method is checked when it is looked up, so its functions need not check."""
    monkeypatch.setattr(IA3Method, "site_classes", (NormSite,))
    _checked.cache_clear()
    try:
        with pytest.raises(
            GraftError, match="'ia3' claims sites of kind 'linear', but IA3Method accepts NormSite"
        ) as caught:
            method_for("ia3")
        assert caught.value.code == "GC071"
    finally:
        _checked.cache_clear()
