"""Write a GGUF file tensor by tensor, and read it back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from graftc.runtime.export.formats.gguf import FileType
from graftc.specs.errors.diagnostics import GraftError
from graftc.specs.errors.packages import optional_package

_TYPES: Mapping[FileType, tuple[str, str]] = {
    "f32": ("F32", "ALL_F32"),
    "f16": ("F16", "MOSTLY_F16"),
    "bf16": ("BF16", "MOSTLY_BF16"),
}
_LARGEST_HALF = 65504.0


@dataclass(frozen=True)
class Entry:
    """A tensor in a file.

    Attributes:
        name: its name in GGUF.
        shape: its shape in numpy's order.
        make: a function that returns its values, which are read as float32; called when the tensor is written, and
            again for the comparison.
        exact: whether it stays float32 regardless of the file's element type, as vectors and position tables do.
    """

    name: str
    shape: tuple[int, ...]
    make: Callable[[], Tensor]
    exact: bool = False

    @classmethod
    def of(cls, name: str, tensor: Tensor, *, exact: bool = False) -> Entry:
        """Return an entry for an existing tensor."""
        return cls(name, tuple(tensor.shape), lambda: tensor, exact)


def package() -> Any:
    """Return the package ``gguf``.

    Raises:
        GraftError: GC061 if it is not installed.
    """
    return optional_package("gguf", "GGUF", "gguf")


def name_of(names: Any, tensor: str) -> str:
    """Return the GGUF name of a model's tensor.

    Args:
        names: a table returned by ``gguf.get_tensor_name_map``.
        tensor: its name in transformers, with ``.weight`` or ``.bias``.

    Raises:
        GraftError: GC060 for a tensor without a name in GGUF.
    """
    name = names.get_name(tensor, try_suffixes=(".weight", ".bias"))
    if name is None:
        raise GraftError("GC060", f"{tensor} has no name in GGUF", hint="leave it out, or merge it into the model")
    return str(name)


@dataclass(frozen=True)
class GgufFile:
    """The content of a GGUF file.

    Attributes:
        arch: the model's architecture.
        entries: its tensors.
        fill: a function that adds everything else to the writer, and returns the reason if a tokenizer is missing.
        fields: metadata that `check` compares, by name; `fill` writes it.
    """

    arch: str
    entries: Sequence[Entry]
    fill: Callable[[Any], str | None]
    fields: Mapping[str, Any] = field(default_factory=dict)

    def write(self, path: Path, dtype: FileType) -> str | None:
        """Write the file, and return the result of `fill`.

        Args:
            path: the file, which must not exist.
            dtype: the element type of tensors that need not be exact; the others are float32.

        Raises:
            GraftError: GC060 for values that the element type cannot represent.
            OSError: if it cannot be written.
        """
        gguf = package()
        kind, word = _TYPES[dtype]
        writer = gguf.GGUFWriter(path, self.arch)
        try:
            lacking = self.fill(writer)
            writer.add_file_type(getattr(gguf.LlamaFileType, word))
            for entry in self.entries:
                own = getattr(gguf.GGMLQuantizationType, "F32" if entry.exact else kind)
                shape, numbers = _described(gguf, entry, own)
                writer.add_tensor_info(entry.name, shape, numbers, _bytes(gguf, entry, own), raw_dtype=own)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for entry in self.entries:
                writer.write_tensor_data(_data(gguf, entry, kind))
        finally:
            writer.close()
        return lacking

    def check(self, path: Path, dtype: FileType) -> None:
        """Check that reading the file yields the same names, sizes, bytes and metadata.

        Raises:
            GraftError: GC060 if they differ.
        """
        gguf, kind = package(), _TYPES[dtype][0]
        reader = gguf.GGUFReader(path)
        tensors = {tensor.name: tensor for tensor in reader.tensors}
        for name, value in self.fields.items():
            if name not in reader.fields or reader.fields[name].contents() != value:
                raise GraftError("GC060", f"{name} reads back differently from what was written")
        for entry in self.entries:
            tensor = tensors.pop(entry.name, None)
            same = tensor is not None and tuple(int(n) for n in reversed(tensor.shape)) == entry.shape
            if not same or tensor.data.tobytes() != _data(gguf, entry, kind).tobytes():
                raise GraftError("GC060", f"{entry.name} reads back differently from what was written")
        if tensors:
            raise GraftError("GC060", f"the file has a tensor that was not written: {next(iter(tensors))}")


def _described(gguf: Any, entry: Entry, own: Any) -> tuple[Sequence[int], Any]:
    """Return the shape and numpy dtype that the writer expects; for bfloat16, both describe bytes."""
    if own == gguf.GGMLQuantizationType.BF16:
        return gguf.quant_shape_to_byte_shape(entry.shape, own), np.dtype(np.uint8)
    return entry.shape, np.dtype(np.float16 if own == gguf.GGMLQuantizationType.F16 else np.float32)


def _bytes(gguf: Any, entry: Entry, own: Any) -> int:
    size = {gguf.GGMLQuantizationType.F32: 4}.get(own, 2)
    return int(np.prod(entry.shape)) * size


def _data(gguf: Any, entry: Entry, kind: str) -> np.ndarray[Any, Any]:
    value = entry.make().detach().to("cpu", torch.float32).contiguous()
    if tuple(value.shape) != entry.shape:
        raise GraftError("GC060", f"{entry.name} is {list(value.shape)}, not {list(entry.shape)}")
    if not bool(value.isfinite().all()):
        raise GraftError("GC060", f"{entry.name} has values that are not finite")
    if entry.exact or kind == "F32":
        return value.numpy()
    if kind == "F16":
        if float(value.abs().max()) > _LARGEST_HALF:
            raise GraftError("GC060", f"{entry.name} has values that f16 cannot represent", hint="write bf16 or f32")
        return value.half().numpy()
    return value.bfloat16().contiguous().view(torch.uint8).numpy()
