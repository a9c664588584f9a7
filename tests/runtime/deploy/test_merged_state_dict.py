"""``merged_state_dict``: merged tensors one by one, by the source's names, always from the same base."""

from __future__ import annotations

import gc
import hashlib
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graftc
from graftc.passes.core.weights.folds import LazyTensors
from graftc.specs.errors.diagnostics import GraftError
from graftc.testing import perturb, tiny
from tests.kit.models import adapted

LORA = {"method": "lora", "rank": 2, "target": {"role": ["attn.q", "attn.v", "ffn.down"]}}


@pytest.fixture(scope="module")
def gpt2() -> Any:
    """A GPT-2 with fused and transposed weights, and a tied head."""
    return adapted(tiny("gpt2", dtype=torch.bfloat16), LORA)


def small(dtype: torch.dtype = torch.float32) -> Any:
    """A compiled model of two linear maps, perturbed."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4, bias=False)).to(dtype).eval()
    spec = {"adapt": [{"method": "lora", "rank": 2, "target": {"modules": ["*"]}}]}
    compiled = graftc.compile(spec, model, {"input": torch.randn(2, 6, dtype=dtype)}).eval()
    perturb(compiled)
    return compiled


@pytest.mark.slow
def test_it_is_what_a_merge_gives(gpt2: Any) -> None:
    """Tensors are equal, bit for bit, under the names of the source's state dict, tied ones included."""
    streamed, merged = dict(gpt2.merged_state_dict()), gpt2.merge().folded_state_dict()
    assert streamed.keys() == gpt2.compilation.source.state_dict().keys()
    assert all(torch.equal(tensor, merged[name]) and not tensor.requires_grad for name, tensor in streamed.items())
    assert streamed["lm_head.weight"] is streamed["transformer.wte.weight"]
    changed = [
        name for name, tensor in gpt2.compilation.source.state_dict().items() if not streamed[name].equal(tensor)
    ]
    assert len(changed) == 4
    gpt2.compilation.source.__class__(gpt2.config).to(torch.bfloat16).load_state_dict(streamed)


@pytest.mark.full
def test_a_thousand_merges() -> None:
    """The base keeps its bits and every merge gives the same, while training in between has an effect."""
    model = nn.Sequential(nn.Linear(3, 2, bias=False)).bfloat16().eval()
    spec = {"adapt": [{"method": "lora", "rank": 1, "target": {"modules": ["*"]}}]}
    compiled = graftc.compile(spec, model, {"input": torch.randn(2, 3, dtype=torch.bfloat16)}).eval()
    perturb(compiled)
    base = model[0].weight.detach().clone()
    ((_, first),) = compiled.merged_state_dict()
    first = first.clone()
    assert not torch.equal(first, base)
    for _ in range(999):
        ((_, tensor),) = compiled.merged_state_dict()
        assert torch.equal(tensor, first)
    assert torch.equal(model[0].weight, base)
    trained = compiled.adapter_state_dict()["0.graftc.lora.B"]
    for factor, same in ((2, False), (0.5, True)):
        trained.mul_(factor)
        ((_, tensor),) = compiled.merged_state_dict()
        assert torch.equal(tensor, first) is same


@pytest.mark.slow
def test_one_group_at_a_time(gpt2: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folded tensor is computed when it is requested, and freed when the next one is."""
    folded: list[str] = []
    original = LazyTensors.fold

    def counted(self: LazyTensors, group: Any) -> dict[str, Tensor]:
        folded.extend(group.names)
        return original(self, group)

    monkeypatch.setattr(LazyTensors, "fold", counted)
    alive: list[weakref.ref[Tensor]] = []
    known = {id(tensor) for _, tensor in gpt2.compilation.store.tensors()}
    stream = gpt2.merged_state_dict()
    assert not folded
    for name, tensor in stream:
        assert sum(other() is not None for other in alive) <= 1
        if name in folded:
            alive.append(weakref.ref(tensor))
        del tensor
    gc.collect()
    assert len(alive) >= 4 and known and all(other() is None for other in alive)


def test_digests(gpt2: Any) -> None:
    """Digests are those of the tensors given so far, and there are none unless requested."""
    stream = gpt2.merged_state_dict(digests=True)
    for name, tensor in stream:
        raw = tensor.contiguous().view(torch.uint8).numpy().tobytes()
        assert stream.digests[name] == hashlib.sha256(raw).hexdigest()
    assert len(stream.digests) == len(gpt2.compilation.source.state_dict())
    plain = gpt2.merged_state_dict()
    next(plain)
    assert plain.digests == {}


def test_the_callers_state_has_no_say() -> None:
    compiled = small()
    expected = dict(compiled.merged_state_dict())
    with torch.autocast("cpu", torch.bfloat16):
        tensors = dict(compiled.merged_state_dict())
    assert all(torch.equal(tensor, expected[name]) and tensor.grad_fn is None for name, tensor in tensors.items())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused_before_anything_is_given(bad: float) -> None:
    compiled = small()
    with torch.no_grad():
        compiled.adapter_state_dict()["2.graftc.lora.A"][0, 0] = bad
    with pytest.raises(GraftError, match=r"2\.graftc\.lora\.A") as caught:
        compiled.merged_state_dict()
    assert caught.value.code == "GC051"


def test_an_overflow_is_refused_by_name() -> None:
    """The factors are finite, and their product is beyond float16."""
    compiled = small(torch.float16)
    with torch.no_grad():
        compiled.adapter_state_dict()["2.graftc.lora.B"].fill_(300)
        compiled.adapter_state_dict()["2.graftc.lora.A"].fill_(300)
    stream = compiled.merged_state_dict()
    assert next(stream)[0] == "0.weight"
    with pytest.raises(GraftError, match=r"2\.weight") as caught:
        list(stream)
    assert caught.value.code == "GC051"


@pytest.mark.slow
def test_what_does_not_fold_is_refused_by_name() -> None:
    spec = {"adapt": [{"method": "prefix", "length": 3}]}
    with pytest.raises(GraftError, match="prefix") as caught:
        graftc.compile(spec, tiny("bert")).merged_state_dict()
    assert caught.value.code == "GC050"


def test_buffers_that_graphs_write_to_are_copies() -> None:
    """Running statistics are the compiled model's, and later training does not change the returned ones."""
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5))
    spec = {"adapt": [{"method": "lora", "rank": 2, "target": {"modules": ["0"]}}]}
    compiled = graftc.compile(spec, model, {"input": torch.randn(4, 6)})
    perturb(compiled)
    compiled.train()(torch.randn(8, 6) + 3)
    streamed = dict(compiled.merged_state_dict())
    assert streamed.keys() == model.state_dict().keys()
    kept = streamed["1.running_mean"].clone()
    assert not torch.equal(kept, model.state_dict()["1.running_mean"])
    compiled(torch.randn(8, 6) - 3)
    assert torch.equal(streamed["1.running_mean"], kept)
