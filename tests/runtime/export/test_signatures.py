"""Exports of a signature other than the one that a model was compiled with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import graftc
from tests.kit.models import adapted

LORA = {"adapt": [{"method": "lora", "target": {"role": ["attn.q", "attn.v"]}, "rank": 2}]}


@pytest.fixture(scope="module")
def llama() -> Any:
    return adapted("llama", **LORA)


def text(batch: int, length: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        "input_ids": torch.randint(0, 101, (batch, length), generator=generator),
        "position_ids": torch.arange(length).expand(batch, length).contiguous(),
    }


@pytest.mark.full
def test_onnx_by_example_inputs(llama: Any, tmp_path: Path) -> None:
    import onnxruntime

    path = llama.export(tmp_path / "m.onnx", example_inputs=text(2, 4))
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    assert [value.name for value in session.get_inputs()] == ["input_ids", "position_ids"]
    for sizes in ((3, 9), (1, 5)):
        inputs = text(*sizes)
        (logits,) = session.run(["logits"], {name: value.numpy() for name, value in inputs.items()})
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(logits), llama(**inputs).logits, atol=1e-4, rtol=0)


@pytest.mark.full
def test_pt2_with_a_flag(llama: Any, tmp_path: Path) -> None:
    inputs = text(3, 6)
    path = llama.merge().export(tmp_path / "m.pt2", "pt2", {**inputs, "output_hidden_states": True})
    program = torch.export.load(path).module()
    with torch.no_grad():
        outputs, expected = program(**inputs), llama(**inputs, output_hidden_states=True)
    assert list(outputs) == ["logits", *(f"hidden_states.{i}" for i in range(3))]
    for i, states in enumerate(expected.hidden_states):
        torch.testing.assert_close(outputs[f"hidden_states.{i}"], states, atol=2e-5, rtol=0)


@pytest.mark.slow
def test_example_inputs_without_a_graph(llama: Any, tmp_path: Path) -> None:
    with pytest.raises(graftc.GraftError, match="GC140"):
        llama.export(tmp_path / "m.onnx", example_inputs={**text(2, 4), "use_cache": True})
    assert not list(tmp_path.iterdir())
