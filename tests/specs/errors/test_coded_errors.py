"""Every wrong spec and every misfit ends in a coded error, the same from the command line and from Python.

Each case is one spec file and one model. The golden texts in ``tests/golden/cli/errors`` are what the command prints.
"""

from __future__ import annotations

import importlib
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import graftc
from graftc.specs.errors.diagnostics import CATALOGUE, GraftError, GraftWarning
from tests.cli.support import check_golden, run_here, run_warm

BERT, GPT2 = "graftc.testing.families:bert", "graftc.testing.families:gpt2"
OWN = "tests.specs.errors.models"


@dataclass(frozen=True)
class Case:
    """The inputs of a case and the code that it ends in."""

    name: str
    code: str
    spec: str
    model: str = BERT


def _adapt(target: str, rest: str = "") -> str:
    """Return a readable spec of one LoRA."""
    more = "".join(f"    {line}\n" for line in rest.splitlines())
    return f"version: 1\nadapt:\n  - name: first\n    method: lora\n    target:\n      {target}\n{more}"


OVERLAP = """\
version: 1
adapt:
  - name: whole
    method: lora
    target: {modules: "**.c_attn"}
  - name: part
    method: lora
    target: {role: attn.q}
"""
DUPLICATE = """\
version: 1
adapt:
  - name: one
    method: lora
    target: {role: attn.q}
  - name: one
    method: lora
    target: {role: attn.v}
"""

CASES = (
    Case("unknown_method", "GC004", _adapt("role: attn.q").replace("lora", "lorra")),
    Case("unknown_field", "GC003", _adapt("role: attn.q", "rnak: 4")),
    Case("unknown_target_field", "GC003", _adapt("roles: attn.q")),
    Case("unknown_role", "GC012", _adapt("role: attn.qq")),
    Case("absent_role", "GC015", _adapt("role: ffn.gate")),
    Case("glob_matches_nothing", "GC011", _adapt('modules: "**.querry"')),
    Case("item_matches_nothing", "GC011", _adapt('modules: ["**.query", "**.velue"]')),
    Case("branch_matches_nothing", "GC011", _adapt('modules: "**.{query,velue}"')),
    Case("layers_match_nothing", "GC011", _adapt("role: attn.q\n      layers: [0, 5]")),
    Case("expect_unmet", "GC013", _adapt("role: attn.q\n      expect: 24")),
    Case("rank_zero", "GC002", _adapt("role: attn.q", "rank: 0")),
    Case("rank_over_the_layer", "GC020", _adapt("role: attn.q", "rank: 64")),
    Case("duplicate_names", "GC005", DUPLICATE),
    Case("row_overlap", "GC021", OVERLAP, GPT2),
    Case("no_gradient_path", "GC023", _adapt("modules: spare"), f"{OWN}:with_a_spare_layer"),
    Case("train_no_gradient_path", "GC023", _adapt("role: attn.q") + "train: [spare]\n", f"{OWN}:with_a_spare_layer"),
    Case("train_tied", "GC022", _adapt("role: attn.o") + "train: [lm_head]\n", GPT2),
    Case("not_yaml", "GC001", "version: 1\nadapt:\n  - method: lora\n   target: {role: attn.q\n"),
    Case("unquoted_glob", "GC001", "adapt:\n  - {method: lora, target: {modules: **.query}}\n"),
    Case("a_list_by_itself", "GC002", "- method: lora\n"),
    Case("not_a_mapping", "GC001", "lora\n"),
    Case("cannot_be_captured", "GC030", _adapt("modules: head") + "capture: graph\n", f"{OWN}:Wilful"),
)


@pytest.fixture(autouse=True)
def _in_an_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.full
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_coded_error_end_to_end(case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    Path("spec.yaml").write_text(case.spec, encoding="utf-8")
    text = run_here(capsys, "check", "spec.yaml", "--model", case.model)
    assert text.status == CATALOGUE[case.code].exit_code
    assert text.out == "" and text.err.startswith(f"{case.code}: ") and "Traceback" not in text.err
    check_golden(f"errors/{case.name}", _without_reason(case, text.err))

    data = run_here(capsys, "check", "spec.yaml", "--model", case.model, "--json")
    assert data.status == text.status == data.data["error"]["exit_code"]
    assert data.err == "" and data.data["error"]["code"] == case.code

    for function in (graftc.check, graftc.compile):
        with pytest.raises(GraftError) as caught:
            function("spec.yaml", _model(case.model))
        assert caught.value.code == case.code
        assert f"{caught.value}\n" == text.err
        assert caught.value.to_json() == data.data["error"]


@pytest.mark.slow
def test_a_tied_weight_is_warned_of_and_refused_when_asked_to_fold(capsys: pytest.CaptureFixture[str]) -> None:
    Path("spec.yaml").write_text(_adapt("modules: lm_head"), encoding="utf-8")
    text = run_here(capsys, "check", "spec.yaml", "--model", GPT2)
    assert text.status == 0 and text.out and "Traceback" not in text.err
    check_golden("errors/tied_weight_warning", text.err)
    with pytest.warns(GraftWarning) as warned:
        compiled = graftc.compile("spec.yaml", _model(GPT2))
    assert [w.message.code for w in warned if isinstance(w.message, GraftWarning)] == ["GC024"]
    with pytest.raises(GraftError) as caught:
        compiled.merge()
    assert caught.value.code == "GC022" and caught.value.exit_code == 2
    check_golden("errors/tied_weight_fold", str(caught.value))


@pytest.mark.slow
def test_roles_of_a_model_that_is_taken_apart(capsys: pytest.CaptureFixture[str]) -> None:
    outcome = run_here(capsys, "roles", f"{OWN}:Wilful")
    assert (outcome.status, outcome.err) == (0, "")
    assert "head.weight" in outcome.out and "table" in outcome.out


@pytest.mark.slow
def test_a_failed_compile_leaves_the_model_usable() -> None:
    model = _model(GPT2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    Path("spec.yaml").write_text(OVERLAP, encoding="utf-8")
    with pytest.raises(GraftError):
        graftc.compile("spec.yaml", model)
    assert all(bool((tensor == before[name]).all()) for name, tensor in model.state_dict().items())
    with warnings.catch_warnings():
        warnings.simplefilter("error", GraftWarning)
        assert graftc.check({"adapt": [{"method": "lora", "target": {"role": "attn.q"}}]}, model).adaptations


@pytest.mark.slow
def test_the_error_of_another_process_has_no_traceback() -> None:
    Path("spec.yaml").write_text(CASES[3].spec, encoding="utf-8")
    outcome = run_warm("check", "spec.yaml", "--model", BERT, cwd=Path.cwd())
    assert (outcome.status, outcome.out) == (2, "")
    check_golden(f"errors/{CASES[3].name}", outcome.err)


def _without_reason(case: Case, text: str) -> str:
    """Replace torch's own reason for a failed capture, which changes with torch."""
    return (
        re.sub(r"(cannot be captured with [\w, ]+: ).*", r"\1<reason of torch.export>", text)
        if case.code == "GC030"
        else text
    )


def _model(name: str) -> Any:
    path, _, function = name.partition(":")
    return getattr(importlib.import_module(path), function)()
