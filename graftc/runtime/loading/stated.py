"""Compare what an artifact states with what follows from its spec and its graphs."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator

from torch import fx

from graftc.compiler.inspect.snapshot import Snapshot
from graftc.compiler.resolve.tokens import TOKENS
from graftc.compiler.resolve.train import TRAIN
from graftc.compiler.roles.structure import roles_of
from graftc.runtime.artifact.read import Artifact
from graftc.specs.claims import SiteKind
from graftc.specs.errors.border import library_errors
from graftc.specs.errors.text import quoted

MOST = 2**26
"""Maximum number of elements, apart from sizes that vary, of a value in a graph whose roles are looked for: a graph may
be anyone's, and finding roles numbers the columns of values."""

_FROM_THE_MODEL = (SiteKind.VALUE, SiteKind.PARAMETER)
"""Kinds of sites whose roles do not follow from the base's graph alone."""


def misstated(artifact: Artifact) -> Iterator[str]:
    """Yield the statements of a manifest and its certificate that contradict the spec: methods, names of adaptations.

    Raises:
        GraftError: GC082 if the certificate is damaged.
    """
    methods = artifact.spec.owners
    for place in artifact.manifest.sites:
        if methods.get(place.adaptation) != place.method:
            spec = f"it is {quoted(methods[place.adaptation])}" if place.adaptation in methods else "it is not there"
            yield f"{place.adaptation} at {place.key} is stated as {quoted(place.method)}, but in the spec {spec}"
    named = [kept.name for kept in artifact.manifest.kept] + [copy.owner for copy in artifact.manifest.trained]
    certificate = artifact.certificate
    for name in dict.fromkeys([*named, *(certificate.folded if certificate is not None else ())]):
        if name not in (*methods, TRAIN, TOKENS):
            yield f"{quoted(name)} is not in the spec"


def has_roles(artifact: Artifact) -> bool:
    """Return whether an artifact contains a graph of the base whose roles can be found in bounded memory.

    Raises:
        GraftError: GC082 if the graph is damaged.
    """
    if "base.train" not in artifact.manifest.signatures[0].graphs:
        return False
    computed: set[fx.Node] = set()
    for node in artifact.graph("base.train").graph.nodes:
        if node.op == "placeholder" or not computed.isdisjoint(node.all_input_nodes):
            computed.add(node)
            shape = getattr(node.meta.get("val"), "shape", ())
            if math.prod(size for size in shape if isinstance(size, int)) > MOST:
                return False
    return True


def misplaced(artifact: Artifact) -> Iterator[str]:
    """Yield the sites whose kind and roles are not those that the stored graph of the base has there.

    Raises:
        GraftError: GC082 if the graph is damaged, GC084 if its constants are.
    """
    aliases = artifact.manifest.base.aliases
    program, constants = artifact.graph("base.train"), artifact.constants()
    with library_errors("GC082", f"the roles of the graphs in {artifact.path} cannot be found"):
        structure = roles_of(program, constants)
    found: dict[tuple[str, str, object], dict[str, None]] = defaultdict(dict)
    for finding in structure.findings:
        name = finding.parameter or f"{finding.module}.{finding.role}".lstrip(".")
        found[str(finding.kind), aliases.get(name, name), finding.rows][finding.role] = None
    for sublayer in structure.sublayers:
        name = f"{sublayer.owner}.{' '.join(sublayer.roles)}".lstrip(".")
        found[str(SiteKind.SUBLAYER), name, None].update(dict.fromkeys(sublayer.roles))
    for place in artifact.manifest.sites:
        name = f"{place.module}.{place.name}".lstrip(".")
        roles = tuple(found.get((place.kind, aliases.get(name, name), place.rows), ()))
        if roles != place.roles and place.kind not in _FROM_THE_MODEL:
            stated, actual = (", ".join(each) or "no role" for each in (place.roles, roles))
            yield f"{place.key} is stated as {place.kind} ({stated}), for which the graph has {actual}"


def differing(artifact: Artifact, now: Snapshot) -> Iterator[str]:
    """Yield the fields of places and of trained copies that differ when the spec is compiled again.

    Args:
        artifact: the artifact, whose sites `load_artifact` has checked.
        now: what its spec compiles to.
    """
    for before, after in zip(artifact.manifest.sites, now.sites, strict=True):
        for (field, stated), actual in zip(vars(before).items(), vars(after).values(), strict=True):
            if stated != actual:
                yield f"{field} of {before.adaptation} at {before.key} is stated as {stated}, but is {actual}"
    if artifact.manifest.trained != now.trained:
        yield "the tensors that train are not those that are stated"
