"""Every rule of the verifier catches a violation planted for it, and names the pass and the node."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx

import graftc
from graftc.passes.core.ir.edits import Edit
from graftc.passes.core.ir.program import Program, provenance
from graftc.passes.core.ir.verify import verify
from graftc.passes.core.weights.store import Store
from graftc.specs.errors.diagnostics import GraftError
from graftc.testing import perturb
from tests.kit.models import fresh
from tests.kit.specs import lora

aten = torch.ops.aten
Plant = Callable[[Program], fx.Node | None]


@pytest.fixture(scope="module")
def compilation() -> Any:
    """A tiny BERT with LoRA on two roles; its Programs are copied, never changed."""
    return fresh("bert", lora(["attn.q", "ffn.down"], rank=4)).compilation


@pytest.fixture
def program(compilation: Any) -> Program:
    """A copy of the adapted train Program."""
    return compilation.program("train").copy()


def inserted(program: Program, part: str) -> fx.Node:
    """Return the first node that is this part of an adaptation."""
    return next(n for n in program.graph.nodes if n.op == "call_function" and (provenance(n) or {}).get("part") == part)


def base_call(program: Program, target: Any) -> fx.Node:
    """Return the first call of the base with this operator."""
    return next(n for n in program.graph.nodes if n.target is target and provenance(n) is None)


def tensor_missing(program: Program) -> fx.Node:
    node = program.graph.find_nodes(op="get_attr")[0]
    node.target = "bert.nowhere"
    return node


def tensor_of_another_shape(program: Program) -> fx.Node:
    node = next(n for n in program.graph.find_nodes(op="get_attr") if str(n.target).endswith(".A"))
    node.meta["val"] = node.meta["val"].t()
    return node


def tensor_of_another_type(program: Program) -> fx.Node:
    node = next(n for n in program.graph.find_nodes(op="get_attr") if str(n.target).endswith(".A"))
    node.meta["val"] = node.meta["val"].double()
    return node


def read_before_it_is_made(program: Program) -> None:
    node = inserted(program, "add")
    node.append(inserted(program, "up"))


def input_gone(program: Program) -> None:
    node = program.placeholders()[1]
    ones = torch.ops.aten.ones_like.default
    with program.graph.inserting_after(program.placeholders()[0]):
        other = program.graph.call_function(ones, (program.placeholders()[0],))
    other.meta = {**node.meta, "custom": inserted(program, "up").meta["custom"]}
    node.replace_all_uses_with(other)
    program.graph.erase_node(node)


def input_renamed(program: Program) -> None:
    program.placeholders()[0].target = "tokens"


def output_twice(program: Program) -> fx.Node:
    output = program.output_node
    output.args = (output.args[0] * 2,)
    return output


def literal_changed(program: Program) -> fx.Node:
    node = base_call(program, aten.layer_norm.default)
    node.args = (*node.args[:4], 1e-3, *node.args[5:])
    return node


def wired_past(program: Program) -> fx.Node:
    node = base_call(program, aten.tanh.default)
    source = node.args[0]
    node.args = (source.args[0],)
    return node


def rerouted_without_an_edit(program: Program) -> fx.Node:
    node = base_call(program, aten.gelu.default)
    scale = inserted(program, "up")
    source = node.args[0]
    with program.graph.inserting_before(node):
        other = program.graph.call_function(aten.mul.Tensor, (source, 2.0))
    other.meta = {"val": source.meta["val"], "module": "", "custom": scale.meta["custom"]}
    node.args = (other,)
    return node


def base_call_gone(program: Program) -> None:
    node = base_call(program, aten.tanh.default)
    with program.graph.inserting_after(node):
        other = program.graph.call_function(aten.relu.default, (node.args[0],))
    other.meta = {**node.meta, "custom": inserted(program, "up").meta["custom"]}
    node.replace_all_uses_with(other)
    program.edits.add(Edit("lora", "", node, other))
    program.graph.erase_node(node)


def nobody_inserted_it(program: Program) -> fx.Node:
    node = inserted(program, "scale")
    del node.meta["custom"]
    return node


def replacement_of_another_type(program: Program) -> fx.Node:
    node = inserted(program, "add")
    node.meta["val"] = node.meta["val"].to(torch.float64)
    return node


def replacement_of_another_shape(program: Program) -> fx.Node:
    node = inserted(program, "add")
    node.meta["val"] = inserted(program, "down").meta["val"]
    return node


CASES: dict[str, tuple[Plant, str]] = {
    "tensor missing": (tensor_missing, "bert.nowhere is not in the Store"),
    "tensor of another shape": (tensor_of_another_shape, "in the Store, but not in the graph"),
    "tensor of another type": (tensor_of_another_type, "in the Store, but not in the graph"),
    "order": (read_before_it_is_made, "the graph is malformed"),
    "input gone": (input_gone, "the inputs must be"),
    "input renamed": (input_renamed, "got ('tokens'"),
    "output twice": (output_twice, "must have 1 outputs, got 2"),
    "literal of the base changed": (literal_changed, "a node of the base was changed"),
    "base wired past a node": (wired_past, "a node of the base was changed"),
    "rerouted without an edit": (rerouted_without_an_edit, "a node of the base was changed"),
    "call of the base gone": (base_call_gone, "nodes of the base are missing: tanh"),
    "no provenance": (nobody_inserted_it, "an inserted node has no provenance"),
    "replacement of another type": (replacement_of_another_type, "'lora' replaced torch.float32"),
    "replacement of another shape": (replacement_of_another_shape, "'lora' replaced torch.float32"),
}


@pytest.mark.parametrize("name", CASES)
def test_planted_violation(name: str, program: Program, compilation: Any) -> None:
    """The error is GC040 and names the pass and the node, with the graph around it."""
    plant, message = CASES[name]
    verify(program, compilation.store, "nothing", types=True)
    node = plant(program)
    with pytest.raises(GraftError) as error:
        verify(program, compilation.store, "the pass in question")
    assert error.value.code == "GC040"
    assert "after the pass in question" in error.value.message
    assert message in error.value.message
    if node is not None:
        assert f"at {node.name}:" in error.value.message
        if node.op != "get_attr":
            (around,) = error.value.details
            assert "\n> " in f"\n{around}"


@pytest.mark.parametrize("part", ["down", "scale", "up"])
def test_wrong_value_of_an_inserted_node(part: str, program: Program, compilation: Any) -> None:
    """A node whose recorded type differs from the computed one is caught by the full check only."""
    node = inserted(program, part)
    value = node.meta["val"]
    node.meta["val"] = value.new_empty(*value.shape[:-1], value.shape[-1] + 1)
    verify(program, compilation.store, "some pass")
    with pytest.raises(GraftError) as error:
        verify(program, compilation.store, "some pass", types=True)
    assert error.value.code == "GC040"
    assert "the graph declares" in error.value.message


def test_call_that_cannot_run(program: Program, compilation: Any) -> None:
    """An inserted node whose arguments do not fit together is named in the error."""
    down, up = inserted(program, "down"), inserted(program, "up")
    down.args, up.args = (down.args[0], up.args[1]), (up.args[0], down.args[1])
    with pytest.raises(GraftError) as error:
        verify(program, compilation.store, "some pass", types=True)
    assert error.value.code == "GC040"
    assert down.name in error.value.message


@pytest.mark.parametrize("how", ["detached", "unread"])
def test_no_gradient_path(how: str, program: Program, compilation: Any) -> None:
    """A trainable tensor that reaches no output, or only past a ``detach``, raises GC023 with its name."""
    up = inserted(program, "up")
    if how == "detached":
        add = inserted(program, "add")
        with program.graph.inserting_after(up):
            cut = program.graph.call_function(aten.detach.default, (up,))
        cut.meta = dict(up.meta)
        add.replace_input_with(up, cut)
    else:
        add = inserted(program, "add")
        add.replace_input_with(up, add.args[0])
    with pytest.raises(GraftError) as error:
        verify(program, compilation.store, "some pass")
    assert error.value.code == "GC023"
    assert "attention.self.query.graftc.lora." in error.value.message


class Scaling(torch.nn.Module):
    """A model that writes the result of a map into a slice of a value, in place, and uses it nowhere else."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(6, 6) for _ in range(2))
        self.head = torch.nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            y = x.clone()
            y[..., :4] *= layer(x)[..., :4]
            x = y
        logits: torch.Tensor = self.head(x)
        return logits


def test_a_gradient_path_may_lead_through_a_write_in_place() -> None:
    model, x = Scaling(), torch.randn(3, 6)
    spec = {"adapt": [{"method": "lora", "rank": 2, "target": {"modules": "layers.*"}}]}
    compiled = graftc.compile(spec, model, (x,), cache=False)
    perturb(compiled)
    compiled(x).square().sum().backward()
    assert all(float(p.grad.abs().max()) > 0 for p in compiled.parameters() if p.requires_grad and p.grad is not None)
    assert sum(p.grad is not None for p in compiled.parameters()) == 4


def test_every_program_of_the_compilation_is_held(compilation: Any) -> None:
    """Both modes verify against their own base, and neither verifies against a Store without its tensors."""
    for program in (compilation.program("train"), compilation.program("eval")):
        verify(program, compilation.store, "nothing", types=True)
        with pytest.raises(GraftError, match="not in the Store"):
            verify(program, Store(), "nothing")
