"""A request for a capture: a model, the inputs of its calls, and the mode."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType

import torch
from torch import Tensor, nn

from graftc.compiler.capture.defaults import default_axes
from graftc.compiler.capture.interface import Flags, device_of
from graftc.compiler.capture.signature import Axis, described
from graftc.passes.core.ir.program import Program
from graftc.passes.core.ir.program_key import Mode


@dataclass(frozen=True)
class CaptureRequest:
    """A model, and the calls that one graph must serve.

    Attributes:
        model: any module; capturing leaves its training flags, config and tensors unchanged.
        axes: the inputs.
        flags: other keyword arguments; they become constants of the graph.
        mode: train or eval.
        aliases: tied tensor names, each with the name that owns the tensor.
    """

    model: nn.Module
    axes: tuple[Axis, ...]
    flags: Flags = ()
    mode: Mode = "train"
    aliases: Mapping[str, str] = field(default_factory=dict, repr=False)

    @classmethod
    def of(
        cls,
        model: nn.Module,
        axes: Sequence[Axis] | None = None,
        flags: Flags = (),
        mode: Mode = "train",
        aliases: Mapping[str, str] = MappingProxyType({}),
    ) -> CaptureRequest:
        """Return a request; without ``axes``, it is for the model's default inputs.

        Raises:
            GraftError: GC030 if the model's inputs cannot be inferred from its interface.
        """
        return cls(model, tuple(default_axes(model) if axes is None else axes), flags, mode, aliases)

    @classmethod
    def served_by(
        cls,
        program: Program,
        model: nn.Module,
        shown: Sequence[Axis] = (),
        aliases: Mapping[str, str] = MappingProxyType({}),
    ) -> CaptureRequest:
        """Return the request for the calls that a graph serves, to run a model on them.

        Args:
            program: the graph.
            model: the model to run.
            shown: inputs with the values that they were captured with, if they were captured as shown.
            aliases: as for the class.
        """
        known = {axis.name: axis for axis in shown}
        own = (known.get(spec.name, Axis(spec.name, spec.dtype, spec.shape)) for spec in program.inputs)
        axes = tuple(replace(axis, axes=spec.shape) for axis, spec in zip(own, program.inputs, strict=True))
        assert program.mode in ("train", "eval")
        return cls(model, axes, program.flags, program.mode, aliases)

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        return device_of(self.model)

    def examples(self) -> dict[str, Tensor]:
        """Return the tensors used to capture the model, by name: ones with the axes' sizes, or the tensors shown."""
        device = self.device
        return {axis.name: axis.example(device) for axis in self.axes}

    def shown(self) -> dict[str, Tensor]:
        """Return the caller's example tensors by name; empty unless there are values for every input."""
        shown = {axis.name: axis.shown for axis in self.axes if axis.shown is not None and not axis.shown.is_meta}
        return {name: value.to(self.device) for name, value in shown.items()} if len(shown) == len(self.axes) else {}

    def __str__(self) -> str:
        """Return the inputs and flags, for messages."""
        return described(self.axes, self.flags) or "no inputs"
