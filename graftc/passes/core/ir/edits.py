"""Edits: what adaptations have put in the place of what, with an index by node.

A Program has one `Edits`. All changes go through it, so that the index holds whatever is inserted, rebased or copied.
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
        adaptation, site: who made it, and where.
        before, after: what was replaced, and by what.
        narrow: only the readers at ``site`` read ``after``: what goes into the site was replaced, not a result; or, of
            a sublayer, what is inserted there later does, since an adapter still reads what it replaced.
    """

    adaptation: str
    site: str
    before: fx.Node
    after: fx.Node
    narrow: bool = False

    @property
    def _scope(self) -> str | None:
        """The site that alone sees it; None where every reader does."""
        return self.site if self.narrow else None


class Edits(Sequence[Edit]):
    """The edits of one Program, in the order in which they were made.

    Of several edits that start from one node, look-ups see the last one. They take constant time, however many edits
    there are; `current` does so on average, since it remembers how far it has come.

    Args:
        edits: taken as they are; none of them rebases another.
    """

    def __init__(self, edits: Iterable[Edit] = ()) -> None:
        self._edits: list[Edit] = []
        self._starting: dict[fx.Node, list[int]] = {}
        self._next: dict[tuple[fx.Node, str | None], int] = {}
        self._made: dict[fx.Node, int] = {}
        self._made_for: dict[tuple[fx.Node, str], int] = {}
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
        """Record an edit. Where it is not narrow, edits that started from its ``before``, narrow ones too, start from
        its ``after`` now: what was put there earlier stands above it."""
        if not edit.narrow:
            self._rebase(edit.before, edit.after)
        self._record(edit)

    def mapped(self, change: Callable[[fx.Node], fx.Node]) -> Edits:
        """The same edits with other nodes: in a copy of the graph, or behind those that have been erased."""
        return Edits(replace(e, before=change(e.before), after=change(e.after)) for e in self._edits)

    def within(self, nodes: Collection[fx.Node]) -> Edits:
        """Those of which both ends are among some nodes: others have been erased."""
        return Edits(e for e in self._edits if e.before in nodes and e.after in nodes)

    def replacement(self, node: fx.Node, site: str | None = None) -> Edit | None:
        """The edit that starts from a node; None where it has not been replaced.

        Args:
            node: what may have been replaced.
            site: a site whose narrow edits count as well; by default none do.
        """
        found = self._next.get((node, None))
        if site is not None:
            narrow = self._next.get((node, site))
            found = narrow if found is None else max(found, -1 if narrow is None else narrow)
        return None if found is None else self._edits[found]

    def origin(self, node: fx.Node) -> Edit | None:
        """The edit, narrow or not, that put a node in its place; None where none did."""
        found = self._made.get(node)
        return None if found is None else self._edits[found]

    def current(self, node: fx.Node, site: str | None = None) -> fx.Node:
        """What stands in the place of a node now, after every edit.

        Args:
            node: what may have been replaced.
            site: see `replacement`.
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
        """What stood in the place of a node before any edit."""
        while (edit := self.origin(node)) is not None:
            node = edit.before
        return node

    def unchanged_input(self, node: fx.Node, site: str) -> fx.Node:
        """What a site would read in the place of a node without its own narrow edits."""
        while (found := self._made_for.get((node, site))) is not None:
            node = self._edits[found].before
        return node

    def _record(self, edit: Edit) -> None:
        at, scope = len(self._edits), edit._scope
        if scope is not None and edit.before in self._ahead.get(scope, ()):
            del self._ahead[scope]  # from here on the site goes another way
        self._edits.append(edit)
        self._starting.setdefault(edit.before, []).append(at)
        self._next[edit.before, scope] = at
        self._made[edit.after] = at
        if scope is not None:
            self._made_for[edit.after, scope] = at

    def _rebase(self, before: fx.Node, after: fx.Node) -> None:
        """What is ahead of other nodes stays so: ``after`` comes between ``before`` and what stood there."""
        if after in self._starting:
            self._ahead.clear()
        for at in self._starting.pop(before, ()):
            edit = self._edits[at] = replace(self._edits[at], before=after)
            self._next.pop((before, edit._scope), None)
            self._next[after, edit._scope] = max(at, self._next.get((after, edit._scope), at))
            self._starting.setdefault(after, []).append(at)
