"""Disabling affects only calls: files and models derived from a compiled model have every adaptation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graftc
from graftc.runtime.compiled import Compiled
from graftc.testing import perturb, tiny


class Net(nn.Module):
    """A model that is captured and exported quickly."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.fc, self.out = nn.Linear(6, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.out(self.fc(x).relu())}


X = torch.randn(4, 6, generator=torch.Generator().manual_seed(5))
ORDERS = [("a", "b"), ("b", "a")]
STATES = ["none", "a", "b", "both", "while:a", "while:b", "while:all", "reference"]


def net(order: tuple[str, str] = ("a", "b")) -> Compiled:
    """Return a model with two LoRAs on the same places, in either order."""
    adapt = [{"name": name, "method": "lora", "rank": 2, "target": {"modules": "*"}} for name in order]
    compiled = graftc.compile({"adapt": adapt}, Net().eval(), {"x": torch.zeros(2, 6)}).eval()
    perturb(compiled, 0.2)
    return compiled


@contextmanager
def in_state(compiled: Any, state: str) -> Iterator[None]:
    """Leave some adaptations out of calls while the block runs, by disabling them or by a context."""
    how, _, name = state.rpartition(":")
    if state == "reference":
        with compiled._graftc.running_base():
            yield
    elif how == "while":
        with compiled.disabled(*(() if name == "all" else (name,))):
            yield
    else:
        compiled.disable(*{"none": (), "both": ("a", "b")}.get(state, (state,)))
        yield
        compiled.enable()


def in_onnx(path: Path) -> Tensor:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    beside = path.with_name(f"{path.name}.b.safetensors")
    given = {"x": X.numpy()}
    if beside.exists():
        from safetensors.numpy import load_file

        given |= load_file(beside)
    return torch.from_numpy(session.run(["logits"], given)[0])


def in_torch(path: Path) -> Tensor:
    with torch.no_grad():
        output: Tensor = torch.export.load(path).module()(x=X)["logits"]
        return output


def loaded(weights: Any) -> Tensor:
    model = Net().eval()
    model.load_state_dict(dict(weights))
    with torch.no_grad():
        return called(model)


def called(model: Any) -> Tensor:
    with torch.no_grad():
        output: Tensor = model(X)["logits"]
        return output


Operation = Callable[[Any, Path], Tensor]

OPERATIONS: dict[str, Operation] = {
    "merge": lambda model, to: called(model.merge()),
    "merge, by name": lambda model, to: called(model.merge(["a", "b"])),
    "merged folder": lambda model, to: loaded_file(model.merge().save(to) / "model.safetensors"),
    "merged_state_dict": lambda model, to: loaded((n, t.clone()) for n, t in model.merged_state_dict()),
    "save": lambda model, to: called(graftc.load(model.save(to), Net().eval()).eval()),
    "convert": lambda model, to: called(model._graftc.convert().compiled),
    "combine": lambda model, to: called(model._graftc.combine(["a", "b"], kind="concatenation").compiled),
    "pt2": lambda model, to: in_torch(model.export(to, "pt2")),
    "onnx": lambda model, to: in_onnx(model.export(to)),
    "onnx, inputs": lambda model, to: in_onnx(model.export(to, inputs=["b"])),
    "onnx, merged": lambda model, to: in_onnx(model.merge().export(to)),
}
QUICK = {"pt2": {"b", "while:all"}, "onnx": {"a"}, "onnx, inputs": {"b"}}
"""Operations that take long, and the states in which every run of the tests has them."""


def loaded_file(path: Path) -> Tensor:
    from safetensors.torch import load_file

    return loaded(load_file(path))


def _cases() -> Iterator[Any]:
    for operation in OPERATIONS:
        slow = operation.startswith(("pt2", "onnx"))
        for order in ORDERS:
            for state in STATES:
                quick = order == ORDERS[0] and (not slow or state in QUICK.get(operation, ()))
                marks = () if quick else pytest.mark.full
                yield pytest.param(operation, order, state, marks=marks, id=f"{operation}-{order[0]}{order[1]}-{state}")


@pytest.fixture(scope="module")
def nets() -> dict[tuple[str, str], Compiled]:
    return {order: net(order) for order in ORDERS}


@pytest.mark.slow
@pytest.mark.parametrize(("operation", "order", "state"), list(_cases()))
def test_every_adaptation(
    nets: dict[tuple[str, str], Compiled], operation: str, order: tuple[str, str], state: str, tmp_path: Path
) -> None:
    """Every operation includes all adaptations, whatever calls leave out, and calls leave out the same afterwards."""
    compiled = nets[order]
    expected, base = called(compiled), called(Net().eval())
    with in_state(compiled, state):
        before = called(compiled)
        output = OPERATIONS[operation](compiled, tmp_path / "made")
        assert torch.equal(called(compiled), before)
    assert torch.allclose(output, expected, atol=1e-4)
    assert not torch.allclose(before, expected, atol=1e-2) or state == "none"
    assert torch.allclose(before, base, atol=1e-5) == (state in ("both", "while:all", "reference"))


def llama(*roles: str) -> Compiled:
    named = zip("ab", roles, strict=False)
    adapt = [{"name": name, "method": "lora", "rank": 2, "target": {"role": role}} for name, role in named]
    compiled = graftc.compile({"adapt": adapt}, tiny("llama").eval()).eval()
    perturb(compiled, 0.2)
    return compiled


@pytest.mark.sample("peft-while", "card-while", "gguf-while", "adapter_state_dict-while", "peft-disable")
@pytest.mark.slow
@pytest.mark.parametrize("how", ["disable", "while"])
@pytest.mark.parametrize("format", ["peft", "gguf", "card", "adapter_state_dict"])
def test_what_is_written_of_adapters(format: str, how: str, tmp_path: Path) -> None:
    """Written adapters are byte for byte those that are written when nothing is left out."""
    compiled: Any = llama(*(("attn.q",) if format == "peft" else ("attn.q", "attn.v")))

    def written(to: Path) -> Any:
        if format == "card":
            return compiled.card()
        if format == "adapter_state_dict":
            return {name: tensor.tolist() for name, tensor in compiled.adapter_state_dict().items()}
        path = compiled.export(to, format)
        files = [path] if path.is_file() else sorted(path.iterdir())
        return [(file.name, file.read_bytes()) for file in files if file != path] or path.read_bytes()

    expected = written(tmp_path / "all")
    with in_state(compiled, "a" if how == "disable" else "while:all"):
        assert written(tmp_path / "left") == expected


@pytest.mark.full
@pytest.mark.parametrize("state", STATES)
def test_graphs_that_generate(state: str, tmp_path: Path) -> None:
    from graftc.runtime.onnx_generation import load

    compiled: Any = llama("attn.q", "attn.v")
    expected = logits(compiled)
    with in_state(compiled, state):
        folder = compiled.export(tmp_path / "made", "onnx-generate", logits="all")
    assert torch.allclose(logits(load(folder)), expected, atol=1e-3)


IDS = torch.randint(3, 90, (2, 6), generator=torch.Generator().manual_seed(0))


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        outputs: Any = model(input_ids=IDS, attention_mask=torch.ones_like(IDS))
        return outputs["logits"]


@pytest.fixture(scope="module")
def partial() -> tuple[Any, Tensor]:
    compiled: Any = llama("attn.q", "attn.v")
    return compiled, logits(compiled)


@pytest.mark.full
@pytest.mark.parametrize("state", [s if s == "b" else pytest.param(s, marks=pytest.mark.full) for s in STATES])
def test_partial_merges(partial: tuple[Any, Tensor], state: str, tmp_path: Path) -> None:
    """Partial merges and their exports are complete, even if adaptations of the rest are disabled as well."""
    compiled, expected = partial
    with in_state(compiled, state):
        merged = compiled.merge_partially(only=["a"])
    assert torch.allclose(logits(merged.compiled), expected, atol=1e-4)
    with in_state(merged.compiled, state if state in ("b", "while:b", "while:all", "reference") else "b"):
        merged.save(tmp_path / "saved")
        path = merged.export(tmp_path / "made.pt2", "pt2")
    assert torch.allclose(logits(torch.export.load(path).module()), expected, atol=1e-4)
    assert torch.allclose(logits(graftc.load(tmp_path / "saved").eval()), expected, atol=1e-4)
