"""Find the passes that plugins provide, and add them to graftc's pipelines."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import EntryPoint
from typing import Any, Literal, TypeVar, cast, get_args

from graftc.passes.core.ir.program import Program
from graftc.passes.core.pass_context import PassContext, PassHost
from graftc.passes.core.pipeline import COPIED, VERIFY, Pass, PassGroup, Pipeline, two_of_one_name
from graftc.passes.core.plugins import Plugin, plugins
from graftc.specs.errors.arguments import kind_of
from graftc.specs.errors.diagnostics import GraftError, first_line, nearest

PipelineName = Literal["adapt", "eval", "lower"]
"""The pipelines to which passes can be added."""

_NAME = re.compile(r"[a-z][a-z0-9_-]{0,63}")
_RESERVED = frozenset({VERIFY, "capture", "canonicalise", "anchor", "trained", "tokens", "graftc"})
"""Names that have another meaning in histories or tensor names."""


@dataclass(frozen=True)
class AddedPass:
    """A plugin's pass and its place in a pipeline.

    Attributes:
        what: the pass; its name consists of lower-case letters, digits, ``_`` and ``-``. graftc fills in its origin.
        pipeline: ``"adapt"``: from a captured base to an adapted Program in train mode. ``"eval"``: from the adapted
            Program to eval mode. ``"lower"``: from the adapted Program to the graph that runs in training.
        before, after: the name of the pass before or after which this pass runs; exactly one of them is set. Passes
            placed after the same pass run in the order of their entry points' names.
    """

    what: Pass[PassContext]
    pipeline: PipelineName = "adapt"
    before: str | None = None
    after: str | None = None

    @property
    def anchor(self) -> str:
        """The name of the pass before or after which this pass is placed."""
        return self.before if self.before is not None else str(self.after)

    @property
    def origin(self) -> Plugin:
        """The plugin that provides it."""
        assert self.what.origin is not None
        return self.what.origin

    def __str__(self) -> str:
        side = "before" if self.before is not None else "after"
        return f"{self.what.name!r} of {self.origin} {side} {self.anchor!r}"


@cache
def added_passes() -> tuple[AddedPass, ...]:
    """Return all added passes, in the order of their entry points' names.

    The result is cached until `reload_passes` is called.

    Raises:
        GraftError: GC077 naming the package if one of its entry points is not a valid `AddedPass`.
    """
    return tuple(_loaded(point, plugin) for point, plugin in plugins().items())


def reload_passes() -> None:
    """Clear the cached passes, so that packages installed since then are found."""
    plugins.cache_clear()
    added_passes.cache_clear()
    extended.cache_clear()


def _loaded(point: EntryPoint, origin: Plugin) -> AddedPass:
    try:
        loaded = point.load()
    except (Exception, SystemExit) as error:  # an import may fail in any way, and the message must name the plugin
        message = f"{origin} cannot be imported: {first_line(error)}"
        raise GraftError("GC077", message, place=origin.place, hint=origin.remedy) from error
    fault: tuple[str, str] | None
    if isinstance(loaded, AddedPass) and isinstance(loaded.what, Pass):
        fault = _fault(loaded)
    else:
        fault = f"something {kind_of(loaded)} as a pass", "name an AddedPass(Pass(...), after=...)"
    if fault is not None:
        raise GraftError("GC077", f"{origin} registers {fault[0]}", place=origin.place, hint=fault[1])
    return cast("AddedPass", replace(loaded, what=replace(loaded.what, origin=origin)))


def _fault(added: AddedPass) -> tuple[str, str] | None:
    """Return a description of what is wrong with a pass, and a hint for its author; None if nothing is wrong."""
    own = added.what
    if not _NAME.fullmatch(str(own.name)):
        return f"a pass named {own.name!r}", "use lower-case letters, digits, '_' and '-', starting with a letter"
    if own.name in _RESERVED:
        return f"a pass named {own.name!r}, which is a reserved name", "choose another name"
    names = get_args(PipelineName)
    if added.pipeline not in names:
        close = nearest(str(added.pipeline), names)
        hint = f"did you mean {close[0]!r}?" if close else f"the pipelines are: {', '.join(names)}"
        return f"{own.name!r} for the pipeline {added.pipeline!r}, which does not exist", hint
    if (added.before is None) == (added.after is None):
        said = "no place" if added.before is None else "two places"
        return f"{own.name!r} with {said}", "set either before= or after="
    return None


C = TypeVar("C", bound=PassHost)


@cache
def extended(pipeline: Pipeline[C]) -> Pipeline[C]:
    """Return a pipeline extended by the passes that plugins add to it.

    Raises:
        GraftError: GC077 for a pass that cannot be placed: its anchor does not exist, anchors form a cycle, two passes
            have the same name, or a required fact is missing; also if a pass ensures one of graftc's own facts.
    """
    waiting = [added for added in added_passes() if added.pipeline == pipeline.name]
    _require_own_facts(pipeline, waiting)
    order: list[Pass[Any] | PassGroup[Any]] = list(pipeline.passes)
    follows: dict[str, str] = {}
    while waiting:
        names = {each.name: number for number, each in enumerate(order)}
        added = next((each for each in waiting if each.anchor in names), None)
        if added is None:
            raise _unplaced(pipeline, waiting, list(names))
        if added.what.name in names:
            raise two_of_one_name(pipeline.name, order[names[added.what.name]], added.what)
        waiting.remove(added)
        at = names[added.anchor]
        if added.after is not None:
            follows[added.what.name] = added.anchor
            at += 1
            while at < len(order) and added.anchor in _chain(order[at].name, follows):
                at += 1
        order.insert(at, _hosted(added.what))
    return Pipeline(pipeline.name, order, pipeline.given)


def _chain(name: str, follows: Mapping[str, str]) -> Iterator[str]:
    """Yield the pass after which a pass was placed, then that pass's own predecessor, and so on."""
    while name in follows:
        name = follows[name]
        yield name


def _require_own_facts(pipeline: Pipeline[Any], waiting: Sequence[AddedPass]) -> None:
    """Check that plugins' passes ensure none of graftc's own facts.

    Raises:
        GraftError: GC077 if one does.
    """
    ours = pipeline.given.union(*(each.ensures for each in pipeline))
    for added in waiting:
        if taken := sorted(added.what.ensures & ours):
            message = f"the pass {added.what.name!r} of {added.origin} ensures {taken[0]!r}, one of graftc's own facts"
            raise GraftError("GC077", message, place=added.origin.place, hint="choose another name for the fact")


def _unplaced(pipeline: Pipeline[Any], waiting: Sequence[AddedPass], names: Sequence[str]) -> GraftError:
    """Return the error for passes that cannot be placed: they form a cycle, or an anchor does not exist."""
    by_name = {added.what.name: added for added in waiting}
    circle: list[AddedPass] = []
    added = waiting[0]
    while added not in circle and added.anchor in by_name:
        circle.append(added)
        added = by_name[added.anchor]
    if added in circle:
        told = ", ".join(map(str, circle[circle.index(added) :]))
        message = f"passes in the pipeline {pipeline.name!r} are placed relative to each other in a cycle: {told}"
        return GraftError("GC077", message, place=added.origin.place, hint=f"place one next to: {', '.join(names)}")
    close = nearest(added.anchor, names)
    hint = f"did you mean {close[0]!r}?" if close else f"its passes are: {', '.join(names)}"
    message = f"the pass {added} cannot be placed: the pipeline {pipeline.name!r} has no pass {added.anchor!r}"
    return GraftError("GC077", message, place=added.origin.place, hint=hint)


def _hosted(own: Pass[PassContext]) -> Pass[PassHost]:
    """Wrap a plugin's pass as a pass for graftc's pipelines."""

    def apply(program: Program, host: PassHost) -> Program | None:
        return PassContext(own, host, program).run()

    def wanted(program: Program, host: PassHost) -> bool:
        return own.wanted is None or own.wanted(program, PassContext(own, host, program))

    given = own.requires | {COPIED}
    return Pass(own.name, apply, given, own.ensures, own.rewrites, wanted, origin=own.origin)
