"""bitsandbytes in 4 or 8 bits, as saved by transformers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch

from graftc.compiler.quantised_sources.bitsandbytes import packed_4bit, packed_8bit
from graftc.passes.core.packing.blockwise import SCALES, Blockwise
from graftc.passes.core.packing.modules import Packed
from graftc.runtime.sources.quantised.folder_tensors import FolderTensors, damaged
from graftc.runtime.sources.quantised.weights import FLOATS, Options, StoredWeight
from graftc.specs.errors.text import shown

_TYPES = {str(dtype).removeprefix("torch."): dtype for dtype in FLOATS}


def weights(tensors: FolderTensors, options: Options) -> Iterator[StoredWeight]:
    """Yield the quantised weights in a folder."""
    for kind in Blockwise.KINDS:
        for name in tensors.ending(f".weight.quant_state.bitsandbytes__{kind}"):
            yield StoredWeight(f"{name}.weight", partial(_read_4bit, tensors, f"{name}.weight", kind))
    for name in tensors.ending(".SCB"):
        yield StoredWeight(f"{name}.weight", partial(_read_8bit, tensors, name))


def _read_4bit(tensors: FolderTensors, name: str, kind: str, shape: tuple[int, ...], dtype: torch.dtype) -> Packed:
    said = _state(tensors, f"{name}.quant_state.bitsandbytes__{kind}")
    block, dtype_was, nested = said.get("blocksize"), _TYPES.get(str(said.get("dtype"))), said.get("nested_blocksize")
    if said.get("shape") != list(shape) or type(block) is not int or block < 1 or dtype_was is None:
        stored, kind_was = shown(said.get("shape")), shown(said.get("dtype"))
        damaged(f"{name} is stored as {stored} of {kind_was} in blocks of {shown(block)}, not {list(shape)}")
    state = SimpleNamespace(
        quant_type=kind,
        shape=shape,
        dtype=dtype_was,
        blocksize=block,
        code=tensors.get(f"{name}.quant_map", torch.float32),
        nested=nested is not None,
        state2=None,
        absmax=tensors.get(f"{name}.absmax", torch.uint8 if nested is not None else torch.float32),
    )
    if nested is not None:
        offset = said.get("nested_offset")
        if not isinstance(offset, float) or nested != SCALES:
            damaged(f"the scales of {name} have the offset {shown(offset)}, in blocks of {shown(nested)}")
        state.offset = torch.tensor(offset)
        state.state2 = SimpleNamespace(
            absmax=tensors.get(f"{name}.nested_absmax", torch.float32),
            code=tensors.get(f"{name}.nested_quant_map", torch.float32),
            blocksize=nested,
        )
    return packed_4bit(name, tensors.get(name), state, dtype)


def _state(tensors: FolderTensors, name: str) -> dict[str, Any]:
    try:
        state = json.loads(bytes(tensors.get(name, torch.uint8).tolist()))
    except (ValueError, RecursionError) as error:
        damaged(f"{name} cannot be read", cause=error)
    if not isinstance(state, dict):
        damaged(f"{name} cannot be read")
    return state


def _read_8bit(tensors: FolderTensors, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Packed:
    codes = tensors.get(f"{name}.weight", torch.int8, shape=shape)
    return packed_8bit(name, codes, tensors.get(f"{name}.SCB", torch.float32, shape=shape[:1]), dtype)
