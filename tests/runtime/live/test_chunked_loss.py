"""A chunked loss if the model's own Python computes the loss: head and loss become one graph."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

import graftc
from graftc.runtime.live.deferred_logits import DeferredLogits
from graftc.testing import perturb
from tests.kit.comparing import gradients_of

VOCABULARY, WIDTH = 50, 16
SPEC: dict[str, Any] = {"adapt": [{"method": "lora", "rank": 2, "target": {"modules": "**.{first,lm_head}"}}]}


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, 24), nn.Linear(24, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.second(torch.tanh(self.first(x)))


class Talker(nn.Module):
    """A model that skips layers by a value and so is not a graph; `way` sets how it computes the loss from logits."""

    def __init__(self, way: str = "shifted") -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(3))
        self.lm_head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.way = way

    def forward(self, ids: torch.Tensor, labels: torch.Tensor | None = None) -> Any:
        x = self.embed(ids)
        for layer in self.layers[: 3 if int(ids.sum()) > 0 else 1]:
            x = layer(x)
        logits = self.lm_head(x)
        output = Output(logits=logits)
        if labels is not None:
            output["loss"] = getattr(self, self.way)(logits, labels)
        return output

    def shifted(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        labels = functional.pad(labels, (0, 1), value=-100)[..., 1:].contiguous()
        return functional.cross_entropy(logits.float().view(-1, VOCABULARY), labels.view(-1))

    def cut(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        rows = logits[..., :-1, :].contiguous().reshape(-1, VOCABULARY)
        return nn.CrossEntropyLoss()(rows, labels[..., 1:].reshape(-1))

    def capped(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        capped = 30 * torch.tanh(logits / 30)
        total = functional.cross_entropy(capped.flatten(0, 1), labels.flatten(), reduction="sum", label_smoothing=0.1)
        return total / labels.numel()

    def by_hand(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return -logits.log_softmax(-1).gather(-1, labels[..., None]).mean()

    def read_first(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return self.shifted(logits, labels) + 0.01 * logits.logsumexp(-1).square().mean()


class Output(dict):  # type: ignore[type-arg]
    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


def batch(seed: int = 0, rows: int = 2, length: int = 7) -> dict[str, torch.Tensor]:
    ids = torch.randint(1, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))
    return {"ids": ids, "labels": ids}


def both(way: str, loss: str = "chunked") -> tuple[Any, Any]:
    """Return the same adapted model with a whole loss and with a chunked one."""
    torch.manual_seed(0)
    model = Talker(way)
    models = []
    for kind in ("whole", loss):
        compiled = graftc.compile({**SPEC, "memory": {"loss": kind}}, copy.deepcopy(model), batch(), cache=False)
        perturb(compiled, 0.3)
        models.append(compiled.train())
    return models[0], models[1]


def gradients(compiled: Any, given: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor], Any]:
    outputs = compiled(**given)
    outputs.loss.backward()
    grads = gradients_of(compiled)
    compiled.zero_grad(set_to_none=True)
    return outputs.loss.detach(), grads, outputs.logits


@pytest.mark.sample("auto-shifted")
@pytest.mark.slow
@pytest.mark.parametrize("way", ["shifted", "cut", "capped"])
@pytest.mark.parametrize("loss", ["chunked", "auto"])
def test_losses_and_gradients_are_those_of_a_whole_loss(way: str, loss: str) -> None:
    whole, chunked = both(way, loss)
    with warnings.catch_warnings():
        warnings.simplefilter("error", graftc.GraftWarning)
        for seed, (rows, length) in enumerate([(2, 7), (3, 5), (1, 9), (2, 12)]):
            given = batch(seed, rows, length)
            wanted, actual = gradients(whole, given), gradients(chunked, given)
            assert torch.allclose(actual[0], wanted[0], rtol=1e-5)
            assert actual[1].keys() == wanted[1].keys() and len(actual[1]) == 8
            for name, gradient in wanted[1].items():
                assert torch.allclose(actual[1][name], gradient, rtol=1e-4, atol=1e-6), name
            assert isinstance(actual[2], DeferredLogits) and actual[2].shape == wanted[2].shape
            assert torch.equal(actual[2].detach() + 0, wanted[2].detach())
    every = (each for run in chunked._graftc.shown.executables.values() for each in run.outcomes)
    losses = [outcome for outcome in every if outcome.step == "loss"]
    assert losses and all(outcome.done for outcome in losses)


@pytest.mark.full
@pytest.mark.sample("capped")
@pytest.mark.slow
@pytest.mark.parametrize("way", ["shifted", "capped"])
def test_one_graph_holds_for_all_sizes(way: str) -> None:
    _, chunked = both(way)
    for rows, length in [(2, 7), (3, 5)]:
        gradients(chunked, batch(0, rows, length))
    known = len(chunked.compilation.signatures)
    for rows, length in [(4, 6), (5, 11), (2, 8)]:
        gradients(chunked, batch(0, rows, length))
    assert len(chunked.compilation.signatures) == known


@pytest.mark.full
@pytest.mark.sample("by_hand-True")
@pytest.mark.slow
@pytest.mark.parametrize(("way", "warned"), [("by_hand", True), ("read_first", False)])
def test_what_reads_logits_gets_them(way: str, warned: bool) -> None:
    whole, chunked = both(way)
    wanted = gradients(whole, batch())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        actual = gradients(chunked, batch())
        gradients(chunked, batch())
    assert [str(each.message)[:5] for each in caught if "GC" in str(each.message)] == ["GC151"] * warned
    assert torch.allclose(actual[0], wanted[0], rtol=1e-5)
    for name, gradient in wanted[1].items():
        assert torch.allclose(actual[1][name], gradient, rtol=1e-4, atol=1e-6), name


@pytest.mark.full
def test_logits_are_there_in_eval_mode_and_without_labels() -> None:
    whole, chunked = both("shifted")
    given = {"ids": batch()["ids"]}
    assert torch.equal(chunked(**given).logits.argmax(-1), whole(**given).logits.argmax(-1))
    chunked.eval(), whole.eval()
    outputs = chunked(**batch())
    assert type(outputs.logits) is torch.Tensor and torch.equal(outputs.loss, whole(**batch()).loss)


@pytest.mark.full
@pytest.mark.slow
def test_what_was_written_to_before_logits_are_read_is_refused() -> None:
    torch.manual_seed(0)
    model = nn.Sequential()
    model.add_module("lm_head", nn.Linear(WIDTH, VOCABULARY))
    _, chunked = both("shifted")
    logits = chunked(**{"ids": batch()["ids"]}).logits
    read = logits._graftc_call.x
    with torch.no_grad():
        read.add_(1)
    with pytest.raises(graftc.GraftError, match="GC031"):
        logits.sum()


@pytest.mark.full
@pytest.mark.slow
def test_values_are_those_of_the_call() -> None:
    """Autocast and gradient mode are those in which the head was called."""
    _, chunked = both("shifted")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = chunked(**batch())
    assert outputs.logits.dtype == torch.bfloat16
    with torch.no_grad():
        values = outputs.logits * 1.0
        assert outputs.logits.float().exp().requires_grad is False
    assert type(values) is torch.Tensor and values.dtype == torch.bfloat16 and not values.requires_grad
