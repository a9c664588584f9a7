"""The base class of packings, and their text form, which graphs and files contain."""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from graftc.compat.modes import no_modes
from graftc.passes.core.packing.forms import EvenSteps, TableEntries

PACKINGS: dict[str, type[Packing]] = {}
"""Packing classes by kind."""

VIA = (None, torch.float32, torch.float16, torch.bfloat16)
"""Dtypes in which values are computed, by the index in a packing's text; index 0 means the weight's own dtype."""


@dataclasses.dataclass(frozen=True)
class Packing(ABC):
    """A format that stores a weight in fewer bits.

    A subclass is one family of formats. Apart from the kind, its fields are integers and flags, so that a packing's
    text describes it in full.

    Attributes:
        kind: the member of the family.
        transposed: whether the codes represent the weight with its last two axes swapped, so that groups lie along the
            inputs.
        via: the index in `VIA` of the dtype in which values are computed and rounded before they are converted to the
            weight's dtype.
        parts: names of the stored tensors, each ``uint8``: casts of floating-point tensors leave them unchanged, and
            FSDP2 shards them along their first axis.
    """

    kind: str
    transposed: bool = dataclasses.field(default=False, kw_only=True)
    via: int = dataclasses.field(default=0, kw_only=True)

    KINDS: ClassVar[tuple[str, ...]] = ()
    parts: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls) -> None:
        PACKINGS.update(dict.fromkeys(cls.KINDS, cls))

    @abstractmethod
    def pack(self, weight: Tensor) -> tuple[Tensor, ...]:
        """Return the parts of a weight, whose axes are in the order of the codes (see `transposed`)."""

    @abstractmethod
    def unpack(self, parts: Sequence[Tensor], shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Compute the values of ``parts`` with ATen operators.

        Both ``shape`` and the result have their axes in the order of the codes (see `transposed`).
        """

    def run(self, parts: Sequence[Tensor], shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Compute the same values as `unpack`, bit for bit, as fast as possible; graphs need not support this."""
        return self.unpack(parts, shape, dtype)

    def packed(self, weight: Tensor) -> tuple[Tensor, ...]:
        """Return the stored parts of a weight."""
        turned = weight.detach().transpose(-1, -2) if self.transposed else weight.detach()
        turned = turned.to(VIA[self.via] or weight.dtype)
        return tuple(part.contiguous() for part in self.pack(turned.contiguous()))

    def repacked(self, weight: Tensor, parts: Sequence[Tensor], same: Tensor) -> tuple[Tensor, ...]:
        """Return the stored parts of a weight that has changed.

        Args:
            weight: the new values.
            parts: the stored parts of the old values.
            same: a mask of the values that have not changed, ``bool`` of the weight's shape. Unchanged groups keep
                exactly their codes if the packing allows it.
        """
        turned = same.transpose(-1, -2) if self.transposed else same
        return tuple(part.contiguous() for part in self.keeping(self.packed(weight), parts, turned.contiguous()))

    def keeping(self, packed: Sequence[Tensor], parts: Sequence[Tensor], same: Tensor) -> Sequence[Tensor]:
        """Return the new parts, but old ones for unchanged groups; ``same`` has its axes in the order of the codes."""
        return packed

    HAS_FORM: ClassVar[bool] = False
    """Whether other software supports weights of this family; see `form`."""

    def has_form(self, dtype: torch.dtype) -> bool:
        """Return whether other software computes the same values as graftc for a weight of this dtype.

        Other software rounds the values once, to that dtype.
        """
        return self.HAS_FORM and VIA[self.via] in (None, torch.float32, dtype)

    def form(self, parts: Sequence[Tensor], shape: Sequence[int]) -> EvenSteps | TableEntries:
        """Return a weight in the form used by other software, with axes in the order of the codes (see `transposed`).

        Args:
            parts: the parts as `packed` returns them.
            shape: the weight's shape.

        Raises:
            NotImplementedError: for families without `HAS_FORM`.
        """
        raise NotImplementedError(self.text)

    def values(
        self, parts: Sequence[Tensor], shape: Sequence[int], dtype: torch.dtype, *, traced: bool = True
    ) -> Tensor:
        """Return the weight's values.

        Args:
            parts: the parts as `packed` returns them.
            shape, dtype: the weight's shape and dtype.
            traced: whether to use only ATen operators that exports support.
        """
        make, made_in = self.unpack if traced else self.run, VIA[self.via] or dtype
        if not self.transposed:
            return make(parts, shape, made_in).to(dtype).contiguous()
        return make(parts, swapped(shape), made_in).to(dtype).contiguous().transpose(-1, -2)

    @property
    def scales_type(self) -> torch.dtype:
        """The dtype of scales in families that store them in the `via` dtype; float32 if that is None."""
        return VIA[self.via] or torch.float32

    @property
    def text(self) -> str:
        """The full description, which `packing_of` parses, such as ``nf4 group=64 double=1``."""
        fields = [field for field in dataclasses.fields(self) if field.name != "kind"]
        given = [(f.name, getattr(self, f.name)) for f in fields if getattr(self, f.name) != f.default]
        return " ".join([self.kind, *(f"{name}={int(value)}" for name, value in given)])


@cache
def packing_of(text: str) -> Packing:
    """Return the packing that a text describes; raise `ValueError` if it is not the text of a packing."""
    kind, *given = text.split(" ")
    if kind not in PACKINGS:
        raise ValueError(f"unknown packing {kind!r}")
    cls = PACKINGS[kind]
    known: dict[str, Any] = {field.name: field.default for field in dataclasses.fields(cls) if field.name != "kind"}
    pairs = [item.partition("=")[::2] for item in given]
    numbers = {name: int(value) for name, value in pairs if name in known and value.isdecimal() and len(value) <= 9}
    if len(numbers) < len(given) or numbers.get("via", 0) >= len(VIA):
        raise ValueError(f"{text!r} is not a packing")
    return cls(kind, **{name: type(known[name])(number) for name, number in numbers.items()})


@dataclasses.dataclass(frozen=True)
class PackedType:
    """The properties of a packed weight that are known without its values.

    Attributes:
        packing: the format in which it is stored.
        shape: the shape of the unpacked weight.
        dtype: the dtype of its values.
    """

    packing: Packing
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        """The number of values."""
        return math.prod(self.shape)

    @property
    def strides(self) -> tuple[int, ...]:
        """The strides of the values, which are laid out in memory in the order of the codes."""
        sizes = swapped(self.shape) if self.packing.transposed else self.shape
        strides = tuple(math.prod(sizes[axis + 1 :]) for axis in range(len(sizes)))
        return swapped(strides) if self.packing.transposed else strides

    def names(self, weight: str) -> tuple[str, ...]:
        """Return the names of the parts of a weight with this name."""
        return tuple(f"{weight}_{part}" for part in self.packing.parts)

    def value(self, parts: Sequence[Tensor]) -> Tensor:
        """Compute the weight from its parts."""
        return cast("Tensor", torch.ops.graftc.unpack(list(parts), self.packing.text, list(self.shape), self.dtype))


def weight_name(codes: str) -> str:
    """Return the name of the weight whose first part has this name; see `PackedType.names`."""
    return codes.removesuffix("_codes")


def swapped(sizes: Sequence[int]) -> tuple[int, ...]:
    """Return sizes with the last two swapped."""
    return (*sizes[:-2], sizes[-1], sizes[-2])


@contextmanager
def real_values() -> Iterator[None]:
    """Run the block so that its tensors have values and can be cached for other calls, even while a graph is traced."""
    with no_modes(), torch.inference_mode(False):
        yield


def as_bytes(numbers: Tensor, shape: Sequence[int] | None = None) -> Tensor:
    """Return the bytes of ``numbers`` as ``uint8``, along the last axis or in the given shape.

    A scalar is given an axis.
    """
    stored = (numbers if numbers.dim() else numbers.reshape(1)).detach().contiguous().view(torch.uint8)
    return stored if shape is None else stored.reshape(tuple(shape))


def via_of(dtype: torch.dtype) -> int:
    """Return the index of a dtype in `VIA`; raise `ValueError` if it is not listed."""
    return VIA.index(dtype)


def from_bytes(stored: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the numbers stored by `as_bytes`."""
    return stored.view(dtype)
