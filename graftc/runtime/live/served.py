"""Find the graphs that serve a call to an element of a live model."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from graftc.compiler.capture.signature import fits
from graftc.compiler.compilation import Compilation
from graftc.compiler.live.elements import in_autocast
from graftc.passes.core.elements.calls import CallStructure, calls_in, input_names
from graftc.passes.core.ir.program import InputSpec
from graftc.passes.core.ir.program_key import Signature


@dataclass(frozen=True)
class Served:
    """A kind of call to an element that a graph serves.

    Attributes:
        signature: the signature of the graph.
        structure: the structure of the call, with the decisions for which the graph is valid.
        specs: the types and sizes of its tensors, in order.
    """

    signature: Signature
    structure: CallStructure
    specs: Sequence[InputSpec]

    def fits(self, tensors: Sequence[Tensor]) -> bool:
        """Return whether the graph serves calls with tensors of these types and sizes."""
        if len(tensors) != len(self.specs):
            return False
        for tensor, spec in zip(tensors, self.specs, strict=True):
            if tensor.dim() != len(spec.shape) or not _of_type(tensor, spec.dtype):
                return False
        return fits(self.specs, {spec.name: tensor for spec, tensor in zip(self.specs, tensors, strict=True)})


@dataclass
class ServedCalls:
    """The calls that a Compilation's graphs serve, by element and structure, each graph looked at once."""

    _known: defaultdict[tuple[str, str], list[Served]] = field(default_factory=lambda: defaultdict(list))
    _seen: dict[Signature, None] = field(default_factory=dict)

    def of(self, compilation: Compilation, path: str, structure: CallStructure) -> Sequence[Served]:
        """Return the graphs for calls to an element with this structure, whatever they decide and of whatever sizes."""
        if len(self._seen) < len(compilation.signatures):
            for signature in [each for each in compilation.signatures if each not in self._seen]:
                self._add(compilation, signature)
        return self._known.get((path, structure.text), ())

    def _add(self, compilation: Compilation, signature: Signature) -> None:
        base = compilation.program_as_run("train", "base", signature)
        specs = {spec.name: spec for spec in base.inputs}
        for path, structure in calls_in(base.flags).items():
            own = [specs[name] for name in input_names(path, specs)]
            self._known[path, structure.undecided.text].append(Served(signature, structure, own))
        self._seen[signature] = None


def _of_type(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Return whether a graph for a dtype accepts a tensor."""
    return tensor.dtype == dtype or (dtype.is_floating_point and in_autocast(tensor))
