"""Load the base model that a file names."""

from __future__ import annotations

import os
from pathlib import Path

from torch import nn

from graftc.runtime.sources.folder_kinds import reader_of
from graftc.runtime.sources.models import load_folder, load_hub
from graftc.runtime.sources.reference import Reference
from graftc.specs.errors.diagnostics import GraftError


def find_base(reference: Reference, artifact: Path) -> nn.Module:
    """Load the base that an artifact names, as it was built: with its transformers class, its labels and its dtype.

    A folder that was moved together with the artifact is found as well.

    Raises:
        GraftError: GC086 if the base does not exist, or if loading it would run code that the artifact names; GC032 if
            the base exists but cannot be loaded.
    """
    hint = "name the base: --model MODEL, or graftc.load(path, model=...)"
    kind, text, relative = reference.kind, reference.text, reference.relative
    if kind is None or text is None:
        message = f"{artifact} does not record the location of its base: it was compiled from Python"
        raise GraftError("GC086", message, hint=hint)
    flaw = reference.flaw()
    if flaw is not None:
        raise GraftError("GC086", f"{artifact} names {flaw}, which is not a valid location for a base", hint=hint)
    if kind == "callable":
        message = f"{artifact} was compiled from {text}, but code is not run merely because an artifact names it"
        raise GraftError("GC086", message, hint=f"name it yourself: --model {text}")
    if kind == "hub":
        return load_hub(text, revision=reference.revision, built=reference.built)
    stated = Path(text) if kind == "folder" else None
    for place in (stated, artifact / relative if relative is not None else None):
        if place is not None and (place / "config.json").is_file():
            return load_folder(Path(os.path.normpath(place)), built=reference.built)
    if stated is not None and (reader := reader_of(stated)) is not None:
        hint = f"{reader}; pass the result: graftc.load(path, model=...)"
        raise GraftError(
            "GC086", f"the base of {artifact}, at {text}, cannot be loaded from its folder alone", hint=hint
        )
    raise GraftError("GC086", f"the base of {artifact} is not at {text}", hint=hint)
