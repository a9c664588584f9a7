"""Runs of engines: their tokens are compared with torch's, and an engine that fails is a problem.

A program that prints prepared answers stands in for an engine; `tests/gates/test_serving.py` has the engines.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import LlamaForCausalLM

import graftc
from graftc.applications.serving.comparing import TOKENS, prompts_for, tokenizer_of
from graftc.specs.errors.diagnostics import GraftError
from tests.applications.serving.peft_folders import peft_folder, saved_base


def interpreter(folder: Path, answer: dict[str, Any] | None) -> Path:
    """Return a program that prints an answer, and keeps the request; without an answer, it aborts."""
    file = folder / "python"
    said = f"echo '{json.dumps(answer)}'" if answer is not None else "echo 'tensor mismatch' >&2; kill -ABRT $$"
    file.write_text(f"#!/bin/sh\ncat > {folder}/request.json\n{said}\n")
    file.chmod(0o755)
    return file


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_base(tmp_path_factory.mktemp("bases") / "base", initializer_range=0.3)


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return peft_folder(base, tmp_path_factory.mktemp("adapters") / "adapter", target_modules=["q_proj", "down_proj"])


@pytest.fixture(scope="module")
def right(base: Path, adapter: Path) -> list[list[int]]:
    """Return PEFT's tokens, by its most probable one after another."""
    model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), adapter).eval()
    rows = []
    for ids in prompts_for(tokenizer_of(base)):
        row = list(ids)
        for _ in range(TOKENS):
            with torch.no_grad():
                row.append(int(model(torch.tensor([row])).logits[0, -1].argmax()))
        rows.append(row[len(ids) :])
    return rows


@pytest.mark.full
def test_equal_and_different_tokens(base: Path, adapter: Path, right: list[list[int]], tmp_path: Path) -> None:
    python = interpreter(tmp_path, {"tokens": right, "version": "0.9.5", "seconds": []})
    certificate = graftc.serve_check(adapter, "mistralrs", run=True, python=python)
    assert certificate.passed and certificate.run is not None
    assert (certificate.run.equal, certificate.run.prompts, certificate.run.first_difference) == (5, 5, None)
    assert certificate.run.changed > 0 and certificate.run.version == "0.9.5"
    request = json.loads((tmp_path / "request.json").read_text())
    assert request["adapters"] == {"adapter": str(adapter)} and request["base"] == str(base)
    other = [list(row) for row in right]
    other[3][7] += 1
    certificate = graftc.serve_check(
        adapter,
        "mistralrs",
        run=True,
        python=interpreter(tmp_path, {"tokens": other, "version": "0.9.5", "seconds": []}),
    )
    assert certificate.run is not None and not certificate.passed and not certificate.problems
    assert (certificate.run.equal, certificate.run.first_difference) == (4, 7)


@pytest.mark.full
def test_tokens_after_the_end_of_a_text(base: Path, adapter: Path, right: list[list[int]], tmp_path: Path) -> None:
    """A prompt is compared up to the token that ends its text, instead of which an engine chooses another one."""
    end = right[2][5]
    ended = tmp_path / "base"
    shutil.copytree(base, ended)
    config = json.loads((ended / "config.json").read_text())
    (ended / "config.json").write_text(json.dumps({**config, "eos_token_id": [end]}))
    (ended / "generation_config.json").unlink(missing_ok=True)
    until = right[2].index(end)
    for other, equal in ((0, 5), (-1, 4)):  # from the end on, and one token before
        first = until + other
        changed = [*right[2][:first], *(token + 1 for token in right[2][first:])]
        rows = [*right[:2], changed, *right[3:]]
        python = interpreter(tmp_path, {"tokens": rows, "version": "0.9.5", "seconds": []})
        certificate = graftc.serve_check(adapter, "mistralrs", base=str(ended), run=True, python=python)
        assert certificate.run is not None and certificate.run.equal == equal and certificate.passed is (equal == 5)
        assert certificate.run.first_difference == (None if equal == 5 else first)


@pytest.mark.full
def test_failures(adapter: Path, tmp_path: Path) -> None:
    """An engine that aborts is a problem, one that is missing is an error; nothing runs for another form."""
    certificate = graftc.serve_check(adapter, "vllm", run=True, python=interpreter(tmp_path, None))
    assert certificate.run is None and not certificate.passed
    assert [problem.place for problem in certificate.problems] == ["vllm"]
    assert "tensor mismatch" in certificate.problems[0].reason
    with pytest.raises(GraftError, match="not installed") as caught:
        graftc.serve_check(adapter, "vllm", run=True, python=interpreter(tmp_path, {"missing": "vllm"}))
    assert caught.value.code == "GC061"
    with pytest.raises(GraftError, match="no driver") as caught:
        graftc.serve_check(adapter, "sglang", run=True)
    assert caught.value.code == "GC073"
    certificate = graftc.serve_check(adapter, "openvino", run=True, python=tmp_path / "none")
    assert [problem.place for problem in certificate.problems] == ["peft"] and certificate.run is None
