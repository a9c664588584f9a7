"""The values that a target accepts, and the places that its errors name."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from graftc.specs.errors.diagnostics import GraftError
from graftc.specs.roles import ROLES
from graftc.specs.target import Target
from tests.kit.refusals import refused


def test_all_fields_together() -> None:
    target = Target(
        role=["attn.q", "attn.{k,v}"], modules="**.layer.*", regex=r".*\d", layers=["0:6", -1], exclude="a", expect=3
    )
    assert target.role == ("attn.q", "attn.{k,v}") and target.layers == ("0:6", -1)
    assert target.modules == "**.layer.*" and target.expect == 3
    assert hash(target) == hash(target.model_copy())


def test_a_target_is_frozen() -> None:
    with pytest.raises(ValidationError):
        Target(role="attn.q").role = "attn.v"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("fields", "code", "path", "message"),
    [
        ({"role": "attn.qq"}, "GC012", "role", "role 'attn.qq' is unknown"),
        ({"role": ["attn.q", "attn.{v,kk}"]}, "GC012", "role[1]", "role 'attn.kk' is unknown"),
        ({"role": []}, "GC002", "role", "an empty list selects nothing; remove it or name a role"),
        ({"role": 3}, "GC002", "role", "expected a role, not 3"),
        ({"role": ["attn.q", None]}, "GC002", "role[1]", "expected a role, not null"),
        ({"modules": ""}, "GC002", "modules", "expected a pattern of module paths, not an empty string"),
        ({"modules": "a.{b"}, "GC002", "modules", "'a.{b' opens a brace that it never closes"),
        ({"modules": ["a", "b}"]}, "GC002", "modules[1]", "'b}' closes a brace that it never opened"),
        ({"exclude": {"a": 1}}, "GC002", "exclude", "expected a pattern of module paths, not {'a': 1}"),
        ({"layers": "1-3"}, "GC002", "layers", "'1-3' is neither a layer nor a slice of layers"),
        ({"layers": [0, "a"]}, "GC002", "layers[1]", "'a' is neither a layer nor a slice of layers"),
        ({"layers": True}, "GC002", "layers", "expected a layer or a slice of layers, not true"),
        ({"layers": 1.5}, "GC002", "layers", "expected a layer or a slice of layers, not 1.5"),
        ({"expect": 0}, "GC002", "expect", "expect must be at least 1, not 0"),
        ({"expect": "3"}, "GC002", "expect", "expect must be an integer, not '3'"),
        ({"layer": 3}, "GC003", "layer", "field 'layer' is unknown"),
    ],
)
def test_what_a_target_refuses(fields: dict[str, Any], code: str, path: str, message: str) -> None:
    error = refused(Target, **fields)
    assert (error.code, error.message) == (code, message)
    assert error.place is not None and error.place.path == path


def test_a_regular_expression_is_compiled_when_read() -> None:
    error = refused(Target, regex=["a", "("])
    assert error.code == "GC002" and error.message.startswith("'(' is not a regular expression: ")
    assert error.place is not None and error.place.path == "regex[1]"


def test_every_item_at_fault_is_told() -> None:
    error = refused(Target, role=["attn.qq", "attn.v", "fn.up"], layers="x")
    assert [d.place.path for d in (error, *error.details) if isinstance(d, GraftError) and d.place] == [
        "role[0]",
        "role[2]",
        "layers",
    ]


roles = st.sampled_from(list(ROLES))
globs = st.lists(st.text(alphabet="ab_*", min_size=1, max_size=4), min_size=1, max_size=4).map(".".join)
layers = st.one_of(
    st.integers(-30, 30), st.tuples(st.integers(0, 9), st.integers(0, 9)).map(lambda p: f"{p[0]}:{p[1]}")
)


def one_or_more(item: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.one_of(st.none(), item, st.lists(item, min_size=1, max_size=3))


@pytest.mark.slow
@given(one_or_more(roles), one_or_more(globs), one_or_more(layers), one_or_more(globs))
def test_a_target_survives_its_own_dump(role: Any, modules: Any, layer: Any, exclude: Any) -> None:
    target = Target(role=role, modules=modules, layers=layer, exclude=exclude)
    assert Target.model_validate(target.model_dump()) == target
    assert Target.model_validate(target.model_dump(mode="json")) == target
    assert target.has_selector == (role is not None or modules is not None)
