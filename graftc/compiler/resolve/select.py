"""Select sites with a target; if a pattern matches nothing or a count is wrong, an error shows what came closest.

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
    """Return the candidates that a target selects, in model order.

    Args:
        target: the target to resolve.
        candidates: all places of the model, each with its own key.
        where: path of the target in the spec, named in errors: ``adapt[0].target``.
        kinds: the kinds of site that the method takes; None for all.
        method: the method's tag, named in errors.
        missing: returns the modules without a role in a layer (given by stack and index, or None for the whole model),
            each with the reason, to explain near misses.
        matcher: the matcher for regular expressions; a spec's targets share one matcher, and therefore a time limit.

    Raises:
        GraftError: GC008 if a regular expression takes too long; GC011 if a glob, regex, list item, brace branch, layer
            or exclusion matches nothing, or if narrowing drops all of its matches; GC013 if ``expect`` is not met;
            GC014 if nothing is left; GC015 if the model or some layers of a stack lack a role; GC016 if the method
            does not take the matched kinds. An error's place has only a path; ``Spec.locate`` adds line and column.
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
    """Return a target's selection together with its errors, like `select` but for a target that is still being written.

    Args:
        target, candidates, where, kinds, method, missing: as for `select`.
        within: the keys of the candidates to choose from; by default all. Layers are counted over all candidates.

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
        GraftError: GC011, naming the unused override, or the pattern in it that matches nothing.
    """
    check_used(spec.override_list(), selected, depths(selected) if depth is None else depth, f"{where}.overrides")
