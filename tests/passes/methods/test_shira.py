"""SHiRA: the contract, its formula and counts, positions, memory, tied weights, and PEFT's files."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import graftc
from graftc.compiler.folding.steps import lazy_tensors
from graftc.specs.errors.diagnostics import GraftError
from graftc.testing import DeploymentContract, MethodContract, largest_difference, outputs_of, perturb, same_bits
from graftc.testing.compare import inputs_for
from graftc.testing.families import tiny
from tests.kit.depth import each_way
from tests.kit.models import fresh
from tests.kit.specs import varied
from tests.passes.methods.places import OTHERS, ROLES

SHIRA: dict[str, Any] = {"method": "shira", "target": {"role": ROLES}, "rank": 3}


class TestSHiRA(MethodContract):
    """Entries of layers; ``attn.q`` of GPT-2 is a range of rows of a transposed matrix."""

    adaptation: ClassVar[dict[str, Any]] = SHIRA
    families = ("gpt2",)


@pytest.mark.full
class TestEverywhere(TestSHiRA):
    """Entries of the other families."""

    families = OTHERS


@pytest.mark.full
class TestExpertsAndTables(MethodContract):
    """Entries of each layer's experts, of a table of embeddings and of queries."""

    variant = True
    adaptation: ClassVar[dict[str, Any]] = {
        "method": "shira",
        "target": {"role": ["attn.v", "experts", "embed"]},
        "rank": 3,
    }
    families = ("mixtral",)


class TestDeployed(DeploymentContract):
    """Export and compilation of SHiRA."""

    adaptation: ClassVar[dict[str, Any]] = SHIRA
    families = ("llama",)


def parts_of(compiled: Any) -> dict[str, tuple[Tensor, Tensor]]:
    """Return indices and deltas by the names of the base's tensors."""
    tensors = compiled.adapter_state_dict()
    return {
        name.partition(".graftc.")[0] + ".weight": (tensors[name.removesuffix("delta") + "indices"], tensors[name])
        for name in tensors
        if name.endswith("_delta")
    }


@pytest.mark.slow
@pytest.mark.sample("llama")
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_update(family: str) -> None:
    """``W' - W`` has the deltas at the indices and zeros elsewhere; its rank exceeds that of the adaptation."""
    target = {"modules": "**.mlp.c_proj" if family == "gpt2" else "**.down_proj"}
    compiled = fresh(family, varied(SHIRA, target=target))
    perturb(compiled, 0.5)
    lazy = lazy_tensors(compiled.compilation)
    own = parts_of(compiled)
    assert len(own) == 2
    for name, (indices, delta) in own.items():
        weight = compiled.compilation.store.get(name).double()
        expected = torch.zeros(weight.numel(), dtype=torch.float64).index_copy_(0, indices.long(), delta.double())
        torch.testing.assert_close(lazy.exact(name) - weight, expected.view(weight.shape), rtol=0, atol=1e-14)
        assert indices.dtype == torch.int32 and bool((indices[1:] > indices[:-1]).all())
        assert int(torch.linalg.matrix_rank(expected.view(weight.shape))) > 30


@pytest.mark.slow
def test_start_and_count() -> None:
    """Every weight has as many entries as LoRA's factors of that rank, all of them zero; others are untouched."""
    compiled = fresh("bert", SHIRA)
    own = parts_of(compiled)
    counts = {name.split(".")[-2]: len(delta) for name, (_, delta) in own.items()}
    assert counts == {"query": 3 * 96, "value": 3 * 96, "dense": 3 * 128}
    assert not any(delta.any() for _, delta in own.values())
    assert compiled.report.trainable_parameters == 2 * 3 * (96 + 96 + 128)
    (adaptation,) = compiled.report.adaptations
    assert adaptation.bytes == 8 * compiled.report.trainable_parameters, "a value and an index of four bytes each"


@pytest.mark.full
def test_positions() -> None:
    """Positions differ between weights and seeds, and lie anywhere in the weight; with ``mask_seed`` they do not."""
    first, second = (parts_of(fresh("bert", SHIRA, seed=seed)) for seed in (0, 1))
    names = list(first)
    assert not torch.equal(first[names[0]][0], first[names[1]][0])
    assert all(not torch.equal(first[name][0], second[name][0]) for name in names)
    places = torch.cat([indices.double() / (48 * 80) for name, (indices, _) in first.items() if ".output." in name])
    assert abs(float(places.mean()) - 0.5) < 0.05 and float(places.min()) < 0.05 and float(places.max()) > 0.95
    seeded = [parts_of(fresh("bert", varied(SHIRA, mask_seed=5), seed=seed)) for seed in (0, 1)]
    assert all(torch.equal(seeded[0][name][0], seeded[1][name][0]) for name in names)
    assert torch.equal(seeded[0][names[0]][0], seeded[0][names[1]][0]), "the same size, the same positions"


@pytest.mark.slow
def test_mask_seed_draws_the_positions_of_peft() -> None:
    peft = pytest.importorskip("peft")
    modules = ["q_proj", "down_proj"]
    config = peft.ShiraConfig(r=3, random_seed=11, target_modules=modules)
    theirs = dict(peft.get_peft_model(tiny("llama"), config).base_model.model.named_modules())
    target = {"modules": [f"**.{name}" for name in modules]}
    own = parts_of(fresh("llama", varied(SHIRA, target=target, mask_seed=11)))
    assert len(own) == 4
    for name, (indices, _) in own.items():
        module = theirs[name.removesuffix(".weight")]
        rows, columns = module.shira_indices["default"].long()
        assert torch.equal(indices.long(), rows * module.in_features + columns), name


@pytest.mark.full
@pytest.mark.parametrize(("rank", "fits"), [(24, True), (25, False)])
def test_largest_rank(rank: int, fits: bool) -> None:
    """A square weight of side 48 has room for a rank of 24."""
    entry = varied(SHIRA, target={"role": "attn.q"}, rank=rank)
    if fits:
        assert all(len(delta) == 48 * 48 for _, delta in parts_of(fresh("llama", entry)).values())
        return
    with pytest.raises(GraftError, match="at most 24") as error:
        fresh("llama", entry)
    assert error.value.code == "GC020" and str(error.value.place).endswith("rank")


@pytest.mark.full
def test_artifact_and_joined(tmp_path: Path) -> None:
    """An artifact computes the same, and two adaptations of one base add up."""
    compiled = fresh("bert", SHIRA)
    perturb(compiled, 0.3)
    compiled.save(tmp_path / "kept")
    loaded, inputs = graftc.load(tmp_path / "kept", tiny("bert")), inputs_for(compiled)
    assert same_bits(outputs_of(loaded, inputs), outputs_of(compiled, inputs))
    model = tiny("bert")
    one, other = (graftc.compile({"adapt": [{**SHIRA, "name": name}]}, model).eval() for name in ("task", "language"))
    for each in (one, other):
        perturb(each, 0.3)
    both = one.joined(other)
    name = "bert.encoder.layer.0.output.dense.weight"
    updates = [lazy_tensors(m.compilation).exact(name) - model.get_parameter(name).double() for m in (one, other, both)]
    torch.testing.assert_close(updates[2], updates[0] + updates[1], rtol=0, atol=1e-6)


def saved(folder: Path, **fields: Any) -> Any:
    """Save a model of peft with perturbed entries."""
    import peft

    model = peft.get_peft_model(tiny("llama"), peft.ShiraConfig(r=2, target_modules=["q_proj", "down_proj"], **fields))
    for name, parameter in model.named_parameters():
        if "shira_weight" in name:
            parameter.data.normal_(0, 0.1)
    model.save_pretrained(folder)
    return model.eval()


CHANGES = {
    "beyond the rows": lambda t: t.index_fill(1, torch.tensor([-1]), 999),
    "negative": lambda t: t.index_fill(1, torch.tensor([0]), -1),
    "twice": lambda t: torch.cat([t[:, :1], t[:, :-1]], 1),
    "out of order": lambda t: t.flip(1),
}


@pytest.mark.slow
@pytest.mark.sample("beyond the rows")
@pytest.mark.parametrize("change", CHANGES)
def test_indices_of_a_file_are_checked(change: str, tmp_path: Path) -> None:
    """Kernels use indices unchecked, so a file's are checked when it is read."""
    pytest.importorskip("peft")
    saved(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    key = next(key for key in tensors if key.endswith("shira_indices"))
    save_file({**tensors, key: CHANGES[change](tensors[key]).contiguous()}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(GraftError, match="in ascending order") as error:
        graftc.import_peft(tmp_path, tiny("llama"))
    assert error.value.code == "GC114"


@pytest.mark.full
def test_a_mask_of_the_users_own_and_a_file_from_windows(tmp_path: Path) -> None:
    """The file has the positions, whatever mask chose them; PEFT writes them as float32 on Windows."""
    pytest.importorskip("peft")
    theirs = saved(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "mask_type": "mine"}))
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    save_file({key: t.float() for key, t in tensors.items()}, tmp_path / "adapter_model.safetensors")
    ours = graftc.import_peft(tmp_path, tiny("llama")).eval()
    inputs = inputs_for(ours)
    assert largest_difference(outputs_of(ours, inputs), outputs_of(theirs, inputs)) <= 1e-5


@pytest.mark.full
def test_heads_and_transposed_weights_are_not_for_peft(tmp_path: Path) -> None:
    """PEFT's SHiRA has no ``Conv1D``, and heads are skipped here."""
    peft = pytest.importorskip("peft")
    with pytest.raises(GraftError, match="Conv1D") as error:
        fresh("gpt2", varied(SHIRA, target={"modules": "**.mlp.c_proj"})).export(tmp_path / "out", format="peft")
    assert error.value.code == "GC115"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(tiny("llama"), peft.ShiraConfig(r=2, target_modules=["q_proj", "lm_head"]))
        model.save_pretrained(tmp_path / "head")
    with pytest.raises(GraftError) as error:
        graftc.import_peft(tmp_path / "head", tiny("llama"))
    assert error.value.code in ("GC112", "GC114")


@pytest.mark.full
@each_way
def test_published_count(count: Any) -> None:
    """Llama-7B with q, k, v, up and down at LoRA's rank 32: 0.83% of the parameters, as LoRA has in the paper."""
    llama = {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32}
    described = ("LlamaForCausalLM", "LlamaConfig", {**llama, "num_attention_heads": 32})
    counted = count([{"method": "shira", "target": {"role": ["attn.{q,k,v}", "ffn.{up,down}"]}}], described)
    assert counted.trainable_parameters == 32 * 32 * (3 * 8192 + 2 * 15104) == 56_098_816
    assert round(counted.percent, 2) == 0.83
