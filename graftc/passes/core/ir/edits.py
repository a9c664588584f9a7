"""A Program's edits: the replacements of nodes made by adaptations, indexed by node.

A Program has one `Edits`, and all changes go through it, so that the index stays valid when edits are inserted, rebased
or copied.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import overload

from torch import fx


@dataclass(frozen=True)
class Edit:
    """One replacement that an adaptation made: every use of ``before`` now reads ``after``.

    Attributes:
        adaptation, site: the adaptation that made the edit, and the site where it did so.
        before, after: the node that was replaced, and its replacement.
        narrow: if true, only the readers at ``site`` read ``after``: the site's input was replaced, not a result. For a
            sublayer, only nodes inserted later read ``after``, since an adapter still reads the value that it
            replaced.
    """

    adaptation: str
    site: str
    before: fx.Node
    after: fx.Node
    narrow: bool = False

    @property
    def scope(self) -> str | None:
        """The only site that sees the edit; None if every reader sees it."""
        return self.site if self.narrow else None


class Edits(Sequence[Edit]):
    """One Program's edits, in the order in which they were made.

    If several edits start from one node, look-ups see the last one. Look-ups take constant time; for `current`, this is
    true on average, since it caches the paths that it has followed.

    Args:
        edits: the initial edits, recorded as they are: none of them rebases another.
    """

    def __init__(self, edits: Iterable[Edit] = ()) -> None:
        self._edits: list[Edit] = []
        self._starting: dict[fx.Node, list[int]] = {}
        self._next: dict[tuple[fx.Node, str | None], int] = {}
        self._ending: dict[fx.Node, int] = {}
        self._ending_at: dict[tuple[fx.Node, str], int] = {}
        self._ahead: dict[str | None, dict[fx.Node, fx.Node]] = {}
        for edit in edits:
            self._record(edit)

    @overload
    def __getitem__(self, index: int) -> Edit: ...

    @overload
    def __getitem__(self, index: slice) -> list[Edit]: ...

    def __getitem__(self, index: int | slice) -> Edit | list[Edit]:
        return self._edits[index]

    def __len__(self) -> int:
        return len(self._edits)

    def __iter__(self) -> Iterator[Edit]:
        return iter(self._edits)

    def add(self, edit: Edit) -> None:
        """Record an edit.

        Unless it is narrow, all edits that started from its ``before``, including narrow ones, now start from its
        ``after``, so that earlier replacements still apply after it.
        """
        if not edit.narrow:
            self._rebase(edit.before, edit.after)
        self._record(edit)

    def mapped(self, change: Callable[[fx.Node], fx.Node]) -> Edits:
        """Return the same edits on mapped nodes, such as copies or the replacements of erased nodes."""
        return Edits(replace(e, before=change(e.before), after=change(e.after)) for e in self._edits)

    def within(self, nodes: Collection[fx.Node]) -> Edits:
        """Return the edits whose nodes are both in ``nodes``; the others refer to an erased node."""
        return Edits(e for e in self._edits if e.before in nodes and e.after in nodes)

    def replacement(self, node: fx.Node, site: str | None = None) -> Edit | None:
        """Return the edit that starts from a node, or None if the node has not been replaced.

        Args:
            node: the node that may have been replaced.
            site: a site whose narrow edits are included; by default no narrow edits are.
        """
        index = self._next.get((node, None))
        if site is not None:
            narrow = self._next.get((node, site))
            index = narrow if index is None else max(index, -1 if narrow is None else narrow)
        return None if index is None else self._edits[index]

    def origin(self, node: fx.Node) -> Edit | None:
        """Return the edit, narrow or not, that created a node as a replacement, or None."""
        index = self._ending.get(node)
        return None if index is None else self._edits[index]

    def current(self, node: fx.Node, site: str | None = None) -> fx.Node:
        """Return the node that replaces ``node`` after all edits, or ``node`` itself if it has not been replaced.

        Args:
            node: the node that may have been replaced.
            site: a site whose narrow edits are included; see `replacement`.
        """
        ahead = self._ahead.setdefault(site, {})
        passed: list[fx.Node] = []
        while True:
            later = ahead.get(node)
            if later is None:
                edit = self.replacement(node, site)
                if edit is None:
                    break
                later = edit.after
            passed.append(node)
            node = later
        ahead.update(dict.fromkeys(passed, node))
        return node

    def original(self, node: fx.Node) -> fx.Node:
        """Return the node that ``node`` originally replaced, traced back through all edits."""
        while (edit := self.origin(node)) is not None:
            node = edit.before
        return node

    def unchanged_input(self, node: fx.Node, site: str) -> fx.Node:
        """Return the node that a site would read instead of ``node`` if it had no narrow edits of its own."""
        while (index := self._ending_at.get((node, site))) is not None:
            node = self._edits[index].before
        return node

    def _record(self, edit: Edit) -> None:
        at, scope = len(self._edits), edit.scope
        if scope is not None and edit.before in self._ahead.get(scope, ()):
            del self._ahead[scope]  # the site's path branches off here
        self._edits.append(edit)
        self._starting.setdefault(edit.before, []).append(at)
        self._next[edit.before, scope] = at
        self._ending[edit.after] = at
        if scope is not None:
            self._ending_at[edit.after, scope] = at

    def _rebase(self, before: fx.Node, after: fx.Node) -> None:
        """Make the edits that start from ``before`` start from ``after``.

        Paths from other nodes end where they did: ``after`` comes between ``before`` and its earlier replacements.
        """
        if after in self._starting:
            self._ahead.clear()
        for at in self._starting.pop(before, ()):
            edit = self._edits[at] = replace(self._edits[at], before=after)
            self._next.pop((before, edit.scope), None)
            self._next[after, edit.scope] = max(at, self._next.get((after, edit.scope), at))
            self._starting.setdefault(after, []).append(at)
