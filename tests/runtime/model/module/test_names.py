"""A source model may give its children, parameters and buffers any name."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graftc
from graftc.runtime.compiled import Compiled, CompiledRunner
from graftc.runtime.deploy.merged import Merged
from graftc.runtime.model.runner import runner_of
from graftc.specs.errors.diagnostics import GraftError
from graftc.testing import perturb, randomise
from tests.kit.places import ROOT

OWN_NAMES = [
    "program",
    "select",
    "report",
    "spec",
    "blocks",
    "config",
    "merge",
    "merged_state_dict",
    "save",
    "export",
    "device",
    "dtype",
    "run",
    "fix",
    "train_only",
    "active",
    "activate",
    "tree",
    "compilation",
    "explain",
    "snapshot",
    "structure",
    "disabled",
    "callback",
    "begin",
    "after_step",
    "main_input_name",
    "certificate",
    "folded",
    "kept",
    "_store",
    "_programs",
    "_compilation",
    "_steering",
    "_call",
    "_key",
    "module",
    "training_",
    "state",
    "store",
    "forward_",
    "checkpointing",
    "functions",
    "install",
    "ready",
    "in_eval",
    "call",
]
FX_NAMES = ["code", "graph", "meta", "nodes", "recompile"]
STRANGE_NAMES = ["class", "None", "lambda", "\u017felf", "größe", "self", "w0", "1x", "with-dash", "with space"]
STRANGE_NAMES += ["en/de", "a'b", 'a"b', "a\\b", "[red]", "{x}", "%s", "*", "'] or quit() or ['", "#", "@"]


class Leaf(nn.Module):
    """A linear map, with a child, a parameter or a buffer for each name."""

    def __init__(self, names: Sequence[str], kind: str) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.names, self.kind = names, kind
        for name in names:
            tensor = torch.rand(4) + 0.5
            if kind == "module":
                self._modules[name] = nn.Linear(4, 4)
            elif kind == "parameter":
                self._parameters[name] = nn.Parameter(tensor)
            else:
                self._buffers[name] = tensor

    def forward(self, states: Tensor) -> Tensor:
        states = self.linear(states)
        for name in self.names:
            if self.kind == "module":
                states = states + self._modules[name](states)
            else:
                states = states * (self._parameters if self.kind == "parameter" else self._buffers)[name]
        return states


class Named(nn.Module):
    """A model that uses the names at its root, inside the modules of these names, and in two layers."""

    def __init__(self, names: Sequence[str], kind: str) -> None:
        super().__init__()
        self.names = names
        for name in names:
            self._modules[name] = Leaf([name], kind)
        self.layers = nn.ModuleList([Leaf(names, kind), Leaf(names, kind)])

    def forward(self, inputs: Tensor) -> Tensor:
        states = inputs
        for name in self.names:
            states = states + self._modules[name](states)
        for layer in self.layers:
            states = states + layer(states)
        return states


def model_with(names: Sequence[str], kind: str = "module") -> nn.Module:
    torch.manual_seed(0)
    return randomise(Named(names, kind), 0.1).eval().requires_grad_(False)


SPEC = {"adapt": [{"method": "lora", "rank": 2, "target": {"modules": "**.linear"}}]}


def adapted_with(names: Sequence[str], kind: str = "module") -> tuple[nn.Module, Any, Tensor]:
    """Return a model whose parts have these names, the same with LoRA, and inputs."""
    model, inputs = model_with(names, kind), torch.randn(3, 4)
    return model, graftc.compile(SPEC, model, (inputs,), cache=False).eval(), inputs


def check(names: Sequence[str], kind: str) -> None:
    """Check that outputs, `state_dict` and look-ups by name match the source.

    The model also has to train, to be copied and to merge.
    """
    model, adapted, inputs = adapted_with(names, kind)
    assert torch.equal(adapted(inputs), model(inputs))
    expected, every = model.state_dict(), adapted.full_state_dict()
    assert {n: t.data_ptr() for n, t in expected.items()}.items() <= {n: t.data_ptr() for n, t in every.items()}.items()
    for path, _ in model.named_modules():
        assert isinstance(adapted.get_submodule(path), nn.Module)
    for path, parameter in model.named_parameters():
        assert torch.equal(adapted.get_parameter(path), parameter)
    for path, buffer in model.named_buffers():
        assert torch.equal(adapted.get_buffer(path), buffer)
    perturb(adapted)
    adapted.train()
    adapted(inputs).sum().backward()
    assert all(p.grad is not None for p in adapted.parameters() if p.requires_grad)
    adapted.eval()
    again = copy.deepcopy(adapted).to("cpu")
    assert torch.equal(again(inputs), adapted(inputs))
    torch.testing.assert_close(adapted.merge()(inputs), adapted(inputs), atol=1e-5, rtol=1e-5)


KINDS = ("module", "parameter", "buffer")


EVERY = [*OWN_NAMES, *FX_NAMES, *STRANGE_NAMES]


@pytest.mark.full
@pytest.mark.parametrize("names, kind", [(EVERY[i::8], KINDS[i % 3]) for i in range(8)])
def test_any_name_will_do(names: list[str], kind: str) -> None:
    check(names, kind)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_modules_parameters_and_buffers(kind: str) -> None:
    check(["program", "code", "class", "merge", "_store", "blocks"], kind)


@pytest.mark.full
@pytest.mark.parametrize("exported", [True, False])
def test_saved_loaded_and_exported(exported: bool, tmp_path: Path) -> None:
    names = ["program", "save", "config", "_compilation", "tensors", "inputs"]
    model, adapted, inputs = adapted_with(names if exported else [*names, "class", "with space", "größe", "code"])
    perturb(adapted)
    path = adapted.save(tmp_path / "artifact")
    again = graftc.load(path, model, cache=False).eval()
    assert torch.equal(again(inputs), adapted(inputs))
    merged = adapted.merge()
    assert merged.save(tmp_path / "merged").exists()
    if exported:
        assert merged.export(tmp_path / "m.pt2", format="pt2").exists()


PUBLISHED = {name for cls in (Compiled, Merged) for name in vars(cls) if not name.startswith("_")}


def test_published_names_are_few_and_documented() -> None:
    """The names that take precedence over a child's are those of the documentation's table, and at most 20."""
    for cls, label in ((Compiled, "compiled"), (Merged, "merged")):
        own = {name for name in dir(cls) if not name.startswith("_") and name not in dir(nn.Module)}
        text = (ROOT / "docs" / "module.md").read_text(encoding="utf-8")
        (row,) = (line for line in text.splitlines() if line.startswith(f"| {label} |"))
        assert own == {word.strip("` ") for word in row.split("|")[2].split(",")}
        assert len(own) <= 20


@pytest.mark.parametrize("name", sorted({*OWN_NAMES} - {"call"}))
def test_attributes_are_children_but_for_published_names(name: str) -> None:
    """The classes alone decide whether an attribute is the child of that name, so nothing is compiled here."""
    root = Compiled.__new__(Compiled)
    nn.Module.__init__(root)
    child = nn.Linear(1, 1)
    root._modules[name] = child
    if name in PUBLISHED and hasattr(Compiled, name):
        assert root._modules[name] is child and name in vars(Compiled)
    else:
        assert getattr(root, name) is child


@pytest.mark.slow
def test_what_a_child_hides_is_the_runners() -> None:
    _, adapted, _ = adapted_with(["program"])
    assert isinstance(adapted.program, nn.Module)
    assert runner_of(adapted).program("eval").mode == "eval"
    _, other, _ = adapted_with(["plain"])
    assert other.program("eval").mode == "eval" and "program" in dir(other)
    with pytest.raises(AttributeError, match="nothing_of_the_kind"):
        _ = other.nothing_of_the_kind
    assert isinstance(runner_of(other), CompiledRunner)


@pytest.mark.parametrize("name", ["graftc", "_graftc"])
@pytest.mark.parametrize("kind", KINDS)
def test_reserved_names_are_refused(name: str, kind: str) -> None:
    with pytest.raises(GraftError, match=rf"GC030.*{name}"):
        adapted_with([name], kind)
