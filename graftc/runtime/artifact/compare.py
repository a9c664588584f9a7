"""Compare two artifacts."""

from __future__ import annotations

import difflib
from collections.abc import Iterator

from torch import Tensor

from graftc.compiler.folding.differences import largest_difference
from graftc.compiler.inspect.diff import diff_programs
from graftc.records.comparison import Comparison, SiteChanges, TensorChange
from graftc.records.places import AdaptedPlace
from graftc.runtime.artifact.manifest import SPEC
from graftc.runtime.artifact.read import Artifact
from graftc.specs.errors.text import format_runs
from graftc.specs.io import dump_spec


def compare(a: Artifact, b: Artifact) -> Comparison:
    """Compare the second artifact with the first. No base is needed.

    Raises:
        GraftError: GC084 for tensors that do not match their manifest, GC091 if an artifact has no graphs.
    """
    before, after = _places(a), _places(b)
    old, new = dump_spec(a.spec).splitlines(), dump_spec(b.spec).splitlines()
    return Comparison(
        tuple(a.identity.differences(b.identity)),
        "\n".join(difflib.unified_diff(old, new, str(a.path / SPEC), str(b.path / SPEC), lineterm="")),
        SiteChanges(
            tuple(place for place in after if place not in before),
            tuple(place for place in before if place not in after),
            tuple(
                f"{place}: {before[place]} -> {after[place]}"
                for place in before
                if place in after and before[place] != after[place]
            ),
        ),
        tuple(_tensors(a, b)),
        diff_programs(a.program(), b.program()),
    )


def _places(artifact: Artifact) -> dict[str, str]:
    """Return every adapted site, with all properties that can differ, as text."""
    return {
        f"{record.adaptation} at {record.key}": ", ".join([record.method, _rows(record), *record.roles])
        for record in artifact.manifest.sites
    }


def _rows(record: AdaptedPlace) -> str:
    return "all rows" if record.rows is None else f"rows {format_runs(record.rows)}"


def _tensors(a: Artifact, b: Artifact) -> Iterator[TensorChange]:
    old, new = a.manifest.adapters, b.manifest.adapters
    gone = {entry.sha256: name for name, entry in old.items() if name not in new}
    come = {entry.sha256: name for name, entry in new.items() if name not in old}
    moved = {gone[digest]: come[digest] for digest in gone if digest in come}
    values = (a.tensors(), b.tensors()) if any(new.get(n) not in (None, e) for n, e in old.items()) else ({}, {})
    for name, entry in old.items():
        if name in moved:
            yield TensorChange(f"{name} -> {moved[name]}", "moved", None)
        elif name not in new:
            yield TensorChange(name, "removed", None)
        elif new[name] != entry:
            yield TensorChange(name, "changed", _largest(values[0][name], values[1][name]))
    for name in new:
        if name not in old and name not in moved.values():
            yield TensorChange(name, "added", None)


def _largest(a: Tensor, b: Tensor) -> float | None:
    if a.shape != b.shape:
        return None
    return largest_difference(a, b)
