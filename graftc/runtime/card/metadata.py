"""A model card's metadata, in the form that the Hugging Face hub reads."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from graftc.records.cards import CardMetadata
from graftc.runtime.card.base_license import is_license, license_of
from graftc.runtime.sources.reference import Reference, is_hub_id
from graftc.specs.errors.arguments import kind_of
from graftc.specs.errors.diagnostics import GraftError
from graftc.specs.errors.text import shown

LIBRARY = "graftc"
_LANGUAGE = re.compile(r"[a-z]{2,8}(-[A-Za-z0-9]{1,8}){0,4}", re.ASCII)
_TAG = re.compile(r"[\w][\w .:/+-]{0,95}", re.ASCII)
_TASKS = {
    "audio-classification": ["AUDIO_CLASSIFICATION"],
    "automatic-speech-recognition": ["CTC", "SPEECH_SEQ_2_SEQ"],
    "fill-mask": ["MASKED_LM"],
    "image-classification": ["IMAGE_CLASSIFICATION"],
    "image-segmentation": ["IMAGE_SEGMENTATION"],
    "image-text-to-text": ["IMAGE_TEXT_TO_TEXT"],
    "object-detection": ["OBJECT_DETECTION"],
    "question-answering": ["QUESTION_ANSWERING"],
    "table-question-answering": ["TABLE_QUESTION_ANSWERING"],
    "text-classification": ["SEQUENCE_CLASSIFICATION"],
    "text-generation": ["CAUSAL_LM"],
    "token-classification": ["TOKEN_CLASSIFICATION"],
    "zero-shot-image-classification": ["ZERO_SHOT_IMAGE_CLASSIFICATION"],
}
"""The hub's tasks, each with transformers' auto-class mappings for it. `transformers.modelcard` has the same table, but
imports PEFT and the quantisation libraries."""


@dataclass(frozen=True)
class StatedMetadata:
    """The metadata of a card that its author states.

    Attributes:
        base_model: the base's hub id; by default the id by which it was loaded.
        license: the hub's id for a license, such as ``apache-2.0``; by default that of the base, if its own card is on
            this machine.
        language: language codes, such as ``en``.
        tags: additional tags.
        datasets: hub ids of the data sets that the model was trained on.

    Raises:
        GraftError: GC073 for values that the hub does not accept.
    """

    base_model: str | None = None
    license: str | None = None
    language: Sequence[str] = ()
    tags: Sequence[str] = ()
    datasets: Sequence[str] = ()

    def __post_init__(self) -> None:
        if self.base_model is not None:
            _check("base_model", self.base_model, is_hub_id, "use a repository id: owner/name")
        if self.license is not None:
            _check("license", self.license, is_license, "use an id from the hub's list, such as apache-2.0")
        for code in self.language:
            _check("language", code, _LANGUAGE.fullmatch, "use ISO 639 codes, such as en")
        for tag in self.tags:
            _check("tag", tag, _TAG.fullmatch, "use letters, digits, spaces and . : / + - _")
        for name in self.datasets:
            _check("dataset", name, is_hub_id, "use the id of a data set on the hub: owner/name")


NOTHING_STATED = StatedMetadata()


def card_metadata(
    stated: StatedMetadata,
    base: Reference,
    *,
    relation: str,
    tags: Sequence[str],
    library: str | None = None,
    task: str | None = None,
) -> CardMetadata:
    """Return a card's metadata: what its author states, and what the files say.

    Args:
        stated: the metadata that the author states.
        base: the location of the base, if the files state it.
        relation: the hub's word for how a model is related to its base, such as ``adapter``.
        tags: tags that precede the stated ones.
        library: the library that loads the folder; None if there is none.
        task: the hub's task; None if it is unknown.
    """
    named = base.text if base.kind == "hub" and stated.base_model is None else stated.base_model
    return CardMetadata(
        library_name=library,
        base_model=named or None,
        base_model_relation=relation if named is not None else None,
        pipeline_tag=task,
        license=stated.license or _license(base, named),
        language=tuple(dict.fromkeys(stated.language)),
        datasets=tuple(dict.fromkeys(stated.datasets)),
        tags=tuple(dict.fromkeys([*tags, *stated.tags])),
    )


def _license(base: Reference, named: str | None) -> str | None:
    """Return the license of the base: of the hub's repository, if that is known, or else of the folder."""
    on_hub = Reference("hub", named, base.revision if named == base.text else None)
    return (license_of(on_hub) if named is not None else None) or (license_of(base) if base.kind == "folder" else None)


def task_of(model: str) -> str | None:
    """Return the hub's task for a transformers class; None if there is no task, or more than one."""
    from transformers.models.auto import modeling_auto

    def names(kind: str) -> Collection[str]:
        mapping: Mapping[str, str] = getattr(modeling_auto, f"MODEL_FOR_{kind}_MAPPING_NAMES", {})
        return mapping.values()

    tasks = [task for task, kinds in _TASKS.items() if any(model in names(kind) for kind in kinds)]
    return tasks[0] if len(tasks) == 1 else None


def is_transformers_class(name: str) -> bool:
    """Return whether transformers itself has a class for models with this name."""
    from transformers.models.auto import modeling_auto

    for mapping, values in vars(modeling_auto).items():
        if mapping.startswith("MODEL_") and mapping.endswith("_MAPPING_NAMES"):
            for value in values.values():
                if name in (value if isinstance(value, tuple | list) else (value,)):
                    return True
    return False


def _check(field: str, value: Any, fits: Any, hint: str) -> None:
    if not isinstance(value, str) or not fits(value):
        what = shown(value) if isinstance(value, str) else kind_of(value)
        raise GraftError("GC073", f"{field} is {what}", hint=hint)
