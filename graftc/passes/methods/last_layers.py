"""Fine-tuning of the last layers (the baseline of Li and Liang 2021, arXiv:2101.00190)."""

from __future__ import annotations

from collections.abc import Sequence

from graftc.passes.core.build.builder import Builder
from graftc.passes.methods.full import Stored, TrainedTensors
from graftc.specs.errors.diagnostics import GraftError, Place
from graftc.specs.methods.last_layers import LastLayers


class LastLayersMethod(TrainedTensors[LastLayers]):
    """`TrainedTensors` in the last layers."""

    def prepare(self, spec: LastLayers, sites: Sequence[Stored], build: Builder) -> None:
        """Check that every stack has enough layers.

        Raises:
            GraftError: GC020 if a stack has fewer layers than the spec trains.
        """
        layers: dict[str, set[int | None]] = {}
        for site in sites:
            layers.setdefault(site.stack, set()).add(site.layer)
        for stack, numbers in layers.items():
            if len(numbers) >= spec.count or spec.target.layers != f"-{spec.count}:":
                continue
            message = f"the target selects {len(numbers)} layers of {stack}, but count is {spec.count}"
            raise GraftError("GC020", message, place=Place(path="count"), hint="use full to train all of them")
