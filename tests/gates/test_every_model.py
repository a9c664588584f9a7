"""Non-text models equal the source, train, merge, save, load, generate, and take calls of any structure."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from graftc.compiler.live import levels
from graftc.specs.errors.diagnostics import GraftError
from graftc.specs.io import load_spec
from tests.gates.every_model import CLOSE, IDENTITY, apart, check_model, seeded
from tests.gates.random_calls import MUST_RUN, random_call
from tests.runtime.live.models import forced_apart
from tests.zoo.every import EVERY
from tests.zoo.libraries import LIBRARIES, TIMM, timm_model
from tests.zoo.model import Small

SAMPLE = ("layoutlmv3", "siglip")
CALLS = int(os.environ.get("GRAFTC_CALLS", "200"))
REFUSED = ("mamba2",)
"""Steps read the weight of its convolution, which its target adapts, between graphs: generating is refused by code."""


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.gate) for name in EVERY])
def test_every_model(name: str, tmp_path: Path) -> None:
    _check(name, tmp_path)


@pytest.mark.gate
@pytest.mark.parametrize("name", [*LIBRARIES, *TIMM])
def test_models_of_other_libraries(name: str, tmp_path: Path) -> None:
    _hold(name, LIBRARIES[name]() if name in LIBRARIES else timm_model(name), tmp_path)


@pytest.mark.full
@pytest.mark.parametrize("name", SAMPLE)
def test_some_models(name: str, tmp_path: Path) -> None:
    _check(name, tmp_path)


def _check(name: str, folder: Path) -> None:
    _hold(name, EVERY[name](), folder)


def _hold(name: str, small: Small, folder: Path) -> None:
    results = check_model(
        small.model,
        [small.first, small.second],
        folder,
        target=small.target,
        maps=small.fallback,
        generates=small.generates and name not in REFUSED,
    )
    print(name, results)
    assert results["source kept"] and results["merged"] is True
    assert max(results["identity"].values()) <= IDENTITY
    assert all(results[step] <= CLOSE for step in ("merge", "folded", "gradients"))
    assert results["loaded"] == 0
    assert results.get("generate", True) is True


@pytest.mark.gate
@pytest.mark.parametrize("level", ["layers", "modules"])
@pytest.mark.parametrize("name", EVERY)
def test_random_calls(name: str, level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random calls equal the source bit for bit or are refused with a code.

    At most one in twenty is refused, and none that changes only sizes or omits masks.
    """
    if level == "modules":
        monkeypatch.setattr(levels, "layers_of", lambda model: [])
    small = EVERY[name]()
    results = random_calls(small, CALLS)
    print(name, level, {key: value for key, value in results.items() if key != "wrong"}, results["wrong"][:5])
    assert not results["wrong"] and not results["must run"]
    assert len(results["refused"]) <= 0.05 * max(results["ran"], 1)


def random_calls(small: Any, count: int) -> dict[str, Any]:
    """Return the results of random calls, except those that the source itself rejects.

    Products of weights that require gradients may be computed in another order (`torch.matmul`), so the source's
    weights require none.
    """
    small.model.requires_grad_(False)
    spec = load_spec({"adapt": [{"method": "lora", "rank": 2, "target": {"modules": small.fallback}}]})
    compiled = forced_apart(spec, small.model, small.first)
    results: dict[str, Any] = {"ran": 0, "wrong": [], "refused": [], "must run": []}
    for seed in range(count):
        batch, training, changed = random_call([small.first, small.second], seed)
        small.model.train(training), compiled.train(training)
        with torch.no_grad():
            source = _with_buffers_of(compiled, small.model)
            try:
                theirs = seeded(source, batch)
            except Exception:
                continue
            results["ran"] += 1
            try:
                gap = apart(seeded(compiled, batch), theirs)
            except GraftError as error:
                results["refused"].append((sorted(changed), error.message[:120]))
                if changed <= MUST_RUN:
                    results["must run"].append((seed, sorted(changed), error.message[:200]))
                continue
            except Exception as error:
                results["wrong"].append((seed, sorted(changed), f"{type(error).__name__}: {error}"[:200]))
                continue
        buffers = dict(compiled.named_buffers())
        moved = [name for name, buffer in source.named_buffers() if not torch.equal(buffer, buffers[name])]
        if gap != 0 or moved:
            results["wrong"].append((seed, training, sorted(changed), gap, moved[:2]))
    return results


def _with_buffers_of(compiled: Any, model: torch.nn.Module) -> torch.nn.Module:
    """Return a copy of the source with the buffers that calls in train mode have left in the compiled model."""
    source, buffers = copy.deepcopy(model), dict(compiled.named_buffers())
    for name, _ in model.named_buffers():
        owner, _, last = name.rpartition(".")
        setattr(source.get_submodule(owner), last, buffers[name].clone())
    return source
