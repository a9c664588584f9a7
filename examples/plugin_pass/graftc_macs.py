"""A pass of a plugin: the multiply-adds of every linear map, in reports."""

from __future__ import annotations

from math import prod

from graftc.extend import AddedPass, LinearSite, Pass, PassContext, Program, SiteKind


def count(program: Program, context: PassContext) -> None:
    """Report what one row costs that goes through a map, for every map and for all of them together."""
    total = 0
    for site in context.sites:
        if isinstance(site, LinearSite) and site.kind is SiteKind.LINEAR:
            multiply_adds = prod((*site.leading, site.out_features, site.in_features))
            context.figure("multiply_adds", multiply_adds, site)
            total += multiply_adds
    context.figure("multiply_adds", total)


COUNT = AddedPass(Pass("macs", count, requires={"sites"}, rewrites=False), after="resolve")
"""Behind the pass that finds the sites. It changes no graph."""
