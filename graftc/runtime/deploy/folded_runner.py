"""A merged model's Runner: the base's graphs over folded tensors."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from graftc.compiler.compilation import Compilation
from graftc.compiler.folding.certify import Folded
from graftc.compiler.folding.fold_plan import FoldPlan
from graftc.passes.core.ir.program import Program
from graftc.passes.core.ir.program_key import ProgramKey
from graftc.passes.graph.remove_folded import folded
from graftc.records.certificate import Certificate
from graftc.runtime.deploy.folded_tensors import folded_store
from graftc.runtime.model.model_runner import ModelRunner
from graftc.runtime.model.root import Root
from graftc.specs.errors.diagnostics import GraftError


class FoldedRunner(ModelRunner):
    """The Runner of a merged model.

    Attributes:
        certificate: the evidence for the fold.
        folded: names of the adaptations that were folded into the weights.
        kept: the adaptations that were not folded, each with the reason; empty after a full merge.
        changed: names of the tensors that folding changed or added.
        additions: names of the biases that folding added.
    """

    certificate: Certificate

    def __init__(
        self,
        compilation: Compilation,
        fold: FoldPlan,
        folded: Folded,
        packed: Mapping[str, tuple[Tensor, ...]],
        *,
        full: bool,
    ) -> None:
        self.additions, self.changed = folded.additions, tuple(folded.tensors)
        self.folded, self.kept = fold.names, fold.reasons()
        super().__init__(compilation, folded_store(compilation, fold, folded, packed, full=full))

    def program_of(self, key: ProgramKey) -> Program:
        """Return the Program for a key, with the folded adaptations removed; raise GC054 for train mode."""
        if key.entry != "forward":
            return super().program_of(key)
        if key.mode != "eval":
            raise GraftError("GC054", "a merged model has no train mode", hint="train the compiled model it came from")
        return folded(super().program_of(key), self.folded, self.additions)

    def applies(self, adaptation: str) -> bool:
        """Return whether calls run an adaptation, which is true only for unfolded ones."""
        return adaptation in self.kept

    def _start_in_modes(self, module: Root) -> None:
        """Put every module into eval mode, regardless of the source's mode."""
        module.eval()

    def entering(self, mode: bool) -> bool:
        """Return False; raise GC054 for train mode, since folded models are for deployment and have only eval mode."""
        if mode:
            raise GraftError("GC054", "a merged model has no train mode", hint="train the compiled model it came from")
        return False

    def folded_state_dict(self) -> dict[str, Tensor]:
        """Return the base's tensors, folded where they change, by the source model's names, including tied names.

        A packed weight is represented by its stored parts, as in the state dict of the compiled model.
        """
        own = ((name, t) for name, t in self.store.tensors() if name not in self.store.constants)
        return {name: tensor.detach() for name, tensor in own}
