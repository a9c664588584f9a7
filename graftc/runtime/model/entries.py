"""Other ways into and out of a model that follow from its forward pass."""

from __future__ import annotations

from graftc.passes.core.ir.program import Program
from graftc.passes.core.ir.program_key import Entry
from graftc.passes.graph.cut import cut_at_hidden_state
from graftc.passes.graph.route_choices import route_choices

DERIVED: frozenset[Entry] = frozenset({"hidden", "routes"})
"""Those that `derived` knows."""


def derived(entry: Entry, program: Program) -> Program:
    """The Program of an entry in `DERIVED`, from that of the forward pass.

    Raises:
        GraftError: GC031 where the last hidden state is wanted and the model returns none.
    """
    if entry == "routes":
        return route_choices(program)
    from transformers.modeling_outputs import BaseModelOutput

    return cut_at_hidden_state(program, BaseModelOutput)
