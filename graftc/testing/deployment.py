"""The slower part of a method's contract, for a few families only: exports and ``torch.compile``, seconds a test."""

from __future__ import annotations

import unittest
from pathlib import Path
from typing import Any, ClassVar

import torch

from graftc.compat.dynamo import failing_on_recompiles
from graftc.runtime.compiled import Compiled
from graftc.runtime.model.runner import ModelRoot
from graftc.specs.claims import FoldKind
from graftc.testing.compare import SHAPES, inputs_for, largest_difference, outputs_of
from graftc.testing.contract import Contract
from graftc.testing.families import tiny

BATCHES = (2, 3, 7)
"""Batch sizes between which a compiled graph must not be recompiled."""


class DeploymentContract(Contract):
    """The contract for exports, to be inherited in addition to `graftc.testing.MethodContract`.

    Set ``families`` to the one family that is best suited to exporting the method.

    Attributes:
        export_tolerance: maximum difference between the outputs of torch and ONNX Runtime.
        every_layer: whether to export and compile all layers of the contract's models instead of a one-layer model.
    """

    families: ClassVar[tuple[str, ...]] = ("bert",)
    export_tolerance: ClassVar[float] = 1e-4
    every_layer: ClassVar[bool] = False

    def test_onnx(self, family: str, tmp_path: Path) -> None:
        """Check that ONNX Runtime agrees with torch at three shapes that were not captured."""
        compiled = self._deployed(family)
        self._exported(compiled, compiled, tmp_path)

    def test_onnx_folded(self, family: str, tmp_path: Path) -> None:
        """Check that ONNX Runtime agrees with the folded model at the same shapes."""
        _, compiled = self.shared(family, perturbed=True)
        if self.claims.folds is FoldKind.NONE:
            raise unittest.SkipTest("the method claims not to fold")
        self._exported(compiled.merge(), compiled, tmp_path)

    def _exported(self, runner: ModelRoot, compiled: ModelRoot, folder: Path) -> None:
        path = runner.export(folder / "model.onnx")
        for sizes in SHAPES:
            check_onnx(path, compiled, sizes, self.export_tolerance)

    def test_compile(self, family: str) -> None:
        """Check that ``torch.compile(fullgraph=True)`` produces one graph that serves every batch of 2 or more."""
        check_compile(self._deployed(family), "aot_eager")

    def test_inductor(self, family: str) -> None:
        """Check the same for one layer with Inductor, which is much slower and seldom gives different results."""
        check_compile(self._one_layer(family))

    def _deployed(self, family: str) -> Compiled:
        return self.shared(family, perturbed=True)[1] if self.every_layer else self._one_layer(family)

    def _one_layer(self, family: str) -> Compiled:
        """Return a compiled model of one layer, unless the class brings its own models.

        Exporters spend time on each layer, although all layers are alike.
        """
        if type(self).model is not Contract.model:
            return self.shared(family, perturbed=True)[1]
        compiled = self.compiled(family, tiny(family, layers=1))
        self.perturb(family, compiled)
        return compiled.eval()


def check_onnx(path: Path, runner: ModelRoot, sizes: tuple[int, int], tolerance: float) -> float:
    """Run an exported file in ONNX Runtime, and return the largest difference from the outputs of ``runner``.

    Raises:
        AssertionError: if the difference exceeds ``tolerance``.
    """
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    inputs = inputs_for(runner, sizes, seed=sizes[0], front=False)
    results = session.run(None, {name: value.numpy() for name, value in inputs.items()})
    difference = largest_difference([torch.from_numpy(value) for value in results], outputs_of(runner, inputs))
    assert difference <= tolerance, f"ONNX Runtime and torch differ by {difference:.2e} at {sizes}"
    return difference


def check_compile(runner: ModelRoot, backend: str = "inductor") -> None:
    """Compile ``runner`` as one graph and call it with several batch sizes.

    Raises:
        AssertionError: if its outputs differ from those of eager execution by more than 1e-4.
        torch._dynamo.exc.RecompileError: if a batch size triggers recompilation.
    """
    torch.compiler.reset()
    compiled: Any = torch.compile(runner, fullgraph=True, dynamic=True, backend=backend)
    calls = [inputs_for(runner, (batch, 9), seed=batch) for batch in BATCHES]
    expected = [outputs_of(runner, inputs) for inputs in calls]
    try:
        results = [outputs_of(compiled, calls[0])]
        with failing_on_recompiles():
            results += [outputs_of(compiled, inputs) for inputs in calls[1:]]
    finally:
        torch.compiler.reset()
    for a, b in zip(results, expected, strict=True):
        assert largest_difference(a, b) <= 1e-4
