"""The output of commands with ``--json`` conforms to the published schemas, and the published files match the code."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from pydantic import ValidationError

from graftc.cli.registry import commands
from graftc.cli.schemas import DIALECT, published_schema, schema_names
from graftc.records.applications.demo import DemoResult, LLMResult
from graftc.records.diagnostics import ErrorResult
from graftc.records.reading import from_json
from graftc.specs.errors.diagnostics import GraftError, Place
from graftc.specs.registry import method_specs
from tests.cli.samples import CERTIFICATE, DEMO, LLM_DEMO, REPORT
from tests.cli.support import Outcome, run_here
from tests.kit.places import ROOT

PUBLISHED = ROOT / "docs" / "schemas"
SPEC = "adapt: [{method: lora, target: {role: [attn.q, attn.v]}}]\ntrain: [classifier]\n"
COMMANDS = (
    *("methods", "roles", "check", "compile", "import-peft", "merge", "convert", "export", "card", "sign", "verify"),
    *("diff", "serve-check", "serve-plan", "inspect", "demo", "demo-llm", "generate", "chat", "pet", "trl"),
)


@pytest.fixture(autouse=True)
def _in_a_folder_with_a_spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "spec.yaml").write_text(SPEC, encoding="utf-8")
    monkeypatch.chdir(tmp_path)


def valid(name: str, outcome: Outcome) -> Any:
    """Return the data that a command printed, which must be all of the standard output and conform to its schema."""
    errors = Draft202012Validator(published_schema(name)).iter_errors(outcome.data)
    messages = [f"{error.json_path}: {error.message[:200]}" for error in errors]
    assert not messages
    return outcome.data


# --- the schemas -------------------------------------------------------------------------------------------------


def test_every_command_and_file_has_one() -> None:
    assert set(schema_names()) == {"spec", "pet-spec", "manifest", "error", *COMMANDS}


@pytest.mark.slow
@pytest.mark.parametrize("name", schema_names())
def test_a_schema_is_one_and_describes_every_field(name: str) -> None:
    schema = published_schema(name)
    assert schema["$schema"] == DIALECT and schema["description"]
    Draft202012Validator.check_schema(schema)
    for model in (schema, *schema["$defs"].values()):
        assert not model.get("properties") or model["additionalProperties"] is False
        for field, value in model.get("properties", {}).items():
            # Pydantic omits a field's description if its model has the same one.
            definition = schema["$defs"].get(value.get("$ref", "").rpartition("/")[2], {})
            assert value.get("description") or definition.get("description"), f"{model['title']}.{field}"


@pytest.mark.parametrize("name", ["", *schema_names()])
def test_the_command_prints_it(capsys: pytest.CaptureFixture[str], name: str) -> None:
    outcome = run_here(capsys, "schema", *([name] if name else []))
    assert outcome.status == 0 and outcome.data == published_schema(name or "spec")


def test_an_unknown_name(capsys: pytest.CaptureFixture[str]) -> None:
    outcome = run_here(capsys, "schema", "chek")
    assert (outcome.status, outcome.out) == (2, "")
    assert outcome.err == "GC090: there is no schema 'chek'\n  hint: did you mean 'check'?\n"
    assert run_here(capsys, "schema", "zzz").err.splitlines()[1].startswith("  hint: the schemas are: spec, manifest")


# --- what commands print -----------------------------------------------------------------------------------------


@pytest.mark.full
def test_methods(capsys: pytest.CaptureFixture[str]) -> None:
    valid("methods", run_here(capsys, "methods", "--json"))
    for tag in method_specs():
        page = valid("methods", run_here(capsys, "methods", tag, "--json"))
        Draft202012Validator.check_schema(page["schema"])


@pytest.mark.slow
@pytest.mark.sample("mixtral")
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "mixtral", "t5", "vit"])
def test_roles(capsys: pytest.CaptureFixture[str], family: str) -> None:
    meta = ["--meta"] if family in ("llama", "t5") else []
    data = valid("roles", run_here(capsys, "roles", f"graftc.testing.families:{family}", "--json", *meta))
    assert data["findings"] and data["sublayers"]


@pytest.mark.slow
@pytest.mark.parametrize("meta", [False, True])
def test_check(capsys: pytest.CaptureFixture[str], meta: bool) -> None:
    arguments = ["check", "spec.yaml", "-m", "graftc.testing.families:bert", "--json", *(["--meta"] if meta else [])]
    assert valid("check", run_here(capsys, *arguments))["warnings"] == []


@pytest.mark.full
def test_check_with_a_warning_and_tokens(capsys: pytest.CaptureFixture[str]) -> None:
    text = "adapt: [{method: lora, target: {modules: lm_head}}]\ntokens: {add: [<a>]}\n"
    Path("spec.yaml").write_text(text, encoding="utf-8")
    data = valid("check", run_here(capsys, "check", "spec.yaml", "-m", "graftc.testing.families:gpt2", "--json"))
    assert data["warnings"] and data["warnings"][0]["exit_code"] == 0
    assert data["adaptations"][0]["method"] == "tokens"


@pytest.mark.full
def test_compile_to_diff(capsys: pytest.CaptureFixture[str]) -> None:
    """Every command that writes or reads artifacts, one after another."""
    command = ["compile", "spec.yaml", "-m", "graftc.testing.families:bert", "--json"]
    dry = valid("compile", run_here(capsys, *command, "--dry-run"))
    assert (dry["out"], dry["dry_run"], dry["files"]) == (None, True, []) and dry["certificate"]["passed"]
    data = valid("compile", run_here(capsys, *command, "--out", "a", "--no-certify"))
    assert data["certificate"] is None and "a/manifest.json" in [file["path"] for file in data["files"]]
    manifest = json.loads(Path("a/manifest.json").read_text(encoding="utf-8"))
    assert not list(Draft202012Validator(published_schema("manifest")).iter_errors(manifest))

    assert valid("inspect", run_here(capsys, "inspect", "a", "--json"))["summary"]["adaptations"]
    assert valid("diff", run_here(capsys, "diff", "a", "a", "--json"))["same"] is True
    Path("spec.yaml").write_text(SPEC.replace("lora,", "lora, rank: 4,"), encoding="utf-8")
    valid("compile", run_here(capsys, *command, "--out", "b", "--seed", "1"))
    changed = valid("diff", run_here(capsys, "diff", "a", "b", "--json"))
    assert changed["spec"] and changed["tensors"] and not changed["same"]
    assert valid("verify", run_here(capsys, "verify", "a", "--files-only", "--json"))["passed"] is True
    (Path("b") / "spec.yaml").write_text(SPEC, encoding="utf-8")
    assert valid("error", run_here(capsys, "inspect", "b", "--json"))["error"]["code"].startswith("GC08")


@pytest.mark.full
def test_deploying(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    import graftc
    from graftc.testing.families import tiny

    tiny("bert").save_pretrained(tmp_path / "base")
    run_here(capsys, "compile", "spec.yaml", "-m", "base", "--out", "a", "--json")
    untrained = ("--allow-unchanged", "--json")
    assert valid("merge", run_here(capsys, "merge", "a", *untrained, "--dry-run"))["folded"] == ["trained", "lora"]
    merged = valid("merge", run_here(capsys, "merge", "a", *untrained, "--out", "merged"))
    assert merged["certificate"]["passed"] and "merged/model.safetensors" in [file["path"] for file in merged["files"]]
    exported = valid("export", run_here(capsys, "export", "a", "-f", "onnx", *untrained, "--out", "m.onnx"))
    assert [file["path"] for file in exported["files"]] == ["m.onnx"]
    assert valid("verify", run_here(capsys, "verify", "a", "--json"))["passed"] is True
    assert graftc.load("a").report.trainable_parameters > 0


def test_demo(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    data = {**DEMO, "out": "demo-out", "warnings": []}
    result = from_json(DemoResult, json.dumps(data))
    monkeypatch.setattr("graftc.applications.demo.demo.run_demo", lambda *_, **__: result)
    assert valid("demo", run_here(capsys, "demo", "--json")) == data


def test_demo_of_a_language_model(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    data = {**LLM_DEMO, "out": "demo-llm-out", "warnings": []}
    result = from_json(LLMResult, json.dumps(data))
    monkeypatch.setattr("graftc.applications.demo.llm.run_llm_demo", lambda *_, **__: result)
    assert valid("demo-llm", run_here(capsys, "demo", "--llm", "--json")) == data


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact with two adaptations, tokens and a module that trains in full."""
    import graftc
    from graftc.testing.families import tiny

    lora = {"method": "lora", "target": {"role": ["attn.q", "ffn.up"]}, "rank": 2}
    spec = {"adapt": [lora, {**lora, "name": "other"}], "tokens": {"add": ["<a>"]}, "train": ["transformer.ln_f"]}
    folder = tmp_path_factory.mktemp("artifact") / "saved"
    graftc.compile(spec, tiny("gpt2")).save(folder)
    return folder


VIEWS = (
    ("--graph",),
    ("--diff", "--mode", "train"),
    ("--history",),
    ("--tree",),
    ("--explain", "transformer.h.0.attn.c_attn"),
    ("--explain", "transformer.ln_f"),
    ("--explain", "@base.transformer.wte.weight"),
    ("--explain", "return"),
)


@pytest.mark.full
@pytest.mark.parametrize("view", [(), *VIEWS, tuple(word for view in VIEWS[:5] for word in view)], ids=" ".join)
def test_inspect(capsys: pytest.CaptureFixture[str], artifact: Path, view: tuple[str, ...]) -> None:
    data = valid("inspect", run_here(capsys, "inspect", str(artifact), *view, "--json"))
    shown = {name for name in ("graph", "diff", "history", "tree", "explanation") if data[name] is not None}
    asked = {word.removeprefix("--") for word in view if word.startswith("--")} - {"mode"}
    assert shown == {"explanation" if name == "explain" else name for name in asked}


@pytest.mark.full
def test_inspect_writes_files(capsys: pytest.CaptureFixture[str], artifact: Path) -> None:
    data = valid("inspect", run_here(capsys, "inspect", str(artifact), "--dot", "g.dot", "--json"))
    assert data["files"] == ["g.dot"] and Path("g.dot").is_file()


@pytest.mark.parametrize(
    "arguments",
    [
        ("chek",),
        ("check", "spec.yaml"),
        ("roles", "m", "--mata"),
        ("schema", "specs"),
        ("methods", "lorra"),
        ("check", "missing.yaml", "-m", "graftc.testing.families:bert"),
        ("check", "wrong.yaml", "-m", "graftc.testing.families:bert"),
        ("check", "spec.yaml", "-m", "graftc.testing.families:brt"),
        ("roles", "nowhere"),
    ],
    ids=" ".join,
)
def test_errors(capsys: pytest.CaptureFixture[str], arguments: Sequence[str]) -> None:
    wrong = "adapt:\n  - {method: lora, rank: 0, target: {role: attn.qq}}\n  - {method: lorra}\ntrian: 3\n"
    Path("wrong.yaml").write_text(wrong, encoding="utf-8")
    outcome = run_here(capsys, *arguments, "--json")
    error = valid("error", outcome)["error"]
    assert outcome.status == error["exit_code"] != 0 and outcome.err == ""
    if "wrong.yaml" in arguments:
        assert len(error["details"]) == 3 and error["details"][0]["line"] == 2


def test_an_unexpected_failure(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise RuntimeError("two\nlines")

    monkeypatch.setattr("graftc.specs.listing.methods", broken)
    assert valid("error", run_here(capsys, "methods", "--json"))["error"]["code"] == "GC099"


# --- results of commands that write ------------------------------------------------------------------------------

FILES = [{"path": "manifest.json", "bytes": 3}]
TENSORS = [{"key": "base_model.model.q.lora_A.weight", "site": "q.weight", "part": "A", "tensor": "q.graftc.lora.A"}]
COST = {"sites": 1, "trainable_parameters": 2, "frozen_parameters": 0, "bytes": 8, "flops_per_token": 4.0}
WARNING = GraftError("GC024", "a", place=Place("f", 1, 2, "p"), details=["b", GraftError("GC002", "c")]).to_json()
CHECKED: dict[str, Any] = {
    **{"spec": "s.yaml", "model": "m", "class": "Bert", **REPORT, "totals": COST, "load_seconds": 1.0},
    "adaptations": [{"name": "a", "method": "lora", **COST}],
    "warnings": [WARNING],
}
PLAN = {
    **{"batch": 1, "sequence": 8, "dtype": "float32", "checkpoint": False, "optimizer": "adamw", "devices": 1},
    **{"device": "cuda", "frozen": 9, "originals": 1, "trainable": 1, "buffers": 0, "inputs": 1, "gradients": 1},
    **{"optimizer_state": 2, "saved": 3, "step": 5, "communication": 0, "update": 1, "resident": 13},
    **{"peak": 18, "budget": None, "fits": None, "largest_batch": None, "largest_sequence": None},
}
FIT = {"method": "lora", "quantize": None, "checkpoint": False, "chunked": False, "plan": PLAN, "reason": ""}
CHECK = {**CHECKED, "memory": {"plan": PLAN, "table": [FIT, {**FIT, "plan": None, "reason": "GC020: none"}]}}
EXAMPLES: dict[str, tuple[Any, dict[str, Any]]] = {
    "check": (commands()["check"].result, CHECK),
    "compile": (
        commands()["compile"].result,
        {**CHECKED, "out": None, "dry_run": True, "files": [], "fingerprint": "f", "certificate": CERTIFICATE},
    ),
    "merge": (
        commands()["merge"].result,
        {
            **{"artifact": "a", "out": "b", "dry_run": False, "partial": True, "folded": ["x"], "files": FILES},
            **{"kept": [{"name": "y", "reason": "z"}], "certificate": None, "streamed": None, "warnings": []},
        },
    ),
    "convert": (
        commands()["convert"].result,
        {
            **{"source": "a", "out": "b", "dry_run": False, "from_form": "artifact", "to_form": "lora", "rank": 4},
            **{"largest_error": 0.1, "outputs": {"logits": 0.2}, "largest_output": 2.0, "into_base": ["trained"]},
            "renamed": [{"old": "model", "new": "model.language_model", "maps": 6, "proof": "values"}],
            "beside": {"first": {"logits": 0.1}, "second": {"logits": 0.2}},
            "sites": [
                {"adaptation": "x", "site": "a", "rank": 4, "full_rank": 9, "error": 0.1, "probed": 0.1},
                {"adaptation": None, "site": "b", "rank": None, "full_rank": None, "error": 0.0, "probed": 0.0},
            ],
            **{"files": FILES, "warnings": []},
        },
    ),
    "export": (
        commands()["export"].result,
        {
            **{"artifact": "a", "format": "onnx", "out": "b.onnx", "dry_run": False, "merged": True},
            **{"files": FILES, "certificate": CERTIFICATE, "tensors": TENSORS, "max_rank": 16, "warnings": []},
        },
    ),
    "import-peft": (
        commands()["import-peft"].result,
        {
            **{"adapters": ["a"], "peft_types": ["LORA"], "methods": ["lora"]},
            **{"model": "m", "out": None, "dry_run": True},
            **{"tensors": TENSORS, "files": [], "certificate": None, "warnings": []},
        },
    ),
    "verify": (
        commands()["verify"].result,
        {"artifact": "a", "passed": False, "checks": [{"name": "n", "passed": None, "detail": ""}], "warnings": []},
    ),
    "diff": (
        commands()["diff"].result,
        {
            **{
                "a": "x",
                "b": "y",
                "base": ["dtype"],
                "same": False,
                "spec": "",
                "sites": {"added": [], "removed": ["q"], "changed": []},
            },
            **{"tensors": [{"name": "t", "status": "moved", "largest_difference": None}], "graph": "", "warnings": []},
            "weights": None,
        },
    ),
    "error": (ErrorResult, {"error": WARNING}),
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_records_give_back_what_they_were_made_of(name: str) -> None:
    record, data = EXAMPLES[name]
    assert from_json(record, json.dumps(data)).to_json() == data
    Draft202012Validator(published_schema(name)).validate(data)


@pytest.mark.parametrize("name", EXAMPLES)
def test_schemas_want_every_field_and_no_other(name: str) -> None:
    """Records are read without fields that have defaults or follow from others, and with fields of later versions."""
    record, data = EXAMPLES[name]
    validator = Draft202012Validator(published_schema(name))
    assert not validator.is_valid({**data, "other": 1})
    assert from_json(record, json.dumps({**data, "other": 1})).to_json() == data
    required = {field.name for field in fields(record) if field.default is MISSING and field.default_factory is MISSING}
    for left in data:
        wrong = {key: value for key, value in data.items() if key != left}
        assert not validator.is_valid(wrong)
        if {left, f"{left}_"} & required:
            with pytest.raises(ValidationError):
                from_json(record, json.dumps(wrong))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "1", None, True])
def test_numbers_are_numbers(value: Any) -> None:
    with pytest.raises(ValidationError):
        from_json(commands()["check"].result, json.dumps({**CHECK, "percent": value}))
