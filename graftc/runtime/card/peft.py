"""The card of a PEFT adapter's folder: what it adapts, what is stored, and how to load it. No base is needed."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graftc.files.tensors.headers import StoredTensor
from graftc.records.cards import CardMetadata
from graftc.runtime.card.markdown import code, fenced, table
from graftc.runtime.card.metadata import NOTHING_STATED, StatedMetadata, card_metadata, is_transformers_class
from graftc.runtime.card.sections import (
    MOST_PLACES,
    block,
    card_text,
    folder_in_code,
    model_in_code,
    place_of,
    sizes,
)
from graftc.runtime.interop.peft.folder import WEIGHTS, PeftAdapter, PeftModule, adapter_tensors, peft_digest, read_peft
from graftc.runtime.sources.reference import Reference, is_hub_id
from graftc.specs.errors.arguments import absolute_path
from graftc.specs.errors.diagnostics import GraftError
from graftc.specs.errors.text import format_layers
from graftc.specs.foreign.config import CONFIG, AdapterConfig, config_bytes, parsed_config

_TASKS = {
    "CAUSAL_LM": ("text-generation", "AutoModelForCausalLM"),
    "FEATURE_EXTRACTION": ("feature-extraction", "AutoModel"),
    "QUESTION_ANS": ("question-answering", "AutoModelForQuestionAnswering"),
    "SEQ_2_SEQ_LM": (None, "AutoModelForSeq2SeqLM"),
    "SEQ_CLS": ("text-classification", None),
    "TOKEN_CLS": ("token-classification", None),
}
"""PEFT's tasks, each with the hub's task and the class of transformers that loads a base for it without further
arguments; None where there is none."""

_BASE = ("base_model_name_or_path", "auto_mapping")
"""Fields of a config that say which model the base is."""
_PATH_FIELD = re.compile(r"path|dir|file")
"""Part of the names of fields that may contain paths on someone's machine."""
_LAYER = re.compile(r"\.(\d{1,6})\.")


@dataclass(frozen=True)
class PeftFacts:
    """The facts on which the card of a PEFT adapter is based.

    Attributes:
        name: the name of the folder.
        config: its config, of any type and with any options.
        tensors: its tensors as stored, by key.
        adapter: the adapter as graftc reads it; None if its type or an option has no equivalent in graftc.
        base: the location of the base, as far as the config says.
        digest: the digest by which records of merges name the adapter.
    """

    name: str
    config: AdapterConfig
    tensors: Mapping[str, StoredTensor]
    adapter: PeftAdapter | None
    base: Reference
    digest: str


def peft_facts(folder: Path) -> PeftFacts:
    """Return the facts that a PEFT adapter's folder contains.

    Raises:
        GraftError: GC110 if it has no safetensors file, GC111 for a config that is none, GC113 for tensors that cannot
            be read or do not match the config.
    """
    adapter = None
    try:
        adapter = read_peft(folder, whole=True)
    except GraftError as error:
        if error.code not in ("GC111", "GC112"):  # fields and options of PEFT that graftc does not know
            raise
    config = parsed_config(config_bytes(folder / CONFIG), str(folder / CONFIG))
    tensors = adapter_tensors(folder / WEIGHTS).entries
    return PeftFacts(folder.name, config, tensors, adapter, base_of(config, folder), peft_digest(folder))


def base_of(config: AdapterConfig, folder: Path) -> Reference:
    """Return the location of the base that a config names.

    The name of a repository of the hub is told from a path by its form, ``owner/name``, and by the absence of such a
    folder, both in the working folder and beside the adapter.
    """
    text = config.base_model_name_or_path
    if not text:
        return Reference()
    local = [place for place in (Path(text), folder.parent / text) if os.path.isdir(place)]
    if local:
        return Reference("folder", str(absolute_path(local[0])))
    if is_hub_id(text) and "/" in text:
        return Reference("hub", text, config.revision if isinstance(config.revision, str) else None)
    return Reference("folder", text)


def peft_card(facts: PeftFacts, stated: StatedMetadata = NOTHING_STATED) -> tuple[str, CardMetadata]:
    """Return the card of a PEFT adapter and its metadata.

    Args:
        facts: the facts about the folder.
        stated: the metadata that the caller states.
    """
    task, _ = _TASKS.get(facts.config.task_type or "", (None, None))
    methods = [str(facts.adapter.config.format[0].tag())] if facts.adapter is not None else []
    metadata = card_metadata(stated, facts.base, library="peft", relation="adapter", task=task, tags=methods)
    return card_text(metadata, _sections(facts, metadata)), metadata


def _sections(facts: PeftFacts, metadata: CardMetadata) -> Iterator[str]:
    base = metadata.base_model or place_of(facts.base)
    yield f"# {code(facts.name)}"
    yield (
        f"An adapter of the type {code(facts.config.peft_type)}{f' for {code(base)}' if base else ''}, in the format "
        "of PEFT. The base's own weights are not in this folder."
    )
    yield "## Figures"
    yield table(("what", "tensors", "elements", "bytes"), list(_figures(facts)), right=("tensors", "elements", "bytes"))
    if facts.adapter is not None and facts.adapter.modules:
        yield "## Places"
        yield from _places(facts.adapter.modules)
    yield "## Config"
    yield "The settings that are neither null, false nor empty:"
    yield block(json.dumps(_settings(facts.config), indent=2), "json", CONFIG)
    yield "## Use"
    yield from _use(facts, metadata)
    if facts.adapter is not None:
        yield "## Check"
        yield from _check(facts, metadata)


def _figures(facts: PeftFacts) -> Iterator[tuple[str, ...]]:
    """Yield the rows of the table of tensors, by what they are for, and by their element type."""
    kinds = {key: "tensors of the adapter" for key in facts.tensors}
    if facts.adapter is not None:
        trained = {*facts.adapter.trained.values()}
        copies = {*facts.adapter.copies.values(), *facts.adapter.keys.unused}
        for first, again in facts.adapter.keys.again:
            (copies if first in facts.adapter.copies else trained).add(again)
        kinds |= dict.fromkeys(facts.adapter.keys.shared.values(), "tensors that all places share")
        kinds |= dict.fromkeys(trained, "tensors of the base that were trained in full")
        kinds |= dict.fromkeys(copies, "copies of the base's tensors")
    groups: dict[tuple[str, str], list[StoredTensor]] = {}
    for key, tensor in facts.tensors.items():
        groups.setdefault((kinds[key], tensor.dtype), []).append(tensor)
    for (kind, dtype), group in groups.items():
        yield f"{kind}, {code(dtype)}", *sizes(group)


def _places(modules: Collection[PeftModule]) -> Iterator[str]:
    """Yield the table of adapted modules, by name, rank and method."""
    groups: dict[tuple[str, str, Any], list[PeftModule]] = {}
    for module in modules:
        key = (_LAYER.sub(".*.", module.target, count=1), module.spec.method, getattr(module.spec, "rank", None))
        groups.setdefault(key, []).append(module)
    rows = []
    for (name, method, rank), group in list(groups.items())[:MOST_PLACES]:
        layers = [int(found[1]) for module in group if (found := _LAYER.search(module.target))]
        rows.append(
            (
                *(code(name), code(method), "-" if rank is None else f"{rank:,}"),
                *(format_layers(layers) if layers else "-", f"{len(group):,}"),
            )
        )
    yield table(("module", "method", "rank", "layers", "places"), rows, right=("rank", "places"))
    if len(groups) > MOST_PLACES:
        yield f"And {len(groups) - MOST_PLACES:,} more kinds of modules: `{CONFIG}` and the tensors' names have them."


def _settings(config: AdapterConfig) -> dict[str, Any]:
    """Return the fields of a config that are set, without the base's location."""
    fields = {**config.model_dump(include=set(type(config).model_fields)), **config.own}
    own = {name: value for name, value in sorted(fields.items()) if name not in _BASE and _is_set(value)}
    return {name: _last_part(value) if _PATH_FIELD.search(name) else value for name, value in own.items()}


def _last_part(path: Any) -> Any:
    """Return the last part of a path, as for the base's; other values as they are, and so names on the hub."""
    return re.split(r"[\\/]", path.rstrip("\\/"))[-1] if isinstance(path, str) and not is_hub_id(path) else path


def _is_set(value: Any) -> bool:
    return value is not None and value is not False and value not in ("", [], {})


def _use(facts: PeftFacts, metadata: CardMetadata) -> Iterator[str]:
    folder, base = folder_in_code(facts.name), model_in_code(metadata.base_model)
    loader = _loader(facts.config)
    lines = ["from peft import PeftModel"]
    if loader is None:
        yield f"`{folder}` is this folder, or the id of its repository, and `base` the base, a model of transformers."
        lines += ["", f'model = PeftModel.from_pretrained(base, "{folder}")']
    else:
        names = "" if base != "MODEL" else ", and `MODEL` the base: a folder, or the id of a repository"
        yield f"`{folder}` is this folder, or the id of its repository{names}."
        lines += [f"from transformers import {loader}", "", f'base = {loader}.from_pretrained("{base}")']
        lines += [f'model = PeftModel.from_pretrained(base, "{folder}")']
    yield fenced("\n".join(lines), "python")


def _loader(config: AdapterConfig) -> str | None:
    """Return the class of transformers that loads the base; None if the config does not determine it."""
    _, loader = _TASKS.get(config.task_type or "", (None, None))
    named = (config.auto_mapping or {}).get("base_model_class")
    if loader is None and isinstance(named, str) and is_transformers_class(named):
        return named
    return loader


def _check(facts: PeftFacts, metadata: CardMetadata) -> Iterator[str]:
    folder, base = folder_in_code(facts.name), model_in_code(metadata.base_model)
    yield (
        "`pip install graftc`. The first command compares every tensor with the base and the config, and states "
        "whether the adapter folds into the base; the second computes all of it again."
        + (" `MODEL` is the base: a folder, or a hub id." if base == "MODEL" else "")
    )
    yield fenced(f"$ graftc import-peft {folder} --model {base} --out artifact\n$ graftc verify artifact", "console")
    yield f"The digest by which `graftc.json` of a merged model names this adapter is {code(facts.digest)}."
