"""The examples in the README run as shown."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import transformers

import graftc
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
def test_the_python_example_and_the_commands_run(tmp_path: Path, monkeypatch: Any) -> None:
    """The Python example and the commands run, with a smaller model than the README's, which changes nothing shown."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
    monkeypatch.setattr(transformers, "BertConfig", partial(transformers.BertConfig, **sizes))
    (code,) = blocks("python")
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
