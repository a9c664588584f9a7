"""Read the license of a base from its own card, if that is on this machine."""

from __future__ import annotations

import re
from pathlib import Path

from graftc.files.destinations import CARD
from graftc.runtime.sources.reference import Reference
from graftc.specs.regular_files import read_regular

_MOST = 2**20
"""The maximum size of a card in bytes; a larger one is not read."""
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]{0,95}", re.ASCII)
_FRONT = re.compile(r"\s*---\r?\n(?P<front>.*?)\r?\n---[ \t]*(?:\r?\n|$)", re.DOTALL)
_FIELD = re.compile(
    r"^license:[ \t]*(?P<quote>['\"]?)(?P<license>[^\s'\"#]+)(?P=quote)[ \t]*(?:#.*)?\r?$", re.MULTILINE
)


def is_license(text: str) -> bool:
    """Return whether a text has the form of the hub's ids for licenses, such as ``apache-2.0``."""
    return _LICENSE.fullmatch(text) is not None


def license_of(base: Reference) -> str | None:
    """Return the license in the card of a base; None if no card is on this machine, or it states none.

    Args:
        base: a folder, or a hub id, which is looked up in the hub's cache only.
    """
    card = _card_of(base)
    if card is None:
        return None
    try:
        text = read_regular(card, _MOST).decode("utf-8-sig")
    except (OSError, ValueError):
        return None
    front = _FRONT.match(text)
    licenses = [match["license"] for match in _FIELD.finditer(front["front"])] if front is not None else []
    return licenses[0] if len(licenses) == 1 and is_license(licenses[0]) else None


def _card_of(base: Reference) -> Path | None:
    if base.text is None:
        return None
    if base.kind == "folder":
        return Path(base.text) / CARD
    if base.kind != "hub":
        return None
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(base.text, CARD, revision=base.revision)
    except HFValidationError:
        return None
    return Path(cached) if isinstance(cached, str) else None
