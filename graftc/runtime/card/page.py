"""Render a model card as Markdown."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from graftc.records.cards import CardMetadata
from graftc.records.certificate import Certificate
from graftc.records.places import AdaptedPlace
from graftc.runtime.card.facts import CardFacts
from graftc.runtime.card.markdown import code, fenced, table
from graftc.runtime.card.metadata import card_metadata
from graftc.runtime.sources.reference import Reference
from graftc.specs.errors.text import abridged, format_layers
from graftc.specs.io import dump_spec

MOST_PLACES = 60
SPEC = 50_000
"""The maximum number of characters of a spec that a card shows."""

_WORD = re.compile(r"[A-Za-z0-9][\w.-]*", re.ASCII)
_PATH = re.compile(r"[\w./~-]+", re.ASCII)


def render_card(
    facts: CardFacts,
    *,
    base_model: str | None = None,
    license: str | None = None,
    language: Sequence[str] = (),
    tags: Sequence[str] = (),
) -> tuple[str, CardMetadata]:
    """Return the card and its metadata.

    Args:
        facts: the facts about the model.
        base_model, license, language, tags: see `card_metadata`.

    Raises:
        GraftError: GC073 for metadata that the hub does not accept.
    """
    import yaml

    metadata = card_metadata(facts, base_model, license, language, tags)
    known = {field: value for field, value in metadata.to_json().items() if value}
    front = yaml.safe_dump(known, sort_keys=False, allow_unicode=False, default_flow_style=False)
    parts = [f"---\n{front}---", *_sections(facts, metadata)]
    return "\n\n".join(parts) + "\n", metadata


def _sections(facts: CardFacts, metadata: CardMetadata) -> Iterator[str]:
    base = metadata.base_model or _place(facts.base)
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
    yield fenced(_spec(facts), "yaml")
    yield "## Folding"
    yield from _folding(facts)
    yield "## Use"
    yield from _use(facts, metadata)
    yield "## Data, evaluation and intended use"
    yield "The artifact does not record its training data, its evaluation or its intended use: describe them here."
    notes = list(_warnings(facts, metadata))
    if notes:
        yield "## Warnings"
        yield "\n".join(f"- {note}" for note in notes)


def _place(base: Reference) -> str | None:
    """Return the location of a base without anything private: of a path, only the last part."""
    return base.text.replace("\\", "/").rstrip("/").rpartition("/")[2] if base.text is not None else None


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


def _spec(facts: CardFacts) -> str:
    text = dump_spec(facts.snapshot.spec)
    return text if len(text) <= SPEC else f"{abridged(text, SPEC)}\n# {len(text):,} characters: see spec.yaml for all"


def _folding(facts: CardFacts) -> Iterator[str]:
    if facts.merged is not None:
        folded = (
            f"{', '.join(map(code, facts.merged.certificate.folded))} is part of the weights of the base in this folder"
        )
        yield from _certified(folded, facts.merged.certificate)
    if facts.certificate is not None:
        folded = f"{', '.join(map(code, facts.folded)) or 'Nothing'} can be folded into the base's weights"
        yield from _certified(folded, facts.certificate)
    elif facts.merged is None:
        yield "No fold was certified."
    if facts.kept:
        yield "These stay beside the base, in the graph:"
        yield table(("adaptation", "why"), [(code(name), code(why, 400)) for name, why in facts.kept.items()])


def _certified(folded: str, certificate: Certificate) -> Iterator[str]:
    yield f"{folded}. The certificate of that fold {'passed' if certificate.passed else '**did not pass**'}:"
    yield table(("check", "found"), list(_evidence(certificate)))


def _evidence(certificate: Certificate) -> Iterator[tuple[str, str]]:
    sites = certificate.sites
    yield "places", f"{len(sites):,}"
    if sites:
        yield "largest difference in float64, unfolded against folded", f"{max(s.algebra for s in sites):.1e}"
        yield "largest rounding, in units in the last place", f"{max(s.rounding for s in sites):.3f}"
    for name, value in list(certificate.outputs.items())[:10]:
        yield f"largest difference of the output {code(name)}", f"{value:.1e} (at most {certificate.budget:.1e})"
    if flips := sum(route.flips for route in certificate.routes):
        choices = sum(route.choices for route in certificate.routes)
        yield "router choices that differ after folding", f"{flips:,} of {choices:,}"
    yield "element type", code(certificate.dtype) if certificate.dtype else "-"
    if certificate.additions:
        yield "biases that folding adds", ", ".join(code(name) for name in certificate.additions[:5])


def _use(facts: CardFacts, metadata: CardMetadata) -> Iterator[str]:
    folder = facts.name if _WORD.fullmatch(facts.name) and len(facts.name) <= 100 else "DIR"
    base = metadata.base_model or ""
    named = base if _is_argument(base) else "MODEL"
    yield f"`pip install graftc`. {f'`{folder}`' if folder != 'DIR' else '`DIR`'} is the artifact's folder" + (
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


def _is_argument(text: str) -> bool:
    """Return whether a text can be used unquoted in a command, and as a string in Python."""
    return len(text) <= 200 and not text.startswith("-") and (_PATH.fullmatch(text) is not None)


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
