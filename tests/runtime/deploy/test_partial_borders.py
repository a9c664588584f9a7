"""Edge cases of partial merges: a base whose ties the spec breaks, and specs of which nothing folds."""

from __future__ import annotations

import pytest

from graftc.specs.errors.diagnostics import GraftError
from graftc.testing import largest_difference, outputs_of
from graftc.testing.compare import inputs_for
from tests.kit.models import adapted

BOTTLENECK = {"method": "pfeiffer"}


@pytest.mark.full
def test_what_is_untied_stays_untied() -> None:
    """LoRA on the untied head folds, and the rest is compiled on a base that has both tensors."""
    lora = {"method": "lora", "target": {"modules": "lm_head"}, "rank": 2}
    compiled = adapted("gpt2", lora, BOTTLENECK, untie=["lm_head"])
    partial = compiled.merge_partially()
    assert partial.folded == ("lora",) and partial.certificate.passed
    inputs = inputs_for(compiled)
    assert largest_difference(outputs_of(partial.compiled, inputs), outputs_of(compiled, inputs)) <= 2e-5


@pytest.mark.slow
def test_where_nothing_folds() -> None:
    """If nothing folds, the error is not that of a failed certificate, and says what stays and why."""
    with pytest.raises(GraftError, match="pfeiffer") as error:
        adapted("gpt2", BOTTLENECK).merge_partially()
    assert error.value.code == "GC050" and error.value.hint
