"""Signatures: a Program's inputs and flags, and the example tensors with which it is captured.

A capture must not see sizes that coincide by chance (batch 1, batch equal to sequence), so example inputs are created
here: the caller's tensors only determine dtype, rank and fixed sizes, except for inputs that are captured as shown.
"""

from __future__ import annotations

import zlib
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from graftc.compat import pytree
from graftc.compat.checks import check
from graftc.compiler.capture.interface import COUNT, Flags, Interface, parameters
from graftc.compiler.capture.past import (
    CACHE,
    CAPACITY,
    ENCODED,
    PAST,
    Past,
    described_past,
    has_encoder,
    require_no_cache,
)
from graftc.passes.core.ir.past_inputs import SEEN, is_cross, is_past, of_cache
from graftc.passes.core.ir.program import InputSpec
from graftc.passes.core.ir.shapes import DTYPE_NAMES
from graftc.specs.errors.diagnostics import GraftError

BATCH, SEQUENCE, TARGET = "batch", "sequence", "target_sequence"
_SIZES = {BATCH: 3, SEQUENCE: 7, PAST: 5, CAPACITY: 13}
_OTHER = 11
_SUM = "+"
"""The separator that joins the names of axes into the name of an axis whose size is the sum of theirs."""


def is_sum(name: str) -> bool:
    """Return whether an axis's size is the sum of several others."""
    return _SUM in name


def size_of(name: str, sizes: Mapping[str, int], default: int = _OTHER) -> int:
    """Return the size of a named axis, which may be a sum, given the sizes of the single names.

    Integers within a name stand for themselves.
    """
    return sum(int(part) if part.isdigit() else sizes.get(part, default) for part in name.split(_SUM))


def _any_size(name: str) -> int:
    """Return a size for an axis whose name does not determine one; it rarely equals that of another axis."""
    return _OTHER + zlib.crc32(name.encode()) % 29


@dataclass(frozen=True)
class Axis:
    """One input's name, dtype and axes; an axis given as a name has the same size wherever that name occurs.

    Attributes:
        shown: the caller's tensor for the input; None if there is none.
        as_shown: whether to capture with the caller's tensor, if there is one; its axes then have their own names.
    """

    name: str
    dtype: torch.dtype
    axes: tuple[int | str, ...]
    shown: Tensor | None = field(default=None, compare=False, repr=False)
    as_shown: bool = field(default=False, compare=False)

    @property
    def sizes(self) -> tuple[int, ...]:
        """The sizes to capture with; dimensions that share a name get the same size."""
        if self.as_shown and self.shown is not None:
            return tuple(self.shown.shape)
        own = {name: _any_size(name) for name in self.names} if self.as_shown else _SIZES
        return tuple(size_of(a, own) if isinstance(a, str) else a for a in self.axes)

    @property
    def names(self) -> set[str]:
        """The names of the axes, including those within sums."""
        return {part for a in self.axes if isinstance(a, str) for part in a.split(_SUM) if not part.isdigit()}

    def example(self, device: torch.device) -> Tensor:
        """Return a tensor to capture with: ones, unless the input is captured as shown."""
        if self.as_shown and self.shown is not None:
            return self.shown.to(device, self.dtype)
        return torch.ones(self.sizes, dtype=self.dtype, device=device)

    def given(self, device: torch.device) -> Any:
        """Return the caller's value, or an example if there is none."""
        return self.example(device) if self.shown is None else self.shown.to(device)

    def smallest(self, device: torch.device) -> Tensor:
        """Return the example with size 1 for every named axis, or unchanged if the input is captured as shown."""
        if self.as_shown and self.shown is not None:
            return self.example(device)
        sizes = [1 if isinstance(name, str) else size for name, size in zip(self.axes, self.sizes, strict=True)]
        return torch.ones(sizes, dtype=self.dtype, device=device)


@dataclass(frozen=True)
class Structured(Axis):
    """An input that is a list, tuple or dict: the model's own Python code accepts it, but no whole-model graph does.

    Attributes:
        structure: the value that the caller gave.
    """

    structure: Any = field(default=None, compare=False, repr=False)

    @classmethod
    def of(cls, name: str, structure: Any) -> Structured:
        """Return the input with this name and value."""
        return cls(name, torch.float32, (), structure=structure)

    def given(self, device: torch.device) -> Any:
        """Return the caller's value with its tensors moved to a device."""
        return pytree.tree_map_only(Tensor, lambda tensor: tensor.to(device), self.structure)


def require_tensors(model: nn.Module, axes: Sequence[Axis]) -> None:
    """Raise unless a graph can accept all inputs.

    Raises:
        GraftError: GC030.
    """
    for axis in axes:
        if isinstance(axis, Structured):
            message = f"{type(model).__name__} is called with a {type(axis.structure).__name__}, {axis.name!r}"
            raise GraftError("GC030", message, hint="a graph takes tensors, and flags that are bool, int, float or str")


def inputs_of(present: Mapping[str, Any]) -> tuple[str, ...]:
    """Return a key that distinguishes sets of inputs: the names, dtypes and ranks of tensors, and the values of flags.

    A graph depends on all of them: models branch on the rank of a mask and on whether labels are floats.
    """
    descriptions = []
    for name, value in present.items():
        if isinstance(value, Tensor):
            descriptions.append(f"{name}:{DTYPE_NAMES.get(value.dtype, 'other')}[{value.dim()}]")
        elif isinstance(value, Past):
            descriptions.append(described_past(value.tensors))
        else:
            descriptions.append(f"{name}={value!r}")
    return tuple(sorted(descriptions))


def inputs_of_program(inputs: Sequence[InputSpec], flags: Flags) -> tuple[str, ...]:
    """Return the result of `inputs_of` for the calls that a Program serves."""
    return _inputs_of({spec.name: (spec.dtype, len(spec.shape)) for spec in inputs}, flags)


def inputs_of_axes(axes: Sequence[Axis], flags: Flags) -> tuple[str, ...]:
    """Return the result of `inputs_of` for calls with these inputs and flags."""
    return _inputs_of({axis.name: (axis.dtype, len(axis.axes)) for axis in axes}, flags)


def _inputs_of(kinds: Mapping[str, tuple[torch.dtype, int]], flags: Flags) -> tuple[str, ...]:
    own = {name: kind for name, kind in kinds.items() if not of_cache(name)}
    descriptions = [f"{name}:{DTYPE_NAMES.get(dtype, 'other')}[{rank}]" for name, (dtype, rank) in own.items()]
    if len(own) < len(kinds):
        descriptions.append(described_past(kinds))
    return tuple(sorted([*descriptions, *(f"{name}={value!r}" for name, value in flags)]))


def fits(inputs: Sequence[InputSpec], present: Mapping[str, Any]) -> bool:
    """Return whether a graph is valid for the sizes of the given tensors.

    Sizes must be within the graph's ranges, equal if they share a name, and different where the captured code relied on
    their being different.
    """
    first: dict[str, Any] = {}
    past = present.get(CACHE)
    tensors = {**present, **past.tensors} if isinstance(past, Past) else present
    # Keys and values of one kind have the same length, so one of them is enough.
    one_of_each = {spec.name.partition("_")[0] if is_past(spec.name) else spec.name: spec for spec in reversed(inputs)}
    for spec in one_of_each.values():
        shape = tensors[spec.name].shape
        for dim, (low, high) in enumerate(spec.ranges):
            size = shape[dim]
            if size < low or (high is not None and size > high):
                return False
        for dim, name in enumerate(spec.shape):
            if isinstance(name, str) and first.setdefault(name, shape[dim]) != shape[dim]:
                return False
    sums = [name for name in first if is_sum(name)]
    if any(first[name] != size_of(name, first, 0) for name in sums):
        return False
    return not any(a in first and first[a] == first.get(b) for spec in inputs for a, b in spec.apart)


def tie_sizes(axes: Sequence[Axis], inputs: Mapping[str, Tensor]) -> None:
    """Tell a tracer that axes with the same name have the same size."""
    first: dict[str, Any] = {}
    for axis in axes:
        for dim, size in enumerate(axis.axes):
            if isinstance(size, str):
                actual = inputs[axis.name].shape[dim]
                check(actual == first.setdefault(size, actual))
    for name in first:
        if is_sum(name):
            check(first[name] == size_of(name, first, 0))


def split(present: Mapping[str, Any]) -> tuple[dict[str, Tensor], Flags]:
    """Return the tensors by name, including those of a past, and the flags sorted by name."""
    past = present.get(CACHE)
    tensors = {name: value for name, value in present.items() if isinstance(value, Tensor)}
    flags = sorted((n, value) for n, value in present.items() if n not in tensors and value is not past)
    return tensors | dict(past.tensors if isinstance(past, Past) else {}), tuple(flags)


def described(axes: Sequence[Axis], flags: Flags) -> str:
    """Return inputs and flags as text, for messages."""
    own = [axis.name for axis in axes if not of_cache(axis.name)]
    past = [CACHE] if len(own) < len(axes) else []
    return ", ".join([*own, *past, *(f"{name}={value!r}" for name, value in flags)])


def request(model: nn.Module, inputs: Mapping[str, Any]) -> tuple[list[Axis], Flags]:
    """Return axes and flags for example inputs by name.

    Raises:
        GraftError: GC031 for an input that ``forward`` does not accept; GC140 for a cache.
    """
    present, _ = Interface(model).read(inputs, structures=True)
    require_no_cache(present, "leave it out: calls with a cache are captured when they first occur")
    structures = {name: value for name, value in present.items() if isinstance(value, list | tuple | dict)}
    tensors, flags = split({name: value for name, value in present.items() if name not in structures})
    axes = [replace(axis, shown=tensors[axis.name]) for axis in axes_of(model, tensors)]
    return [*axes, *(Structured.of(name, value) for name, value in structures.items())], flags


def axes_of(model: nn.Module, inputs: Mapping[str, Tensor], like: Sequence[Axis] | None = None) -> list[Axis]:
    """Return the axes for the tensors of a call, inferred from names, ranks and sizes.

    Args:
        model: the model, whose ``forward`` determines the order of the inputs.
        inputs: the caller's tensors by name.
        like: axes that were captured before; inputs with the same names reuse them, and others derive batch and
            sequence from them.

    Raises:
        GraftError: GC031 for a value that is not a tensor.
    """
    position = {name: index for index, name in enumerate(parameters(model))}
    past = [name for name in inputs if is_past(name)]
    own = [item for item in inputs.items() if not is_past(item[0])]
    ordered = sorted(own, key=lambda item: (position.get(item[0], len(position)), item[0]))
    for name, value in ordered:
        if not isinstance(value, Tensor):
            raise GraftError("GC031", f"input {name!r} is a {type(value).__name__}, not a tensor")
    pairs = has_encoder(model)
    if past:
        axes = [Axis(name, value.dtype, _axes_beside_past(name, value, inputs, pairs)) for name, value in ordered]
        for name in past:
            _, heads, _, width = inputs[name].shape
            tokens = SEQUENCE if is_cross(name) else CAPACITY if SEEN in inputs else PAST
            axes.append(Axis(name, inputs[name].dtype, (BATCH, heads, tokens, width)))
        return axes
    before = {axis.name: axis.axes for axis in like or () if axis.name in inputs}
    before = {name: axes for name, axes in before.items() if len(axes) == inputs[name].dim()}
    sizes = _actual_sizes(ordered, before)
    return [
        Axis(n, v.dtype, _known(before[n], v, sizes) if n in before else _axes(n, v, sizes, pairs)) for n, v in ordered
    ]


def _axes_beside_past(name: str, value: Tensor, inputs: Mapping[str, Tensor], pairs: bool) -> tuple[int | str, ...]:
    """Return the axes of an input that accompanies a past, inferred from the input's name.

    Sizes are of little use here, since texts of one token are common. An attention mask also covers the past, and in a
    cache of fixed length all of it.
    """
    past = next(tensor for other, tensor in inputs.items() if is_past(other))
    own = TARGET if pairs else SEQUENCE
    tokens = own if name.startswith("decoder_") or not pairs or name == "labels" else SEQUENCE
    if name == ("decoder_" if pairs else "") + "attention_mask":
        tokens = CAPACITY if SEEN in inputs else f"{PAST}{_SUM}{own}"
    axes: list[int | str] = list(value.shape)
    if value.dim() and value.shape[0] == past.shape[0]:
        axes[0] = BATCH
    text = value.dim() == 2 or name.endswith(("inputs_embeds", ENCODED))
    if value.dim() > 1 and text and (not value.is_floating_point() or value.dim() > 2):
        axes[1] = tokens
    return tuple(axes)


def less_dynamic(axes: Sequence[Axis], inputs: Mapping[str, Tensor] | None = None) -> Iterator[list[Axis]]:
    """Yield the same inputs with fewer and fewer named axes: first all of them, then only the batch, then none.

    Args:
        axes: the axes to start from.
        inputs: tensors whose sizes replace the names that are dropped; by default the caller's tensors, or the
            examples.
    """
    levels: tuple[Container[str] | None, ...] = (None, (BATCH,), ())
    candidates = (tuple(_fixed(axis, named, _sizes_of(axis, inputs)) for axis in axes) for named in levels)
    yield from map(list, dict.fromkeys(candidates))


def fixed_where_bound(axes: Sequence[Axis], inputs: Sequence[InputSpec], present: Mapping[str, Any]) -> list[Axis]:
    """Return the axes, in which each name whose size a graph fixes is replaced by the size in a call.

    Args:
        axes: the axes that the graph was captured with.
        inputs: the inputs of the graph.
        present: the call's tensors by name; the axes of the graph's other inputs, such as a past, are unchanged.
    """
    ranges, bound = {spec.name: spec.ranges for spec in inputs}, dict[str, int]()
    for axis in axes:
        if axis.name in ranges and axis.name in present:
            for name, (low, high), size in zip(axis.axes, ranges[axis.name], present[axis.name].shape, strict=True):
                if isinstance(name, str) and low == high != size:
                    bound[name] = size
    return [replace(axis, axes=tuple(bound.get(a, a) if isinstance(a, str) else a for a in axis.axes)) for axis in axes]


def _sizes_of(axis: Axis, inputs: Mapping[str, Tensor] | None) -> Sequence[int]:
    if inputs:
        return inputs[axis.name].shape
    return axis.sizes if axis.shown is None else axis.shown.shape


def _fixed(axis: Axis, named: Container[str] | None, sizes: Sequence[int]) -> Axis:
    own = zip(axis.axes, sizes, strict=True)
    return replace(axis, axes=tuple(a if named is None or a in named else int(size) for a, size in own))


def _actual_sizes(ordered: Sequence[tuple[str, Tensor]], known: Mapping[str, tuple[int | str, ...]]) -> dict[str, int]:
    """Return the batch and sequence sizes in this call; any other size replaces 1, which may be meant to broadcast."""
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
    # If no input has determined the sequence, token ids ([batch, sequence]) and embeddings (one axis more) do. Other
    # axes keep their sizes: the capture itself still determines which of them are dynamic.
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
