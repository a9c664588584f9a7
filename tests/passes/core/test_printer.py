"""The canonical text: its form, and that it depends on the program alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from graftc.passes.core.ir.printer import format_around, format_program, structural_hash
from graftc.passes.core.ir.program import provenance
from tests.kit import warm
from tests.kit.models import fresh

GOLDEN = Path(__file__).with_name("bert_lora.check")
SPEC = {
    "adapt": [
        {"method": "lora", "name": "task", "target": {"role": "attn.q"}, "rank": 4, "alpha": 6, "dropout": 0.25},
    ]
}


@pytest.fixture(scope="module")
def bert() -> Any:
    """A tiny BERT with LoRA on its queries."""
    return fresh("bert", **SPEC)


def filecheck(text: str) -> subprocess.CompletedProcess[str]:
    """Compare a text with the golden one."""
    command = [sys.executable, "-m", "filecheck", str(GOLDEN)]
    return subprocess.run(command, input=text, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_golden_text(bert: Any) -> None:
    """The text has the golden structure; the contract has the matching numeric test."""
    result = filecheck(format_program(bert.program("train")))
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("%query.scale, @task", "%query.down, @task"),
        ("aten.mul.Tensor(%query.down, 1.5)", "aten.mul.Tensor(%query.down, 1.0)"),
        ("@task.bert.encoder.layer.0.attention.self.query.A", "@task.bert.encoder.layer.0.attention.self.key.A"),
        ("aten.add.Tensor(%query, %query.up)", "aten.add.Tensor(%query, %query)"),
    ],
)
def test_golden_text_tells_programs_apart(bert: Any, old: str, new: str) -> None:
    """The golden text detects a branch without its scale, with another factor, or whose result is lost."""
    text = format_program(bert.program("train"))
    assert old in text
    assert filecheck(text.replace(old, new, 1)).returncode != 0


def test_text_and_hash_do_not_depend_on_names_or_order(bert: Any) -> None:
    """Copies print alike; new names and another valid node order keep the hash, and another literal changes it."""
    program = bert.program("train")
    copied = program.copy()
    assert format_program(copied) == format_program(program)
    node = next(n for n in copied.graph.nodes if (provenance(n) or {}).get("part") == "up")
    first_user = min(node.users)
    node.name = "something_else"
    first_user.prepend(node)
    assert [n.name for n in copied.graph.nodes] != [n.name for n in program.graph.nodes]
    assert structural_hash(copied) == structural_hash(program)
    scale = next(n for n in copied.graph.nodes if (provenance(n) or {}).get("part") == "scale")
    scale.args = (scale.args[0], 1.25)
    assert structural_hash(copied) != structural_hash(program)
    assert len({structural_hash(bert.program(m, base=b)) for m in ("train", "eval") for b in (True, False)}) == 4


def test_operand_order_and_draws_count() -> None:
    """``a - b`` is not ``b - a``, and two dropouts of one value are two values."""
    import torch
    from torch import fx

    from graftc.passes.core.ir.printer import value_numbers
    from graftc.passes.core.ir.program import InputSpec, OutputSpec, Program

    def program(swap: bool) -> tuple[Program, fx.Node, fx.Node]:
        graph = fx.Graph()
        x, y = graph.placeholder("x"), graph.placeholder("y")
        for node in (x, y):
            node.meta["val"] = torch.empty(2)
        sub = graph.call_function(torch.ops.aten.sub.Tensor, (y, x) if swap else (x, y))
        drops = [graph.call_function(torch.ops.aten.dropout.default, (sub, 0.5, True)) for _ in range(2)]
        graph.output((graph.call_function(torch.ops.aten.add.Tensor, tuple(drops)),))
        inputs = tuple(InputSpec(name, torch.float32, (2,)) for name in "xy")
        return Program(graph, inputs, OutputSpec("tuple", (), (OutputSpec("leaf"),))), drops[0], drops[1]

    one, first, second = program(False)
    numbers = value_numbers(one)
    assert numbers[first] != numbers[second]
    assert structural_hash(one) == structural_hash(program(False)[0])
    assert structural_hash(one) != structural_hash(program(True)[0])


def test_around_a_node(bert: Any) -> None:
    """An error shows the marked node among its neighbours."""
    program = bert.program("train")
    node = next(n for n in program.graph.nodes if (provenance(n) or {}).get("part") == "up")
    lines = format_around(program, node, context=2).splitlines()
    assert len(lines) == 5
    assert lines[2].startswith("> %query.up")
    assert all(line.startswith("  %") for line in lines[:2] + lines[3:])
    assert [line[2:] for line in lines] == [
        line for line in format_program(program).splitlines() if any(line == other[2:] for other in lines)
    ]


SCRIPT = """
import graftc
from graftc.passes.core.ir.printer import format_program, structural_hash
from tests.passes.core.test_printer import SPEC
from graftc.testing.families import tiny
program = graftc.compile(SPEC, tiny("bert")).program("train")
print(structural_hash(program))
print(format_program(program), end="")
"""


@pytest.mark.full
def test_the_same_in_every_process(bert: Any) -> None:
    """Another process with another hash seed and without a cache prints the same text and hash as this one."""
    program = bert.program("train")
    expected = f"{structural_hash(program)}\n{format_program(program)}"
    assert warm.output(SCRIPT, GRAFTC_CACHE="off") == expected
