"""``compile``, ``merge``, ``export``, ``verify`` and ``diff``: one path from a spec to files, and refusals."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from jsonschema import Draft202012Validator
from safetensors.torch import load_file

import graftc
from graftc.cli.schemas import published_schema
from graftc.runtime.sources.models import load_model
from graftc.testing import perturb
from tests.cli.support import Outcome, check_golden, run_here, run_valid, run_warm
from tests.kit.folders import saved_base, tree_bytes

SPEC = """\
version: 1
adapt:
  - name: attention
    method: lora
    target: {role: [attn.q, attn.v]}
    rank: 4
train: [classifier]
"""
BOTH = """\
version: 1
adapt:
  - name: attention
    method: lora
    target: {role: attn.q}
    rank: 4
  - name: prefix
    method: prefix
    length: 3
"""
TIED = """\
version: 1
adapt:
  - name: inner
    method: lora
    target: {role: ffn.down}
    rank: 2
  - name: head
    method: lora
    target: {modules: lm_head}
    rank: 2
"""


@pytest.fixture(scope="module")
def models_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base, an artifact of it, and an artifact with other values."""
    folder = tmp_path_factory.mktemp("deploy")
    saved_base(folder / "base")
    (folder / "base" / "tokenizer.json").write_text("{}")
    (folder / "spec.yaml").write_text(SPEC)
    compiled = graftc.compile(folder / "spec.yaml", load_model(str(folder / "base")))
    compiled.save(folder / "artifact")
    perturb(compiled)
    compiled.save(folder / "trained")
    return folder


@pytest.fixture(autouse=True)
def here(models_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the folder to work in; artifacts still find the base, which moved along with them."""
    for name in ("base", "artifact", "trained"):
        shutil.copytree(models_folder / name, tmp_path / name)
    shutil.copy(models_folder / "spec.yaml", tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def valid(command: str, outcome: Outcome) -> Any:
    """Return the JSON that a command printed, which must conform to its published schema."""
    Draft202012Validator(published_schema(command)).validate(outcome.data)
    return outcome.data


# --- compile ---------------------------------------------------------------------------------------------------


@pytest.mark.full
def test_compile(capsys: pytest.CaptureFixture[str], here: Path, models_folder: Path) -> None:
    data = run_valid(capsys, "compile", "spec.yaml", "--model", "base", "--out", "new")
    assert data["out"] == "new" and data["dry_run"] is False and data["certificate"]["passed"] is True
    assert {file["path"]: file["bytes"] for file in data["files"]} == {
        f"new/{name}": len(content) for name, content in tree_bytes(here / "new").items()
    }
    manifest = json.loads((here / "new/manifest.json").read_text())
    assert data["fingerprint"] == manifest["base"]["fingerprint"]
    assert manifest["base"]["reference"] == str(here / "base") and manifest["base"]["relative"] == "../base"
    # The same files as from Python, except for the base's location.
    other = tree_bytes(models_folder / "artifact")
    assert {k: v for k, v in tree_bytes(here / "new").items() if k != "manifest.json"} == {
        k: v for k, v in other.items() if k != "manifest.json"
    }


@pytest.mark.full
def test_compile_as_text(capsys: pytest.CaptureFixture[str]) -> None:
    outcome = run_here(capsys, "compile", "spec.yaml", "-m", "base", "-o", "new", "--no-certify")
    assert (outcome.status, outcome.err) == (0, "")
    check_golden("compile_bert", _without_bytes(outcome.out))


def _without_bytes(text: str) -> str:
    """Blank the sizes of files, which depend on the length of paths."""
    import re

    return re.sub(r"[\d,]+ bytes", "# bytes", text)


@pytest.mark.full
@pytest.mark.parametrize("seed", [0, 5])
def test_a_seed(capsys: pytest.CaptureFixture[str], here: Path, seed: int) -> None:
    run_valid(capsys, "compile", "spec.yaml", "-m", "base", "-o", "new", "--seed", str(seed))
    one, two = (load_file(here / name / "adapters.safetensors") for name in ("new", "artifact"))
    assert all(torch.equal(one[name], two[name]) for name in one) is (seed == 0)


# --- merge -----------------------------------------------------------------------------------------------------


@pytest.mark.full
def test_merge(capsys: pytest.CaptureFixture[str], here: Path) -> None:
    data = run_valid(capsys, "merge", "trained", "--out", "folded")
    assert data["partial"] is False and data["folded"] == ["trained", "attention"] and data["kept"] == []
    assert data["certificate"]["passed"] and min(s["change"] for s in data["certificate"]["sites"]) > 1e-3
    assert {Path(file["path"]).name for file in data["files"]} == {
        *("config.json", "model.safetensors", "tokenizer.json", "graftc.json")
    }
    folded, compiled = load_model("folded"), graftc.load("trained").eval()
    ids = torch.randint(0, 101, (3, 7))
    assert torch.allclose(folded(ids).logits, compiled(input_ids=ids).logits, atol=1e-5)
    assert not torch.allclose(folded(ids).logits, load_model("base")(ids).logits, atol=1e-2)
    assert run_valid(capsys, "verify", "folded")["passed"] is True
    (here / "folded" / "model.safetensors").write_bytes(b"no")
    assert run_valid(capsys, "verify", "folded", status=1)["passed"] is False


@pytest.mark.slow
def test_over_budget_nothing_is_written(capsys: pytest.CaptureFixture[str], here: Path) -> None:
    before = set(here.iterdir())
    data = run_valid(capsys, "merge", "trained", "--out", "folded", "--budget", "1e-12", status=1)
    assert data["error"]["code"] == "GC051" and set(here.iterdir()) == before


def test_a_folder_of_packed_weights_is_refused_before_the_work(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = saved_base(tmp_path / "base", "llama")
    spec = {"adapt": [{"method": "lora", "target": {"role": "attn.q"}}], "base": {"quantize": "int8"}}
    compiled = graftc.compile(spec, load_model(str(base)))
    perturb(compiled)
    artifact = compiled.save(tmp_path / "it")
    monkeypatch.setattr(graftc.Compiled, "merge", lambda *_, **options: pytest.fail("the fold has begun"))
    options = ("--base", "requantized", "--out", str(tmp_path / "folded"), "--json")
    outcome = run_here(capsys, "merge", str(artifact), *options)
    assert outcome.data["error"]["code"] == "GC166" and not (tmp_path / "folded").exists()


@pytest.mark.full
def test_what_does_not_fold_is_refused_by_name_or_kept(
    capsys: pytest.CaptureFixture[str], here: Path, tmp_path: Path
) -> None:
    (here / "tied.yaml").write_text(TIED)
    saved_base(here / "gpt2", "gpt2")
    outcome = run_here(capsys, "compile", "tied.yaml", "--model", "gpt2", "--out", "it", "--json")
    assert [w["code"] for w in valid("compile", outcome)["warnings"]] == ["GC024"]
    refused = run_here(capsys, "merge", "it", "--out", "folded", "--json")
    assert refused.status == 2 and refused.data["error"]["code"] == "GC022"
    assert "'head'" in refused.data["error"]["message"] and not (here / "folded").exists()
    outcome = run_here(capsys, "merge", "it", "--partial", "--allow-unchanged", "--out", "partly", "--json")
    data = valid("merge", outcome)
    assert data["partial"] is True and data["folded"] == ["inner"] and [k["name"] for k in data["kept"]] == ["head"]
    shutil.rmtree(here / "gpt2")  # the artifact contains its own base
    with pytest.warns(graftc.GraftWarning, match="GC024"):
        rest = graftc.load("partly")
    assert [a.name for a in rest.spec.adapt] == ["head"]
    verified = run_here(capsys, "verify", "partly", "--json").data
    assert verified["passed"] is True
    found = {check["name"]: (check["passed"], check["detail"]) for check in verified["checks"]}
    kept = json.loads((here / "partly" / "base" / "graftc.json").read_text(encoding="utf-8"))
    assert kept["certificate"] == data["certificate"] and found["files of the base"][0] is True
    assert found["certificate of the base"] == (True, found["certificate of the base"][1])
    assert "outputs differ" in found["certificate of the base"][1]
    card = run_here(capsys, "card", "partly").out
    assert "`inner` is part of the weights of the base in this folder. The certificate of that fold passed" in card
    assert "The base is in the folder `base`." in card and "not in this repository" not in card


@pytest.mark.slow
@pytest.mark.parametrize("command", [("merge",), ("export", "--format", "onnx")])
def test_a_base_without_packed_weights(
    capsys: pytest.CaptureFixture[str], here: Path, command: tuple[str, ...]
) -> None:
    first, *rest = command
    error = run_valid(capsys, first, "trained", *rest, "--dry-run", "--base", "full", status=2)["error"]
    assert error["code"] == "GC090" and "the base has none" in error["message"]


@pytest.mark.slow
def test_partial_with_nothing_left_is_a_merge(capsys: pytest.CaptureFixture[str], here: Path) -> None:
    data = run_valid(capsys, "merge", "trained", "--partial", "--out", "folded")
    assert data["partial"] is False and (here / "folded" / "config.json").is_file()


# --- export ----------------------------------------------------------------------------------------------------


@pytest.mark.full
@pytest.mark.parametrize("merge", [True, False])
def test_export(capsys: pytest.CaptureFixture[str], here: Path, merge: bool) -> None:
    more = [] if merge else ["--no-merge"]
    data = run_valid(capsys, "export", "trained", "--format", "onnx", "--out", "deep/model.onnx", *more)
    assert data["merged"] is merge and (data["certificate"] is not None) is merge
    assert [file["path"] for file in data["files"]] == ["deep/model.onnx"]
    session = onnxruntime.InferenceSession("deep/model.onnx", providers=["CPUExecutionProvider"])
    ids = torch.randint(0, 101, (3, 7))
    inputs = {"input_ids": ids.numpy(), "attention_mask": torch.ones_like(ids).numpy()}
    (logits,) = session.run(["logits"], inputs)
    expected = graftc.load("trained").eval()(input_ids=ids).logits
    assert torch.allclose(torch.from_numpy(logits), expected, atol=1e-4)


@pytest.mark.full
def test_export_of_a_program(capsys: pytest.CaptureFixture[str]) -> None:
    run_valid(capsys, "export", "trained", "-f", "pt2", "-o", "model.pt2")
    ids = torch.randint(0, 101, (3, 7))
    module = torch.export.load("model.pt2").module()
    logits = module(input_ids=ids, attention_mask=torch.ones_like(ids))["logits"]
    assert torch.allclose(logits, graftc.load("trained").eval()(input_ids=ids).logits, atol=1e-5)


@pytest.mark.full
def test_export_with_inputs(capsys: pytest.CaptureFixture[str], here: Path) -> None:
    """One adaptation folds and the other one is an input; the export is refused unless it is named as one."""
    (here / "both.yaml").write_text(BOTH)
    run_valid(capsys, "compile", "both.yaml", "--model", "base", "--out", "both")
    data = run_valid(
        capsys, "export", "both", "-f", "onnx", "-o", "model.onnx", "--inputs", "prefix", "--allow-unchanged"
    )
    assert data["merged"] is True and data["certificate"]["passed"] is True
    assert [file["path"] for file in data["files"]] == ["model.onnx", "model.onnx.prefix.safetensors"]
    tensors = {name: tensor.numpy() for name, tensor in load_file("model.onnx.prefix.safetensors").items()}
    ids = torch.randint(0, 101, (3, 7))
    inputs = {"input_ids": ids.numpy(), "attention_mask": torch.ones_like(ids).numpy()}
    session = onnxruntime.InferenceSession("model.onnx", providers=["CPUExecutionProvider"])
    (logits,) = session.run(["logits"], {**inputs, **tensors})
    expected = graftc.load("both").eval()(input_ids=ids).logits
    assert torch.allclose(torch.from_numpy(logits), expected, atol=1e-4)
    data = run_valid(capsys, "export", "both", "-f", "pt2", "-o", "m.pt2", "--inputs", "prefix", status=1)
    assert data["error"]["code"] == "GC104"
    inputs_of_another = ["--inputs", "attention", "--allow-unchanged"]
    data = run_valid(capsys, "export", "both", "-f", "pt2", "-o", "m.pt2", *inputs_of_another, status=1)
    assert data["error"]["code"] == "GC050" and "--inputs prefix" in data["error"]["hint"]
    more = ["--no-merge", "--inputs", "attention", "--inputs", "prefix"]
    data = run_valid(capsys, "export", "both", "-f", "pt2", "-o", "m.pt2", *more)
    beside = [f"m.pt2.{name}.safetensors" for name in ("attention", "prefix")]
    assert data["certificate"] is None and [file["path"] for file in data["files"]] == ["m.pt2", *beside]


@pytest.mark.full
def test_inputs_beside_which_nothing_folds(capsys: pytest.CaptureFixture[str], here: Path) -> None:
    """There is nothing to merge, so --no-merge is not needed."""
    (here / "prefix.yaml").write_text("adapt: [{method: prefix, length: 2}]\n")
    run_valid(capsys, "compile", "prefix.yaml", "--model", "base", "--out", "prefixed")
    arguments = ["export", "prefixed", "-f", "pt2", "-o", "m.pt2", "--inputs", "prefix"]
    data = run_valid(capsys, *arguments, "--budget", "1", status=2)
    assert data["error"]["code"] == "GC090" and "--budget" in data["error"]["message"]
    data = run_valid(capsys, *arguments)
    assert data["merged"] is False and data["certificate"] is None
    assert [file["path"] for file in data["files"]] == ["m.pt2", "m.pt2.prefix.safetensors"]
    data = run_valid(capsys, "export", "prefixed", "-f", "pt2", "--dry-run", status=1)
    assert data["error"]["code"] == "GC050" and "--partial" in data["error"]["hint"]


@pytest.mark.full
def test_an_input_that_folds(capsys: pytest.CaptureFixture[str], here: Path) -> None:
    data = run_valid(capsys, "export", "trained", "-f", "pt2", "-o", "m.pt2", "--inputs", "attention", status=2)
    assert data["error"]["code"] == "GC065" and "--no-merge" in data["error"]["hint"]
    for format in ("pt2", "onnx"):
        dry = run_valid(capsys, "export", "trained", "-f", format, "--dry-run", "--inputs", "attention", status=2)
        assert dry == data
    data = run_valid(capsys, "export", "trained", "-f", "pt2", "--dry-run", "--inputs", "atention", status=2)
    assert data["error"]["code"] == "GC091" and "'attention'" in data["error"]["hint"]
    assert not (here / "m.pt2").exists()


@pytest.mark.full
def test_export_for_a_graph(capsys: pytest.CaptureFixture[str], here: Path) -> None:
    """An adapter is written for a graph with inputs; options that do not belong together are refused."""
    run_valid(capsys, "export", "trained", "-f", "onnx", "-o", "model.onnx", "--no-merge", "--inputs", "attention")
    spec = {"adapt": [{"name": "attention", "method": "lora", "target": {"role": ["attn.q", "attn.v"]}, "rank": 6}]}
    compiled = graftc.compile(spec, load_model("base"))
    perturb(compiled)
    compiled.save("own")
    adapter = ["export", "own", "-f", "onnx-adapter", "-o", "own.onnx_adapter"]
    data = run_valid(capsys, *adapter, "--for-graph", "model.onnx")
    assert data["merged"] is False and [file["path"] for file in data["files"]] == ["own.onnx_adapter"]
    before = (here / "own.onnx_adapter").read_bytes()
    for options, code in (
        ([], "GC073"),
        (["--for-graph", "own/spec.yaml"], "GC192"),
        (["--for-graph", "model.onnx", "--slot", "prefix"], "GC192"),
        (["--for-graph", "model.onnx", "--inputs", "attention"], "GC090"),
    ):
        error = run_valid(capsys, *adapter, "--force", *options, status=2 if code in ("GC073", "GC090") else 3)["error"]
        assert error["code"] == code
    error = run_valid(capsys, "export", "trained", *adapter[2:], "--for-graph", "model.onnx", "--force", status=3)[
        "error"
    ]
    assert error["code"] == "GC192" and "'trained' changes tensors of the base" in error["message"]
    error = run_valid(capsys, "export", "trained", "-f", "onnx", "-o", "m.onnx", "--slot", "attention", status=2)[
        "error"
    ]
    assert error["code"] == "GC090" and "--slot" in error["message"]
    assert (here / "own.onnx_adapter").read_bytes() == before


# --- verify and diff -------------------------------------------------------------------------------------------


@pytest.mark.full
def test_verify(capsys: pytest.CaptureFixture[str]) -> None:
    data = run_valid(capsys, "verify", "trained")
    names = ["files", "tensors", "graph files", "statements", "base", "places", "graphs", "certificate"]
    assert [(c["name"], c["passed"]) for c in data["checks"]] == [(name, True) for name in names]
    assert not [c["detail"] for c in data["checks"] if re.search(r"\b1 \w+s\b", c["detail"])], (
        "one of something is not several"
    )
    shutil.rmtree("base")
    assert run_valid(capsys, "verify", "trained", "--files-only")["passed"] is True


@pytest.mark.slow
def test_diff(capsys: pytest.CaptureFixture[str], here: Path) -> None:
    assert run_valid(capsys, "diff", "artifact", "artifact")["same"] is True
    data = run_valid(capsys, "diff", "artifact", "trained", status=1)
    assert data["same"] is False and not (data["base"] or data["spec"] or data["graph"])
    assert {t["status"] for t in data["tensors"]} == {"changed"} and len(data["tensors"]) == 10
    largest = max(t["largest_difference"] for t in data["tensors"])
    one, two = (load_file(here / name / "adapters.safetensors") for name in ("artifact", "trained"))
    assert largest == pytest.approx(max(float((one[n] - two[n]).abs().max()) for n in one))


@pytest.mark.full
def test_diff_of_everything(capsys: pytest.CaptureFixture[str], here: Path) -> None:
    """Another base, spec, place, name and shape are all reported."""
    saved_base(here / "other", seed=1)
    spec = SPEC.replace("[attn.q, attn.v]", "[attn.v, attn.o]").replace("rank: 4", "rank: 2")
    (here / "other.yaml").write_text(spec)
    run_valid(capsys, "compile", "other.yaml", "-m", "other", "-o", "changed")
    data = run_valid(capsys, "diff", "artifact", "changed", status=1)
    assert any("has different values" in line for line in data["base"])
    assert "-    rank: 4" in data["spec"] or "-  rank: 4" in data["spec"]
    assert len(data["sites"]["added"]) == len(data["sites"]["removed"]) == 2 and data["sites"]["changed"] == []
    statuses = {t["name"]: t["status"] for t in data["tensors"]}
    assert set(statuses.values()) == {"added", "removed", "changed"}
    assert "layers alike" in data["graph"]
    outcome = run_here(capsys, "diff", "artifact", "changed")
    assert outcome.status == 1
    check_golden("diff_bert", outcome.out.replace(f"{here}/", ""))


# --- destinations ----------------------------------------------------------------------------------------------

WRITERS = {
    "compile": ("spec.yaml", "--model", "base"),
    "merge": ("trained",),
    "export": ("trained", "--format", "onnx"),
}


@pytest.mark.full
@pytest.mark.parametrize("command", WRITERS)
def test_a_dry_run_writes_nothing(command: str, capsys: pytest.CaptureFixture[str], here: Path) -> None:
    before = set(here.rglob("*"))
    data = run_valid(capsys, command, *WRITERS[command], "--dry-run")
    assert data["dry_run"] is True and data["out"] is None and data["files"] == []
    assert data["certificate"]["passed"] is True and set(here.rglob("*")) == before


@pytest.mark.parametrize("command", WRITERS)
def test_a_destination_is_needed(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    error = run_valid(capsys, command, *WRITERS[command], status=2)["error"]
    assert error["code"] == "GC090" and "--out" in error["message"]


@pytest.mark.parametrize("command", WRITERS)
def test_what_is_there_is_refused_at_once(
    command: str, capsys: pytest.CaptureFixture[str], here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An existing folder is refused before a model is loaded, even with ``--force`` if graftc did not write it."""
    monkeypatch.setattr("graftc.runtime.sources.models.load_model_and_inputs", None)
    (here / "mine").mkdir()
    (here / "mine" / "precious").touch()
    for more in ([], ["--force"]):
        error = run_valid(capsys, command, *WRITERS[command], "--out", "mine", *more, status=3)["error"]
        assert error["code"] == "GC063" and (here / "mine" / "precious").is_file()


@pytest.mark.full
def test_force_replaces_what_graftc_wrote(capsys: pytest.CaptureFixture[str], here: Path) -> None:
    run_valid(capsys, "compile", "spec.yaml", "-m", "base", "-o", "trained", "--force")
    assert tree_bytes(here / "trained").keys() == tree_bytes(here / "artifact").keys()
    run_valid(capsys, "merge", "artifact", "-o", "trained", "--force", "--allow-unchanged")
    assert (here / "trained" / "graftc.json").is_file() and not (here / "trained" / "manifest.json").exists()


@pytest.mark.slow
def test_a_named_base(capsys: pytest.CaptureFixture[str], here: Path) -> None:
    shutil.move("base", "moved")
    manifest = json.loads((here / "artifact/manifest.json").read_text())["base"]
    shutil.rmtree(manifest["reference"], ignore_errors=True) if manifest["reference"].startswith(str(here)) else None
    run_valid(capsys, "merge", "artifact", "-o", "folded", "--model", "moved", "--allow-unchanged")


def test_unknown_formats(capsys: pytest.CaptureFixture[str]) -> None:
    error = run_valid(capsys, "export", "trained", "-f", "onxn", "-o", "x", status=2)["error"]
    assert error["code"] == "GC090" and "onnx" in f"{error['message']} {error['hint']}"


@pytest.mark.full
def test_in_processes_of_their_own(here: Path) -> None:
    """Two commands that the test of the readme, which runs the whole path as a user would, leaves out."""
    for command in (["merge", "trained", "--out", "folded"], ["diff", "artifact", "artifact"]):
        outcome = run_warm(*command, cwd=here)
        assert (outcome.status, outcome.err) == (0, ""), command
