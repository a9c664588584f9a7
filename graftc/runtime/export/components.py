"""Export a model's components as separate ONNX files, with a manifest for servers that call them in turn."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from graftc.compiler.capture.interface import config_of
from graftc.compiler.capture.refusals import told
from graftc.compiler.capture.signature import Axis
from graftc.compiler.live.components import Component, components_of
from graftc.compiler.live.elements import as_inputs
from graftc.compiler.pipeline import StartingPoint, compile_model
from graftc.files.writing import staged
from graftc.passes.core.elements.calls import input_name
from graftc.passes.core.ir.shapes import DTYPE_NAMES
from graftc.runtime.export.graph_options import OPSET
from graftc.runtime.export.metadata import FoldEvidence, metadata
from graftc.runtime.export.module import ExportModule
from graftc.runtime.export.onnx import prepare_onnx, save_onnx
from graftc.runtime.export.onnx_check import check_onnx, compare
from graftc.runtime.model.adapted import AdaptedRunner
from graftc.runtime.model.model_runner import ModelRunner
from graftc.runtime.sources.companions import companions_of_model
from graftc.specs.errors.diagnostics import GraftError
from graftc.specs.io import load_spec

MANIFEST = "components.json"
VERSION = 1


class ComponentModule(ExportModule):
    """An `ExportModule` for a component's graph, with the component's own names."""

    def __init__(self, runner: ModelRunner, component: Component) -> None:
        self._inputs = {input_name(component.path, i): name for i, name in enumerate(component.tensors)}
        self._prefix = f"{component.path}."
        self._shown = {input_name(component.path, i): t for i, t in enumerate(component.tensors.values())}
        super().__init__(runner, runner.compilation.main.signature, apart=True)

    def sample(
        self, seed: int = 0, sizes: tuple[int, int] = (2, 9), fixed_sizes: Mapping[str, int] | None = None
    ) -> dict[str, Any]:
        """Return the tensors of the component's call, lengthened by repeating their last entries ``seed`` times.

        They are not random, since masks and positions cannot have arbitrary values. Only dynamic axes are lengthened,
        and sizes that are equal stay equal, for example the numbers of rows of a mask and of the tensor that it masks.
        """
        return {axis.name: _lengthened(self._shown[axis.name], axis, seed) for axis in self.axes}

    def counting(self, inputs: Mapping[str, Tensor]) -> Tensor | None:
        """Return the positions that the attention mask selects; None without a two-dimensional integer or bool mask.

        Kernels give different results for tokens that attend to nothing, such as padding.
        """
        mask = inputs.get("attention_mask")
        return None if mask is None or mask.dim() != 2 or mask.is_floating_point() else mask.bool()

    def input_name(self, name: str) -> str:
        """Return the component's own name for an input."""
        return self._inputs[name]

    def output_name(self, name: str) -> str:
        """Return an output's name without the component's path."""
        return name.removeprefix(self._prefix) if name.startswith(self._prefix) else "output"

    def axis_name(self, name: str) -> str:
        """Return an axis's name, which consists of the component's own name for the input and the axis's index."""
        owner, _, at = name.rpartition("__")
        return f"{self._inputs[owner]}_{at}" if owner in self._inputs else name


def export_components(
    runner: ModelRunner,
    model: nn.Module,
    path: Path,
    inputs: Mapping[str, Any],
    evidence: FoldEvidence,
    *,
    force: bool = False,
) -> Path:
    """Write every component of a model that can become a graph as an ONNX file, and write ``components.json``.

    Args:
        runner: the Runner of the merged model.
        model: a model of the source's class, with the folded weights.
        path: the folder, which appears only after all files are complete and checked in ONNX Runtime.
        inputs: inputs, by name, of a call that runs the components. Their values are not written.
        evidence: the evidence for the fold, to include in the files.
        force: if true, replace a folder that this function created.

    Raises:
        GraftError: GC060 for a model without components, or if none can be exported; GC061 if a package is missing;
            GC063 if ``path`` exists, GC064 if it cannot be written.
    """
    try:
        components, left_out = components_of(model, _with_rows(inputs))
    except GraftError:
        components, left_out = components_of(model, inputs)
    files = _file_names([component.path for component in components])
    entries = []
    with staged(path, force=force, replaceable=is_exported) as folder:
        folder.mkdir()
        for component in components:
            try:
                entries.append(_write(runner, model, component, folder / files[component.path], evidence))
            except GraftError as error:
                left_out[component.path] = told(error.__cause__ or error) if error.code == "GC030" else error.message
                for file in folder.glob(f"{files[component.path]}*"):
                    file.unlink()
        if not entries:
            reasons = [f"{where}: {why}" for where, why in left_out.items()]
            message = f"no component of {type(model).__name__} can be exported"
            raise GraftError("GC060", message, hint="see the details", details=reasons[:5])
        manifest = {
            "version": VERSION,
            "model": type(model).__name__,
            "components": entries,
            "left_out": [{"module": where, "reason": why} for where, why in left_out.items()],
        }
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        if (config := config_of(model)) is not None:
            config.save_pretrained(folder)
        for companion in companions_of_model(runner.compilation.source):
            if not (folder / companion.name).exists():
                shutil.copyfile(companion, folder / companion.name)
    return path


def is_exported(path: Path) -> bool:
    """Return whether `export_components` created a folder, so that it may be replaced."""
    return (path / MANIFEST).is_file()


def _with_rows(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return a call's inputs, with a single row repeated, since the tracer treats a size of 1 as fixed."""
    tensors = {name: value for name, value in inputs.items() if isinstance(value, Tensor) and value.dim()}
    one = all(value.shape[0] == 1 for value in tensors.values())
    return {**inputs, **({name: torch.cat([value, value]) for name, value in tensors.items()} if one else {})}


def _file_names(paths: Sequence[str]) -> dict[str, str]:
    """Return a file name for each component: the last segment of its path if that is unique, otherwise the path."""
    short = Counter(path.rpartition(".")[2] for path in paths)
    return {path: f"{last if short[last := path.rpartition('.')[2]] == 1 else path}.onnx" for path in paths}


def _write(
    merged: ModelRunner, model: nn.Module, component: Component, file: Path, evidence: FoldEvidence
) -> dict[str, Any]:
    """Write a component, compare it with the model's own results, and return its entry in the manifest."""
    tensors, results = list(component.tensors.values()), component.results
    axes, flags = as_inputs({component.path: (component.structure, tensors)})
    compilation = compile_model(load_spec({"adapt": []}), model, axes, flags=flags, start=StartingPoint(0, False))
    module = ComponentModule(AdaptedRunner(compilation, compilation.store), component)
    save_onnx(prepare_onnx(module, metadata(merged, module.program, evidence), OPSET.default), file)
    check_onnx(module, file)
    compare(file, component.tensors, results, module.counting(component.tensors))
    outputs = [{"name": name, "dtype": DTYPE_NAMES[leaf.dtype], "rank": leaf.dim()} for name, leaf in results.items()]
    inputs = [_described(module, axis, component) for axis in module.axes]
    return {"module": component.path, "file": file.name, "inputs": inputs, "outputs": outputs}


def _lengthened(tensor: Tensor, axis: Axis, more: int) -> Tensor:
    """Return a tensor with its last entries repeated along its dynamic axes."""
    for dim, name in enumerate(axis.axes):
        if isinstance(name, str):
            size = tensor.shape[dim]
            tensor = tensor.index_select(dim, torch.arange(size + more, device=tensor.device).clamp(max=size - 1))
    return tensor


def _described(module: ComponentModule, axis: Axis, component: Component) -> dict[str, Any]:
    name = module.input_name(axis.name)
    shape = [module.axis_name(size) if isinstance(size, str) else size for size in axis.axes]
    return {"name": name, "dtype": DTYPE_NAMES[axis.dtype], "shape": shape, "from": component.given[name]}
