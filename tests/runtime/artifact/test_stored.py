"""Artifacts that earlier versions wrote load and give the same outputs as then."""

from __future__ import annotations

import pytest

import graftc
from graftc.runtime.compiled import Compiled
from graftc.runtime.loading.verify import verify
from graftc.specs.errors.diagnostics import GraftError
from graftc.testing import largest_difference, outputs_of
from tests.runtime.artifact.stored.write import HERE, STORED, artifact_of, kept_call

TOLERANCE = 1e-6
"""Of the largest output: kernels of another processor round in another way."""

VERIFIED = ("dora_llama", "lora_head_bert")
"""The artifacts that ``make test`` captures and certifies anew, which takes two seconds for each."""


@pytest.fixture(scope="module")
def loaded() -> dict[str, Compiled]:
    """The loaded artifacts by name, so that each is loaded only once."""
    return {}


def load(name: str, loaded: dict[str, Compiled]) -> Compiled:
    if name not in loaded:
        loaded[name] = graftc.load(artifact_of(name), STORED[name].base()).eval()
    return loaded[name]


@pytest.mark.slow
@pytest.mark.sample("bank_bert", "lora_head_bert")
@pytest.mark.parametrize("name", STORED)
def test_outputs_are_what_they_were(name: str, loaded: dict[str, Compiled]) -> None:
    """Outputs agree within `TOLERANCE`, and those of the base do not."""
    compiled = load(name, loaded)
    inputs, expected = kept_call(name)
    largest = max(float(tensor.abs().max()) for tensor in expected)
    assert largest_difference(outputs_of(compiled, inputs), expected) <= TOLERANCE * largest
    with compiled.disabled():
        assert largest_difference(outputs_of(compiled, inputs), expected) > 1e-3 * largest


@pytest.mark.slow
@pytest.mark.sample("dora_llama", "prefix_gpt2")
@pytest.mark.parametrize("name", STORED)
def test_merging(name: str, loaded: dict[str, Compiled]) -> None:
    """Artifacts that fold give the kept outputs after merging as well; merging the others is refused with a code."""
    compiled = load(name, loaded)
    if not STORED[name].folds:
        with pytest.raises(GraftError) as caught:
            compiled.merge()
        assert caught.value.code == "GC050"
        return
    merged = compiled.merge()
    inputs, expected = kept_call(name)
    largest = max(float(tensor.abs().max()) for tensor in expected)
    assert merged.certificate.passed
    assert largest_difference(outputs_of(merged, inputs), expected) <= 1e-5 * largest


@pytest.mark.slow
@pytest.mark.sample(
    "adalora_roberta",
    "diff_pruning_bert",
    "dora_llama",
    "houlsby_bert",
    "lora_head_bert",
    "new_tokens_llama",
    "prompt_bert",
)
@pytest.mark.parametrize("name", STORED)
def test_files(name: str) -> None:
    """Files, and the tensors and graphs in them, are as the artifact states."""
    verification = verify(artifact_of(name), files_only=True)
    assert verification.passed, [check for check in verification.checks if check.passed is False]


@pytest.mark.slow
@pytest.mark.sample("dora_llama")
@pytest.mark.parametrize("name", VERIFIED)
def test_verifies(name: str) -> None:
    """Files, tensors, base, places, graphs and certificate are as the artifact states, all of them recomputed."""
    verified(name)


@pytest.mark.full
@pytest.mark.parametrize("name", [name for name in STORED if name not in VERIFIED])
def test_the_others_verify(name: str) -> None:
    """The other artifacts verify in the same way."""
    verified(name)


def verified(name: str) -> None:
    verification = verify(artifact_of(name), STORED[name].base())
    assert verification.passed, [check for check in verification.checks if check.passed is False]


def test_everything_that_is_stored_is_tried() -> None:
    """Each folder has an entry in `STORED`."""
    assert {path.parent.name for path in HERE.glob("*/artifact")} == STORED.keys()
