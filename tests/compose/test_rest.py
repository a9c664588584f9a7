"""Compositions beside what else changes a spec: combining, partial merges, what is saved, the history."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import graftc
from graftc.runtime.compiled import Compiled
from graftc.specs.errors.diagnostics import GraftError
from graftc.testing import largest_difference, outputs_of, perturb
from graftc.testing.compare import inputs_for
from tests.families import tiny

LORA = {"method": "lora", "rank": 3, "target": {"role": "attn.{q,v}"}}
PFEIFFER = {"method": "pfeiffer", "reduction": 4}


def compiled(compose: Any, *entries: dict[str, Any]) -> Compiled:
    """Adaptations on a tiny BERT, composed and perturbed, in eval mode."""
    made = graftc.compile({"adapt": list(entries), "compose": compose}, tiny("bert")).eval()
    perturb(made, 0.05)
    return made


@pytest.mark.full
def test_a_whole_bank_combines() -> None:
    """Its adaptations side by side are one LoRA, whose update is the sum; the bank is gone."""
    made = compiled({"bank": ["a", "b"]}, *({**LORA, "name": n} for n in "ab"))
    combined = made.combine(["a", "b"], [0.4, 0.6], kind="concatenation").compiled.eval()
    assert combined.compilation.spec.compose == ()
    apart = graftc.compile({"adapt": [{**LORA, "name": n} for n in "ab"]}, tiny("bert")).eval()
    held = {n: t for n, t in made.adapter_state_dict().items() if n in apart.adapter_state_dict()}
    scaled = {n: t * (0.4 if ".a." in n else 0.6) if n.endswith(".B") else t for n, t in held.items()}
    apart.load_adapter_state_dict(scaled)
    inputs = inputs_for(made)
    assert largest_difference(outputs_of(combined, inputs), outputs_of(apart, inputs)) <= 2e-6


@pytest.mark.full
@pytest.mark.parametrize("compose", [{"bank": ["a", "b", "c"]}, {"gate": ["a", "b"]}, {"average": ["a", "b"]}])
def test_a_part_of_a_composition_does_not(compose: dict[str, Any]) -> None:
    """GC029: the rest of it would stay."""
    made = compiled(compose, *({**LORA, "name": n} for n in "abc"))
    with pytest.raises(GraftError, match="part of the composition") as caught:
        made.combine(["a", "b"])
    assert caught.value.code == "GC029"


@pytest.mark.full
def test_what_is_left_of_a_stack_keeps_its_order() -> None:
    """LoRA folds out of it; the two adapters stay in the order of the stack, not in that of the document."""
    entries = ({**PFEIFFER, "name": "first"}, {**LORA, "name": "low"}, {**PFEIFFER, "name": "second"})
    made = compiled({"stack": ["low", "second", "first"]}, *entries)
    partial = made.merge_partially()
    assert partial.folded == ("low",)
    assert [unit.name for unit in partial.compiled.compilation.units] == ["second", "first"]
    inputs = inputs_for(made)
    assert largest_difference(outputs_of(partial.compiled.eval(), inputs), outputs_of(made, inputs)) <= 2e-5


@pytest.mark.full
def test_a_bank_stays_beside_what_folds(tmp_path: Path) -> None:
    """And still chooses, also after it has been saved with its base."""
    made = compiled({"bank": ["x", "y"]}, {**LORA, "name": "low"}, *({**PFEIFFER, "name": n} for n in ("x", "y")))
    made.activate("y")
    partial = made.merge_partially()
    assert partial.folded == ("low",) and {"bank", "x", "y"} <= set(partial.kept)
    inputs = inputs_for(made, (4, 6))
    chosen = {**inputs, "adapter_ids": ["x", "y", "y", "x"]}
    partial.save(tmp_path / "artifact")
    loaded = graftc.load(tmp_path / "artifact").eval()
    for model in (partial.compiled.eval(), loaded):
        assert model.active() == "y"
        assert largest_difference(outputs_of(model, inputs), outputs_of(made, inputs)) <= 2e-5
        assert largest_difference(outputs_of(model, chosen), outputs_of(made, chosen)) <= 2e-5


@pytest.mark.slow
def test_a_tensor_says_which_step_inserted_it() -> None:
    """The history has one step for a composition, and its members' tensors point there."""
    made = compiled({"bank": ["a", "b"], "name": "languages"}, *({**LORA, "name": n} for n in "ab"))
    steps = [entry.step for entry in made.program("eval").history]
    name = next(n for n in made.adapter_state_dict() if n.endswith(".graftc.a.A"))
    assert "insert(languages)" in steps
    assert "insert(languages)" in str(made.explain(name))
