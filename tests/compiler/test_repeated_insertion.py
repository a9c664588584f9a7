"""A method whose insertion follows from the spec and from types is inserted once for all layers that are alike."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch

from graftc.passes.core.method.registry import method_for
from graftc.passes.methods.lora import LoRAMethod
from graftc.testing.families import tiny
from tests.compiler.test_called_layers import EVERYWHERE, LORA, is_called, require_the_same
from tests.kit.models import fresh

IA3 = {"method": "ia3", "target": EVERYWHERE}
DORA = {"method": "dora", "rank": 2, "target": {"role": "ffn.down"}}
HIRA = {"method": "hira", "rank": 2, "target": EVERYWHERE}


def insertions(monkeypatch: pytest.MonkeyPatch, layers: int, adapt: Mapping[str, Any] = LORA) -> int:
    count: list[str] = []
    insert = LoRAMethod.insert

    def counted(self: Any, spec: Any, site: Any, shared: Any, build: Any) -> None:
        count.append(str(site.key))
        insert(self, spec, site, shared, build)

    with monkeypatch.context() as patched:
        patched.setattr(LoRAMethod, "insert", counted)
        assert is_called(fresh(tiny("llama", layers=layers), adapt, seed=3, cache=False))
    return len(count)


@pytest.mark.full
def test_insertions_do_not_grow_with_depth(monkeypatch: pytest.MonkeyPatch) -> None:
    assert insertions(monkeypatch, 6) == insertions(monkeypatch, 12)


@pytest.mark.full
def test_factors_that_start_from_the_weight_are_inserted_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    pissa = {**LORA, "init": "pissa"}
    assert insertions(monkeypatch, 9, pissa) - insertions(monkeypatch, 8, pissa) == 7


@pytest.mark.full
@pytest.mark.parametrize(
    "adapt",
    [
        pytest.param([{**LORA, "init": "gaussian", "freeze_a": True, "dtype": "base"}], marks=pytest.mark.full),
        pytest.param([{**LORA, "init": "random"}], marks=pytest.mark.full),
        [LORA, {**LORA, "name": "second", "rank": 3}, IA3],
        pytest.param([LORA, DORA], marks=pytest.mark.full),
        pytest.param([LORA, HIRA], marks=pytest.mark.full),
    ],
    ids=["gaussian", "random", "three", "beside one that is inserted everywhere", "on top of another"],
)
def test_tensors_are_those_of_inserting_in_every_layer(
    adapt: list[Mapping[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    once = fresh(tiny("llama", layers=8), *adapt, seed=3, cache=False)
    with monkeypatch.context() as patched:
        for tag in {each["method"] for each in adapt}:
            patched.setattr(type(method_for(tag)), "repeats", lambda self, spec: False)
        every = fresh(tiny("llama", layers=8), *adapt, seed=3, cache=False)
    assert is_called(once)
    ours, theirs = dict(once.named_parameters()), dict(every.named_parameters())
    assert list(ours) == list(theirs)
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name])
        assert tensor.dtype == theirs[name].dtype and tensor.requires_grad == theirs[name].requires_grad
    assert once._graftc.compilation.parts == every._graftc.compilation.parts
    require_the_same(once)
