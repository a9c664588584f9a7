"""The roles of a model's weights, by names of nodes."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any

from annotated_types import Ge, Len

from graftc.records.fields import KIND, Layer, OwningModule, Stack
from graftc.specs.claims import SiteKind
from graftc.specs.errors.text import format_layers, format_runs
from graftc.specs.records.record import Named, OrNull, Record, stated
from graftc.specs.roles import widen


class _Pairs:
    """Half-open runs of rows, each given by its first row and the row after its last one."""

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        return handler(tuple[Annotated[tuple[int, ...], Len(2, 2)], ...] | None)


@dataclass(frozen=True)
class Finding(Record):
    """One role of one place."""

    role: str
    """The full role, with `encoder.`, `decoder.` and `cross.` where the model has two stacks."""

    kind: Annotated[SiteKind, KIND]

    node: Annotated[Any, Named()]
    """Name of the node in the captured graph."""

    module: OwningModule

    parameter: str | None
    """Name of the weight; null for attentions and for weights made of several parameters."""

    rows: Annotated[tuple[tuple[int, int], ...] | None, _Pairs()]
    """The rows of the weight that are its own, as half-open runs; null is all of them."""

    layer: Layer

    stack: Stack

    use: Annotated[int, Ge(0)]
    """The number of this use of the weight in the module, for layers that run several times."""

    evidence: str
    """Why it has this role, for people."""

    @property
    def roles(self) -> frozenset[str]:
        """The role with every subset of its prefixes."""
        return widen(self.role)


@dataclass(frozen=True)
class Unresolved(Record):
    """A weight that no role could be told for."""

    module: OwningModule

    layer: Layer

    stack: Stack

    reason: str
    """Why, for people."""


@dataclass(frozen=True)
class Sublayer(Record, behind={"post_norm": ("output",)}):
    """A branch of the residual stream, by names of nodes in the captured graph."""

    roles: tuple[str, ...]
    """`attn.sublayer`, `ffn.sublayer`, both or none, with prefixes."""

    stream: Annotated[Any, Named()]
    """The value that the branch is added to."""

    normed: Annotated[Any, Named()]
    """The value that the branch reads."""

    projection: Annotated[Any, Named()]
    """Output of its last linear map, before dropout and norms."""

    branch: Annotated[Any, Named()]
    """The value that is added."""

    sum: Annotated[Any, Named()]
    """The add."""

    post_norm: Annotated[Any, Named(), OrNull()]
    """The norm behind the sum; null where the stream goes on from the sum."""

    module: str
    """Path of the module that adds."""

    layer: Layer

    stack: Stack

    use: Annotated[int, Ge(0)] = 0
    """The number of this sublayer among those of these roles in its layer."""

    @stated
    def output(self) -> Annotated[Any, Named()]:
        """The value from which the stream goes on."""
        return self.post_norm or self.sum

    @property
    def owner(self) -> str:
        """The path of the layer, or of the module that adds if there is no layer."""
        return self.module if self.layer is None else f"{self.stack}.{self.layer}"


def role_rows(findings: Iterable[Finding]) -> list[tuple[str, str, str, str, str]]:
    """Return table lines of role, place, rows, layers and evidence; equal layers of a stack share a line."""
    grouped: dict[tuple[str, str, str], list[Finding]] = {}
    for f in findings:
        shape = "all" if f.rows is None else format_runs(f.rows)
        grouped.setdefault((f.role, _starred(f.parameter or f.module, f), shape), []).append(f)
    lines = []
    for (role, place, shape), alike in grouped.items():
        layers = format_layers(f.layer for f in alike if f.layer is not None)
        lines.append((role, place, shape, layers, alike[0].evidence))
    return lines


def unresolved_rows(unresolved: Iterable[Unresolved]) -> list[tuple[str, str, str]]:
    """Return table lines of module, layers and reason.

    Equal layers of a stack share a line, with the first reason.
    """
    grouped: dict[tuple[str, str], list[Unresolved]] = {}
    for u in unresolved:
        grouped.setdefault((_starred(u.module, u), _NUMBER.sub("#", u.reason)), []).append(u)
    return [
        (module, format_layers(u.layer for u in entries if u.layer is not None), entries[0].reason)
        for (module, _), entries in grouped.items()
    ]


_NUMBER = re.compile(r"\d+")


def _starred(path: str, finding: Finding | Unresolved) -> str:
    """Return the path with the layer number replaced by a star."""
    if finding.layer is None:
        return path
    return path.replace(f"{finding.stack}.{finding.layer}", f"{finding.stack}.*", 1)
