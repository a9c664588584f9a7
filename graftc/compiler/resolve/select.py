"""From a target to sites: all patterns match and all counts hold, or an error says what came closest.

Torch-free: it sees candidates, not graphs.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping, Sequence

from graftc.compiler.resolve.candidates import Candidate, depths
from graftc.compiler.resolve.matching import ForMethod, Matching, Meant, Missing
from graftc.specs.base import MethodSpec
from graftc.specs.claims import SiteKind
from graftc.specs.overrides import check_used
from graftc.specs.patterns import match_modules
from graftc.specs.regexes import RegexMatcher
from graftc.specs.target import Target

__all__ = ["Candidate", "Meant", "check_overrides", "depths", "match_modules", "meant", "select"]


def select(
    target: Target,
    candidates: Sequence[Candidate],
    where: str = "target",
    *,
    kinds: Collection[SiteKind] | None = None,
    method: str = "the method",
    missing: Missing = lambda spot: (),
    matcher: RegexMatcher | None = None,
) -> list[Candidate]:
    """The candidates that a target means, in their order.

    Args:
        target: what to select.
        candidates: all places of the model, each with its own key.
        where: path of the target in the spec, for errors: ``adapt[0].target``.
        kinds: the kinds of site that the method takes; None for all.
        method: the method's tag, for errors.
        missing: what has no role in a layer (stack and number; None for the whole model) and why: what a near miss is
            explained with.
        matcher: matches regular expressions; shared by the targets of a spec, which have their time together.

    Raises:
        GraftError: GC008 where a regular expression takes too long; GC011 where a glob, regex, list item, brace
            branch, layer or exclusion matches nothing, or narrowing leaves it without a site; GC013 where ``expect``
            is not met; GC014 where nothing is left; GC015 where the model, or some layers of a stack, have no such
            role; GC016 where the method does not take what matches. Places hold paths; ``Spec.locate`` adds line and
            column.
    """
    return Matching(target, candidates, where, ForMethod(kinds, method, missing), matcher or RegexMatcher()).run()


def meant(
    target: Target,
    candidates: Sequence[Candidate],
    where: str = "target",
    *,
    kinds: Collection[SiteKind] | None = None,
    method: str = "the method",
    missing: Missing = lambda spot: (),
    within: Collection[Hashable] | None = None,
) -> Meant:
    """What a target means, with what is wrong with it: `select` for one that is still being written.

    Args:
        target, candidates, where, kinds, method, missing: as for `select`.
        within: keys of the only candidates to choose from; by default all. Layers are counted in all of them.

    Raises:
        GraftError: GC008 where a regular expression takes too long.
    """
    found = Meant()
    asked = ForMethod(kinds, method, missing)
    resolving = Matching(target, candidates, where, asked, RegexMatcher(), found, within)
    found.chosen = resolving.run()
    return found


def check_overrides(
    spec: MethodSpec,
    selected: Sequence[Candidate],
    where: str = "adapt",
    *,
    depth: Mapping[str, int] | None = None,
) -> None:
    """Make sure that every override of an adaptation, and every pattern in it, is used.

    Args:
        spec: the adaptation.
        selected: what :func:`select` gave for its target.
        where: path of the adaptation in the spec, for errors: ``adapt[0]``.
        depth: layers of each stack, from :func:`depths` of all candidates; default from ``selected``.

    Raises:
        GraftError: GC011 naming the override, or the pattern of it that matches nothing.
    """
    check_used(spec.override_list(), selected, depths(selected) if depth is None else depth, f"{where}.overrides")
