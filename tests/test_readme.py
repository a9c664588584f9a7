"""The examples in the README run as shown."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import graftc
from graftc.applications.demo.decoder import find_decoder, load_decoder
from graftc.specs.io import parse_spec
from tests.cli.support import run_warm
from tests.kit.places import ROOT

README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_the_spec_is_valid() -> None:
    (text,) = blocks("yaml")
    spec = parse_spec(text)
    assert spec.adapt[0].name == "attention"


@pytest.mark.slow
@pytest.mark.sample("tiny")
@pytest.mark.parametrize("size", ["tiny", "real"])
def test_the_first_screen_runs(size: str, tmp_path: Path, monkeypatch: Any) -> None:
    """The first block is on the first screen, and it writes what it trained; with a tiny model, or SmolLM2 itself."""
    code, _ = blocks("python")
    assert README[: README.index(code) + len(code)].count("\n") <= 40
    own, reload = AutoTokenizer.from_pretrained(find_decoder()), AutoModelForCausalLM.from_pretrained
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=len(own), num_key_value_heads=2, **small)
    model = load_decoder() if size == "real" else LlamaForCausalLM(config)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda name: own)
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", lambda name: model)
    monkeypatch.chdir(tmp_path)
    scope: dict[str, Any] = {}
    exec(compile(code, "README.md", "exec"), scope)
    assert scope["merged"].certificate.passed
    merged, ids = reload("merged").eval(), torch.tensor([scope["rows"][0]["input_ids"]])
    with torch.no_grad():
        expected = scope["compiled"].eval()(input_ids=ids).logits
        torch.testing.assert_close(merged(input_ids=ids).logits, expected, atol=1e-3, rtol=1e-3)
        assert float((merged(input_ids=ids).logits - model.eval()(input_ids=ids).logits).abs().max()) > 1e-3


@pytest.mark.slow
def test_the_python_example_and_the_commands_run(tmp_path: Path, monkeypatch: Any) -> None:
    """The Python example and the commands run, with a smaller model than the README's, which changes nothing shown."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
    monkeypatch.setattr(transformers, "BertConfig", partial(transformers.BertConfig, **sizes))
    _, code = blocks("python")
    assert len(code.strip().splitlines()) <= 24
    monkeypatch.chdir(tmp_path)
    scope: dict[str, Any] = {}
    exec(compile(code, "README.md", "exec"), scope)
    assert isinstance(scope["compiled"], graftc.runtime.compiled.Compiled)
    assert {"folded", "folded.onnx"} <= {path.name for path in tmp_path.iterdir()}
    (spec,), (console,) = blocks("yaml"), blocks("console")
    (tmp_path / "spec.yaml").write_text(spec)
    for line in console.splitlines():
        program, *arguments = line.split()
        outcome = run_warm(*arguments, cwd=tmp_path)
        assert program == "graftc" and outcome.status == 0, f"{line}\n{outcome.out}{outcome.err}"
    assert {"artifact", "merged", "merged.onnx"} <= {path.name for path in tmp_path.iterdir()}
