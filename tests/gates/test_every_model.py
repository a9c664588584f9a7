"""Models beyond text: each is the source, trains, merges, saves, loads, generates, and takes calls of any structure."""

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
from tests.live.models import forced_apart
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


@pytest.mark.slow
@pytest.mark.parametrize("name", SAMPLE)
def test_some_models(name: str, tmp_path: Path) -> None:
    _check(name, tmp_path)


def _check(name: str, folder: Path) -> None:
    _hold(name, EVERY[name](), folder)


def _hold(name: str, small: Small, folder: Path) -> None:
    found = check_model(
        small.model,
        [small.first, small.second],
        folder,
        target=small.target,
        maps=small.fallback,
        generates=small.generates and name not in REFUSED,
    )
    print(name, found)
    assert found["source kept"] and found["merged"] is True
    assert max(found["identity"].values()) <= IDENTITY
    assert all(found[step] <= CLOSE for step in ("merge", "folded", "gradients"))
    assert found["loaded"] == 0
    assert found.get("generate", True) is True


@pytest.mark.gate
@pytest.mark.parametrize("level", ["layers", "modules"])
@pytest.mark.parametrize("name", EVERY)
def test_random_calls(name: str, level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal to the source to the bit, or refused by code: one in twenty at most, none for sizes and missing masks."""
    if level == "modules":
        monkeypatch.setattr(levels, "layers_of", lambda model: [])
    small = EVERY[name]()
    found = random_calls(small, CALLS)
    print(name, level, {key: value for key, value in found.items() if key != "wrong"}, found["wrong"][:5])
    assert not found["wrong"] and not found["must run"]
    assert len(found["refused"]) <= 0.05 * max(found["ran"], 1)


def random_calls(small: Any, count: int) -> dict[str, Any]:
    """What became of random calls; those that the source itself does not take are left out. Products of weights that
    ask for gradients may be computed in another order (`torch.matmul`), so that the source asks for none either."""
    small.model.requires_grad_(False)
    spec = load_spec({"adapt": [{"method": "lora", "rank": 2, "target": {"modules": small.fallback}}]})
    compiled = forced_apart(spec, small.model, small.first)
    found: dict[str, Any] = {"ran": 0, "wrong": [], "refused": [], "must run": []}
    for seed in range(count):
        batch, training, changed = random_call([small.first, small.second], seed)
        small.model.train(training), compiled.train(training)
        with torch.no_grad():
            source = _with_buffers_of(compiled, small.model)
            try:
                theirs = seeded(source, batch)
            except Exception:
                continue
            found["ran"] += 1
            try:
                gap = apart(seeded(compiled, batch), theirs)
            except GraftError as error:
                found["refused"].append((sorted(changed), error.message[:120]))
                if changed <= MUST_RUN:
                    found["must run"].append((seed, sorted(changed), error.message[:200]))
                continue
            except Exception as error:
                found["wrong"].append((seed, sorted(changed), f"{type(error).__name__}: {error}"[:200]))
                continue
        buffers = dict(compiled.named_buffers())
        moved = [name for name, buffer in source.named_buffers() if not torch.equal(buffer, buffers[name])]
        if gap != 0 or moved:
            found["wrong"].append((seed, training, sorted(changed), gap, moved[:2]))
    return found


def _with_buffers_of(compiled: Any, model: torch.nn.Module) -> torch.nn.Module:
    """A copy of the source with the buffers that calls in train mode have left in the compiled model."""
    source, buffers = copy.deepcopy(model), dict(compiled.named_buffers())
    for name, _ in model.named_buffers():
        owner, _, last = name.rpartition(".")
        setattr(source.get_submodule(owner), last, buffers[name].clone())
    return source
