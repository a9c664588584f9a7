"""A pass in an installed third-party package: figures and step are shown like built-in ones, with graftc unchanged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from tests.cli.support import Outcome, run_here, run_warm
from tests.kit.places import EXAMPLES
from tests.kit.plugins import pip_install

PLUGIN = EXAMPLES / "plugin_pass"
SPEC = "version: 1\nadapt:\n  - {method: lora, rank: 2, target: {role: [attn.q, attn.v]}}\n"
LAYERS, WIDTH, INNER = 2, 32, 48


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The extra environment variables of a process with the plugin installed beside this graftc."""
    return {"PYTHONPATH": pip_install(PLUGIN, tmp_path_factory)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and a spec."""
    path = tmp_path_factory.mktemp("folder")
    torch.manual_seed(0)
    sizes = {"hidden_size": WIDTH, "intermediate_size": INNER, "num_hidden_layers": LAYERS, "vocab_size": 50}
    BertForSequenceClassification(BertConfig(**sizes, num_attention_heads=4)).save_pretrained(path / "model")
    (path / "spec.yaml").write_text(SPEC, encoding="utf-8")
    return path


def run(folder: Path, environment: dict[str, str], *arguments: str) -> Outcome:
    outcome = run_warm(*arguments, cwd=folder, **environment)
    assert outcome.status == 0, outcome.err
    return outcome


def expected() -> dict[str, int]:
    """Return the multiply-adds by site for the sites whose weight matrix each row is multiplied by."""
    counts = {"bert.pooler.dense.weight": WIDTH * WIDTH, "classifier.weight": 2 * WIDTH}
    for layer in range(LAYERS):
        own = f"bert.encoder.layer.{layer}"
        for name in ("self.query", "self.key", "self.value", "output.dense"):
            counts[f"{own}.attention.{name}.weight"] = WIDTH * WIDTH
        counts |= {f"{own}.{name}.dense.weight": WIDTH * INNER for name in ("intermediate", "output")}
    return {**counts, "": sum(counts.values())}


def figures(passes: list[dict[str, Any]]) -> dict[str, float]:
    (own,) = passes
    assert (own["pipeline"], own["name"], own["distribution"], own["version"]) == (
        "adapt",
        "macs",
        "graftc-macs",
        "0.1.0",
    )
    assert not own["rewrites"] and {figure["name"] for figure in own["figures"]} == {"multiply_adds"}
    return {figure["site"]: figure["value"] for figure in own["figures"]}


def test_it_is_short() -> None:
    text = (PLUGIN / "graftc_macs.py").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 30
    imported = [line for line in text.splitlines() if "graftc" in line and "import" in line]
    assert [line.partition(" import ")[0] for line in imported] == ["from graftc.extend"]


@pytest.mark.full
def test_every_command_shows_what_it_found(
    environment: dict[str, str], folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    checked = run(folder, environment, "check", "spec.yaml", "--model", "model", "--json").data
    assert figures(checked["passes"]) == expected()
    compiled = run(folder, environment, "compile", "spec.yaml", "--model", "model", "--out", "artifact")
    line = next(line for line in compiled.out.splitlines() if "attention.self.query" in line)
    assert line.split() == ["macs", "multiply_adds", "bert.encoder.layer.*.attention.self.query.weight", "0-1", "1,024"]
    kept = json.loads((folder / "artifact" / "manifest.json").read_text(encoding="utf-8"))
    assert figures(kept["passes"]) == expected()

    # The artifact shows the same when the plugin is not installed.
    monkeypatch.chdir(folder)
    data = run_here(capsys, "inspect", "artifact", "--history", "--json").data
    assert figures(data["summary"]["passes"]) == expected()
    steps = [row["step"] for row in data["history"]]
    assert steps[steps.index("resolve") + 1] == "macs"
    assert line in run_here(capsys, "inspect", "artifact").out.splitlines()
    assert run_here(capsys, "verify", "artifact").status == 0
    assert not run_here(capsys, "check", "spec.yaml", "--model", "model", "--json").data["passes"]
