"""Selection of sites by a target: all patterns match and all counts hold, or an error says what came closest.

Torch-free: it works on candidates, not graphs.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping, Sequence

from graftc.compiler.resolve.matching import ForMethod, Matching, Meant, Missing
from graftc.specs.base import MethodSpec
from graftc.specs.claims import SiteKind
from graftc.specs.overrides import check_used
from graftc.specs.regexes import RegexMatcher
from graftc.specs.target import Candidate, Target, depths


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
    """Return the candidates that a target selects, in their order.

    Args:
        target: the target to resolve.
        candidates: all places of the model, each with its own key.
        where: path of the target in the spec, named in errors: ``adapt[0].target``.
        kinds: the kinds of site that the method takes; None for all.
        method: the method's tag, named in errors.
        missing: returns what has no role in a layer (stack and number; None for the whole model) and why, which
            explains a near miss.
        matcher: the matcher for regular expressions; the targets of a spec share one, and its time limit.

    Raises:
        GraftError: GC008 if a regular expression takes too long; GC011 if a glob, regex, list item, brace branch, layer
            or exclusion matches nothing, or narrowing leaves it without a site; GC013 if ``expect`` is not met; GC014
            if nothing is left; GC015 if the model, or some layers of a stack, have no such role; GC016 if the method
            does not take what matches. Places contain paths; ``Spec.locate`` adds line and column.
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
    """Return what a target selects, with its errors: `select` for a target that is still being written.

    Args:
        target, candidates, where, kinds, method, missing: as for `select`.
        within: keys of the only candidates to choose from; by default all. Layers are counted in all of them.

    Raises:
        GraftError: GC008 if a regular expression takes too long.
    """
    result = Meant()
    for_method = ForMethod(kinds, method, missing)
    result.chosen = Matching(target, candidates, where, for_method, RegexMatcher(), result, within).run()
    return result


def check_overrides(
    spec: MethodSpec,
    selected: Sequence[Candidate],
    where: str = "adapt",
    *,
    depth: Mapping[str, int] | None = None,
) -> None:
    """Check that every override of an adaptation, and every pattern in it, is used.

    Args:
        spec: the adaptation.
        selected: the result of :func:`select` for its target.
        where: path of the adaptation in the spec, named in errors: ``adapt[0]``.
        depth: number of layers of each stack, from :func:`depths` of all candidates; by default from ``selected``.

    Raises:
        GraftError: GC011 naming the override, or its pattern that matches nothing.
    """
    check_used(spec.override_list(), selected, depths(selected) if depth is None else depth, f"{where}.overrides")
