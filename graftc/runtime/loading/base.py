"""Loading the base model that a file names."""

from __future__ import annotations

import os
from pathlib import Path

from torch import nn

from graftc.runtime.sources.folder_kinds import reader_of
from graftc.runtime.sources.models import load_folder, load_hub
from graftc.runtime.sources.reference import Reference
from graftc.specs.errors.diagnostics import GraftError


def find_base(reference: Reference, artifact: Path) -> nn.Module:
    """Load the base that an artifact names, as it was built: with its class of transformers, its labels and its dtype.

    A folder that moved together with the artifact is found.

    Raises:
        GraftError: GC086 if it is not there, or if loading it would run code that the artifact names; GC032 if it is
            there and cannot be loaded.
    """
    hint = "name the base: --model MODEL, or graftc.load(path, model=...)"
    kind, text, relative = reference.kind, reference.text, reference.relative
    if kind is None or text is None:
        raise GraftError("GC086", f"{artifact} does not say where its base is: it was compiled from Python", hint=hint)
    flaw = reference.flaw()
    if flaw is not None:
        raise GraftError("GC086", f"{artifact} names {flaw}, which is not a place of a base", hint=hint)
    if kind == "callable":
        message = f"{artifact} was compiled from {text}, and no code is run because an artifact names it"
        raise GraftError("GC086", message, hint=f"say so yourself: --model {text}")
    if kind == "hub":
        return load_hub(text, revision=reference.revision, built=reference.built)
    stated = Path(text) if kind == "folder" else None
    for place in (stated, artifact / relative if relative is not None else None):
        if place is not None and (place / "config.json").is_file():
            return load_folder(Path(os.path.normpath(place)), built=reference.built)
    if stated is not None and (reader := reader_of(stated)) is not None:
        hint = f"{reader}; pass what it returns: graftc.load(path, model=...)"
        raise GraftError(
            "GC086", f"the base of {artifact}, at {text}, cannot be loaded from its folder alone", hint=hint
        )
    raise GraftError("GC086", f"the base of {artifact} is not at {text}", hint=hint)
