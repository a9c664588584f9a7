"""Pruning in rounds: the entries that each round leaves, and their further training."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import pytest
import torch

import graftc
from graftc.compiler.pipeline import recompile
from graftc.compiler.steering import live_places
from graftc.passes.core.method.capabilities import Staged, Transition
from graftc.passes.core.method.registry import method_for
from graftc.passes.methods.bases.pruning_controller import kept_entries
from graftc.runtime.compiled import Compiled, make_compiled
from graftc.specs.methods.pruning import Pruning
from graftc.testing import outputs_of, same_bits
from graftc.testing.compare import inputs_for
from graftc.testing.families import tiny
from tests.kit.models import fresh
from tests.kit.specs import varied
from tests.kit.training import adamw, train
from tests.passes.methods.pruned_models import PRUNING, places_of


def advanced(compiled: Compiled) -> tuple[Transition[Pruning], Compiled]:
    """Return the transition to the next training, and the model in it."""
    (resolved,) = compiled.compilation.main.resolved
    method = method_for("pruning")
    assert isinstance(method, Staged)
    advance = method.advance(resolved.spec, *live_places(compiled.compilation, resolved))
    spec = compiled.compilation.spec.model_copy(update={"adapt": (advance.spec,)})
    return advance, make_compiled(recompile(compiled.compilation, spec, advance.values))


@pytest.mark.full
@pytest.mark.parametrize("rewind", [False, True])
@pytest.mark.parametrize("allocation", ["per_tensor", "global"])
def test_rounds(rewind: bool, allocation: str, tmp_path: Path) -> None:
    """Each round leaves the largest `1 - fraction` of the remaining entries, with their own values or the base's."""
    fields = {"fraction": 0.5, "rounds": 2, "rewind": rewind, "allocation": allocation}
    compiled = fresh("bert", varied(PRUNING, variant="iterative", **fields))
    method = method_for("pruning")
    assert isinstance(method, Staged) and method.stages(compiled.compilation.main.resolved[0].spec) == 3
    dense = {str(place.site.key): place.tensors["weight"] for place in places_of(compiled)}
    for stage in (2, 3):
        train(compiled, adamw(compiled, lr=5e-3), range(3))
        left = {str(p.site.key): kept_entries(p) for p in places_of(compiled)}
        advance, compiled = advanced(compiled)
        assert advance.rewind == rewind and advance.spec.stage == stage
        total = kept = 0
        for place in places_of(compiled):
            name = str(place.site.key)
            indices, values = place.tensors["weight_indices"], place.tensors["weight_values"]
            assert indices.dtype == torch.int32 and bool(left[name].flatten()[indices.long()].all())
            total, kept = total + left[name].numel(), kept + indices.numel()
            if allocation == "per_tensor":
                assert indices.numel() == left[name].numel() // 2 ** (stage - 1)
            if rewind or stage == 2:
                source = place.base[name] if rewind else dense[name]
                assert torch.equal(values.detach(), source.detach().flatten()[indices.long()])
        assert kept == total // 2 ** (stage - 1) == compiled.report.trainable_parameters
        assert compiled.report.deployed_parameters == kept
    train(compiled, adamw(compiled, lr=5e-3), range(3))
    merged = compiled.eval().merge()
    assert merged.certificate.passed
    after = dict(merged.to_transformers().named_parameters())
    assert sum(int((after[name] != 0).sum()) for name in dense) == kept
    compiled.save(tmp_path / "artifact", certify=False)
    inputs = inputs_for(compiled)
    loaded = graftc.load(tmp_path / "artifact", tiny("bert")).eval()
    assert same_bits(outputs_of(loaded, inputs), outputs_of(compiled, inputs))


def test_the_last_round_leaves_the_density() -> None:
    """The last round leaves the density whatever its root is; counts use the share as written."""
    spec = Pruning(variant="iterative", density=0.07, rounds=3)
    assert spec.remaining(3) == Fraction("0.07") and spec.remaining(0) == 1
    assert abs(float(spec.remaining(1)) - 0.07 ** (1 / 3)) < 1e-12
    assert Pruning(variant="iterative", fraction=0.2, rounds=3).remaining(3) == Fraction("0.512")
