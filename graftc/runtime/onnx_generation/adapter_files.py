"""Files with the values of a graph's inputs: ONNX Runtime's ``.onnx_adapter``, and safetensors."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from graftc.files.tensors.headers import read_shard
from graftc.files.tensors.writing import save_tensors, writing
from graftc.passes.core.weights.names import parsed
from graftc.runtime.onnx_generation.graphs import OnnxGraph, runtime
from graftc.specs.errors.arguments import as_path
from graftc.specs.errors.diagnostics import GraftError, first_line
from graftc.specs.regular_files import open_regular, require_regular

SUFFIX = ".onnx_adapter"
"""The suffix of ONNX Runtime's own format; any other file is safetensors."""

BASE = "graftc.base"
"""The entry of a safetensors header with the fingerprint of the base."""

_HINT = "write a file for these graphs: compiled.export(path, 'onnx-adapter', graph=folder)"
_STATED = 2**30


class StoredAdapter(NamedTuple):
    """The content of a file.

    Attributes:
        tensors: the tensors by name.
        base: what it says about its base: the fingerprint, or its `version_of`; None if it says nothing.
    """

    tensors: dict[str, Tensor]
    base: str | int | None

    def fits(self, fingerprint: str) -> bool:
        """Return whether it may be for a base; one that says nothing may be for any."""
        return self.base is None or self.base in (fingerprint, version_of(fingerprint))


def version_of(fingerprint: str) -> int:
    """Return the model version that stands for a base in ONNX Runtime's format, which has no room for more.

    Versions below 2**30 are other programs', and say nothing about the base.
    """
    return _STATED + int.from_bytes(hashlib.sha256(fingerprint.encode()).digest()[:4], "big") % _STATED


def write_adapter(tensors: Mapping[str, Tensor], path: Path, base: str) -> None:
    """Write tensors by the names of a graph's inputs, in the format that the suffix of the path says.

    Args:
        tensors: the tensors by name.
        path: the file.
        base: the fingerprint of the base.

    Raises:
        GraftError: GC061 without onnxruntime, for its own format.
        OSError: if the file cannot be written.
    """
    if path.suffix != SUFFIX:
        save_tensors(tensors, path, metadata={BASE: base})
        return
    ort = runtime()
    form = ort.AdapterFormat()
    form.set_adapter_version(1)
    form.set_model_version(version_of(base))
    form.set_parameters({n: ort.OrtValue.ortvalue_from_numpy(t.detach().cpu().numpy()) for n, t in tensors.items()})
    with writing(path):
        form.export_adapter(str(path))


def read_adapter(path: Path) -> StoredAdapter:
    """Return the content of a file that `write_adapter` or another program wrote.

    Raises:
        GraftError: GC061 without onnxruntime, for its own format, GC144 for a file that cannot be read.
    """
    try:
        if path.suffix != SUFFIX:
            from safetensors.torch import load

            with open_regular(path) as file:
                content = file.read()
            return StoredAdapter(load(content), read_shard(path).metadata.get(BASE))
        require_regular(path)
        form = runtime().AdapterFormat.read_adapter(str(path))
        tensors = {name: torch.from_numpy(value.numpy().copy()) for name, value in form.get_parameters().items()}
        version = int(form.get_model_version())
        return StoredAdapter(tensors, version if version >= _STATED else None)
    except GraftError:
        raise
    except Exception as error:
        hint = "check the path, or write the file again: compiled.export(path, 'onnx-adapter', graph=folder)"
        raise GraftError("GC144", f"the adapter {path} cannot be read: {first_line(error)}", hint=hint) from error


def tensors_for(graphs: Sequence[OnnxGraph], files: Iterable[str | Path]) -> dict[str, Tensor]:
    """Return the tensors in some files for the inputs of some graphs, by name.

    Raises:
        GraftError: GC144 for a file that cannot be read, GC192 for one of another base, for a tensor that no graph
            takes or that has values that are not finite, and for tensors that are missing.
    """
    tensors: dict[str, Tensor] = {}
    for file in map(as_path, files):
        stored = read_adapter(file)
        if foreign := next((g for g in graphs if g.base is not None and not stored.fits(g.base)), None):
            hint = "use an adapter of the graph's base, or export a graph of the adapter's base"
            raise GraftError("GC192", f"{file} is for another base than {foreign.path.name}", hint=hint)
        if stored.tensors and not any(graph.adapted for graph in graphs):
            hint = "export them with inputs: export(folder, 'onnx-generate', inputs=[...])"
            raise GraftError("GC192", f"{file} does not fit: the graphs take no adapters", hint=hint)
        for name, tensor in stored.tensors.items():
            takers = [graph for graph in graphs if name in graph.adapted]
            misfits = (reason for graph in takers if (reason := _misfit(graph, name, tensor)))
            reason = next(misfits, None) if takers else f"the graphs have no input {name}"
            if name in tensors:
                reason = f"another file has {name} as well"
            if reason is not None:
                raise GraftError("GC192", f"{file} does not fit: {reason}", hint=_HINT)
            tensors[name] = tensor
        if reason := next((own for graph in graphs if (own := _incomplete(graph, stored.tensors, tensors))), None):
            raise GraftError("GC192", f"{file} does not fit: {reason}", hint=_HINT)
    return tensors


def _incomplete(graph: OnnxGraph, own: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> str | None:
    """Return what a file lacks of the sites that it adapts, or why its sizes differ; None if it is complete.

    A graph combines a site's tensors, and all those whose sizes have the same name; its defaults do not go with others.
    """
    sizes: dict[str, tuple[str, int]] = {}
    for name in own.keys() & graph.adapted.keys():
        for wanted, size in zip(graph.adapted[name].shape, own[name].shape, strict=True):
            if not isinstance(wanted, str):
                continue
            first, known = sizes.setdefault(wanted, (name, size))
            if known != size:
                return f"{name} is {list(own[name].shape)}, which does not go with {first}, {list(own[first].shape)}"
    sites = {_site(name) for name in own}
    for name, expected in graph.adapted.items():
        if name not in tensors and (_site(name) in sites or sizes.keys() & set(expected.shape)):
            return f"it lacks {name}"
    return None


def _site(name: str) -> tuple[str, ...]:
    own = parsed(name)
    return (own.module, own.adaptation, own.part.rpartition(".")[0]) if own is not None else (name,)


def _misfit(graph: OnnxGraph, name: str, tensor: Tensor) -> str | None:
    expected = graph.adapted[name]
    sizes = zip(tensor.shape, expected.shape, strict=False)
    fits = tensor.dtype == expected.dtype and tensor.dim() == len(expected.shape)
    if fits and all(size == wanted for size, wanted in sizes if isinstance(wanted, int)):
        return None if bool(tensor.isfinite().all()) else f"{name} has values that are not finite"
    own = f"{tensor.dtype} {list(tensor.shape)}"
    return f"{name} is {own}, but {graph.path.name} takes {expected.dtype} {list(expected.shape)}"
