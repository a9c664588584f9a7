"""Write `transformers.exporters.ExportedModel` folders from a decoder's graph, and locate the graphs in them."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import warnings
from pathlib import Path
from typing import Any

from graftc.compat.structures import structure_text
from graftc.files.writing import staged
from graftc.runtime.onnx_generation.io_names import Slot, slots_of
from graftc.specs.errors.arguments import as_path
from graftc.specs.errors.diagnostics import GraftError, first_line
from graftc.specs.regular_files import read_regular

MANIFEST = "export.json"
_FILE = "model.onnx"
_CONFIGS = ("config.json", "generation_config.json")


def graph_in(folder: Path) -> Path:
    """Return the path of the decode step's graph in an `ExportedModel` folder.

    Raises:
        GraftError: GC144 if the manifest names no such graph, or names a file outside its own folder.
    """
    try:
        manifest = json.loads(read_regular(folder / MANIFEST))
        form, parts = manifest["export_format"], {name: part["file"] for name, part in manifest["components"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise GraftError("GC144", f"{MANIFEST} in {folder} cannot be read: {first_line(error)}") from error
    file = parts.get("decode", parts.get("model"))
    if form != "onnx" or file is None:
        raise GraftError("GC144", f"{MANIFEST} in {folder} names no ONNX file for a decode step")
    if not isinstance(file, str) or Path(file).name != file:
        raise GraftError("GC144", f"{MANIFEST} in {folder} names a file that is not beside it")
    return folder / file


def _transformers_name(slot: Slot, side: str) -> str:
    return f"{side}.cache.layers.{slot.layer}.{slot.part}s"


def write_exported_model(source: str | Path, destination: str | Path, *, force: bool = False) -> Path:
    """Write an `ExportedModel` folder from a folder with a decoder's ``model.onnx`` and its configs.

    The graph is the same, except that its cache tensors are named by the paths that transformers' runner reads, such as
    ``cache.layers.0.keys``. ``ExportedModel.from_pretrained(destination)(input_ids=..., attention_mask=...,
    position_ids=..., cache=...)`` returns a ``CausalLMOutputWithPast``. For the first call, each layer of the cache
    must have keys and values ``[batch, heads, 0, head_dim]``, written with ``cache.update``. An `ExportedModel` has no
    ``generate``; `graftc.runtime.onnx_generation.load` also reads its folders, and returns a model that has one.

    Args:
        source: the folder with ``model.onnx``, ``config.json`` and optionally ``generation_config.json``.
        destination: the folder to write, with its own copy of the weights.
        force: if true, replace a folder that this function or transformers wrote.

    Returns:
        The destination.

    Raises:
        GraftError: GC061 if the installed transformers has no `ExportedModel` (before 5.23), GC144 if the source
            cannot be read or has no decoder with a cache, GC063 if the destination exists, GC064 if it cannot be
            written.
    """
    if not hasattr(importlib.import_module("transformers.exporters"), "ExportedModel"):
        installed = importlib.metadata.version("transformers")
        message = f"transformers {installed} has no ExportedModel, whose folders this function writes"
        raise GraftError("GC061", message, hint="pip install 'transformers>=5.23'")
    folder, target = as_path(source), as_path(destination)
    ir = importlib.import_module("onnx_ir")
    try:
        program = ir.load(str(folder / _FILE))
        names = json.loads(read_regular(folder / _CONFIGS[0])).get("architectures")
    except Exception as error:
        raise GraftError("GC144", f"the graph or the config in {folder} cannot be read: {first_line(error)}") from error
    graph = program.graph
    past, present = slots_of(v.name for v in graph.inputs), slots_of(v.name for v in graph.outputs)
    if not past or list(past) != list(present) or any(slot.attention != "self" for slot in past):
        raise GraftError("GC144", f"{folder / _FILE} is not the graph of a decoder with a cache")
    values = {v.name: v for v in [*graph.inputs, *graph.outputs]}
    dtype = str(values[next(iter(past.values()))].dtype.numpy())
    for slots, side in ((past, "input"), (present, "output")):
        for slot, name in slots.items():
            values[name].name = _transformers_name(slot, side)
    # The runner rebuilds the outputs from the last tensors, in the order of the structure's leaves.
    graph.outputs[:] = [values["logits"], *(values[name] for name in present.values())]
    calls = [name for name in values if name in ("input_ids", "attention_mask", "position_ids", "token_type_ids")]
    metadata = {
        "architecture": names[0] if isinstance(names, list) and names else None,
        "export_config": {"export_format": "onnx", "dynamic": True},
        "export_dtype": dtype,
        "export_device": "cpu",
        "kwargs": {**{name: {"rank": 2, "dtype": "int64"} for name in calls}, "cache": {"container": "DynamicCache"}},
        "out_spec": _structure(1 + max(slot.layer for slot in past)),
    }
    manifest = {
        "schema_version": 1,
        "export_format": "onnx",
        "components": {"model": {"file": _FILE, "metadata": metadata}},
    }
    with staged(target, force=force, replaceable=_is_ours, sources=[folder]) as new:
        new.mkdir()
        ir.save(program, str(new / _FILE), external_data=f"{_FILE}.data")
        (new / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        for name in _CONFIGS:
            if (folder / name).is_file():
                (new / name).write_bytes((folder / name).read_bytes())
    return target


def _is_ours(path: Path) -> bool:
    return (path / MANIFEST).is_file()


def _structure(layers: int) -> str:
    """Return the structure of the outputs as transformers' exporter records it: logits, and a cache of plain layers."""
    import torch
    from transformers import DynamicCache
    from transformers.exporters import exporter_dynamo
    from transformers.modeling_outputs import CausalLMOutputWithPast

    exporter: Any = exporter_dynamo
    exporter.register_pytree_node(DynamicCache)
    cache, empty = DynamicCache(), torch.zeros(1, 1, 1, 1)
    for layer in range(layers):
        cache.update(empty, empty, layer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        output: Any = CausalLMOutputWithPast(logits=empty, cache=cache)
        return structure_text(output)
