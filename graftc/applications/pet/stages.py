"""The finished stages of a recipe: each is on disk before the next one begins."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from graftc.applications.recipes.folder import begin_recipe, has_recipe, make_folder
from graftc.compiler.capture.identity.fingerprint import tensor_digest
from graftc.files.tensors.folder import Refusal, TensorFolder
from graftc.files.tensors.writing import save_tensors
from graftc.files.writing import recover, staged, write_text
from graftc.specs.errors.diagnostics import GraftError
from graftc.specs.regular_files import read_regular

_DIGEST = "sha256"
_ANEW = "delete it, and every stage after it; the same call computes them again"
_LINES_BYTES = 2**30


class KeptStages:
    """The stages of a recipe, by name: each is computed once, and read from disk if it is already stored.

    Without a folder, nothing is stored.

    Args:
        folder: the recipe's folder; it need not exist, because `begin` creates it.
        identity: everything on which the recipe depends, as plain data.

    Attributes:
        begun: whether the folder already contains the recipe.

    Raises:
        GraftError: GC058 if the folder contains another recipe; the message names the differences.
    """

    def __init__(self, folder: Path | None, identity: Mapping[str, Any]) -> None:
        self.folder, self._identity = folder, identity
        self.begun = folder is not None and has_recipe(folder, identity)

    def begin(self) -> None:
        """Create the recipe's folder, unless there is none to create or the recipe has already begun.

        Raises:
            GraftError: GC064 if it cannot be created.
        """
        if self.folder is not None and not self.begun:
            begin_recipe(self.folder, self._identity)

    def tensors(self, name: str, make: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Return tensors on the CPU, read from ``NAME.safetensors``; they are computed and written there if needed."""
        path = self.place(f"{name}.safetensors")
        if path is None:
            return dict(make())
        if not path.exists():
            tensors = {key: tensor.contiguous() for key, tensor in make().items()}
            with staged(path) as file:
                save_tensors(tensors, file, metadata={_DIGEST: _digest_of(tensors)})
        return _whole(path)

    def lines(self, name: str, make: Callable[[], Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
        """Return JSON objects, read from the lines of ``NAME.jsonl``; they are computed and written there if needed."""
        path = self.place(f"{name}.jsonl")
        if path is None:
            return [dict(line) for line in make()]
        if not path.exists():
            lines = [json.dumps(line, ensure_ascii=False, allow_nan=False) for line in make()]
            write_text(path, "".join(f"{line}\n" for line in [*lines, json.dumps({_DIGEST: _text_digest(lines)})]))
        try:
            *kept, last = read_regular(path, _LINES_BYTES).decode("utf-8").splitlines()
            if json.loads(last) == {_DIGEST: _text_digest(kept)}:
                return [json.loads(line) for line in kept]
        except (OSError, ValueError, RecursionError):
            pass
        raise _damaged(path)

    def plain(self, name: str, data: Mapping[str, Any]) -> None:
        """Write plain data to ``NAME.json``; if the file exists, its contents must be the same.

        Raises:
            GraftError: GC082 if the contents differ.
        """
        path = self.place(f"{name}.json")
        if path is None:
            return
        text = json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        if not path.exists():
            write_text(path, text)
        elif not _holds(path, text.encode("utf-8", "surrogatepass")):
            raise _damaged(path)

    def place(self, name: str) -> Path | None:
        """Return the path of a stage's file or folder, after creating its parent folder; None if nothing is stored."""
        if self.folder is None:
            return None
        path = self.folder / name
        recover(make_folder(path.parent))
        return path

    def forget(self, name: str) -> None:
        """Delete a stage's folder, if it exists."""
        if self.folder is not None and (self.folder / name).exists():
            shutil.rmtree(self.folder / name)


def _whole(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file, after checking that they are unchanged since they were written.

    Raises:
        GraftError: GC082 if they have changed.
    """
    file = TensorFolder(path, Refusal("GC082", hint=_ANEW))
    tensors = dict(file)
    if file.shards[0].metadata.get(_DIGEST) != _digest_of(tensors):
        raise _damaged(path)
    return tensors


def _damaged(path: Path) -> GraftError:
    return GraftError("GC082", f"{path} is damaged: its contents are not what the run wrote", hint=_ANEW)


def _holds(path: Path, content: bytes) -> bool:
    try:
        return read_regular(path, len(content)) == content
    except OSError:
        return False


def _digest_of(tensors: Mapping[str, Tensor]) -> str:
    return _text_digest([f"{n} {t.dtype} {list(t.shape)} {tensor_digest(t)}" for n, t in sorted(tensors.items())])


def _text_digest(lines: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode("utf-8", "surrogatepass")).hexdigest()
