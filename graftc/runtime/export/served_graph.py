"""Exported graphs that take adaptations as inputs, as other adapters see them: what fits, and what each input is."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graftc.compiler.capture.identity.fingerprint import identify
from graftc.compiler.compilation import Compilation
from graftc.compiler.folding.exchange import exchangeable_spec, exchanged_values
from graftc.compiler.resolve.resolver import Resolved
from graftc.files.destinations import holds
from graftc.passes.core.weights.folds import round_once
from graftc.passes.core.weights.names import owner_of, renamed
from graftc.runtime.export.exchange import SIZE, essence
from graftc.runtime.export.onnx_check import package
from graftc.runtime.onnx_generation.adapter_files import SUFFIX
from graftc.runtime.onnx_generation.graphs import BASE_OF_INPUTS
from graftc.specs.errors.diagnostics import GraftError, first_line
from graftc.specs.errors.text import listed, shown

_DTYPES = {"FLOAT": torch.float32, "FLOAT16": torch.float16, "DOUBLE": torch.float64}


@dataclass(frozen=True)
class ServedGraph:
    """The requirements for adapters that the metadata and inputs of one or several ONNX files state.

    Attributes:
        path: the file, or the folder of files.
        fingerprint: the fingerprint of the base.
        specs: for each adaptation that is an input, what an adapter in its place has in common with it.
        inputs: the dtype and the sizes of these adaptations' tensors, by name; a size that is a name is free.
        alone: whether the graph computes the base where a call passes no adapters.
        files: the ONNX files, and those with their weights.
    """

    path: Path
    fingerprint: str
    specs: Mapping[str, Mapping[str, Any]]
    inputs: Mapping[str, tuple[torch.dtype, tuple[int | str, ...]]]
    alone: bool
    files: tuple[Path, ...]

    @classmethod
    def read(cls, path: Path) -> ServedGraph:
        """Read the ONNX file at a path, or all in the folder there, without their weights.

        Raises:
            GraftError: GC192 for anything but graphs that graftc has exported with adaptations as inputs.
        """
        onnx = package("onnx")
        about: dict[str, str] = {}
        files: dict[Path, None] = {}
        inputs: dict[str, tuple[torch.dtype, tuple[int | str, ...]]] = {}
        try:
            for file in sorted(path.glob("*.onnx")) if path.is_dir() else [path]:
                model = onnx.load(str(file), load_external_data=False)
                stored = {e.value for t in model.graph.initializer for e in t.external_data if e.key == "location"}
                files |= dict.fromkeys([file, *(file.with_name(name) for name in sorted(stored))])
                about |= {entry.key: entry.value for entry in model.metadata_props}
                for value in model.graph.input:
                    if owner_of(value.name):
                        kind = value.type.tensor_type
                        dtype = _DTYPES[onnx.TensorProto.DataType.Name(kind.elem_type)]
                        inputs[value.name] = dtype, tuple(d.dim_param or d.dim_value for d in kind.shape.dim)
            specs, places = (json.loads(about[key]) for key in ("graftc.inputs.specs", "graftc.adaptations"))
            own = {name: own for name, own in inputs.items() if owner_of(name) in specs}
            return cls(path, about[BASE_OF_INPUTS], specs, own, set(places) == set(specs), tuple(files))
        except Exception as error:
            reason = "it has none" if isinstance(error, KeyError) else first_line(error)
            message = f"{path} cannot be read as a graph with adaptations as inputs: {reason}"
            hint = "export one with inputs=['NAME'], for adaptations that adapters of other sizes can replace"
            raise GraftError("GC192", message, hint=hint) from error

    def contains(self, path: Path) -> bool:
        """Return whether writing to a path would replace something that belongs to the graph, links followed.

        In a folder these are all files but adapters, which may be written again.
        """
        own = os.path.realpath(path)
        if own in map(os.path.realpath, self.files):
            return True
        inside = self.path.is_dir() and holds(self.path, path) and os.path.lexists(path)
        return inside and path.suffix not in (SUFFIX, ".safetensors")

    def values(self, compilation: Compilation, slot: str | None = None) -> dict[str, Tensor]:
        """Return the tensors of all adaptations of a compiled model, by the names of the graph's inputs.

        Args:
            compilation: the Compilation, in its deployed form.
            slot: the adaptation of the graph in whose place the model's only one goes; by default the one of the same
                name, or the only one that fits.

        Raises:
            GraftError: GC192 if something does not fit, by its name.
        """
        if (own := identify(compilation.source).fingerprint) != self.fingerprint:
            message = f"{self.path} has another base: its fingerprint is {self.fingerprint[:12]}, not {own[:12]}"
            raise self._misfit(message, "export a graph of this base, or load the artifact with the graph's base")
        resolved = compilation.main.resolved
        known = {own.name for own in resolved}
        edits = (edit.owner for edit in compilation.tensor_edits.copies())
        if other := next((owner for owner in edits if owner not in known), None):
            raise self._misfit(f"{other!r} changes tensors of the base", "export a graph of the merged model")
        if slot is not None and len(resolved) != 1:
            message = f"the model has {len(resolved)} adaptations, so it is not clear which one is meant by {slot!r}"
            raise self._misfit(message, "leave out the slot")
        taken: dict[str, str] = {}
        values: dict[str, Tensor] = {}
        for adaptation in resolved:
            place = self._slot(compilation, adaptation, slot)
            if place in taken:
                message = f"{adaptation.name!r} and {taken[place]!r} both go in the place of {place!r}"
                raise self._misfit(message, "export one of them: compiled.alone, or an artifact that has only one")
            taken[place] = adaptation.name
            values |= self._fitted(exchanged_values(compilation, adaptation), place)
        return values

    def _slot(self, compilation: Compilation, adaptation: Resolved, slot: str | None) -> str:
        spec = exchangeable_spec(compilation, adaptation, SIZE)
        if spec is None:
            message = f"{adaptation.name!r} ({adaptation.spec.method}) cannot be exchanged for others in a graph"
            raise self._misfit(message, "export it as a constant")
        own = essence(spec)
        if slot is None:
            fitting = [name for name, other in self.specs.items() if other == own]
            slot = adaptation.name if adaptation.name in self.specs or len(fitting) != 1 else fitting[0]
        if slot not in self.specs:
            places = listed([f"{name!r} ({other.get('method')})" for name, other in self.specs.items()], "and")
            reason = f"it has no input {slot!r} for the {own['method']} {adaptation.name!r}; its inputs are {places}"
            raise self._misfit(f"{self.path}: {reason}", "name one of them as the slot, or rename the adaptation")
        for field, value in own.items():
            if (other := self.specs[slot].get(field)) != value:
                message = f"{field} of {adaptation.name!r} is {shown(value)}, but the graph is for {shown(other)}"
                raise self._misfit(message, "export a graph of this model with the adaptation as an input")
        return slot

    def _fitted(self, values: Mapping[str, Tensor], slot: str) -> dict[str, Tensor]:
        sizes: dict[str, int] = {}
        fitted: dict[str, Tensor] = {}
        for name, value in values.items():
            wanted = renamed(name, slot)
            if wanted not in self.inputs:
                message = f"the graph has no input {wanted}: it does not adapt that place, or not with this tensor"
                raise self._misfit(message, "adapt only places that the graph adapts")
            dtype, shape = self.inputs[wanted]
            own = tuple(value.shape)
            if len(shape) != len(own) or any(
                size != (sizes.setdefault(wants, size) if isinstance(wants, str) else wants)
                for wants, size in zip(shape, own, strict=True)
            ):
                message = f"{name} is {list(own)}, but the graph takes [{', '.join(map(str, shape))}]"
                message += f", where {', '.join(f'{n} is {size}' for n, size in sizes.items())}" if sizes else ""
                raise self._misfit(message, "export a graph of this model with the adaptation as an input")
            fitted[wanted] = round_once(value, dtype)
        return fitted

    def _misfit(self, message: str, hint: str) -> GraftError:
        return GraftError("GC192", message, hint=hint)
