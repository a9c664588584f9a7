"""Compositions together with other changes of a spec: combining, partial merges, saving, the history."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import graftc
from graftc.specs.errors.diagnostics import GraftError
from graftc.testing import largest_difference, outputs_of
from graftc.testing.compare import inputs_for
from graftc.testing.families import tiny
from tests.kit.models import adapted

LORA = {"method": "lora", "rank": 3, "target": {"role": "attn.{q,v}"}}
PFEIFFER = {"method": "pfeiffer", "reduction": 4}


@pytest.mark.full
def test_a_whole_bank_combines() -> None:
    """Its adaptations concatenated are one LoRA, whose update is the sum; the bank is gone."""
    model = adapted("bert", *({**LORA, "name": n} for n in "ab"), compose={"bank": ["a", "b"]})
    combined = model.combine(["a", "b"], [0.4, 0.6], kind="concatenation").compiled.eval()
    assert combined.compilation.spec.compose == ()
    apart = graftc.compile({"adapt": [{**LORA, "name": n} for n in "ab"]}, tiny("bert")).eval()
    tensors = {n: t for n, t in model.adapter_state_dict().items() if n in apart.adapter_state_dict()}
    scaled = {n: t * (0.4 if ".a." in n else 0.6) if n.endswith(".B") else t for n, t in tensors.items()}
    apart.load_adapter_state_dict(scaled)
    inputs = inputs_for(model)
    assert largest_difference(outputs_of(combined, inputs), outputs_of(apart, inputs)) <= 2e-6


@pytest.mark.full
@pytest.mark.parametrize("compose", [{"bank": ["a", "b", "c"]}, {"gate": ["a", "b"]}, {"average": ["a", "b"]}])
def test_a_part_of_a_composition_does_not(compose: dict[str, Any]) -> None:
    """It raises GC029, because the rest of the composition would stay."""
    model = adapted("bert", *({**LORA, "name": n} for n in "abc"), compose=compose)
    with pytest.raises(GraftError, match="part of the composition") as caught:
        model.combine(["a", "b"])
    assert caught.value.code == "GC029"


@pytest.mark.full
def test_what_is_left_of_a_stack_keeps_its_order() -> None:
    """LoRA folds out of it; the two adapters stay in the order of the stack, not of the document."""
    entries = ({**PFEIFFER, "name": "first"}, {**LORA, "name": "low"}, {**PFEIFFER, "name": "second"})
    model = adapted("bert", *entries, compose={"stack": ["low", "second", "first"]})
    partial = model.merge_partially()
    assert partial.folded == ("low",)
    assert [unit.name for unit in partial.compiled.compilation.units] == ["second", "first"]
    inputs = inputs_for(model)
    assert largest_difference(outputs_of(partial.compiled.eval(), inputs), outputs_of(model, inputs)) <= 2e-5


@pytest.mark.full
def test_a_bank_stays_beside_what_folds(tmp_path: Path) -> None:
    """It still chooses, also after it has been saved with its base."""
    source = adapted(
        "bert", {**LORA, "name": "low"}, *({**PFEIFFER, "name": n} for n in ("x", "y")), compose={"bank": ["x", "y"]}
    )
    source.activate("y")
    partial = source.merge_partially()
    assert partial.folded == ("low",) and {"bank", "x", "y"} <= set(partial.kept)
    inputs = inputs_for(source, (4, 6))
    chosen = {**inputs, "adapter_ids": ["x", "y", "y", "x"]}
    partial.save(tmp_path / "artifact")
    loaded = graftc.load(tmp_path / "artifact").eval()
    for model in (partial.compiled.eval(), loaded):
        assert model.active() == "y"
        assert largest_difference(outputs_of(model, inputs), outputs_of(source, inputs)) <= 2e-5
        assert largest_difference(outputs_of(model, chosen), outputs_of(source, chosen)) <= 2e-5


@pytest.mark.slow
def test_a_tensor_says_which_step_inserted_it() -> None:
    """The history has one step for a composition, and the tensors of its members refer to it."""
    model = adapted("bert", *({**LORA, "name": n} for n in "ab"), compose={"bank": ["a", "b"], "name": "languages"})
    steps = [entry.step for entry in model.program("eval").history]
    name = next(n for n in model.adapter_state_dict() if n.endswith(".graftc.a.A"))
    assert "insert(languages)" in steps
    assert "insert(languages)" in str(model.explain(name))
