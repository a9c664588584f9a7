"""DyLoRA: randomly drawn ranks, frozen gradients, and deployed ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import graftc
from graftc.compiler.folding.steps import lazy_tensors
from graftc.specs.errors.diagnostics import GraftError
from graftc.testing import largest_difference, outputs_of, perturb, same_bits
from graftc.testing.compare import flat, inputs_for
from graftc.testing.deployment import check_onnx
from graftc.testing.families import tiny
from tests.kit.comparing import floats, gradients_of, same_tensors
from tests.kit.models import fresh, still
from tests.kit.specs import varied

ROLES = ["attn.q", "ffn.down"]
QUERY = "bert.encoder.layer.0.attention.self.query"
DYLORA = {"method": "dylora", "target": {"role": ROLES}, "rank": 6, "alpha": 5}


def truncated(compiled: Any, rank: int, family: str = "bert", role: Any = ROLES) -> Any:
    """Plain LoRA with the first ``rank`` rows and columns and the scale `alpha / rank`."""
    entry = {"method": "lora", "target": {"role": role}, "rank": rank, "alpha": 5}
    lora = fresh(still(family), entry)
    state = compiled.adapter_state_dict()
    own = {name: state[name.replace(".lora.", ".dylora.")] for name in lora.adapter_state_dict()}
    cut = {n: t[..., :rank, :] if n.endswith(".A") else t[..., :rank] for n, t in own.items()}
    lora.load_adapter_state_dict(cut)
    return lora


@pytest.mark.full
@pytest.mark.parametrize("family", ["bert", "gpt2", "mixtral"])
def test_at_a_rank_it_is_truncated_lora(family: str) -> None:
    """Deployed at any rank, the outputs are those of LoRA with the first rows and columns and `alpha` over it."""
    role = ["attn.q", "experts"] if family == "mixtral" else ROLES
    compiled = fresh(still(family), varied(DYLORA, role))
    perturb(compiled)
    inputs = inputs_for(compiled)
    seen = []
    for rank in (1, 2, 5, 6):
        compiled.deploy_rank("dylora", rank)
        actual = outputs_of(compiled, inputs)
        assert largest_difference(actual, outputs_of(truncated(compiled, rank, family, role), inputs)) <= 1e-5
        assert all(largest_difference(actual, other) > 1e-4 for other in seen)
        seen.append(actual)


@pytest.mark.full
def test_folds_at_the_deployed_rank() -> None:
    """The fold is certified at each rank, and is exactly `alpha / r` times the truncated product in float64."""
    compiled = fresh(still("bert"), DYLORA)
    state = perturb(compiled)
    a, b = (state[f"{QUERY}.graftc.dylora.{part}"].double() for part in "AB")
    base = tiny("bert").get_parameter(f"{QUERY}.weight").detach().double()
    for rank in (6, 3):
        compiled.deploy_rank("dylora", rank)
        update = lazy_tensors(compiled.compilation).exact(f"{QUERY}.weight") - base
        torch.testing.assert_close(update, 5 / rank * b[:, :rank] @ a[:rank], rtol=0, atol=1e-14)
        merged = compiled.merge()
        assert merged.certificate.passed
        inputs = inputs_for(compiled)
        assert largest_difference(outputs_of(merged, inputs), outputs_of(compiled, inputs)) <= 2e-5


@pytest.mark.full
def test_prefix_nesting() -> None:
    """The tensors deployed at a rank are a prefix of those at the next one, so values of later ranks have no effect."""
    compiled = fresh(still("bert"), DYLORA)
    perturb(compiled)
    compiled.deploy_rank("dylora", 3)
    inputs = inputs_for(compiled)
    before = outputs_of(compiled, inputs)
    with torch.no_grad():
        for name, tensor in compiled.adapter_state_dict().items():
            if name.endswith((".A", ".B")):
                (tensor[3:] if name.endswith(".A") else tensor[:, 3:]).normal_()
    assert same_bits(outputs_of(compiled, inputs), before)
    patterns = []
    for rank in range(1, 7):
        compiled.deploy_rank("dylora", rank)
        patterns.append(compiled.rank_pattern("dylora")[f"{QUERY}.weight"])
        assert patterns[-1].tolist() == [True] * rank + [False] * (6 - rank)


def gradients(compiled: Any, seed: int) -> dict[str, Tensor]:
    """Return the gradients of one training pass."""
    torch.manual_seed(seed)
    compiled.train()
    compiled.zero_grad()
    inputs = inputs_for(compiled)
    torch.stack([leaf.square().sum() for leaf in flat(compiled(**inputs)) if leaf.is_floating_point()]).sum().backward()
    return gradients_of(compiled)


def support(gradient: Tensor, name: str) -> list[int]:
    """Return the ranks with a nonzero gradient."""
    ranks = gradient.abs().amax(-1 if name.endswith(".A") else -2)
    return ranks.nonzero().flatten().tolist()


@pytest.mark.full
@pytest.mark.parametrize("frozen", [True, False])
def test_gradient_support_and_one_draw_for_all_sites(frozen: bool) -> None:
    """If frozen, only the last row and column of the draw have gradients, otherwise all up to it, at every site."""
    compiled = fresh(still("bert"), varied(DYLORA, frozen=frozen))
    perturb(compiled)
    last = set()
    for seed in range(12):
        supports = {tuple(support(gradient, name)) for name, gradient in gradients(compiled, seed).items()}
        assert len(supports) == 1
        (ranks,) = supports
        assert ranks == ((ranks[-1],) if frozen else tuple(range(ranks[-1] + 1)))
        last.add(ranks[-1])
    assert len(last) > 2


@pytest.mark.full
def test_frozen_changes_gradients_only() -> None:
    """One draw gives the same outputs with either setting, and the same gradient wherever there is one."""
    first, second = fresh(still("bert"), DYLORA), fresh(still("bert"), varied(DYLORA, frozen=False))
    perturb(first)
    second.load_adapter_state_dict(first.adapter_state_dict())
    one, two = gradients(first, 4), gradients(second, 4)
    for name, gradient in one.items():
        row = support(gradient, name)[0]
        a, b = (g[row] if name.endswith(".A") else g[:, row] for g in (gradient, two[name]))
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.full
def test_plain_sgd_moves_one_row_and_adamw_others_too() -> None:
    """The gradient of other rows is zero, but momentum and weight decay move them."""
    for optimiser_class, alone in ((torch.optim.SGD, True), (torch.optim.AdamW, False)):
        compiled = fresh(still("bert"), DYLORA)
        perturb(compiled)
        optimiser = optimiser_class([p for p in compiled.parameters() if p.requires_grad], lr=1e-2)
        gradients(compiled, 1)
        optimiser.step()
        before = {name: p.detach().clone() for name, p in compiled.named_parameters()}
        name = f"{QUERY}.graftc.dylora.A"
        rows = support(gradients(compiled, 3)[name], name)
        optimiser.step()
        moved = support(compiled.get_parameter(name).detach() - before[name], name)
        assert (moved == rows) is alone
        assert len(rows) == 1


@pytest.mark.full
def test_draws_are_uniform_and_differ_between_passes() -> None:
    """Training passes give the outputs of the deployed ranks, each about equally often."""
    compiled = fresh(still("bert"), varied(DYLORA, rank=4))
    perturb(compiled)
    inputs = inputs_for(compiled)
    at = {}
    for rank in range(1, 5):
        compiled.deploy_rank("dylora", rank)
        at[rank] = outputs_of(compiled, inputs)
    compiled.train()
    counts = dict.fromkeys(at, 0)
    with torch.no_grad():
        for _ in range(200):
            actual = floats(compiled(**inputs))
            differences = {rank: largest_difference(actual, expected) for rank, expected in at.items()}
            best = min(differences, key=differences.__getitem__)
            assert differences[best] <= 1e-5
            counts[best] += 1
    assert all(25 <= count <= 75 for count in counts.values()), counts


@pytest.mark.full
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_recomputed_layers_have_the_same_draw(family: str) -> None:
    """Gradients with and without activation checkpointing are equal to the bit."""
    plain, checkpointed = fresh(still(family), DYLORA), fresh(still(family), DYLORA, checkpoint="layers")
    perturb(plain)
    checkpointed.load_adapter_state_dict(plain.adapter_state_dict())
    for seed in range(4):
        one, two = gradients(plain, seed), gradients(checkpointed, seed)
        assert same_tensors(one, two)


@pytest.mark.slow
def test_one_node_draws_and_eval_has_none() -> None:
    """The train graph has one draw, outside the layers; the eval graph has neither a draw nor a stopped gradient."""
    compiled = fresh(still("bert"), varied(DYLORA, ["attn.q", "attn.k", "ffn.up", "ffn.down"]))
    aten = torch.ops.aten
    nodes = compiled.program("train").graph.find_nodes(op="call_function", target=aten.randint_like.low_dtype)
    assert len(nodes) == 1 and nodes[0].meta["module"] == ""
    for target in (aten.randint_like.low_dtype, aten.detach.default, aten.where.self):
        eval_nodes = compiled.program("eval").graph.find_nodes(op="call_function", target=target)
        assert not [node for node in eval_nodes if "graftc" in node.meta.get("custom", {})]


@pytest.mark.full
def test_the_deployed_rank_is_kept(tmp_path: Any) -> None:
    """Artifacts and state dicts keep the deployed rank; training afterwards still draws from all ranks."""
    compiled = fresh(still("bert"), DYLORA)
    perturb(compiled)
    compiled.deploy_rank("dylora", 2)
    assert compiled.adapter_state_dict()["graftc.dylora.deployed"].tolist() == [2]
    compiled.save(tmp_path / "artifact")
    loaded = graftc.load(tmp_path / "artifact", still("bert")).eval()
    inputs = inputs_for(compiled)
    assert same_bits(outputs_of(loaded, inputs), outputs_of(compiled, inputs))
    last = {
        support(g, name)[-1] for seed in range(12) for name, g in gradients(loaded, seed).items() if name.endswith(".A")
    }
    assert max(last) > 1


@pytest.mark.full
def test_exports_at_the_deployed_rank(tmp_path: Any) -> None:
    """The unfolded and the folded model export alike."""
    compiled = fresh(still("gpt2"), DYLORA)
    perturb(compiled)
    compiled.deploy_rank("dylora", 2)
    for number, runner in enumerate((compiled, compiled.merge())):
        check_onnx(runner.export(tmp_path / f"{number}.onnx"), compiled, (2, 7), 1e-4)


@pytest.mark.slow
def test_ranks_that_cannot_be_deployed() -> None:
    """Ranks out of range and other methods raise GC055, other names GC091; nothing changes."""
    compiled = fresh(still("bert"), DYLORA)
    for rank in (0, 7, -1, 2.0, True):
        with pytest.raises(GraftError) as caught:
            compiled.deploy_rank("dylora", rank)
        assert caught.value.code == "GC055" and "from 1 to 6" in caught.value.message
    assert compiled.adapter_state_dict()["graftc.dylora.deployed"].tolist() == [6]
    with pytest.raises(GraftError) as caught:
        compiled.deploy_rank("dilora", 2)
    assert caught.value.code == "GC091" and "dylora" in (caught.value.hint or "")
    lora = graftc.compile({"adapt": [{"method": "lora", "target": {"role": "attn.q"}}]}, tiny("bert"))
    with pytest.raises(GraftError) as caught:
        lora.deploy_rank("lora", 2)
    assert caught.value.code == "GC055"
    assert lora.rank_pattern("lora") == {}


@pytest.mark.slow
def test_sixteen_bits() -> None:
    """In bfloat16 the gate has the layer's type, and the rank stays an integer."""
    model = tiny("llama", dtype=torch.bfloat16)
    entry = {"method": "dylora", "target": {"role": "attn.q"}, "rank": 6, "alpha": 5}
    compiled = graftc.compile({"adapt": [entry]}, model)
    perturb(compiled)
    compiled.deploy_rank("dylora", 3)
    inputs = inputs_for(compiled)
    assert largest_difference(outputs_of(compiled.merge(), inputs), outputs_of(compiled, inputs)) <= 0.15
    assert gradients(compiled, 0)
