"""The anchor's mutation test: corrupts a graph on its way into a compilation and checks whether it is used."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graftc
from graftc.compiler.adapt import base
from graftc.compiler.capture import capture_cache
from graftc.compiler.capture.anchor import BOUNDS
from graftc.compiler.capture.capture import Capture
from graftc.compiler.capture.example_inputs import samples_on
from graftc.compiler.capture.request import CaptureRequest
from graftc.passes.core.build.base_activations import computed
from graftc.passes.core.ir.eval_mode import to_eval
from graftc.passes.core.ir.program import Program
from graftc.passes.core.ir.stored.serialise import program_to_json
from graftc.runtime.artifact.manifest import canonical_json
from graftc.specs.errors.diagnostics import GraftError
from graftc.testing.compare import flat
from graftc.testing.families import tiny
from tests.gates.mutants import mutants
from tests.runtime.artifact.support import edit_manifest

SPEC: dict[str, Any] = {"adapt": [{"method": "lora", "rank": 2, "target": {"role": "attn.{q,v}"}}]}
FAMILIES = ("bert", "gpt2", "llama", "roberta", "t5")
INPUTS = 20


def differs(original: Program, mutant: Program, tensors: Any, config: Any) -> bool:
    """Return whether a mutant fails to run or exceeds the bound in eval mode on any of 20 random inputs."""
    bound = BOUNDS[torch.float32]
    right, wrong = to_eval(original), to_eval(mutant)
    for seed in range(100, 100 + INPUTS):
        sizes = (2 + seed % 4, 5 + seed % 17, 4 + seed % 11)
        inputs = samples_on(torch.device("cpu"), original, seed, sizes, config)
        expected = _outputs(right, inputs, tensors)
        try:
            outputs = _outputs(wrong, inputs, tensors)
        except Exception:
            return True
        if any(_apart(a, b) > bound for a, b in zip(expected, outputs, strict=True)):
            return True
    return False


def _outputs(program: Program, inputs: Any, tensors: Any) -> list[Tensor]:
    wanted = [node for node in program.output_node.args[0] if isinstance(node, torch.fx.Node)]  # type: ignore[union-attr]
    return computed(wanted, lambda node: inputs[str(node.target)], tensors, torch.device("cpu"))


def _apart(a: Tensor, b: Tensor) -> float:
    if a.shape != b.shape or a.dtype != b.dtype:
        return float("inf")
    if torch.equal(a, b):
        return 0.0
    gap = float((a.double() - b.double()).abs().max() / a.double().abs().max().clamp_min(1e-30))
    return gap if gap == gap else float("inf")


def _right(compiled: Any, model: nn.Module) -> bool:
    """Return whether an untrained compiled model computes the same as its source."""
    compilation = compiled.compilation
    inputs = samples_on(
        torch.device("cpu"), compilation.program("train", "base"), 7, (5, 13, 11), getattr(model, "config", None)
    )
    with torch.no_grad():
        return all(_apart(a, b) == 0 for a, b in zip(flat(compiled(**inputs)), flat(model(**inputs)), strict=True))


def entering(kind: str, count: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, bool, bool]]:
    """Corrupt a graph in ``count`` ways and yield the change, whether outputs differ, and whether it was caught."""
    names = FAMILIES[: max(1, min(len(FAMILIES), count // 6))]
    for number, name in enumerate(names):
        monkeypatch.setenv("GRAFTC_CACHE", str(folder / f"cache-{name}"))
        model = tiny(name).eval().requires_grad_(False)
        compiled = graftc.compile(SPEC, model).eval()
        (capture,) = compiled.compilation.main.captures
        axes, store = compiled.compilation.main.axes, compiled.compilation.store
        artifact = folder / f"artifact-{name}"
        if kind == "artifact":
            compiled.save(artifact, certify=False)
        share = count // len(names) + (number < count % len(names))
        for text, mutant in mutants(capture.program, share, seed=number):
            wrong = differs(capture.program, mutant, store.get, getattr(model, "config", None))
            caught = _ENTRIES[kind](model, axes, capture, mutant, artifact, monkeypatch)
            yield f"{name} {text}", wrong, caught


def _captured(
    model: nn.Module, axes: Any, capture: Capture, mutant: Program, artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> bool:
    """Return whether a mutant that the tracer returns is caught."""
    fresh = replace(capture, traced=mutant, flat=None, cached=False, anchor=None)
    with monkeypatch.context() as patch:
        patch.setattr(base, "captured", lambda *args, **options: fresh)
        try:
            graftc.compile(SPEC, model, cache=False)
        except GraftError as error:
            return error.code in ("GC040", "GC041")
    return False


def _cached(
    model: nn.Module, axes: Any, capture: Capture, mutant: Program, artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> bool:
    """Return whether a mutant in the cache, where everything except the graph is valid, is caught."""
    capture_cache.keep(CaptureRequest.of(model, axes), replace(capture, traced=mutant, flat=None))
    compiled = graftc.compile(SPEC, model).eval()
    return not compiled.compilation.main.cached and _right(compiled, model)


def _kept(
    model: nn.Module, axes: Any, capture: Capture, mutant: Program, artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> bool:
    """Return whether a mutant in an artifact that is sealed again is caught."""
    file = artifact / "programs" / "0.base.train.json"
    before = file.read_bytes(), (artifact / "manifest.json").read_bytes()
    file.write_text(canonical_json(program_to_json(mutant)), encoding="utf-8", newline="\n")
    entry = {"bytes": file.stat().st_size, "sha256": graftc.runtime.artifact.write.file_digest(file)}
    edit_manifest(artifact, files=lambda files: {**files, "programs/0.base.train.json": entry})
    try:
        return _right(graftc.load(artifact, model).eval(), model)
    except GraftError:
        return True
    finally:
        file.write_bytes(before[0])
        (artifact / "manifest.json").write_bytes(before[1])


_ENTRIES = {"captured": _captured, "cached": _cached, "artifact": _kept}
