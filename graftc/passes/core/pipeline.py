"""Passes over a Program, and pipelines of passes.

Only the pipeline handles timing, history, progress and verification; a pass consists of a function and declarations of
the facts that it requires and ensures.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Sequence, Set
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Generic, Protocol, TypeVar

from graftc.passes.core import progress
from graftc.passes.core.ir.history import Changes, HistoryEntry, Recorder
from graftc.passes.core.ir.program import Program
from graftc.passes.core.ir.verify import require_runnable, verify
from graftc.passes.core.plugins import Plugin
from graftc.passes.core.weights.store import Store
from graftc.specs.errors.diagnostics import GraftError, Place, first_line, nearest

COPIED = "copy"
"""The fact that passes receive a copy, which they may change; plugins' passes run after the pass that ensures it."""

VERIFY = "verify"
"""Name of the step that a history contains after each verified step."""


class HoldsStore(Protocol):
    """The interface of every pipeline's context, which must provide the Store."""

    @property
    def store(self) -> Store | None:
        """The Store with the tensors to which Programs refer; None if Programs are no longer checked against it."""


C = TypeVar("C", bound=HoldsStore)
G = TypeVar("G")
Anything = TypeVar("Anything")


@dataclass(frozen=True)
class Pass(Generic[G]):
    """One step over a Program.

    Attributes:
        name: the name in histories, reports and errors, unique within a pipeline.
        apply: a function of the Program and the context. It changes the Program in place and returns None, or returns
            another Program in which the remaining nodes keep their names. It stores its findings in the context.
        requires: the facts that must hold: earlier passes ensure them, or the pipeline starts with them.
        ensures: the facts that hold after it.
        rewrites: whether it may change the graph. If not, plugins' passes are checked for changes.
        wanted: a function that returns whether there is anything to do; by default, there always is.
        verified: whether the verifier runs after it. Passes in a group are verified by the group, and plugins' passes
            whenever they rewrite.
        typed: whether the verifier then infers all types again, as it does after plugins' passes.
        origin: the plugin that provides it; None for graftc's own passes. It is filled in when the plugin is found.
    """

    name: str
    apply: Callable[[Program, G], Program | None]
    requires: Set[str] = frozenset()
    ensures: Set[str] = frozenset()
    rewrites: bool = True
    wanted: Callable[[Program, G], bool] | None = None
    verified: bool = False
    typed: bool = False
    origin: Plugin | None = None

    def __post_init__(self) -> None:
        _freeze(self)

    def __str__(self) -> str:
        """Return a one-line description."""
        marks = ["rewrites" if self.rewrites else "looks"]
        marks += [f"verified{' with types' if self.typed else ''}"] if self.verified else []
        marks += ["where wanted"] if self.wanted is not None else []
        marks += [f"from {self.origin}"] if self.origin is not None else []
        return _line(self.name, marks, self.requires, self.ensures)


@dataclass(frozen=True)
class PassGroup(Generic[C]):
    """A group of passes whose number depends on the spec, such as one for each adaptation.

    Attributes:
        name: the name of the whole group.
        passes: a function that returns the passes, in order.
        requires, ensures: as for a `Pass`.
        each: the number of leading passes that are verified individually if they rewrite, so that errors name the
            faulty one; after these, the verifier runs whenever the graph has doubled in size, and after the last pass
            that rewrites.
    """

    name: str
    passes: Callable[[Program, C], Sequence[Pass[C]]]
    requires: Set[str] = frozenset()
    ensures: Set[str] = frozenset()
    each: int = 8

    def __post_init__(self) -> None:
        _freeze(self)

    def __str__(self) -> str:
        """Return a one-line description."""
        return _line(self.name, ["a group", "verified"], self.requires, self.ensures)


def _freeze(each: Pass[Any] | PassGroup[Any]) -> None:
    """Convert facts, given as a set or as a single name, to frozen sets."""
    for name in ("requires", "ensures"):
        facts = getattr(each, name)
        object.__setattr__(each, name, frozenset({facts} if isinstance(facts, str) else facts))


def _line(name: str, marks: Sequence[str], requires: Collection[str], ensures: Collection[str]) -> str:
    facts = [f"requires {', '.join(sorted(requires))}"] if requires else []
    facts += [f"ensures {', '.join(sorted(ensures))}"] if ensures else []
    return f"{name} ({'; '.join([*marks, *facts])})"


@dataclass
class Log:
    """A log of the changes that passes made to a Program: the entries of its history, in order.

    Attributes:
        entries: the entries so far.
    """

    entries: list[HistoryEntry] = field(default_factory=list)
    _recorder: Recorder | None = field(default=None, repr=False)

    def rewritten(self, name: str, program: Program, run: Callable[[], Program | None]) -> Program:
        """Run a step that may change a graph, and return the Program after it."""
        progress.step(name)
        if self._recorder is None or self._recorder.graph is not program.graph:
            self._recorder = Recorder(program.graph)
        started = time.perf_counter()
        after = run() or program
        seconds = time.perf_counter() - started
        self.entries.append(self._recorder.entry(name, after.graph, seconds))
        return after

    def looked(self, name: str, run: Callable[[], Anything]) -> Anything:
        """Run a step that changes no graph, and return its result."""
        progress.step(name)
        started = time.perf_counter()
        result = run()
        self.entries.append(HistoryEntry(name, 0, 0, time.perf_counter() - started, Changes()))
        return result

    def verified(self, program: Program, store: Store | None, stage: str, *, types: bool = False) -> None:
        """Run the verifier after a stage.

        Raises:
            GraftError: GC040 or GC023, raised by the verifier.
        """
        assert store is not None
        self.looked(VERIFY, partial(verify, program, store, stage, types=types))


class Pipeline(Generic[C]):
    """A sequence of passes in which the facts that a pass requires are ensured before the pass runs.

    Args:
        name: the name in errors.
        passes: the passes, in order.
        given: facts that hold before the first pass.

    Raises:
        GraftError: GC077 if two passes have the same name, or a pass requires a fact that no earlier pass ensures.
    """

    def __init__(
        self, name: str, passes: Sequence[Pass[C] | PassGroup[C]], given: Collection[str] = frozenset()
    ) -> None:
        self.name, self.passes, self.given = name, tuple(passes), frozenset(given)
        known, facts = dict[str, Pass[C] | PassGroup[C]](), set(self.given)
        for each in self.passes:
            if each.name in known:
                raise two_of_one_name(name, known[each.name], each)
            missing = sorted(each.requires - facts)
            if missing:
                raise self._lacking(each, missing[0], facts)
            known[each.name] = each
            facts |= each.ensures

    def _lacking(self, each: Pass[C] | PassGroup[C], fact: str, facts: Collection[str]) -> GraftError:
        every = self.given.union(*(other.ensures for other in self.passes))
        later = [other.name for other in self.passes if fact in other.ensures]
        message = f"in the pipeline {self.name!r}, {_named(each)} requires {fact!r}, which no pass before it ensures"
        if later:
            hint = f"place it after {later[0]!r}"
        elif close := nearest(fact, sorted(every)):
            hint = f"did you mean {close[0]!r}?"
        else:
            hint = f"the facts available there are: {', '.join(sorted(facts))}"
        return GraftError("GC077", message, place=_place(each), hint=hint)

    def without(self, names: Collection[str]) -> Pipeline[C]:
        """Return this pipeline without some of its passes."""
        return Pipeline(self.name, [each for each in self.passes if each.name not in names], self.given)

    def run(self, program: Program, context: C, log: Log | None = None) -> Program:
        """Apply every pass that is wanted.

        Args:
            program: the Program that the first pass receives.
            context: the context of all passes.
            log: the log that receives the history.

        Returns:
            The Program after the last pass.

        Raises:
            GraftError: raised by a pass; GC040 if one of graftc's own passes leaves an invalid graph; GC077 if a
                plugin's pass does so, changes the graph despite ``rewrites=False``, or raises any other exception.
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
        if each.origin is not None:
            return _foreign(each, each.origin, program, context, log)
        if each.wanted is not None and not each.wanted(program, context):
            return program
        after = _applied(each, program, context, log)
        if each.verified:
            log.verified(after, context.store, each.name, types=each.typed)
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
                stage = pending[0] if len(set(pending)) == 1 else f"{pending[0]} to {pending[-1]}"
                log.verified(program, context.store, stage)
                pending, size = [], len(program.graph.nodes)
        return program

    def __iter__(self) -> Iterator[Pass[C] | PassGroup[C]]:
        return iter(self.passes)

    def __str__(self) -> str:
        """Return a description of the passes, one per line."""
        start = f", from {', '.join(sorted(self.given))}" if self.given else ""
        return "\n".join([f"{self.name}{start}", *(f"  {each}" for each in self.passes)])


def _applied(each: Pass[C], program: Program, context: C, log: Log) -> Program:
    if each.rewrites:
        return log.rewritten(each.name, program, lambda: each.apply(program, context))
    log.looked(each.name, lambda: each.apply(program, context))
    return program


def _foreign(each: Pass[C], origin: Plugin, program: Program, context: C, log: Log) -> Program:
    """Apply a plugin's pass, and check that it does what it declares.

    Raises:
        GraftError: GC077, or an error raised by the pass itself.
    """

    def failed(message: str, hint: str, details: Sequence[str | GraftError] = ()) -> GraftError:
        return GraftError("GC077", f"{_named(each)} {message}", place=origin.place, hint=hint, details=details)

    try:
        if each.wanted is not None and not each.wanted(program, context):
            return program
        before = () if each.rewrites else _shape(program)
        after = log.rewritten(each.name, program, lambda: each.apply(program, context))
    except GraftError:
        raise
    except (Exception, SystemExit) as error:  # a plugin may fail in any way, and the message must name it
        raise failed(f"fails: {first_line(error)}", origin.remedy) from error
    if not each.rewrites:
        if after is not program or log.entries[-1].changes != Changes() or _shape(program) != before:
            raise failed("has rewrites=False, but changed the graph", "ask its author to set rewrites=True")
        return program
    try:
        if context.store is None:
            require_runnable(after, each.name)
        else:
            log.verified(after, context.store, each.name, types=True)
    except GraftError as error:
        hint = f"ask its author to make every change with the Builder; until then, {origin.remedy}"
        raise failed(f"leaves an invalid graph: {error.message}", hint, error.details) from error
    return after


def _shape(program: Program) -> tuple[Any, ...]:
    """Return the properties that a `Recorder` does not compare, such as nodes' operators, literals and types."""
    said = [(n.name, n.target, repr(n.args), repr(n.kwargs), id(n.meta.get("val"))) for n in program.graph.nodes]
    return said, len(program.edits), len(program.tensor_edits), program.inputs, program.flags, program.mode


def two_of_one_name(pipeline: str, one: Pass[C] | PassGroup[C], other: Pass[C] | PassGroup[C]) -> GraftError:
    """Return the error for two passes with the same name in a pipeline."""
    message = f"the pipeline {pipeline!r} has two passes with the same name: {_named(one)} and {_named(other)}"
    added = other if _place(other) is not None else one
    return GraftError("GC077", message, place=_place(added), hint=f"rename one, for example '{other.name}-2'")


def _named(each: Pass[C] | PassGroup[C]) -> str:
    """Return a pass's name for messages, with the package that provides the pass."""
    origin = each.origin if isinstance(each, Pass) else None
    return f"the pass {each.name!r}" + (f" of {origin}" if origin is not None else "")


def _place(each: Pass[C] | PassGroup[C]) -> Place | None:
    return each.origin.place if isinstance(each, Pass) and each.origin is not None else None
