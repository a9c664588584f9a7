"""What there is to examine: the classes in the auto tables of the installed transformers."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

TABLES = {
    "causal LM": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "masked LM": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "seq2seq LM": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "sequence classification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "image classification": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
    "CTC": "MODEL_FOR_CTC_MAPPING_NAMES",
    "speech seq2seq": "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
    "audio classification": "MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES",
}
"""Tables by the name that the page gives them, in the page's order."""


@dataclass(frozen=True)
class Entry:
    """One class to examine.

    Attributes:
        name: of the class.
        model_type: the key whose default config is shrunken; the first one, where a class has several.
        tables: names of the tables that list it, in the order of `TABLES`.
    """

    name: str
    model_type: str
    tables: tuple[str, ...]


def rows() -> Iterator[tuple[str, str, str]]:
    """Every (table, model type, class) of the installed transformers; a key may have several classes."""
    auto: Any = importlib.import_module("transformers.models.auto.modeling_auto")
    for table, attribute in TABLES.items():
        for model_type, classes in getattr(auto, attribute).items():
            for name in [classes] if isinstance(classes, str) else classes:
                yield table, model_type, name


def entries() -> list[Entry]:
    """The classes, each once, sorted by name."""
    types: dict[str, list[str]] = {}
    tables: dict[str, list[str]] = {}
    for table, model_type, name in rows():
        types.setdefault(name, []).append(model_type)
        tables.setdefault(name, []).append(table)
    return [Entry(n, types[n][0], tuple(dict.fromkeys(tables[n]))) for n in sorted(types)]
