"""Convert adapter folders to GGUF, and check that llama.cpp would compute the same updates from the file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graftc.files.writing import check_apart, staged_or_dropped
from graftc.runtime.export.formats.gguf import FileType
from graftc.runtime.export.gguf.adapter import adapter_file
from graftc.runtime.export.gguf.families import architecture, family_of, heads_of
from graftc.runtime.export.gguf.writing import name_of, package
from graftc.runtime.interop.layouts.convert import ROUNDING, AdapterSource, ConvertedFolder, compared
from graftc.runtime.interop.layouts.plain import PlainAdapter
from graftc.runtime.interop.layouts.reference import unpaired
from graftc.runtime.sources.models import config_of_folder
from graftc.specs.errors.diagnostics import GraftError, Place

_DTYPES: Mapping[FileType, torch.dtype] = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


def convert_to_gguf(
    source: AdapterSource, out: Path | None, model: Path | None, *, dtype: FileType = "f32", force: bool = False
) -> ConvertedFolder:
    """Write an adapter folder as a GGUF adapter.

    Args:
        source: the adapter to read.
        out: the file; None to check the conversion only.
        model: the base's folder, from which only ``config.json`` is read.
        dtype: the factors' element type.
        force: if true, replace an existing file.

    Raises:
        GraftError: GC032 for a config that cannot be read, GC067 if the file's updates differ, GC069 without the base's
            config, GC060 and GC061 as in `adapter_file`, GC063 and GC064 for the destination.
    """
    if out is not None:
        check_apart(out, *source.read_from, model)
    if model is None or not (model / "config.json").is_file():
        hint = "name the base that the adapter is for: --model MODEL"
        raise GraftError("GC069", "GGUF needs the config of the base", place=Place(str(model or "")), hint=hint)
    config = config_of_folder(model, str(model))
    adapter, wanted = source.read()
    with staged_or_dropped(out, "adapter.gguf", force=force, sources=source.folders) as file:
        return replace(_written(adapter, config, file, wanted, source, dtype), out=out)


def _written(
    adapter: PlainAdapter, config: Any, file: Path, wanted: Mapping[str, Tensor], source: AdapterSource, dtype: FileType
) -> ConvertedFolder:
    content = adapter_file(adapter, config)
    content.write(file, dtype)
    content.check(file, dtype)
    maps = compared(wanted, _responses(adapter, config, file, source), ROUNDING[_DTYPES[dtype]])
    return ConvertedFolder(None, source.layout.name, "gguf", maps, max(u.rank for u in adapter.updates.values()))


def _responses(adapter: PlainAdapter, config: Any, file: Path, source: AdapterSource) -> dict[str, Tensor]:
    """Return what llama.cpp adds to outputs: ``alpha / rank`` times the product, with rotated rows put into halves."""
    gguf = package()
    reader = gguf.GGUFReader(file)
    tensors = {t.name: torch.from_numpy(gguf.dequantize(t.data, t.tensor_type).copy()).double() for t in reader.tensors}
    alpha = float(reader.fields["adapter.lora.alpha"].contents())
    family = family_of(config)
    names = gguf.get_tensor_name_map(architecture(gguf, family), config.num_hidden_layers)
    responses = {}
    for path in adapter.updates:
        name = name_of(names, f"{path}.weight")
        down, up = tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"]
        if name == "token_embd.weight":
            down = down.T
        value = alpha / down.shape[0] * (up @ (down @ source.probe(down.shape[1])))
        turned = family.rotary and path.endswith(("q_proj", "k_proj"))
        responses[path] = unpaired(value, heads_of(config).size) if turned else value
    return responses
