"""Golden texts of errors: each file in ``tests/golden/errors`` contains a spec, a line of ``=====``, and the error.

The model is a toy BERT of six layers whose layers 1 and 4 have no value projection. With GRAFTC_UPDATE_GOLDEN=1, the
files are written instead of compared.
"""

from __future__ import annotations

import os
import re

import pytest

from graftc.compiler.resolve.select import check_overrides, select
from graftc.specs import GraftError, SiteKind, parse_spec
from graftc.specs.errors.diagnostics import CATALOGUE
from graftc.specs.target import Candidate, depths
from tests.kit.places import GOLDEN

ERRORS = GOLDEN / "errors"
BREAK = "=====\n"

# The most common mistakes: these files must exist, and their errors must have these codes.
REQUIRED = {
    "unknown_method": "GC004",
    "unknown_field": "GC003",
    "unknown_role": "GC012",
    "rank_zero": "GC002",
    "duplicate_names": "GC005",
    "not_yaml": "GC001",
    "glob_without_match": "GC011",
    "list_item_without_match": "GC011",
    "brace_branch_without_match": "GC011",
    "expect_unmet": "GC013",
    "role_in_some_layers": "GC015",
}


def candidates() -> list[Candidate]:
    out: list[Candidate] = []

    def add(module: str, role: str, layer: int | None, kind: SiteKind = SiteKind.LINEAR) -> None:
        out.append(Candidate((module, role), module, frozenset({role}), kind, layer))

    for i in range(6):
        layer = f"bert.encoder.layer.{i}"
        add(f"{layer}.attention.self.query", "attn.q", i)
        add(f"{layer}.attention.self.key", "attn.k", i)
        if i not in (1, 4):
            add(f"{layer}.attention.self.value", "attn.v", i)
        add(f"{layer}.attention.self", "attn", i, SiteKind.ATTENTION)
        add(f"{layer}.output.dense", "ffn.down", i)
    add("classifier", "head", None)
    return out


def outcome(text: str) -> GraftError:
    """Return the error that reading and resolving the spec raises."""
    sites = candidates()
    with pytest.raises(GraftError) as read:
        spec = parse_spec(text, file="spec.yaml")
        try:
            for index, adaptation in enumerate(spec.adapt):
                where, kinds = f"adapt[{index}]", adaptation.claims.sites
                selected = select(adaptation.target, sites, f"{where}.target", kinds=kinds, method=adaptation.method)
                check_overrides(adaptation, selected, where, depth=depths(sites))
        except GraftError as error:
            raise spec.locate(error) from None
    return read.value


@pytest.mark.parametrize("name", sorted(p.stem for p in ERRORS.glob("*.txt")))
def test_error_text(name: str) -> None:
    path = ERRORS / f"{name}.txt"
    text, _, expected = path.read_text(encoding="utf-8").partition(BREAK)
    error = outcome(text)
    if os.environ.get("GRAFTC_UPDATE_GOLDEN"):
        path.write_text(f"{text}{BREAK}{error}\n", encoding="utf-8")
        return
    assert f"{error}\n" == expected
    assert error.code in CATALOGUE and error.exit_code == 2
    assert error.place is not None and error.place.line is not None and error.place.column is not None


@pytest.mark.parametrize(("name", "code"), REQUIRED.items())
def test_what_users_get_wrong_most_has_its_code(name: str, code: str) -> None:
    text, _, expected = (ERRORS / f"{name}.txt").read_text(encoding="utf-8").partition(BREAK)
    assert outcome(text).code == code
    assert expected.startswith(f"{code}: ")


def test_a_corrected_line_corrects() -> None:
    """If an error shows a corrected line, replacing the wrong line with it removes that error."""
    tried = 0
    for path in sorted(ERRORS.glob("*.txt")):
        text = path.read_text(encoding="utf-8").partition(BREAK)[0]
        error = outcome(text)
        if error.corrected is None or error.place is None or error.place.line is None:
            continue
        lines = text.splitlines()
        lines[error.place.line - 1] = error.corrected
        tried += 1
        try:
            again = outcome("\n".join(lines) + "\n")
        except pytest.fail.Exception:
            continue  # the corrected spec raises no error
        assert (again.code, again.message) != (error.code, error.message), path.name
    assert tried >= 10


def test_no_text_shows_python() -> None:
    for path in ERRORS.glob("*.txt"):
        expected = path.read_text(encoding="utf-8").partition(BREAK)[2]
        assert not re.search(r"Traceback|pydantic|<class|function-", expected), path.name
