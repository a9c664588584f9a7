"""The document: names, the union of methods, its JSON Schema."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from typing import Any

import pytest

from graftc.specs import LoRA, Spec, Target, load_spec
from graftc.specs.base import OWNERS
from graftc.specs.changes import renaming
from graftc.specs.errors.diagnostics import GraftError
from graftc.specs.registry import method_specs
from tests.kit.refusals import refused

Q = {"role": "attn.q"}


def adaptations(*names: str | None) -> dict[str, Any]:
    return {"adapt": [{"method": "lora", "target": Q, **({"name": n} if n else {})} for n in names]}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ((None,), ["lora"]),
        ((None, None, None), ["lora", "lora_2", "lora_3"]),
        ((None, "lora"), ["lora_2", "lora"]),
        (("lora_2", None, None), ["lora_2", "lora", "lora_3"]),
        (("a", None), ["a", "lora"]),
    ],
)
def test_unnamed_adaptations_get_the_first_free_name(given: tuple[str | None, ...], expected: list[str]) -> None:
    assert [a.name for a in load_spec(adaptations(*given)).adapt] == expected


def test_duplicate_names_are_told_at_the_later_ones() -> None:
    error = refused(load_spec, adaptations("a", "b", "a", "b"))
    assert (error.code, error.message) == ("GC005", "the name 'a' is taken by adapt[0]")
    assert error.place is not None and error.place.path == "adapt[2].name"
    assert [str(d.place) for d in error.details if isinstance(d, GraftError)] == ["adapt[3].name"]


def test_duplicate_names_are_found_in_python_too() -> None:
    one = LoRA(name="a", target=Target(role="attn.q"))
    with pytest.raises(GraftError, match="GC005"):
        Spec(adapt=[one, one])


def test_python_and_mappings_give_the_same_spec() -> None:
    data = {"version": 1, "adapt": [{"method": "lora", "target": Q, "rank": 4}], "train": "classifier"}
    spec = Spec(adapt=[LoRA(target=Target(role="attn.q"), rank=4)], train=["classifier"])
    assert load_spec(data) == spec and hash(load_spec(data)) == hash(spec)
    assert load_spec(spec) is spec
    assert type(load_spec(data).adapt[0]) is LoRA
    assert pickle.loads(pickle.dumps(spec)) == spec


def test_json_text_goes_through_the_model_as_well() -> None:
    spec = load_spec(adaptations("a", None))
    assert Spec.model_validate_json(spec.model_dump_json()) == spec
    with pytest.raises(GraftError) as caught:
        Spec.model_validate_json('{"adapt": [{"method": "lora", "target": {"role": "attn.qq"}}]}')
    assert caught.value.code == "GC012" and str(caught.value.place) == "adapt[0].target.role"
    with pytest.raises(GraftError, match="GC001: not valid JSON: EOF while parsing"):
        Spec.model_validate_json('{"adapt": [')


def test_the_whole_document() -> None:
    spec = load_spec({**adaptations(None), "checkpoint": "layers", "fold": {"budget": {"logits": 1e-3}}})
    assert spec.checkpoint == "layers" and spec.fold.budget.logits == 1e-3 and spec.train == ()


@pytest.mark.parametrize(
    ("data", "code", "path", "message"),
    [
        ({}, "GC002", "adapt", "adapt is missing"),
        ({"adapt": {}}, "GC002", "adapt", "adapt must be a list, not a mapping"),
        ({"adapt": None}, "GC002", "adapt", "adapt must be a list, not null"),
        ({"adapt": [3]}, "GC002", "adapt[0]", "an adaptation must be a mapping, not 3"),
        ({"adapt": [{}]}, "GC002", "adapt[0]", "an adaptation needs a method"),
        ({"adapt": [{"method": "lorra"}]}, "GC004", "adapt[0].method", "method 'lorra' is unknown"),
        ({"adapt": [{"method": 3}]}, "GC004", "adapt[0].method", "method 3 is unknown"),
        ({"adapt": [{"method": ["lora"]}]}, "GC004", "adapt[0].method", "method ['lora'] is unknown"),
        ({"adapt": [], "version": 2}, "GC007", "version", "spec version 2 is not supported"),
        ({"adapt": [], "version": "1"}, "GC007", "version", "spec version '1' is not supported"),
        ({"adapt": [], "adpt": []}, "GC003", "adpt", "field 'adpt' is unknown"),
        ({"adapt": [], "checkpoint": "all"}, "GC002", "checkpoint", "checkpoint must be 'layers', not 'all'"),
        ({"adapt": [], "train": [""]}, "GC002", "train[0]", "expected a pattern of module paths, not an empty string"),
        (
            {"adapt": [], "fold": {"budget": {"logits": -1}}},
            "GC002",
            "fold.budget.logits",
            "logits must be at least 0, not -1",
        ),
        ({"adapt": [], "fold": {"bugdet": {}}}, "GC003", "fold.bugdet", "field 'bugdet' is unknown"),
        ({"adapt": [], "fold": 3}, "GC002", "fold", "fold must be a mapping, not 3"),
    ],
)
def test_what_a_document_refuses(data: dict[str, Any], code: str, path: str, message: str) -> None:
    error = refused(load_spec, data)
    assert (error.code, error.message) == (code, message)
    assert error.place is not None and error.place.path == path


def test_one_go_finds_every_mistake() -> None:
    error = refused(load_spec, {"adapt": [{"method": "lora", "rank": 0, "rnk": 1}, {"method": "x"}], "trian": []})
    errors = [error, *(d for d in error.details if isinstance(d, GraftError))]
    assert [(e.code, e.place.path) for e in errors if e.place] == [
        ("GC002", "adapt[0].target"),
        ("GC002", "adapt[0].rank"),
        ("GC003", "adapt[0].rnk"),
        ("GC004", "adapt[1].method"),
        ("GC003", "trian"),
    ]


def walk(schema: Any) -> Any:
    if isinstance(schema, dict):
        yield schema
        for value in schema.values():
            yield from walk(value)
    elif isinstance(schema, list):
        for value in schema:
            yield from walk(value)


def test_the_json_schema_holds_every_method_with_descriptions() -> None:
    schema = Spec.model_json_schema()
    json.dumps(schema)
    union = schema["properties"]["adapt"]["items"]
    assert set(union["discriminator"]["mapping"]) == set(method_specs())
    assert len(union["oneOf"]) == len(method_specs())
    for tag, entry in method_specs().items():
        reference = union["discriminator"]["mapping"][tag]
        definition = schema["$defs"][reference.rpartition("/")[2]]
        assert definition["description"].startswith(entry.summary)
        assert definition["properties"]["method"]["const"] == tag
        assert {"$ref": reference, "required": ["method"]} in union["oneOf"]
    for part in walk(schema):
        for name, field in part.get("properties", {}).items() if part.get("type") == "object" else ():
            assert field.get("description"), f"{part.get('title')}.{name} has no description"
        if "$ref" in part:
            assert part["$ref"].rpartition("/")[2] in schema["$defs"]


@pytest.mark.parametrize("owner", OWNERS.values())
def test_what_fields_of_a_spec_own_is_told_from_adaptations(owner: str) -> None:
    """`train:` and `tokens:` own tensors under one name each, which no adaptation or composition may have."""
    two = adaptations("a", "b")
    makers: list[Callable[[], object]] = [
        lambda: load_spec(adaptations("a", owner)),
        lambda: load_spec({**two, "compose": {"fuse": ["a", "b"], "name": owner}}),
        lambda: renaming(load_spec(two), "a", owner),
    ]
    for make in makers:
        with pytest.raises(GraftError) as caught:
            make()
        assert (caught.value.code, caught.value.message) == ("GC002", f"name '{owner}' is reserved")


@pytest.mark.parametrize(
    ("compose", "words"),
    [
        ([{"stack": ["a", "b"], "name": "x"}, {"stack": ["c", "x"]}], "'x' is itself a composition: stack"),
        ([{"stack": ["a", "x"], "name": "x"}, {"stack": ["b", "c"]}], "'x' is itself a composition: stack"),
        ([{"fuse": ["a", "b"], "name": "x"}, {"fuse": ["c", "x"]}], "'x' is itself a composition: fuse"),
    ],
)
def test_a_composition_where_none_can_be_is_told_as_one(compose: list[dict[str, Any]], words: str) -> None:
    error = refused(load_spec, {**adaptations("a", "b", "c"), "compose": compose})
    assert error.code == "GC036" and words in error.message and error.hint
