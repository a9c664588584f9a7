"""``graftc methods`` and ``graftc schema``."""

from __future__ import annotations

import json

import pytest

import graftc
from graftc.specs.listing import MethodInfo
from graftc.specs.methods.lora import LoRA
from graftc.specs.registry import method_specs
from tests.cli.support import check_golden, run_here


def test_the_list_as_a_table(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    only = {"lora": method_specs()["lora"]}
    monkeypatch.setattr("graftc.specs.listing.method_specs", lambda: only)
    outcome = run_here(capsys, "methods")
    assert (outcome.status, outcome.err) == (0, "")
    check_golden("methods", outcome.out)


def test_a_page(capsys: pytest.CaptureFixture[str]) -> None:
    outcome = run_here(capsys, "methods", "lora")
    assert (outcome.status, outcome.err) == (0, "")
    check_golden("methods_lora", outcome.out)


@pytest.mark.slow
def test_the_example_of_every_page_is_a_spec(capsys: pytest.CaptureFixture[str]) -> None:
    for tag in method_specs():
        text = run_here(capsys, "methods", tag).out
        from graftc.specs.io import parse_spec

        assert parse_spec(text[text.index("adapt:") :]).adapt[0].method == tag


def test_the_list_as_json_is_what_python_gives(capsys: pytest.CaptureFixture[str]) -> None:
    outcome = run_here(capsys, "methods", "--json")
    assert outcome.data == {"methods": [info.to_json() for info in graftc.methods()]}
    lora = next(info for info in outcome.data["methods"] if info["tag"] == "lora")
    assert lora["claims"] == {
        "sites": ["embedding", "experts", "linear"],
        "identity_at_init": True,
        "folds": "exact",
        "bankable": True,
        "inert": [],
    }
    assert lora["module"] == "graftc.specs.methods.lora" and "Hu et al. 2021" in lora["paper"]


def test_methods_of_the_facade() -> None:
    infos = graftc.methods()
    assert all(isinstance(info, MethodInfo) for info in infos)
    assert [info.tag for info in infos] == sorted(method_specs())
    assert next(info for info in infos if info.tag == "lora").claims is LoRA.claims


def test_a_page_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    data = run_here(capsys, "methods", "lora", "--json").data
    assert data["tag"] == "lora" and data["schema"]["properties"]["rank"]["minimum"] == 1
    assert data["description"].startswith("Low-rank adaptation")


def test_an_unknown_method(capsys: pytest.CaptureFixture[str]) -> None:
    outcome = run_here(capsys, "methods", "lorra")
    assert (outcome.status, outcome.out) == (2, "")
    assert outcome.err == "GC004: method 'lorra' is unknown\n  hint: did you mean 'lora'?\n"
    error = run_here(capsys, "methods", "lorra", "--json")
    assert (error.status, error.err) == (2, "")
    assert error.data["error"]["code"] == "GC004" and error.data["error"]["exit_code"] == 2


@pytest.mark.parametrize("arguments", [("schema",), ("schema", "--json")])
def test_the_schema_of_a_spec(capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...]) -> None:
    outcome = run_here(capsys, *arguments)
    schema = outcome.data
    assert outcome.status == 0 and schema["$schema"].startswith("https://json-schema.org/")
    assert set(schema["properties"]) >= {"version", "adapt", "train", "checkpoint", "fold"}
    assert "lora" in json.dumps(schema["properties"]["adapt"])
    assert schema["$defs"]["LoRA"]["properties"]["rank"]["description"]
