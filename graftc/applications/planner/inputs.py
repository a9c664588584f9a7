"""Create inputs of a given size, like those that a training loop would pass to a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from graftc.compiler.capture.interface import parameters
from graftc.compiler.capture.signature import BATCH, size_of
from graftc.compiler.compilation import Compilation
from graftc.passes.core.ir.past_inputs import is_past
from graftc.passes.core.ir.program import Program
from graftc.specs.errors.diagnostics import GraftError


class Inputs:
    """Callable that creates inputs for the signature a model was compiled with, and labels if the model takes them.

    Args:
        compilation: the model's compilation.

    Attributes:
        longest: the maximum sequence length of the model; None if it is unlimited.
        sequential: whether the model takes sequences.
    """

    def __init__(self, compilation: Compilation) -> None:
        self._program = compilation.program("train", "base")
        self._flags = dict(self._program.flags)
        self._device = compilation.store.device()
        self._labels = _labels_of(self._program) if "labels" in parameters(compilation.model) else None
        axes = [
            (size, spec.ranges[dim][1] if spec.ranges else None)
            for spec in self._program.inputs
            for dim, size in enumerate(spec.shape)
            if isinstance(size, str) and size != BATCH
        ]
        ends = [end for _, end in axes if end is not None]
        self.longest = min(ends) if ends else None
        self.sequential = bool(axes)

    def __call__(self, batch: int, sequence: int) -> dict[str, Any]:
        """Return the tensors and flags for a call, by name.

        Args:
            batch: the number of rows.
            sequence: the number of tokens in each row; if the model takes two sequences, both have this length.

        Raises:
            GraftError: GC143 for more tokens than the model has positions.
        """
        if self.longest is not None and sequence > self.longest:
            message = f"sequences of {sequence} tokens are too long: the model takes at most {self.longest}"
            raise GraftError("GC143", message, hint=f"plan for at most {self.longest}")
        kinds = {spec.name: (spec.shape, spec.dtype) for spec in self._program.inputs if not is_past(spec.name)}
        if self._labels is not None:
            kinds["labels"] = self._labels
        sizes = {BATCH: batch}
        tensors: dict[str, Any] = {}
        for name, (axes, dtype) in kinds.items():
            shape = [size_of(axis, sizes, sequence) if isinstance(axis, str) else axis for axis in axes]
            tensors[name] = torch.empty(shape, dtype=dtype, device=self._device)
        return {**tensors, **self._flags}


def _labels_of(program: Program) -> tuple[tuple[int | str, ...], torch.dtype] | None:
    """Return the axes and the dtype of labels that match the logits; None if there are no suitable logits."""
    nodes = program.output_node.all_input_nodes
    named = dict(zip(program.outputs.names, nodes, strict=False))
    logits = getattr(named.get("logits"), "meta", {}).get("val")
    if not isinstance(logits, Tensor) or logits.dim() < 2:
        return None
    names = _names_of(program)
    sizes: list[Any] = list(logits.shape[:-1])  # integers, or symbols for dynamic sizes
    axes = tuple(names.get(str(size), size) for size in sizes)
    number = logits.dim() == 2 and logits.shape[-1] == 1
    return axes, torch.float32 if number else torch.int64


def _names_of(program: Program) -> Mapping[str, str]:
    """Return the names of dynamic axes, keyed by the symbols that represent their sizes."""
    names: dict[str, str] = {}
    for spec, node in zip(program.inputs, program.placeholders(), strict=True):
        value = node.meta.get("val")
        if isinstance(value, Tensor):
            pairs = zip(value.shape, spec.shape, strict=True)
            names.update({str(size): name for size, name in pairs if isinstance(name, str)})
    return names
