"""Merging into a quantised base: in full precision like a plain base of the same values, or repacked and measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import graftc
from graftc.passes.core.packing.affine import Affine
from graftc.passes.core.packing.blockwise import Blockwise
from graftc.runtime.streaming.merging import merge_checkpoint
from graftc.specs.errors.diagnostics import GraftError, GraftWarning
from graftc.testing import inputs_for, largest_difference, outputs_of, perturb, tiny
from tests.kit.comparing import same_tensors
from tests.kit.packed_bases import KINDS, full_precision, on_dense, on_packed, spec_of


@pytest.mark.full
@pytest.mark.parametrize(
    ("family", "method", "kind"),
    [("gpt2", "lora", "nf4"), ("gpt2", "spiel", "int4"), ("mixtral", "lora", "int8"), ("bert", "dora", "int4")],
)
def test_full_precision(family: str, method: str, kind: str) -> None:
    """Merged tensors are, bit for bit, those of the same adapters merged into a plain base of the same values.

    All families, methods and packings are tested in tests/gates/test_quantised_folds.py.
    """
    full_precision(family, method, kind)


@pytest.mark.full
def test_a_plain_model(tmp_path: Path) -> None:
    """transformers loads the folder as a model without any quantisation."""
    compiled = on_packed("llama", "lora", "nf4")
    merged = compiled.merge(base="full")
    merged.save(tmp_path / "merged")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert type(loaded) is type(tiny("llama"))
    assert type(loaded.model.layers[0].self_attn.q_proj) is nn.Linear
    ids = torch.arange(12).reshape(2, 6)
    assert torch.equal(loaded(ids).logits, merged.to_transformers()(ids).logits)
    torch.testing.assert_close(loaded(ids).logits, compiled(ids).logits, atol=1e-4, rtol=0)


@pytest.mark.full
def test_a_decision_is_needed() -> None:
    """Neither kind of merge is the default, and any other choice is an error."""
    compiled = on_packed("bert", "lora", "nf4")
    for merge in (compiled.merge, compiled.merge_partially):
        with pytest.raises(GraftError, match="GC165"):
            merge()
        with pytest.raises(GraftError, match="GC073"):
            merge(base="half")
    plain = graftc.compile(spec_of("bert", "lora"), tiny("bert")).eval()
    perturb(plain)
    with pytest.raises(GraftError, match="GC166"):
        plain.merge(base="requantized")
    assert plain.merge(base="full").certificate.passed


@pytest.mark.full
@pytest.mark.parametrize("kind", KINDS)
def test_requantised(kind: str) -> None:
    """Changed weights are the packing's nearest to the exact fold, and all others keep their codes, bit for bit.

    The certificate's figures are those that follow from the tensors.
    """
    compiled = on_packed("gpt2", "lora", kind)
    merged, exact = compiled.merge(base="requantized"), compiled.merge(base="full")
    before, after = compiled._graftc.store, merged._graftc.store
    changed = {step.weight.tensor for step in _steps(compiled)}
    assert after.packed == before.packed and changed < set(before.packed)
    for name, own in before.packed.items():
        parts = [torch.equal(before.get(part), after.get(part)) for part in own.names(name)]
        assert not any(parts[:1]) if name in changed else all(parts)
    certificate = merged.certificate
    assert certificate.passed and any("not exact" in note for note in certificate.notes)
    assert {item.tensor for item in certificate.requantised} == changed
    fused = "transformer.h.0.attn.c_attn.weight"
    for item in certificate.requantised:
        wanted, packed = (each._graftc.store.full(item.tensor).double() for each in (exact, merged))
        if item.tensor == fused:  # 48 columns of each of q, k and v, and k is not adapted
            assert (item.rows, item.disturbed) == (48, 0)
            own = slice(0, 48) if "q" in item.site.rpartition(".")[2] else slice(96, 144)
            lost, whole = (wanted - packed)[:, own], wanted[:, own]
            assert item.error == pytest.approx(float(lost.norm() / whole.norm()), rel=1e-9)
            assert item.largest == pytest.approx(float(lost.abs().max() / whole.abs().max()), rel=1e-9)
    inputs = inputs_for(compiled)
    assert 0 < largest_difference(outputs_of(merged, inputs), outputs_of(compiled, inputs)) < certificate.budget


def _steps(compiled: Any) -> Any:
    from graftc.compiler.folding.fold_plan import fold_plan

    return fold_plan(compiled.compilation).lazy.steps


@pytest.mark.slow
def test_small_updates_are_lost() -> None:
    """An update smaller than the steps of the codes does not survive, and the merge reports it."""
    compiled = graftc.compile(
        {"adapt": [{"method": "lora", "rank": 2, "target": {"role": "attn.q"}}], "base": {"quantize": "nf4"}},
        tiny("bert"),
    )
    perturb(compiled)
    values = {name: tensor * 0.03 for name, tensor in compiled.adapter_state_dict().items()}
    compiled.load_adapter_state_dict(values)
    assert compiled.merge(base="full").certificate.retention.norm > 0.999
    with pytest.warns(GraftWarning, match=r"packing as nf4 leaves .* of the update"):
        merged = compiled.merge(base="requantized")
    assert merged.certificate.retention.norm < 0.5
    tiny_ones = {name: tensor * 1e-6 for name, tensor in values.items()}
    compiled.load_adapter_state_dict(tiny_ones)
    with pytest.raises(GraftError, match=r"GC104.*packing as nf4"):
        compiled.merge(base="requantized")


@pytest.mark.slow
def test_a_budget() -> None:
    """The outputs of a repacked merge have to keep within the requested budget."""
    compiled = on_packed("llama", "lora", "int4")
    with pytest.raises(GraftError, match="GC051"):
        compiled.merge(base="requantized", budget=1e-3)


@pytest.mark.slow
def test_requantised_has_no_plain_form(tmp_path: Path) -> None:
    """No folder or class of transformers takes packed weights; the state dict contains their parts."""
    merged = on_packed("llama", "lora", "int8").merge(base="requantized")
    for refused in (merged.to_transformers, lambda: merged.save(tmp_path / "merged")):
        with pytest.raises(GraftError, match="GC166"):
            refused()
    assert not (tmp_path / "merged").exists()
    assert "model.layers.0.self_attn.q_proj.weight_codes" in merged.folded_state_dict()


@pytest.mark.full
def test_the_compiled_model_stays() -> None:
    """Merging writes to no tensor of the base."""
    compiled = on_packed("bert", "dora", "int4")
    before = {name: tensor.clone() for name, tensor in compiled.state_dict().items() if torch.is_tensor(tensor)}
    compiled.merge(base="full")
    compiled.merge(base="requantized")
    after = compiled.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


@pytest.mark.full
@pytest.mark.parametrize("base", ["full", "requantized"])
def test_partial(base: Any) -> None:
    """Adaptations that do not fold are compiled on the new base, plain or packed."""
    spec = {
        "adapt": [
            {"method": "lora", "rank": 2, "target": {"role": "attn.q"}},
            {"method": "bottleneck", "bottleneck": 6},
        ],
        "base": {"quantize": "int8"},
    }
    compiled = graftc.compile(spec, tiny("bert")).eval()
    perturb(compiled)
    partial = compiled.merge_partially(base=base)
    assert partial.folded == ("lora",) and set(partial.kept) == {"bottleneck"}
    assert bool(partial.compiled.compilation.store.packed) is (base == "requantized")
    inputs = inputs_for(compiled)
    difference = largest_difference(outputs_of(partial.compiled, inputs), outputs_of(compiled, inputs))
    assert difference < (1e-4 if base == "full" else 0.1)


@pytest.mark.slow
def test_streamed_tensors() -> None:
    """Merged tensors come one by one, as values under the names of a plain model."""
    compiled = on_packed("gpt2", "lora", "nf4")
    merged = compiled.merge(base="full").to_transformers().state_dict()
    streamed = dict(compiled.merged_state_dict())
    assert same_tensors(streamed, merged)


@pytest.mark.full
def test_half_precision() -> None:
    """A base in 16 bits merges in its own dtype, and in float32 without a loss of the update."""
    spec = {"adapt": [{"method": "lora", "rank": 2, "target": {"role": "attn.q"}}], "base": {"quantize": "nf4"}}
    compiled = graftc.compile(spec, tiny("llama").bfloat16()).eval()
    perturb(compiled)
    merged = compiled.merge(base="full").folded_state_dict()
    name = "model.layers.0.self_attn.q_proj.weight"
    wide = compiled.merge(base="full", dtype=torch.float32)
    assert merged[name].dtype == torch.bfloat16 and wide.folded_state_dict()[name].dtype == torch.float32
    assert torch.equal(wide.folded_state_dict()[name].bfloat16(), merged[name])
    assert wide.certificate.retention.norm > 0.9999
    with pytest.raises(GraftError, match="GC073"):
        compiled.merge(base="requantized", dtype=torch.float32)


@pytest.mark.full
@pytest.mark.parametrize(
    "packing",
    [Affine("int8"), Affine("int8", group=32), Affine("int4", group=32, transposed=True), Blockwise("nf4", group=64)],
    ids=lambda packing: packing.text,
)
def test_what_is_the_same_keeps_its_codes(packing: Any) -> None:
    """If some rows are repacked with other values, the other rows keep their values, bit for bit.

    The changed rows have the values that packing from scratch gives them.
    """
    shape = (128, 6) if packing.transposed else (6, 128)
    weight = torch.randn(shape)
    parts = packing.packed(weight)
    before = packing.values(parts, shape, torch.float32)
    after = before.clone()
    turned = after.T if packing.transposed else after
    turned[2] += torch.randn(128)
    repacked = packing.values(packing.repacked(after, parts, after == before), shape, torch.float32)
    fresh = packing.values(packing.packed(after), shape, torch.float32)
    mine, old, new = (each.T if packing.transposed else each for each in (repacked, before, fresh))
    others = [0, 1, 3, 4, 5]
    assert (
        torch.equal(mine[others], old[others]) and not torch.equal(new[others], old[others])
    ) or "nf4" in packing.text
    assert torch.equal(mine[2], new[2])


@pytest.mark.full
def test_saving_certifies(tmp_path: Path) -> None:
    """An artifact of a quantised base contains the certificate of the full-precision fold, and no base."""
    compiled = on_packed("bert", "lora", "int4")
    path = compiled.save(tmp_path / "adapter")
    certificate = json.loads((path / "certificates" / "fold.json").read_text())
    assert certificate["passed"] and any("packed" in note for note in certificate["notes"])
    assert sum(file.stat().st_size for file in path.glob("*.safetensors")) < 20_000


@pytest.mark.slow
def test_a_packed_tensor_has_its_values_strides() -> None:
    """Strides decide what views give, and those of transposed codes are not contiguous."""
    store = on_packed("gpt2", "lora", "nf4")._graftc.store
    for name, own in store.packed.items():
        assert store.get(name).stride() == store.full(name).stride() == own.strides
        assert torch.equal(store.get(name).reshape(-1), store.full(name).reshape(-1))


@pytest.mark.full
def test_a_conversion_reads_the_values() -> None:
    """DoRA converted to LoRA on a packed base is the same as on a plain base of the same values."""
    compiled = on_packed("gpt2", "dora", "int8")
    converted, expected = (each.convert(rank=4).compiled for each in (compiled, on_dense(compiled, "gpt2", "dora")))
    assert converted.compilation.store.packed and not expected.compilation.store.packed
    inputs = inputs_for(compiled)
    assert largest_difference(outputs_of(converted, inputs), outputs_of(expected, inputs)) < 1e-5


@pytest.mark.full
def test_files_alone_are_not_enough(tmp_path: Path) -> None:
    """A merge that reads files would add the update to values that the model did not have."""
    tiny("llama").save_pretrained(tmp_path / "base")
    on_packed("llama", "lora", "nf4").save(tmp_path / "adapter", certify=False)
    with pytest.raises(GraftError, match=r"(?s)GC103.*--base full"):
        merge_checkpoint(tmp_path / "adapter", str(tmp_path / "base"), tmp_path / "merged")
