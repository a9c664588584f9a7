"""The tensors of a folder by name, read when they are asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NoReturn

import torch
from torch import Tensor

from graftc.runtime.tensors.folder import Refusal, TensorFolder
from graftc.specs.errors.diagnostics import GraftError

_ANEW = "take the checkpoint anew from where it came"
REFUSAL = Refusal("GC163", "GC101", _ANEW)


class FolderTensors:
    """What the safetensors of a folder hold.

    Args:
        stored: the tensors of a model of transformers.

    Attributes:
        stored: the same.
        read: names of those that have been read.
    """

    def __init__(self, stored: TensorFolder) -> None:
        self.stored, self.read = stored, set[str]()

    def __contains__(self, name: str) -> bool:
        return name in self.stored

    def ending(self, suffix: str) -> Iterator[str]:
        """What names that end so have before it, in order."""
        return (name.removesuffix(suffix) for name in sorted(self.stored) if name.endswith(suffix))

    def shape(self, name: str) -> tuple[int, ...]:
        """Sizes of a tensor."""
        return self.stored.entries[name].shape

    def kind(self, name: str) -> str:
        """The element type of a tensor as the file has it: ``F8_E4M3``."""
        return self.stored.entries[name].dtype

    def get(self, name: str, *dtypes: torch.dtype, shape: Sequence[int | None] | None = None) -> Tensor:
        """A tensor.

        Args:
            name: its name.
            dtypes: element types that it may have; any without.
            shape: sizes that it must have, None where any will do.

        Raises:
            GraftError: GC163 where it is missing or another one.
        """
        if name not in self.stored:
            damaged(f"{self.stored.path} has no {name}")
        found = self.stored[name]
        self.read.add(name)
        if dtypes and found.dtype not in dtypes:
            damaged(f"{name} is {_named(found.dtype)}, not {' or '.join(map(_named, dtypes))}")
        fits = shape is None or len(shape) == found.dim()
        if shape is not None and not (fits and all(w in (None, s) for w, s in zip(shape, found.shape, strict=True))):
            wanted = ", ".join("any" if size is None else str(size) for size in shape)
            damaged(f"{name} is {list(found.shape)}, not [{wanted}]")
        return found


def damaged(message: str, *, cause: BaseException | None = None) -> NoReturn:
    """Refuse tensors that do not fit together: GC163."""
    raise GraftError("GC163", message, hint=_ANEW) from cause


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
