"""Element types of trained tensors on a base in 16 bits: float32, or the base's own with ``dtype: base``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import graftc
from graftc.specs.errors.diagnostics import GraftError
from graftc.testing import perturb, tiny
from graftc.testing.compare import inputs_for, outputs_of, same_bits

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
LORA = {"method": "lora", "rank": 4, "target": {"role": ["attn.q", "ffn.up"]}}


def types(compiled: Any) -> dict[str, torch.dtype]:
    """Return the element types of the trained tensors, by the name of the adaptation and the part."""
    trained = [(name, t) for name, t in compiled.named_parameters() if t.requires_grad]
    return {name.partition("graftc.")[2]: tensor.dtype for name, tensor in trained}


def saved(compiled: Any, inputs: dict[str, Tensor]) -> int:
    """Return the number of bytes that a forward pass saves for the backward pass, apart from parameters."""
    parameters = {p.untyped_storage().data_ptr() for p in compiled.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs_of_training = compiled(**inputs)
    assert outputs_of_training is not None
    return sum(kept.values())


@pytest.mark.full
@pytest.mark.parametrize(("base", "kept"), [(BF16, FP32), (FP16, FP32), (FP32, FP32), (FP64, FP64)])
def test_what_trains_is_float32_at_least(base: torch.dtype, kept: torch.dtype) -> None:
    spec = {"adapt": [LORA], "train": ["transformer.ln_f"], "tokens": {"add": ["<new>"]}}
    compiled = graftc.compile(spec, tiny("gpt2").to(base))
    dtypes = types(compiled)
    assert len(dtypes) == 7 and set(dtypes.values()) == {kept} and compiled.dtype == base
    assert any(name.startswith("trained.") for name in dtypes) and any(name.startswith("tokens.") for name in dtypes)


@pytest.mark.full
def test_the_base_s_own_type() -> None:
    """``dtype: base`` holds for its adaptation only, including copies of base tensors that ``full`` trains."""
    model = tiny("gpt2").to(BF16)
    narrow = {**LORA, "dtype": "base"}
    copies = {"method": "full", "target": {"modules": "transformer.ln_f"}, "dtype": "base"}
    assert set(types(graftc.compile({"adapt": [narrow, copies]}, model)).values()) == {BF16}
    mixed = types(graftc.compile({"adapt": [narrow, {**LORA, "name": "wide"}], "train": ["transformer.ln_f"]}, model))
    assert {name.partition(".")[0]: t for name, t in mixed.items()} == {"lora": BF16, "wide": FP32, "trained": FP32}
    with pytest.raises(GraftError) as caught:
        graftc.load_spec({"adapt": [{**LORA, "dtype": "bfloat16"}]})
    assert caught.value.code == "GC002"


@pytest.mark.full
def test_both_types_compute_the_same() -> None:
    """Float32 values that 16 bits can represent give the same outputs as tensors in 16 bits, to the bit."""
    model = tiny("gpt2").to(BF16)
    wide, narrow = (graftc.compile({"adapt": [{**LORA, "dtype": d}]}, model).eval() for d in ("float32", "base"))
    perturb(narrow)
    wide.load_adapter_state_dict(narrow.adapter_state_dict())
    inputs = inputs_for(wide)
    assert same_bits(outputs_of(wide, inputs), outputs_of(narrow, inputs))
    a, b = (compiled.merge().state_dict() for compiled in (wide, narrow))
    assert all(torch.equal(a[name], b[name]) for name in b)


@pytest.mark.full
def test_steps_that_16_bits_lose_are_kept() -> None:
    """A change by a thousandth of a value is lost in bfloat16 and kept in float32."""
    model = tiny("gpt2").to(BF16)
    for dtype, moves in (("float32", True), ("base", False)):
        compiled = graftc.compile({"adapt": [{**LORA, "dtype": dtype}]}, model)
        tensors = [p for name, p in compiled.named_parameters() if p.requires_grad and name.endswith("A")]
        before = [p.detach().clone() for p in tensors]
        with torch.no_grad():
            for p in tensors:
                p.mul_(1.001)
        assert any(not torch.equal(a, b) for a, b in zip(before, tensors, strict=True)) is moves


@pytest.mark.slow
def test_folding_is_from_float32() -> None:
    """The merged weight is the exact sum of base and float32 factors, rounded once."""
    compiled = graftc.compile(
        {"adapt": [{"method": "lora", "rank": 4, "target": {"role": "attn.q"}}]}, tiny("llama").to(BF16)
    )
    perturb(compiled)
    merged = compiled.merge().state_dict()
    name = "model.layers.1.self_attn.q_proj"
    tensors = compiled.adapter_state_dict()
    a, b = (tensors[f"{name}.graftc.lora.{part}"].double() for part in "AB")
    base = compiled.full_state_dict()[f"{name}.weight"].double()
    exact = torch.addmm(base, b, a, alpha=4)
    nearest = (merged[f"{name}.weight"].double() - exact).abs()
    other = torch.addmm(base, b.bfloat16().double(), a.bfloat16().double(), alpha=4).bfloat16().double()
    assert float((nearest > (other - exact).abs()).double().mean()) == 0
    assert float((nearest < (other - exact).abs()).double().mean()) > 0.01


@pytest.mark.slow
def test_files_of_16_bits_are_read(tmp_path: Path) -> None:
    """Tensors of earlier releases, which had the base's type, keep their values exactly."""
    model = tiny("gpt2").to(BF16)
    narrow = graftc.compile({"adapt": [{**LORA, "dtype": "base"}]}, model).eval()
    perturb(narrow)
    tensors = narrow.adapter_state_dict()
    wide = graftc.compile({"adapt": [LORA]}, model).eval()
    wide.load_state_dict({**narrow.state_dict()}, strict=False)
    assert all(torch.equal(t, tensors[name].float()) for name, t in wide.adapter_state_dict().items())


@pytest.mark.full
def test_little_more_is_kept_for_the_backward_pass() -> None:
    """Only the casts of factors are saved in addition."""
    model = tiny("llama").to(BF16)
    inputs = inputs_for(graftc.compile({"adapt": [LORA]}, model), (8, 64))
    wide, narrow = (graftc.compile({"adapt": [{**LORA, "dtype": d}]}, model).train() for d in ("float32", "base"))
    assert saved(narrow, inputs) < saved(wide, inputs) <= 1.05 * saved(narrow, inputs)


@pytest.mark.full
@pytest.mark.parametrize("beside", [{"train": ["lm_head"]}, {"tokens": {"add": ["<new>"]}}], ids=["train", "tokens"])
def test_a_head_that_loops_read_is_of_the_base_s_type(beside: dict[str, Any]) -> None:
    """Logits computed from hidden states equal the graph's, and gradients reach the float32 values."""
    compiled = graftc.compile({"adapt": [LORA], **beside}, tiny("llama").to(BF16)).train()
    ids = torch.randint(0, 50, (2, 5))
    hidden = compiled.base_model(input_ids=ids).last_hidden_state
    logits = hidden @ compiled.get_output_embeddings().weight.T
    assert torch.equal(logits, compiled(input_ids=ids).logits)
    logits.float().sum().backward()
    gradients = [p.grad for name, p in compiled.named_parameters() if name.startswith("lm_head.graftc")]
    assert gradients and all(grad is not None and grad.dtype == FP32 for grad in gradients)


@pytest.mark.slow
def test_what_trains_is_not_rounded_by_a_cast_of_the_model() -> None:
    """Casting the model, as trainers do for evaluation, is refused; moves and casts that change nothing are not."""
    compiled = graftc.compile({"adapt": [LORA]}, tiny("llama").to(BF16))
    before = {name: tensor.clone() for name, tensor in compiled.adapter_state_dict().items()}
    for cast in (lambda m: m.to(BF16), lambda m: m.bfloat16(), lambda m: m.get_submodule("model.layers.0").to(BF16)):
        with pytest.raises(GraftError, match="GC033"):
            cast(compiled)
    compiled.to("cpu")
    compiled.get_submodule("model.layers.1").to("cpu")
    assert all(torch.equal(t, before[n]) and t.dtype == FP32 for n, t in compiled.adapter_state_dict().items())


@pytest.mark.slow
def test_what_a_type_cannot_hold_is_not_loaded() -> None:
    compiled = graftc.compile({"adapt": [LORA]}, tiny("gpt2"))
    tensors = compiled.adapter_state_dict()
    name = next(iter(tensors))
    for odd in (
        tensors[name].to(torch.complex64),
        tensors[name].to(torch.int64),
        tensors[name].bool(),
        tensors[name].double() + 1e300,
    ):
        with pytest.raises(GraftError, match="GC053"):
            compiled.load_adapter_state_dict({**tensors, name: odd})
    compiled.load_adapter_state_dict({**tensors, name: tensors[name].double()})
    assert torch.equal(compiled.adapter_state_dict()[name], tensors[name])
