from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from graftc.applications.demo import demo, stages
from graftc.applications.demo.data import find_model
from graftc.records.applications.demo import DemoResult, DemoScores, ExampleCounts, PredictionAgreement, Scores
from graftc.records.certificate import Certificate
from graftc.records.reading import from_json
from graftc.records.report import Report
from graftc.specs.errors.diagnostics import GraftError
from graftc.specs.io import parse_spec
from tests.cli.samples import CERTIFICATE, REPORT

SCORES = DemoScores(Scores(0.1, 0.1), Scores(0.9, 0.8), Scores(0.9, 0.7))
GOOD = DemoResult(
    quick=False,
    examples=ExampleCounts(10, 5),
    scores=SCORES,
    report=from_json(Report, json.dumps(REPORT)),
    certificate=from_json(Certificate, json.dumps(CERTIFICATE)),
    transformers=PredictionAgreement(1.0, 1e-6, 1e-4),
    onnx=PredictionAgreement(1.0, 1e-6, 1e-4),
    seconds={},
    files={},
)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"scores": replace(SCORES, baseline=Scores(0.5, 0.8))}, "baseline"),
        ({"scores": replace(SCORES, before=Scores(0.9, 0.1))}, "accuracy"),
        ({"certificate": replace(GOOD.certificate, structure="other")}, "certificate"),
        ({"certificate": replace(GOOD.certificate, sites=(), collapses=())}, "certificate"),
        ({"transformers": PredictionAgreement(1.0, 2e-4, 1e-4)}, "transformers"),
        ({"onnx": PredictionAgreement(1.0, float("nan"), 1e-4)}, "ONNX"),
    ],
)
def test_each_broken_promise_is_a_failure(change: dict[str, Any], word: str) -> None:
    assert GOOD.passed and GOOD.failures == () and replace(GOOD, scores=replace(SCORES, baseline=None)).passed
    result = replace(GOOD, **change)
    assert not result.passed
    assert len(result.failures) == 1 and word in result.failures[0]
    assert result.to_json()["failures"] == list(result.failures)


def test_the_spec_is_valid() -> None:
    assert [(a.name, a.method) for a in parse_spec(demo.SPEC).adapt] == [("reuters", "lora")]


@pytest.mark.parametrize(
    ("quick", "absent", "named"), [(True, "onnxruntime", "onnxruntime"), (False, "sklearn", "scikit-learn")]
)
def test_a_missing_package_is_said_at_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, quick: bool, absent: str, named: str
) -> None:
    find_spec = stages.find_spec
    monkeypatch.setattr(stages, "find_spec", lambda name: None if name == absent else find_spec(name))
    with pytest.raises(GraftError) as caught:
        demo.run_demo(tmp_path / "out", quick=quick, console=Console(file=io.StringIO()))
    assert str(caught.value) == f"GC061: the demo needs {named}\n  hint: pip install 'graftc[demo]'"
    assert not (tmp_path / "out").exists()


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.txt").write_text("mine")
    for out in (tmp_path, tmp_path / "model" / "mine.txt"):
        with pytest.raises(GraftError) as caught:
            demo.run_demo(out, quick=True, console=Console(file=io.StringIO()))
        assert caught.value.code == "GC063"
    assert (tmp_path / "model" / "mine.txt").read_text() == "mine"
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def first_layers(folder: Path) -> Path:
    """Save the pretrained encoder up to its second layer, and its tokenizer."""
    from transformers import AutoModel, AutoTokenizer

    whole = find_model()
    AutoModel.from_pretrained(whole, num_hidden_layers=2).save_pretrained(folder)
    AutoTokenizer.from_pretrained(whole).save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_the_quick_demo_from_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo runs with fewer layers, texts and steps than ``make demo QUICK=1``, which runs it unchanged."""
    onnx = pytest.importorskip("onnx")
    encoder = first_layers(tmp_path / "encoder")
    monkeypatch.setattr(demo, "find_model", lambda: encoder)
    monkeypatch.setattr(demo, "SPEC", demo.SPEC.replace("expect: 36", "expect: 12"))
    monkeypatch.setattr(demo, "_QUICK", replace(demo._QUICK, steps=48, batch=8, lr=4e-3, train=384, test=100))
    text = io.StringIO()
    state = torch.random.get_rng_state()
    result = demo.run_demo(tmp_path / "out", quick=True, console=Console(file=text, width=100))
    assert result.passed, result.failures
    assert torch.equal(torch.random.get_rng_state(), state), "the caller's random numbers are its own"
    assert result.scores.baseline is None and result.examples == ExampleCounts(384, 100)
    assert result.scores.after.accuracy > 0.65 > 0.5 > result.scores.before.accuracy
    assert result.transformers.same_predictions == result.onnx.same_predictions == 1.0
    assert result.report.trainable_parameters == 2 * 8 * (4 * (384 + 384) + 2 * (384 + 1536))

    out = tmp_path / "out"
    assert json.loads((out / "demo.json").read_text()) == result.to_json()
    assert parse_spec((out / "spec.yaml").read_text()) == parse_spec(demo.SPEC)
    assert "2 layers alike" in (out / "diff.txt").read_text()
    metadata = {p.key: p.value for p in onnx.load(out / "model.onnx", load_external_data=False).metadata_props}
    assert json.loads(metadata["graftc.certificate"])["passed"] is True
    for word in ("LoRA, before training", "LoRA, after training", "certified", "ONNX Runtime", "reuters"):
        assert word in text.getvalue()

    from safetensors.torch import load_file
    from transformers import AutoModelForSequenceClassification

    base, saved = load_file(encoder / "model.safetensors"), load_file(out / "model" / "model.safetensors")
    plain = AutoModelForSequenceClassification.from_pretrained(out / "model")
    assert plain.config.id2label[3] == "grain"
    key = "encoder.layer.0.attention.self.query"
    assert not torch.equal(saved[f"bert.{key}.weight"], base[f"{key}.weight"]), "folded"
    assert torch.equal(saved[f"bert.{key}.bias"], base[f"{key}.bias"]), "not adapted"
    assert set(saved) == set(plain.state_dict()), "no tensor of an adapter is left"

    (out / "stray.txt").write_text("stays")
    stages.claim(out, demo._FILES)
    assert sorted(p.name for p in out.iterdir()) == ["demo.json", "stray.txt"], "a rerun starts afresh"
