"""Read and write adapter folders according to the table of layouts."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graftc.files.tensors.writing import save_tensors
from graftc.runtime.interop.layouts.fusing import apart, together
from graftc.runtime.interop.layouts.layout import STACKED, AdapterLayout, layout_of
from graftc.runtime.interop.layouts.plain import EXPERT, AttentionSizes, PlainAdapter, Update
from graftc.runtime.interop.layouts.rotary import as_halves, as_pairs
from graftc.runtime.interop.peft.expert_layouts import SINCE, release_of
from graftc.runtime.interop.peft.folder import WEIGHTS, PeftAdapter, PeftModule, adapter_tensors, read_peft
from graftc.runtime.interop.peft.forms import Shaped, to_theirs
from graftc.specs.base import Invoked
from graftc.specs.errors.diagnostics import GraftError, Place
from graftc.specs.errors.text import some
from graftc.specs.foreign.config import CONFIG, AdapterConfig, config_bytes, read_config
from graftc.specs.methods.lora import LoRA

_ABOUT = ("base_model_name_or_path", "revision", "task_type", "fan_in_fan_out")
_EACH = re.compile(r"(?P<module>.*\bexperts)\.(?P<expert>\d+)\.(?P<map>gate_proj|up_proj|down_proj)")
_STACKED = re.compile(r"(?P<module>.*\bexperts)\.(?P<map>w1|w2|w3)")


def raw_keys(folder: Path) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a folder's tensors, by key.

    Raises:
        GraftError: GC113 for a file that is missing or damaged.
    """
    return {key: stored.shape for key, stored in adapter_tensors(folder / WEIGHTS).entries.items()}


def detected(folder: Path) -> AdapterLayout:
    """Return the layout that a folder's keys imply; Unsloth's has the same keys as PEFT's and is never guessed."""
    keys = raw_keys(folder)
    paths = [re.sub(r"\.lora_\w+(\.weight)?$", "", key) for key in keys]
    if any(".lora_a." in key for key in keys):
        return layout_of("torchtune")
    if any(path.endswith(".unembed_tokens") for path in paths):
        return layout_of("tinker")
    if any(_STACKED.fullmatch(path) for path in paths):
        return layout_of("sglang")
    return layout_of("vllm" if any(_EACH.fullmatch(path) for path in paths) else "peft")


def named(layout: AdapterLayout, path: str, *, back: bool = False) -> str:
    """Translate a path from transformers' names to a layout's, or back."""
    pairs = [(b, a) if back else (a, b) for a, b in layout.names.items()]
    if back:
        pairs.sort(key=lambda pair: -pair[0].count("."))
    for old, new in pairs:
        path = re.sub(rf"(?<![^.]){re.escape(old)}(?![^.])", new, path, count=1)
    return path


# --- reading ---------------------------------------------------------------------------------------------------


def read_layout(folder: Path, layout: AdapterLayout, heads: AttentionSizes | None = None) -> PlainAdapter:
    """Read an adapter folder as plain updates.

    Args:
        folder: the folder with ``adapter_config.json`` and ``adapter_model.safetensors``.
        layout: the folder's layout.
        heads: the base's attention sizes; needed if the layout stores rotated rows in pairs.

    Raises:
        GraftError: GC069 for a folder that is not plain LoRA or does not fit the layout; GC110 to GC113 as in
            `read_peft`.
    """
    read = _peft if layout.factors == ("lora_A", "lora_B") else _torchtune
    config, entries = read(folder, layout)
    updates: dict[str, Update] = {}
    for path, update in _gathered(entries, folder):
        if layout.rotary and path.endswith((".q_proj", ".k_proj")):
            update = replace(update, up=as_halves(update.up, _heads(heads, path, layout)))
        updates[path] = update
    if not updates:
        raise GraftError("GC069", "the folder has no LoRA", place=Place(str(folder)))
    return PlainAdapter(updates, {name: value for name in _ABOUT if (value := config.value(name))})


def _peft(folder: Path, layout: AdapterLayout) -> tuple[AdapterConfig, list[tuple[str, Update]]]:
    paths = {re.sub(r"(\.base_layer)*\.lora_\w+(\.weight)?$", "", key) for key in raw_keys(folder)}
    owners = [path.removeprefix(layout.prefix) for path in paths if path.endswith(".experts")]
    # In transformers' order, which is also the order in which PEFT wraps them.
    shapes = {f"{owner}.{name}": () for owner in owners for name in ("gate_up_proj", "down_proj")}
    adapter = read_peft(folder, shapes=shapes)
    _require_plain(adapter)
    updates = (update for module in adapter.modules for update in _updates(adapter, module, layout))
    return adapter.config, [(named(layout, path, back=True), update) for path, update in updates]


def _require_plain(adapter: PeftAdapter) -> None:
    """Raise if an adapter contains anything that a LoRA layout cannot store.

    Raises:
        GraftError: GC069, which lists every reason.
    """
    reasons = []
    for module in adapter.modules:
        spec = module.spec
        if type(spec) is not LoRA:
            reasons.append(f"{module.name} is adapted by {spec.method}")
        elif spec.init in ("pissa", "olora"):
            reasons.append(f"{module.name} is relative to factors of the base ({spec.init})")
    reasons += [f"{name} is trained in full" for name in adapter.trained]
    release = release_of(adapter.config)
    if release is not None and release < SINCE and any(module.named for module in adapter.modules):
        reasons.append(f"PEFT {adapter.config.peft_version} wrote the factors of experts in swapped order")
    # PEFT saves adapted embeddings and heads with the adapter; those that are not adapted may have rows of their own.
    adapted = {module.path for module in adapter.modules}
    reasons += [f"{name} was saved in full" for name in adapter.copies if name.rpartition(".")[0] not in adapted]
    if reasons:
        hint = "import it with graftc import-peft, and convert the artifact to a LoRA with graftc convert"
        if any(isinstance(module.spec, Invoked) for module in adapter.modules):
            hint = "import it with graftc import-peft, and export the artifact with --no-merge --format gguf"
        message = f"it is not just a LoRA of linear maps: {reasons[0]}"
        raise GraftError("GC069", message, place=adapter.place, hint=hint, details=tuple(dict.fromkeys(reasons)))


def _updates(adapter: PeftAdapter, module: PeftModule, layout: AdapterLayout) -> Iterator[tuple[str, Update]]:
    assert isinstance(module.spec, LoRA)
    if lacking := [f"lora_{part}" for part in "AB" if part not in module.keys]:
        raise GraftError("GC113", f"{module.path} has no {lacking[0]} in the file", place=adapter.place)
    down, up = (adapter.tensor(module.keys[part]) for part in ("A", "B"))
    table = "embedding" in module.keys["A"]
    fused = {"gate_up_proj", "down_proj"} & {module.parameter}
    if module.parameter == "weight" and module.path.endswith(".experts"):
        fused = {"gate_up_proj" if module.depth else "down_proj"}
    scale = module.spec.scaling
    try:
        if not fused:
            yield module.path, Update(*_expanded(down, up), scale, table)
            return
        experts = down.shape[0] // module.spec.rank
        down = down.reshape(experts, -1, down.shape[-1])
        if layout.experts == "flat_by_expert":
            up = up.reshape(up.shape[0], experts, -1).transpose(0, 1)
        else:
            up = up.reshape(up.shape[0], -1, experts).permute(2, 0, 1)
        update = Update(down, up, scale)
    except (ValueError, RuntimeError, ZeroDivisionError) as error:
        message = f"{module.keys['A']} and {module.keys['B']} do not fit together: {error}"
        raise GraftError("GC069", message, place=adapter.place) from None
    if fused == {"down_proj"}:
        yield f"{module.path}.down_proj", update
    else:
        half = update.rows // 2
        yield from zip(
            (f"{module.path}.gate_proj", f"{module.path}.up_proj"),
            apart(update, [half, update.rows - half]),
            strict=True,
        )


def _expanded(down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Return the factors, with a factor that all experts share expanded to one per expert."""
    if down.dim() == up.dim() == 3 and 1 in (len(down), len(up)):
        count = max(len(down), len(up))
        return down.expand(count, -1, -1), up.expand(count, -1, -1)
    return down, up


def _torchtune(folder: Path, layout: AdapterLayout) -> tuple[AdapterConfig, list[tuple[str, Update]]]:
    config = read_config(config_bytes(folder / CONFIG), str(folder / CONFIG))
    scale = _scale(config)
    keys = adapter_tensors(folder / WEIGHTS)
    words = [f".{word}.weight" for word in layout.factors]
    unknown = [key for key in keys if not key.endswith(tuple(words))]
    if unknown:
        raise GraftError(
            "GC069", f"it is not a LoRA of {layout.name}: {some(unknown)}", place=Place(str(folder / WEIGHTS))
        )
    entries = []
    for key in (key for key in keys if key.endswith(words[0])):
        path = key.removesuffix(words[0])
        if f"{path}{words[1]}" not in keys:
            raise GraftError("GC069", f"{path} has no {layout.factors[1]}", place=Place(str(folder / WEIGHTS)))
        down, up = keys[key], keys[f"{path}{words[1]}"]
        entries.append((named(layout, path.removeprefix(layout.prefix), back=True), _update(down, up, scale, key)))
    return config, entries


def _update(down: Tensor, up: Tensor, scale: float, key: str) -> Update:
    try:
        return Update(down, up, scale)
    except ValueError as error:
        raise GraftError("GC069", f"{key}: {error}") from None


def _scale(config: AdapterConfig) -> float:
    rank, alpha = config.value("r", 8), config.value("lora_alpha", 8)
    if not isinstance(rank, int) or not isinstance(alpha, int | float) or rank < 1:
        raise GraftError("GC111", "r and lora_alpha must be numbers", place=Place(CONFIG))
    return float(alpha) / (rank**0.5 if config.value("use_rslora", False) else rank)


def _gathered(entries: Iterable[tuple[str, Update]], folder: Path) -> Iterator[tuple[str, Update]]:
    """Yield the updates, with separate experts stacked into one update per projection.

    Raises:
        GraftError: GC069 for experts that are missing or whose sizes differ.
    """
    each: dict[str, dict[int, Update]] = {}
    for path, update in entries:
        one, stack = _EACH.fullmatch(path), _STACKED.fullmatch(path)
        if one is not None:
            each.setdefault(f"{one['module']}.{one['map']}", {})[int(one["expert"])] = update
        elif stack is not None and update.down.dim() == 3:
            word = next(ours for ours, theirs in STACKED.items() if theirs == stack["map"])
            yield f"{stack['module']}.{word}", update
        else:
            yield path, update
    for path, experts in each.items():
        missing = sorted(set(range(max(experts) + 1)) - experts.keys())
        if missing:
            message = f"experts {some([str(number) for number in missing])} of {path} are missing"
            raise GraftError("GC069", message, place=Place(str(folder / WEIGHTS)))
        rank, scale = max(u.rank for u in experts.values()), experts[0].scale
        even = [experts[number].scaled(scale).padded(rank) for number in range(len(experts))]
        try:
            yield path, Update(torch.stack([u.down for u in even]), torch.stack([u.up for u in even]), scale)
        except RuntimeError as error:
            raise GraftError("GC069", f"the experts of {path} have different sizes: {error}") from None


# --- writing ---------------------------------------------------------------------------------------------------


def write_layout(
    adapter: PlainAdapter, layout: AdapterLayout, folder: Path, heads: AttentionSizes | None = None
) -> None:
    """Write an adapter folder, which must not exist yet.

    Raises:
        GraftError: GC069 for content that the layout cannot store.
        OSError: if the folder cannot be written.
    """
    tensors, config = laid_out(adapter, layout, heads)
    folder.mkdir()
    save_tensors(tensors, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8", newline="\n")


def laid_out(
    adapter: PlainAdapter, layout: AdapterLayout, heads: AttentionSizes | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return an adapter's tensors, by key, and its config in a layout.

    Raises:
        GraftError: GC069 for content that the layout cannot store.
    """
    _require_place(adapter, layout)
    updates = dict(_fused(adapter.updates)) if layout.experts in ("flat", "flat_by_expert") else dict(adapter.updates)
    scales = Counter(update.scale for update in updates.values())
    usual = scales.most_common(1)[0][0]
    if layout.uniform:
        rank = max(update.rank for update in updates.values())
        updates = {path: update.scaled(usual).padded(rank) for path, update in updates.items()}
    tensors: dict[str, Tensor] = {}
    for path, update in updates.items():
        if layout.rotary and path.endswith((".q_proj", ".k_proj")):
            update = replace(update, up=as_pairs(update.up, _heads(heads, path, layout)))
        for key, value in _keyed(path, update, layout, updates):
            tensors[key] = value.contiguous()
    return tensors, _config(adapter, updates, layout)


def _require_place(adapter: PlainAdapter, layout: AdapterLayout) -> None:
    reasons = []
    if layout.experts is None and adapter.has_experts:
        reasons.append("experts")
    if not layout.tables and any(update.table for update in adapter.updates.values()):
        reasons.append("embedding tables")
    if reasons:
        message = f"the layout {layout.name} cannot store adapters for {' and '.join(reasons)}"
        raise GraftError("GC069", message, hint="use the layout peft or vllm")


def _fused(updates: Mapping[str, Update]) -> Iterator[tuple[str, Update]]:
    """Yield the updates with the experts' gate and up projections in one map, as transformers stores them."""
    for path, update in updates.items():
        match = EXPERT.fullmatch(path)
        if match is None or match["map"] == "down_proj":
            yield path, update
            continue
        gate, up = (updates.get(f"{match['module']}.{word}") for word in ("gate_proj", "up_proj"))
        if match["map"] == "gate_proj" or gate is None:
            yield f"{match['module']}.gate_up_proj", together([gate, up], [update.rows, update.rows])


def _keyed(
    path: str, update: Update, layout: AdapterLayout, updates: Mapping[str, Update]
) -> Iterator[tuple[str, Tensor]]:
    words = [f".lora_embedding_{word}" for word in "AB"] if update.table else [f".{w}.weight" for w in layout.factors]
    for place, factors in _placed(path, update, layout, updates):
        yield from zip((f"{layout.prefix}{place}{word}" for word in words), factors, strict=True)


def _placed(
    path: str, update: Update, layout: AdapterLayout, updates: Mapping[str, Update]
) -> Iterator[tuple[str, tuple[Tensor, Tensor]]]:
    """Yield the pairs of factors that store an update in a layout, each with its path."""
    module, _, last = path.rpartition(".")
    if update.experts is None:
        yield named(layout, path), (update.down, update.up)
    elif layout.experts == "each":
        for number in range(update.experts):
            yield f"{module}.{number}.{last}", (update.down[number], update.up[number])
    elif layout.experts == "stacked":
        yield f"{module}.{STACKED[last]}", (update.down, update.up)
    else:
        # The parameter that PEFT wraps last is the outer one.
        inner = last == "gate_up_proj" and f"{module}.down_proj" in updates
        shaped, up = Shaped(experts=update.experts), update.up
        up = up.transpose(0, 1).flatten(1) if layout.experts == "flat_by_expert" else to_theirs("up", up, shaped)
        yield f"{module}.base_layer" if inner else module, (to_theirs("down", update.down, shaped), up)


def _config(adapter: PlainAdapter, updates: Mapping[str, Update], layout: AdapterLayout) -> dict[str, Any]:
    rank = Counter(update.rank for update in updates.values()).most_common(1)[0][0]
    usual = Counter(update.scale for update in updates.values() if update.rank == rank).most_common(1)[0][0]
    modules = [path for path, update in updates.items() if update.experts is None]
    experts = [path for path, update in updates.items() if update.experts is not None]
    flat = layout.experts in ("flat", "flat_by_expert")
    # A last name would also select the modules of other layers, which the adapter may leave alone.
    exact = [] if layout.names else modules
    rest = [] if flat else [path for path in (*modules, *experts) if path not in exact]
    targets = [*exact, *sorted({named(layout, path).rpartition(".")[2] for path in rest})]
    config: dict[str, Any] = {
        **{"peft_type": "LORA", "r": rank, "lora_alpha": _number(usual * rank), "target_modules": targets},
        **{"lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": False, "inference_mode": True, "use_rslora": False},
        **{"modules_to_save": None, "task_type": None, "base_model_name_or_path": None},
        **adapter.about,
    }
    if flat and experts:
        config["target_parameters"] = sorted({".".join(path.split(".")[-3:]) for path in experts}, reverse=True)
    if not layout.uniform:
        ranks = {path: update.rank for path, update in updates.items() if update.rank != rank}
        alphas = {path: _number(u.scale * u.rank) for path, u in updates.items() if u.scale * u.rank != usual * rank}
        config |= {"rank_pattern": ranks, "alpha_pattern": alphas}
    return config


def _number(value: float) -> int | float:
    return int(value) if float(value).is_integer() else value


def _heads(heads: AttentionSizes | None, path: str, layout: AdapterLayout) -> int:
    if heads is None:
        hint = "name the base that the adapter is for: --model MODEL"
        raise GraftError("GC069", f"the layout {layout.name} depends on the heads of {path}", hint=hint)
    return heads.queries if path.endswith(".q_proj") else heads.keys
