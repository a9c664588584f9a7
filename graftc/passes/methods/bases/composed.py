"""Methods composed of other methods, one for each kind of place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import Tensor

from graftc.passes.core.build.builder import Builder
from graftc.passes.core.method.capabilities import Collapsing
from graftc.passes.core.method.method import Method
from graftc.passes.core.method.registry import method_for
from graftc.passes.core.sites.sites import Site
from graftc.passes.core.weights.folds import Fold
from graftc.specs.base import MethodSpec
from graftc.specs.claims import SiteKind
from graftc.specs.errors.diagnostics import GraftError, Place
from graftc.specs.methods.bases.composed import PARTS, PartsSpec

S = TypeVar("S", bound=PartsSpec)
_SHARED = frozenset({"vectors", "hidden", "hidden_bias"})
"""The tensors that all places of a prefix share."""


class PartsMethod(Method[S, Site], Collapsing[S]):
    """Method that applies, at each place, the part for the kind of place."""

    def prepare(self, spec: S, sites: Sequence[Site], build: Builder) -> Mapping[SiteKind, Any]:
        """Prepare each part and return the state that its places share, by kind.

        Raises:
            GraftError: GC016 for a place without a part, or a part without a place.
        """
        specs = spec.part_specs()
        for site in sites:
            if site.kind not in specs:
                message = f"{site.key} is for the part '{PARTS[site.kind]}', which this {spec.method} does not have"
                raise GraftError("GC016", message, place=Place(path="target"), hint="leave the site out of the target")
        shared: dict[SiteKind, Any] = {}
        for kind, own in specs.items():
            mine = [site for site in sites if site.kind is kind]
            if not mine:
                message = f"the target has no place for the part '{PARTS[kind]}' of {spec.method}"
                hint = f"add role: {', '.join(spec.roles[PARTS[kind]])} to it"
                raise GraftError("GC016", message, place=Place(path="target"), hint=hint)
            with _within(PARTS[kind]):
                shared[kind] = method_for(own.method).prepare(own, mine, build)
        return shared

    def insert(self, spec: S, site: Site, shared: Mapping[SiteKind, Any], build: Builder) -> None:
        """Insert the part that belongs to the site."""
        method, own = _part(spec, site.kind)
        with _within(PARTS[site.kind]):
            method.insert(own, site, shared[site.kind], build)

    def fold(self, spec: S, site: Site, tensors: Mapping[str, Tensor]) -> Fold:
        """Return the fold of the part at the site."""
        method, own = _part(spec, site.kind)
        return method.fold(own, site, tensors)

    def collapse(self, spec: S) -> MethodSpec | None:
        """Return the spec with trained keys and values instead of a network that computes them; None if it has none."""
        return spec.collapse()

    def collapsed(self, spec: S, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return the keys and values that the network of a prefix computes; without a prefix, the site's tensors."""
        if "keys_out" not in tensors:
            return {part: value for part, value in tensors.items() if part not in _SHARED}
        method, own = _part(spec, SiteKind.ATTENTION)
        assert isinstance(method, Collapsing)
        return method.collapsed(own, tensors)


def _part(spec: PartsSpec, kind: SiteKind) -> tuple[Method[Any, Any], MethodSpec]:
    """Return the method and the spec of a part."""
    own = spec.part_specs()[kind]
    return method_for(own.method), own


@contextmanager
def _within(part: str) -> Iterator[None]:
    """Run the block, and prefix the fields that its errors name with the part's field."""
    try:
        yield
    except GraftError as error:
        if error.place is None or not error.place.path:
            raise
        raise error.within(part) from error
