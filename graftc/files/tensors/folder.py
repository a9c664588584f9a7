"""Access to the tensors of a file or folder by name, whichever files they are in."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import Any, NoReturn, Self

from torch import Tensor

from graftc.files.tensors.headers import Shard, StoredTensor, read_shard
from graftc.files.tensors.mapped import DTYPES, MappedFile
from graftc.files.tensors.weights import INDEX, SINGLE, UnsafeFileError, WeightFiles, weight_files
from graftc.specs.errors.diagnostics import GraftError, Place

_SHOWN = 10
_OPENING = Lock()
"""Held while a file is opened, so that threads share it; folders themselves can be copied."""


@dataclass(frozen=True)
class Refusal:
    """The error for a file that cannot be used.

    Attributes:
        code: the code of the error for files that are missing or damaged.
        unsafe: the code for names that lead out of a folder; `code` by default.
        hint: what to do about it.
        located: whether the error reports the file as its place.
    """

    code: str
    unsafe: str | None = None
    hint: str | None = None
    located: bool = False

    def error(
        self, path: Path, reason: str, details: Iterable[str] = (), *, unsafe: bool = False, hint: str | None = None
    ) -> GraftError:
        """Return the error for a path and a reason."""
        code = (self.unsafe or self.code) if unsafe else self.code
        place = Place(str(path)) if self.located else None
        return GraftError(code, reason, place=place, hint=hint or self.hint, details=tuple(details))


_CHECKPOINT = Refusal("GC100", "GC101", "download the whole checkpoint again")


class TensorFolder(Mapping[str, Tensor]):
    """The tensors of a safetensors file, or of a folder as transformers loads it.

    All headers are read and checked at once. A tensor is mapped into memory when it is requested, so that the system
    reads only what is used; from then on, its file is open until `release`, and for as long as one of its tensors is in
    use. Used as a context manager, the folder releases its files at the end.

    Args:
        path: the file, or the folder.
        refusal: the error for files that cannot be used.
        strict: whether a folder's index and its files have to agree on every tensor. Otherwise, as in transformers,
            files may contain tensors that the index does not list, or lists under another file.
        writable: whether writing to tensors changes the file; if not, writing changes private copies and should be
            avoided.

    Attributes:
        path: the file, or the folder.
        shards: the headers of its files, in the order of their names.
        index: the contents of the index; None if there is none.
        index_name: the name of the index file.

    Raises:
        GraftError: with the codes of `refusal`; it lists all problems.
    """

    def __init__(
        self, path: Path, refusal: Refusal = _CHECKPOINT, *, strict: bool = True, writable: bool = False
    ) -> None:
        self.path, self._refusal, self._writable = path, refusal, writable
        self._files: dict[Path, MappedFile] = {}
        self.index: Mapping[str, Any] | None = None
        self.index_name: str | None = None
        if path.is_dir():
            files = self._weights()
            self.index, self.index_name = files.index, files.index_name
            self.shards = self._headers([path / name for name in files.names])
            if wrong := list(_against_index(self.shards, self.index if strict else None)):
                self._damaged(wrong)
        else:
            self.shards = self._headers([path])

    def _weights(self) -> WeightFiles:
        try:
            files = weight_files(self.path)
        except UnsafeFileError as error:
            raise self._refusal.error(self.path, str(error), unsafe=True) from error
        except OSError as error:
            self._damaged([_reason(error)], error)
        except ValueError as error:
            self._damaged([str(reason) for reason in error.args], error)
        if files is None:
            hint = "pass the folder of a transformers model that is stored as safetensors"
            if any(self.path.glob("*.bin")):
                hint = "its weights are pickles (.bin), which are not read: save the model again, as safetensors"
            raise self._refusal.error(self.path, f"{self.path} has neither {SINGLE} nor {INDEX}", hint=hint)
        return files

    def _headers(self, paths: Iterable[Path]) -> tuple[Shard, ...]:
        shards, damage = [], []
        for path in paths:
            try:
                shards.append(read_shard(path))
            except FileNotFoundError:
                damage.append("it does not exist" if path == self.path else f"{path.name} is missing")
            except (OSError, ValueError) as error:
                damage.append(_reason(error) if path == self.path else f"{path.name}: {_reason(error)}")
        if damage:
            self._damaged(damage)
        return tuple(shards)

    def _damaged(self, damage: list[str], cause: BaseException | None = None) -> NoReturn:
        more = [f"... and {len(damage) - _SHOWN} more"] if len(damage) > _SHOWN else []
        what = "is damaged" if self.path.is_dir() else "cannot be read"
        raise self._refusal.error(self.path, f"{self.path} {what}: {damage[0]}", [*damage[1:_SHOWN], *more]) from cause

    @cached_property
    def entries(self) -> Mapping[str, StoredTensor]:
        """The dtype, shape and position of each stored tensor, by name."""
        return {name: tensor for shard in self.shards for name, tensor in shard.tensors.items()}

    @cached_property
    def shard_of(self) -> Mapping[str, Shard]:
        """The file that contains each tensor, by name."""
        return {name: shard for shard in self.shards for name in shard.tensors}

    @property
    def size(self) -> int:
        """The size of all files, in bytes."""
        return sum(shard.size for shard in self.shards)

    def __getitem__(self, name: str) -> Tensor:
        stored = self.entries[name]
        if stored.dtype not in DTYPES:
            self._damaged([f"{name} is stored as {stored.dtype}, which torch does not support"])
        return self._file(name).tensor(stored)

    def raw(self, name: str) -> Tensor:
        """Return the bytes of a tensor, ``uint8``."""
        return self._file(name).raw(self.entries[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __contains__(self, name: object) -> bool:
        return name in self.entries

    def _file(self, name: str) -> MappedFile:
        shard = self.shard_of[name]
        with _OPENING:
            if shard.path not in self._files:
                try:
                    self._files[shard.path] = MappedFile(shard, writable=self._writable)
                except (OSError, ValueError) as error:
                    self._damaged([f"{shard.name}: {_reason(error)}"], error)
            return self._files[shard.path]

    def release(self) -> None:
        """Flush all changes to disk, and release all files."""
        with _OPENING:
            files = list(self._files.values())
            self._files.clear()
        for file in files if self._writable else ():
            file.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def _reason(error: OSError | ValueError) -> str:
    """Return why a file cannot be read, without its path."""
    return getattr(error, "strerror", None) or str(error)


def _against_index(shards: Iterable[Shard], index: Mapping[str, Any] | None) -> Iterator[str]:
    """Yield messages for tensors that are in two files, and for differences from the index."""
    places: dict[str, str] = {}
    for shard in shards:
        for name in shard.tensors:
            if name in places:
                yield f"{name} is in {places[name]} and in {shard.name}"
            places[name] = shard.name
    table: Mapping[str, str] = index["weight_map"] if index is not None else places
    for name, file in table.items():
        if places.get(name) != file:
            yield f"{name} is not in {file}, contrary to the index"
    for name in sorted(places.keys() - table.keys()):
        yield f"{name} is not in the index"
