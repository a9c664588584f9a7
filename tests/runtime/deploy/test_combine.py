"""Combining adaptations: the result of each kind, its error, and comparisons with peft."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

import graftc
from graftc.runtime.deploy.combine import Kind
from graftc.specs.errors.diagnostics import GraftError
from graftc.testing import largest_difference, outputs_of, perturb, same_bits
from graftc.testing.compare import inputs_for
from graftc.testing.families import tiny
from tests.kit.places import ROOT

TARGET = {"role": ["attn.q", "ffn.down"]}


def entry(name: str, rank: int = 3, **changes: Any) -> dict[str, Any]:
    return {"name": name, "method": "lora", "target": TARGET, "rank": rank, "alpha": 5.0, **changes}


def two(family: str = "bert", ranks: tuple[int, int] = (3, 3), **changes: Any) -> Any:
    """A model with two adaptations at the same places, perturbed."""
    spec = {"adapt": [entry("one", ranks[0], **changes), entry("two", ranks[1])]}
    compiled = graftc.compile(spec, tiny(family))
    perturb(compiled)
    return compiled.eval()


def updates(compiled: Any, name: str) -> dict[str, Tensor]:
    """Compute what an adaptation adds to the weight of every place, from its tensors alone."""
    (resolved,) = (r for r in compiled.compilation.main.resolved if r.name == name)
    added = {}
    for site, spec in resolved.places:
        parts = compiled.compilation.parts[name][site.key]
        a, b = (compiled.compilation.store.get(parts[p]).detach().double() for p in "AB")
        added[str(site.key)] = spec.alpha / spec.rank * b @ a
    return added


def weighted(compiled: Any, weights: tuple[float, float]) -> dict[str, Tensor]:
    one, two = updates(compiled, "one"), updates(compiled, "two")
    return {site: weights[0] * one[site] + weights[1] * two[site] for site in one}


def relative(actual: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, float]:
    return {site: float((actual[site] - wanted[site]).norm() / wanted[site].norm()) for site in wanted}


@pytest.mark.full
@pytest.mark.parametrize("family", ["bert", "gpt2"])
@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.7, -0.4)])
def test_side_by_side_is_exact(family: str, weights: tuple[float, float]) -> None:
    """Concatenation is exact, also with different ranks and a negative weight; weights of 1 keep the outputs."""
    compiled = two(family, (3, 2))
    before = compiled.adapter_state_dict()
    combined = compiled.combine(["one", "two"], weights, kind="concatenation", name="both")
    wanted = weighted(compiled, weights)
    assert combined.largest_error == 0
    assert max(relative(updates(combined.compiled, "both"), wanted).values()) < 1e-6
    assert [a.name for a in combined.compiled.spec.adapt] == ["both"] and combined.compiled.spec.adapt[0].rank == 5
    inputs = inputs_for(compiled, (2, 5))
    if weights == (1.0, 1.0):
        assert largest_difference(outputs_of(combined.compiled, inputs), outputs_of(compiled, inputs)) < 1e-5
    assert combined.compiled.merge().certificate.passed
    assert all(torch.equal(t, before[n]) for n, t in compiled.adapter_state_dict().items())


@pytest.mark.slow
def test_the_nearest_of_a_rank() -> None:
    """The result is exact at full rank; below, its error follows from the singular values that are left out."""
    compiled = two()
    wanted = weighted(compiled, (0.5, 2.0))
    full = compiled.combine(["one", "two"], (0.5, 2.0), rank=6)
    assert full.largest_error < 1e-12
    assert max(relative(updates(full.compiled, "combined"), wanted).values()) < 1e-6
    less = compiled.combine(["one", "two"], (0.5, 2.0), rank=4)
    for site, update in wanted.items():
        s = torch.linalg.svdvals(update)
        assert less.errors[site] == pytest.approx(float(s[4:].norm() / s.norm()), rel=1e-6)
    errors = relative(updates(less.compiled, "combined"), wanted)
    assert errors == pytest.approx(dict(less.errors), rel=1e-4)


@pytest.mark.full
def test_adding_factors_is_something_else() -> None:
    compiled = two()
    combined = compiled.combine(["one", "two"], (0.5, 0.5), kind="linear")
    errors = relative(updates(combined.compiled, "combined"), weighted(compiled, (0.5, 0.5)))
    assert errors == pytest.approx(dict(combined.errors), rel=1e-4) and min(errors.values()) > 0.1
    same = two()
    one = {n: t for n, t in same.adapter_state_dict().items() if ".one." in n}
    same.load_adapter_state_dict({**one, **{n.replace(".one.", ".two."): t for n, t in one.items()}})
    # Two equal ones at half weight each: (2 sqrt(1/2))^2 is twice the update, but their sum is the update itself.
    errors = same.combine(["one", "two"], (0.5, 0.5), kind="linear").errors
    assert errors == pytest.approx(dict.fromkeys(updates(same, "one"), 1.0), rel=1e-6)


@pytest.mark.slow
def test_elected_signs() -> None:
    """TIES at density 1 gives the mean where both signs agree, and elsewhere the larger update alone."""
    compiled = two()
    combined = compiled.combine(["one", "two"], kind="ties", density=1.0, rank=48)
    one, other = updates(compiled, "one"), updates(compiled, "two")
    for site, update in updates(combined.compiled, "combined").items():
        a, b = one[site], other[site]
        heavier = torch.where(a.abs() > b.abs(), a, b)
        wanted = torch.where(a.sign() == b.sign(), (a + b) / 2, heavier)
        assert float((update - wanted).norm() / wanted.norm()) < 1e-5
    thin = compiled.combine(["one", "two"], kind="ties", density=0.1, rank=48)
    for update in updates(thin.compiled, "combined").values():
        assert int((update.abs() > 1e-6).sum()) <= 2 * (0.1 * update.numel() + 1)


@pytest.mark.full
def test_random_drops() -> None:
    """DARE keeps the expectation, depends on its seed only, and is the sum at density 1."""
    compiled = two()
    wanted = weighted(compiled, (1.0, 1.0))
    all_of_it = compiled.combine(["one", "two"], kind="dare", density=1.0, rank=48)
    assert max(relative(updates(all_of_it.compiled, "combined"), wanted).values()) < 1e-5
    draws = [compiled.combine(["one", "two"], kind="dare", rank=48, seed=seed) for seed in (*range(12), 0)]
    results = [updates(draw.compiled, "combined") for draw in draws]
    site = next(iter(wanted))
    assert torch.equal(results[0][site], results[-1][site]) and not torch.equal(results[0][site], results[1][site])
    mean = torch.stack([f[site] for f in results[:-1]]).mean(0)
    assert float((mean - wanted[site]).norm() / wanted[site].norm()) < 0.5
    assert float((results[0][site] - wanted[site]).norm() / wanted[site].norm()) > 0.5


@pytest.mark.full
def test_what_else_is_there_stays() -> None:
    """Another adaptation, the trained head and its values are unchanged in the combined model."""
    spec = {
        "adapt": [entry("one"), entry("two"), entry("third", target={"role": "attn.v"})],
        "train": ["classifier"],
    }
    compiled = graftc.compile(spec, tiny("bert")).eval()
    perturb(compiled)
    combined = compiled.combine(["one", "two"], kind="concatenation").compiled
    assert [a.name for a in combined.spec.adapt] == ["combined", "third"]
    inputs = inputs_for(compiled, (2, 5))
    assert largest_difference(outputs_of(combined, inputs), outputs_of(compiled, inputs)) < 1e-5
    kept = {n: t for n, t in compiled.adapter_state_dict().items() if ".third." in n or ".trained." in n}
    assert kept and all(torch.equal(combined.adapter_state_dict()[n], t) for n, t in kept.items())


PEFT: dict[Kind, str] = {"concatenation": "cat", "linear": "linear", "svd": "svd"}


@pytest.mark.full
@pytest.mark.parametrize("kind", PEFT)
@pytest.mark.parametrize("weights", [(0.6, 0.4), (1.0, 2.0)])
def test_as_peft_does(kind: Kind, weights: tuple[float, float]) -> None:
    """Combining the same tensors in the same way gives peft's outputs."""
    from peft import LoraConfig, get_peft_model

    model = tiny("bert")
    compiled = graftc.compile({"adapt": [entry("one"), entry("two")]}, model).eval()
    perturb(compiled)
    config = {"r": 3, "lora_alpha": 5, "target_modules": r".*(query|layer\.\d+\.output\.dense)", "lora_dropout": 0.0}
    judge: Any = get_peft_model(copy.deepcopy(model), LoraConfig(**config), adapter_name="one")
    judge.add_adapter("two", LoraConfig(**config))
    for name, tensor in compiled.adapter_state_dict().items():
        path, _, rest = name.partition(".graftc.")
        adaptation, part = rest.split(".")
        getattr(judge.base_model.model.get_submodule(path), f"lora_{part}")[adaptation].weight.data.copy_(tensor)
    rank = {"svd": {"svd_rank": 4}}.get(kind, {})
    judge.add_weighted_adapter(["one", "two"], list(weights), "both", combination_type=PEFT[kind], **rank)
    judge.set_adapter("both")
    combined = compiled.combine(["one", "two"], weights, kind=kind, rank=4 if kind == "svd" else None).compiled
    inputs = inputs_for(compiled, (2, 5))
    assert largest_difference(outputs_of(combined.eval(), inputs), outputs_of(judge.eval(), inputs)) < 1e-5


@pytest.mark.full
@pytest.mark.parametrize(
    ("names", "arguments", "code", "words"),
    [
        (["one", "tow"], {}, "GC091", "there is no adaptation 'tow'"),
        (["one"], {}, "GC002", "two or more"),
        (["one", "one"], {}, "GC002", "two or more different adaptations"),
        (["one", "two"], {"weights": [1.0]}, "GC002", "one weight per adaptation"),
        (["one", "two"], {"kind": "mean"}, "GC002", "one weight"),
        (["one", "two"], {"density": 0.0}, "GC002", "density"),
        (["one", "other"], {"kind": "linear"}, "GC029", "equal ranks"),
        (["one", "start"], {"kind": "concatenation"}, "GC029", "no plain factors"),
        (["one", "two"], {"name": "third"}, "GC005", "already has the name"),
    ],
)
def test_what_cannot_be_combined(names: list[str], arguments: dict[str, Any], code: str, words: str) -> None:
    others = [entry("third", target={"role": "attn.v"}), entry("other", 2), entry("start", init="pissa")]
    compiled = graftc.compile({"adapt": [entry("one"), entry("two"), *others]}, tiny("bert"))
    with pytest.raises(GraftError, match=words) as caught:
        compiled.combine(names, **arguments)
    assert caught.value.code == code


@pytest.mark.full
def test_the_source_of_a_combination_still_trains() -> None:
    compiled = two()
    inputs = inputs_for(compiled, (2, 5))
    before = outputs_of(compiled, inputs)
    compiled.combine(["one", "two"])
    assert same_bits(outputs_of(compiled, inputs), before)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["concatenation", "svd", "linear"])
@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.7, -0.4)])
def test_other_targets_count_as_zero(kind: Kind, weights: tuple[float, float]) -> None:
    """At a place of one adaptation, the result is that one times its weight, as from peft's `cat` and `svd`."""
    spec = {"adapt": [entry("one", 3), {**entry("two", 3), "target": {"role": ["ffn.down", "attn.o"]}}]}
    compiled = graftc.compile(spec, tiny("bert"))
    perturb(compiled)
    compiled.eval()
    combined = compiled.combine(["one", "two"], weights, kind=kind, rank=None if kind != "svd" else 6)
    one, other = updates(compiled, "one"), updates(compiled, "two")
    results = updates(combined.compiled, "combined")
    assert results.keys() == one.keys() | other.keys() and one.keys() != other.keys()
    for site, update in results.items():
        parts = [w * own[site] for w, own in zip(weights, (one, other), strict=True) if site in own]
        if kind != "linear" or len(parts) == 1:
            assert float((update - sum(parts)).norm()) <= 1e-6 * float(sum(parts).norm())  # type: ignore[union-attr]
    if kind == "concatenation" and weights == (1.0, 1.0):
        inputs = inputs_for(compiled, (3, 9))
        assert largest_difference(outputs_of(combined.compiled, inputs), outputs_of(compiled, inputs)) < 1e-5


PAGE = ROOT / "docs" / "faq-peft.md"


@pytest.fixture(scope="module")
def two_and_peft() -> tuple[Any, Any]:
    """Two LoRAs of rank 4 on a tiny Llama, and the same two in peft."""
    from peft import LoraConfig, get_peft_model

    model = tiny("llama")
    adapt = [
        {"name": n, "method": "lora", "target": {"modules": "**.q_proj"}, "rank": 4, "alpha": 4.0}
        for n in ("one", "two")
    ]
    compiled = graftc.compile({"adapt": adapt}, model)
    perturb(compiled)
    config = LoraConfig(r=4, lora_alpha=4, target_modules=["q_proj"])
    judge: Any = get_peft_model(copy.deepcopy(model), config, adapter_name="one")
    judge.add_adapter("two", config)
    for name, tensor in compiled.adapter_state_dict().items():
        path, _, rest = name.partition(".graftc.")
        adaptation, part = rest.split(".")
        getattr(judge.base_model.model.get_submodule(path), f"lora_{part}")[adaptation].weight.data.copy_(tensor)
    return compiled, judge


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ties_svd", "ties"])
@pytest.mark.parametrize("weights", [(1, 1), (0.7, 0.3)])
def test_distances_from_both_kinds_of_ties_are_those_on_the_page(
    weights: tuple[float, float], kind: str, two_and_peft: tuple[Any, Any]
) -> None:
    heads, rows = re.findall(r"^\| (weights|[\d.]+ and [\d.]+) \| (.*?) \| (.*?) \|$", PAGE.read_text(), re.M), {}
    for row, *cells in heads[1:]:
        rows[row] = dict(zip(heads[0][1:], map(float, cells), strict=True))
    stated = rows[f"{weights[0]} and {weights[1]}"][f"PEFT's `{kind}`"]
    compiled, judge = two_and_peft
    combined = compiled.combine(["one", "two"], weights, kind="ties", density=0.5, rank=8).compiled
    name = f"{kind} {weights[0] == weights[1]}"
    options: Any = {"svd_rank": 8} if kind == "ties_svd" else {}
    judge.add_weighted_adapter(["one", "two"], list(weights), name, combination_type=kind, density=0.5, **options)
    squares = [0.0, 0.0]
    for site, mine in updates(combined, "combined").items():
        theirs = judge.base_model.model.get_submodule(site.removesuffix(".weight")).get_delta_weight(name).double()
        squares = [squares[0] + float((theirs - mine).square().sum()), squares[1] + float(mine.square().sum())]
    distance = (squares[0] / squares[1]) ** 0.5
    assert distance == pytest.approx(stated, rel=0.1, abs=1e-5)
