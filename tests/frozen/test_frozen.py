"""Graphs, initial tensors and folded tensors are what `frozen.json` has of them."""

from __future__ import annotations

import unittest
from functools import cache

import pytest

from tests.frozen.freeze import AGAIN, FILE, NUMBERS, Entry, Frozen, Record, entries, made_with, read, record, to_json

SAMPLE = frozenset(
    {
        "test_adalora_contract.TestAdaLoRA.bert",
        "test_bottleneck_contract.TestHoulsby.bert",
        "test_diff_pruning_contract.TestGates.bert",
        "test_dora_contract.TestDoRA.gpt2",
        "test_ia3.TestIA3.gpt2",
        "test_lora_contract.TestExperts.mixtral",
        "test_lora_contract.TestLoRA.bert",
        "test_lora_contract.TestLoRA.gpt2",
        "test_pasta.TestPasta.bert",
        "test_prefix.TestPrefix.gpt2",
        "test_rows.TestTwoOfFour.gpt2",
        "test_virtual_tokens.TestPrompt.bert",
    }
)
"""One for each mechanism; `make test-full` has the others."""

EVERY = entries()


@cache
def frozen() -> Frozen:
    """What is recorded, where it was recorded with the installed versions."""
    found, here = read(), made_with()
    for library in ("torch", "transformers"):
        if found.made[library] != here[library]:
            raise unittest.SkipTest(f"recorded with {library} {found.made[library]}, here is {here[library]}")
    return found


def changes(recorded: Record, now: Record, same_processor: bool = True) -> list[str]:
    """The fields that are not as recorded, each with both values. On another processor digests of numbers tell nothing,
    unless one side is an error's code."""
    found = []
    for name in sorted(recorded.keys() | now.keys()):
        before, after = recorded.get(name, "nothing"), now.get(name, "nothing")
        numbers = name in NUMBERS and not any(value.startswith(("GC", "nothing")) for value in (before, after))
        if before != after and (same_processor or not numbers):
            found.append(f"{name}: was {before}, is {after}")
    return found


def compare(entry: Entry) -> None:
    """Fail where an entry is not as it is recorded."""
    name = str(entry)
    recorded = frozen()
    assert name in recorded.records, f"{name} is not recorded: {AGAIN} --only '^{name}$'"
    found = changes(recorded.records[name], record(entry), recorded.made["cpu"] == made_with()["cpu"])
    if found:
        again = f"where it is meant to change, record it anew: {AGAIN} --only '^{name}$' (without --only, everything)"
        pytest.fail("\n".join([f"{name} is not as it was:", *found, again]), pytrace=False)


@pytest.mark.slow
@pytest.mark.sample(
    "test_dora_contract.TestDoRA.gpt2", "test_lora_contract.TestLoRA.gpt2", "test_virtual_tokens.TestPrompt.bert"
)
@pytest.mark.parametrize("name", sorted(SAMPLE))
def test_sample_is_as_recorded(name: str) -> None:
    compare(EVERY[name])


@pytest.mark.full
@pytest.mark.parametrize("name", [name for name in EVERY if name not in SAMPLE])
def test_the_rest_is_as_recorded(name: str) -> None:
    compare(EVERY[name])


def test_what_is_recorded_is_what_there_is() -> None:
    """No entry is missing, none is left over, and the file is in its canonical form."""
    assert read().records.keys() == EVERY.keys()
    assert EVERY.keys() >= SAMPLE
    assert FILE.read_text(encoding="utf-8") == to_json(*read())


def test_changes_are_named() -> None:
    """Each field by its name; values alone only where the processor is the same."""
    one = {"graph.train": "a", "folded": "b"}
    assert changes(one, dict(one)) == []
    assert changes(one, {**one, "folded": "c"}) == ["folded: was b, is c"]
    assert changes(one, {**one, "folded": "c"}, same_processor=False) == []
    assert changes(one, {**one, "folded": "GC050"}, same_processor=False) == ["folded: was b, is GC050"]
    assert changes(one, {"folded": "b", "x": "y"}) == ["graph.train: was a, is nothing", "x: was nothing, is y"]
