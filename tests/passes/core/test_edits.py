"""Edits and their index: look-ups match those of a plain list, at a cost independent of the number of edits."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import pytest
from torch import fx

from graftc.passes.core.ir.edits import Edit, Edits
from graftc.passes.core.ir.program import follow
from tests.kit.counting import calls

SITES = ("a", "b", "c")


def nodes(count: int) -> list[fx.Node]:
    """Return nodes that compute nothing."""
    graph = fx.Graph()
    return [graph.placeholder(f"x{number}") for number in range(count)]


class Plain:
    """A reference implementation on a plain list, which every look-up goes through."""

    def __init__(self) -> None:
        self.edits: list[Edit] = []

    def add(self, edit: Edit) -> None:
        if not edit.narrow:
            self.edits = [replace(e, before=edit.after) if e.before is edit.before else e for e in self.edits]
        self.edits.append(edit)

    def current(self, node: fx.Node, site: str | None) -> fx.Node:
        return follow(node, {e.before: e.after for e in self.edits if not e.narrow or e.site == site})

    def original(self, node: fx.Node) -> fx.Node:
        return follow(node, {e.after: e.before for e in self.edits})

    def unchanged_input(self, node: fx.Node, site: str) -> fx.Node:
        return follow(node, {e.after: e.before for e in self.edits if e.narrow and e.site == site})


def check(edits: Edits, plain: Plain, known: list[fx.Node]) -> None:
    """Check that every look-up gives the same result with both."""
    assert list(edits) == plain.edits
    for node in known:
        assert edits.original(node) is plain.original(node)
        for site in (None, *SITES):
            assert edits.current(node, site) is plain.current(node, site)
        for site in SITES:
            assert edits.unchanged_input(node, site) is plain.unchanged_input(node, site)


@pytest.mark.parametrize("seed", range(20))
def test_look_ups_are_those_of_a_list(seed: int) -> None:
    """Look-ups match after any replacements, at one site or everywhere, with look-ups in between."""
    draw = random.Random(seed)
    every = nodes(60)
    edits, plain, used = Edits(), Plain(), 6
    for _ in range(50):
        edit = Edit("one", draw.choice(SITES), draw.choice(every[:used]), every[used], draw.random() < 0.5)
        used += 1
        edits.add(edit)
        plain.add(edit)
        check(edits, plain, every[:used])
    check(Edits(edits), plain, every)


def test_wider_edits_of_one_node_are_put_below() -> None:
    """When a map that already has a result is replaced, the replacement goes below that result."""
    base, result, other, narrow = nodes(4)
    edits = Edits()
    edits.add(Edit("late", "a", base, result))
    edits.add(Edit("late", "b", base, narrow, narrow=True))
    edits.add(Edit("early", "a", base, other))
    assert [(e.before, e.after) for e in edits] == [(other, result), (other, narrow), (base, other)]
    assert edits.current(base) is result and edits.current(base, "b") is narrow
    assert edits.original(result) is base is edits.original(narrow)


def test_a_node_that_stands_elsewhere_already_can_take_a_place() -> None:
    """Remembered paths to the last node are discarded when two of them join."""
    one, two, three, four = nodes(4)
    edits, plain = Edits(), Plain()
    for edit in (Edit("x", "a", two, three), Edit("x", "a", one, four), Edit("y", "a", one, two)):
        edits.add(edit)
        plain.add(edit)
        check(edits, plain, [one, two, three, four])


def test_copies_have_their_own_index() -> None:
    """A copy refers to its own nodes, and neither of the two sees later edits of the other."""
    one, two, three, four = nodes(4)
    edits = Edits([Edit("x", "a", one, two)])
    copied = edits.mapped({one: three, two: four}.__getitem__)
    edits.add(Edit("x", "a", two, three))
    assert copied.current(three) is four and copied.current(one) is one and edits.current(one) is three


def stacked(count: int) -> Callable[[], None]:
    """Return a function that stacks adaptations at one place; each reads the current value and the site's input."""
    every = nodes(2 * count + 2)

    def work() -> None:
        edits = Edits()
        source, value = every[:2]
        for number in range(count):
            inside, after = every[2 * number + 2 : 2 * number + 4]
            edits.add(Edit(f"a{number}", "a", edits.unchanged_input(source, "a"), inside, narrow=True))
            edits.add(Edit(f"a{number}", "a", edits.current(value), after))
            edits.current(value, "a")

    return work


def test_stacking_is_linear() -> None:
    """Four times as many adaptations at one place cost four times as much, within 10%."""
    few, many = (calls(stacked(count)) for count in (125, 500))
    assert many <= 1.1 * 4 * few
