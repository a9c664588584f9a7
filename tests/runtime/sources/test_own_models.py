"""Hand-written models: inputs by position, attention of torch.nn, sizes that a graph is bound to."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graftc
from graftc.compiler.capture.capture import capture
from graftc.compiler.capture.request import CaptureRequest
from graftc.compiler.capture.signature import Axis
from graftc.specs.errors.diagnostics import GraftError
from graftc.testing import perturb, randomise
from tests.cli.support import run_here
from tests.kit.models import fresh
from tests.kit.specs import lora


def seeded(make: Any) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = make().eval().requires_grad_(False)
    return model


class Attending(nn.Module):
    """Self-attention of torch.nn with a padding mask, by name or position."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True, dropout=0.1)
        self.last = nn.Linear(16, 5)

    def forward(self, states: Tensor, padding: Tensor | None = None) -> Tensor:
        attended, _ = self.attention(states, states, states, key_padding_mask=padding, need_weights=False)
        return self.last(states + attended)


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 4, 24, batch_first=True, dropout=0.1)
    return nn.Sequential(randomise(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)), nn.Linear(16, 3))


@pytest.mark.full
@pytest.mark.parametrize("enabled", [True, False])
def test_attention_of_torch_nn(enabled: bool) -> None:
    model = seeded(Attending)
    torch.backends.mha.set_fastpath_enabled(enabled)
    try:
        adapted = fresh(model, lora(modules="last"), inputs=(torch.randn(2, 6, 16),)).eval()
        states, padding = torch.randn(3, 9, 16), torch.zeros(3, 9, dtype=torch.bool)
        padding[-1, -3:] = True
        with torch.no_grad():
            for inputs in ((states,), (states, padding), (states[:1, :4], padding[:1, :4])):
                torch.testing.assert_close(adapted(*inputs), model(*inputs), atol=1e-6, rtol=0)
        assert torch.backends.mha.get_fastpath_enabled() is enabled
        with pytest.raises(graftc.GraftError):
            capture(CaptureRequest.of(model, [Axis("nothing", torch.float32, ("batch", 2))]))
        assert torch.backends.mha.get_fastpath_enabled() is enabled
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


@pytest.mark.full
def test_a_transformer_encoder_folds_and_its_eval_graph_is_derived() -> None:
    model = seeded(encoder)
    adapted = fresh(model, lora(modules=["**.linear1", "**.linear2"]), inputs=[torch.randn(2, 6, 16)]).eval()
    perturb(adapted)
    merged = adapted.merge()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad():
            for shape in ((3, 9), (1, 4)):
                states = torch.randn(*shape, 16)
                with adapted.disabled():
                    assert torch.equal(adapted(states), model(states))
                torch.testing.assert_close(merged(states), adapted(states), atol=2e-5, rtol=0)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


class ByPosition(nn.Module):
    """A model with inputs that callers cannot name, and a number that is not a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, left: Tensor, right: Tensor, /, scale: float = 1.0) -> dict[str, Tensor]:
        return {"sum": self.linear(left) * scale + right}


@pytest.mark.slow
def test_inputs_by_position_and_a_number() -> None:
    model = seeded(ByPosition)
    left, right = torch.randn(3, 4), torch.randn(3, 4)
    adapted = fresh(model, lora(modules="linear"), inputs=(left, right)).eval()
    with torch.no_grad():
        for arguments in ((), (1.0,), (2.5,), (3.0,)):
            assert torch.equal(adapted(left, right, *arguments)["sum"], model(left, right, *arguments)["sum"])
    assert len(adapted.compilation.signatures) == 3


class Unnamed(nn.Module):
    """A model whose forward does not call its first parameter ``self``."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(module, states: Tensor, shift: Tensor | None = None) -> Tensor:  # noqa: N805
        """Map the states and add the second input, with which the call has a graph of its own."""
        mapped = module.linear(states)
        return mapped if shift is None else mapped + shift


@pytest.mark.slow
def test_a_forward_whose_first_parameter_is_not_self() -> None:
    model = seeded(Unnamed)
    states, shift = torch.randn(3, 4), torch.randn(3, 4)
    adapted = fresh(model, lora(modules="linear"), inputs=(states,)).eval()
    with torch.no_grad():
        assert torch.equal(adapted(states), model(states))
        assert torch.equal(adapted(states, shift), model(states, shift))
        assert torch.equal(adapted(states=states, shift=shift), model(states, shift))
    assert list(inspect.signature(adapted.forward).parameters) == ["states", "shift"]
    with pytest.raises(GraftError, match="takes no input 'module'"):
        adapted(states, module=model)


class Chunked(nn.Module):
    """A model that decides by the length: it swaps the halves of an even one."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, states: Tensor) -> Tensor:
        if states.shape[1] % 2 == 0:
            states = states.unflatten(1, (2, states.shape[1] // 2)).flip(1).flatten(1, 2)
        return self.linear(states)


@pytest.mark.full
def test_a_graph_never_serves_a_size_that_its_model_treats_otherwise() -> None:
    model = seeded(Chunked)
    adapted = fresh(model, lora(modules="linear"), inputs={"states": torch.randn(2, 6, 4)}).eval()
    perturb(adapted)
    folded = nn.Linear(4, 4)
    folded.load_state_dict({n.removeprefix("linear."): t for n, t in adapted.merge().folded_state_dict().items()})
    with torch.no_grad():
        for batch, length in ((3, 6), (3, 7), (2, 8), (5, 7), (4, 6), (1, 1)):
            states = torch.randn(batch, length, 4)
            with adapted.disabled():
                assert torch.equal(adapted(states), model(states))
            expected = Chunked()
            expected.linear = folded
            torch.testing.assert_close(adapted(states), expected(states), atol=2e-5, rtol=0)


@pytest.mark.full
def test_a_bound_length_is_captured_anew_and_noted() -> None:
    from transformers import MambaConfig, MambaForCausalLM

    model = seeded(lambda: MambaForCausalLM(MambaConfig(hidden_size=16, num_hidden_layers=1, vocab_size=50)))
    adapted = fresh(model, lora(modules="**.in_proj")).eval()
    assert any("one sequence size only, here 7" in note for note in adapted.report.notes)
    tensors = {name: t.data_ptr() for name, t in adapted.named_parameters()}
    mask = torch.ones
    with torch.no_grad():
        for batch, length in ((3, 7), (2, 5), (4, 5), (1, 7)):
            ids = torch.randint(0, 50, (batch, length))
            inputs = {"input_ids": ids, "attention_mask": mask(batch, length).long()}
            assert torch.equal(adapted(**inputs).logits, model(**inputs).logits)
    assert len(adapted.compilation.signatures) == 2
    assert {name: t.data_ptr() for name, t in adapted.named_parameters()} == tensors
    perturb(adapted)
    assert adapted.merge().certificate.passed


OWN = """
import torch
from torch import nn

def model():
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))

def positional():
    return model(), (torch.zeros(2, 6),)

def alone():
    return model(), torch.zeros(2, 6)

def named():
    return model(), {"input": torch.zeros(2, 6)}

def wrong():
    return model(), 3
"""


@pytest.mark.slow
@pytest.mark.parametrize("maker", ["positional", "alone", "named"])
def test_the_command_line_takes_a_model_with_its_inputs(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, maker: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    name = f"own_with_inputs_{maker}"
    (tmp_path / f"{name}.py").write_text(OWN, encoding="utf-8")
    (tmp_path / "spec.yaml").write_text("adapt: [{method: lora, target: {modules: '2'}, rank: 2}]\n", encoding="utf-8")
    checked = run_here(capsys, "check", "spec.yaml", "--model", f"{name}:{maker}", "--json")
    assert checked.status == 0
    assert checked.data["trainable_parameters"] == 2 * (8 + 2)
    assert run_here(capsys, "roles", f"{name}:{maker}", "--json", "--meta").status == 0
    without = run_here(capsys, "roles", f"{name}:model")
    assert without.status == 3 and "(model, example_inputs)" in without.err
    wrong = run_here(capsys, "roles", f"{name}:wrong")
    assert wrong.status == 3 and "example inputs of type int" in wrong.err
