"""The diff shows a change once for all layers in which it is the same."""

from __future__ import annotations

import pytest

import graftc
from graftc.testing import families


def lines(text: str, mark: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith(mark)]


@pytest.mark.full
def test_identical_layers_are_collapsed_and_counted() -> None:
    spec = {"adapt": [{"method": "lora", "target": {"role": ["attn.q", "attn.v"]}, "rank": 4}]}
    text = graftc.compile(spec, families.bert(num_hidden_layers=4)).diff()
    assert lines(text, "@@") == ["@@ bert.encoder.layer.0 ... 3: 4 layers alike @@"]
    # Two sites with down, scale, up and add each.
    assert sum("+ lora (lora)" in line for line in lines(text, "+")) == 8
    # Only the readers of the two results change an argument.
    assert len(lines(text, "-")) <= 2


@pytest.mark.full
def test_layers_that_differ_are_shown_apart() -> None:
    spec = {"adapt": [{"method": "lora", "target": {"role": "attn.q", "layers": "0:2"}, "rank": 4}]}
    text = graftc.compile(spec, families.llama(num_hidden_layers=3)).diff()
    assert lines(text, "@@") == ["@@ model.layers.0 ... 1: 2 layers alike @@"]


@pytest.mark.slow
def test_no_change_is_an_empty_diff() -> None:
    from graftc.compiler.inspect.diff import diff_programs

    spec = {"adapt": [{"method": "lora", "target": {"role": "attn.q"}, "rank": 4}]}
    program = graftc.compile(spec, families.bert()).program(base=True)
    assert diff_programs(program, program.copy()) == ""


@pytest.mark.full
def test_training_graphs_collapse_too_and_layers_need_not_be_neighbours() -> None:
    """The input of the first layer is another kind of value than that of the next layer: both are ``%in``."""
    lora = {"method": "lora", "target": {"role": "attn.q", "layers": "::2"}, "rank": 4, "dropout": 0.1}
    text = graftc.compile({"adapt": [lora]}, families.bert(num_hidden_layers=5)).diff("train")
    assert lines(text, "@@") == ["@@ bert.encoder.layer.0,2,4: 3 layers alike @@"]
    assert "graftc.random_mask(%in, 0.1)" in text


@pytest.mark.full
def test_both_stacks_of_an_encoder_decoder_collapse() -> None:
    lora = {"method": "lora", "target": {"role": ["attn.q", "attn.v"]}, "rank": 4}
    text = graftc.compile({"adapt": [lora]}, families.t5(num_layers=3)).diff()
    assert lines(text, "@@") == [
        "@@ encoder.block.0 ... 2: 3 layers alike @@",
        "@@ decoder.block.0 ... 2: 3 layers alike @@",
    ]


@pytest.mark.full
def test_counts_are_those_of_the_graphs_and_names_are_unique() -> None:
    from graftc.compiler.inspect.diff import diff

    spec = {"adapt": [{"method": "lora", "target": {"role": ["attn.q", "attn.v"]}, "rank": 4}], "train": "classifier"}
    compiled = graftc.compile(spec, families.bert(num_hidden_layers=3))
    before, after = compiled.program(base=True), compiled.program()
    forward = diff(before, after)
    calls = [len([n for n in p.graph.nodes if n.op != "get_attr"]) for p in (before, after)]
    assert (forward.added, forward.removed) == (calls[1] - calls[0], 0)
    # Two views of each layer read the adapted projections; the classifier reads its trained copy.
    assert forward.changed == 2 * 3 + 1
    assert forward.text().splitlines()[0] == f"eval: {forward.added} nodes added, 0 removed, 7 read other values"
    for change in forward.changes:
        added = [line[1:].split(": ")[0] for line in change.lines if line[0] in "+ "]
        assert len(added) == len(set(added))
    back = diff(after, before)
    assert (back.added, back.removed, back.changed) == (0, forward.added, forward.changed)


@pytest.mark.slow
def test_an_inserted_value_never_takes_the_name_of_one_that_was_there() -> None:
    """Base values keep their numbers on both sides, so unchanged lines are not shown."""
    spec = {"adapt": [{"method": "lora", "target": {"role": "attn.v"}, "rank": 4}]}
    text = graftc.compile(spec, families.gpt2(n_layer=2)).diff()
    shown = [line[1:].split(": ")[0] for line in lines(text, "-")]
    assert shown == ["%view_1"]
