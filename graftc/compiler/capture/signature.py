"""Signatures: which inputs and flags a Program takes, and example tensors to capture it with.

Capture must not see sizes that coincide by chance (batch 1, batch equal to sequence), so example inputs are always
made here: the caller's tensors only say dtype, rank and fixed sizes.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from graftc.compiler.capture.interface import COUNT, Flags, Interface, parameters
from graftc.passes.core.ir.program import InputSpec
from graftc.passes.core.ir.shapes import DTYPE_NAMES
from graftc.specs.errors.diagnostics import GraftError

BATCH, SEQUENCE, TARGET = "batch", "sequence", "target_sequence"
_SIZES = {BATCH: 3, SEQUENCE: 7}
_OTHER = 11


@dataclass(frozen=True)
class Axis:
    """One input's name, element type and axes; a string axis is a size shared by that name."""

    name: str
    dtype: torch.dtype
    axes: tuple[int | str, ...]

    @property
    def sizes(self) -> tuple[int, ...]:
        """The sizes to capture with; those that share a name agree."""
        return tuple(_SIZES.get(a, _OTHER) if isinstance(a, str) else a for a in self.axes)

    def example(self, device: torch.device) -> Tensor:
        """A tensor of ones to capture with."""
        return torch.ones(self.sizes, dtype=self.dtype, device=device)


def inputs_of(present: Mapping[str, Any]) -> tuple[str, ...]:
    """What tells one set of inputs from another: names, element types and ranks of tensors, values of flags.

    A graph depends on all of them: models branch on the rank of a mask and on whether labels are floats.
    """
    found = []
    for name, value in present.items():
        if isinstance(value, Tensor):
            found.append(f"{name}:{DTYPE_NAMES.get(value.dtype, 'other')}[{value.dim()}]")
        else:
            found.append(f"{name}={value!r}")
    return tuple(sorted(found))


def inputs_of_program(inputs: Sequence[InputSpec], flags: Flags) -> tuple[str, ...]:
    """The same of the calls that a Program serves."""
    found = [f"{spec.name}:{DTYPE_NAMES.get(spec.dtype, 'other')}[{len(spec.shape)}]" for spec in inputs]
    return tuple(sorted([*found, *(f"{name}={value!r}" for name, value in flags)]))


def fits(inputs: Sequence[InputSpec], present: Mapping[str, Any]) -> bool:
    """Whether a graph holds for the sizes of tensors: they are in its ranges, equal where they share a name,
    and others where the graph took a decision by that."""
    first: dict[str, Any] = {}
    for spec in inputs:
        shape = present[spec.name].shape
        for dim, (low, high) in enumerate(spec.ranges):
            size = shape[dim]
            if size < low or (high is not None and size > high):
                return False
        for dim, name in enumerate(spec.shape):
            if isinstance(name, str) and first.setdefault(name, shape[dim]) != shape[dim]:
                return False
    return not any(a in first and first[a] == first.get(b) for spec in inputs for a, b in spec.apart)


def tie_sizes(axes: Sequence[Axis], inputs: Mapping[str, Tensor]) -> None:
    """Tell a tracer that axes of one name have one size."""
    first: dict[str, Any] = {}
    for axis in axes:
        for dim, size in enumerate(axis.axes):
            if isinstance(size, str):
                actual = inputs[axis.name].shape[dim]
                torch._check(actual == first.setdefault(size, actual))  # type: ignore[no-untyped-call, unused-ignore]


def split(present: Mapping[str, Any]) -> tuple[dict[str, Tensor], Flags]:
    """Tensors by name, and flags in order of their names."""
    tensors = {name: value for name, value in present.items() if isinstance(value, Tensor)}
    return tensors, tuple(sorted((name, value) for name, value in present.items() if name not in tensors))


def described(axes: Sequence[Axis], flags: Flags) -> str:
    """Inputs and flags, for messages."""
    return ", ".join([*(axis.name for axis in axes), *(f"{name}={value!r}" for name, value in flags)])


def request(model: nn.Module, inputs: Mapping[str, Any]) -> tuple[list[Axis], Flags]:
    """Axes and flags for example inputs by name.

    Raises:
        GraftError: GC031 for what ``forward`` does not take.
    """
    present, _ = Interface(model).read(inputs)
    tensors, flags = split(present)
    return axes_of(model, tensors), flags


def axes_of(model: nn.Module, inputs: Mapping[str, Tensor], like: Sequence[Axis] | None = None) -> list[Axis]:
    """Axes for the tensors of a call, told from names, ranks and sizes.

    Args:
        model: the model, for the names that its ``forward`` takes.
        inputs: the caller's tensors by name.
        like: axes already captured; inputs of the same name are the same, others take batch and sequence from them.

    Raises:
        GraftError: GC031 for a value that is no tensor.
    """
    known = parameters(model)
    position = {name: index for index, name in enumerate(known)}
    ordered = sorted(inputs.items(), key=lambda item: (position.get(item[0], len(known)), item[0]))
    for name, value in ordered:
        if not isinstance(value, Tensor):
            raise GraftError("GC031", f"input {name!r} is a {type(value).__name__}, not a tensor")
    before = {axis.name: axis.axes for axis in like or () if axis.name in inputs}
    before = {name: axes for name, axes in before.items() if len(axes) == inputs[name].dim()}
    sizes = _actual_sizes(ordered, before)
    pairs = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
    return [
        Axis(n, v.dtype, _known(before[n], v, sizes) if n in before else _axes(n, v, sizes, pairs)) for n, v in ordered
    ]


def less_dynamic(axes: Sequence[Axis], inputs: Mapping[str, Tensor] | None = None) -> Iterator[list[Axis]]:
    """The same inputs with ever fewer named axes: as they are, with the batch only, with none.

    Args:
        axes: what to start from.
        inputs: tensors whose sizes axes get that lose their name; by default those of the examples.
    """
    seen: list[list[Axis]] = []
    for kept in (None, (BATCH,), ()):
        found = [_fixed(axis, kept, inputs[axis.name].shape if inputs else axis.sizes) for axis in axes]
        if found not in seen:
            seen.append(found)
            yield found


def _fixed(axis: Axis, kept: Container[str] | None, sizes: Sequence[int]) -> Axis:
    named = zip(axis.axes, sizes, strict=True)
    return replace(axis, axes=tuple(a if kept is None or a in kept else int(size) for a, size in named))


def _actual_sizes(ordered: Sequence[tuple[str, Tensor]], known: Mapping[str, tuple[int | str, ...]]) -> dict[str, int]:
    """What batch and sequence are in this call. One of size 1 beside another may be meant to broadcast."""
    sizes: dict[str, int] = {}
    for name, value in ordered:
        for axis, size in zip(known.get(name, ()), value.shape, strict=False):
            if isinstance(axis, str) and sizes.get(axis, 1) == 1:
                sizes[axis] = size
    if BATCH not in sizes and ordered:
        sizes[BATCH] = next((value.shape[0] for _, value in ordered if value.dim()), 1)
    return sizes


def _known(axes: Sequence[int | str], value: Tensor, sizes: Mapping[str, int]) -> tuple[int | str, ...]:
    return tuple(
        axis if isinstance(axis, str) and sizes[axis] == size else size
        for axis, size in zip(axes, value.shape, strict=True)
    )


def _axes(name: str, value: Tensor, sizes: dict[str, int], pairs: bool) -> tuple[int | str, ...]:
    labels = name == "labels"
    if name.startswith("decoder_"):
        sequences: tuple[str, ...] = (TARGET, SEQUENCE)
    else:
        sequences = (TARGET,) if labels and pairs else (SEQUENCE,)
    # Where no input has shown the sequence yet, token ids ([batch, sequence]) and embeddings (one axis more) do. Other
    # axes keep the size they have: capture still finds out by itself which of them may vary.
    integers = value.dim() == 2 and not value.is_floating_point() and (pairs or not labels)
    if value.dim() > 1 and sequences[0] not in sizes and (integers or name.endswith("inputs_embeds")):
        sizes[sequences[0]] = value.shape[1]
    if labels and value.is_floating_point():
        sequences = ()
    if name == COUNT:
        return tuple(value.shape)
    axes: list[int | str] = []
    for index, size in enumerate(value.shape):
        wanted = (BATCH,) if index == 0 else sequences
        axes.append(next((axis for axis in wanted if sizes.get(axis) == size), size))
    return tuple(axes)
