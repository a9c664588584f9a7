"""Folds on quantised bases: all families, methods and packings; and QLoRA compared with bitsandbytes and peft."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from torch import nn
from transformers import AutoModel

import graftc
from graftc.applications.demo.data import find_model
from graftc.testing import perturb, tiny
from tests.kit.packed_bases import FAMILIES, FOLDING, KINDS, full_precision, in_4_bits, on_packed

pytestmark = pytest.mark.gate


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", FOLDING)
@pytest.mark.parametrize("family", FAMILIES)
def test_folds(family: str, method: str, kind: str) -> None:
    """A fold to full precision is exact; packed again, it keeps what the packing can represent."""
    full_precision(family, method, kind)
    requantised = on_packed(family, method, kind).merge(base="requantized", allow_unchanged=True, budget=1e3)
    worst = max(item.error for item in requantised.certificate.requantised)
    assert worst < (0.01 if kind == "int8" else 0.12)
    if kind == "int8":
        assert requantised.certificate.retention.norm > 0.9


def llama() -> nn.Module:
    """Return a decoder whose rows are whole blocks.

    For other rows, bitsandbytes 0.50 dequantises on a CPU with scales of the wrong blocks.
    """
    return tiny("llama", hidden_size=64, intermediate_size=128)


def minilm() -> nn.Module:
    """Return a pretrained encoder with 6 layers of width 384."""
    model: nn.Module = AutoModel.from_pretrained(find_model()).eval()
    return model


@pytest.mark.parametrize("load", [llama, minilm], ids=["llama", "minilm"])
def test_qlora_as_peft(load: Callable[[], nn.Module], tmp_path: Path) -> None:
    """Merged to full precision, weights are bitsandbytes' dequantised ones plus peft's update within 1e-6.

    Peft's own merge packs them again and is far from that.
    """
    bitsandbytes, peft = pytest.importorskip("bitsandbytes"), pytest.importorskip("peft")
    model = load()
    spec = {
        "adapt": [{"method": "lora", "rank": 4, "target": {"role": ["attn.q", "attn.v"]}}],
        "base": {"quantize": "nf4"},
    }
    compiled = graftc.compile(spec, model).eval()
    perturb(compiled)
    compiled.export(tmp_path / "adapter", "peft")
    merged = compiled.merge(base="full").to_transformers()
    packed = {name.rpartition(".")[0] for name in compiled.compilation.store.packed}
    judge = peft.PeftModel.from_pretrained(in_4_bits(model, packed), tmp_path / "adapter")
    updated = 0
    for name in sorted(packed):
        theirs = judge.base_model.model.get_submodule(name)
        own = merged.get_submodule(name).weight
        base = getattr(theirs, "base_layer", theirs)
        exact = bitsandbytes.functional.dequantize_4bit(base.weight.data, base.weight.quant_state).double()
        if base is not theirs:
            updated += 1
            exact = exact + theirs.get_delta_weight("default").double()
            theirs.merge()
            again = bitsandbytes.functional.dequantize_4bit(theirs.base_layer.weight.data, base.weight.quant_state)
            assert float((again - exact).abs().max()) > 1e-3
        assert float((own - exact).abs().max()) < 1e-6
    assert updated == len(compiled.compilation.main.resolved[0].places)
