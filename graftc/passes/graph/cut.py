"""Cut a Program at the last hidden state: what training loops run that compute the head and the loss by themselves."""

from __future__ import annotations

from graftc.passes.core.ir.cleaning import remove_dead
from graftc.passes.core.ir.edits import Edits
from graftc.passes.core.ir.program import OutputSpec, Program
from graftc.specs.errors.diagnostics import GraftError

FLAG = "output_hidden_states"
"""The flag with which models return the values between their layers, the last hidden state at the end."""

_FIELDS = ("decoder_hidden_states", "hidden_states")


def cut_at_hidden_state(program: Program, outputs: type) -> Program:
    """The Program as far as its last hidden state, ``[batch, sequence, hidden]``.

    Args:
        program: one that returns hidden states.
        outputs: class of the result, with a field ``last_hidden_state``.

    Raises:
        GraftError: GC031 where there are none among the outputs.
    """
    names = program.outputs.names
    found = ([at for at, name in enumerate(names) if name.startswith(f"{field}.")] for field in _FIELDS)
    states = next((places for places in found if places), None)
    if states is None:
        raise GraftError("GC031", "the model returns no hidden states", hint="call the model itself")
    spec = OutputSpec("class", ("last_hidden_state",), (OutputSpec("leaf"),), outputs)
    # It is run and nothing else: what edits replaced behind the cut is not to stay.
    made = program.copy(outputs=spec, entry="hidden", edits=Edits(), baseline={})
    (leaves,) = made.output_node.args
    assert isinstance(leaves, tuple | list)
    made.output_node.args = ((leaves[states[-1]],),)
    remove_dead(made)
    return made
