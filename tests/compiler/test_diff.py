"""The diff shows a change once for all layers that it is the same in."""

from __future__ import annotations

import graftc
from tests import families


def lines(text: str, mark: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith(mark)]


def test_identical_layers_are_collapsed_and_counted() -> None:
    spec = {"adapt": [{"method": "lora", "target": {"role": ["attn.q", "attn.v"]}, "rank": 4}]}
    text = graftc.compile(spec, families.bert(num_hidden_layers=4)).diff()
    assert lines(text, "@@") == ["@@ bert.encoder.layer.0 ... 3: 4 layers alike @@"]
    # Two sites, each down, scale, up and add.
    assert sum("+ lora (lora)" in line for line in lines(text, "+")) == 8
    # What reads the two results changes its argument, nothing else does.
    assert len(lines(text, "-")) <= 2


def test_layers_that_differ_are_shown_apart() -> None:
    spec = {"adapt": [{"method": "lora", "target": {"role": "attn.q", "layers": "0:2"}, "rank": 4}]}
    text = graftc.compile(spec, families.llama(num_hidden_layers=3)).diff()
    assert lines(text, "@@") == ["@@ model.layers.0 ... 1: 2 layers alike @@"]


def test_no_change_is_an_empty_diff() -> None:
    from graftc.compiler.diff import diff_programs

    spec = {"adapt": [{"method": "lora", "target": {"role": "attn.q"}, "rank": 4}]}
    program = graftc.compile(spec, families.bert()).program(base=True)
    assert diff_programs(program, program.copy()) == ""
