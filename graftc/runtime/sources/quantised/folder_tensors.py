"""Access a folder's tensors by name; each is read when it is requested."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NoReturn

import torch
from torch import Tensor

from graftc.files.tensors.folder import Refusal, TensorFolder
from graftc.specs.errors.diagnostics import GraftError
from graftc.specs.errors.text import shown

_ANEW = "download the checkpoint again"
REFUSAL = Refusal("GC163", "GC101", _ANEW)


class FolderTensors:
    """The tensors in a folder's safetensors files.

    Args:
        stored: the tensors of a transformers model.

    Attributes:
        stored: the tensors as given.
        read: names of the tensors that have been read.
    """

    def __init__(self, stored: TensorFolder) -> None:
        self.stored, self.read = stored, set[str]()

    def __contains__(self, name: str) -> bool:
        return name in self.stored

    def ending(self, suffix: str) -> Iterator[str]:
        """Return the sorted names that end with a suffix, without the suffix."""
        return (name.removesuffix(suffix) for name in sorted(self.stored) if name.endswith(suffix))

    def kind(self, name: str) -> str:
        """Return the name that a tensor's dtype has in the file, such as ``F8_E4M3``."""
        return self.stored.entries[name].dtype

    def get(self, name: str, *dtypes: torch.dtype, shape: Sequence[int | None] | None = None) -> Tensor:
        """Read a tensor.

        Args:
            name: its name.
            dtypes: the allowed dtypes; any if none are given.
            shape: the required sizes, with None for any size.

        Raises:
            GraftError: GC163 if it is missing, or has another dtype or shape.
        """
        if name not in self.stored:
            damaged(f"{self.stored.path} has no {name}")
        tensor = self.stored[name]
        self.read.add(name)
        if dtypes and tensor.dtype not in dtypes:
            damaged(f"{name} is {_named(tensor.dtype)}, not {' or '.join(map(_named, dtypes))}")
        if shape is not None and not _fits(tensor, shape):
            wanted = ", ".join("any" if size is None else str(size) for size in shape)
            damaged(f"{name} is {list(tensor.shape)}, not [{wanted}]")
        return tensor

    def require_sizes(self, name: str, sizes: Sequence[int]) -> None:
        """Check that a tensor contains the given sizes of a weight.

        Raises:
            GraftError: GC163 if it contains anything else.
        """
        stated = self.get(name).tolist()
        if stated != list(sizes):
            damaged(f"{name} is {shown(stated)}, not {list(sizes)}")


def damaged(message: str, *, cause: BaseException | None = None) -> NoReturn:
    """Raise GC163 for tensors that do not fit together."""
    raise GraftError("GC163", message, hint=_ANEW) from cause


def _fits(tensor: Tensor, shape: Sequence[int | None]) -> bool:
    sizes = tensor.shape
    return len(shape) == len(sizes) and all(w in (None, size) for w, size in zip(shape, sizes, strict=True))


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
