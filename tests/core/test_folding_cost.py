"""What folding costs, in operations that are counted: each tensor is folded once, all is linear in layers."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import graftc
from graftc.compiler import probing
from graftc.compiler.foldable import foldable
from graftc.passes.core.folds import FoldStep, LazyTensors
from graftc.testing import perturb
from tests.families import tiny

ROLES = ["attn.q", "attn.k", "attn.v", "attn.o", "ffn.gate", "ffn.up", "ffn.down"]


def adapted(layers: int, role: Any = ROLES, **changes: Any) -> Any:
    """A perturbed LoRA at every projection of a Llama with so many layers."""
    spec = {"adapt": [{"method": "lora", "target": {"role": role}, "rank": 2}]}
    compiled = graftc.compile(spec, tiny("llama", num_hidden_layers=layers, **changes)).eval()
    perturb(compiled)
    return compiled


@pytest.fixture(scope="module")
def models() -> dict[int, Any]:
    """Models that differ in depth alone."""
    return {layers: adapted(layers) for layers in (2, 4, 8)}


def calls(work: Callable[[], object]) -> int:
    """How many functions are called, in Python and in C."""
    count = 0

    def note(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(note)
    try:
        work()
    finally:
        sys.setprofile(None)
    return count


@pytest.mark.parametrize("layers", [2, 4, 8])
def test_every_site_is_folded_once(layers: int, models: dict[int, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """For its certificate, for the check of its rounding and for the tensor itself together."""
    applied: list[str] = []
    original = LazyTensors._apply

    def counted(step: FoldStep, values: dict[str, Tensor]) -> None:
        applied.append(step.site)
        original(step, values)

    monkeypatch.setattr(LazyTensors, "_apply", staticmethod(counted))
    certificate = models[layers].merge().certificate
    assert len(applied) == len(set(applied)) == len(certificate.sites) == 7 * layers


def test_merging_is_linear_in_layers(models: dict[int, Any]) -> None:
    """What four more layers cost is at most a little over twice of what two more cost."""
    for model in models.values():
        model.merge()  # what is made once
    two, four, eight = (calls(model.merge) for model in models.values())
    assert eight - four <= 1.1 * 2 * (four - two)


def test_two_tensors_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest tensor, a table that is looked up in parts, is there twice at most, whatever else there is."""
    monkeypatch.setattr(probing, "LARGE", 2**12)
    monkeypatch.setattr(probing, "PIECE", 2**10)
    compiled = adapted(1, ["embed.word", "ffn.down"], vocab_size=4000, tie_word_embeddings=False)
    largest = max(t.numel() for _, t in compilation_of(compiled).store.base()) * 8
    alive = Alive()
    with torch.no_grad(), alive:
        made = probing.fold_tensors(compilation_of(compiled), foldable(compilation_of(compiled)).lazy)
    assert all(site.passed and site.change > 0 for site in made.sites)
    assert len(made.sites) == 2
    assert largest <= alive.most <= 2.2 * largest


def compilation_of(compiled: Any) -> Any:
    """Its Compilation."""
    return compiled._graftc.compilation


class Alive(TorchDispatchMode):
    """Counts the bytes of storages in float64 that are alive at the same time."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in torch.utils._pytree.tree_leaves(result):
            if isinstance(value, Tensor) and value.dtype is torch.float64:
                self._note(value.untyped_storage())
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self.known:
            return
        self.known.add(key)
        self.now += storage.nbytes()
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._gone, key, storage.nbytes())

    def _gone(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size
