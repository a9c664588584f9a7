"""Take adaptations out of a graph whose effect has gone into base tensors."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from torch import fx

from graftc.passes.core.ir.cleaning import remove_dead
from graftc.passes.core.ir.edits import Edit, Edits
from graftc.passes.core.ir.program import Program, follow


def take_out(program: Program, adaptations: Collection[str]) -> Program:
    """A new Program without the nodes of ``adaptations``: every replacement they made is taken back.

    The result reads the base's own tensors, so it computes the adapted function over a Store that holds folded ones.
    """
    result = program.copy(tensor_edits=program.tensor_edits.without(adaptations))
    kept: list[Edit] = []
    stands_for: dict[fx.Node, fx.Node] = {}
    for edit in reversed(result.edits):
        if edit.adaptation in adaptations:
            before = follow(edit.before, stands_for)
            edit.after.replace_all_uses_with(before)
            stands_for[edit.after] = before
        else:
            kept.append(edit)
    result.edits = Edits(replace(e, before=follow(e.before, stands_for)) for e in reversed(kept))
    remove_dead(result)
    return result
