"""Errors and warnings of SpIEL: budgets, schedules and optimisers."""

from __future__ import annotations

import pytest
import torch

import graftc
from graftc.specs.errors.diagnostics import GraftError
from tests.cli.support import check_golden
from tests.kit.models import fresh
from tests.kit.training import adamw
from tests.passes.methods.spiel_models import controller_of, entries_of, optimiser_for, spiel, train


@pytest.mark.full
def test_what_does_not_fit_is_said() -> None:
    """Budgets and schedules that do not fit raise errors with the recorded messages."""
    for fields, code, path in (
        ({"density": 0.1, "equivalent_rank": 2}, "GC002", "equivalent_rank"),
        ({"accumulation_steps": 5, "interval": 4}, "GC002", "accumulation_steps"),
        ({"entries": 1}, "GC020", "entries"),
        ({"density": 1e-9}, "GC020", "density"),
        ({"equivalent_rank": 500}, "GC020", "equivalent_rank"),
        ({"density": 0.5, "entries": 5}, "GC002", "entries"),
    ):
        with pytest.raises(GraftError) as caught:
            fresh("llama", spiel(**fields))
        assert caught.value.code == code and caught.value.place is not None
        assert caught.value.place.path.endswith(path), caught.value
        check_golden(f"errors/spiel_{'_'.join(fields)}_{code.lower()}", str(caught.value))
    with pytest.raises(GraftError, match=r"GC014.*spiel trains"):
        fresh("llama", spiel(target={"modules": "lm_head"}))
    unknown = fresh("llama", spiel(total_steps=None))
    with pytest.raises(GraftError, match="GC026") as caught:
        train(unknown, optimiser_for(unknown), [1])
    check_golden("errors/spiel_without_total", str(caught.value))
    unknown.begin(50)
    assert controller_of(unknown).total == 50
    fixed = fresh("llama", spiel())
    fixed.begin(7)
    assert controller_of(fixed).total == 40
    train(fresh("llama", spiel(total_steps=None, drop_fraction=0)), optimiser_for(unknown), [1])


@pytest.mark.full
def test_the_other_variant_s_optimiser() -> None:
    """MA needs accumulators (GC045); AG grows with SM3 as well, and new entries have no momentum."""
    compiled = fresh("llama", spiel(variant="MA"))
    optimiser = graftc.optim.AgedAdamW(compiled)
    train(compiled, optimiser, [1])
    with pytest.raises(GraftError, match=r"GC045.*second moments") as caught:
        train(compiled, optimiser, [2])
    check_golden("errors/spiel_optimiser", str(caught.value))
    compiled = fresh("llama", spiel())
    optimiser = graftc.optim.SM3(compiled, lr=1e-2, momentum=0.9)
    train(compiled, optimiser, range(1, 3))
    for entries in entries_of(compiled).values():
        zero = entries.tensor("delta") == 0
        assert zero.any() and not optimiser.state[entries.tensor("delta")]["momentum"][zero].any()


@pytest.mark.full
def test_another_optimiser_is_warned_of_once() -> None:
    """The entries still move."""
    compiled = fresh("llama", spiel())
    optimiser = adamw(compiled, lr=1e-2)
    before = {name: entries.tensor("indices").clone() for name, entries in entries_of(compiled).items()}
    with pytest.warns(graftc.GraftWarning, match="GC046") as caught:
        train(compiled, optimiser, range(1, 8))
    (warned,) = (w for w in caught if isinstance(w.message, graftc.GraftWarning))
    check_golden("errors/spiel_moments", f"warning {warned.message}")
    assert all(not torch.equal(before[n], entries.tensor("indices")) for n, entries in entries_of(compiled).items())
