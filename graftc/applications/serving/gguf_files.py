"""Follow an engine through GGUF files: LoRA adapters for llama.cpp, and whole models."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from graftc.applications.serving.adapters import Replay, once
from graftc.applications.serving.bases import BaseModule, ServedBase
from graftc.records.serving.certificates import ServedSite, ServedTensor, ServingProblem
from graftc.runtime.export.gguf.families import architecture, family_of, heads_of
from graftc.runtime.export.gguf.writing import package
from graftc.runtime.interop.layouts.rotary import as_halves
from graftc.runtime.serving.engines import FORMS, Engine
from graftc.specs.errors.diagnostics import GraftError, Place
from graftc.specs.errors.text import shown

_KEYS = frozenset(
    {
        *("adapter.type", "adapter.lora.alpha", "adapter.lora.task_name", "adapter.lora.prompt_prefix"),
        "adapter.alora.invocation_tokens",
    }
)
_EXPORT = "write it with graftc convert --to gguf"
_TABLES = {"token_embd.weight": "embedding", "output.weight": "head"}


@dataclass(frozen=True)
class GgufContent:
    """The fields of a GGUF file, and the shapes and types of its tensors.

    Attributes:
        fields: the values by key.
        shapes: the shapes of its tensors, ``[rows, columns]``.
        types: the names of their types, such as ``F16``.
        kinds: the names of the types of its fields, such as ``FLOAT32``.
        infinite: the tensors of an adapter that contain NaN or infinity; empty for models, whose values are not read.
    """

    fields: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    types: Mapping[str, str]
    kinds: Mapping[str, str]
    infinite: frozenset[str] = frozenset()

    @classmethod
    def of(cls, file: Path) -> GgufContent:
        """Read a file's header, and all values of an adapter.

        Raises:
            GraftError: GC061 without the package gguf, GC113 for a file that is damaged.
        """
        try:
            reader = package().GGUFReader(file)
            fields = {name: own.contents() for name, own in reader.fields.items()}
            kinds = {name: own.types[0].name for name, own in reader.fields.items() if own.types}
            given = reader.tensors if fields.get("general.type") == "adapter" else []
            infinite = frozenset(t.name for t in given if not _is_finite(t))
        except (OSError, ValueError, IndexError, KeyError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            message = f"{file} cannot be read as GGUF: {reason}"
            hint = f"a file has to be {FORMS['gguf-adapter']} or {FORMS['gguf-model']}; of PEFT, pass the folder"
            raise GraftError("GC113", message, place=Place(str(file)), hint=hint) from None
        shapes = {t.name: tuple(int(n) for n in reversed(t.shape)) for t in reader.tensors}
        return cls(fields, shapes, {t.name: t.tensor_type.name for t in reader.tensors}, kinds, infinite)

    @property
    def is_adapter(self) -> bool:
        """Whether it is an adapter."""
        return self.fields.get("general.type") == "adapter"

    @property
    def architecture(self) -> object:
        """The architecture of the model that it is, or is for."""
        return self.fields.get("general.architecture")

    @property
    def matrices(self) -> set[str]:
        """The names of the types of its matrices."""
        return {kind for name, kind in self.types.items() if len(self.shapes[name]) > 1}


def replayed_gguf(engine: Engine, adapter: GgufContent, base: ServedBase) -> Replay:
    """Follow llama.cpp through a LoRA adapter.

    Args:
        engine: the engine.
        adapter: the adapter.
        base: the base that the adapter is for.

    Raises:
        GraftError: GC060 for a base whose names in GGUF are unknown.
    """
    replay = Replay(problems=list(_field_problems(adapter, base)))
    modules = _named(base)
    pairs: dict[str, dict[str, str]] = {}
    for key in adapter.shapes:
        name, _, part = key.rpartition(".")
        if part in ("lora_a", "lora_b"):
            pairs.setdefault(name, {})[part] = key
            continue
        if key.endswith("_norm.weight"):
            problem = ServingProblem("ignored", key, f"{engine.title} ignores {key}", "merge it: graftc merge")
        else:
            problem = ServingProblem("refused", key, f"{key} is not a factor of a LoRA", "merge it: graftc merge")
        replay.problems.append(problem)
        replay.tensors.append(ServedTensor(key, None, False, problem.reason))
    found: list[ServingProblem] = []
    alpha = adapter.fields.get("adapter.lora.alpha")
    for name, keys in pairs.items():
        shapes = {part: adapter.shapes[key] for part, key in keys.items()}
        problems = list(_pair_problems(engine, name, shapes, modules.get(name), base))
        if not problems and not adapter.infinite.isdisjoint(keys.values()):
            problems.append(ServingProblem("wrong", name, f"the factors of {name} contain NaN or infinity", _EXPORT))
        if not problems:
            rank = shapes["lora_b"][-1]
            scale = float(alpha) / rank if alpha else 1.0
            replay.sites.append(ServedSite(name, rank, scale, scale))
        reason = problems[0].reason if problems else ""
        replay.tensors += [ServedTensor(key, None if problems else name, not problems, reason) for key in keys.values()]
        found += problems
    replay.problems += once(found)
    return replay


def _field_problems(adapter: GgufContent, base: ServedBase) -> Iterator[ServingProblem]:
    fields, arch = adapter.fields, family_of(base.model.config).arch
    if adapter.architecture != arch:
        reason = f"general.architecture is {shown(adapter.architecture)}, but the base's is {arch!r}"
        yield ServingProblem("refused", "general.architecture", reason, "use the base that the adapter was trained on")
    if fields.get("adapter.type") != "lora":
        yield ServingProblem("refused", "adapter.type", f"adapter.type is {shown(fields.get('adapter.type'))}", _EXPORT)
    if not fields.get("adapter.lora.alpha"):
        reason = "adapter.lora.alpha is missing or 0, and llama.cpp then multiplies by 1 instead of alpha / rank"
        yield ServingProblem("wrong", "adapter.lora.alpha", reason, _EXPORT)
    elif adapter.kinds["adapter.lora.alpha"] != "FLOAT32":
        reason = f"adapter.lora.alpha is {adapter.kinds['adapter.lora.alpha']}, which ends llama.cpp"
        yield ServingProblem("refused", "adapter.lora.alpha", reason, _EXPORT)
    elif not math.isfinite(fields["adapter.lora.alpha"]):
        reason = f"adapter.lora.alpha is {fields['adapter.lora.alpha']}"
        yield ServingProblem("wrong", "adapter.lora.alpha", reason, _EXPORT)
    for key in sorted(name for name in fields if name.startswith("adapter.") and name not in _KEYS):
        yield ServingProblem("ignored", key, f"{key} is {shown(fields[key])}, which llama.cpp does not read", _EXPORT)


def _pair_problems(
    engine: Engine, name: str, shapes: Mapping[str, tuple[int, ...]], module: BaseModule | None, base: ServedBase
) -> Iterator[ServingProblem]:
    if shapes.keys() != {"lora_a", "lora_b"}:
        yield ServingProblem("refused", name, f"{name} has only one of lora_a and lora_b", _EXPORT)
    elif name in _TABLES and base.tied:
        kind = "it aborts at the first request" if name == "token_embd.weight" else "the file has no such tensor"
        reason = f"{name} is adapted, but the base's embedding and head are one tensor: {kind}"
        remedy = f"leave the {_TABLES[name]} out, or untie the head and export the merged model"
        yield ServingProblem("refused", name, reason, remedy)
    elif module is None:
        yield ServingProblem("refused", name, f"{name} is not a matrix of the base", "use the adapter's own base")
    elif module.kind == "embedding" and name != "token_embd.weight":
        yield ServingProblem("ignored", name, f"{engine.title} takes no LoRA on {name}", "merge it: graftc merge")
    else:
        wanted = (module.inputs, module.outputs)
        table = name == "token_embd.weight"
        a, b = shapes["lora_a"], shapes["lora_b"]
        sizes = (a[0], b[0]) if table else (a[1], b[0])
        ranks = (a[1], b[1]) if table else (a[0], b[1])
        if sizes != wanted or ranks[0] != ranks[1]:
            reason = f"{name} maps {wanted[0]} to {wanted[1]}, but the factors are {list(a)} and {list(b)}"
            yield ServingProblem("refused", name, reason, "use the base that the adapter was trained on")


def _is_finite(tensor: Any) -> bool:
    """Return whether all values are numbers, which integers and types that the package cannot read are taken to be."""
    try:
        return bool(np.isfinite(package().dequantize(tensor.data, tensor.tensor_type)).all())
    except NotImplementedError:
        return True


def _named(base: ServedBase) -> dict[str, BaseModule]:
    """Return the base's modules by their names in GGUF."""
    gguf, config = package(), cast("Any", base.model.config)
    names: Any = gguf.get_tensor_name_map(architecture(gguf, family_of(config)), config.num_hidden_layers)
    found = {names.get_name(module.tensor, (".weight",)): module for module in base.modules.values()}
    return {name: module for name, module in found.items() if name is not None}


def gguf_updates(file: Path, base: ServedBase) -> dict[str, Tensor]:
    """Return what llama.cpp adds to each of the base's weights, in transformers' order and orientation.

    Args:
        file: a LoRA adapter for llama.cpp.
        base: the base that it is for.
    """
    gguf, config = package(), cast("Any", base.model.config)
    reader, family, heads = gguf.GGUFReader(file), family_of(config), heads_of(config)
    tensors = {t.name: torch.from_numpy(gguf.dequantize(t.data, t.tensor_type).copy()) for t in reader.tensors}
    alpha = float(reader.fields["adapter.lora.alpha"].contents())
    updates = {}
    for name, module in _named(base).items():
        if f"{name}.lora_b" not in tensors:
            continue
        down, up = tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"]
        if name == "token_embd.weight":
            updates[module.tensor] = alpha / up.shape[1] * (down @ up.T)
            continue
        update = alpha / up.shape[1] * (up @ down)
        if family.rotary and module.tensor.endswith(("q_proj.weight", "k_proj.weight")):
            update = as_halves(update, heads.queries if "q_proj" in module.tensor else heads.keys)
        updates[module.tensor] = update.T if module.tensor.endswith(family.transposed or ("\0",)) else update
    return updates
