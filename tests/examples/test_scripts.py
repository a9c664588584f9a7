"""The scripts of examples/ run, each in a process of its own; an exported model runs without torch."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
from packaging.requirements import Requirement

from tests.kit import warm
from tests.kit.places import EXAMPLES


def run(script: str, out: Path, folder: Path) -> str:
    """Run a script and return what it prints."""
    with tempfile.TemporaryDirectory() as texts:
        shown, told = Path(texts, "out"), Path(texts, "err")
        status = warm.run(str(EXAMPLES / script), str(out), cwd=folder, out=shown, err=told, environment={})
        assert status == 0, told.read_text(encoding="utf-8")
        return shown.read_text(encoding="utf-8")


@pytest.mark.full
def test_quickstart(tmp_path: Path) -> None:
    text = run("quickstart.py", tmp_path / "out", tmp_path)
    assert "adapter parameters" in text and "certified: " in text
    losses = [float(loss) for loss in re.findall(r"loss (\d\.\d+)", text)]
    assert losses[-1] < losses[0] / 2
    accuracy = re.search(r"accuracy of the folded model: (\d\.\d+)", text)
    assert accuracy is not None and float(accuracy[1]) > 0.9
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.full
def test_trainer(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    text = run("trainer.py", tmp_path / "out", tmp_path)
    losses = re.search(r"loss before (\d\.\d+), after (\d\.\d+)", text)
    assert losses is not None and float(losses[2]) < 0.8 * float(losses[1])
    assert (tmp_path / "out" / "folded" / "model.safetensors").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.full
def test_vision_language(tmp_path: Path) -> None:
    """The script runs with two layers of text and a few steps; only the whole run, of minutes, shows that it learns."""
    pytest.importorskip("accelerate")
    command = [sys.executable, str(EXAMPLES / "vision_language" / "train.py"), str(tmp_path / "out"), "--quick"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr
    certified = re.search(r"certified: folded and unfolded outputs differ by at most (\S+)", done.stdout)
    assert certified is not None and float(certified[1]) < 1e-3
    losses = [float(loss) for loss in re.findall(r"'loss': '?(\d+\.\d+)", done.stdout)]
    assert losses[3] < losses[0] and losses[-1] < losses[4]
    assert done.stdout.count("(it is '") == 4
    assert (tmp_path / "out" / "folded" / "model.safetensors").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.full
def test_an_exported_model_runs_where_there_is_only_onnxruntime(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    out = tmp_path / "out"
    run("export_onnx.py", out, tmp_path)
    assert sorted(path.name for path in out.iterdir()) == ["example.npz", "model.onnx"]

    bare = environment_of(tmp_path / "bare", "onnxruntime", "numpy")
    for name in ("torch", "transformers", "graftc", "onnx", "safetensors"):
        refused = run_bare(bare, f"import {name}")
        assert refused.returncode == 1 and f"No module named '{name}'" in refused.stderr, name
    script = f"import runpy, sys; sys.argv = ['run', {str(out)!r}]; "
    script += f"runpy.run_path({str(EXAMPLES / 'run_onnx.py')!r}, run_name='__main__'); "
    script += "assert not {'torch', 'transformers', 'graftc'} & set(sys.modules)"
    done = run_bare(bare, script)
    assert done.returncode == 0, done.stderr
    difference = re.search(r"largest difference from torch: (\S+)", done.stdout)
    assert difference is not None and float(difference[1]) <= 1e-4

    # The script notices wrong outputs.
    with np.load(out / "example.npz") as example:
        wrong = {name: example[name] + (0.01 if name == "logits" else 0) for name in example.files}
    np.savez(out / "example.npz", **wrong)
    assert "something else than torch" in run_bare(bare, script).stderr


def test_what_runs_the_export_imports_nothing_else() -> None:
    tree = ast.parse((EXAMPLES / "run_onnx.py").read_text(encoding="utf-8"))
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert names - set(sys.stdlib_module_names) == {"numpy", "onnxruntime"}


def run_bare(folder: Path, code: str) -> subprocess.CompletedProcess[str]:
    """Run code in an interpreter that sees only the standard library and ``folder``."""
    command = [sys.executable, "-I", "-S", "-c", f"import sys; sys.path.append({str(folder)!r}); {code}"]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, timeout=120)


def environment_of(folder: Path, *names: str) -> Path:
    """Create a folder of links to the files of installed distributions and of all their requirements only."""
    done: set[str] = set()
    pending = list(names)
    while pending:
        name = re.sub(r"[-_.]+", "-", pending.pop()).lower()
        if name in done:
            continue
        done.add(name)
        distribution = metadata.distribution(name)
        for file in distribution.files or ():
            source = Path(str(distribution.locate_file(file)))
            if ".." in file.parts or "__pycache__" in file.parts or not source.is_file():
                continue
            link = folder / file
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(source)
        for text in distribution.requires or ():
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                pending.append(requirement.name)
    assert done.isdisjoint({"torch", "transformers", "graftc"})
    return folder
