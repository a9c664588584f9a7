"""Functions: a graph with calls is the graph of all its layers, written more compactly."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import pytest
import torch

from graftc.compiler.capture.capture import Capture, capture
from graftc.compiler.capture.capture_cache import keep, lookup
from graftc.compiler.capture.request import CaptureRequest
from graftc.passes.core.ir.edits import Edit
from graftc.passes.core.ir.functions import call, calls, cut, inlined, split
from graftc.passes.core.ir.printer import format_program, structural_hash
from graftc.passes.core.ir.program import Program
from graftc.passes.core.ir.stored.serialise import SerialisationError, program_from_json, program_to_json
from graftc.testing.families import tiny

DEPTH = 7
FAMILIES = ("llama", "bert", "t5", "gpt2", "vit")


@cache
def captured(family: str, *, alike: bool = True, layers: int = DEPTH) -> Capture:
    return capture(CaptureRequest.of(tiny(family, layers=layers)), alike=alike)


def described(program: Program) -> list[Any]:
    """Return everything that defines a graph, except the names of its nodes."""
    tensors = [str(node.target) for node in program.graph.find_nodes(op="get_attr")]
    steps = [(entry.step, entry.added, entry.removed) for entry in program.history]
    return [structural_hash(program), format_program(program), tensors, steps, program.inputs, program.outputs]


@pytest.mark.full
@pytest.mark.sample("vit")
@pytest.mark.parametrize("family", FAMILIES)
def test_with_every_layer_written_out_it_is_what_tracing_every_layer_gives(family: str) -> None:
    with_calls, every = captured(family), captured(family, alike=False)
    layer_calls = calls(with_calls.traced.graph)
    assert len(layer_calls) >= DEPTH - 4
    assert len(with_calls.traced.graph.nodes) < len(every.program.graph.nodes)
    assert described(with_calls.program) == described(every.program)


@pytest.mark.full
def test_one_more_layer_adds_a_call_and_what_picks_its_result() -> None:
    fewer, more = (captured("llama", layers=n).traced.graph for n in (DEPTH, DEPTH + 1))
    assert len(more.nodes) == len(fewer.nodes) + 2
    assert len(calls(more)) == len(calls(fewer)) + 1


def test_layers_that_become_different_get_bodies_of_their_own() -> None:
    base = captured("llama").traced
    (body,) = {one.body for one in calls(base.graph)}
    first, second, third, *_ = [one.path for one in calls(base.graph)]
    divided = split(base, {body: [[body, second], [first, third]]})
    assert {(one.path, one.body) for one in calls(divided.graph)} > {(second, body), (third, first)}
    assert first not in {one.path for one in calls(divided.graph)}
    assert described(inlined(divided))[:2] == described(captured("llama").program)[:2]
    assert calls(base.graph)[0].path == first


@pytest.mark.full
def test_cutting_calls_out_leaves_a_graph_as_it_was() -> None:
    program = captured("t5").traced
    before = format_program(program)
    with pytest.raises(ZeroDivisionError), cut(program.graph):
        assert all(not one.given for one in calls(program.graph))
        assert format_program(program) != before
        raise ZeroDivisionError
    assert format_program(program) == before
    program.graph.lint()


def test_a_program_that_is_adapted_is_not_written_out_by_itself() -> None:
    program = captured("llama").traced.copy()
    first = next(node for node in program.graph.nodes if node.op == "call_function")
    program.edits.add(Edit("lora", "somewhere", first, first.next))
    with pytest.raises(ValueError, match="cannot be written out"):
        inlined(program)


class TestFiles:
    def test_calls_come_back_where_they_may(self) -> None:
        program = captured("bert").traced
        data = json.loads(json.dumps(program_to_json(program)))
        again = program_from_json(data, torch.device("cpu"), called=True)
        assert described(inlined(again))[:3] == described(captured("bert").program)[:3]
        with pytest.raises(SerialisationError, match="function"):
            program_from_json(data, torch.device("cpu"))

    @pytest.mark.parametrize(
        "change",
        [
            lambda args: args.pop(),
            lambda args: args[2].append(args[2][0]),
            lambda args: args.__setitem__(0, ""),
            lambda args: args.__setitem__(1, 3),
            lambda args: args.__setitem__(4, []),
            lambda args: args.__setitem__(3, [1.0] * len(args[3])),
        ],
        ids=["too few", "unequal", "no path", "a number for a path", "nothing made", "numbers for values"],
    )
    def test_calls_that_are_none_are_refused(self, change: Any) -> None:
        data = json.loads(json.dumps(program_to_json(captured("bert").traced)))
        entry = next(node for node in data["nodes"] if node["target"] == "graftc.call")
        change(entry["args"]["tuple"])
        with pytest.raises(SerialisationError):
            program_from_json(data, torch.device("cpu"), called=True)

    @pytest.mark.slow
    def test_the_cache_keeps_calls(self, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("GRAFTC_CACHE", str(tmp_path))
        request = CaptureRequest.of(tiny("llama", layers=DEPTH))
        keep(request, captured("llama"))
        cached = lookup(request)
        assert cached is not None
        assert len(calls(cached.traced.graph)) == len(calls(captured("llama").traced.graph))
        assert described(cached.program) == described(captured("llama").program)


def test_a_call_by_itself_gives_values_of_the_right_types() -> None:
    values = [torch.ones(2), torch.ones(3)]
    assert call("a.1", "a.0", [], [], values) == values
