"""DoRA before, between and after other adaptations of the same places."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graftc
from graftc.compiler.folding.steps import lazy_tensors
from graftc.passes.core.weights.folds import Keep, WeightFold
from graftc.passes.methods.lora import LoRAMethod
from graftc.specs.errors.diagnostics import GraftError
from graftc.testing import largest_difference, outputs_of, perturb
from graftc.testing.compare import SHAPES, inputs_for
from graftc.testing.families import tiny

ROLES = ["attn.q", "attn.v", "ffn.down"]
MODULE = {"llama": "model.layers.1.mlp.down_proj", "gpt2": "transformer.h.1.mlp.c_proj"}
ENTRIES: dict[str, dict[str, Any]] = {
    "lora": {"method": "lora", "rank": 3},
    "dora": {"method": "dora", "rank": 4},
    "ia3": {"method": "ia3"},
    "loha": {"method": "loha", "rank": 3},
    "vera": {"method": "vera", "rank": 5},
    "miss": {"method": "miss", "rank": 7},
}


def stacked(model: nn.Module, *names: str, roles: Any = ROLES, **fields: Any) -> Any:
    """``model`` with adaptations on the same places, in this order; ``fields`` apply to every DoRA."""
    entries = []
    for index, name in enumerate(names):
        own = fields if name == "dora" else {}
        entries.append({**ENTRIES[name], "name": f"a{index}", "target": {"role": roles}, **own})
    return graftc.compile({"adapt": entries}, model).eval()


def folds_exactly(compiled: Any) -> None:
    """Check that the folded model equals the unfolded one and that the certificate of every site passes."""
    merged = compiled.merge()
    assert merged.certificate.passed, merged.certificate.failures()
    assert max(site.algebra for site in merged.certificate.sites) <= 1e-12
    for sizes in SHAPES:
        inputs = inputs_for(compiled, sizes)
        assert largest_difference(outputs_of(merged, inputs), outputs_of(compiled, inputs)) <= 2e-5


def test_graphs_over_another_update_are_stored(tmp_path: Path) -> None:
    """Their norms of the updated weight consist of operators that files may contain, so nothing warns (GC092)."""
    compiled = stacked(tiny("llama", layers=1), "lora", "dora")
    with warnings.catch_warnings():
        warnings.simplefilter("error", graftc.GraftWarning)
        compiled.save(tmp_path / "kept")
    loaded, inputs = graftc.load(tmp_path / "kept", tiny("llama", layers=1)).eval(), inputs_for(compiled)
    assert largest_difference(outputs_of(loaded, inputs), outputs_of(compiled, inputs)) == 0


@pytest.mark.full
@pytest.mark.parametrize("family", ["bert", "gpt2", "gpt_neox", "llama"])
@pytest.mark.parametrize(
    "names",
    [
        ("dora", "dora"),
        ("lora", "dora"),
        ("dora", "lora"),
        ("ia3", "dora"),
        ("dora", "ia3"),
        ("lora", "dora", "ia3", "dora"),
    ],
    ids="-".join,
)
def test_any_order_folds_exactly(family: str, names: tuple[str, ...]) -> None:
    """Adaptations below DoRA are part of V and of its norm."""
    compiled = stacked(tiny(family), *names)
    perturb(compiled, 0.2)
    folds_exactly(compiled)


@pytest.mark.full
@pytest.mark.parametrize("family", ["bert", "gpt2"])
@pytest.mark.parametrize(
    "names", [("lora", "dora"), ("dora", "dora"), ("ia3", "dora"), ("vera", "dora", "lora")], ids="-".join
)
def test_another_signature_stacks_alike(family: str, names: tuple[str, ...]) -> None:
    """With labels, which have a graph of their own, logits are the same to the bit in both modes."""
    compiled = stacked(tiny(family), *names)
    perturb(compiled, 0.2)
    inputs = inputs_for(compiled)
    labels = inputs["input_ids"] if family == "gpt2" else torch.zeros(len(inputs["input_ids"]), dtype=torch.int64)
    for training in (False, True):
        compiled.train(training)
        torch.manual_seed(0)
        expected = compiled(**inputs).logits
        torch.manual_seed(0)
        assert torch.equal(compiled(**inputs, labels=labels).logits, expected)


@pytest.mark.full
@pytest.mark.parametrize("below", ["loha", "vera", "miss"])
def test_on_methods_with_other_algebra(below: str) -> None:
    compiled = stacked(tiny("llama"), below, "dora", norm_gradient="exact")
    perturb(compiled, 0.2)
    folds_exactly(compiled)


@pytest.mark.full
def test_experts() -> None:
    compiled = stacked(tiny("mixtral"), "lora", "dora", roles=["attn.q", "experts"])
    perturb(compiled, 0.1)
    folds_exactly(compiled)


@pytest.mark.full
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_two_doras_are_one_after_the_other(family: str) -> None:
    """``W2 = m2 V2 / |V2|`` with ``V2 = W1 + s B2 A2`` and ``W1 = m1 V1 / |V1|``: the second norm is not that of W."""
    model = tiny(family)
    compiled = stacked(model, "dora", "dora", roles="ffn.down", alpha=6)
    tensors = {name: tensor.double() for name, tensor in perturb(compiled, 0.3).items()}
    module = MODULE[family]
    weight = model.get_parameter(f"{module}.weight").detach().double()
    weight = weight.T if family == "gpt2" else weight
    for name in ("a0", "a1"):
        a, b, m = (tensors[f"{module}.graftc.{name}.{part}"] for part in "ABm")
        direction = weight + 6 / 4 * b @ a
        weight = m[:, None] * direction / torch.linalg.vector_norm(direction, dim=-1, keepdim=True)
    folded = lazy_tensors(compiled.compilation).exact(f"{module}.weight")
    torch.testing.assert_close(folded.T if family == "gpt2" else folded, weight, rtol=1e-13, atol=1e-14)


@pytest.mark.full
def test_magnitudes_start_at_the_norms_of_the_weight_as_adapted() -> None:
    """If the adaptation below does not start as the base, the two together still start as that one alone."""
    model = tiny("llama")
    first = stacked(model, "lora", roles="ffn.down")
    tensors = perturb(first, 0.3)
    both = graftc.compile(
        {
            "adapt": [
                {**ENTRIES["lora"], "name": "a0", "target": {"role": "ffn.down"}},
                {**ENTRIES["dora"], "name": "a1", "target": {"role": "ffn.down"}},
            ]
        },
        first.merge().to_transformers(),
    ).eval()
    inputs = inputs_for(first)
    assert largest_difference(outputs_of(both, inputs), outputs_of(first, inputs)) <= 2e-5
    assert tensors


def test_gradients_reach_both() -> None:
    """In float64, gradients equal those of autograd on both formulas with detached norms."""
    model = Line()
    entries = [
        {"method": "lora", "name": "below", "target": {"modules": "map"}, "rank": 2, "alpha": 4},
        {"method": "dora", "name": "above", "target": {"modules": "map"}, "rank": 3, "alpha": 6, "dropout": 0.0},
    ]
    compiled = graftc.compile({"adapt": entries}, model, {"x": torch.ones(2, 8, dtype=torch.float64)})
    perturb(compiled, 0.3)
    x = torch.randn(5, 8, dtype=torch.float64)
    noise = torch.randn(5, 6, dtype=torch.float64)
    (compiled(x) * noise).sum().backward()
    mine = {n.removeprefix("map.graftc."): t for n, t in compiled.named_parameters() if t.requires_grad}
    copies = {name: tensor.detach().clone().requires_grad_() for name, tensor in mine.items()}
    v = (
        model.map.weight.detach()
        + 2 * copies["below.B"] @ copies["below.A"]
        + 2 * copies["above.B"] @ copies["above.A"]
    )
    weight = copies["above.m"][:, None] * v / torch.linalg.vector_norm(v, dim=-1, keepdim=True).detach()
    ((x @ weight.T + model.map.bias.detach()) * noise).sum().backward()
    assert set(copies) == {"below.A", "below.B", "above.A", "above.B", "above.m"}
    for name, tensor in mine.items():
        torch.testing.assert_close(tensor.grad, copies[name].grad, rtol=1e-10, atol=1e-12)


class Line(nn.Module):
    """A model that is a single linear map in float64."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.map = nn.Linear(8, 6, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[batch, 8]`` to ``[batch, 6]``."""
        return self.map(x)


def test_a_weight_that_trains_in_full() -> None:
    """With ``train:`` a copy replaces the weight, and norms are those of the copy as it trains."""
    spec = {"train": ["map"], "adapt": [{"method": "dora", "target": {"modules": "map"}, "rank": 3}]}
    model = Line()
    compiled = graftc.compile(spec, model, {"x": torch.ones(2, 8, dtype=torch.float64)})
    x = torch.randn(5, 8, dtype=torch.float64)
    assert torch.equal(compiled(x), model(x))
    perturb(compiled, 0.3)
    tensors = {name.rpartition(".")[2]: tensor for name, tensor in compiled.named_parameters() if tensor.requires_grad}
    v = tensors["weight"] + 16 / 3 * tensors["B"] @ tensors["A"]
    weight = tensors["m"][:, None] * v / torch.linalg.vector_norm(v, dim=-1, keepdim=True)
    torch.testing.assert_close(compiled(x), x @ weight.T + tensors["bias"], rtol=1e-10, atol=1e-12)


def _keeps(*args: Any) -> Keep:
    return Keep("it is not linear")


def _decides(*args: Any) -> WeightFold:
    tensors = args[-1]
    return WeightFold(lambda weight, bias: (weight if bool(tensors["B"].any()) else 2 * weight, bias))


@pytest.mark.full
@pytest.mark.parametrize(
    ("fold", "reason"), [(_keeps, "it is not linear"), (_decides, "its fold depends on tensor values")]
)
def test_what_has_no_weight_below_is_refused(monkeypatch: pytest.MonkeyPatch, fold: Any, reason: str) -> None:
    """The message names both adaptations and the place, and says what to do; the other order is accepted."""
    monkeypatch.setattr(LoRAMethod, "fold", lambda self, *args: fold(*args))
    with pytest.raises(GraftError) as error:
        stacked(tiny("llama"), "lora", "dora", roles="ffn.down")
    assert error.value.code == "GC017"
    assert error.value.message.startswith("'a1' needs the effective weight of model.layers.0.mlp.down_proj.weight")
    assert "'a0'" in error.value.message and reason in error.value.message
    assert error.value.hint == "put 'a1' before 'a0' in the spec, or leave the site out of one of them"
    assert error.value.place is not None
    stacked(tiny("llama"), "dora", "lora", roles="ffn.down")


@pytest.mark.full
def test_new_tokens_below_are_refused() -> None:
    """Rows of new tokens replace those of the table when it is read, so there is no weight to take norms of."""
    spec = {
        "tokens": {"add": ["<a>", "<b>"]},
        "adapt": [{"method": "dora", "target": {"role": "embed"}, "rank": 2}],
    }
    with pytest.raises(GraftError) as error:
        graftc.compile(spec, tiny("llama", vocab_size=128))
    assert error.value.code == "GC017"
    assert "'tokens'" in error.value.message
    assert error.value.hint is not None


class Named(nn.Module):
    """A model of two linear maps, the first of which has a matrix called ``bias``."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Module(), nn.Linear(6, 5)
        self.first.bias = nn.Parameter(torch.randn(6, 8))

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[batch, 8]`` to ``[batch, 5]``."""
        return self.last(nn.functional.linear(x, self.first.bias).tanh())


def named(*names: str) -> Any:
    """`Named` with adaptations in this order: ``rows`` takes norms of the first map, ``low`` trains all biases."""
    entries = {
        "rows": {"method": "dora", "target": {"modules": "first"}, "rank": 2},
        "low": {"method": "lora", "target": {"modules": "last"}, "rank": 2, "bias": "all"},
    }
    return graftc.compile({"adapt": [{"name": n, **entries[n]} for n in names]}, Named(), {"x": torch.ones(2, 8)})


@pytest.mark.slow
def test_a_weight_that_trains_later_is_refused() -> None:
    """The norms would be those of the old values. In the other order they are those of the trained values."""
    with pytest.raises(GraftError) as error:
        named("rows", "low")
    assert error.value.code == "GC021"
    assert error.value.message == "'low' would train all of first.bias, whose values 'rows' treats as constant"
    assert error.value.hint == "put 'low' before 'rows' in the spec, or leave the site out of one of them"
    assert error.value.place is not None and error.value.place.path == "adapt[1]"
    compiled = named("low", "rows").eval()
    perturb(compiled, 0.3)
    merged, inputs = compiled.merge(), {"x": torch.randn(3, 8)}
    assert merged.certificate.passed
    assert largest_difference(outputs_of(merged, inputs), outputs_of(compiled, inputs)) <= 2e-5


@pytest.mark.full
@pytest.mark.parametrize(("family", "roles"), [("bert", "ffn.down"), ("gpt2", "attn.q"), ("mixtral", "experts")])
def test_any_method_that_trains_the_weight_later_is_refused(
    monkeypatch: pytest.MonkeyPatch, family: str, roles: str
) -> None:
    """Stored tensors that have rows as columns, or experts, are refused, too; below DoRA the method is accepted."""
    monkeypatch.setattr(LoRAMethod, "insert", lambda _, spec, site, shared, build: build.overlay(site.own.tensor))
    monkeypatch.setattr(LoRAMethod, "fold", lambda *args: WeightFold(lambda weight, bias: (weight, bias)))
    with pytest.raises(GraftError, match=r"GC021: 'a1' would train all of .* 'a0' treats as constant"):
        stacked(tiny(family), "dora", "lora", roles=roles)
    stacked(tiny(family), "lora", "dora", roles=roles)


@pytest.mark.full
@pytest.mark.parametrize("policy", ["lora_only", "all"])
@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_biases_that_train_later_are_no_constants(family: str, policy: str) -> None:
    entries = [
        {"name": "rows", "method": "dora", "target": {"role": ROLES}, "rank": 3},
        {"name": "low", "method": "lora", "target": {"role": ROLES}, "rank": 2, "bias": policy},
    ]
    compiled = graftc.compile({"adapt": entries}, tiny(family)).eval()
    perturb(compiled, 0.2)
    folds_exactly(compiled)
