"""The model that an export writes, with adaptations in their simplest form."""

from __future__ import annotations

from graftc.compiler.folding.collapse import collapsed_spec, collapsed_values, collapsing
from graftc.compiler.inspect.snapshot import adapter_values
from graftc.runtime.model.adapted import AdaptedRunner
from graftc.runtime.model.runner import runner_of


def deployed(compiled: AdaptedRunner) -> AdaptedRunner:
    """Return the same model with simpler adaptations in place of those that collapse; itself if none does."""
    compilation = compiled.compilation
    if not collapsing(compilation):
        return compiled
    values = dict(adapter_values(compilation.store)) | collapsed_values(compilation)
    simpler: AdaptedRunner = runner_of(compiled.sibling(collapsed_spec(compilation), values))
    return simpler
