"""Graphs, histories, tensors, outputs, gradients, folds and certificates equal their record.

The record is `frozen.json`, or the file that the environment variable ``GRAFTC_FROZEN`` names.
"""

from __future__ import annotations

import os
import unittest
from functools import cache
from pathlib import Path

import pytest
import torch

from tests.frozen.digests import agree, evidence_digest, tensors_digest
from tests.frozen.freeze import AGAIN, CPU, FILE, Entry, Frozen, entries, made_with, read, to_json
from tests.frozen.records import Record

COMPARED = Path(os.environ.get("GRAFTC_FROZEN", FILE))
EVERY = entries()


@cache
def frozen() -> Frozen:
    """Return the record, or skip the test if other versions are installed than it was made with."""
    stored, here = read(COMPARED), made_with()
    for library in ("torch", "transformers"):
        if stored.environment[library] != here[library]:
            raise unittest.SkipTest(f"recorded with {library} {stored.environment[library]}, here is {here[library]}")
    return stored


def changes(recorded: Record, now: Record, same_processor: bool = True) -> list[str]:
    """Return the fields that differ from the record, each with both values; on the same processor, compare bitwise."""
    fields = {name: (recorded.get(name, "nothing"), now.get(name, "nothing")) for name in recorded.keys() | now.keys()}
    return [
        f"{name}: was {before}, is {after}"
        for name, (before, after) in sorted(fields.items())
        if not agree(before, after, same_processor=same_processor)
    ]


def compare(entry: Entry) -> None:
    """Fail if an entry differs from its record."""
    name, recorded = entry.name, frozen()
    if name not in recorded.records and COMPARED != FILE:
        raise unittest.SkipTest(f"{COMPARED} does not have it")
    assert name in recorded.records, f"{name} is not recorded: {AGAIN} --only '^{name}$'"
    record = dict(recorded.records[name])
    processor = record.pop(CPU, recorded.environment[CPU])
    differences = changes(record, entry.record(), processor == made_with()[CPU])
    if differences:
        again = f"where it is meant to change, record it anew: {AGAIN} --only '^{name}$' (without --only, everything)"
        pytest.fail("\n".join([f"{name} is not as it was:", *differences, again]), pytrace=False)


@pytest.mark.slow
@pytest.mark.sample(
    "bank.ia3.bert",
    "calls.lora.gpt2",
    "quantised.nf4.lora.bert",
    "test_dora_contract.TestDoRA.gpt2",
    "test_lora_contract.TestLoRA.gpt2",
    "test_virtual_tokens.TestPrompt.bert",
)
@pytest.mark.filterwarnings("ignore:GC025")  # perturbed models were not trained
@pytest.mark.parametrize("name", EVERY)
def test_it_is_as_recorded(name: str) -> None:
    compare(EVERY[name])


def test_what_is_recorded_is_what_there_is() -> None:
    """No entry is missing, none is left over, and the file is in its canonical form."""
    assert read().records.keys() == EVERY.keys()
    assert FILE.read_text(encoding="utf-8") == to_json(*read())


def test_changes_are_named() -> None:
    """Each field is named; across processors, only numbers whose structure or magnitude differs."""
    one = {"graph.train": "a", "folded": "b 10.0000 c"}
    assert changes(one, dict(one)) == []
    for folded, elsewhere in [
        ("b 10.0000 d", False),
        ("b 10.0010 d", False),
        ("b 10.0100 d", True),
        ("x 10.0000 c", True),
        ("GC050", True),
    ]:
        expected = [f"folded: was b 10.0000 c, is {folded}"]
        assert changes(one, {**one, "folded": folded}) == expected
        assert changes(one, {**one, "folded": folded}, same_processor=False) == expected * elsewhere
    assert changes(one, {**one, "graph.train": "b"}, same_processor=False) == ["graph.train: was a, is b"]
    assert changes(one, {"folded": "b 10.0000 c", "x": "y"}) == [
        "graph.train: was a, is nothing",
        "x: was nothing, is y",
    ]


def test_a_digest_tells_structure_from_numbers() -> None:
    """Rounding changes only the last word; differences that no other processor would cause change one of the others."""
    generator = torch.Generator().manual_seed(0)
    large, small = torch.randn(40, 30, generator=generator), torch.randn(6, 5, generator=generator) / 50
    whole = {"large": large, "small": small}
    whole_digest = tensors_digest(whole.items())
    assert tensors_digest(reversed(whole.items())) == whole_digest
    rounded = tensors_digest({**whole, "large": large * (1 + 1e-6)}.items())
    assert rounded != whole_digest and agree(rounded, whole_digest, same_processor=False)
    for other in (
        {**whole, "small": torch.randn(6, 5, generator=generator) / 50},
        {**whole, "small": small.flip(0)},
        {**whole, "small": small.double()},
        {**whole, "small": small.reshape(5, 6)},
        {"large": large, "other": small},
    ):
        assert not agree(tensors_digest(other.items()), whole_digest, same_processor=False)
    assert not agree(tensors_digest(whole.items(), "drawn"), whole_digest, same_processor=False)


def test_a_digest_of_evidence_tells_words_from_numbers() -> None:
    whole = {"passed": True, "sites": [{"site": "a", "algebra": 1e-16, "change": 0.4, "rows": 3}]}
    recorded = evidence_digest(whole)
    rounded = evidence_digest({**whole, "sites": [{"site": "a", "algebra": 2e-16, "change": 0.400001, "rows": 3}]})
    assert rounded != recorded and agree(rounded, recorded, same_processor=False)
    for other in (
        {**whole, "passed": False},
        {**whole, "sites": []},
        {**whole, "sites": [{"site": "b", "algebra": 1e-16, "change": 0.4, "rows": 3}]},
        {**whole, "sites": [{"site": "a", "algebra": 1e-16, "change": 0.5, "rows": 3}]},
    ):
        assert not agree(evidence_digest(other), recorded, same_processor=False)
