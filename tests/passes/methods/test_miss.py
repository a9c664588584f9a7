"""MiSS: the contract of each variant, its formula, padded shards, and published counts."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import graftc
from graftc.compiler.folding.steps import lazy_tensors
from graftc.specs.errors.diagnostics import GraftError
from graftc.testing import DeploymentContract, MethodContract, largest_difference, outputs_of, perturb, same_bits
from graftc.testing.compare import flat, inputs_for
from graftc.testing.families import tiny
from tests.kit.depth import each_way
from tests.kit.models import fresh
from tests.kit.specs import varied
from tests.passes.methods.places import OTHERS, ROLES

MISS: dict[str, Any] = {"method": "miss", "target": {"role": ROLES}, "rank": 7}
MINI: dict[str, Any] = {"method": "miss", "target": {"role": ROLES}, "rank": 5, "variant": "mini", "mini_rank": 6}
BAT: dict[str, Any] = {"method": "miss", "target": {"role": ROLES}, "rank": 8, "variant": "bat"}
VARIANTS = {"balance": MISS, "mini": MINI, "bat": BAT}


class TestMiSS(MethodContract):
    """MiSS with shards that do not divide the columns; ``attn.q`` of GPT-2 is a range of rows."""

    adaptation: ClassVar[dict[str, Any]] = MISS
    families = ("gpt2",)


@pytest.mark.full
class TestEverywhere(TestMiSS):
    """MiSS on the other families."""

    families = OTHERS


@pytest.mark.full
class TestBat(MethodContract):
    """Updates that depend on the weight, in a matrix of each orientation."""

    variant = True
    adaptation: ClassVar[dict[str, Any]] = BAT
    families = ("gpt2",)


@pytest.mark.full
class TestMini(MethodContract):
    """A matrix that is repeated in both directions."""

    variant = True
    adaptation: ClassVar[dict[str, Any]] = MINI
    families = ("gpt2", "llama")


@pytest.mark.full
class TestExperts(MethodContract):
    """A matrix for each expert."""

    variant = True
    adaptation: ClassVar[dict[str, Any]] = {"method": "miss", "target": {"role": ["attn.v", "experts"]}, "rank": 7}
    families = ("mixtral",)


@pytest.mark.full
class TestBatOnExperts(MethodContract):
    """A matrix for each block of rows of each expert."""

    variant = True
    adaptation: ClassVar[dict[str, Any]] = {**BAT, "target": {"role": ["attn.v", "experts"]}}
    families = ("mixtral",)


class TestDeployed(DeploymentContract):
    """Export and compilation of MiSS."""

    adaptation: ClassVar[dict[str, Any]] = MISS
    families = ("llama",)


@pytest.mark.full
class TestBatDeployed(DeploymentContract):
    """Export and compilation of ``bat``."""

    adaptation: ClassVar[dict[str, Any]] = BAT
    families = ("gpt2",)


def update_of(compiled: Any, name: str, turned: bool = False) -> Tensor:
    """Return ``W' - W`` in float64."""
    update = lazy_tensors(compiled.compilation).exact(name) - compiled.compilation.store.get(name).double()
    return update.T if turned else update


def expected_update(variant: str, own: Tensor, weight: Tensor) -> Tensor:
    """Return the update, entry by entry of the definition."""
    rows, columns = weight.shape
    result = torch.zeros_like(weight)
    rank = own.shape[-1] if variant == "bat" else own.shape[0]
    for j in range(columns):
        if variant != "bat":
            result[:, j] = own[j % rank].repeat(rows // own.shape[1])
            continue
        first = j - j % rank
        for i in range(rows):
            block = own[i // rank]
            result[i, j] = weight[i, first : first + rank] @ block[:, j % rank] + block[i % rank, j % rank]
    return result


@pytest.mark.slow
@pytest.mark.sample("balance", "bat")
@pytest.mark.parametrize("variant", VARIANTS)
def test_update(variant: str) -> None:
    """``W' - W`` repeats ``D`` along the columns; with ``bat`` it depends on each block of the weight."""
    compiled = fresh("llama", VARIANTS[variant])
    own = {name: t.double() for name, t in perturb(compiled, 0.5).items()}
    module = "model.layers.1.mlp.down_proj"
    weight = compiled.compilation.store.get(f"{module}.weight").double()
    expected = expected_update(variant, own[f"{module}.graftc.miss.D"], weight)
    torch.testing.assert_close(update_of(compiled, f"{module}.weight"), expected, rtol=0, atol=1e-13)
    assert weight.shape == (48, 80), "80 columns are eleven shards of 7 and a part of one"


@pytest.mark.full
@pytest.mark.parametrize("variant", VARIANTS)
def test_update_of_rows_of_a_turned_matrix(variant: str) -> None:
    """The queries of GPT-2 are the first columns of a stored matrix, whose others do not change."""
    compiled = fresh("gpt2", VARIANTS[variant])
    own = {name: t.double() for name, t in perturb(compiled, 0.5).items()}
    name = "transformer.h.0.attn.c_attn.weight"
    weight = compiled.compilation.store.get(name).double().T
    update = update_of(compiled, name, turned=True)
    part = own["transformer.h.0.attn.c_attn.graftc.miss.q.D"]
    torch.testing.assert_close(update[:48], expected_update(variant, part, weight[:48]), rtol=0, atol=1e-13)
    assert not update[48:96].any()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variant", "shapes"),
    [
        ("balance", (7, 48)),
        *(pytest.param(*case, marks=pytest.mark.full) for case in (("mini", (5, 6)), ("bat", (6, 8, 8)))),
    ],
)
def test_start_and_count(variant: str, shapes: tuple[int, ...]) -> None:
    """``D`` is zero; ``balance`` has ``rank * out`` entries at a site, ``bat`` as well, ``mini`` fewer."""
    compiled = fresh("bert", VARIANTS[variant])
    tensors = compiled.adapter_state_dict()
    name = "bert.encoder.layer.0.output.dense.graftc.miss.D"
    assert tuple(tensors[name].shape) == shapes and not any(tensor.any() for tensor in tensors.values())
    each = {"balance": 7 * 48, "mini": 5 * 6, "bat": 8 * 48}[variant]
    assert compiled.report.trainable_parameters == 2 * 3 * each


@pytest.mark.slow
@pytest.mark.sample("balance")
@pytest.mark.parametrize("variant", VARIANTS)
def test_convolution(variant: str) -> None:
    """In a convolution over patches of an image, a column is one entry of a patch."""
    target = {"modules": "**.patch_embeddings.projection"}
    compiled = fresh("vit", varied(VARIANTS[variant], target=target))
    ((name, own),) = perturb(compiled, 0.3).items()
    inputs = inputs_for(compiled)
    assert largest_difference(outputs_of(compiled.merge(), inputs), outputs_of(compiled, inputs)) <= 2e-5
    kernel = name.partition(".graftc.")[0] + ".weight"
    weight = compiled.compilation.store.get(kernel).double().flatten(1)
    update = update_of(compiled, kernel).flatten(1)
    torch.testing.assert_close(update, expected_update(variant, own.double(), weight), rtol=0, atol=1e-13)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "field", "says"),
    [
        pytest.param({"rank": 49}, "rank", "exceeds the inputs", marks=pytest.mark.full),
        ({"rank": 5, "variant": "bat"}, "rank", "does not divide both sides"),
        pytest.param(
            {"rank": 5, "variant": "mini", "mini_rank": 7},
            "mini_rank",
            "does not divide the outputs",
            marks=pytest.mark.full,
        ),
    ],
)
def test_sizes_that_do_not_fit(changes: dict[str, Any], field: str, says: str) -> None:
    with pytest.raises(GraftError, match=says) as error:
        fresh("llama", varied(MISS, **changes))
    assert error.value.code == "GC020" and error.value.place is not None
    assert str(error.value.place.path).endswith(field)


@pytest.mark.full
def test_overrides() -> None:
    """Sizes may differ by site."""
    compiled = fresh("bert", varied(MISS, overrides=[{"role": "ffn.down", "rank": 80}]))
    ranks = {n.split(".")[-4]: t.shape[0] for n, t in compiled.adapter_state_dict().items()}
    assert ranks == {"query": 7, "value": 7, "dense": 80}
    perturb(compiled, 0.3)
    inputs = inputs_for(compiled)
    assert largest_difference(outputs_of(compiled.merge(), inputs), outputs_of(compiled, inputs)) <= 2e-5


@pytest.mark.full
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_bat_on_top_of_another_update(family: str) -> None:
    """``bat`` on top of LoRA starts from the weight after LoRA, in the graph and in the fold."""
    lora = {"method": "lora", "target": {"role": ROLES}, "rank": 4}
    compiled = fresh(family, lora, BAT)
    perturb(compiled, 0.2)
    merged = compiled.merge()
    assert merged.certificate.passed and max(site.algebra for site in merged.certificate.sites) <= 1e-12
    inputs = inputs_for(compiled)
    assert largest_difference(outputs_of(merged, inputs), outputs_of(compiled, inputs)) <= 2e-5


@pytest.mark.full
@pytest.mark.parametrize("variant", VARIANTS)
def test_dropout(variant: str) -> None:
    """Dropout acts on the branch's input: the base's part of the output is not dropped."""
    compiled = fresh("llama", varied(VARIANTS[variant], dropout=0.5))
    inputs = inputs_for(compiled)
    before = outputs_of(compiled, inputs)
    compiled.train()
    with torch.no_grad():
        assert largest_difference(flat(compiled(**inputs)), before) == 0, "D is zero"
        perturb(compiled, 0.3)
        drawn = []
        for seed in (0, 1):
            torch.manual_seed(seed)
            drawn.append(flat(compiled(**inputs)))
    assert largest_difference(*drawn) > 1e-3


@pytest.mark.full
@pytest.mark.parametrize("variant", VARIANTS)
def test_artifact(variant: str, tmp_path: Path) -> None:
    compiled = fresh("bert", VARIANTS[variant])
    perturb(compiled, 0.3)
    compiled.save(tmp_path / "kept")
    loaded, inputs = graftc.load(tmp_path / "kept", tiny("bert")), inputs_for(compiled)
    assert same_bits(outputs_of(loaded, inputs), outputs_of(compiled, inputs))


@pytest.mark.full
@each_way
def test_published_count(count: Any) -> None:
    """Llama-2-7B at rank 64: ``64 out`` in each of 224 projections, 87.0M in the paper."""
    llama = {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32}
    described = ("LlamaForCausalLM", "LlamaConfig", {**llama, "num_attention_heads": 32})
    target = {"role": ["attn.{q,k,v,o}", "ffn.{gate,up,down}"]}
    assert count([{"method": "miss", "target": target}], described).trainable_parameters == 87_031_808
