"""Map the names of a model's tensors to those in its files, which differ by ties and by a prefix added by a class."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from graftc.files.tensors.folder import TensorFolder
from graftc.specs.errors.diagnostics import GraftError


class FileNames:
    """The names of a model's tensors in a checkpoint.

    A class with a head stores its body under a prefix such as ``model.``, and a checkpoint may have been saved with or
    without it: `fit` determines the prefix to add or to remove so that most names are found.

    Args:
        checkpoint: the files.
        aliases: tied names, each mapped to the name that owns the tensor.
    """

    def __init__(self, checkpoint: TensorFolder, aliases: Mapping[str, str]) -> None:
        self._stored = checkpoint.entries.keys()
        self._where = checkpoint.path
        self._tied: dict[str, list[str]] = {}
        for alias, owner in aliases.items():
            self._tied.setdefault(owner, []).append(alias)
        self._owner = dict(aliases)
        self._added, self._removed = "", ""

    def fit(self, names: Iterable[str]) -> None:
        """Determine the prefix change with which most of the given names occur in the files."""
        wanted = list(names)
        known, plain = set(wanted), {name for name in wanted if name in self._stored}
        added, removed = Counter[str](), Counter[str]()
        for name in self._stored:
            head, _, rest = name.partition(".")
            added[f"{head}."] += rest in known
        for name in wanted:
            head, _, rest = name.partition(".")
            removed[f"{head}."] += (rest in self._stored) - (name in plain)
        options = {("", ""): len(plain)} | {(head, ""): added[head] for head in sorted(added)}
        options |= {("", head): len(plain) + removed[head] for head in sorted(removed)}
        self._added, self._removed = max(options, key=lambda option: options[option])  # the first of equals: no prefix

    def _spelled(self, name: str) -> str:
        return self._added + name.removeprefix(self._removed)

    def find(self, name: str) -> str | None:
        """Return the name that a model's tensor, or one that is tied to it, has in the files; None if there is none."""
        owner = self._owner.get(name, name)
        for each in (name, owner, *self._tied.get(owner, ())):
            for spelled in (self._spelled(each), each):
                if spelled in self._stored:
                    return spelled
        return None

    def of(self, name: str) -> str:
        """Return the name that a model's tensor, or one that is tied to it, has in the files.

        Raises:
            GraftError: GC102 if there is none.
        """
        stored_name = self.find(name)
        if stored_name is None:
            message = f"{self._where} has no {name}, which the adapter changes"
            raise GraftError("GC102", message, hint="merge in memory, which knows how the class names its tensors")
        return stored_name
