"""Find why a place is adapted: the spec line, the target that selected it, the role and its evidence."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

from graftc.compiler.inspect.snapshot import Snapshot
from graftc.compiler.resolve.tokens import TOKENS
from graftc.compiler.resolve.train import TRAIN
from graftc.records.explanation import Origin
from graftc.records.places import AdaptedPlace, TrainedCopy
from graftc.specs.base import MethodSpec
from graftc.specs.errors.diagnostics import Place
from graftc.specs.errors.text import format_runs
from graftc.specs.patterns import as_items, expand_braces, glob_to_regex
from graftc.specs.roles import widen


def origins(snapshot: Snapshot) -> tuple[Origin, ...]:
    """Return the origins of all adapted places, in spec order, followed by those of tensors that train in full."""
    sites = tuple(_of_site(snapshot, record) for record in snapshot.sites)
    known = {name for origin in sites for name in origin.tensors}
    trained = tuple(_of_trained(snapshot, record) for record in snapshot.trained if record.tensor not in known)
    return sites + trained


def shared_origin(snapshot: Snapshot, adaptation: str) -> Origin:
    """Return the origin of nodes and tensors that belong to an adaptation as a whole."""
    method = snapshot.spec.owners.get(adaptation, adaptation)
    place = _spec_place(snapshot, adaptation, "")
    return Origin(
        adaptation, method, _step(snapshot, adaptation), "", "", "", (), "", None, "", "", (), *_fields(place), ()
    )


def _of_site(snapshot: Snapshot, record: AdaptedPlace) -> Origin:
    adaptation = next((a for a in snapshot.spec.adapt if a.name == record.adaptation), None)
    selectors = list(_selectors(adaptation, record)) if adaptation is not None else []
    return Origin(
        record.adaptation,
        record.method,
        _step(snapshot, record.adaptation),
        str(record.key),
        record.module,
        record.kind,
        record.roles,
        record.evidence,
        record.layer,
        record.stack,
        "" if record.rows is None else format_runs(record.rows),
        tuple(text for _, text in selectors),
        *_fields(_spec_place(snapshot, record.adaptation, selectors[0][0] if selectors else "")),
        tuple(record.tensors.values()),
    )


def _of_trained(snapshot: Snapshot, record: TrainedCopy) -> Origin:
    owner, module = record.owner, record.base.rpartition(".")[0]
    method = snapshot.spec.owners.get(owner, owner)
    selected: list[tuple[str, str]] = []
    if owner == TRAIN:
        ancestors = [module[:end] for end in _ends(module)]
        selected = [
            (f"[{index}]", f"train {glob}")
            for index, glob in enumerate(snapshot.spec.train)
            if any(glob_to_regex(glob).fullmatch(path) for path in ancestors)
        ]
    return Origin(
        owner,
        method,
        _step(snapshot, owner),
        record.base,
        module,
        "parameter",
        (),
        "",
        None,
        "",
        "" if record.rows is None else format_runs(record.rows),
        tuple(text for _, text in selected),
        *_fields(_spec_place(snapshot, owner, selected[0][0] if selected else "")),
        (record.tensor,),
    )


def _fields(place: Place) -> tuple[str | None, int | None, int | None, str, str | None]:
    return place.file, place.line, place.column, place.path, place.text


def _ends(path: str) -> Iterator[int]:
    yield from (match.start() for match in re.finditer(r"\.", path))
    yield len(path)


def _step(snapshot: Snapshot, adaptation: str) -> str:
    """Return the step that inserted an adaptation or its composition; for a plugin's pass, the pass's own name."""
    if any(own.name == adaptation for own in snapshot.passes):
        return adaptation
    composition = snapshot.spec.composition_of(adaptation)
    name = adaptation if composition is None else composition.name
    return f"insert({'train' if name == TRAIN else name})"


def _selectors(adaptation: MethodSpec, record: AdaptedPlace) -> Iterator[tuple[str, str]]:
    """Yield the parts of a target that match a place, each as a path relative to the target and as text."""
    target = adaptation.target
    spellings = {spelling for role in record.roles for spelling in widen(role)}
    tests: dict[str, Callable[[str], bool]] = {
        "role": lambda item: any(branch in spellings for branch in expand_braces(item)),
        "modules": lambda item: glob_to_regex(item).fullmatch(record.module) is not None,
        "regex": lambda item: re.fullmatch(item, record.module) is not None,
    }
    for name, fits in tests.items():
        value = getattr(target, name)
        for index, item in enumerate(as_items(value)):
            if fits(item):
                step = f".{name}[{index}]" if isinstance(value, tuple) else f".{name}"
                yield step, f"{name} {item}"
    if target.layers is not None:
        yield ".layers", f"layers {', '.join(map(str, as_items(target.layers)))}"


def _spec_place(snapshot: Snapshot, owner: str, below: str) -> Place:
    """Return where the spec names an adaptation's places; for a plugin's pass, the package that provides it.

    ``below`` is the relative path of the part that selected a place.
    """
    spec = snapshot.spec
    for own in snapshot.passes:
        if own.name == owner:
            return Place(path=str(own))
    if owner in (TRAIN, TOKENS):
        path = "train" if owner == TRAIN else "tokens"
    else:
        index = next((i for i, a in enumerate(spec.adapt) if a.name == owner), None)
        if index is None:
            return spec.place(f"compose[{next(i for i, c in enumerate(spec.compose) if c.name == owner)}]")
        if "target" not in spec.adapt[index].model_fields_set:
            return spec.place(f"adapt[{index}]")
        path = f"adapt[{index}].target"
    exact = spec.place(path + below)
    return exact if exact.line is not None else Place(exact.file, path=path)
