"""Artifacts that earlier versions wrote load and give the same outputs as then."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

import graftc
from graftc.runtime.artifact.origin import versions
from graftc.runtime.compiled import Compiled
from graftc.runtime.loading.verify import verify
from graftc.specs.errors.diagnostics import GraftError
from graftc.testing import largest_difference, outputs_of
from tests.runtime.artifact.stored.write import HERE, STORED, artifact_of, kept_call
from tests.runtime.artifact.support import edit_json, edit_manifest

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
@pytest.mark.sample("bank_bert", "lora_head_bert", "prompt_bert")
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


@pytest.mark.full
@pytest.mark.parametrize(
    ("code", "changed"),
    [
        (None, lambda sites: sites[::-1]),
        (None, lambda sites: [{**sites[0], "site": sites[0]["site"].replace("weight", "bias")}, *sites[1:]]),
        ("0" * 64, lambda sites: sites),
    ],
    ids=["another order", "another bias", "names of older certificates"],
)
def test_older_names_stand_for_the_same_sites_only(code: str | None, changed: Any, tmp_path: Path) -> None:
    """A certificate may name a bias by its weight only where older code did, and only that bias."""
    artifact = tmp_path / "artifact"
    shutil.copytree(artifact_of("lora_head_bert"), artifact)
    edit_json(artifact, "certificates/fold.json", lambda data: {**data, "sites": changed(data["sites"])})
    edit_manifest(artifact, versions=lambda versions: {**versions, **({"code": code} if code else {})})
    (check,) = [c for c in verify(artifact, STORED["lora_head_bert"].base()).checks if c.passed is False]
    assert check.name == "certificate" and "covers different sites" in check.detail


@pytest.mark.full
@pytest.mark.parametrize(("written", "passed"), [({}, False), ({"transformers": "4.0"}, None)], ids=["same", "other"])
def test_another_structure_is_explained_by_other_versions_only(
    written: dict[str, str], passed: bool | None, tmp_path: Path
) -> None:
    """Other libraries may give another graph of the same model; the same ones may not."""
    artifact = tmp_path / "artifact"
    shutil.copytree(artifact_of("lora_head_bert"), artifact)
    other = {"structure": "0" * 64, "base_structure": "0" * 64}
    edit_json(artifact, "certificates/fold.json", lambda data: {**data, **other})
    edit_manifest(artifact, versions=lambda _: {**versions(), **written})
    verification = verify(artifact, STORED["lora_head_bert"].base())
    (check,) = [c for c in verification.checks if c.name == "certificate"]
    assert check.passed is passed and "a different base_structure" in check.detail
    assert verification.passed is (passed is None)


def verified(name: str) -> None:
    verification = verify(artifact_of(name), STORED[name].base())
    assert verification.passed, [check for check in verification.checks if check.passed is False]


def test_everything_that_is_stored_is_tried() -> None:
    """Each folder has an entry in `STORED`."""
    assert {path.parent.name for path in HERE.glob("*/artifact")} == STORED.keys()
