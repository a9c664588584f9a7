"""Initial values from examples: EVA and LoRA-GA, against plain torch and peft."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import graftc
from graftc.passes.core.method.principal import PrincipalComponents
from graftc.specs.errors.diagnostics import GraftError
from graftc.testing import largest_difference, outputs_of, perturb, same_bits, tiny
from tests.kit.models import fresh
from tests.kit.releases import needs
from tests.kit.specs import varied

ROLES = ["attn.q", "attn.v", "ffn.down"]
EVA = {"method": "lora", "rank": 4, "alpha": 6, "init": "eva", "target": {"role": ROLES}}
GA = varied(EVA, init="lora_ga")


def batches(count: int = 3) -> list[dict[str, Tensor]]:
    """Return batches with padding on the right, and labels that leave out the first token."""
    generator = torch.Generator().manual_seed(7)
    result: list[dict[str, Tensor]] = []
    for _ in range(count):
        ids = torch.randint(1, 100, (6, 12), generator=generator)
        mask = torch.ones_like(ids)
        mask[0, 7:] = mask[3, 4:] = 0
        labels = ids.masked_fill(mask == 0, -100)
        labels[:, 0] = -100
        result.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return result


def inputs_of(model: nn.Module, module: str, examples: list[dict[str, Tensor]]) -> Tensor:
    """Return what a module of the source model reads at tokens that count, ``[n, in]``."""
    rows: list[Tensor] = []
    handle = model.get_submodule(module).register_forward_pre_hook(lambda _, args: rows.append(args[0].detach()))
    with torch.no_grad():
        for example in examples:
            model(**example)
    handle.remove()
    real = [(e["attention_mask"] == 1) & (e["labels"] != -100) for e in examples]
    return torch.cat([row[keep] for row, keep in zip(rows, real, strict=True)])


def tensor(tensors: Mapping[str, Tensor], module: str, part: str) -> Tensor:
    return tensors[f"{module}.graftc.lora.{part}"]


def projector(rows: Tensor) -> Tensor:
    """Return the projection onto the space that rows span."""
    q, _ = torch.linalg.qr(rows.double().T)
    projection: Tensor = q @ q.T
    return projection


def overlap(first: Tensor, second: Tensor) -> float:
    """Return how much the spaces of as many rows have in common: 1 if they are the same, 0 if they are orthogonal."""
    return float((projector(first) * projector(second)).sum()) / first.shape[0]


@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.integers(1, 6), st.integers(0, 99))
def test_components_are_those_of_all_vectors(sizes: list[int], width: int, seed: int) -> None:
    """With as many components as there are dimensions, batches of any sizes give the same result as one."""
    generator = torch.Generator().manual_seed(seed)
    parts = [torch.randn(size, width, generator=generator, dtype=torch.float64) + 3 for size in sizes]
    components = PrincipalComponents(width)
    for part in parts:
        components.add(part)
    every = torch.cat(parts)
    centred = every - every.mean(0)
    expected = torch.linalg.svdvals(centred).square()
    squares = components.variances * max(1, len(every) - 1)
    common = min(len(squares), len(expected))
    torch.testing.assert_close(squares[:common], expected[:common], rtol=1e-9, atol=1e-10)
    assert all(float(rest) < 1e-10 for rest in (*squares[common:], *expected[common:]))
    if float(expected.sum()) > 1e-9:
        torch.testing.assert_close(components.explained.sum(), torch.ones((), dtype=torch.float64))


@pytest.mark.slow
def test_eva_has_the_principal_directions_of_each_input() -> None:
    """A spans what a decomposition of the source model's own inputs gives, B is zero, and no output changes."""
    model, examples = tiny("llama"), batches()
    compiled = fresh(model, varied(EVA, eva_rho=1.0))
    assert compiled.uninitialised == ("lora",)
    started = compiled.initialise(examples)
    assert started.uninitialised == () and compiled.uninitialised == ("lora",)
    tensors = started.adapter_state_dict()
    for module in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"):
        vectors = inputs_of(model, module, examples).double()
        _, _, directions = torch.linalg.svd(vectors - vectors.mean(0), full_matrices=False)
        down = tensor(tensors, module, "A")
        torch.testing.assert_close(down @ down.T, torch.eye(4), rtol=0, atol=1e-5)
        assert not tensor(tensors, module, "B").any()
        # Only some directions are kept from batch to batch.
        assert overlap(down, directions[:4]) > 0.98, module
        one = fresh(model, varied(EVA, eva_rho=1.0)).initialise(examples[:1]).adapter_state_dict()
        vectors = inputs_of(model, module, examples[:1]).double()
        _, _, directions = torch.linalg.svd(vectors - vectors.mean(0), full_matrices=False)
        torch.testing.assert_close(projector(tensor(one, module, "A")), projector(directions[:4]), rtol=0, atol=1e-4)
    assert same_bits(outputs_of(started, examples[0]), outputs_of(model, examples[0]))


@pytest.mark.slow
def test_eva_has_pefts_directions() -> None:
    """On one batch peft's own initialisation gives the same space at every module."""
    peft = pytest.importorskip("peft")
    needs("peft", "0.20", "earlier ones ignore the use_label_mask of EVA")
    model, examples = tiny("llama"), batches(1)
    started = fresh(model, varied(EVA, eva_rho=1.0)).initialise(examples).adapter_state_dict()
    config = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=["q_proj", "v_proj", "down_proj"],
        init_lora_weights="eva",
        eva_config=peft.EvaConfig(rho=1.0),
    )
    theirs = peft.get_peft_model(tiny("llama"), config)
    peft.initialize_lora_eva_weights(theirs, examples, show_progress_bar=False)
    compared = 0
    for name, value in theirs.named_parameters():
        if "lora_A" in name:
            module = name.removeprefix("base_model.model.").partition(".lora_A")[0]
            ours = tensor(started, module, "A")
            # Peft's decomposition is randomised, so it explains a little less variance.
            assert overlap(ours, value.detach()) > 0.995, name
            vectors = inputs_of(model, module, examples).double()
            vectors = vectors - vectors.mean(0)
            explained, theirs_explained = (
                (vectors @ projector(rows)).square().sum() for rows in (ours, value.detach())
            )
            assert float(explained / theirs_explained) > 1 - 1e-6, name
            compared += 1
    assert compared == 6


@pytest.mark.slow
def test_eva_moves_ranks_to_where_variance_is() -> None:
    """Ranks add up to the same number, none is above ``rank * rho`` or zero, and every scaling stays the same."""
    compiled = fresh("llama", {**EVA, "target": {"role": [*ROLES, "attn.k", "ffn.up"]}})
    started = compiled.initialise(batches())
    ranks = {n: t.shape[0] for n, t in started.adapter_state_dict().items() if n.endswith(".A")}
    assert sum(ranks.values()) == 4 * len(ranks)
    assert len(set(ranks.values())) > 1 and max(ranks.values()) <= 8 and min(ranks.values()) >= 1
    for site, spec in started.compilation.main.resolved[0].sites:
        assert spec.rank == ranks[f"{site.key.module}.graftc.lora.A"]
        assert spec.scaling == pytest.approx(6 / 4, rel=1e-12)


@pytest.mark.slow
def test_lora_ga_follows_the_gradient() -> None:
    """A and B have the singular directions of the mean gradient of the source's weight, in the paper's scale."""
    model, examples = tiny("llama").double(), batches(2)
    started = fresh(model, varied(GA, lora_ga_gamma=9.0)).initialise(examples)
    tensors = started.adapter_state_dict()
    module = "model.layers.1.mlp.down_proj"
    weight = model.get_parameter(f"{module}.weight")
    gradient = torch.stack([torch.autograd.grad(model(**example).loss, weight)[0] for example in examples]).sum(0)
    u, _, v = torch.linalg.svd(gradient, full_matrices=False)
    scale = gradient.shape[0] ** 0.25 / 3
    down, up = tensor(tensors, module, "A"), tensor(tensors, module, "B")
    torch.testing.assert_close(down @ down.T, scale**2 * torch.eye(4, dtype=torch.float64), rtol=0, atol=1e-9)
    torch.testing.assert_close(projector(down), projector(v[:4]), rtol=0, atol=1e-6)
    torch.testing.assert_close(up.T @ up, scale**2 * torch.eye(4, dtype=torch.float64), rtol=0, atol=1e-9)
    torch.testing.assert_close(projector(up.T), projector(u[:, 4:8].T), rtol=0, atol=1e-6)
    assert same_bits(outputs_of(started, examples[0]), outputs_of(model, examples[0]))
    assert not started.uninitialised


@pytest.mark.slow
@pytest.mark.sample("lora_ga")
@pytest.mark.parametrize("entry", [EVA, GA], ids=["eva", "lora_ga"])
def test_what_starts_from_examples_is_saved_merged_and_exported(entry: Mapping[str, Any], tmp_path: Path) -> None:
    """An artifact, a merge and peft's own model compute what the trained model computes."""
    peft = pytest.importorskip("peft")
    model, examples = tiny("llama"), batches(1)
    started = fresh(model, entry).initialise(examples).eval()
    perturb(started, 0.1)
    expected = outputs_of(started, examples[0])
    assert largest_difference(expected, outputs_of(model, examples[0])) > 1e-3
    started.save(tmp_path / "saved")
    loaded = graftc.load(tmp_path / "saved", tiny("llama"))
    assert same_bits(outputs_of(loaded, examples[0]), expected) and not loaded.uninitialised
    merged = started.merge()
    assert merged.certificate.passed
    assert largest_difference(outputs_of(merged, examples[0]), expected) <= 1e-5
    started.export(tmp_path / "peft", format="peft")
    theirs = peft.PeftModel.from_pretrained(tiny("llama"), tmp_path / "peft").eval()
    assert largest_difference(outputs_of(theirs, examples[0]), expected) <= 1e-5


@pytest.mark.slow
def test_it_warns_of_training_from_other_values() -> None:
    """A model that trains before its initial values were computed says so when it is merged."""
    compiled = fresh("llama", EVA)
    compiled.train()
    compiled(**batches(1)[0]).loss.backward()
    with torch.no_grad():
        for parameter in compiled.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    with pytest.warns(UserWarning, match=r"GC025.*'lora' was trained before its initial values were computed"):
        compiled.merge()


@pytest.mark.slow
def test_tune_starts_from_examples() -> None:
    """`graftc.tune` computes initial values before the first training run."""
    seen: list[tuple[str, ...]] = []
    spec = {"adapt": [EVA]}
    graftc.tune(spec, tiny("llama"), lambda model, stage: seen.append(model.uninitialised), examples=batches(1))
    assert seen == [()]
    with pytest.raises(GraftError, match=r"GC056.*'lora' starts from examples"):
        graftc.tune(spec, tiny("llama"), lambda model, stage: None)


@pytest.mark.full
def test_refusals() -> None:
    """No examples, nothing to initialise, sites that are not dense layers, and ranks without enough directions."""
    with pytest.raises(GraftError, match=r"GC056.*no examples"):
        fresh("llama", EVA).initialise([])
    for wrong in (batches(1)[0], ["abc"], None, "abc"):
        with pytest.raises(GraftError, match=r"(?s)GC056.*initialise\(\[batch\]\)"):
            fresh("llama", EVA).initialise(wrong)
    with pytest.raises(GraftError, match=r"GC056.*no adaptation has initial values"):
        fresh("llama", varied(EVA, init="kaiming")).initialise(batches(1))
    with pytest.raises(GraftError, match=r"GC017.*is not a dense layer"):
        fresh("bert", {**EVA, "target": {"role": "embed"}})
    with pytest.raises(GraftError, match=r"GC020.*twice as many directions"):
        fresh("llama", varied(GA, rank=13))
    example = {name: value for name, value in batches(1)[0].items() if name != "labels"}
    with pytest.raises(GraftError, match=r"(?s)GC056.*no loss.*initialise\(examples, loss"):
        fresh("llama", GA).initialise([example])


@pytest.mark.full
def test_examples_without_information_are_refused() -> None:
    """Examples in which no token counts, whose gradient is zero, or for which the model's values are not finite."""
    example = batches(1)[0]
    empty = {**example, "labels": torch.full_like(example["labels"], -100)}
    with pytest.raises(GraftError, match=r"GC056.*no tokens that count"):
        fresh("llama", EVA).initialise([empty])
    with pytest.raises(GraftError, match=r"GC056.*(is zero for all examples|is not finite)"):
        fresh("llama", GA).initialise([empty])
    model = tiny("llama")
    with torch.no_grad():
        model.get_parameter("model.embed_tokens.weight")[:, 3] = float("nan")
    for entry in (EVA, GA):
        with pytest.raises(GraftError, match=r"GC056.*is not finite"):
            fresh(model, entry).initialise([example])


@pytest.mark.full
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bits(dtype: torch.dtype) -> None:
    """On a 16-bit base, whose factors are cast where they are read, inputs and gradients are found as well."""
    example = batches(1)[0]
    model = tiny("llama").to(dtype)
    for entry in (EVA, GA):
        compiled = fresh(model, entry)
        with torch.no_grad():
            started = compiled.initialise([example])
        assert not started.uninitialised
        down = tensor(started.adapter_state_dict(), "model.layers.1.mlp.down_proj", "A")
        gram = (down @ down.T).double()
        torch.testing.assert_close(gram / gram[0, 0], torch.eye(len(down), dtype=torch.float64), rtol=0, atol=1e-4)
        assert same_bits(outputs_of(started, example), outputs_of(model, example))


@pytest.mark.full
def test_a_trained_model_is_not_initialised_again() -> None:
    """Initial values would replace what it has learned."""
    for entry in (EVA, GA):
        compiled = fresh("llama", entry)
        perturb(compiled, 0.1)
        with pytest.raises(GraftError, match=r"GC056.*'lora' has been trained"):
            compiled.initialise(batches(1))
