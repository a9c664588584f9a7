"""Cut a Program at the last hidden state: what training loops run that compute the head and the loss by themselves."""

from __future__ import annotations

from torch import fx

from graftc.passes.core.cleaning import remove_dead
from graftc.passes.core.program import OutputSpec, Program
from graftc.specs.diagnostics import GraftError

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
    found = [at for at, name in enumerate(names) for field in _FIELDS if name.startswith(f"{field}.")]
    if not found:
        raise GraftError("GC031", "the model returns no hidden states", hint="call the model itself")
    field = next(field for field in _FIELDS if any(name.startswith(f"{field}.") for name in names))
    last = max(at for at in found if names[at].startswith(f"{field}."))
    spec = OutputSpec("class", ("last_hidden_state",), (OutputSpec("leaf"),), outputs)
    made = program.copy(outputs=spec, entry="hidden")
    output = made.output_node
    (leaves,) = output.args
    assert isinstance(leaves, tuple | list)
    output.args = ((leaves[last],),)
    edits, made.edits = made.edits, []  # what was replaced behind the cut is not to stay
    remove_dead(made)
    left = set(made.graph.nodes)
    made.edits = [edit for edit in edits if _are_in(left, edit.before, edit.after)]
    names_left = {node.name for node in left}
    made.baseline = {name: held for name, held in made.baseline.items() if name in names_left}
    return made


def _are_in(left: set[fx.Node], *nodes: fx.Node) -> bool:
    return all(node in left for node in nodes)
