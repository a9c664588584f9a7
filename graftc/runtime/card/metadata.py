"""A model card's metadata, in the form that the Hugging Face hub reads."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from graftc.compiler.resolve.train import TRAIN
from graftc.records.cards import CardMetadata
from graftc.runtime.card.facts import CardFacts
from graftc.runtime.sources.reference import is_hub_id
from graftc.specs.errors.arguments import kind_of
from graftc.specs.errors.diagnostics import GraftError
from graftc.specs.errors.text import shown
from graftc.specs.registry import method_specs

LIBRARY = "graftc"
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]{0,95}", re.ASCII)
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


def card_metadata(
    facts: CardFacts,
    base_model: str | None = None,
    license: str | None = None,
    language: Sequence[str] = (),
    tags: Sequence[str] = (),
) -> CardMetadata:
    """Return a card's metadata.

    Args:
        facts: the facts about the model.
        base_model: the base's hub id; by default the id by which it was loaded.
        license: the hub's id for a license, such as ``apache-2.0``.
        language: language codes, such as ``en``.
        tags: additional tags.

    Raises:
        GraftError: GC073 for values that the hub does not accept.
    """
    if base_model is not None:
        _check("base_model", base_model, is_hub_id, "use a repository id: owner/name")
    if license is not None:
        _check("license", license, _LICENSE.fullmatch, "use an id from the hub's list, such as apache-2.0")
    for code in language:
        _check("language", code, _LANGUAGE.fullmatch, "use ISO 639 codes, such as en")
    for tag in tags:
        _check("tag", tag, _TAG.fullmatch, "use letters, digits, spaces and . : / + - _")
    named = facts.base.text if facts.base.kind == "hub" and base_model is None else base_model
    known = method_specs()
    methods = [a.method for a in facts.summary.adaptations if a.method in known and a.name != TRAIN]
    return CardMetadata(
        library_name=LIBRARY,
        base_model=named or None,
        base_model_relation="adapter" if named is not None else None,
        pipeline_tag=task_of(facts.summary.model),
        license=license,
        language=tuple(dict.fromkeys(language)),
        tags=tuple(dict.fromkeys([LIBRARY, *methods, *tags])),
    )


def task_of(model: str) -> str | None:
    """Return the hub's task for a transformers class; None if there is no task, or more than one."""
    from transformers.models.auto import modeling_auto

    def names(kind: str) -> Collection[str]:
        mapping: Mapping[str, str] = getattr(modeling_auto, f"MODEL_FOR_{kind}_MAPPING_NAMES", {})
        return mapping.values()

    tasks = [task for task, kinds in _TASKS.items() if any(model in names(kind) for kind in kinds)]
    return tasks[0] if len(tasks) == 1 else None


def _check(field: str, value: Any, fits: Any, hint: str) -> None:
    if not isinstance(value, str) or not fits(value):
        what = shown(value) if isinstance(value, str) else kind_of(value)
        raise GraftError("GC073", f"{field} is {what}", hint=hint)
