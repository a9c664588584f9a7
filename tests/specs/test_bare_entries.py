"""Adaptations given without a spec around them: the hint of the error is a spec that works."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from graftc.specs.document import Spec
from graftc.specs.errors.diagnostics import GraftError
from graftc.specs.io import load_spec, parse_spec
from tests.kit.refusals import refused

LORA = {"method": "lora", "rank": 8, "target": {"role": ["attn.q", "attn.v"]}}
IA3 = {"method": "ia3"}
TARGET = {"role": ["attn.q", "attn.v"]}
CASES: dict[str, tuple[Any, str, list[dict[str, Any]]]] = {
    "an entry": (LORA, "adapt is missing: this is a single adaptation", [LORA]),
    "another": (IA3, "adapt is missing: this is a single adaptation", [IA3]),
    "no target": (
        {"method": "dora", "rank": 8},
        "adapt is missing: this is a single adaptation",
        [{"method": "dora", "rank": 8, "target": TARGET}],
    ),
    "by its method": ({"ia3": {}}, "adapt is missing: methods are not fields of a spec", [IA3]),
    "by its method alone": ({"ia3": None}, "adapt is missing: methods are not fields of a spec", [IA3]),
    "several by method": (
        {"lora": {"rank": 2}, "bitfit": {}},
        "adapt is missing: methods are not fields of a spec",
        [{"method": "lora", "rank": 2, "target": TARGET}, {"method": "bitfit"}],
    ),
    "a list": ([LORA, IA3], "adapt is missing: this is only the list of adaptations", [LORA, IA3]),
    "no list": ({"adapt": LORA}, "adapt must be a list, not a mapping", [LORA]),
}


@pytest.mark.parametrize("way", ["load_spec", "json", "yaml", "file"])
@pytest.mark.parametrize("name", CASES)
def test_the_hint_is_a_spec_that_works(name: str, way: str, tmp_path: Path) -> None:
    given, message, entries = CASES[name]
    if way == "load_spec":
        error = refused(load_spec, given, code="GC002")
    elif way == "file":
        (tmp_path / "spec.json").write_text(json.dumps(given))
        error = refused(load_spec, tmp_path / "spec.json", code="GC002")
    else:
        error = refused(
            lambda data: parse_spec(json.dumps(data), format="json" if way == "json" else "yaml"), given, code="GC002"
        )
    assert error.message == message and not error.details
    start, _, shown = (error.hint or "").partition(" ")
    assert start == "write" and json.loads(shown) == {"adapt": entries}
    assert Spec.model_validate(json.loads(shown)) == load_spec({"adapt": entries})


def test_a_long_entry_is_shown_in_part() -> None:
    error = refused(
        load_spec, {**LORA, "target": {"modules": [f"layer.{number}" for number in range(500)]}}, code="GC002"
    )
    assert error.hint == 'write {"adapt": [{"method": "lora", ...}]}'


@pytest.mark.parametrize("given", [{}, {"version": 1}, {"train": ["head"]}])
def test_nothing_that_looks_like_an_adaptation(given: Any) -> None:
    error = refused(load_spec, given, code="GC002")
    assert error.message == "adapt is missing"
    start, _, shown = (error.hint or "").partition(": ")
    assert start == "list the adaptations" and len(load_spec(json.loads(shown)).adapt) == 1


@pytest.mark.parametrize("method", ["lora", "dora", "vera"])
def test_an_adaptation_without_a_target(method: str) -> None:
    error = refused(load_spec, {"adapt": [{"method": method}]}, code="GC002")
    assert error.message == "target is missing" and str(error.place) == "adapt[0].target"
    assert error.hint == 'select sites, for example: "target": {"role": ["attn.q", "attn.v"]}'


@pytest.mark.parametrize("given", [{"lorra": {}}, {"a": 1}, {"adapt": {"lora": {}}}, {"adapt": "lora"}])
def test_other_errors_stay(given: Any) -> None:
    with pytest.raises(GraftError) as caught:
        load_spec(given)
    assert caught.value.code in ("GC002", "GC003") and "by itself" not in caught.value.message


@pytest.mark.parametrize("given", [3, [], [3], ["lora"], None])
def test_other_kinds_of_values_are_no_specs(given: Any) -> None:
    with pytest.raises(GraftError, match="a spec must be a Spec, a mapping or a path"):
        load_spec(given)
