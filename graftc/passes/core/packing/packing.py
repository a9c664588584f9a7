"""What a packing is, and how packings are written as text, which graphs and files have."""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from graftc.passes.core.modes import no_modes
from graftc.passes.core.packing.forms import EvenSteps, TableEntries

PACKINGS: dict[str, type[Packing]] = {}
"""By kind."""

VIA = (None, torch.float32, torch.float16, torch.bfloat16)
"""Element types that values are made in, by the number that the text of a packing has; 0 is that of the weight."""


@dataclasses.dataclass(frozen=True)
class Packing(ABC):
    """How a weight is stored in fewer bits. A subclass is one family of formats; its fields are whole numbers, flags
    and words, so that the text of a packing says all of it.

    Attributes:
        kind: which one of the family.
        transposed: the codes are of the weight with its last two axes swapped, so that groups lie along the inputs.
        via: the values are made in this element type of `VIA` and rounded to it, before they are of the weight's.
        parts: names of what is stored, each ``uint8``: what casts floating-point tensors leaves it as it is, and FSDP2
            shards it along its first axis.
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
        """The parts of a weight, which is as its codes are: see `transposed`."""

    @abstractmethod
    def unpack(self, parts: Sequence[Tensor], shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """The values of ``parts``, in ATen operators, as a tensor of ``shape``, which is that of the codes: see
        `transposed`."""

    def run(self, parts: Sequence[Tensor], shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """The same values as `unpack` gives, to the bit, as fast as there is a way; it need not be one for graphs."""
        return self.unpack(parts, shape, dtype)

    def packed(self, weight: Tensor) -> tuple[Tensor, ...]:
        """What is stored of a weight."""
        turned = weight.detach().transpose(-1, -2) if self.transposed else weight.detach()
        turned = turned.to(VIA[self.via] or weight.dtype)
        return tuple(part.contiguous() for part in self.pack(turned.contiguous()))

    def repacked(self, weight: Tensor, parts: Sequence[Tensor], same: Tensor) -> tuple[Tensor, ...]:
        """What is stored of a weight that has changed.

        Args:
            weight: its new values.
            parts: what is stored of the old ones.
            same: which values are as they were, ``bool`` of the weight's shape. Groups of these keep their codes to the
                bit, in packings where that is possible.
        """
        turned = same.transpose(-1, -2) if self.transposed else same
        made = self.keeping(self.packed(weight), parts, turned.contiguous())
        return tuple(part.contiguous() for part in made)

    def keeping(self, made: Sequence[Tensor], parts: Sequence[Tensor], same: Tensor) -> Sequence[Tensor]:
        """New parts, with the old ones in the place of groups that are the ``same``, which is as the codes are."""
        return made

    HAS_FORM: ClassVar[bool] = False
    """Other software knows weights of this family: see `form`."""

    def has_form(self, dtype: torch.dtype) -> bool:
        """Whether other software makes the values of a weight of this element type as graftc does: it rounds them once,
        to that type."""
        return self.HAS_FORM and VIA[self.via] in (None, torch.float32, dtype)

    def form(self, parts: Sequence[Tensor], shape: Sequence[int]) -> EvenSteps | TableEntries:
        """What other software would have of a weight, in the axes of its codes (see `transposed`).

        Args:
            parts: as `packed` gives them.
            shape: of the weight.

        Raises:
            NotImplementedError: in families without `HAS_FORM`.
        """
        raise NotImplementedError(self.text)

    def values(
        self, parts: Sequence[Tensor], shape: Sequence[int], dtype: torch.dtype, *, traced: bool = True
    ) -> Tensor:
        """The weight.

        Args:
            parts: as `packed` gives them.
            shape, dtype: of the weight.
            traced: in ATen operators that exports know.
        """
        make, made_in = self.unpack if traced else self.run, VIA[self.via] or dtype
        if not self.transposed:
            return make(parts, shape, made_in).to(dtype).contiguous()
        return make(parts, swapped(shape), made_in).to(dtype).contiguous().transpose(-1, -2)

    @property
    def scales_type(self) -> torch.dtype:
        """The element type of scales where a family stores them in that of `via`: float32 without one."""
        return VIA[self.via] or torch.float32

    @property
    def text(self) -> str:
        """All of it, as `packing_of` reads it: ``nf4 group=64 double=1``."""
        fields = [field for field in dataclasses.fields(self) if field.name != "kind"]
        given = [(f.name, getattr(self, f.name)) for f in fields if getattr(self, f.name) != f.default]
        return " ".join([self.kind, *(f"{name}={int(value)}" for name, value in given)])


@cache
def packing_of(text: str) -> Packing:
    """The packing that a text says. `ValueError` where there is none."""
    kind, *given = text.split(" ")
    if kind not in PACKINGS:
        raise ValueError(f"no packing is called {kind!r}")
    cls = PACKINGS[kind]
    known: dict[str, Any] = {field.name: field.default for field in dataclasses.fields(cls) if field.name != "kind"}
    fields: dict[str, Any] = {}
    for item in given:
        name, _, value = item.partition("=")
        if name not in known or name in fields or not value.isdecimal() or len(value) > 9:
            raise ValueError(f"{text!r} is not a packing")
        fields[name] = type(known[name])(int(value))
    if fields.get("via", 0) >= len(VIA):
        raise ValueError(f"{text!r} is not a packing")
    return cls(kind, **fields)


@dataclasses.dataclass(frozen=True)
class PackedType:
    """What is known of a packed weight without its values.

    Attributes:
        packing: how it is stored.
        shape: its sizes as a weight.
        dtype: the element type of its values.
    """

    packing: Packing
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        """How many values it has."""
        return math.prod(self.shape)

    @property
    def strides(self) -> tuple[int, ...]:
        """Those of its values, which lie in memory in the order of the codes."""
        sizes = swapped(self.shape) if self.packing.transposed else self.shape
        strides = tuple(math.prod(sizes[axis + 1 :]) for axis in range(len(sizes)))
        return swapped(strides) if self.packing.transposed else strides

    def names(self, weight: str) -> tuple[str, ...]:
        """Names of the parts of a weight of this name."""
        return tuple(f"{weight}_{part}" for part in self.packing.parts)

    def value(self, parts: Sequence[Tensor]) -> Tensor:
        """The weight, made anew."""
        found: Tensor = torch.ops.graftc.unpack(list(parts), self.packing.text, list(self.shape), self.dtype)
        return found


def weight_name(codes: str) -> str:
    """The name of the weight whose first part is called so: see `PackedType.names`."""
    return codes.removesuffix("_codes")


def swapped(sizes: Sequence[int]) -> tuple[int, ...]:
    """Sizes with the last two in each other's place."""
    return (*sizes[:-2], sizes[-1], sizes[-2])


@contextmanager
def real_values() -> Iterator[None]:
    """What is made inside has values, and can be kept for other calls, also where a graph is traced."""
    with no_modes(), torch.inference_mode(False):
        yield


def as_bytes(numbers: Tensor, shape: Sequence[int] | None = None) -> Tensor:
    """Numbers as ``uint8``: their bytes along the last axis, which one without axes is given, or in another shape."""
    found = (numbers if numbers.dim() else numbers.reshape(1)).detach().contiguous().view(torch.uint8)
    return found if shape is None else found.reshape(tuple(shape))


def via_of(dtype: torch.dtype) -> int:
    """The number of an element type in `VIA`. `ValueError` for others."""
    return VIA.index(dtype)


def from_bytes(stored: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The way back from `as_bytes`."""
    return stored.view(dtype)
