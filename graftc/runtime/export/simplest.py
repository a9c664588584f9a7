"""Simplify a model's adaptations for an export."""

from __future__ import annotations

from graftc.compiler.folding.collapse import collapsed_spec, collapsed_values, collapsing
from graftc.compiler.inspect.snapshot import adapter_values
from graftc.runtime.model.adapted import AdaptedRunner
from graftc.runtime.model.runner import runner_of


def deployed(compiled: AdaptedRunner) -> AdaptedRunner:
    """Return the model with adaptations that collapse replaced by simpler ones; the model itself if none collapse."""
    compilation = compiled.compilation
    if not collapsing(compilation):
        return compiled
    values = dict(adapter_values(compilation.store)) | collapsed_values(compilation)
    simpler: AdaptedRunner = runner_of(compiled.sibling(collapsed_spec(compilation), values))
    return simpler
