"""Records cannot be changed, are equal to what is read from their JSON, and their results are JSON."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest

from graftc.records.certificate import Certificate, SiteEvidence
from graftc.records.reading import from_json
from graftc.records.retention import Retention
from graftc.runtime.streaming.merging import StreamedMerge

SITE = SiteEvidence("a", ("lora",), 1.0, 0.0, 0.0, Retention(4.0, 2.0, 1.0, 4, 3))
WRITTEN = Certificate((SITE,), {"logits": 0.25}, 1.0, "same", "same", retention=SITE.retention)
READ = from_json(Certificate, json.dumps(WRITTEN.to_json()))
CHANGES: dict[str, Any] = {
    "set": lambda outputs: outputs.__setitem__("logits", 0.0),
    "delete": lambda outputs: outputs.__delitem__("logits"),
    "update": lambda outputs: outputs.update(logits=0.0),
    "default": lambda outputs: outputs.setdefault("other", 0.0),
    "pop": lambda outputs: outputs.pop("logits"),
    "last": lambda outputs: outputs.popitem(),
    "clear": lambda outputs: outputs.clear(),
    "join": lambda outputs: outputs.__ior__({"logits": 0.0}),
}


@pytest.mark.parametrize("record", [WRITTEN, READ], ids=["made", "read"])
@pytest.mark.parametrize("change", CHANGES)
def test_mappings_cannot_be_changed(record: Certificate, change: str) -> None:
    with pytest.raises(TypeError, match="read-only"):
        CHANGES[change](record.outputs)
    assert record.outputs == {"logits": 0.25}


def test_a_mapping_does_not_follow_the_one_that_it_was_made_from() -> None:
    outputs = {"logits": 0.25}
    certificate = Certificate((SITE,), outputs, 1.0, "same", "same")
    outputs["logits"] = 0.0
    assert certificate.outputs == {"logits": 0.25}


def test_records_equal_what_is_read_from_their_json() -> None:
    assert READ == WRITTEN and hash(READ.retention) == hash(WRITTEN.retention)
    assert SITE.retention != Retention(4.0, 2.0, 1.0, 4, 2)
    assert copy.deepcopy(WRITTEN) == WRITTEN == pickle.loads(pickle.dumps(WRITTEN))


def test_a_merge_of_files_is_json() -> None:
    merge = StreamedMerge(Path("out"), WRITTEN, ("lora",), 3, 0, "float32")
    assert from_json(StreamedMerge, json.dumps(merge.to_json())) == merge
    assert StreamedMerge(None, WRITTEN, (), 0, 0, "").to_json()["path"] is None
