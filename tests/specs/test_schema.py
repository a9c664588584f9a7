"""The JSON Schema of a spec compared with the parser: they accept the same documents, as far as a schema can say so."""

from __future__ import annotations

import ast
import copy
import re
from collections.abc import Iterator, Sequence
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from pydantic import BaseModel

from graftc.specs import GraftError, Spec, load_spec
from graftc.specs.options.cloze import ClozeOptions
from graftc.specs.registry import method_specs
from graftc.specs.roles import ROLES
from graftc.specs.source import read_yaml
from tests.kit.places import ROOT

SCHEMA = Spec.model_json_schema()
VALIDATOR = Draft202012Validator(SCHEMA)
Q = {"role": "attn.q"}


def parses(data: Any) -> GraftError | None:
    """Return the error that the parser raises for the data, or None if it accepts the data."""
    try:
        load_spec(copy.deepcopy(data))
    except GraftError as error:
        return error
    return None


def findings(data: Any) -> list[str]:
    """Return the errors that the schema reports for the data."""
    return [f"{error.json_path}: {error.message[:200]}" for error in VALIDATOR.iter_errors(data)]


@pytest.mark.slow
def test_it_is_a_schema() -> None:
    Draft202012Validator.check_schema(SCHEMA)


# --- specs of the repository -------------------------------------------------------------------------------------


def texts() -> Iterator[tuple[str, str]]:
    """Yield the location and the content of every text in the repository that could be a spec in YAML."""
    for path in sorted(ROOT.glob("examples/specs/*.yaml")):
        yield str(path.relative_to(ROOT)), path.read_text(encoding="utf-8")
    for path in sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/**/*.md")]):
        for number, block in enumerate(re.findall(r"```yaml\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL)):
            yield f"{path.relative_to(ROOT)}#{number}", block
    for path in sorted(ROOT.glob("tests/golden/errors/*.txt")):
        yield str(path.relative_to(ROOT)), path.read_text(encoding="utf-8").partition("=====\n")[0]


def mappings() -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield every spec in the repository with its location: YAML texts, strings in Python files, literal mappings."""
    for name, text in texts():
        yield from ((name, data) for data in _read(text))
    for folder in ("tests", "examples", "graftc", "tools", "benchmarks"):
        for path in sorted(ROOT.glob(f"{folder}/**/*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                name = f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"
                if isinstance(node, ast.Constant) and isinstance(node.value, str) and "adapt" in node.value:
                    yield from ((name, data) for data in _read(node.value))
                elif isinstance(node, ast.Dict) and '"adapt"' in (text := ast.unparse(node).replace("'", '"')):
                    try:
                        yield name, ast.literal_eval(text)
                    except (ValueError, SyntaxError):
                        continue


def _read(text: str) -> Iterator[dict[str, Any]]:
    try:
        data, _ = read_yaml(text, None)
    except GraftError:
        return
    if isinstance(data, dict) and "adapt" in data:
        yield data


@pytest.mark.full
def test_every_spec_of_the_repository_that_parses_is_valid() -> None:
    taken = [(name, data) for name, data in mappings() if parses(data) is None]
    assert len(taken) > 60 and any(name.startswith("README") for name, _ in taken)
    wrong = {name: errors for name, data in taken if (errors := findings(data))}
    assert not wrong


# --- wrong specs -------------------------------------------------------------------------------------------------


def lora(**fields: Any) -> dict[str, Any]:
    return {"adapt": [{"method": "lora", "target": Q, **fields}]}


def target(**fields: Any) -> dict[str, Any]:
    return {"adapt": [{"method": "lora", "target": fields}]}


def override(**fields: Any) -> dict[str, Any]:
    return lora(overrides=[fields])


WRONG: dict[str, Any] = {
    "no mapping": [],
    "nothing": {},
    "adapt is not a list": {"adapt": {"method": "lora", "target": Q}},
    "adapt is null": {"adapt": None},
    "unknown field of the document": {"adapt": [], "trian": []},
    "unknown field of an adaptation": lora(rnk=8),
    "unknown field of a target": target(role="attn.q", layer=3),
    "unknown field of an override": override(layers=0, rnk=4),
    "unknown field of tokens": {"adapt": [], "tokens": {"add": ["<a>"], "last": 3}},
    "unknown field of a budget": {"adapt": [], "fold": {"budget": {"logit": 1}}},
    "adaptation is not a mapping": {"adapt": ["lora"]},
    "no method": {"adapt": [{"target": Q}]},
    "unknown method": {"adapt": [{"method": "lorra", "target": Q}]},
    "method is not text": {"adapt": [{"method": 3, "target": Q}]},
    "no target": {"adapt": [{"method": "lora"}]},
    "target is a text": {"adapt": [{"method": "lora", "target": "attn.q"}]},
    "target says nothing": target(),
    "target only narrows": target(layers=3),
    "target says null": target(role=None),
    "rank 0": lora(rank=0),
    "rank is a text": lora(rank="8"),
    "rank is true": lora(rank=True),
    "rank is a fraction": lora(rank=8.5),
    "rank is null": lora(rank=None),
    "alpha 0": lora(alpha=0),
    "dropout 1": lora(dropout=1),
    "dropout below 0": lora(dropout=-0.1),
    "rslora is a number": lora(rslora=1),
    "wrong choice": lora(init="kaimign"),
    "wrong choice of bias": lora(bias=False),
    "name with a dash": lora(name="my-lora"),
    "name starts with a digit": lora(name="1a"),
    "name starts with two underscores": lora(name="__a"),
    "unknown role": target(role="attn.qq"),
    "unknown role in a list": target(role=["attn.q", "attn.x"]),
    "prefix in the wrong place": target(role="cross.decoder.attn.k"),
    "role with a star": target(role="attn.*"),
    "empty list of roles": target(role=[]),
    "role is a number": target(role=3),
    "empty glob": target(modules=""),
    "blank glob": target(modules="  "),
    "empty list of globs": target(modules=[]),
    "glob is a number": target(modules=[3]),
    "no layer": target(**Q, layers="first"),
    "layer is a fraction": target(**Q, layers=1.5),
    "layer is true": target(**Q, layers=True),
    "slice of step 0": target(**Q, layers="0:6:0"),
    "slice with a negative step": target(**Q, layers="::-1"),
    "expect 0": target(**Q, expect=0),
    "override is not a list": lora(overrides={"layers": 0, "rank": 4}),
    "override holds nowhere": override(rank=4),
    "override changes nothing": override(layers=0),
    "override changes to null": override(layers=0, rank=None),
    "override with rank 0": override(layers=0, rank=0),
    "version 2": {"version": 2, "adapt": []},
    "version is true": {"version": True, "adapt": []},
    "version is a text": {"version": "1", "adapt": []},
    "train is a mapping": {"adapt": [], "train": {"classifier": True}},
    "train with an empty glob": {"adapt": [], "train": [""]},
    "no tokens": {"adapt": [], "tokens": {"add": []}},
    "an empty token": {"adapt": [], "tokens": {"add": [""]}},
    "a token twice": {"adapt": [], "tokens": {"add": ["<a>", "<a>"]}},
    "tokens without add": {"adapt": [], "tokens": {}},
    "first below 0": {"adapt": [], "tokens": {"add": ["<a>"], "first": -1}},
    "wrong checkpoint": {"adapt": [], "checkpoint": "all"},
    "budget below 0": {"adapt": [], "fold": {"budget": {"logits": -1}}},
    "fold is null": {"adapt": [], "fold": None},
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_wrong_for_both(name: str) -> None:
    assert findings(WRONG[name]), "the schema takes it"
    if name != "no mapping":
        assert parses(WRONG[name]) is not None, "the parser takes it"


def test_a_finding_is_at_the_place_of_the_mistake() -> None:
    (error,) = VALIDATOR.iter_errors({"adapt": [{"method": "lora", "target": {"role": "attn.qq"}}]})
    deepest = min(_leaves(error), key=lambda e: -len(list(e.absolute_path)))
    assert list(deepest.absolute_path) == ["adapt", 0, "target", "role"]
    messages = findings({"adapt": [{"method": "lorra", "target": Q}]})
    assert any(line.startswith("$.adapt[0].method: 'lorra' is not one of") for line in messages)


def _leaves(error: Any) -> Iterator[Any]:
    if not error.context:
        yield error
    for inner in error.context:
        yield from _leaves(inner)


# --- what editors need -------------------------------------------------------------------------------------------


def _fields(schema: Any, path: str = "$") -> Iterator[tuple[str, dict[str, Any]]]:
    if isinstance(schema, dict):
        if schema.get("type") == "object" and schema.get("additionalProperties") is False:
            for name, field in schema["properties"].items():
                yield f"{path}.{name}", field
        for key, value in schema.items():
            yield from _fields(value, f"{path}.{key}")
    elif isinstance(schema, list):
        for value in schema:
            yield from _fields(value, path)


def test_every_field_has_a_description_and_no_title() -> None:
    fields = dict(_fields(SCHEMA))
    assert len(fields) > 30
    for path, field in fields.items():
        assert field.get("description"), f"{path} has no description"
        assert "title" not in field, path
    for name, definition in SCHEMA["$defs"].items():
        assert definition.get("description"), f"{name} has no description"
        assert "Raises:" not in definition["description"]
    assert "Raises:" not in SCHEMA["description"]


def test_every_field_has_its_default() -> None:
    for entry in method_specs().values():
        definition = SCHEMA["$defs"][entry.spec_class.__name__]
        for name, info in entry.spec_class.model_fields.items():
            assert ("default" in definition["properties"][name]) != info.is_required(), name
    assert SCHEMA["required"] == ["adapt"]


def test_methods_are_told_apart_by_their_tag() -> None:
    union = SCHEMA["properties"]["adapt"]["items"]
    assert union["properties"]["method"]["enum"] == list(method_specs())
    for option, tag in zip(union["oneOf"], method_specs(), strict=True):
        definition = SCHEMA["$defs"][option["$ref"].rpartition("/")[2]]
        assert option["required"] == ["method"] and definition["properties"]["method"]["const"] == tag


def test_roles_are_offered_and_may_have_prefixes_and_braces() -> None:
    role = SCHEMA["$defs"]["role"]
    assert role["anyOf"][0]["enum"] == list(ROLES)
    for text in (*role["examples"], *ROLES, "encoder.cross.attn.q", "{attn.q,ffn.down}", "decoder.{attn,ffn}.sublayer"):
        assert parses(target(role=text)) is None and not findings(target(role=text)), text
    for name in ("layer", "glob", "regex", "name"):
        assert SCHEMA["$defs"][name]["examples"]


# --- specs made from the models ----------------------------------------------------------------------------------

_GOOD: dict[str, list[Any]] = {
    "role": ["attn.q", "attn.{q,v}", "decoder.cross.attn.k", "cross.ffn.up", "encoder.{attn.o,ffn.{up,down}}", "embed"],
    "glob": ["**.query", "classifier", "**.layer.{0,1}.*", "a", "["],
    "regex": [".*", ".*[.](query|value)", "a{2}"],
    "layer": [0, -1, 3, "0:6", "3", " -1 ", "::2", "1:-2:003", ":"],
    "name": ["a", "_", "_1", "A_1", "lora_2", "attention", "b", "c_", "inner", "_x"],
}
_TEXTS = st.sampled_from(
    [
        *("", " ", "attn.x", "cross.decoder.attn.k", "a{", "a}", "{attn.x}", "(", "1:2:0", "1:2:-1", "first", "1.5"),
        *("__a", "1a", "a-b", "class", "forward", "é", "lora", "olora", "saved", "none", "layers"),
        *(text for texts in _GOOD.values() for text in texts if isinstance(text, str)),
    ]
)
_VALUES = (
    _TEXTS
    | st.none()
    | st.booleans()
    | st.integers(-3, 9)
    | st.sampled_from([0.0, 0.5, 1.5, -1.0, 1e-3])
    | st.lists(_TEXTS | st.integers(-3, 9), max_size=3)
    | st.dictionaries(_TEXTS, _TEXTS, max_size=2)
)


_CLOZES = [
    {"blank": 103, "labels": ["a", "b"], "verbalizers": [[[[1]], [[2], [3]]]]},
    {"blank": "last", "labels": ["a", "b"], "verbalizers": [[[[1]], [[2]]], [[[3]], [[4]]]]},
    {"decoder": [0, 9], "labels": ["a", "b", "c"], "verbalizers": [[[[1]], [[2]], [[3]]]]},
]


def values_of(annotation: Any, metadata: tuple[Any, ...] = ()) -> st.SearchStrategy[Any]:
    """Return a strategy for values of a field with this annotation, nearly all of them valid."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if hasattr(annotation, "__value__"):  # a named type
        return st.sampled_from(_GOOD[annotation.__name__])
    if origin is Annotated:
        return values_of(arguments[0], (*metadata, *arguments[1:]))
    if origin in (Union, UnionType):
        return st.one_of(*(values_of(option, metadata) for option in arguments))
    if origin is Literal:
        return st.sampled_from(arguments)
    if origin is tuple:  # a pair around 0 and 1
        return st.sampled_from([[-0.5, 1.5], [-1, 2], [-0.5, 1.5, 2], [0.5, 1.5]])
    if origin is Sequence:
        return st.lists(values_of(arguments[0]), min_size=1, max_size=2, unique_by=repr)
    if annotation is ClozeOptions:  # its lists belong together
        return st.builds(dict, st.sampled_from(_CLOZES))
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        options = [entry.spec_class for entry in method_specs().values() if issubclass(entry.spec_class, annotation)]
        return st.one_of(*(document(model) for model in options or [annotation]))
    if annotation is int:
        least = next((m.ge for m in metadata if isinstance(m, annotated_types.Ge)), 0)
        most = next((m.le for m in metadata if isinstance(m, annotated_types.Le)), 9)
        return st.integers(int(least), int(most))
    if annotation is float:
        return st.sampled_from([0.5, 0.25, 1e-3])
    plain = {str: st.sampled_from(["<a>", "b"]), bool: st.booleans(), NoneType: st.none()}
    return plain[annotation]


@st.composite
def document(draw: st.DrawFn, model: type[BaseModel]) -> dict[str, Any]:
    """Draw a document for a model: the required fields, and some of the others."""
    data = {}
    for name, info in model.model_fields.items():
        # A target and an override need a place, and a spec's adaptations need a method.
        wanted = info.is_required() or name in ("method", "role")
        # Compositions refer to adaptations by name, and drawn names hardly ever match: most documents go without them.
        if name == "compose" and draw(st.integers(0, 7)):
            continue
        if wanted or draw(st.integers(0, 3)) == 0:  # with more of them, few documents are valid
            data[name] = draw(values_of(info.annotation, tuple(info.metadata)))
    return data


@st.composite
def changed(draw: st.DrawFn) -> Any:
    """Draw a document for a spec, often with one value replaced or an unknown field added."""
    data = draw(document(Spec))
    if draw(st.booleans()):
        return data
    node: Any = data
    for _ in range(draw(st.integers(0, 4))):
        children = list(node.values() if isinstance(node, dict) else node)
        inner = [value for value in children if isinstance(value, (dict, list)) and value]
        if not inner:
            break
        node = draw(st.sampled_from(inner))
    keys = [*node, "other"] if isinstance(node, dict) else list(range(len(node)))
    node[draw(st.sampled_from(keys))] = draw(_VALUES)
    return data


# The rules that a schema cannot express: unique names, reserved names, the insides of patterns, that 1.0 is not an
# integer, and which values go together.
_BEYOND = re.compile(
    r"the name '.*' is taken|name '.*' is reserved|a brace|is not a regular expression|has more than|"
    r"(must be an integer|expected a layer or a slice of layers).*, not -?\d+\.0$|role '.*' is unknown|"
    r"both set|(has|have) no effect with |a linear map has an input|an adapter cannot (add|read)|"
    r"adds the role norm|init_tokens and init: tokens|init_tokens has .* tokens|cannot start from init_tokens|"
    r"cannot start with only some|is (above|below) (density|threshold)|stage must be at most|"
    r"exceeds interval|block needs density|"
    r"words for .* labels, but there are|a word has .* tokens|have the same words"
)


_SETTINGS = settings(deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


@pytest.mark.full
@pytest.mark.parametrize("examples", [100, pytest.param(500, marks=pytest.mark.full)])
def test_what_parses_is_valid_and_the_other_way_round(examples: int) -> None:
    seen = {True: 0, False: 0}

    @settings(_SETTINGS, max_examples=examples)
    @given(changed())
    def compare(data: Any) -> None:
        error, complaints = parses(data), findings(data)
        seen[error is None] += 1
        if error is None:
            assert not complaints
            dumped = load_spec(data).model_dump(mode="json")
            assert not findings(dumped)
        elif not complaints:
            everything = [error, *(d for d in error.details if isinstance(d, GraftError))]
            assert all(_BEYOND.search(e.message) for e in everything), [e.message for e in everything]

    compare()
    assert min(seen.values()) > examples // 8, seen
