"""Steps give the same bytes in one process and in several, regardless of Python's hash seeds."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import onnx
import pytest
import torch
from onnx import numpy_helper
from safetensors.torch import load_file

import graftc
from graftc.records.certificate import Certificate
from graftc.runtime.sources.models import load_model
from graftc.testing import FAMILIES, perturb
from tests.kit import warm
from tests.kit.comparing import same_tensors
from tests.kit.folders import SPEC, saved_base, tree_bytes

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
    tensors = {t.name: numpy_helper.to_array(t).tobytes() for t in onnx.load(path).graph.initializer}
    assert tensors
    return tensors


def _pt2_tensors(path: Path) -> dict[str, torch.Tensor]:
    program = torch.export.load(path)
    return {**program.state_dict, **program.constants}


@pytest.mark.full
@pytest.mark.parametrize("family", ["bert", *(pytest.param(f, marks=pytest.mark.full) for f in ("gpt2", "llama"))])
def test_one_process_or_several(family: str, tmp_path: Path) -> None:
    """Loading, merging and exporting in a new process give tensors bitwise equal to those of one process."""
    model = load_model(str(saved_base(tmp_path / "base", family)))
    compiled = graftc.compile(SPEC, model)
    perturb(compiled)
    (here, there) = (tmp_path / name for name in ("here", "there"))
    compiled.save(there / "artifact")
    merged = compiled.merge()
    merged.save(here / "merged")
    merged.export(here / "model.onnx")
    merged.export(here / "model.pt2", format="pt2")
    warm.output(_LATER, str(there), OMP_NUM_THREADS=str(torch.get_num_threads()), GRAFTC_CACHE="off")
    assert same_tensors(load_file(here / "merged/model.safetensors"), load_file(there / "merged/model.safetensors"))
    assert _onnx_tensors(here / "model.onnx") == _onnx_tensors(there / "model.onnx")
    assert same_tensors(_pt2_tensors(here / "model.pt2"), _pt2_tensors(there / "model.pt2"))
    assert tree_bytes(here / "merged") == tree_bytes(there / "merged")
    nodes = [[(n.op_type, n.input, n.output) for n in onnx.load(p / "model.onnx").graph.node] for p in (here, there)]
    assert nodes[0] == nodes[1]


_COMPILE = """
import sys
from pathlib import Path
from tests.runtime.artifact.test_processes import compile_all
print(*compile_all(Path(sys.argv[1]), sys.argv[2], sys.argv[3:]))
"""


def compile_all(here: Path, name: str, families: Sequence[str]) -> list[bool]:
    """Compile the models of families in a folder, save each as ``name``, and return whether captures were cached."""
    cached = []
    for family in families:
        entry = {"target": {"role": "experts"}} if family == "mixtral" else {}
        spec = {"adapt": [SPEC["adapt"][0], {**SPEC["adapt"][1], **entry}]}
        compiled = graftc.compile(spec, load_model(str(here / family / "base")), seed=0)
        compiled.save(here / family / name)
        cached.append(compiled.report.cached)
    return cached


@pytest.mark.full
@pytest.mark.parametrize("families", [("bert", "mixtral"), pytest.param(tuple(FAMILIES), marks=pytest.mark.full)])
def test_artifacts_do_not_depend_on_hash_seeds(
    families: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Captured with one seed, with another, or read from the cache, artifacts are byte for byte the same."""
    for family in families:
        saved_base(tmp_path / family / "base", family)
    cache = str(tmp_path / "cache")
    shown = warm.output(_COMPILE, str(tmp_path), "one", *families, GRAFTC_CACHE=cache)  # with its hash seed
    assert shown.split() == ["False"] * len(families)
    compile_all(tmp_path, "two", families)  # with this process's seed
    monkeypatch.setenv("GRAFTC_CACHE", cache)
    assert compile_all(tmp_path, "three", families) == [True] * len(families)
    for family in families:
        first = tree_bytes(tmp_path / family / "one")
        assert len(first) >= 8 and json.loads(first["manifest.json"])["sites"]
        for name in ("two", "three"):
            assert tree_bytes(tmp_path / family / name) == first, (family, name)


def test_a_certificate_is_plain_data() -> None:
    """Data written to a file contain no sets, whose order would depend on hashes."""
    certificate = Certificate((), {"logits": 0.0}, 1.0, "a", "a")
    assert json.loads(json.dumps(certificate.to_json())) == certificate.to_json()
