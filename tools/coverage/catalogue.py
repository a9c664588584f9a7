"""The catalogue of classes to examine: those in the auto tables of transformers, and models of other libraries."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tools.coverage.libraries import other_rows

TABLES = {
    "causal LM": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "masked LM": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "seq2seq LM": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "sequence classification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "image classification": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
    "CTC": "MODEL_FOR_CTC_MAPPING_NAMES",
    "speech seq2seq": "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
    "audio classification": "MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES",
    "text to speech": "MODEL_FOR_TEXT_TO_WAVEFORM_MAPPING_NAMES",
    "image-text to text": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "multimodal LM": "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES",
    "object detection": "MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES",
    "zero-shot object detection": "MODEL_FOR_ZERO_SHOT_OBJECT_DETECTION_MAPPING_NAMES",
    "semantic segmentation": "MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES",
    "universal segmentation": "MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING_NAMES",
    "depth estimation": "MODEL_FOR_DEPTH_ESTIMATION_MAPPING_NAMES",
    "video classification": "MODEL_FOR_VIDEO_CLASSIFICATION_MAPPING_NAMES",
    "time series prediction": "MODEL_FOR_TIME_SERIES_PREDICTION_MAPPING_NAMES",
    "time series classification": "MODEL_FOR_TIME_SERIES_CLASSIFICATION_MAPPING_NAMES",
    "time series regression": "MODEL_FOR_TIME_SERIES_REGRESSION_MAPPING_NAMES",
    "diffusers": "",
    "timm": "",
    "torchvision": "",
}
"""The auto tables by their names on the page, in the page's order; other libraries have no auto table."""


@dataclass(frozen=True)
class Entry:
    """One class to examine.

    Attributes:
        name: the name of the class, or of the model in libraries that name their models.
        model_type: the key whose default config is shrunken, the first one if a class has several; empty for libraries
            other than transformers.
        tables: the names of the tables that list it, in the order of `TABLES`.
        library: the library that it comes from.
    """

    name: str
    model_type: str
    tables: tuple[str, ...]
    library: str = "transformers"

    def facts(self) -> dict[str, Any]:
        """Return the initial fields of its record."""
        return {"class": self.name, "model_type": self.model_type, "tables": list(self.tables), "built": False}


def rows() -> Iterator[tuple[str, str, str]]:
    """Yield every (table, model type, class) of the installed transformers; a key may have several classes."""
    auto: Any = importlib.import_module("transformers.models.auto.modeling_auto")
    for table, attribute in TABLES.items():
        if not attribute:
            continue
        for model_type, classes in getattr(auto, attribute).items():
            for name in [classes] if isinstance(classes, str) else classes:
                yield table, model_type, name


def entries() -> list[Entry]:
    """Return the classes of transformers and the models of other libraries, each once, sorted by name."""
    types: dict[str, list[str]] = {}
    tables: dict[str, list[str]] = {}
    for table, model_type, name in rows():
        types.setdefault(name, []).append(model_type)
        tables.setdefault(name, []).append(table)
    classes = [Entry(n, types[n][0], tuple(dict.fromkeys(tables[n]))) for n in types]
    others = [Entry(name, "", (table,), library) for table, library, name in other_rows()]
    return sorted([*classes, *others], key=lambda entry: entry.name)
