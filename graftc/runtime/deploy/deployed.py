"""The model that an export writes: adaptations in their simplest form."""

from __future__ import annotations

from typing import TYPE_CHECKING

from graftc.compiler.folding.collapse import collapsed_spec, collapsed_values, collapsing
from graftc.compiler.inspect.snapshot import adapter_values

if TYPE_CHECKING:
    from graftc.runtime.compiled import CompiledRunner


def deployed(compiled: CompiledRunner) -> CompiledRunner:
    """The same model with simpler adaptations in the places of those that collapse; itself where none does."""
    compilation = compiled.compilation
    if not collapsing(compilation):
        return compiled
    values = dict(adapter_values(compilation.store)) | collapsed_values(compilation)
    return compiled.sibling(collapsed_spec(compilation), values)._graftc
