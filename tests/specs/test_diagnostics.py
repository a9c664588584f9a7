"""Codes, errors and warnings: stable text, plain data, exit status."""

from __future__ import annotations

import pickle
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graftc.specs.errors.diagnostics import CATALOGUE, GraftError, GraftWarning, Place, nearest, warn
from graftc.specs.errors.text import reason_in
from tests.kit.places import ROOT


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ("Value error, Some runs overlap", "some runs overlap"),
        ("Assertion failed, no", "no"),
        ("Input should be a valid string", "input should be a valid string"),
    ],
)
def test_the_words_of_a_validator(message: str, reason: str) -> None:
    assert reason_in(message) == reason


def test_the_catalogue_is_complete_and_ordered() -> None:
    assert list(CATALOGUE) == sorted(CATALOGUE)
    for code, entry in CATALOGUE.items():
        assert code == entry.code and re.fullmatch(r"GC\d{3}", code)
        assert entry.title and entry.explanation.endswith(".")
        assert entry.exit_code in (0, 1, 2, 3)


@pytest.mark.parametrize(
    ("code", "status"),
    [("GC001", 2), ("GC011", 2), ("GC020", 2), ("GC030", 3), ("GC040", 3), ("GC050", 1), ("GC051", 1), ("GC060", 3)],
)
def test_exit_codes(code: str, status: int) -> None:
    assert GraftError(code, "x").exit_code == status


def test_an_error_prints_place_hint_and_correction() -> None:
    place = Place("spec.yaml", 4, 17, "adapt[0].target.role", "      role: attn.qq")
    error = GraftError(
        "GC012", "role 'attn.qq' is unknown", place=place, hint="did you mean 'attn.q'?", corrected="      role: attn.q"
    )
    assert str(error) == (
        "GC012: role 'attn.qq' is unknown\n"
        "  --> spec.yaml:4:17 (adapt[0].target.role)\n"
        "  hint: did you mean 'attn.q'?\n"
        "     4 -       role: attn.qq\n"
        "     4 +       role: attn.q"
    )


@pytest.mark.parametrize(
    ("place", "text"),
    [
        (Place("s.yaml", 1, 2, "a"), "s.yaml:1:2 (a)"),
        (Place("s.yaml"), "s.yaml"),
        (Place(None, 3, 4), "line 3:4"),
        (Place(path="adapt[0]"), "adapt[0]"),
        (Place(), ""),
    ],
)
def test_places_print(place: Place, text: str) -> None:
    assert str(place) == text


def test_details_print_indented_and_nest() -> None:
    inner = GraftError("GC003", "field 'x' is unknown", place=Place(path="x"))
    error = GraftError("GC013", "counts differ", hint="one\ntwo", details=["role 'attn.q': 4 sites", inner])
    assert str(error).splitlines() == [
        "GC013: counts differ",
        "  hint: one",
        "        two",
        "  - role 'attn.q': 4 sites",
        "  also GC003: field 'x' is unknown",
        "    --> x",
    ]


def test_plain_data_holds_everything() -> None:
    inner = GraftError("GC003", "m")
    data = GraftError("GC002", "n", place=Place("f", 1, 2, "p"), hint="h", details=["d", inner]).to_json()
    assert (data["code"], data["message"], data["hint"], data["exit_code"]) == ("GC002", "n", "h", 2)
    assert (data["file"], data["line"], data["column"], data["path"]) == ("f", 1, 2, "p")
    assert data["details"][0] == "d" and data["details"][1]["code"] == "GC003"


def test_a_code_outside_the_catalogue_is_a_mistake_of_the_caller() -> None:
    with pytest.raises(KeyError):
        GraftError("GC999", "x")


@pytest.mark.parametrize("kind", [GraftError, GraftWarning])
def test_errors_cross_processes(kind: type[GraftError] | type[GraftWarning]) -> None:
    error = kind("GC002", "n", place=Place("f", 1, 2, "p"), hint="h", details=["d"], fix=("a", "b"), corrected="c")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is kind
    assert str(again) == str(error) and again.fix == ("a", "b")


def test_warn_points_at_the_innermost_line_outside_of_the_package() -> None:
    def fold() -> None:
        warn("GC024", "tied", hint="untie it")

    with pytest.warns(GraftWarning, match="GC024: tied") as caught:
        fold()
    assert caught[0].filename == __file__
    assert caught[0].lineno == fold.__code__.co_firstlineno + 1
    assert "hint: untie it" in str(caught[0].message)


def test_nearest_prefers_the_closest_and_ignores_case() -> None:
    assert nearest("attn.qq", ["attn.k", "attn.q", "ffn.up"])[0] == "attn.q"
    assert nearest("LORA", ["lora", "dora"])[0] == "lora"
    assert nearest("zzz", ["lora"]) == []


@given(st.text(max_size=8), st.lists(st.text(max_size=8), max_size=8))
def test_nearest_gives_candidates_only(word: str, candidates: list[str]) -> None:
    suggestions = nearest(word, candidates)
    assert len(suggestions) <= 3 and set(suggestions) <= set(candidates)


@pytest.mark.slow
def test_every_error_has_a_hint() -> None:
    """The hint is the one given to the error, or else the remedy of its code; no call passes an empty one."""
    import ast

    for code, entry in CATALOGUE.items():
        assert entry.remedy and GraftError(code, "m").hint == entry.remedy
        assert GraftError(code, "m", hint="").hint == GraftError(code, "m", hint=None).hint == entry.remedy
        assert GraftError(code, "m", hint="h").hint == "h" and GraftError(code, "m").to_json()["hint"] == entry.remedy
    calls = 0
    for path in sorted((ROOT / "graftc").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not (
                isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("GraftError", "GraftWarning", "warn")
            ):
                continue
            calls += 1
            code = node.args[0] if node.args else None
            assert not isinstance(code, ast.Constant) or code.value in CATALOGUE, f"{path}:{node.lineno}"
            hints = [k.value for k in node.keywords if k.arg == "hint"]
            assert not any(isinstance(h, ast.Constant) and h.value == "" for h in hints), f"{path}:{node.lineno}"
    assert calls > 300
