"""The ``train:`` list of a spec: parameters of the base that train as they are, through copies in their place."""

from __future__ import annotations

from collections.abc import Sequence

from graftc.compiler.resolve.resolver import not_read
from graftc.compiler.resolve.select import match_modules
from graftc.compiler.resolve.sitetable import SiteTable
from graftc.compiler.roles.findings import place
from graftc.passes.core.build.builder import Builder
from graftc.passes.core.sites.sites import ParameterSite, SiteKey
from graftc.specs.claims import SiteKind
from graftc.specs.document import Spec
from graftc.specs.errors.diagnostics import GraftError, Place

TRAIN = "trained"
"""Name under which the list owns its copies."""


def train_sites(table: SiteTable, spec: Spec) -> list[ParameterSite]:
    """The parameters of the modules that ``train:`` names, as sites.

    Raises:
        GraftError: GC011 for a pattern that matches no module, GC022 for a tied tensor, GC023 for one that no output
            needs.
    """
    if not spec.train:
        return []
    sites: dict[str, ParameterSite] = {}
    try:
        for path in match_modules(spec.train, [m for m in table.modules if m]):
            for site in _parameters(table, path):
                sites.setdefault(site.tensor, site)
    except GraftError as error:
        raise spec.locate(error) from error
    return list(sites.values())


def train_sites_again(table: SiteTable, main: Sequence[ParameterSite], *, every: bool = True) -> list[ParameterSite]:
    """The parameters that another Program trains, in this one.

    Args:
        table: the sites of this one.
        main: what the other one trains.
        every: all have to be here; otherwise those that are not are left out.

    Raises:
        GraftError: GC031 naming a parameter that this Program does not read.
    """
    missing = [site.tensor for site in main if not table.reads(site.tensor)]
    if missing and every:
        raise not_read(table.program, missing[0], TRAIN)
    return [site for site in main if site.tensor not in missing]


def insert_train(build: Builder, sites: Sequence[ParameterSite]) -> None:
    """Let copies of the parameters train in their place."""
    for site in sites:
        with build.on(site):
            build.overlay(site.tensor)


def _parameters(table: SiteTable, path: str) -> list[ParameterSite]:
    found: list[ParameterSite] = []
    where = Place(path="train")
    weight_of = table.store.weight_of
    names = (name for name, _ in table.modules[path].named_parameters(path, remove_duplicate=False))
    for name in dict.fromkeys(weight_of.get(name, name) for name in names):
        if table.store.tied(name):
            others = ", ".join(table.store.tied(name))
            raise GraftError(
                "GC022",
                f"{path} would train {name}, which is tied to {others}",
                place=where,
                hint="training one use of a tied tensor changes the other; give the module its own with untie:",
            )
        if not table.reads(name):
            raise GraftError(
                "GC023",
                f"{name} is not needed for any output of the model, so it would never learn",
                place=where,
                hint="leave its module out of train",
            )
        module, _, last = name.rpartition(".")
        layer, stack = place(module)
        key = SiteKey(module, last)
        found.append(ParameterSite(key, (), layer, stack, kind=SiteKind.PARAMETER, tensor=name))
    return found
