"""Parts that the cards of all kinds of folders have in common: metadata, certificates, and names in commands."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Iterator

from graftc.files.tensors.headers import StoredTensor
from graftc.records.cards import CardMetadata
from graftc.records.certificate import ALGEBRA_BOUND, ROUNDING_BOUND, Certificate
from graftc.runtime.card.markdown import code, fenced, table
from graftc.runtime.sources.reference import Reference
from graftc.specs.base import MethodSpec
from graftc.specs.document import Spec
from graftc.specs.errors.text import abridged
from graftc.specs.io import plain

MOST_PLACES = 60
"""The maximum number of rows in a table of places."""
MOST_TEXT = 50_000
"""The maximum number of characters of a spec or a config that a card shows."""

MOST_DEFAULTS = 1000
"""The maximum number of characters of an adaptation's default values."""

_WORD = re.compile(r"[A-Za-z0-9][\w.-]*", re.ASCII)
_PATH = re.compile(r"[\w./~-]+", re.ASCII)


def card_text(metadata: CardMetadata, parts: Iterable[str]) -> str:
    """Return a card: its metadata as YAML between two lines of dashes, and its paragraphs.

    Args:
        metadata: the metadata, of which empty fields are left out.
        parts: paragraphs, headings and blocks of Markdown.
    """
    import yaml

    known = {field: value for field, value in metadata.to_json().items() if value}
    front = yaml.safe_dump(known, sort_keys=False, allow_unicode=False, default_flow_style=False)
    return "\n\n".join([f"---\n{front}---", *parts]) + "\n"


def spec_block(spec: Spec, text: str, where: str) -> Iterator[str]:
    """Yield a spec as a block, and the values that it omits because they are the defaults, by adaptation.

    Args:
        spec: the spec.
        text: its YAML.
        where: the file that has all of it.
    """
    yield block(text, "yaml", where, "#")
    rows = [(code(a.name or a.method), code(values, MOST_DEFAULTS)) for a in spec.adapt if (values := _defaults(a))]
    if rows:
        yield "What it does not state has its default:"
        yield table(("adaptation", "defaults"), rows[:MOST_PLACES])
    if len(rows) > MOST_PLACES:
        yield f"And {len(rows) - MOST_PLACES:,} more adaptations."


def _defaults(adaptation: MethodSpec) -> str:
    """Return the values of an adaptation that its spec omits, without those that are off, and without its places."""
    stated = plain(adaptation, "name", "method", "target")
    sizes = adaptation.sizes if any(size in stated for size in adaptation.sizes) else ()
    return ", ".join(
        f"{field}: {value}"
        for field, value in adaptation.model_dump(mode="json").items()
        if field not in stated and field not in sizes and value not in (None, False, [])
    )


def certified(folded: str, certificate: Certificate) -> Iterator[str]:
    """Yield a sentence about what was folded, in Markdown, with the result, and the evidence as a table."""
    yield f"{folded}. The certificate of that fold {'passed' if certificate.passed else '**did not pass**'}:"
    yield table(("check", "found"), list(_evidence(certificate)))


def _evidence(certificate: Certificate) -> Iterator[tuple[str, str]]:
    sites, retention = certificate.sites, certificate.retention
    yield "places", f"{len(sites):,}"
    if sites:
        algebra, rounding = max(s.algebra for s in sites), max(s.rounding for s in sites)
        yield (
            "largest difference in float64, unfolded against folded, relative",
            f"{algebra:.1e} (at most {ALGEBRA_BOUND:.0e})",
        )
        yield "largest rounding, in units in the last place", f"{rounding:.3f} (at most {ROUNDING_BOUND})"
    if retention.wanted:
        yield "share of the update that is left after rounding", f"{100 * retention.norm:.1f} %"
    for name, value in list(certificate.outputs.items())[:10]:
        yield f"largest difference of the output {code(name)}", f"{value:.1e} (at most {certificate.budget:.1e})"
    if flips := sum(route.flips for route in certificate.routes):
        choices = sum(route.choices for route in certificate.routes)
        yield "router choices that differ after folding", f"{flips:,} of {choices:,}"
    yield "element type", code(certificate.dtype) if certificate.dtype else "-"
    if certificate.additions:
        yield "biases that folding adds", ", ".join(code(name) for name in certificate.additions[:5])


def block(text: str, language: str, where: str, comment: str = "") -> str:
    """Return a text as a block, only its beginning and its end if it is too long.

    Args:
        text: the text.
        language: the language of the block.
        where: the file that has all of it, which a last line names if only a part is shown.
        comment: what begins a comment in the language.
    """
    if len(text) <= MOST_TEXT:
        return fenced(text, language)
    return fenced(f"{abridged(text, MOST_TEXT)}\n{comment} {len(text):,} characters: see {where} for all", language)


def place_of(base: Reference) -> str | None:
    """Return the location of a base without anything private: of a path, only the last part."""
    return base.text.replace("\\", "/").rstrip("/").rpartition("/")[2] if base.text is not None else None


def folder_in_code(name: str, otherwise: str = "DIR") -> str:
    """Return a folder's name if it can be used unquoted in commands and in Python, and a placeholder if not."""
    return name if _WORD.fullmatch(name) and len(name) <= 100 else otherwise


def model_in_code(name: str | None, otherwise: str = "MODEL") -> str:
    """Return a model's id if it can be used unquoted in commands and in Python, and a placeholder if not."""
    fits = name is not None and len(name) <= 200 and not name.startswith("-") and _PATH.fullmatch(name) is not None
    return name if name is not None and fits else otherwise


def sizes(tensors: Collection[StoredTensor]) -> tuple[str, str, str]:
    """Return cells of a table: the number of tensors in a file, and of their elements and bytes."""
    numbers = (len(tensors), sum(math.prod(t.shape) for t in tensors), sum(t.end - t.start for t in tensors))
    count, elements, size = (f"{number:,}" for number in numbers)
    return count, elements, size
