"""A pass of a plugin: the multiply-adds of every linear map, in reports."""

from __future__ import annotations

from graftc.extend import AddedPass, LinearSite, Pass, PassContext, Program, SiteKind


def count(program: Program, context: PassContext) -> None:
    """Report what one row costs that goes through a map, for every map and for all of them together."""
    of_node: dict[object, int] = {}
    for site in context.sites:
        if isinstance(site, LinearSite) and site.kind is SiteKind.LINEAR:
            multiply_adds = site.out_features * site.in_features
            context.figure("multiply_adds", multiply_adds, site)
            # A fused matrix is a site, and so is each part of it: one node computes them.
            of_node[site.use.node] = max(multiply_adds, of_node.get(site.use.node, 0))
    context.figure("multiply_adds", sum(of_node.values()))


COUNT = AddedPass(Pass("macs", count, requires={"sites"}, rewrites=False), after="resolve")
"""Behind the pass that finds the sites. It changes no graph."""
