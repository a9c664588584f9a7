"""PET specs: patterns, verbalizers, values that fit together, and the places of errors where they do not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graftc.specs.document import Spec
from graftc.specs.errors.diagnostics import GraftError
from graftc.specs.pet.document import PetSpec
from graftc.specs.pet.io import dump_pet_spec, load_pet_spec, parse_pet_spec
from graftc.specs.pet.pattern import BLANKS, PatternPart, PatternSpec, parse_pattern
from graftc.specs.pet.training import IpetOptions, TrainingOptions
from graftc.specs.pet.verbalizer import Verbalizer
from tests.kit.refusals import refused

LORA = {"adapt": [{"method": "lora", "target": {"role": "attn.q"}}]}
GOOD = """\
patterns:
  - "{text} This text is about {blank}."
  - name: topic
    text: "Topic: {blank}. {text}"
    verbalizer: {hockey: hockey, space: [space, nasa]}
  - "{title} {{so}} {blank} {blank}"
verbalizer: {space: space, hockey: [hockey, sports]}
spec: {adapt: [{method: lora, target: {role: [attn.q, attn.v]}}]}
training: {steps: 100, learning_rate: 1e-4}
members: bank
ipet: {generations: 2}
classifier: {kind: cloze, training: {batch_size: 16}}
"""


def wrong(**changes: Any) -> GraftError:
    """Return the error of an otherwise valid document."""
    data = {"patterns": ["{text} {blank}"], "verbalizer": {"a": "x", "b": "y"}, **changes}
    with pytest.raises(GraftError) as caught:
        load_pet_spec({key: value for key, value in data.items() if value is not None})
    assert caught.value.hint
    return caught.value


def test_a_document() -> None:
    spec = parse_pet_spec(GOOD)
    assert [p.name for p in spec.patterns] == ["pattern-1", "topic", "pattern-3"]
    assert spec.labels == ("space", "hockey") and spec.slots == ("text", "title")
    assert spec.verbalizers[1] == Verbalizer({"space": ["space", "nasa"], "hockey": "hockey"})
    assert spec.verbalizers[0] == spec.verbalizers[2] == spec.verbalizer
    assert spec.training == TrainingOptions(steps=100, learning_rate=1e-4)
    assert spec.ipet == IpetOptions(generations=2, growth=5.0, share=0.25, start_size=10)
    assert spec.classifier.training.batch_size == 16 and spec.classifier.training.steps == 5_000
    assert hash(spec) == hash(parse_pet_spec(GOOD))


def test_the_defaults_are_those_of_the_paper() -> None:
    spec = load_pet_spec({"patterns": ["{text} {blank}"], "verbalizer": {"a": "x", "b": "y"}})
    assert spec.spec == spec.classifier.spec == Spec.model_validate({"adapt": [{"method": "full"}]})
    assert (spec.seeds, spec.ensemble, spec.members, spec.ipet) == (3, "accuracy", "separate", None)
    training = spec.training
    assert (training.steps, training.batch_size, training.learning_rate, training.weight_decay) == (250, 4, 1e-5, 0.01)
    assert (training.max_grad_norm, training.warmup, training.max_length, training.auxiliary) == (1.0, 0.0, 256, 1e-4)
    assert (training.unlabelled_ratio, spec.classifier.temperature, spec.classifier.kind) == (1, 2.0, "sequence")


def test_files_mappings_and_specs(tmp_path: Path) -> None:
    spec = parse_pet_spec(GOOD)
    (tmp_path / "pet.yaml").write_text(GOOD, encoding="utf-8")
    data = spec.model_dump(mode="json")
    (tmp_path / "pet.json").write_text(json.dumps(data), encoding="utf-8")
    assert load_pet_spec(tmp_path / "pet.yaml") == load_pet_spec(spec) == spec
    assert load_pet_spec(tmp_path / "pet.json") == load_pet_spec(data) == spec
    with pytest.raises(GraftError) as caught:
        load_pet_spec(tmp_path / "pte.yaml")
    assert caught.value.code == "GC006" and "pet.yaml" in caught.value.hint
    with pytest.raises(GraftError) as caught:
        load_pet_spec(GOOD)
    assert caught.value.hint == "use parse_pet_spec(text)"


WORDS = st.text(st.characters(codec="utf-8", exclude_categories=("C", "Z")), min_size=1, max_size=8)


@pytest.mark.slow
@given(
    words=st.dictionaries(WORDS, st.lists(WORDS, min_size=1, max_size=3, unique=True), min_size=2, max_size=4),
    seeds=st.integers(1, 5),
    ipet=st.none() | st.builds(IpetOptions, growth=st.floats(1.5, 9.0)),
)
def test_a_spec_is_written_and_read_back(words: dict[str, list[str]], seeds: int, ipet: IpetOptions | None) -> None:
    words = {label: [f"{label}{word}" for word in own] for label, own in words.items()}
    told = [frozenset(own) for own in words.values()]
    if len(set(told)) < len(told):
        return
    spec = PetSpec(
        patterns=(PatternSpec(text="{text} {blank}"), PatternSpec(name="b", text="{a b} {{ {blank}")),
        verbalizer=Verbalizer(words),
        spec=Spec.model_validate(LORA),
        seeds=seeds,
        ipet=ipet,
    )
    assert parse_pet_spec(dump_pet_spec(spec)) == spec
    assert PetSpec.model_validate_json(spec.model_dump_json()) == spec


@given(st.lists(st.sampled_from(["{", "}", "text", "title", " ", ".", "Ä"]), max_size=8).map("".join))
def test_braces_written_twice_are_themselves(text: str) -> None:
    escaped = text.replace("{", "{{").replace("}", "}}")
    parts = parse_pattern(f"{{x}}{escaped}{{blank}}")
    assert [part.text for part in parts if part.kind == "text"] == ([text] if text else [])


def test_the_parts_of_a_pattern() -> None:
    pattern = PatternSpec(text="{text} It was {blank}{blank} of {text} {Review Text}")
    assert pattern.parts == (
        *(PatternPart("slot", "text"), PatternPart("text", " It was "), PatternPart("blank", "")),
        *(PatternPart("blank", ""), PatternPart("text", " of "), PatternPart("slot", "text")),
        *(PatternPart("text", " "), PatternPart("slot", "Review Text")),
    )
    assert pattern.blanks == 2 and pattern.slots == ("text", "Review Text")


@pytest.mark.parametrize(
    ("text", "said", "hint"),
    [
        ("{text} It was", "has no blank", "write {blank}"),
        ("{text} It was {blnk}", "has no blank", "did you mean {blank}?"),
        ("{text} It was {mask}", "has no blank", "did you mean {blank}?"),
        ("It was {blank}", "has no slot", "write {text}"),
        ("{text} It was {blank", "a brace at character 15 has no '}'", "write a slot as {text}"),
        ("{text} It was blank}", "a brace at character 20 has no '{'", "write a slot as {text}"),
        ("{text} {} {blank}", "'{}' names no field", "write a slot as {text}"),
        ("{text!r} {blank}", "'{text!r}' names no field", "write a slot as {text}"),
        ("{text} { blank }", "neither a slot nor a blank", "did you mean {blank}?"),
        ("{text} {label} {blank}", "cannot show the label", "the blank represents it"),
        ("{text}" + "{blank}" * (BLANKS + 1), "17 blanks, more than 16", ""),
    ],
)
def test_patterns_that_cannot_be_used(text: str, said: str, hint: str) -> None:
    for error in (wrong(patterns=[text]), wrong(patterns=[{"text": text}])):
        assert error.code == "GC175" and said in error.message and hint in error.hint
        assert error.place is not None and error.place.path.startswith("patterns[0]")


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ({}, "GC176", "no labels"),
        ({"a": "x"}, "GC176", "one label, 'a'"),
        ({"a": "x", "b": "x"}, "GC176", "'a' and 'b' have the same words"),
        ({"a": ["x", "y"], "b": ["y", "x"]}, "GC176", "'a' and 'b' have the same words"),
        ({"a": "x", "b": []}, "GC176", "'b' has no words"),
        ({"a": "x", "b": ["y", "y"]}, "GC176", "'y' is listed twice"),
        ({"a": "x", "b": " y"}, "GC176", "' y' begins or ends with a space"),
        ({"a": "x", "b": ""}, "GC176", "the word is empty"),
        ({"a": "x", "b": ["y", " "]}, "GC176", "the word is empty"),
        ({"a": "x", "": "y"}, "GC176", "a label is empty"),
        ({"a": "x", " b": "y"}, "GC176", "label ' b' begins or ends with a space"),
        ({"a": "x", "b": 1}, "GC002", "a word must be a string, not 1"),
        ({"a": "x", "b": ["y", True]}, "GC002", "a word must be a string, not true"),
        ({"a": "x", "b": {"c": "y"}}, "GC002", "a word must be a string"),
        (["a", "b"], "GC002", "a mapping from labels to words"),
    ],
)
def test_verbalizers_that_cannot_be_used(words: Any, code: str, said: str) -> None:
    error = wrong(verbalizer=words)
    assert error.code == code and said in error.message
    with pytest.raises(GraftError) as caught:
        Verbalizer(words)
    assert (caught.value.code, caught.value.message) == (error.code, error.message)


@pytest.mark.parametrize("label", [1, True])
def test_labels_are_texts(label: Any) -> None:
    words = {label: "x", "b": "y"}
    for error in (wrong(verbalizer=words), wrong(patterns=[{"text": "{text}: {blank}", "verbalizer": words}])):
        assert (error.code, error.hint) == ("GC002", "labels are strings: put them in quotes")
    with pytest.raises(GraftError) as caught:
        Verbalizer(words)
    assert caught.value.hint == "labels are strings: put them in quotes"


def test_verbalizers_may_share_some_words() -> None:
    assert Verbalizer({"a": ["x", "y"], "b": ["y", "z"]}).labels == ("a", "b")


OWN = {"text": "{text}: {blank}", "verbalizer": {"a": "x", "c": "y"}}


@pytest.mark.parametrize(
    ("changes", "code", "path", "said"),
    [
        ({"patterns": []}, "GC002", "patterns", ""),
        ({"patterns": ["{text} {blank}", OWN]}, "GC176", "patterns[1].verbalizer", "lacks 'b' and has 'c'"),
        (
            {"patterns": ["{text} {blank}", OWN], "verbalizer": None},
            "GC176",
            "patterns[0]",
            "no verbalizer for 'pattern-1'",
        ),
        ({"patterns": ["{text} {blank}"] * 2}, "GC175", "patterns[1]", "the same as patterns[0]"),
        (
            {"patterns": [{"name": "p", "text": "{text} {blank}"}, {"name": "P", "text": "{text}: {blank}"}]},
            *("GC005", "patterns[1].name", "'P' is taken by patterns[0]"),
        ),
        ({"patterns": [{"name": "../p", "text": "{text} {blank}"}]}, "GC002", "patterns[0].name", "names a folder"),
        ({"patterns": [3]}, "GC002", "patterns[0]", "a pattern must be a string or a mapping"),
        ({"members": "bank"}, "GC177", "members", "the default spec trains all of it"),
        ({"members": "bank", "spec": {"adapt": [], "train": ["a"]}}, "GC177", "spec.adapt", "the spec has none"),
        ({"members": "bank", "spec": {"adapt": [{"method": "full"}]}}, "GC177", "spec.adapt[0].method", "full cannot"),
        ({"members": "banks"}, "GC002", "members", "'banks'"),
        ({"seeds": 0}, "GC002", "seeds", "at least 1"),
        ({"seeds": 1, "ipet": {}}, "GC002", "ipet", "there is only one"),
        ({"ipet": {"share": 0.0}}, "GC002", "ipet.share", "greater than 0"),
        ({"ipet": {"growth": 1}}, "GC002", "ipet.growth", "greater than 1"),
        ({"training": {"learning_rate": 0}}, "GC002", "training.learning_rate", "greater than 0"),
        ({"training": {"auxiliary": 1}}, "GC002", "training.auxiliary", "less than 1"),
        ({"training": {"warmup": -1}}, "GC002", "training.warmup", "at least 0"),
        ({"training": {"max_length": 7}}, "GC002", "training.max_length", "at least 8"),
        ({"training": {"stesp": 7}}, "GC003", "training.stesp", "'stesp' is unknown"),
        ({"classifier": {"temperature": 1e-300}}, "GC002", "classifier.temperature", "at least 0.01"),
        ({"classifier": {"training": {"auxiliary": 0}}}, "GC003", "classifier.training.auxiliary", "unknown"),
        ({"spec": {"adapt": [{"method": "lorra"}]}}, "GC004", "spec.adapt[0].method", "lorra"),
        ({"version": 2}, "GC007", "version", "version 2"),
        ({"version": True}, "GC007", "version", "version true"),
    ],
)
def test_what_does_not_fit(changes: dict[str, Any], code: str, path: str, said: str) -> None:
    error = wrong(**changes)
    assert error.code == code and said in error.message
    assert error.place is not None and error.place.path == path


def test_a_bank_is_made_of_what_the_spec_does_not_compose() -> None:
    adapt = [{**LORA["adapt"][0], "name": name} for name in ("one", "two")]
    error = wrong(members="bank", spec={"adapt": adapt, "compose": {"average": ["one", "two"]}})
    assert (error.code, error.place and error.place.path) == ("GC177", "spec.compose")


def test_places_and_corrections() -> None:
    error = refused(
        parse_pet_spec,
        GOOD.replace('{blank}."\n  - name', '{blnk}."\n  - name').replace("members", "membres"),
        file="pet.yaml",
    )
    assert (error.code, str(error.place)) == ("GC175", "pet.yaml:2:5 (patterns[0])")
    assert error.corrected == '  - "{text} This text is about {blank}."'
    (other,) = error.details
    assert isinstance(other, GraftError)
    assert (other.code, other.hint, other.corrected) == ("GC003", "did you mean 'members'?", "members: bank")
    assert (
        refused(parse_pet_spec, "", file="pet.yaml").code == "GC001"
        and "patterns" in refused(parse_pet_spec, "- a", file="pet.yaml").hint
    )
    one = refused(parse_pet_spec, GOOD.replace("[hockey, sports]", "1"), file="pet.yaml")
    assert str(one.place) == "pet.yaml:7:36 (verbalizer.hockey)" and one.corrected is not None
    spec = parse_pet_spec(GOOD, file="pet.yaml")
    assert str(spec.place("patterns[1].text")) == "pet.yaml:4:11 (patterns[1].text)"


@pytest.mark.slow
def test_the_schema_says_what_documents_are() -> None:
    schema = PetSpec.model_json_schema()
    pattern = schema["properties"]["patterns"]["items"]
    assert {"type": "string"} in pattern["anyOf"]
    assert schema["required"] == ["patterns"]
    words = schema["properties"]["verbalizer"]["anyOf"][0]
    assert words["minProperties"] == 2
