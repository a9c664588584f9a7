"""The tensors of a folder by name, read when they are asked for."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from graftc.specs.errors.diagnostics import GraftError, first_line

INDEX = "model.safetensors.index.json"
_WHOLE = "model.safetensors"
_ANEW = "take the checkpoint anew from where it came"


class FolderTensors:
    """What the safetensors of a folder hold.

    Args:
        folder: of a model of transformers.

    Raises:
        GraftError: GC163 where there are none, or one cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._open: dict[str, Any] = {}
        for file in _files(folder):
            try:
                opened = safe_open(file, framework="pt").__enter__()  # type: ignore[no-untyped-call]
                self._open.update(dict.fromkeys(opened.keys(), opened))
            except (SafetensorError, OSError, ValueError) as error:
                damaged(f"{file} cannot be read: {first_line(error)}", cause=error)
        if not self._open:
            damaged(f"{folder} has no safetensors")

    def __contains__(self, name: str) -> bool:
        return name in self._open

    def ending(self, suffix: str) -> Iterator[str]:
        """What names that end so have before it, in order."""
        return (name.removesuffix(suffix) for name in sorted(self._open) if name.endswith(suffix))

    def shape(self, name: str) -> tuple[int, ...]:
        """Sizes of a tensor."""
        return tuple(self._open[name].get_slice(name).get_shape())

    def kind(self, name: str) -> str:
        """The element type of a tensor as the file has it: ``F8_E4M3``."""
        return str(self._open[name].get_slice(name).get_dtype())

    def get(self, name: str, *dtypes: torch.dtype, shape: Sequence[int | None] | None = None) -> Tensor:
        """A tensor.

        Args:
            name: its name.
            dtypes: element types that it may have; any without.
            shape: sizes that it must have, None where any will do.

        Raises:
            GraftError: GC163 where it is missing or another one.
        """
        if name not in self._open:
            damaged(f"{self.folder} has no {name}")
        try:
            found: Tensor = self._open[name].get_tensor(name)
        except (SafetensorError, OSError, ValueError, RuntimeError) as error:
            damaged(f"{name} cannot be read: {first_line(error)}", cause=error)
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


def _files(folder: Path) -> list[Path]:
    """The files that transformers would read."""
    index = folder / INDEX
    if not index.is_file():
        whole = folder / _WHOLE
        return [whole] if whole.is_file() else sorted(folder.glob("*.safetensors"))
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        damaged(f"{index} cannot be read: {first_line(error)}", cause=error)
    strange = [name for name in names if not isinstance(name, str) or Path(name).name != name]
    if strange:
        damaged(f"{index} names {strange[0]!r}, which is no file in the folder")
    return [folder / name for name in sorted(names)]
