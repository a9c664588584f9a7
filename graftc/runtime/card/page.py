"""Render the card of an artifact, or of a compiled model, as Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from graftc.compiler.resolve.train import TRAIN
from graftc.records.cards import CardMetadata
from graftc.records.places import AdaptedPlace
from graftc.runtime.card.facts import CardFacts
from graftc.runtime.card.markdown import code, fenced, table
from graftc.runtime.card.metadata import LIBRARY, NOTHING_STATED, StatedMetadata, card_metadata, task_of
from graftc.runtime.card.sections import (
    MOST_PLACES,
    card_text,
    certified,
    folder_in_code,
    model_in_code,
    place_of,
    spec_block,
)
from graftc.specs.errors.text import format_layers
from graftc.specs.io import dump_spec
from graftc.specs.registry import method_specs


def render_card(facts: CardFacts, stated: StatedMetadata = NOTHING_STATED) -> tuple[str, CardMetadata]:
    """Return the card and its metadata.

    Args:
        facts: the facts about the model.
        stated: the metadata that the caller states.
    """
    known = method_specs()
    methods = [a.method for a in facts.summary.adaptations if a.method in known and a.name != TRAIN]
    metadata = card_metadata(
        stated,
        facts.base,
        library=LIBRARY,
        relation="adapter",
        task=task_of(facts.summary.model),
        tags=[LIBRARY, *methods],
    )
    return card_text(metadata, _sections(facts, metadata)), metadata


def _sections(facts: CardFacts, metadata: CardMetadata) -> Iterator[str]:
    base = metadata.base_model or place_of(facts.base)
    title = code(facts.name) if facts.name else f"An adapted {code(facts.summary.model)}"
    yield f"# {title}"
    methods = ", ".join(dict.fromkeys(code(a.method) for a in facts.summary.adaptations)) or "nothing"
    where = f"The base is in the folder {code(str(base))}."
    if facts.base.kind != "inside":
        where = "The base's own weights are not in this repository."
    yield (
        f"Adapters for {code(base) if base else 'a base that was created in Python'}, a {code(facts.summary.model)} in "
        f"{code(facts.dtype)}: {methods}. They were made by graftc, a compiler for "
        f"parameter-efficient fine-tuning. {where}"
    )
    yield "## Figures"
    yield from _figures(facts)
    yield "## Places"
    yield from _places(facts.snapshot.sites)
    yield "## Spec"
    yield from spec_block(facts.snapshot.spec, dump_spec(facts.snapshot.spec), "spec.yaml")
    yield "## Folding"
    yield from _folding(facts)
    yield "## Use"
    yield from _use(facts, metadata)
    notes = list(_warnings(facts, metadata))
    if notes:
        yield "## Warnings"
        yield "\n".join(f"- {note}" for note in notes)


def _figures(facts: CardFacts) -> Iterator[str]:
    totals = facts.summary
    columns = ("adaptation", "method", "places", "trainable", "frozen", "share of the base", "bytes")
    rows = [
        (
            *(code(a.name), code(a.method)),
            *(f"{n:,}" for n in (a.places, a.trainable_parameters, a.frozen_parameters)),
            *(_share(a.trainable_parameters, totals.base_parameters), f"{facts.bytes.get(a.name, 0):,}"),
        )
        for a in totals.adaptations
    ]
    yield table(columns, rows, right=columns[2:])
    trained = totals.trainable_parameters + totals.trained_in_full
    yield (
        f"{totals.base_parameters:,} parameters of the base, {trained:,} that train "
        f"({_share(trained, totals.base_parameters)}), {sum(facts.bytes.values()):,} bytes of adapter tensors."
    )


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.3f} %" if whole else "-"


def _places(sites: Sequence[AdaptedPlace]) -> Iterator[str]:
    """Yield the table of adapted sites, by adaptation and role."""
    groups: dict[tuple[str, str], list[AdaptedPlace]] = {}
    for site in sites:
        groups.setdefault((site.adaptation, site.roles[0] if site.roles else ""), []).append(site)
    if not groups:
        yield "None: only tensors of the base train."
        return
    rows = []
    for (adaptation, role), group in list(groups.items())[:MOST_PLACES]:
        layers = [site.layer for site in group if site.layer is not None]
        rows.append(
            (
                *(code(adaptation), code(role) if role else "-"),
                *(format_layers(list(dict.fromkeys(layers))) if layers else "-", f"{len(group):,}"),
                code(str(group[0].key)),
            )
        )
    yield table(("adaptation", "role", "layers", "places", "the first one"), rows, right=("places",))
    if len(groups) > MOST_PLACES:
        yield f"And {len(groups) - MOST_PLACES:,} more kinds of places: `graftc inspect DIR --tree` shows them."


def _folding(facts: CardFacts) -> Iterator[str]:
    if facts.merged is not None:
        folded = (
            f"{', '.join(map(code, facts.merged.certificate.folded))} is part of the weights of the base in this folder"
        )
        yield from certified(folded, facts.merged.certificate)
    if facts.certificate is not None:
        folded = f"{', '.join(map(code, facts.folded)) or 'Nothing'} can be folded into the base's weights"
        yield from certified(folded, facts.certificate)
    elif facts.merged is None:
        yield "No fold was certified."
    if facts.kept:
        yield "These stay beside the base, in the graph:"
        yield table(("adaptation", "why"), [(code(name), code(why, 400)) for name, why in facts.kept.items()])


def _use(facts: CardFacts, metadata: CardMetadata) -> Iterator[str]:
    folder, named = folder_in_code(facts.name), model_in_code(metadata.base_model)
    yield f"`pip install graftc`. `{folder}` is the artifact's folder" + (
        ", and `MODEL` the base: a folder, a hub id, or in Python the model itself." if named == "MODEL" else "."
    )
    load = [
        "import graftc",
        "",
        f'compiled = graftc.load("{folder}", "{named}")  # inputs and outputs of the base',
        "compiled.eval()",
    ]
    merge = "compiled.merge()" if not facts.kept else "compiled.merge_partially()"
    load += [f'{merge}.save("merged")' + ("" if facts.kept else "  # a folder that transformers loads")]
    yield fenced("\n".join(load), "python")
    partial = " --partial" if facts.kept else ""
    lines = [
        f"$ graftc verify {folder} --model {named}",
        f"$ graftc merge {folder} --model {named}{partial} --out merged",
        f"$ graftc export {folder} --model {named} --format onnx{' --no-merge' if facts.kept else ''} --out model.onnx",
        f"$ graftc inspect {folder} --tree",
    ]
    yield fenced("\n".join(lines), "console")


def _warnings(facts: CardFacts, metadata: CardMetadata) -> Iterator[str]:
    if metadata.base_model is None:
        yield "The card does not name a base on the hub: set it with `--base-model OWNER/NAME`."
    if facts.certificate is None and not facts.kept:
        yield "Nothing was certified: merging checks whether the merged model computes the same function."
    if facts.certificate is not None and not facts.certificate.passed:
        yield "The certificate did not pass: a merged model does not compute the same function as these adapters."
    if facts.fingerprint:
        yield f"The adapters load only with the base whose fingerprint is {code(facts.fingerprint)}."
    if facts.versions:
        versions = ", ".join(f"{name} {value}" for name, value in facts.versions.items())
        yield f"Written with {code(versions, 200)}."
