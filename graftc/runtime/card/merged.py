"""The card of a merged model's folder: what was folded into the weights, how it was checked, and how to load it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from graftc.files.tensors.folder import TensorFolder
from graftc.files.tensors.headers import StoredTensor
from graftc.records.cards import CardMetadata
from graftc.runtime.artifact.read import open_merged
from graftc.runtime.artifact.records import MergedRecord, merged_spec
from graftc.runtime.card.markdown import code, fenced, table
from graftc.runtime.card.metadata import (
    LIBRARY,
    NOTHING_STATED,
    StatedMetadata,
    card_metadata,
    is_transformers_class,
    task_of,
)
from graftc.runtime.card.sections import block, card_text, certified, folder_in_code, sizes, spec_block
from graftc.runtime.sources.reference import Reference
from graftc.specs.document import Spec
from graftc.specs.errors.text import counted
from graftc.specs.registry import method_specs
from graftc.specs.regular_files import JSON_BYTES, read_regular
from graftc.specs.strict_json import read_json

_CONFIG, _WEIGHTS = "config.json", "model.safetensors"
_TOKENIZERS = frozenset({"tokenizer.json", "tokenizer_config.json"})


@dataclass(frozen=True)
class MergedFacts:
    """The facts on which the card of a merged model is based.

    Attributes:
        name: the name of the folder.
        record: the record of its origin, with the certificate.
        spec: the spec that was merged; None if it was an adapter of PEFT.
        model: the class in its config; empty if there is none.
        tensors: its tensors, by name.
    """

    name: str
    record: MergedRecord
    spec: Spec | None
    model: str
    tensors: Mapping[str, StoredTensor]

    @property
    def methods(self) -> list[str]:
        """The methods that were merged, as far as the record states them."""
        if self.spec is None:
            return []
        folded, known = self.record.certificate.folded, method_specs()
        methods = [method for name, method in self.spec.owners.items() if name in folded]
        return list(dict.fromkeys(method for method in methods if method in known))

    @property
    def in_transformers(self) -> bool:
        """Whether transformers has the model's class."""
        return bool(self.model) and is_transformers_class(self.model)


def merged_facts(folder: Path, where: str) -> MergedFacts:
    """Return the facts that a merged model's folder contains, after checking all of its files.

    Args:
        folder: the folder.
        where: the folder named in errors.

    Raises:
        GraftError: GC080 to GC085 if the folder is not as it was written, GC100 or GC101 if its tensors cannot be read.
    """
    record = open_merged(folder, where)
    spec = merged_spec(record, where)
    tensors = TensorFolder(folder).entries
    return MergedFacts(folder.name, record, spec, _class_in(folder / _CONFIG), tensors)


def _class_in(config: Path) -> str:
    """Return the one class that a config names; empty if there is none."""
    try:
        data = read_json(read_regular(config, JSON_BYTES), JSON_BYTES)
    except (OSError, ValueError, RecursionError):
        return ""
    names = data.get("architectures") if isinstance(data, dict) else None
    return names[0] if isinstance(names, list) and len(names) == 1 and isinstance(names[0], str) else ""


def merged_card(facts: MergedFacts, stated: StatedMetadata = NOTHING_STATED) -> tuple[str, CardMetadata]:
    """Return the card of a merged model's folder and its metadata.

    Args:
        facts: the facts about the folder.
        stated: the metadata that the caller states.
    """
    metadata = card_metadata(
        stated,
        Reference(),
        library="transformers" if facts.in_transformers else None,
        relation="finetune",
        task=task_of(facts.model),
        tags=[LIBRARY, *facts.methods],
    )
    return card_text(metadata, _sections(facts, metadata)), metadata


def _sections(facts: MergedFacts, metadata: CardMetadata) -> Iterator[str]:
    record, certificate = facts.record, facts.record.certificate
    yield f"# {code(facts.name)}"
    model = f"a {code(facts.model)}" if facts.model else "a model"
    base = f"{code(metadata.base_model)}, {model}," if metadata.base_model else model
    methods = f" ({', '.join(map(code, facts.methods))})" if facts.methods else ""
    yield (
        f"The weights of {base} with an adapter{methods} folded into them by graftc, a compiler for "
        "parameter-efficient fine-tuning. Nothing beside the files in this folder is needed to use the model."
    )
    yield "## Figures"
    yield _figures(facts)
    yield "## What was folded"
    folded = ", ".join(map(code, certificate.folded)) or "nothing"
    yield from certified(f"Folded into the weights: {folded}", certificate)
    if certificate.notes:
        yield "\n".join(f"- {code(note, 400)}" for note in certificate.notes)
    if facts.spec is None:
        yield "The settings of the PEFT adapter:"
        yield block(record.spec, "json", "graftc.json")
    else:
        yield "The spec:"
        yield from spec_block(facts.spec, record.spec, "graftc.json")
    yield "## Use"
    yield from _use(facts)
    yield "## Check"
    yield from _check(facts)
    yield "## Origin"
    yield table(("what", "value"), list(_origin(record)))


def _figures(facts: MergedFacts) -> str:
    groups: dict[str, list[StoredTensor]] = {}
    for tensor in facts.tensors.values():
        groups.setdefault(tensor.dtype, []).append(tensor)
    rows = [(code(dtype), *sizes(group)) for dtype, group in groups.items()]
    columns = ("element type", "tensors", "elements", "bytes")
    return table(columns, rows, right=columns[1:])


def _use(facts: MergedFacts) -> Iterator[str]:
    folder = folder_in_code(facts.name)
    yield f"`{folder}` is this folder, or the id of its repository."
    if facts.in_transformers:
        tokenizer = not _TOKENIZERS.isdisjoint(facts.record.files)
        names = sorted([facts.model, *(["AutoTokenizer"] if tokenizer else [])])
        lines = [
            f"from transformers import {', '.join(names)}",
            "",
            f'model = {facts.model}.from_pretrained("{folder}")',
            *([f'tokenizer = AutoTokenizer.from_pretrained("{folder}")'] if tokenizer else []),
        ]
        yield fenced("\n".join(lines), "python")
    elif _WEIGHTS in facts.record.files:
        lines = [
            "from safetensors.torch import load_file",
            "",
            f'tensors = load_file("{folder}/{_WEIGHTS}")',
        ]
        yield fenced("\n".join(lines), "python")


def _check(facts: MergedFacts) -> Iterator[str]:
    folder = folder_in_code(facts.name)
    own = "an artifact or a PEFT folder"
    if facts.record.adapter is not None:
        kind = "artifact" if facts.record.adapter.kind == "artifact" else "PEFT folder"
        own = f"the {kind} whose digest is below"
    yield (
        f"`pip install graftc`. The first command compares the folder's {counted(len(facts.record.files), 'file')} "
        "with their digests. The second folds everything again and compares every tensor: "
        f"`ADAPTER` is {own}, and `BASE` the folder of the base, which has to contain every tensor that was adapted: "
        "a head that was drawn when the base was loaded is in no folder."
    )
    yield fenced(f"$ graftc verify {folder}\n$ graftc verify {folder} --adapter ADAPTER --model BASE", "console")


def _origin(record: MergedRecord) -> Iterator[tuple[str, str]]:
    if record.base:
        yield "fingerprint of the base", code(record.base)
    if record.adapter is not None:
        kind = "artifact" if record.adapter.kind == "artifact" else "PEFT adapter"
        yield f"digest of the {kind}", code(record.adapter.sha256)
    yield "digest of `graftc.json`'s contents", code(record.digest)
    if record.versions is not None:
        versions = {name: text for name, text in record.versions.model_dump().items() if text and name != "code"}
        yield "written with", code(", ".join(f"{name} {text}" for name, text in versions.items()), 200)
        if record.versions.code is not None:
            yield "digest of graftc's code", code(record.versions.code)
