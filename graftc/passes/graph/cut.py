"""Cut a Program at the last hidden state, for training loops that compute the head and the loss themselves."""

from __future__ import annotations

from graftc.passes.core.ir.cleaning import remove_dead
from graftc.passes.core.ir.edits import Edits
from graftc.passes.core.ir.program import OutputSpec, Program
from graftc.specs.errors.diagnostics import GraftError

FLAG = "output_hidden_states"
"""The flag with which models return the values between their layers, ending with the last hidden state."""

_FIELDS = ("decoder_hidden_states", "hidden_states")


def cut_at_hidden_state(program: Program, outputs: type) -> Program:
    """Return the Program up to its last hidden state, ``[batch, sequence, hidden]``.

    Args:
        program: a Program that returns hidden states.
        outputs: the class of the result, with a field ``last_hidden_state``.

    Raises:
        GraftError: GC031 if the outputs contain no hidden states.
    """
    names = program.outputs.names
    candidates = ([at for at, name in enumerate(names) if name.startswith(f"{field}.")] for field in _FIELDS)
    states = next((places for places in candidates if places), None)
    if states is None:
        raise GraftError("GC031", "the model returns no hidden states", hint="call the model itself")
    spec = OutputSpec("class", ("last_hidden_state",), (OutputSpec("leaf"),), outputs)
    # The result is only run, so nodes that edits have replaced after the cut need not be kept.
    result = program.copy(outputs=spec, entry="hidden", edits=Edits(), baseline={})
    (leaves,) = result.output_node.args
    assert isinstance(leaves, tuple | list)
    result.output_node.args = ((leaves[states[-1]],),)
    remove_dead(result)
    return result
