"""Exported graphs give no loss: labels are not among their inputs, however a model was compiled or trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graftc
from graftc.testing import perturb, tiny
from tests.kit.models import fresh
from tests.kit.specs import lora

IDS = torch.randint(3, 90, (2, 6), generator=torch.Generator().manual_seed(0))
CALLS: dict[str, dict[str, Any]] = {
    "llama": {"labels": IDS},
    "bert": {"labels": torch.tensor([0, 1])},
    "t5": {"labels": IDS},
    "t5 with both": {"labels": IDS, "decoder_input_ids": IDS},
}
FULL = pytest.mark.full


def with_labels(kind: str, when: str) -> Any:
    """Return a tiny model that was compiled with labels or trained with them for one step."""
    model = tiny(kind.partition(" ")[0]).eval()
    given = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), **CALLS[kind]}
    compiled = fresh(model, lora("attn.q"), inputs=given if when == "compiled" else None)
    if when == "trained":
        compiled.train()
        compiled(**given).loss.backward()
    perturb(compiled, 0.2)
    return compiled.eval()


def inputs_in(path: Path) -> dict[str, Tensor]:
    """Return inputs for a file."""
    if path.suffix == ".onnx":
        import onnxruntime

        names = [value.name for value in onnxruntime.InferenceSession(str(path)).get_inputs()]
    else:
        names = [n for n in torch.export.load(path).graph_signature.user_inputs if isinstance(n, str)]
    return {name: torch.ones_like(IDS) if "mask" in name else IDS for name in names}


def outputs_in(path: Path, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    if path.suffix == ".onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(str(path))
        values = session.run(None, {name: value.numpy() for name, value in inputs.items()})
        names = [value.name for value in session.get_outputs()]
        return {name: torch.from_numpy(value) for name, value in zip(names, values, strict=True)}
    with torch.no_grad():
        outputs: dict[str, Tensor] = torch.export.load(path).module()(**inputs)
        return outputs


def check(compiled: Any, path: Path) -> None:
    inputs = inputs_in(path)
    assert inputs and not {"labels", "num_items_in_batch"} & inputs.keys()
    outputs = outputs_in(path, inputs)
    assert "loss" not in outputs
    with torch.no_grad():
        assert torch.allclose(outputs["logits"], compiled(**inputs).logits, atol=1e-3)


@pytest.mark.full
@pytest.mark.parametrize("merged", [False, pytest.param(True, marks=FULL)])
@pytest.mark.parametrize("format", ["pt2", pytest.param("onnx", marks=FULL)])
@pytest.mark.parametrize("when", ["compiled", pytest.param("trained", marks=FULL)])
@pytest.mark.parametrize("kind", ["bert", *(pytest.param(kind, marks=FULL) for kind in CALLS if kind != "bert")])
def test_graphs(kind: str, when: str, format: Any, merged: bool, tmp_path: Path) -> None:
    """The file computes the logits of a call without labels."""
    compiled = with_labels(kind, when)
    model = compiled.merge() if merged else compiled
    check(compiled, model.export(tmp_path / f"made.{format}", format))


@pytest.mark.full
@pytest.mark.parametrize("format", ["onnx", "pt2"])
@pytest.mark.parametrize("kind", CALLS)
def test_examples_with_labels(kind: str, format: Any, tmp_path: Path) -> None:
    """Labels in example inputs are dropped as well."""
    compiled = with_labels(kind, "not at all")
    given = {"input_ids": IDS, **CALLS[kind]}
    path = compiled.export(tmp_path / f"made.{format}", format, example_inputs=given)
    assert "attention_mask" not in inputs_in(path)
    check(compiled, path)


@pytest.mark.full
@pytest.mark.parametrize("kind", sorted(CALLS.keys() - {"bert"}))
def test_graphs_that_generate(kind: str, tmp_path: Path) -> None:
    from graftc.runtime.onnx_generation import load

    compiled = with_labels(kind, "compiled")
    generator = load(compiled.export(tmp_path / "made", "onnx-generate"))
    options: Any = {"attention_mask": torch.ones_like(IDS), "max_new_tokens": 4, "do_sample": False}
    assert torch.equal(generator.generate(input_ids=IDS, **options), compiled.generate(input_ids=IDS, **options))


class Own(nn.Module):
    """A user-defined model whose loss reads an input with a name of its own."""

    def __init__(self, needed: bool) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 5)
        self.needed = needed

    def forward(self, x: Tensor, wanted: Tensor | None = None, scale: Tensor | None = None) -> dict[str, Tensor]:
        y = self.fc(x)
        if scale is not None:
            y = y * scale
        return {"logits": y} if wanted is None else {"loss": (y - wanted).square().mean(), "logits": y}


class Needing(Own):
    def forward(self, x: Tensor, wanted: Tensor, scale: Tensor | None = None) -> dict[str, Tensor]:
        return super().forward(x, wanted, scale)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "kept"), [(Own, {"x", "scale"}), (Needing, {"x", "wanted", "scale"})])
def test_what_only_a_loss_reads(kind: type[Own], kept: set[str], tmp_path: Path) -> None:
    """Labels are recognised by what reads them; an input that the model cannot be called without stays."""
    given = {"x": torch.randn(2, 6), "wanted": torch.randn(2, 5), "scale": torch.randn(5)}
    spec = {"adapt": [{"method": "lora", "rank": 2, "target": {"modules": "*"}}]}
    compiled = graftc.compile(spec, kind(True).eval(), given).eval()
    path = compiled.export(tmp_path / "made.pt2", "pt2")
    assert set(torch.export.load(path).graph_signature.user_inputs) == kept


class Optional(nn.Module):
    """A model that accepts decoder tokens but does not need them, and whose labels only the loss reads."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.fc = nn.Embedding(90, 6), nn.Linear(6, 5)

    def forward(
        self, input_ids: Tensor, decoder_input_ids: Tensor | None = None, labels: Tensor | None = None
    ) -> dict[str, Tensor]:
        y = self.fc(self.words(input_ids))
        if decoder_input_ids is not None:
            y = y + self.fc(self.words(decoder_input_ids))
        return {"logits": y} if labels is None else {"loss": y.mean(-1).sub(labels).square().mean(), "logits": y}


@pytest.mark.slow
@pytest.mark.parametrize("when", ["compiled", "exported"])
def test_a_decoder_that_there_is_not(when: str, tmp_path: Path) -> None:
    """The decoder's tokens are not an input of the file, as the model runs without them."""
    spec = {"adapt": [{"method": "lora", "rank": 2, "target": {"modules": "fc"}}]}
    given = {"input_ids": IDS, "labels": IDS}
    examples = given if when == "compiled" else {"input_ids": IDS}
    compiled = graftc.compile(spec, Optional().eval(), examples).eval()
    path = compiled.export(tmp_path / "made.pt2", "pt2", None if when == "compiled" else given)
    assert list(torch.export.load(path).graph_signature.user_inputs) == ["input_ids"]


class Steps(nn.Module):
    """A model that loops over the tokens, so that a graph is valid for one length only."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        state = torch.zeros_like(x[:, 0])
        for step in x.unbind(1):
            state = self.fc(state + step).tanh()
        return {"logits": state} if labels is None else {"loss": (state - labels).square().mean(), "logits": state}


@pytest.mark.full
@pytest.mark.parametrize("length", [4, 11])
@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("merged", [False, True])
def test_graphs_of_one_length(merged: bool, labelled: bool, length: int, tmp_path: Path) -> None:
    """The file accepts the length that the model was compiled with, not a made-up one."""
    given = {"x": torch.randn(2, length, 6)}
    spec = {"adapt": [{"method": "lora", "rank": 2, "target": {"modules": "fc"}}]}
    compiled = graftc.compile(spec, Steps().eval(), given | ({"labels": torch.randn(2, 6)} if labelled else {})).eval()
    perturb(compiled, 0.2)
    model = compiled.merge() if merged else compiled
    program = torch.export.load(model.export(tmp_path / "made.pt2", "pt2")).module()
    with torch.no_grad():
        torch.testing.assert_close(program(**given)["logits"], compiled(**given)["logits"], atol=1e-5, rtol=1e-5)
