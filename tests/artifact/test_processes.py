"""The same steps in one process and in several give the same bytes, whatever Python's hashes are."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import numpy_helper
from safetensors.torch import load_file

import graftc
from graftc.compiler.certify import Certificate
from graftc.runtime.models import load_model
from graftc.specs.io import dump_spec
from graftc.testing import FAMILIES, perturb
from tests.artifact.support import SPEC, saved_base, tree_bytes
from tests.cli.support import ROOT, run_apart

_LATER = """
import sys
from pathlib import Path
import graftc
here = Path(sys.argv[1])
compiled = graftc.load(here / "artifact")
merged = compiled.merge()
merged.save(here / "merged")
merged.export(here / "model.onnx")
merged.export(here / "model.pt2", format="pt2")
"""
"""The second process: it knows the folder and nothing else."""


def _onnx_tensors(path: Path) -> dict[str, bytes]:
    found = {t.name: numpy_helper.to_array(t).tobytes() for t in onnx.load(path).graph.initializer}
    assert found
    return found


def _pt2_tensors(path: Path) -> dict[str, torch.Tensor]:
    program = torch.export.load(path)
    return {**program.state_dict, **program.constants}


def _same(one: Mapping[str, torch.Tensor], two: Mapping[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_one_process_or_several(family: str, tmp_path: Path) -> None:
    """Compile, save; in a new process load, merge and export: tensors equal to those of one process to the bit."""
    model = load_model(str(saved_base(tmp_path / "base", family)))
    compiled = graftc.compile(SPEC, model)
    perturb(compiled)
    (here, there) = (tmp_path / name for name in ("here", "there"))
    compiled.save(there / "artifact")
    merged = compiled.merge()
    merged.save(here / "merged")
    merged.export(here / "model.onnx")
    merged.export(here / "model.pt2", format="pt2")
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(torch.get_num_threads()), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        [sys.executable, "-c", _LATER, str(there)],
        capture_output=True,
        text=True,
        env={**environment, "HF_HUB_OFFLINE": "1", "GRAFTC_CACHE": "off"},
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert _same(load_file(here / "merged/model.safetensors"), load_file(there / "merged/model.safetensors"))
    assert _onnx_tensors(here / "model.onnx") == _onnx_tensors(there / "model.onnx")
    assert _same(_pt2_tensors(here / "model.pt2"), _pt2_tensors(there / "model.pt2"))
    assert tree_bytes(here / "merged") == tree_bytes(there / "merged")
    nodes = [[(n.op_type, n.input, n.output) for n in onnx.load(p / "model.onnx").graph.node] for p in (here, there)]
    assert nodes[0] == nodes[1]


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_artifacts_do_not_depend_on_hash_seeds(family: str, tmp_path: Path) -> None:
    """Captured with one seed, captured with another, and taken from the cache: byte for byte the same."""
    spec: dict[str, Any] = dict(SPEC)
    if family == "mixtral":
        spec = {"adapt": [SPEC["adapt"][0], {**SPEC["adapt"][1], "target": {"role": "experts"}}]}
    (tmp_path / "spec.yaml").write_text(dump_spec(graftc.Spec.model_validate(spec)))
    saved_base(tmp_path / "base", family)
    runs = {
        "one": {"PYTHONHASHSEED": "1", "GRAFTC_CACHE": "off"},
        "two": {"PYTHONHASHSEED": "2", "GRAFTC_CACHE": str(tmp_path / "cache")},
        "three": {"PYTHONHASHSEED": "3", "GRAFTC_CACHE": str(tmp_path / "cache")},
    }
    cached = []
    for name, environment in runs.items():
        command = ["compile", "spec.yaml", "--model", "base", "--out", name, "--json"]
        outcome = run_apart(*command, cwd=tmp_path, **environment)
        assert outcome.status == 0, outcome.err
        cached.append(outcome.data["cached"])
    assert cached == [False, False, True]
    first = tree_bytes(tmp_path / "one")
    assert len(first) >= 8 and json.loads(first["manifest.json"])["sites"]
    assert tree_bytes(tmp_path / "two") == first and tree_bytes(tmp_path / "three") == first


def test_a_certificate_is_plain_data() -> None:
    """What goes into a file has no sets, whose order would depend on hashes."""
    certificate = Certificate((), {"logits": 0.0}, 1.0, "a", "a")
    assert json.loads(json.dumps(certificate.to_json())) == certificate.to_json()
