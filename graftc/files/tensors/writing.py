"""Write tensor files."""

from __future__ import annotations

import contextlib
import errno
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from graftc.passes.core.weights.sharding import gathered

FLOATING = ("F64", "F32", "F16", "BF16")
"""Dtypes of weights and adapters, by their safetensors names: those that can be folded, and folded into."""


def save_tensors(tensors: Mapping[str, Tensor], path: Path, *, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file. Tensors that share storage are each written separately.

    Args:
        tensors: the tensors, by name.
        path: the file.
        metadata: metadata for the file's header.

    Raises:
        OSError: if it cannot be written.
    """
    plain = {name: gathered(tensor).cpu().contiguous() for name, tensor in tensors.items()}
    shared: set[int] = set()
    for name, tensor in plain.items():
        if tensor.numel() and tensor.untyped_storage().data_ptr() in shared:
            plain[name] = tensor.clone()
        shared.add(tensor.untyped_storage().data_ptr())
    with writing(path):
        save_file(plain, path, metadata=metadata)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Convert I/O errors of other libraries' writers to `OSError` while the block runs.

    safetensors raises errors of its own class; tokenizers raises plain exceptions whose text ends with the error
    number.
    """
    try:
        yield
    except Exception as error:
        number = _number(str(error))
        if isinstance(error, OSError) or (number is None and not isinstance(error, SafetensorError)):
            raise
        raise OSError(errno.EIO if number is None else number, str(error), str(path)) from error


def _number(text: str) -> int | None:
    """Return the system's error number from Rust's text, ``... (os error 28)``; None if there is none."""
    match = re.search(r"\(os error (\d+)\)", text)
    return None if match is None else int(match[1])
