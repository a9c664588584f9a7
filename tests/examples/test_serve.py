"""The server of examples/ answers requests at once whose rows name different adapters.

FastAPI is not among graftc's requirements. Where it is not installed, a stand-in calls the endpoints.
"""

from __future__ import annotations

import importlib.util
import inspect
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import graftc
from graftc.testing import tiny
from tests.kit.coroutines import result_of
from tests.kit.places import EXAMPLES
from tests.kit.serving import adapter_folders

pytest.importorskip("peft")


class _HTTPError(Exception):
    """FastAPI's exception: a status, and a text for the client."""

    def __init__(self, status_code: int, detail: str) -> None:
        self.status_code, self.detail = status_code, detail


class _App:
    """The part of FastAPI that the example uses: endpoints by path, and requests to them."""

    def __init__(self) -> None:
        self.get = self.post = lambda path: lambda endpoint: self.endpoints.setdefault(path, endpoint)
        self.endpoints: dict[str, Any] = {}

    def request(self, path: str, *given: Any) -> tuple[int, Any]:
        """Return the status and the contents of an answer."""
        try:
            answer = self.endpoints[path](*given)
            return 200, result_of(answer) if inspect.iscoroutine(answer) else answer
        except _HTTPError as error:
            return error.status_code, {"detail": error.detail}


def served(model: Any, adapters: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function from a path and a body, if any, to the status and the contents of the answer."""
    installed = importlib.util.find_spec("fastapi") is not None
    if not installed:
        stand_in: Any = ModuleType("fastapi")
        stand_in.FastAPI, stand_in.HTTPException = _App, _HTTPError
        monkeypatch.setitem(sys.modules, "fastapi", stand_in)
    spec = importlib.util.spec_from_file_location("serve_fastapi", EXAMPLES / "serve_fastapi.py")
    assert spec is not None and spec.loader is not None
    example: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    app = example.application(model, adapters, slots=2, rank=4)
    if not installed:
        return app.request
    from fastapi.testclient import TestClient

    client = TestClient(app)

    def request(path: str, *given: Any) -> tuple[int, Any]:
        answer = client.post(path, json=given[0]) if given else client.get(path)
        return answer.status_code, answer.json()

    return request


@pytest.mark.full
def test_requests_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama").eval()
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = 0, None
    folders = adapter_folders(model, tmp_path, ["ann", "bob", "cho", "dan"])
    request = served(model, tmp_path, monkeypatch)
    ids = torch.tensor([[7, 3, 44]])
    alone = {name: graftc.import_peft(folder, model) for name, folder in folders.items()}
    expected = {name: each.generate(ids, max_new_tokens=4).tolist()[0] for name, each in alone.items()}
    assert len({*map(tuple, expected.values())}) > 1
    pairs = [("ann", "bob"), ("cho", "cho"), ("dan", "ann"), ("bob", "cho")] * 2
    bodies = [{"tokens": ids.tolist() * 2, "adapters": pair, "most": 4} for pair in pairs]
    with ThreadPoolExecutor(4) as threads:
        answers = [*threads.map(lambda body: request("/generate", body), bodies)]
    for pair, (status, answer) in zip(pairs, answers, strict=True):
        assert status == 200, answer
        assert answer["tokens"] == [expected[name] for name in pair]
    status, counters = request("/counters")
    assert status == 200 and counters["loads"] >= 4 and counters["evictions"] >= 2
    assert counters["names"][0] == "first" and len(counters["names"]) == 3
    status, answer = request("/generate", {"tokens": ids.tolist(), "adapters": ["nobody"]})
    assert status == 400 and answer["detail"].startswith("GC091: there is no adapter")
    status, answer = request("/generate", {"tokens": ids.tolist() * 3, "adapters": ["ann", "bob", "cho"]})
    assert status == 503 and answer["detail"].startswith("GC190")
