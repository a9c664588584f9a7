"""GraLoRA: the contract, its blocks on every kind of site, its initial values, and its equivalent LoRA."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from graftc.passes.core.method.capabilities import Exchangeable
from graftc.passes.core.method.registry import method_for
from graftc.runtime.model.runner import runner_of
from graftc.specs.errors.diagnostics import GraftError
from graftc.testing import DeploymentContract, MethodContract, largest_difference, outputs_of, perturb
from graftc.testing.compare import inputs_for
from graftc.testing.families import tiny
from tests.kit.depth import each_way
from tests.kit.models import adapted, fresh
from tests.kit.specs import varied
from tests.passes.methods.folded_maps import (
    check_every_kind_of_map,
    check_packed_base,
    loaded_again,
    update_of_values,
)
from tests.passes.methods.places import OTHERS, ROLES

GRALORA = {"method": "gralora", "target": {"role": ROLES}, "rank": 4, "alpha": 6}
HYBRID = {**GRALORA, "k": 4, "rank": 8, "hybrid_rank": 3}


class TestGraLoRA(MethodContract):
    """Hybrid GraLoRA on layers; ``attn.q`` of GPT-2 is a range of rows."""

    adaptation: ClassVar[dict[str, Any]] = {**HYBRID, "dropout": 0.1}
    families = ("gpt2",)
    perturbation = 0.2


@pytest.mark.full
class TestEverywhere(TestGraLoRA):
    """Hybrid GraLoRA on the other families."""

    families = OTHERS


@pytest.mark.full
class TestExperts(MethodContract):
    """GraLoRA with factors for each expert."""

    variant = True
    adaptation: ClassVar[dict[str, Any]] = {**HYBRID, "target": {"role": ["attn.v", "experts"]}}
    families = ("mixtral",)
    perturbation = 0.2


@pytest.mark.full
class TestRandomStart(MethodContract):
    """GraLoRA that starts with another function than the base's."""

    variant = True
    starts_elsewhere = True
    adaptation: ClassVar[dict[str, Any]] = {**GRALORA, "init": "random"}
    families = ("llama",)


class TestDeployed(DeploymentContract):
    """Export and compilation of hybrid GraLoRA."""

    adaptation: ClassVar[dict[str, Any]] = TestGraLoRA.adaptation
    families = ("llama",)
    perturbation = 0.2


def update_of(tensors: dict[str, Tensor], spec: Any) -> Tensor:
    """Return the update of a weight, assembled block by block."""
    a, b, k, q = tensors["A"].double(), tensors["B"].double(), spec.k, spec.rank // spec.k
    rows = []
    for i in range(k):
        blocks = [(a[j][:, i * q : (i + 1) * q] @ b[i][j * q : (j + 1) * q]).T for j in range(k)]
        rows.append(torch.cat(blocks, 1))
    update = torch.cat(rows, 0)
    if spec.hybrid_rank:
        update = update + tensors["B_hybrid"].double() @ tensors["A_hybrid"].double()
    return spec.alpha / (spec.rank + spec.hybrid_rank) * update


@pytest.mark.slow
@pytest.mark.parametrize("fields", [{"k": 2}, {"k": 4, "hybrid_rank": 3}], ids=["plain", "hybrid"])
def test_every_kind_of_site(fields: dict[str, Any]) -> None:
    """Every block is a product of its own, computed and folded alike."""
    entry = {"method": "gralora", "rank": 4, "alpha": 6, **fields}
    check_every_kind_of_map(entry, update_of, noise=0.5, atol=1e-11)


@pytest.mark.slow
def test_update_has_k_times_the_rank() -> None:
    """Of a fused weight, only the rows of the site change, by a matrix of rank ``k * rank``."""
    compiled = fresh("gpt2", {**GRALORA, "target": {"role": "attn.v"}})
    (spec,) = runner_of(compiled).spec.adapt
    tensors = {name.rpartition(".")[2]: t for name, t in perturb(compiled, 0.5).items() if ".h.1." in name}
    update = update_of_values(compiled)
    torch.testing.assert_close(update, update_of(tensors, spec), rtol=0, atol=1e-13)
    values = torch.linalg.svdvals(update)
    assert values[7] > 1e-2 and values[8] < 1e-12


@pytest.mark.slow
@pytest.mark.parametrize("init", ["kaiming", "random"])
def test_start_and_count(init: str) -> None:
    """Bounds are those of a block's own columns; there are as many parameters as in LoRA with both ranks together."""
    compiled = fresh("bert", varied(HYBRID, init=init))
    module = "bert.encoder.layer.0.output.dense.graftc.gralora"
    tensors = {n.rpartition(".")[2]: t for n, t in compiled.adapter_state_dict().items() if n.startswith(f"{module}.")}
    assert {part: tuple(t.shape) for part, t in tensors.items()} == {
        **{"A": (4, 20, 8), "B": (4, 8, 12)},
        **{"A_hybrid": (3, 80), "B_hybrid": (48, 3)},
    }
    fans = {"A": 20, "B": 8, "A_hybrid": 80, "B_hybrid": 3}
    for part, tensor in tensors.items():
        largest, bound = float(tensor.abs().max()), 1 / math.sqrt(fans[part])
        assert largest == 0 if part[0] == "B" and init == "kaiming" else 0.9 * bound < largest <= bound
    assert compiled.report.trainable_parameters == 2 * (8 + 3) * (2 * (48 + 48) + 48 + 80)


@pytest.mark.full
@pytest.mark.parametrize("family", ["gpt2", "mixtral"])
def test_equivalent_lora(family: str) -> None:
    """An exported graph takes it as a LoRA, and a conversion makes one, of rank ``k * rank + hybrid_rank``."""
    roles = ["attn.q", "ffn.down"] if family == "gpt2" else ["attn.q", "experts"]
    compiled = adapted(family, varied(HYBRID, rank=4, target={"role": roles}), noise=0.2)
    method = method_for("gralora")
    assert isinstance(method, Exchangeable)
    for site, spec in compiled.compilation.main.resolved[0].places:
        names = compiled.compilation.parts["gralora"][site.key]
        tensors = {part: compiled.compilation.store.get(name).detach().double() for part, name in names.items()}
        factors = method.exchanged(spec, tensors)
        assert factors["A"].shape[-2] == 4 * 4 + 3
        zero = torch.zeros(*tensors["A"].shape[:-3], site.out_features, site.in_features, dtype=torch.float64)
        folded = method.fold(spec, site, tensors).apply(zero, None)[0]
        torch.testing.assert_close(factors["B"] @ factors["A"], folded, rtol=0, atol=1e-13)
    converted = runner_of(compiled).convert()
    assert converted.largest_error < 1e-6
    assert {site.rank for site in converted.sites} == {4 * 4 + 3}


@pytest.mark.full
def test_a_quantised_base() -> None:
    """On packed weights, outputs are those over the values that the weights stand for."""
    check_packed_base(HYBRID, 0.2)


@pytest.mark.full
def test_artifact(tmp_path: Path) -> None:
    """An artifact with GraLoRA over LoRA gives the same bits."""
    compiled = adapted("gpt2", {"method": "lora", "rank": 3, "target": {"role": ROLES}}, HYBRID)
    loaded, inputs = loaded_again(compiled, "gpt2", tmp_path / "kept"), inputs_for(compiled)
    assert largest_difference(outputs_of(loaded.merge(), inputs), outputs_of(compiled, inputs)) <= 2e-5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fields", "code", "says"),
    [
        ({"rank": 6, "k": 4}, "GC002", "rank must be a multiple of k, but 6 is not a multiple of 4"),
        ({"rank": 10, "k": 5}, "GC002", "k: 5 does not divide both sides of .*use a divisor of 24"),
        ({"rank": 26}, "GC020", "rank 26 is too large"),
        ({"hybrid_rank": 25}, "GC020", "rank 25 is too large"),
    ],
    ids=["rank", "sides", "too large", "hybrid"],
)
def test_what_does_not_fit_is_refused(fields: dict[str, Any], code: str, says: str) -> None:
    with pytest.raises(GraftError) as error:
        fresh(tiny("llama", layers=1), varied(GRALORA, target={"role": "attn.v"}, **fields))
    assert error.value.code == code
    assert re.search(says, str(error.value), re.DOTALL)


@pytest.mark.full
@each_way
def test_published_counts(count: Any) -> None:
    """GraLoRA has LoRA's number of parameters, whatever ``k`` is, also with a part of the rank as hybrid rank."""
    target = {"role": ["attn.q", "attn.k", "attn.v", "attn.o", "ffn.gate", "ffn.up", "ffn.down"]}
    grouped = {"num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256}
    described = ("LlamaForCausalLM", "LlamaConfig", grouped)
    lora = count([{"method": "lora", "rank": 64, "target": target}], described).trainable_parameters
    for fields in ({"rank": 64, "k": 2}, {"rank": 64, "k": 4}, {"rank": 32, "hybrid_rank": 32}):
        assert count([{"method": "gralora", "target": target, **fields}], described).trainable_parameters == lora
