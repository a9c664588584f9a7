"""The pipelines as printed: which passes there are, in order, and what each declares.

GRAFTC_UPDATE_GOLDEN=1 writes the text that is compared.
"""

from __future__ import annotations

import os

import pytest
import torch

import graftc
from graftc.compiler.adapt.base import GATHER
from graftc.compiler.adapting import ADAPT, EVAL
from graftc.compiler.compilation import Compilation
from graftc.passes.core.ir.program import Program
from graftc.passes.core.pipeline import Log, Pass, PassGroup, Pipeline
from graftc.passes.lowering.lower import LOWER
from graftc.specs.errors.diagnostics import GraftError
from graftc.testing.families import tiny
from tests.kit.places import GOLDEN

PIPELINES = GOLDEN / "pipelines.txt"


def test_they_are_as_printed() -> None:
    text = "\n\n".join(map(str, (ADAPT, EVAL, GATHER, LOWER))) + "\n"
    if os.environ.get("GRAFTC_UPDATE_GOLDEN") == "1":
        PIPELINES.write_text(text, encoding="utf-8")
    assert text == PIPELINES.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def compilation() -> Compilation:
    return graftc.compile(
        {"adapt": [{"method": "lora", "rank": 2, "target": {"role": "attn.q"}}]}, tiny("bert")
    ).compilation


def nothing(program: Program, context: Compilation) -> None:
    """Leave a Program unchanged."""


def test_a_pipeline_keeps_the_history(compilation: Compilation) -> None:
    def erase(program: Program, context: Compilation) -> None:
        program.graph.erase_node(added[0])

    added = []

    def add(program: Program, context: Compilation) -> None:
        with program.graph.inserting_after(program.placeholders()[-1]):
            added.append(program.graph.call_function(torch.ops.aten.relu.default, (program.placeholders()[0],)))

    program = compilation.program("train").copy()
    pipeline: Pipeline[Compilation] = Pipeline(
        "test",
        [
            Pass("look", nothing, rewrites=False),
            Pass("add", add, ensures={"more"}),
            Pass("unwanted", nothing, wanted=lambda program, context: False),
            Pass("erase", erase, "more", verified=True),
        ],
    )
    log = Log()
    assert pipeline.run(program, compilation, log) is program
    assert [(e.step, e.added, e.removed) for e in log.entries] == [
        ("look", 0, 0),
        ("add", 1, 0),
        ("erase", 0, 1),
        ("verify", 0, 0),
    ]
    (name,) = log.entries[1].changes.inserted  # type: ignore[union-attr]
    assert list(log.entries[2].changes.erased) == [name]  # type: ignore[union-attr]
    assert [str(each) for each in pipeline][1] == "add (rewrites; ensures more)"


def test_a_group_is_verified_one_by_one_at_first(compilation: Compilation) -> None:
    every = [Pass(f"pass {number}", nothing) for number in range(6)]
    group = PassGroup[Compilation]("all", lambda program, context: every, each=2)
    log = Log()
    Pipeline("test", [group]).run(compilation.program("train").copy(), compilation, log)
    assert [entry.step for entry in log.entries] == [
        *("pass 0", "verify", "pass 1", "verify", "pass 2", "pass 3", "pass 4", "pass 5", "verify")
    ]


def test_the_pass_that_breaks_a_graph_is_named(compilation: Compilation) -> None:
    def breaks(program: Program, context: Compilation) -> None:
        node = program.graph.find_nodes(op="call_function", target=torch.ops.aten.tanh.default)[0]
        node.replace_all_uses_with(node.args[0])

    pipeline = Pipeline("test", [Pass("fine", nothing, verified=True), Pass("breaks", breaks, verified=True)])
    with pytest.raises(GraftError, match=r"GC040: after breaks at .*: a node of the base was changed"):
        pipeline.run(compilation.program("train").copy(), compilation)


def test_what_a_pass_requires_comes_before_it() -> None:
    first, second = Pass[Compilation]("first", nothing, ensures={"a"}), Pass[Compilation]("second", nothing, {"a"})
    assert [each.name for each in Pipeline("test", [first, second])] == ["first", "second"]
    assert [each.name for each in Pipeline("test", [first, second]).without(["second"])] == ["first"]
    with pytest.raises(GraftError, match="'second' requires 'a', which no pass before it ensures") as caught:
        Pipeline("test", [second, first])
    assert caught.value.hint == "place it after 'first'"
    with pytest.raises(GraftError, match="two passes with the same name"):
        Pipeline("test", [first, first])
    assert [each.name for each in Pipeline("test", [second], given={"a"})] == ["second"]
