"""Group the layers that call one function by how they are adapted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from graftc.compiler.resolve.resolver import Resolved
from graftc.passes.core.ir.functions import FunctionCall, UnlikeBodyError, renamed
from graftc.passes.core.ir.layers import layer_path
from graftc.specs.base import MethodSpec

Groups = Mapping[str, Sequence[Sequence[str]]]
"""For each body, groups of paths of layers that are adapted alike; the body's own group comes first."""


class TreatedUnlikeError(UnlikeBodyError):
    """Raised when some calls of a body are to be adapted differently from the body.

    Attributes:
        groups: the groups of layers that are adapted alike, by body.
    """

    def __init__(self, groups: Groups) -> None:
        super().__init__("identical layers are adapted differently")
        self.groups = groups


def treated_alike(resolved: Sequence[Resolved], function_calls: Sequence[FunctionCall]) -> dict[str, list[list[str]]]:
    """Group each body's calls by how they are adapted; the body's own group comes first.

    Args:
        resolved: the adaptations with their sites.
        function_calls: the calls of all bodies.
    """
    bodies = {one.path: one.body for one in function_calls} | {one.body: one.body for one in function_calls}
    wanted: dict[str, list[tuple[int, Any, MethodSpec]]] = {path: [] for path in bodies}
    for number, item in enumerate(resolved):
        for site, spec in item.sites:
            path = layer_path(site.key.module)
            if path in wanted:
                key = replace(site.key, module=renamed(site.key.module, path, ""))
                wanted[path].append((number, key, spec))
    groups: dict[str, list[list[str]]] = {body: [[body]] for body in bodies.values()}
    for path, body in bodies.items():
        alike = next((group for group in groups[body] if wanted[group[0]] == wanted[path]), None)
        if alike is None:
            groups[body].append([path])
        elif path != body:
            alike.append(path)
    return groups
