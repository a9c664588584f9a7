"""Names of a model's tensors and of those in files: the same, but for ties and for what a class puts in front."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from graftc.runtime.streaming.shards import Checkpoint
from graftc.specs.errors.diagnostics import GraftError

__all__ = ["FileNames"]


class FileNames:
    """From a model's names to those in a checkpoint.

    A class with a head calls its body ``model.`` or the like, and a checkpoint may have been saved with or without it:
    `fit` finds the one prefix that is to be put in front, or left out, so that most names are there.

    Args:
        checkpoint: the files.
        aliases: tied names, each to the name that owns the tensor.
    """

    def __init__(self, checkpoint: Checkpoint, aliases: Mapping[str, str]) -> None:
        self._stored = checkpoint.tensors().keys()
        self._where = checkpoint.path
        self._tied: dict[str, list[str]] = {}
        for alias, owner in aliases.items():
            self._tied.setdefault(owner, []).append(alias)
        self._owner = dict(aliases)
        self._added, self._removed = "", ""

    def fit(self, names: Iterable[str]) -> None:
        """Find the prefix by which most of these names are in the files."""
        wanted = list(names)
        heads = {name.partition(".")[0] + "." for name in (*self._stored, *wanted) if "." in name}
        options = [("", ""), *((head, "") for head in sorted(heads)), *(("", head) for head in sorted(heads))]

        def found(option: tuple[str, str]) -> int:
            self._added, self._removed = option
            return sum(self._spelled(name) in self._stored for name in wanted)

        self._added, self._removed = max(options, key=found)  # the first of equals: no prefix

    def _spelled(self, name: str) -> str:
        return self._added + name.removeprefix(self._removed)

    def find(self, name: str) -> str | None:
        """The name in the files of a model's tensor, or of one that is tied to it; None where there is none."""
        owner = self._owner.get(name, name)
        for each in (name, owner, *self._tied.get(owner, ())):
            for spelled in (self._spelled(each), each):
                if spelled in self._stored:
                    return spelled
        return None

    def of(self, name: str) -> str:
        """The name in the files.

        Raises:
            GraftError: GC102 where there is none.
        """
        found = self.find(name)
        if found is None:
            message = f"{self._where} has no {name}, which the adapter changes"
            raise GraftError("GC102", message, hint="merge in memory, which knows how the class names its tensors")
        return found
