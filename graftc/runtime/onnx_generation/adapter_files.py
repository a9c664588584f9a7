"""Files with the values of a graph's inputs: ONNX Runtime's ``.onnx_adapter``, and safetensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from graftc.files.tensors.writing import save_tensors, writing
from graftc.runtime.onnx_generation.graphs import OnnxGraph, runtime
from graftc.specs.errors.arguments import as_path
from graftc.specs.errors.diagnostics import GraftError, first_line
from graftc.specs.regular_files import read_regular, require_regular

SUFFIX = ".onnx_adapter"
"""The suffix of ONNX Runtime's own format; any other file is safetensors."""


def write_adapter(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write tensors by the names of a graph's inputs, in the format that the suffix of the path says.

    Raises:
        GraftError: GC061 without onnxruntime, for its own format.
        OSError: if the file cannot be written.
    """
    if path.suffix != SUFFIX:
        save_tensors(tensors, path)
        return
    ort = runtime()
    form = ort.AdapterFormat()
    form.set_adapter_version(1)
    form.set_model_version(1)
    form.set_parameters({n: ort.OrtValue.ortvalue_from_numpy(t.detach().cpu().numpy()) for n, t in tensors.items()})
    with writing(path):
        form.export_adapter(str(path))


def read_adapter(path: Path) -> dict[str, Tensor]:
    """Return the tensors in a file that `write_adapter` or another program wrote.

    Raises:
        GraftError: GC061 without onnxruntime, for its own format, GC144 for a file that cannot be read.
    """
    try:
        if path.suffix != SUFFIX:
            from safetensors.torch import load

            return load(read_regular(path))
        require_regular(path)
        values = runtime().AdapterFormat.read_adapter(str(path)).get_parameters()
        return {name: torch.from_numpy(value.numpy().copy()) for name, value in values.items()}
    except GraftError:
        raise
    except Exception as error:
        raise GraftError("GC144", f"the adapter {path} cannot be read: {first_line(error)}") from error


def tensors_for(graphs: Sequence[OnnxGraph], files: Iterable[str | Path]) -> dict[str, Tensor]:
    """Return the tensors in some files for the inputs of some graphs, by name.

    Raises:
        GraftError: GC144 for a file that cannot be read, GC192 for a tensor that no graph takes.
    """
    tensors: dict[str, Tensor] = {}
    for file in map(as_path, files):
        for name, tensor in read_adapter(file).items():
            takers = [graph for graph in graphs if name in graph.adapted]
            misfits = (reason for graph in takers if (reason := _misfit(graph, name, tensor)))
            reason = next(misfits, None) if takers else f"the graphs have no input {name}"
            if name in tensors:
                reason = f"another file has {name} as well"
            if reason is not None:
                hint = "write a file for these graphs: compiled.export(path, 'onnx-adapter', graph=folder)"
                raise GraftError("GC192", f"{file} does not fit: {reason}", hint=hint)
            tensors[name] = tensor
    return tensors


def _misfit(graph: OnnxGraph, name: str, tensor: Tensor) -> str | None:
    expected = graph.adapted[name]
    sizes = zip(tensor.shape, expected.shape, strict=False)
    fits = tensor.dtype == expected.dtype and tensor.dim() == len(expected.shape)
    if fits and all(size == wanted for size, wanted in sizes if isinstance(wanted, int)):
        return None
    own = f"{tensor.dtype} {list(tensor.shape)}"
    return f"{name} is {own}, but {graph.path.name} takes {expected.dtype} {list(expected.shape)}"
