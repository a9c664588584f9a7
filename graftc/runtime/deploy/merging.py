"""Merge a compiled model: as a whole, in part, or as a stream of tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from graftc.compiler.capture.isolation import isolated
from graftc.compiler.folding.requantise import BaseForm
from graftc.runtime.deploy.merged import Merged, merge
from graftc.runtime.deploy.partial import Partial, merge_partially
from graftc.runtime.deploy.tensor_stream import MergedTensors
from graftc.runtime.model.adapted import AdaptedRunner
from graftc.runtime.model.sharded import in_every_process
from graftc.runtime.model.views import with_every_adaptation
from graftc.runtime.training.steering import TrainingSteering
from graftc.specs.errors.arguments import as_names


class Merging:
    """The operations that fold adaptations into base weights.

    Args:
        runner: the Runner of the model.
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
        """Implement `Compiled.merge`."""
        TrainingSteering(self.runner).warn_of_unsteered()
        chosen = self.runner if names is None else self.runner.alone(as_names(names))._graftc
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
        """Implement `Compiled.merge_partially`."""
        return merge_partially(self.runner, budget, only=only, base=base, allow_unchanged=allow_unchanged)

    @isolated()
    @in_every_process
    @with_every_adaptation
    def merged_state_dict(self, *, digests: bool = False) -> MergedTensors:
        """Implement `Compiled.merged_state_dict`."""
        TrainingSteering(self.runner).warn_of_unsteered()
        return MergedTensors(self.runner, digests=digests)
