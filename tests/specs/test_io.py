"""Reading and writing specs: formats, positions, unreadable input, and the round trip."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from graftc.specs import LoRA, LoRAOverride, Spec, Target, dump_spec, load_spec, parse_spec
from graftc.specs.document import Budget, FoldOptions
from graftc.specs.errors.diagnostics import GraftError, Place
from graftc.specs.io import write_yaml
from graftc.specs.roles import ROLES
from graftc.specs.source import format_path, parse_path, read_yaml
from tests.kit.refusals import refused

GOOD = """\
version: 1
adapt:
  - method: lora
    target: {role: [attn.q, attn.v], layers: 0:6}
    rank: 4
train: [classifier]
fold: {budget: {logits: 1e-3}}
"""


def test_yaml_json_and_toml_are_the_same_spec(tmp_path: Path) -> None:
    data = {
        "version": 1,
        "adapt": [{"method": "lora", "target": {"role": ["attn.q", "attn.v"], "layers": "0:6"}, "rank": 4}],
        "train": ["classifier"],
        "fold": {"budget": {"logits": 1e-3}},
    }
    toml = (
        'version = 1\ntrain = ["classifier"]\n[[adapt]]\nmethod = "lora"\nrank = 4\n'
        'target = {role = ["attn.q", "attn.v"], layers = "0:6"}\n[fold.budget]\nlogits = 1e-3\n'
    )
    texts = {"a.yaml": GOOD, "a.yml": "\ufeff" + GOOD, "a.json": json.dumps(data, indent="\t"), "a.toml": toml}
    for name, text in texts.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
        assert load_spec(tmp_path / name) == load_spec(str(tmp_path / name)) == load_spec(data)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1:6", "1:6"),
        ("12:30:45", "12:30:45"),
        ("no", "no"),
        ("on", "on"),
        ("010", 10),
        ("0o17", 15),
        ("0x1F", 31),
        ("1e-3", 0.001),
        ("1.5", 1.5),
        ("-3", -3),
        ("1_000", "1_000"),
        ("2024-01-01", "2024-01-01"),
        ("True", True),
        ("~", None),
        ("", None),
        ("'8'", "8"),
        ("=", "="),
        ("!!str 8", "8"),
        ("!!float 8", 8.0),
    ],
)
def test_scalars_have_the_types_of_yaml_1_2(text: str, value: object) -> None:
    data, _ = read_yaml(f"a: {text}\n")
    assert data == {"a": value} and type(data["a"]) is type(value)


def test_errors_have_line_column_and_the_corrected_line() -> None:
    error = refused(
        parse_spec, "adapt:\n  - method: lora\n    target:\n      role: attn.qq   # queries\n", file="spec.yaml"
    )
    assert error.place == Place("spec.yaml", 4, 13, "adapt[0].target.role", "      role: attn.qq   # queries")
    assert error.corrected == "      role: attn.q   # queries"


def test_an_unknown_field_points_at_its_key() -> None:
    error = refused(parse_spec, 'adapt:\n- {method: lora, target: {role: attn.q}, "rnk": 3}\n', file="spec.yaml")
    assert error.place is not None and (error.place.line, error.place.column) == (2, 42)
    assert error.corrected == '- {method: lora, target: {role: attn.q}, "rank": 3}'


def test_a_missing_field_points_at_what_lacks_it() -> None:
    error = refused(parse_spec, "adapt:\n- method: lora\n  rank: 3\n", file="spec.yaml")
    assert error.message == "target is missing" and error.place is not None
    assert (error.place.line, error.place.column, error.place.path) == (2, 3, "adapt[0].target")


def test_json_errors_have_line_and_column_with_tabs() -> None:
    text = '{\n\t"adapt": [\n\t\t{"method": "lorra", "target": {"role": "attn.q"}}\n\t]\n}'
    error = refused(parse_spec, text, file="spec.yaml", format="json")
    assert error.code == "GC004" and error.place is not None
    assert (error.place.line, error.place.column) == (3, 14)
    assert error.corrected == '\t\t{"method": "lora", "target": {"role": "attn.q"}}'


def test_toml_errors_name_the_path() -> None:
    error = refused(
        parse_spec,
        '[[adapt]]\nmethod = "lora"\nrank = 0\ntarget = {role = "attn.q"}\n',
        file="spec.yaml",
        format="toml",
    )
    assert error.place == Place("spec.yaml", path="adapt[0].rank")


@pytest.mark.parametrize(
    ("text", "message", "line", "column"),
    [
        ("adapt: [\n", "not valid YAML: expected the node content, but found '<stream end>'", 2, 1),
        ("a: 1\n  b: 2\n", "not valid YAML: mapping values are not allowed here", 2, 4),
        ("adapt:\n\t- a\n", "not valid YAML: found character '\\t' that cannot start any token", 2, 1),
        ("a: b\x00", "not valid YAML: special characters are not allowed", 1, 5),
        ("a: *b\n", "not valid YAML: found undefined alias 'b'", 1, 4),
        ("a: 1\n---\nb: 2\n", "not valid YAML: but found another document", 2, 1),
        ("adapt: []\nadapt: []\n", "not a readable spec: the key 'adapt' is repeated", 2, 1),
        ("a: &x [*x]\n", "not a readable spec: an alias refers to a value that contains it", 1, 4),
        ("a: !!python/name:os.system ''\n", "the tag tag:yaml.org,2002:python/name:os.system is not supported", 1, 4),
        ("a: !!set {b}\n", "not a readable spec: the tag tag:yaml.org,2002:set is not supported", 1, 4),
        ("a: !!int b\n", "not a readable spec: 'b' is not an int", 1, 4),
        ("a: !!bool b\n", "not a readable spec: 'b' is not a bool", 1, 4),
        ("[a]: b\n", "not a readable spec: a key must be a plain word", 1, 1),
        ("hello world\n", "a spec is a mapping, but this is a plain value", 1, 1),
        ("- a\n", "a spec is a mapping, but this is a list", 1, 1),
    ],
)
def test_yaml_that_is_not_a_spec(text: str, message: str, line: int, column: int) -> None:
    error = refused(parse_spec, text, file="spec.yaml")
    assert error.code == "GC001" and message in error.message
    assert error.place is not None and (error.place.line, error.place.column) == (line, column)


@pytest.mark.parametrize("text", ["", "# nothing\n", "---\n"])
def test_an_empty_file_is_told_so(text: str) -> None:
    assert refused(parse_spec, text, file="spec.yaml").message == "a spec is a mapping, but this is empty"


@pytest.mark.parametrize(
    ("line", "corrected"),
    [
        ("  modules: **.query", '  modules: "**.query"'),
        ("  modules: *.query  # all", '  modules: "*.query"  # all'),
        ("  modules: [a, **.{q}]", '  modules: [a, "**.{q}"]'),
        ("  {role: attn.{q,v}, layers: 3}", '  {role: "attn.{q,v}", layers: 3}'),
        ("  {role: attn.q, layers: -2:}", '  {role: attn.q, layers: "-2:"}'),
        ("  {layers: :6, role: attn.q}", '  {layers: ":6", role: attn.q}'),
    ],
)
def test_patterns_that_need_quotes_get_them(line: str, corrected: str) -> None:
    error = refused(parse_spec, f"adapt:\n- method: lora\n  target:\n  {line}\n", file="spec.yaml")
    assert error.code == "GC001" and error.hint is not None and error.hint.startswith("quote a")
    assert error.corrected == f"  {corrected}"
    assert "\n     4 + " in str(error)


def test_aliases_are_values_but_not_bombs() -> None:
    spec = parse_spec("adapt:\n- {method: lora, target: &t {role: attn.q}}\n- {method: lora, target: *t}\n")
    assert spec.adapt[0].target == spec.adapt[1].target
    bomb = "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 10))
    assert "more than 15,000 values" in refused(parse_spec, bomb, file="spec.yaml").message


@pytest.mark.parametrize("format", ["yaml", "json"])
def test_deep_nesting_is_no_crash(format: str) -> None:
    error = refused(parse_spec, "[" * 20_000, file="spec.yaml", format=format)
    assert error.code == "GC009"


@pytest.mark.parametrize(
    ("text", "message", "line", "column"),
    [
        ('{"adapt": [}', "not valid JSON: Expecting value", 1, 12),
        ('{\n"a": NaN}', "not valid JSON: NaN is not a JSON number", 1, 1),
        ('{"a": 1,\n "a": 2}', "the key 'a' is repeated", 2, 2),
        ("", "not valid JSON: Expecting value", 1, 1),
        ("[]", "a spec is a mapping, but this is a list", 1, 1),
    ],
)
def test_json_that_is_not_a_spec(text: str, message: str, line: int, column: int) -> None:
    error = refused(parse_spec, text, file="spec.yaml", format="json")
    assert error.code == "GC001" and message in error.message
    assert error.place is not None and (error.place.line, error.place.column) == (line, column)


def test_toml_that_is_not_toml() -> None:
    error = refused(parse_spec, "version = 1\nadapt = = 3\n", file="spec.yaml", format="toml")
    assert error.code == "GC001" and error.message == "not valid TOML: Invalid value"
    assert error.place is not None and (error.place.line, error.place.column) == (2, 9)


# Files


def test_a_missing_file_names_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "spec.yaml").write_text(GOOD)
    with pytest.raises(GraftError) as caught:
        load_spec(tmp_path / "spce.yaml")
    assert caught.value.code == "GC006" and caught.value.exit_code == 2
    assert caught.value.hint == f"did you mean '{tmp_path / 'spec.yaml'}'?"


def test_a_missing_folder_is_told_so(tmp_path: Path) -> None:
    with pytest.raises(GraftError) as caught:
        load_spec(tmp_path / "no" / "spec.yaml")
    assert caught.value.hint == f"there is no folder '{tmp_path / 'no'}'"


def test_a_folder_points_at_the_spec_inside(tmp_path: Path) -> None:
    folder = tmp_path / "run.yaml"
    folder.mkdir()
    (folder / "spec.yaml").write_text(GOOD)
    with pytest.raises(GraftError) as caught:
        load_spec(folder)
    assert caught.value.code == "GC006" and caught.value.hint == f"did you mean '{folder / 'spec.yaml'}'?"


def test_other_suffixes_and_bytes_are_refused(tmp_path: Path) -> None:
    (tmp_path / "spec.txt").write_text(GOOD)
    (tmp_path / "bad.yaml").write_bytes(b"adapt: \xff\n")
    for name, message in {"spec.txt": "the format of 'spec.txt' is not recognised", "bad.yaml": "not UTF-8"}.items():
        with pytest.raises(GraftError, match=message) as caught:
            load_spec(tmp_path / name)
        assert caught.value.code == "GC001"


@pytest.mark.parametrize("source", ["a\0b.yaml", 3, None, ["a"], GOOD])
def test_what_is_no_path_is_a_coded_error(source: Any) -> None:
    with pytest.raises(GraftError) as caught:
        load_spec(source)
    assert caught.value.code == "GC006"


def test_a_spec_knows_its_places() -> None:
    spec = parse_spec(GOOD, file="spec.yaml")
    assert str(spec.place("adapt[0].rank")) == "spec.yaml:5:11 (adapt[0].rank)"
    assert str(spec.place("adapt[0].dropout")) == "spec.yaml:3:5 (adapt[0].dropout)"
    late = spec.locate(
        GraftError("GC020", "rank 4 exceeds the layer", place=Place(path="adapt[0].rank"), fix=("4", "2"))
    )
    assert late.corrected == "    rank: 2" and late.place is not None and late.place.line == 5
    assert spec.locate(late) is late
    python = Spec(adapt=[LoRA(target=Target(role="attn.q"))])
    error = GraftError("GC020", "x", place=Place(path="adapt[0].rank"))
    assert python.locate(error) is error


keys = st.one_of(st.integers(0, 99), st.text(min_size=1, max_size=5))


@given(st.lists(keys, max_size=5))
def test_paths_read_back(path: list[str | int]) -> None:
    assert parse_path(format_path(path)) == tuple(path)


# The round trip

roles = st.one_of(st.sampled_from(list(ROLES)), st.just("attn.{q,v}"), st.just("decoder.cross.attn.k"))
globs = st.lists(st.text(alphabet="ab0_*", min_size=1, max_size=4), min_size=1, max_size=3).map(".".join)
layers = st.one_of(st.integers(-30, 30), st.sampled_from(["0:6", "-2:", ":", "1:9:2", "7", "-1"]))
numbers = st.floats(1e-9, 1e9)


def some(item: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.one_of(item, st.lists(item, min_size=1, max_size=3))


targets = st.builds(
    Target,
    role=some(roles),
    modules=st.none() | some(globs),
    layers=st.none() | some(layers),
    exclude=st.none() | some(globs),
    expect=st.none() | st.integers(1, 99),
)
overrides = st.builds(
    LoRAOverride,
    layers=some(layers),
    modules=st.none() | some(globs),
    rank=st.integers(1, 9),
    alpha=st.none() | numbers,
)
loras = st.builds(
    LoRA,
    target=targets,
    rank=st.integers(1, 64),
    alpha=numbers,
    rslora=st.booleans(),
    dropout=st.floats(0, 0.99),
    init=st.sampled_from(["kaiming", "gaussian", "pissa", "olora"]),
    bias=st.sampled_from(["none", "lora_only", "all"]),
    overrides=st.lists(overrides, max_size=2),
)
specs = st.builds(
    Spec,
    adapt=st.lists(loras, max_size=3),
    train=st.lists(globs, max_size=2),
    checkpoint=st.sampled_from([None, "layers"]),
    fold=st.builds(FoldOptions, budget=st.builds(Budget, logits=st.none() | st.floats(0, 1))),
)


@pytest.mark.full
@given(specs)
def test_every_spec_survives_yaml_and_json(spec: Spec) -> None:
    assert parse_spec(dump_spec(spec)) == spec
    assert parse_spec(spec.model_dump_json(), format="json") == spec


CLAIMED = sorted(
    {pattern for listed in yaml.SafeLoader.yaml_implicit_resolvers.values() for _, pattern in listed},
    key=lambda pattern: pattern.pattern,
)
"""Patterns of text that PyYAML, which reads YAML 1.1, does not read as a string: numbers, booleans, dates ..."""

words = st.text(max_size=8) | st.one_of(*(st.from_regex(pattern, fullmatch=True) for pattern in CLAIMED))
scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | words
documents = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3), max_leaves=6
)


@pytest.mark.slow
@given(st.dictionaries(words, documents, max_size=3))
def test_readers_of_yaml_1_1_and_1_2_agree(data: dict[str, Any]) -> None:
    text = write_yaml(data)
    for read in (yaml.safe_load(text), read_yaml(text)[0]):
        assert read == data and repr(read) == repr(data)  # 1 == True == 1.0


def test_a_slice_of_layers_is_not_a_sexagesimal_number() -> None:
    spec = parse_spec(GOOD.replace("0:6", "1:6"))
    assert yaml.safe_load(dump_spec(spec))["adapt"][0]["target"]["layers"] == "1:6"
    assert parse_spec(dump_spec(spec)) == spec
    assert yaml.safe_load("1:6") == 66


def test_a_dump_is_short_and_leads_with_what_matters() -> None:
    assert dump_spec(parse_spec(GOOD)) == (
        "version: 1\n"
        "adapt:\n"
        "- name: lora\n"
        "  method: lora\n"
        "  target:\n"
        "    role: [attn.q, attn.v]\n"
        "    layers: 0:6\n"
        "  rank: 4\n"
        "train: [classifier]\n"
        "fold:\n"
        "  budget: {logits: 0.001}\n"
    )


@given(st.text(alphabet="adept:[]{}-*&!|>'\"#, \n\t0.", max_size=40))
def test_no_text_makes_the_reader_crash(text: str) -> None:
    try:
        parse_spec(text)
    except GraftError as error:
        assert error.code in {"GC001", "GC002", "GC003"}
        str(error), error.to_json()
