"""iPET on 20 Newsgroups from one file and one command.

Killed ten times, it ends with the same tensors, and its classifier runs in ONNX Runtime.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch

import graftc
from benchmarks.masked_minilm import Settings, find_masked_minilm
from benchmarks.pet_data import few, write_few
from graftc.applications.pet.plain import PlainEncoder
from graftc.cli import main

pytestmark = pytest.mark.gate

KILLS = 10
STEPS = {"steps": 6, "learning_rate": 1e-4, "max_length": 32}
SPEC: dict[str, Any] = {
    "patterns": ["{text} This text is about {blank}.", "Topic: {blank}. {text}", "A discussion of {blank}: {text}"],
    "seeds": 1,
    "training": STEPS,
    "ipet": {"generations": 2},
    "classifier": {"training": {**STEPS, "steps": 12}},
}


def test_killed_ten_times_it_ends_with_the_same_tensors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = find_masked_minilm(Settings(steps=40, rows=8, tokens=32, held_out=32, autocast=False))
    task = few("newsgroups", per_class=10, unlabelled=60, test=60)
    (tmp_path / "data").mkdir()
    write_few(task, tmp_path / "data")
    verbalizer = {name: name for name in task.names}
    (tmp_path / "pet.json").write_text(json.dumps({**SPEC, "verbalizer": verbalizer}), encoding="utf-8")

    def begin(out: str) -> subprocess.Popen[bytes]:
        given = ["pet.json", "--model", str(model), "--data", "data", "--out", out, "--seed", "3"]
        command = [sys.executable, "-m", "graftc", "pet", *given]
        return subprocess.Popen(
            command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env={**os.environ}
        )

    assert begin("whole").wait() == 0
    draw, kills = random.Random(0), 0
    while kills < KILLS:
        running = begin("killed")
        stages = _stages(tmp_path / "killed")
        while running.poll() is None and _stages(tmp_path / "killed") == stages:
            time.sleep(0.05)
        time.sleep(draw.uniform(0, 2))
        if running.poll() is not None:
            break
        running.kill()
        running.wait()
        kills += 1
    last = begin("killed")
    assert last.wait() == 0, last.stderr.read() if last.stderr is not None else ""
    assert kills == KILLS, f"it had ended after {kills} kills"
    assert _digests(tmp_path / "killed") == _digests(tmp_path / "whole")

    results = json.loads((tmp_path / "whole" / "results.json").read_text("utf-8"))
    assert main(["export", str(tmp_path / "whole/classifier"), "-f", "onnx", "-o", str(tmp_path / "c.onnx")]) == 0
    capsys.readouterr()
    assert _accuracy(tmp_path / "c.onnx", model, task.test) == pytest.approx(results["classifier"]["test"])
    loaded = graftc.load(tmp_path / "whole/classifier").eval()
    inputs = _inputs(model, task.test.texts[:8])
    (logits,) = onnxruntime.InferenceSession(str(tmp_path / "c.onnx")).run(None, _fed(inputs))
    torch.testing.assert_close(torch.from_numpy(logits), loaded(**inputs).logits.detach(), atol=2e-5, rtol=1e-5)


def _stages(folder: Path) -> set[str]:
    """Return the names of finished files and artifacts; names with a leading dot are still being written."""
    names = re.compile(r".*\.safetensors|sets\.jsonl|classifier|stage-\d+|result|training-\d+")
    stages = set()
    for path, folders, files in os.walk(folder):  # os.walk skips folders removed in the meantime
        folders[:] = [name for name in folders if not name.startswith(".")]
        stages |= {os.path.join(path, name) for name in (*folders, *files) if names.fullmatch(name)}
    return stages


def _digests(folder: Path) -> dict[str, str]:
    """Return the digest of every tensor file and of a run's other results, by file."""
    kept = [*folder.rglob("*.safetensors"), *folder.rglob("sets.jsonl"), folder / "results.json"]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in kept}


def _inputs(model: Path, texts: Any) -> dict[str, torch.Tensor]:
    from transformers import AutoTokenizer

    encoder = PlainEncoder(["text"], AutoTokenizer.from_pretrained(model), STEPS["max_length"])  # type: ignore[arg-type]
    return encoder.encode([{"text": text} for text in texts])


def _fed(inputs: dict[str, torch.Tensor]) -> dict[str, Any]:
    return {name: tensor.numpy() for name, tensor in inputs.items()}


def _accuracy(path: Path, model: Path, test: Any) -> float:
    session = onnxruntime.InferenceSession(str(path))
    wanted = {each.name for each in session.get_inputs()}
    inputs = _inputs(model, test.texts)
    (logits,) = session.run(None, {name: each for name, each in _fed(inputs).items() if name in wanted})
    return float((torch.from_numpy(logits).argmax(1) == torch.tensor(test.labels)).float().mean())
