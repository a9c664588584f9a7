"""The memory use of a training step, as data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from graftc.passes.core.weights.containers import OWN
from graftc.runtime.activations.training_code import choices_of


@dataclass(frozen=True)
class LayerActivations:
    """The activations that one part of a model keeps for the backward pass.

    Attributes:
        module: the path of a layer; empty for the part outside layers.
        without: the bytes that autograd would keep on its own.
        kept: the bytes that are kept.
        recomputed: the number of values that are recomputed in the backward pass.
        reason: why there is no plan, in which case the part keeps what autograd keeps; empty if there is one.
    """

    module: str
    without: int
    kept: int
    recomputed: int
    reason: str = ""


@dataclass(frozen=True)
class Activations:
    """The memory use of a training step for given inputs, determined without running the step.

    Attributes:
        layers: the activations of each part of the model.
        peak: the peak memory use of the forward and backward pass in bytes, excluding parameters, earlier gradients
            and optimiser states. Workspace memory is included only for graftc's own operators.
    """

    layers: tuple[LayerActivations, ...]
    peak: int

    @property
    def without(self) -> int:
        """The bytes that autograd would keep on its own."""
        return sum(layer.without for layer in self.layers)

    @property
    def kept(self) -> int:
        """The bytes that are kept for the backward pass."""
        return sum(layer.kept for layer in self.layers)

    def to_json(self) -> dict[str, Any]:
        """Return the data as plain values for JSON."""
        return {"without": self.without, "kept": self.kept, **asdict(self)}

    def __str__(self) -> str:
        share = f", {self.kept / self.without:.0%} of what autograd would keep" if self.without else ""
        lines = [f"kept {self.kept / 1e6:.1f} MB{share}; peak {self.peak / 1e6:.1f} MB"]
        for layer in self.layers:
            what = layer.reason or f"{layer.kept / 1e6:.1f} of {layer.without / 1e6:.1f} MB"
            lines.append(f"  {layer.module or '(outside layers)'}: {what}")
        return "\n".join(lines)


def layers_of(modules: Iterable[tuple[str, nn.Module]]) -> Iterator[LayerActivations]:
    """Yield the activations of modules that have run, according to the plans chosen for them."""
    for name, module in modules:
        for (code, kind), choice in choices_of(module).items():
            planned = code.planned[kind]
            if not planned.plans:
                yield LayerActivations(name, 0, 0, 0, planned.reason)
            elif getattr(vars(module)[OWN], "checkpointing", False):
                yield LayerActivations(name, choice.without, choice.given, code.size)
            else:
                count = sum(len(part.nodes) for part in planned.plans[choice.level].parts)
                yield LayerActivations(name, choice.without, choice.kept, count)
