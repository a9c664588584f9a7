"""Edge cases of partial merges: a base whose ties the spec breaks, and specs of which nothing folds."""

from __future__ import annotations

from typing import Any

import pytest

import graftc
from graftc.specs.errors.diagnostics import GraftError
from graftc.testing import largest_difference, outputs_of, perturb
from graftc.testing.compare import inputs_for
from graftc.testing.families import tiny

BOTTLENECK = {"method": "pfeiffer"}


def compiled_for(*entries: dict[str, Any], **fields: Any) -> Any:
    """A perturbed GPT-2 in eval mode, whose head is tied to its embedding."""
    compiled = graftc.compile({"adapt": list(entries), **fields}, tiny("gpt2")).eval()
    perturb(compiled)
    return compiled


@pytest.mark.full
def test_what_is_untied_stays_untied() -> None:
    """LoRA on the untied head folds, and the rest is compiled on a base that has both tensors."""
    lora = {"method": "lora", "target": {"modules": "lm_head"}, "rank": 2}
    compiled = compiled_for(lora, BOTTLENECK, untie=["lm_head"])
    partial = compiled.merge_partially()
    assert partial.folded == ("lora",) and partial.certificate.passed
    inputs = inputs_for(compiled)
    assert largest_difference(outputs_of(partial.compiled, inputs), outputs_of(compiled, inputs)) <= 2e-5


@pytest.mark.slow
def test_where_nothing_folds() -> None:
    """If nothing folds, the error is not that of a failed certificate, and says what stays and why."""
    with pytest.raises(GraftError, match="pfeiffer") as error:
        compiled_for(BOTTLENECK).merge_partially()
    assert error.value.code == "GC050" and error.value.hint
