"""Derive Programs from others when a call first needs them."""

from __future__ import annotations

from graftc.compiler.compilation import Compilation
from graftc.passes.core.ir.eval_mode import to_eval
from graftc.passes.core.ir.program import Program
from graftc.passes.core.ir.program_key import Entry, ProgramKey, Stage
from graftc.passes.core.ir.verify import record_baseline, verify
from graftc.passes.graph.cut import cut_at_hidden_state
from graftc.passes.graph.route_choices import route_choices
from graftc.specs.errors.diagnostics import GraftError


def program_of(compilation: Compilation, key: ProgramKey) -> Program:
    """Return the Program of a key, deriving it if the Compilation does not have it yet.

    Raises:
        GraftError: GC043 if modules are in different modes but the eval graph was not derived from the train graph.
    """
    program = compilation.written_out(key)
    return _mixed(compilation, key) if program is None else program


FROM_FORWARD: frozenset[Entry] = frozenset({"hidden", "routes"})
"""Entries whose Programs are derived from the forward pass's Program."""


def entered(entry: Entry, program: Program) -> Program:
    """Derive the Program of an entry in `FROM_FORWARD` from the forward pass's Program.

    Raises:
        GraftError: GC031 if the last hidden state is requested and the model returns none.
    """
    if entry == "routes":
        return route_choices(program)
    from transformers.modeling_outputs import BaseModelOutput

    return cut_at_hidden_state(program, BaseModelOutput)


def _mixed(compilation: Compilation, key: ProgramKey) -> Program:
    """Return the train Program with some modules in eval mode."""
    evals = key.mode
    assert isinstance(evals, frozenset)
    if any(capture.program.mode == "eval" for capture in compilation.signatures[key.signature].captures):
        message = f"{min(evals) or 'the model'} alone is in another mode, but the graph does not contain its effect"
        raise GraftError("GC043", message, hint="put the whole model into one mode with train() or eval()")

    def derived(stage: Stage) -> Program:
        return to_eval(compilation.program("train", stage, key.signature), only=evals)

    program = derived(key.stage)
    if key.stage == "adapted":
        program.baseline = record_baseline(derived("base")).baseline
        verify(program, compilation.store, "mode(mixed)", types=True)
    return program
