"""Write the card of a folder, whichever kind it is: an artifact, a merged model, or a PEFT adapter."""

from __future__ import annotations

import os
from pathlib import Path

from graftc.files.destinations import CARD
from graftc.records.cards import CardMetadata
from graftc.runtime.artifact.manifest import MANIFEST
from graftc.runtime.artifact.places import RECORD, is_peft
from graftc.runtime.artifact.read import open_artifact
from graftc.runtime.card.facts import artifact_facts
from graftc.runtime.card.merged import merged_card, merged_facts
from graftc.runtime.card.metadata import NOTHING_STATED, StatedMetadata
from graftc.runtime.card.page import render_card
from graftc.runtime.card.peft import peft_card, peft_facts
from graftc.specs.errors.arguments import absolute_path


def takes_card(folder: Path, out: Path) -> bool:
    """Return whether a file is the card inside a folder that may contain one: all but an artifact.

    Args:
        folder: the folder that the card is about.
        out: the file to write.
    """
    inside = os.path.realpath(out.parent) == os.path.realpath(folder) and out.name == CARD
    return inside and not (folder / MANIFEST).is_file()


def folder_card(path: str | os.PathLike[str], stated: StatedMetadata = NOTHING_STATED) -> tuple[str, CardMetadata]:
    """Return the card of a folder and its metadata; the base is not needed.

    Args:
        path: an artifact, a merged model's folder with its ``graftc.json``, or a PEFT adapter's folder.
        stated: the metadata that the caller states.

    Raises:
        GraftError: GC080 to GC085 if the folder is none of these, or an artifact or a merged model that is not as it
            was written; GC091 for an artifact without graphs; GC100 or GC101 for a merged model's tensors; GC110, GC111
            or GC113 for a PEFT adapter that cannot be read.
    """
    folder = absolute_path(path)
    if not (folder / MANIFEST).is_file():
        if (folder / RECORD).is_file():
            return merged_card(merged_facts(folder, str(path)), stated)
        if is_peft(folder):
            return peft_card(peft_facts(folder), stated)
    return render_card(artifact_facts(open_artifact(path)), stated)
