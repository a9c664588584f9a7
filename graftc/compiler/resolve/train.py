"""Insert a spec's ``train:`` list: base parameters that are trained directly, through copies that replace them."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from graftc.compiler.resolve.resolver import not_read
from graftc.compiler.resolve.sitetable import SiteTable, parameter_site
from graftc.passes.core.build.builder import Builder
from graftc.passes.core.sites.sites import ParameterSite
from graftc.specs.base import OWNERS
from graftc.specs.document import Spec
from graftc.specs.errors.diagnostics import GraftError, Place
from graftc.specs.patterns import match_modules

TRAIN = OWNERS["train"]
"""Name of the owner of the list's copies."""


def train_sites(table: SiteTable, spec: Spec) -> list[ParameterSite]:
    """Return sites for the parameters of the modules that ``train:`` selects.

    Raises:
        GraftError: GC011 for a pattern that matches no module, GC022 for a tensor that is tied to one that is not
            trained, GC023 for one that no output needs.
    """
    if not spec.train:
        return []
    sites: dict[str, ParameterSite] = {}
    try:
        paths = match_modules(spec.train, [m for m in table.modules if m])
        for site in (site for path in paths for site in _parameters(table, path, paths)):
            sites.setdefault(site.tensor, site)
    except GraftError as error:
        raise spec.locate(error) from error
    return list(sites.values())


def train_sites_again(table: SiteTable, main: Sequence[ParameterSite], *, every: bool = True) -> list[ParameterSite]:
    """Return the parameters that another Program trains, as sites of this one.

    Args:
        table: the sites of this Program.
        main: the parameters that the other Program trains.
        every: whether this Program must read all of them; if false, those that it does not read are left out.

    Raises:
        GraftError: GC031, naming a parameter that this Program does not read.
    """
    missing = [site.tensor for site in main if not table.reads(site.tensor)]
    if missing and every:
        raise not_read(table.program, missing[0], TRAIN)
    return [site for site in main if site.tensor not in missing]


def insert_train(build: Builder, sites: Sequence[ParameterSite]) -> None:
    """Insert copies of the parameters, to be trained in place of the originals."""
    for site in sites:
        with build.on(site):
            build.overlay(site.tensor)


def _parameters(table: SiteTable, path: str, trained: Collection[str]) -> list[ParameterSite]:
    """Return sites for a module's parameters; a parameter with several names appears once."""
    sites: list[ParameterSite] = []
    where, store = Place(path="train"), table.store
    names = (name for name, _ in table.modules[path].named_parameters(path, remove_duplicate=False))
    for stored in dict.fromkeys(store.weight_of.get(name, name) for name in names):
        others = [other for other in store.tied(stored) if not any(other.startswith(f"{each}.") for each in trained)]
        if others:
            raise GraftError(
                "GC022",
                f"{path} would train {stored}, which is tied to {', '.join(others)}",
                place=where,
                hint="train both, or untie the module with untie:",
            )
        name = store.canonical(stored)
        if not table.reads(name):
            raise GraftError(
                "GC023",
                f"{name} is not needed for any output of the model, so it would never learn",
                place=where,
                hint="leave its module out of train",
            )
        sites.append(parameter_site(name))
    return sites
