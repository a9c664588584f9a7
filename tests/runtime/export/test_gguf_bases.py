"""A GGUF file as a base: transformers reads it, and graftc adapts the model that results."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import graftc
from graftc.specs.errors.diagnostics import GraftError
from graftc.testing import perturb
from graftc.testing.families import tiny

LORA = {"adapt": [{"method": "lora", "rank": 2, "target": {"role": ["attn.q", "attn.v"]}}]}
IDS = torch.arange(1, 9)[None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gguf")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it has no tokenizer
        compiled: Any = graftc.compile(LORA, tiny("llama"))
        compiled.merge(allow_unchanged=True).export(folder / "base.gguf", format="gguf")
    return folder


@pytest.fixture(scope="module")
def base(folder: Path) -> nn.Module:
    model: nn.Module = AutoModelForCausalLM.from_pretrained(folder, gguf_file="base.gguf").eval()
    return model


@pytest.mark.full
def test_its_values_are_those_that_were_written(base: nn.Module) -> None:
    with torch.no_grad():
        assert torch.allclose(base(input_ids=IDS).logits, tiny("llama").eval()(input_ids=IDS).logits, atol=1e-5)


@pytest.mark.full
def test_it_is_adapted_and_saved(folder: Path, base: nn.Module, tmp_path: Path) -> None:
    compiled: Any = graftc.compile(LORA, base).eval()
    perturb(compiled)
    compiled.save(tmp_path / "artifact", certify=False)
    with torch.no_grad():
        logits = compiled(input_ids=IDS).logits
        assert torch.equal(graftc.load(tmp_path / "artifact", base)(input_ids=IDS).logits, logits)
    with pytest.raises(GraftError) as caught:
        graftc.load(tmp_path / "artifact")
    error = caught.value
    assert error.code == "GC086" and "from_pretrained(" in error.hint and "graftc.load(path, model=...)" in error.hint


CALLS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "load_base, file": (lambda folder: graftc.load_base(folder / "base.gguf"), "GC032"),
    "load_base, folder": (graftc.load_base, "GC032"),
    "load, file": (lambda folder: graftc.load(folder / "base.gguf"), "GC080"),
    "load, folder": (graftc.load, "GC080"),
    "import_peft": (lambda folder: graftc.import_peft(folder, tiny("llama")), "GC110"),
    "merge_checkpoint": (lambda folder: graftc.merge_checkpoint(folder / "base.gguf", folder), "GC080"),
}


@pytest.mark.parametrize("name", CALLS)
def test_calls_that_read_something_else_name_the_one_that_does(name: str, tmp_path: Path) -> None:
    call, code = CALLS[name]
    (tmp_path / "base.gguf").write_bytes(b"GGUF")
    with pytest.raises(GraftError) as caught:
        call(tmp_path)
    assert caught.value.code == code
    reader = f"transformers.AutoModelForCausalLM.from_pretrained({str(tmp_path)!r}, gguf_file='base.gguf')"
    assert reader in caught.value.hint
