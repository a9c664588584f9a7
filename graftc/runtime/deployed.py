"""The model that an export writes: adaptations in their simplest form."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

from graftc.compiler.collapse import collapsed_spec, collapsed_values, collapsing
from graftc.compiler.pipeline import recompile
from graftc.compiler.snapshot import adapter_tensors
from graftc.passes.core.gathered import gathered
from graftc.specs.diagnostics import GraftWarning

if TYPE_CHECKING:
    from graftc.runtime.compiled import CompiledRunner


def deployed(compiled: CompiledRunner) -> CompiledRunner:
    """The same model with simpler adaptations in the places of those that collapse; itself where none does."""
    from graftc.runtime.compiled import make_compiled

    compilation = compiled.compilation
    if not collapsing(compilation):
        return compiled
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GraftWarning)  # they have been given when it was compiled
        values = {n: gathered(t) for n, t in adapter_tensors(compilation.store)} | collapsed_values(compilation)
        made = recompile(compilation, collapsed_spec(compilation), values)
    return make_compiled(made).to(compiled.device)._graftc
