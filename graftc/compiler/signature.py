"""Which inputs a Program takes, and example tensors to capture it with.

Capture must not see sizes that coincide by chance (batch 1, batch equal to sequence), so example inputs are always
made here: the caller's tensors only say dtype, rank and fixed sizes.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from graftc.specs.diagnostics import GraftError, nearest

BATCH, SEQUENCE = "batch", "sequence"
_SIZES = {BATCH: 3, SEQUENCE: 7}


@dataclass(frozen=True)
class Axis:
    """One input's name, element type and axes; a string axis is a size shared by that name."""

    name: str
    dtype: torch.dtype
    axes: tuple[int | str, ...]

    def example(self, device: torch.device) -> torch.Tensor:
        """A tensor of ones to capture with; sizes that share a name agree."""
        shape = [_SIZES.get(a, 11) if isinstance(a, str) else a for a in self.axes]
        return torch.ones(shape, dtype=self.dtype, device=device)


class HasDtype(Protocol):
    """A tensor, or what describes one."""

    @property
    def dtype(self) -> torch.dtype: ...


def signature_of(inputs: Mapping[str, HasDtype]) -> tuple[str, ...]:
    """What tells one set of inputs from another: names, and which hold floats where models branch on it (labels)."""
    return tuple(sorted(f"{name}:float" if v.dtype.is_floating_point else name for name, v in inputs.items()))


def tie_sizes(axes: Sequence[Axis], inputs: Mapping[str, torch.Tensor]) -> None:
    """Tell a tracer that axes of one name have one size."""
    first: dict[str, Any] = {}
    for axis in axes:
        for dim, size in enumerate(axis.axes):
            if isinstance(size, str):
                actual = inputs[axis.name].shape[dim]
                torch._check(actual == first.setdefault(size, actual))  # type: ignore[no-untyped-call]


def parameters(model: nn.Module) -> tuple[str, ...]:
    """Names that the model's ``forward`` takes, in order."""
    signature = inspect.signature(type(model).forward)
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return tuple(n for n, p in signature.parameters.items() if n != "self" and p.kind in kinds)


def device_of(model: nn.Module) -> torch.device:
    """The device of the model's first parameter or buffer; the CPU where it has none."""
    for tensor in [*model.parameters(), *model.buffers()][:1]:
        return tensor.device
    return torch.device("cpu")


def dtype_of(model: nn.Module) -> torch.dtype:
    """The dtype of the model's first floating-point parameter; float32 where it has none."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def default_axes(model: nn.Module) -> list[Axis]:
    """The inputs a transformers model is captured with when the caller names none.

    Raises:
        GraftError: GC030 for a model whose inputs cannot be told from its interface.
    """
    known = parameters(model)
    main = getattr(model, "main_input_name", None)
    config = getattr(model, "config", None)
    if main == "input_ids" and "input_ids" in known:
        names = ["input_ids"] + (["attention_mask"] if "attention_mask" in known else [])
        if getattr(config, "is_encoder_decoder", False):
            names += ["decoder_input_ids"]
        return [
            Axis(n, torch.int64, (BATCH, "target_sequence" if n.startswith("decoder_") else SEQUENCE)) for n in names
        ]
    if main == "pixel_values" and "pixel_values" in known:
        size = getattr(config, "image_size", 224)
        height, width = size if isinstance(size, list | tuple) else (size, size)
        channels = getattr(config, "num_channels", 3)
        return [Axis("pixel_values", dtype_of(model), (BATCH, channels, height, width))]
    raise GraftError(
        "GC030",
        f"the inputs of {type(model).__name__} cannot be told from its interface",
        hint="pass example_inputs={name: tensor} to graftc.compile",
    )


def axes_of(model: nn.Module, inputs: Mapping[str, Any], like: Sequence[Axis] | None = None) -> list[Axis]:
    """Axes for the inputs of a call, told from names, ranks and sizes.

    Args:
        model: the model, for the names that its ``forward`` takes.
        inputs: the caller's tensors by name; `None` values count as absent.
        like: axes already captured; inputs of the same name are the same, others take batch and sequence from them.

    Raises:
        GraftError: GC031 for a name that ``forward`` does not take, or a value that is no tensor.
    """
    known = parameters(model)
    present = {name: value for name, value in inputs.items() if value is not None}
    for name, value in present.items():
        if name not in known:
            close = nearest(name, known)
            raise GraftError(
                "GC031",
                f"{type(model).__name__} takes no input {name!r}",
                hint=f"did you mean {close[0]!r}?" if close else None,
            )
        if not isinstance(value, torch.Tensor):
            raise GraftError("GC031", f"input {name!r} is a {type(value).__name__}, not a tensor")
    sizes = _actual_sizes(present, {a.name: a for a in like or ()})
    found = [
        Axis(name, value.dtype, _axes(name, value, sizes))
        for name, value in sorted(present.items(), key=lambda item: known.index(item[0]))
    ]
    return found


def _actual_sizes(present: Mapping[str, torch.Tensor], known: Mapping[str, Axis]) -> dict[str, int]:
    """What batch and sequence are in this call."""
    sizes: dict[str, int] = {}
    for name, value in present.items():
        axes = known[name].axes if name in known else ()
        for axis, size in zip(axes, value.shape, strict=False):
            if isinstance(axis, str):
                sizes.setdefault(axis, size)
    if not sizes and present:
        first = next(iter(present.values()))
        sizes[BATCH] = first.shape[0] if first.dim() else 1
    return sizes


def _axes(name: str, value: torch.Tensor, sizes: Mapping[str, int]) -> tuple[int | str, ...]:
    sequence = "target_sequence" if name.startswith("decoder_") else SEQUENCE
    axes: list[int | str] = []
    # Where no input has shown the sequence yet, token ids ([batch, sequence]) and embeddings (one axis more) do. Other
    # axes keep the size they have: capture still finds out by itself which of them may vary.
    integers = value.dim() == 2 and not value.is_floating_point() and name != "labels"
    may_start = integers or name.endswith("inputs_embeds")
    for index, size in enumerate(value.shape):
        if index == 0 and (size == sizes.get(BATCH, size) or size == 1):
            axes.append(BATCH)
        elif index == 1 and (size == sizes.get(sequence) or (sequence not in sizes and may_start)):
            axes.append(sequence)
        else:
            axes.append(size)
    return tuple(axes)
