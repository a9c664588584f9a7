"""Files of adapters that `use` refuses, before anything changes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import graftc
from graftc.runtime.onnx_generation import load
from graftc.runtime.onnx_generation.adapter_files import read_adapter, version_of, write_adapter
from graftc.specs.errors.diagnostics import GraftError
from graftc.testing import perturb
from tests.applications.serving.served_base import artifact, base_folder
from tests.cli.support import run_here
from tests.runtime.onnx_generation.onnx_folders import source

IDS = torch.tensor([[5, 17, 40, 9, 23]])
SPEC = {"adapt": [{"method": "lora", "rank": 3, "target": {"role": ["attn.q", "attn.v"]}}]}


def adapted(base: Any, rank: int = 3) -> Any:
    compiled = graftc.compile({"adapt": [{**SPEC["adapt"][0], "rank": rank}]}, base).eval()
    perturb(compiled, 0.3)
    return compiled


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Graphs with a LoRA as input, and another adapter for them, of rank 5."""
    top = tmp_path_factory.mktemp("graphs")
    adapted(source("llama")).export(top / "own", "onnx-generate", inputs=["lora"], adapter_format="onnx_adapter")
    for name in ("safetensors", "onnx_adapter"):
        adapted(source("llama"), 5).export(top / f"five.{name}", "onnx-adapter", graph=top / "own")
    return top


def logits(model: Any) -> Tensor:
    mask = torch.ones_like(IDS)
    return model(input_ids=IDS, attention_mask=mask, logits_to_keep=1).logits.clone()  # type: ignore[no-any-return]


def short(tensors: dict[str, Tensor], first: str) -> dict[str, Tensor]:
    """Return the tensors, with the first row of a factor alone."""
    return {**tensors, first: tensors[first][:1].clone()}


DAMAGED: dict[str, tuple[Callable[[dict[str, Tensor], str], dict[str, Tensor]], str]] = {
    "nan": (lambda t, first: {**t, first: torch.full_like(t[first], torch.nan)}, "has values that are not finite"),
    "infinite": (lambda t, first: {**t, first: t[first] / 0}, "has values that are not finite"),
    "half": (lambda t, first: {name: own for name, own in t.items() if name != first}, "it lacks {first}"),
    "rank": (short, "does not go with"),
}


def test_files_may_be_large(tmp_path: Path) -> None:
    """Adapters have more bytes than configs may have."""
    tensors = {"large": torch.arange(5 * 2**20, dtype=torch.float32)}
    write_adapter(tensors, tmp_path / "large.safetensors", "base")
    assert torch.equal(read_adapter(tmp_path / "large.safetensors").tensors["large"], tensors["large"])


@pytest.mark.full
@pytest.mark.slow
def test_what_is_used(folder: Path, tmp_path: Path) -> None:
    """Adapters for these graphs are read in both formats, and files that say nothing of their base as well."""
    model = load(folder / "own", threads=1)
    wanted = adapted(source("llama"), 5)(input_ids=IDS).logits[:, -1:]
    tensors = load_file(folder / "five.safetensors")
    save_file(tensors, tmp_path / "bare.safetensors")
    assert read_adapter(tmp_path / "bare.safetensors").base is None
    for file in (folder / "five.safetensors", folder / "five.onnx_adapter", tmp_path / "bare.safetensors"):
        model.use(folder / "own/adapters/lora.onnx_adapter")
        assert not torch.allclose(logits(model), wanted, atol=1e-2)
        assert torch.allclose(logits(model.use(file)), wanted, atol=1e-4)
    (base,) = {graph.base for graph in model.graphs}
    assert base is not None and version_of(base) == read_adapter(folder / "five.onnx_adapter").base


@pytest.mark.slow
@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_files(folder: Path, tmp_path: Path, name: str) -> None:
    """They are refused by name, and the model goes on as before."""
    model = load(folder / "own", threads=1).use(folder / "five.onnx_adapter")
    before = logits(model)
    change, words = DAMAGED[name]
    tensors = load_file(folder / "five.safetensors")
    first = next(key for key in tensors if key.endswith(".A"))
    save_file(change(tensors, first), tmp_path / "damaged.safetensors")
    with pytest.raises(GraftError) as caught:
        model.use(tmp_path / "damaged.safetensors")
    assert caught.value.code == "GC192" and words.format(first=first) in caught.value.message
    assert logits(model).equal(before)


@pytest.mark.full
@pytest.mark.parametrize("form", ["safetensors", "onnx_adapter"])
def test_another_base(folder: Path, form: str, tmp_path: Path) -> None:
    """An adapter of another base has the same names and shapes, and is refused by what its file says."""
    other = source("llama")
    with torch.no_grad():
        other.lm_head.weight.mul_(1.5)
    adapted(other).export(tmp_path / "other", "onnx-generate", inputs=["lora"], adapter_format=form)
    model = load(folder / "own", threads=1).use(folder / "five.onnx_adapter")
    before = logits(model)
    with pytest.raises(GraftError, match=r"is for another base than model\.onnx") as caught:
        model.use(tmp_path / f"other/adapters/lora.{form}")
    assert caught.value.code == "GC192" and logits(model).equal(before)


@pytest.mark.full
def test_a_graph_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """``--force`` does not replace the graph that an adapter is for, and writes the adapter again."""
    base = base_folder(tmp_path / "base")
    graph = tmp_path / "graphs"
    artifact(base, "lora", tmp_path / "own").export(graph, "onnx-generate", inputs=["lora"])
    before = (graph / "model.onnx").read_bytes()
    words = ["export", str(tmp_path / "own"), "-f", "onnx-adapter", "--for-graph", str(graph), "--force", "--json"]
    outcome = run_here(capsys, *words, "-o", str(graph / "model.onnx"))
    assert outcome.data["error"]["code"] == "GC063" and "one of its sources" in outcome.data["error"]["message"]
    assert (graph / "model.onnx").read_bytes() == before
    for _ in range(2):
        assert run_here(capsys, *words, "-o", str(graph / "adapters/lora.safetensors")).status == 0
