"""The memory planner: planned peaks match measured ones, and the sizes that it reports as fitting do fit."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import graftc
from graftc.applications.planner.fitting import largest
from graftc.applications.planner.planning import workbench
from graftc.applications.planner.sizes import bytes_of
from graftc.compiler.signatures import signature_for
from graftc.runtime.model.simulated_step import Simulation
from graftc.runtime.optim import SM3, AgedAdamW
from graftc.specs.errors.diagnostics import GraftError
from graftc.testing import tiny
from tests.applications.planner.measured_memory import peak_of_training
from tests.kit.training import adamw

ROLES = ["attn.q", "attn.k", "attn.v", "attn.o", "ffn.gate", "ffn.up", "ffn.down"]
LORA: dict[str, Any] = {"method": "lora", "rank": 8, "target": {"role": ROLES}}
AG: dict[str, Any] = {"method": "spiel", "variant": "AG", "density": 0.05, "total_steps": 100}
BATCH, LENGTH = 4, 64


def llama(**settings: Any) -> nn.Module:
    sizes = {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(**{**sizes, "vocab_size": 1000, "use_cache": False, **settings})
    return LlamaForCausalLM(config).requires_grad_(False)


@pytest.fixture(scope="module")
def base() -> nn.Module:
    return llama()


@pytest.fixture(scope="module")
def batch() -> dict[str, Tensor]:
    ids = torch.ones(BATCH, LENGTH, dtype=torch.int64)
    return {"input_ids": ids, "attention_mask": ids, "labels": ids}


@pytest.mark.full
@pytest.mark.parametrize(
    ("adaptation", "options", "optimiser"),
    [
        (LORA, {}, adamw),
        (LORA, {"memory": {"loss": "chunked"}, "checkpoint": "layers"}, adamw),
        (AG, {"checkpoint": "layers"}, AgedAdamW),
        ({**AG, "variant": "MA"}, {}, SM3),
        ({"method": "full", "target": {"modules": "**.mlp.*"}}, {}, adamw),
    ],
    ids=["lora", "lora, chunked and checkpointed", "spiel-AG", "spiel-MA", "full"],
)
def test_the_planned_peak_is_the_measured_one(
    base: nn.Module, batch: dict[str, Tensor], adaptation: Any, options: Any, optimiser: Any
) -> None:
    spec = {"adapt": [adaptation], **options}
    measured = peak_of_training(graftc.compile(spec, base, batch), batch, optimiser)
    plan = graftc.plan(spec, base, batch=BATCH, sequence=LENGTH, device="cpu")
    assert plan.peak == pytest.approx(measured, rel=0.03)


@pytest.mark.full
def test_state_is_what_optimisers_keep(base: nn.Module, batch: dict[str, Tensor]) -> None:
    compiled = graftc.compile({"adapt": [LORA]}, base, batch)
    for name, make in {
        "adamw": adamw,
        "adafactor": lambda m: torch.optim.Adafactor([p for p in m.parameters() if p.requires_grad]),
        "sgd-momentum": lambda m: torch.optim.SGD([p for p in m.parameters() if p.requires_grad], 0.1, momentum=0.9),
        "sm3": SM3,
        "aged-adamw": AgedAdamW,
    }.items():
        model = copy.deepcopy(compiled)
        optimiser = make(model)
        for p in model.parameters():
            if p.requires_grad:
                p.grad = torch.ones_like(p)
        optimiser.step()
        kept = sum(t.nbytes for state in optimiser.state.values() for t in state.values() if isinstance(t, Tensor))
        plan = graftc.plan({"adapt": [LORA]}, base, batch=2, sequence=8, optimizer=name, device="cpu")
        assert plan.optimizer_state == kept, name


def test_eight_bits_take_a_byte_a_moment_and_a_factor_a_block() -> None:
    large, small = nn.Parameter(torch.ones(64, 100)), nn.Parameter(torch.ones(100))
    from graftc.applications.planner.optimisers import DeclaredAdamW8bit

    optimiser = DeclaredAdamW8bit([large, small])
    optimiser.step()
    kept = [sum(t.nbytes for t in optimiser.state[p].values()) for p in (large, small)]
    assert kept == [2 * (6400 + 4 * 25), 2 * 4 * 100]


@pytest.mark.full
@pytest.mark.parametrize(
    "options", [{}, {"checkpoint": "layers"}, {"train": ["**.mlp.up_proj"]}], ids=["plain", "checkpointed", "trained"]
)
def test_some_layers_say_what_all_do(options: Any) -> None:
    """Simulating some layers gives the same as simulating all, with a differently adapted layer between equal ones."""
    with torch.device("meta"):
        deep = llama(num_hidden_layers=19, hidden_size=32, intermediate_size=64, vocab_size=50)
    other = {"method": "lora", "rank": 2, "name": "other", "target": {"role": ["ffn.up"], "layers": 9}}
    bench = workbench({"adapt": [LORA, other], **options}, deep, device="cpu")
    present = bench.inputs(3, 24)
    signature = signature_for(bench._runner.shown.compilation, present)
    simulation = Simulation(bench._runner)
    simulation.step(signature, present, whole=True)  # makes plans for layers
    for accumulated in (False, True):
        whole = simulation.step(signature, present, whole=True, accumulated=accumulated)
        assert simulation.step(signature, present, accumulated=accumulated) == whole


@pytest.mark.full
def test_accumulated_gradients_are_there_from_the_start(base: nn.Module) -> None:
    spec = {"adapt": [{"method": "full", "target": {"modules": "**.mlp.*"}}]}
    once = graftc.plan(spec, base, batch=2, sequence=8, device="cpu")
    again = graftc.plan(spec, base, batch=2, sequence=8, device="cpu", accumulate=True)
    assert once.gradients < again.step and once.step < again.step
    assert once.gradients == once.trainable == sum(p.nbytes for n, p in base.named_parameters() if ".mlp." in n)


@pytest.mark.full
@pytest.mark.parametrize(
    ("options", "devices", "bits"),
    [({}, 1, 16), ({}, 2, 16), ({"base": {"quantize": "nf4"}}, 1, 4.5)],
    ids=["dense", "two devices", "nf4"],
)
def test_originals_are_what_trained_copies_stand_in_for(options: Any, devices: int, bits: float) -> None:
    """Originals are counted in the base's own dtype, whatever the dtype of the trained copies."""
    with torch.device("meta"):
        half = llama().to(torch.bfloat16)
    given: dict[str, Any] = {"sequence": 8, "devices": devices}
    plain = graftc.plan({"adapt": [LORA], **options}, half, **given)
    plan = graftc.plan({"adapt": [{"method": "full", "target": {"modules": "**.mlp.*"}}], **options}, half, **given)
    entries = sum(p.numel() for n, p in half.named_parameters() if ".mlp." in n) // devices
    assert (plain.originals, plan.originals, plan.trainable) == (0, entries * bits / 8, entries * 4)
    assert plan.frozen == plain.frozen


@pytest.mark.full
def test_originals_of_rows_are_these_rows(base: nn.Module) -> None:
    rows = {"method": "rows", "rows": [1, 2, 3], "target": {"modules": "model.embed_tokens"}}
    plan = graftc.plan({"adapt": [rows]}, base, sequence=8)
    assert plan.originals == plan.trainable == 3 * 128 * 4
    assert ("  originals of trained", plan.originals) in plan.parts() and plan.to_json()["originals"] == plan.originals


@pytest.mark.full
def test_the_model_may_be_without_values_and_in_another_type(base: nn.Module) -> None:
    with torch.device("meta"):
        other = llama()
    sizes: dict[str, Any] = {"batch": 2, "sequence": 32}
    plan = graftc.plan({"adapt": [LORA]}, base, **sizes)
    assert graftc.plan({"adapt": [LORA]}, other, **sizes) == plan
    half = graftc.plan({"adapt": [LORA]}, base, **sizes, dtype="bf16", checkpoint=True)
    cast = graftc.plan({"adapt": [LORA], "checkpoint": "layers"}, other.to(torch.bfloat16), **sizes)
    assert half == replace(cast, buffers=half.buffers)  # to() casts buffers as well
    assert (half.frozen, half.trainable, half.dtype) == (plan.frozen // 2, plan.trainable, "bfloat16")
    assert next(base.parameters()).dtype == torch.float32


@pytest.mark.full
@pytest.mark.parametrize("options", [{}, {"base": {"quantize": "nf4", "double": True}}], ids=["dense", "nf4"])
def test_a_chunked_loss_without_values(base: nn.Module, options: Any) -> None:
    """With a chunked loss, dense or packed, a model on the meta device has the same planned peak as one with values."""
    with torch.device("meta"):
        empty = llama()
    spec = {"adapt": [LORA], "memory": {"loss": "chunked"}, **options}
    plans = [graftc.plan(spec, each, batch=2, sequence=16, device="cpu") for each in (empty, base)]
    assert plans[0].peak == plans[1].peak > plans[0].resident


@pytest.mark.full
def test_what_fits_fits_and_nothing_larger_does(base: nn.Module) -> None:
    bench = workbench({"adapt": [LORA]}, base)
    room = bench.plan(8, 64).peak + 1000
    plan = graftc.plan({"adapt": [LORA]}, base, batch=3, sequence=64, budget=room)
    assert plan.fits and plan.largest_batch is not None and plan.largest_sequence is not None
    assert bench.plan(plan.largest_batch, 64).peak <= room < bench.plan(plan.largest_batch + 1, 64).peak
    assert bench.plan(3, plan.largest_sequence).peak <= room < bench.plan(3, plan.largest_sequence + 64).peak
    assert replace(plan, budget=plan.peak - 1).fits is False


@pytest.mark.parametrize(
    "peak", [lambda n: 7 * n, lambda n: n**2, lambda n: 50 * (n // 9) + 3, lambda n: 999 + n // 99]
)
def test_the_largest_size_is_found(peak: Any) -> None:
    for budget in (0, 1, 3, 7, 100, 1000, 1001):
        expected = max((n for n in range(1, 401) if peak(n) <= budget), default=0)
        assert {largest(peak, budget, 400, first) for first in (1, 2, 70, 999)} == {expected}


@pytest.mark.full
def test_a_model_with_a_table_of_positions_ends_there() -> None:
    with torch.device("meta"):
        model = tiny("bert")
    plan = graftc.plan({"adapt": [{"method": "ia3"}]}, model, batch=1, sequence=16, budget="10TB")
    assert plan.largest_sequence == model.config.max_position_embeddings  # type: ignore[union-attr]
    with pytest.raises(GraftError, match="GC143"):
        graftc.plan({"adapt": [{"method": "ia3"}]}, model, batch=1, sequence=10_000)


@pytest.mark.full
@pytest.mark.parametrize("family", ["t5", "gpt2", "bert"])
def test_labels_are_those_that_the_model_takes(family: str) -> None:
    bench = workbench({"adapt": [{"method": "ia3"}]}, tiny(family), device="cpu")
    given = bench.inputs(3, 7)
    assert given["labels"].shape == ((3,) if family == "bert" else (3, 7))
    plan = bench.plan(3, 7)
    assert 0 < plan.saved < plan.step < plan.peak
    assert plan.to_json()["peak"] == plan.peak and "batch 3 x 7 tokens" in str(plan)


@pytest.mark.parametrize(
    ("given", "count"),
    [("24GB", 24 * 10**9), ("1.5 GiB", 3 * 2**29), ("512mb", 512 * 10**6), ("80G", 80 * 10**9), ("123", 123), (7, 7)],
)
def test_sizes_as_people_write_them(given: Any, count: int) -> None:
    assert bytes_of(given) == count


@pytest.mark.slow
@pytest.mark.sample("arguments1-GC154", "arguments3-GC091", "arguments5-GC073", "arguments8-GC073", "arguments10-GC073")
@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        ({"budget": "24 Gigs"}, "GC154"),
        ({"budget": -1}, "GC154"),
        ({"budget": 10}, "GC155"),
        ({"optimizer": "adam"}, "GC091"),
        ({"optimizer": 3}, "GC073"),
        ({"sequence": None}, "GC073"),
        ({"dtype": "bf61"}, "GC073"),
        ({"batch": 0}, "GC073"),
        ({"batch": 10**12, "sequence": 10**9}, "GC073"),
        ({"sequence": 10**19}, "GC073"),
        ({"device": "abacus"}, "GC073"),
        ({"checkpoint": "all"}, "GC073"),
    ],
)
def test_wrong_arguments_are_said(base: nn.Module, arguments: Any, code: str) -> None:
    given = {"sequence": 8, **arguments}
    with pytest.raises(GraftError) as caught:
        graftc.plan({"adapt": [LORA]}, base, **given)
    assert caught.value.code == code and caught.value.hint


@pytest.mark.slow
def test_what_cannot_be_sharded_is_said(base: nn.Module) -> None:
    with pytest.raises(GraftError, match="GC130"):
        graftc.plan({"adapt": [AG]}, base, sequence=8, devices=2)


@pytest.mark.full
def test_a_name_is_a_model_without_weights(tmp_path: Any) -> None:
    config: Any = llama(num_hidden_layers=1).config
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path)
    plan = graftc.plan({"adapt": [LORA]}, str(tmp_path), sequence=8)
    assert plan.frozen == 4 * sum(p.numel() for p in LlamaForCausalLM(config).parameters())
