"""Passes over a Program, and pipelines of them. A pipeline alone keeps times, the history, progress and verification:
a pass says what it needs, what it leaves behind, and what it does."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Generic, Protocol, TypeVar

from graftc.passes.core import progress
from graftc.passes.core.ir.history import Changes, HistoryEntry, Recorder
from graftc.passes.core.ir.program import Program
from graftc.passes.core.ir.verify import verify
from graftc.passes.core.weights.store import Store
from graftc.specs.errors.diagnostics import GraftError, first_line, nearest

OURS = "graftc"
"""The distribution of our own passes."""

VERIFY = "verify"
"""The step of a history that stands behind what was verified."""


class PassContext(Protocol):
    """What every context of passes has: the tensors that Programs name, where anything is verified."""

    @property
    def store(self) -> Store | None:
        """They."""


C = TypeVar("C", bound=PassContext)
Anything = TypeVar("Anything")


@dataclass(frozen=True)
class Pass(Generic[C]):
    """One step over a Program.

    Attributes:
        name: in histories, reports and errors; no two passes of a pipeline have the same.
        apply: takes the Program and the context. It changes the Program in place and gives None, or gives another one
            in which nodes that are kept have their names. What it finds out it leaves in the context.
        requires: what has to be there: facts that earlier passes ensure, or that the pipeline starts with.
        ensures: facts that hold after it.
        rewrites: whether it may change the graph. A plugin's that only looks is held to that.
        wanted: whether there is anything to do; by default there always is.
        verified: whether the verifier runs behind it. Passes in a group are verified by the group.
        origin: the distribution that brings it.
    """

    name: str
    apply: Callable[[Program, C], Program | None]
    requires: frozenset[str] = frozenset()
    ensures: frozenset[str] = frozenset()
    rewrites: bool = True
    wanted: Callable[[Program, C], bool] | None = None
    verified: bool = False
    origin: str = OURS

    def __str__(self) -> str:
        """What it is, on one line."""
        marks = ["looks" if not self.rewrites else "rewrites", *(["verified"] if self.verified else [])]
        marks += ["where wanted"] if self.wanted is not None else []
        marks += [] if self.origin == OURS else [f"from {self.origin}"]
        return _line(self.name, marks, self.requires, self.ensures)


@dataclass(frozen=True)
class PassGroup(Generic[C]):
    """Passes of which there are as many as a spec asks for, such as one for each adaptation.

    Attributes:
        name: of all of them together.
        passes: makes them, in order.
        requires, ensures: as of a `Pass`.
        each: how many of those that rewrite are verified one by one, so that the one to blame is named; after these the
            verifier runs whenever the graph has doubled, and behind the last.
    """

    name: str
    passes: Callable[[Program, C], Sequence[Pass[C]]]
    requires: frozenset[str] = frozenset()
    ensures: frozenset[str] = frozenset()
    each: int = 8
    origin: str = OURS

    def __str__(self) -> str:
        """What it is, on one line."""
        return _line(self.name, ["a group", "verified"], self.requires, self.ensures)


def _line(name: str, marks: Sequence[str], requires: Collection[str], ensures: Collection[str]) -> str:
    facts = [f"requires {', '.join(sorted(requires))}"] if requires else []
    facts += [f"ensures {', '.join(sorted(ensures))}"] if ensures else []
    return f"{name} ({'; '.join([*marks, *facts])})"


@dataclass
class Log:
    """What passes did to a Program, in order: the entries of its history.

    Attributes:
        entries: so far.
    """

    entries: list[HistoryEntry] = field(default_factory=list)
    _recorder: Recorder | None = field(default=None, repr=False)

    def rewritten(self, name: str, program: Program, run: Callable[[], Program | None]) -> Program:
        """Run a step that may change a graph; the Program after it."""
        progress.step(name)
        if self._recorder is None or self._recorder.graph is not program.graph:
            self._recorder = Recorder(program.graph)
        started = time.perf_counter()
        after = run() or program
        seconds = time.perf_counter() - started
        self.entries.append(self._recorder.entry(name, after.graph, seconds))
        return after

    def looked(self, name: str, run: Callable[[], Anything]) -> Anything:
        """Run a step that changes no graph, and return what it returns."""
        progress.step(name)
        started = time.perf_counter()
        result = run()
        self.entries.append(HistoryEntry(name, 0, 0, time.perf_counter() - started, Changes()))
        return result

    def verified(self, program: Program, store: Store | None, stage: str, *, types: bool = False) -> None:
        """Run the verifier behind a stage.

        Raises:
            GraftError: GC040 or GC023.
        """
        assert store is not None
        self.looked(VERIFY, partial(verify, program, store, stage, types=types))


class Pipeline(Generic[C]):
    """Passes in order, each of which finds what it requires.

    Args:
        name: in errors.
        passes: in order.
        given: facts that hold before the first.

    Raises:
        GraftError: GC071 where two passes have one name, or a pass requires what none before it ensures.
    """

    def __init__(
        self, name: str, passes: Sequence[Pass[C] | PassGroup[C]], given: Collection[str] = frozenset()
    ) -> None:
        self.name, self.passes, self.given = name, tuple(passes), frozenset(given)
        known, facts = set[str](), set(self.given)
        for each in self.passes:
            if each.name in known:
                raise GraftError("GC071", f"the pipeline {name!r} has two passes named {each.name!r}")
            missing = sorted(each.requires - facts)
            if missing:
                later = [other.name for other in self.passes if missing[0] in other.ensures]
                hint = f"it has to come after {later[0]!r}" if later else f"the facts are: {', '.join(sorted(facts))}"
                message = (
                    f"in the pipeline {name!r}, {each.name!r} requires {missing[0]!r}, which nothing before ensures"
                )
                raise GraftError("GC071", message, hint=hint)
            known.add(each.name)
            facts |= each.ensures

    def placed(self, added: Pass[C], *, before: str | None = None, after: str | None = None) -> Pipeline[C]:
        """This pipeline with one more pass, in front of a named one or behind it.

        Raises:
            GraftError: GC071 where there is no such pass, or where the order cannot be.
        """
        anchor = before if before is not None else after
        names = [each.name for each in self.passes]
        if anchor not in names:
            close = nearest(str(anchor), names)
            hint = f"did you mean {close[0]!r}?" if close else f"its passes are: {', '.join(names)}"
            raise GraftError("GC071", f"the pipeline {self.name!r} has no pass {anchor!r}", hint=hint)
        at = names.index(anchor) + (before is None)
        return Pipeline(self.name, [*self.passes[:at], added, *self.passes[at:]], self.given)

    def without(self, names: Collection[str]) -> Pipeline[C]:
        """This pipeline without some of its passes."""
        return Pipeline(self.name, [each for each in self.passes if each.name not in names], self.given)

    def run(self, program: Program, context: C, log: Log | None = None) -> Program:
        """Apply every pass that is wanted.

        Args:
            program: what the first one gets.
            context: for all of them.
            log: takes the history.

        Returns:
            What the last one leaves.

        Raises:
            GraftError: from a pass; GC040 where one leaves a graph that is not sound; GC071 where a plugin's changes a
                graph that it says it only looks at, or fails in a way of its own.
        """
        log = Log() if log is None else log
        for each in self.passes:
            program = (
                self._group(each, program, context, log)
                if isinstance(each, PassGroup)
                else self._one(each, program, context, log)
            )
        return program

    def _one(self, each: Pass[C], program: Program, context: C, log: Log) -> Program:
        if each.wanted is not None and not each.wanted(program, context):
            return program
        after = _applied(each, program, context, log)
        if each.verified:
            log.verified(after, context.store, each.name)
        return after

    def _group(self, group: PassGroup[C], program: Program, context: C, log: Log) -> Program:
        passes, pending, size = group.passes(program, context), list[str](), len(program.graph.nodes)
        last = max((number for number, each in enumerate(passes) if each.rewrites), default=-1)
        for number, each in enumerate(passes):
            program = _applied(each, program, context, log)
            if not each.rewrites:
                continue
            pending.append(each.name)
            if number < group.each or number == last or len(program.graph.nodes) >= 2 * size:
                log.verified(program, context.store, _between(pending))
                pending, size = [], len(program.graph.nodes)
        return program

    def __iter__(self) -> Iterator[Pass[C] | PassGroup[C]]:
        return iter(self.passes)

    def __str__(self) -> str:
        """The passes, one on a line."""
        start = f", from {', '.join(sorted(self.given))}" if self.given else ""
        return "\n".join([f"{self.name}{start}", *(f"  {each}" for each in self.passes)])


def _applied(each: Pass[C], program: Program, context: C, log: Log) -> Program:
    if each.origin != OURS:
        return _foreign(each, program, context, log)
    if each.rewrites:
        return log.rewritten(each.name, program, lambda: each.apply(program, context))
    log.looked(each.name, lambda: each.apply(program, context))
    return program


def _foreign(each: Pass[C], program: Program, context: C, log: Log) -> Program:
    """Apply a plugin's pass, and hold it to what it says.

    Raises:
        GraftError: GC071.
    """
    try:
        after = log.rewritten(each.name, program, lambda: each.apply(program, context))
    except GraftError:
        raise
    except Exception as error:  # a plugin may fail in any way, and the message must name it
        message = f"the pass {each.name!r} of {each.origin} fails: {first_line(error)}"
        raise GraftError("GC071", message, hint=f"repair or uninstall {each.origin}") from error
    changes = log.entries[-1].changes
    if not each.rewrites and (after is not program or changes != Changes()):
        message = f"the pass {each.name!r} of {each.origin} says that it only looks, and it changed the graph"
        raise GraftError("GC071", message, hint="its author has to set rewrites=True")
    return after


def _between(names: Sequence[str]) -> str:
    """A stage of several passes, in words."""
    return names[0] if len(set(names)) == 1 else f"{names[0]} to {names[-1]}"
