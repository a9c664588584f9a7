"""Merging a compiled model: whole, in part, or as a stream of tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from graftc.compiler.capture.isolation import isolated
from graftc.compiler.folding.requantise import BaseForm
from graftc.runtime.deploy.merged import Merged, merge
from graftc.runtime.deploy.merged_tensors import MergedTensors
from graftc.runtime.deploy.partial import Partial, merge_partially
from graftc.runtime.model.adapted import AdaptedRunner
from graftc.runtime.model.sharded import in_every_process
from graftc.runtime.model.views import with_every_adaptation
from graftc.runtime.training.steering import TrainingSteering
from graftc.specs.errors.arguments import as_names


class Merging:
    """Folds adaptations into base weights.

    Args:
        runner: of the model.
    """

    def __init__(self, runner: AdaptedRunner) -> None:
        self.runner = runner

    @isolated()
    @in_every_process
    @with_every_adaptation
    def merge(
        self,
        names: str | Sequence[str] | None = None,
        *,
        budget: float | None = None,
        progress: Callable[[float], None] | None = None,
        dtype: torch.dtype | None = None,
        base: BaseForm | None = None,
        allow_unchanged: bool = False,
    ) -> Merged[Any]:
        """See `Compiled.merge`."""
        TrainingSteering(self.runner).warn_of_unsteered()
        chosen = self.runner if names is None else self.runner.alone(as_names(names))
        told = progress or (lambda _: None)
        return merge(chosen, budget, told, dtype=dtype, base=base, allow_unchanged=allow_unchanged)

    @isolated()
    @in_every_process
    @with_every_adaptation
    def merge_partially(
        self,
        budget: float | None = None,
        *,
        only: Sequence[str] | None = None,
        base: BaseForm | None = None,
        allow_unchanged: bool = False,
    ) -> Partial[Any, Any]:
        """See `Compiled.merge_partially`."""
        return merge_partially(self.runner, budget, only=only, base=base, allow_unchanged=allow_unchanged)

    @isolated()
    @in_every_process
    @with_every_adaptation
    def merged_state_dict(self, *, digests: bool = False) -> MergedTensors:
        """The tensors of the merged model one after the other, for trainers that push weights to an inference engine.

        Each is folded when it is asked for, always from the base's own values, so that merging again and again adds up
        no rounding: the same adapters give the same bits, and the base is never written. At any time one tensor is
        there, or those that are folded together. Names are those of the source model's state dict, tied ones included.
        What folding does not change is the base's own tensor: whoever writes to it has to copy it first. Packed weights
        are given by their values, in full precision. No graph is
        made and nothing is certified or saved.

        Args:
            digests: also work out the SHA-256 of each tensor, which is then in ``digests`` of what is returned, for
                the receiver to compare.

        Returns:
            An iterator of ``(name, tensor)``, in the base's element types and where the model is.

        Raises:
            GraftError: GC050 naming what cannot fold, GC022 for tied weights, GC051 where an adapter has values that
                are not finite; on the way GC051 for such a tensor, GC052 for a bias that the class has no place for.
        """
        TrainingSteering(self.runner).warn_of_unsteered()
        return MergedTensors(self.runner, digests=digests)
