"""Programs as JSON: everything is restored, and a file can only name what is allowed."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch

from graftc.compiler.capture.capture import capture
from graftc.compiler.capture.request import CaptureRequest
from graftc.passes.core.ir.codegen import function_of
from graftc.passes.core.ir.printer import format_program, structural_hash
from graftc.passes.core.ir.stored.serialise import SerialisationError, program_from_json, program_to_json
from graftc.testing import same_bits
from graftc.testing.compare import inputs_for
from graftc.testing.families import FAMILIES
from tests.kit.models import fresh
from tests.kit.specs import lora

CPU = torch.device("cpu")


def with_dropout(family: str) -> Any:
    """Return a tiny model with LoRA and dropout."""
    role, dropout = (["attn.q", "experts"], 0.0) if family == "mixtral" else (["attn.q", "ffn.down"], 0.1)
    return fresh(family, lora(role, rank=4, dropout=dropout))


@pytest.mark.slow
@pytest.mark.sample("mixtral")
@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip(family: str) -> None:
    """Text, hash, interface and provenance survive a round trip through JSON, whose text is stable."""
    compiled = with_dropout(family)
    for mode in ("train", "eval"):
        program = compiled.program(mode)
        text = json.dumps(program_to_json(program))
        again = program_from_json(json.loads(text), CPU)
        assert format_program(again) == format_program(program)
        assert structural_hash(again) == structural_hash(program)
        assert (again.inputs, again.outputs, again.mode, again.entry) == (
            program.inputs,
            program.outputs,
            program.mode,
            program.entry,
        )
        assert json.dumps(program_to_json(again)) == text


@pytest.mark.full
def test_flags_and_ranges_come_back() -> None:
    """The rest of a signature is restored: constants of the graph, and the sizes that it holds for."""
    from transformers import MambaConfig, MambaForCausalLM

    model = MambaForCausalLM(MambaConfig(hidden_size=16, num_hidden_layers=1, vocab_size=50))
    program = capture(CaptureRequest.of(model, flags=(("logits_to_keep", 2), ("output_hidden_states", True)))).program
    again = program_from_json(json.loads(json.dumps(program_to_json(program))), CPU)
    assert again.flags == program.flags == (("logits_to_keep", 2), ("output_hidden_states", True))
    assert again.inputs == program.inputs
    assert program.inputs[0].shape == ("batch", 7) and program.inputs[0].ranges == ((0, None), (7, 7))


@pytest.mark.slow
def test_what_comes_back_runs() -> None:
    """The graph from the file computes bit-identical results from the same tensors."""
    compiled = with_dropout("bert")
    compiled.eval()
    program = compiled.program("eval")
    again = program_from_json(json.loads(json.dumps(program_to_json(program))), CPU)
    inputs = [inputs_for(compiled)[name] for name in program.signature]
    first, second = (function_of(p.graph, compiled, CPU)(compiled, *inputs) for p in (program, again))
    assert same_bits(list(first), list(second))


def _call(data: dict[str, Any]) -> dict[str, Any]:
    return next(node for node in data["nodes"] if node["op"] == "call_function")


def _target(text: str) -> Callable[[dict[str, Any]], None]:
    return lambda data: _call(data).update(target=text)


def _argument(value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda data: _call(data).update(args=[value])


def _size(text: str) -> Callable[[dict[str, Any]], None]:
    return lambda data: data["types"].insert(0, {"dtype": "f32", "shape": [text]})


def _output_class(text: str) -> Callable[[dict[str, Any]], None]:
    return lambda data: data["outputs"].update({"class": text})


def _named(op: str, key: str, value: str) -> Callable[[dict[str, Any]], None]:
    return lambda data: next(node for node in data["nodes"] if node["op"] == op).update({key: value})


def _input(text: str) -> Callable[[dict[str, Any]], None]:
    def change(data: dict[str, Any]) -> None:
        last = [node for node in data["nodes"] if node["op"] == "placeholder"][-1]
        last["target"] = data["inputs"][-1]["name"] = text

    return change


def _without(key: str) -> Callable[[dict[str, Any]], None]:
    return lambda data: data.pop(key) and None


PAYLOAD = "__import__('builtins').setattr(__import__('torch'), 'hostile', 1)"

HOSTILE: dict[str, Callable[[dict[str, Any]], None]] = {
    "operator of os": _target("os.system"),
    "builtin": _target("builtins.eval"),
    "operator module": _target("operator.attrgetter"),
    "attribute of the namespace": _target("aten.__class__.__init__"),
    "no overload": _target("aten.linear"),
    "unknown overload": _target("aten.linear.nonsense"),
    "namespace": _target("prim.Print.default"),
    "call of a method": lambda data: _call(data).update(op="call_method", target="backward"),
    "call of a module": lambda data: _call(data).update(op="call_module", target="bert"),
    "input that is code": _input(f"x={PAYLOAD}"),
    "input that is a keyword": _input("lambda"),
    "tensor of two lines": _named("get_attr", "target", f"a\n{PAYLOAD}"),
    "tensor of a hidden attribute": _named("get_attr", "target", "__class__"),
    "keyword that is code": lambda data: _call(data).update(kwargs={f"x={PAYLOAD}, y": 1}),
    "size that is code": _size(PAYLOAD),
    "size that is an attribute": _size("().__class__"),
    "size that is a comparison": _size("s0 < 3"),
    "size without end": _size("9**9**9**9"),
    "size of great length": _size("s0" + "+s0" * 100_000),
    "size of great depth": _size("-" * 2_000 + "s0"),
    "size by zero": _size("FloorDiv(3, 0)"),
    "size that is not one": _size("1 +"),
    "size that is a number": _size(3),  # type: ignore[arg-type]
    "output class of os": _output_class("os:PathLike"),
    "output class that is not an output": _output_class("transformers.trainer:Trainer"),
    "output class in a path": _output_class("transformers.utils:ModelOutput.from_dict"),
    "output class that is not there": _output_class("transformers.nonsense:Nothing"),
    "argument from ahead": _argument({"node": 10_000}),
    "argument from behind": _argument({"node": -1}),
    "argument of an unknown kind": _argument({"pickle": "gASV"}),
    "argument of two kinds": _argument({"node": 0, "tuple": []}),
    "unknown element type": _argument({"dtype": "object"}),
    "no nodes": _without("nodes"),
    "no types": _without("types"),
    "another schema": lambda data: data.update(schema=99),
    "nodes that are none": lambda data: data.update(nodes=[1, 2]),
    "types that are none": lambda data: data.update(types="f32"),
}


@pytest.fixture(scope="module")
def harmless() -> dict[str, Any]:
    """The JSON of a valid program."""
    data: dict[str, Any] = json.loads(json.dumps(program_to_json(with_dropout("bert").program("eval"))))
    return data


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_file(name: str, harmless: dict[str, Any]) -> None:
    """It is refused with one kind of error, at once, before anything in it runs."""
    data = copy.deepcopy(harmless)
    HOSTILE[name](data)
    assert data != harmless
    with pytest.raises(SerialisationError):
        program_from_json(data, CPU)
    assert not hasattr(torch, "hostile")


@pytest.mark.parametrize("data", [[], None, "program", {}])
def test_no_program(data: Any) -> None:
    """Data that is not a program's mapping is refused with the same error."""
    with pytest.raises(SerialisationError):
        program_from_json(data, CPU)


@pytest.mark.slow
def test_only_known_operators_are_written() -> None:
    """A program with any other operator is not written at all, rather than written in part."""
    program = with_dropout("bert").program("eval").copy()
    node = next(n for n in program.graph.nodes if n.op == "call_function")
    node.target = print
    with pytest.raises(SerialisationError, match=node.name):
        program_to_json(program)
