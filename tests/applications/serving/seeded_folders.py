"""Folders that engines load, made by a seeded generator over fields, names, ranks and scales.

Each case knows what its folder means: the update of every weight. Those with a defect are loaded by their engine,
which then computes something else without an error; the others are computed as meant.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

MODULES = {
    **{f"self_attn.{name}_proj": name for name in "qkvo"},
    **{f"mlp.{name}_proj": name for name in ("gate", "up", "down")},
}
GGUF_NAMES = {
    **{"q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_output"},
    **{"gate": "ffn_gate", "up": "ffn_up", "down": "ffn_down"},
}
LAYERS, HEADS, GROUPS = 2, 4, 2
PREFIX = "base_model.model."


@dataclass
class Draft:
    """An adapter before it is written.

    Attributes:
        random: the source of everything that is drawn.
        pairs: the factors by module.
        config: the contents of ``adapter_config.json``.
        scales: the scale of each module, as PEFT defines it.
    """

    random: random.Random
    pairs: dict[str, tuple[Tensor, Tensor]]
    config: dict[str, Any]
    scales: dict[str, float]
    names: Callable[[str], str] = field(default=lambda path: path)
    alpha: bool = True
    norms: bool = False

    @property
    def updates(self) -> dict[str, Tensor]:
        """The update of each weight."""
        return {f"{path}.weight": self.scales[path] * (b @ a) for path, (a, b) in self.pairs.items()}

    def without(self, paths: list[str]) -> dict[str, Tensor]:
        """Return the updates of all other modules."""
        return {name: value for name, value in self.updates.items() if name.removesuffix(".weight") not in paths}


@dataclass(frozen=True)
class SeededCase:
    """A folder or a file.

    Attributes:
        name: its name, with its defect.
        engine: the engine that it is for.
        path: where it is.
        updates: what it means: the update of every weight of the base.
    """

    name: str
    engine: str
    path: Path
    updates: dict[str, Tensor]


def draft(seed: int, shapes: dict[str, tuple[int, int]], *, fused: bool = False) -> Draft:
    """Draw modules, a rank, a scale and factors.

    Args:
        seed: the seed.
        shapes: the shape ``[out, in]`` of each module's weight.
        fused: whether an engine fuses q, k and v, so that all of them have to be adapted.
    """
    own = random.Random(seed)
    words = own.sample(sorted(MODULES), own.randint(2, 5)) if not fused else []
    words = words or [f"self_attn.{name}_proj" for name in "qkv"] + own.sample(["self_attn.o_proj", "mlp.down_proj"], 1)
    rank, alpha = own.choice([2, 3, 4, 8]), own.choice([3, 8, 12, 16])
    generator = torch.Generator().manual_seed(seed)
    pairs = {}
    for path, (rows, columns) in shapes.items():
        if path.split(".", 3)[3] in words:
            a = torch.randn(rank, columns, generator=generator) / columns**0.5
            pairs[path] = a, torch.randn(rows, rank, generator=generator) * 0.7
    config = {
        **{"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": alpha, "bias": "none"},
        **{"target_modules": sorted(word.rpartition(".")[2] for word in words), "use_rslora": False},
        **{"rank_pattern": {}, "alpha_pattern": {}, "init_lora_weights": True, "lora_dropout": 0.0},
    }
    return Draft(own, pairs, config, dict.fromkeys(pairs, alpha / rank))


def write_peft(adapter: Draft, folder: Path, base: Path) -> Path:
    """Write a PEFT folder."""
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(
        json.dumps({**adapter.config, "base_model_name_or_path": str(base)}), encoding="utf-8"
    )
    tensors = {}
    for path, (a, b) in adapter.pairs.items():
        tensors |= {f"{PREFIX}{adapter.names(path)}.lora_{part}.weight": t for part, t in (("A", a), ("B", b))}
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / "adapter_model.safetensors")
    return folder


def write_gguf(adapter: Draft, file: Path) -> Path:
    """Write a GGUF adapter as llama.cpp's converter does, with the rows of q and k in pairs."""
    import gguf

    file.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    if adapter.alpha:
        writer.add_float32("adapter.lora.alpha", float(adapter.config["lora_alpha"]))
    for path, (a, b) in adapter.pairs.items():
        layer, word = path.split(".")[2], MODULES[path.split(".", 3)[3]]
        heads = {"q": HEADS, "k": GROUPS}.get(word)
        if heads is not None:
            b = b.reshape(heads, 2, -1, b.shape[1]).transpose(1, 2).reshape(b.shape)
        for part, tensor in (("lora_a", a), ("lora_b", b)):
            writer.add_tensor(f"blk.{layer}.{GGUF_NAMES[word]}.weight.{part}", tensor.contiguous().numpy())
    if adapter.norms:
        size = next(a.shape[1] for path, (a, _) in adapter.pairs.items() if "down" not in path)
        writer.add_tensor("blk.0.attn_norm.weight", torch.full((size,), 3.0).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


# --- defects: each changes a draft, and returns what the folder means ----------------------------------------------


def other_names(adapter: Draft) -> dict[str, Tensor]:
    """Give modules names that the base does not have, with last segments that it has."""
    change = adapter.random.choice(
        [
            lambda path: path.removeprefix("model."),
            lambda path: f"model.{path}",
            lambda path: path.replace("model.", "language_model.model.", 1),
            lambda path: path.replace("layers.1", f"layers.{LAYERS + 5}"),
            lambda path: path.replace("self_attn", "attention").replace("mlp", "feed_forward"),
        ]
    )
    adapter.names = change
    return adapter.updates


def not_selected(adapter: Draft) -> dict[str, Tensor]:
    """Leave one of the adapted modules out of ``target_modules``, as PEFT then leaves it as it is."""
    left = adapter.random.choice(adapter.config["target_modules"])
    adapter.config["target_modules"] = [word for word in adapter.config["target_modules"] if word != left]
    return adapter.without([path for path in adapter.pairs if path.endswith(left)])


def one_layer(adapter: Draft) -> dict[str, Tensor]:
    """Restrict the adapter to one layer with ``layers_to_transform``, though the file has both."""
    layer = adapter.random.randrange(LAYERS)
    adapter.config["layers_to_transform"] = [layer]
    return adapter.without([path for path in adapter.pairs if f"layers.{layer}." not in path])


def other_rank(adapter: Draft) -> dict[str, Tensor]:
    """State another rank than the factors have, and so another scale."""
    meant = adapter.updates
    adapter.config["r"] *= adapter.random.choice([2, 4])
    return meant


def rslora(adapter: Draft) -> dict[str, Tensor]:
    """Scale by ``alpha / sqrt(rank)``."""
    adapter.config["use_rslora"] = True
    adapter.scales = {path: scale * adapter.config["r"] ** 0.5 for path, scale in adapter.scales.items()}
    return adapter.updates


def own_alpha(adapter: Draft) -> dict[str, Tensor]:
    """Give one kind of module an alpha of its own."""
    word = adapter.random.choice(adapter.config["target_modules"])
    alpha = adapter.config["lora_alpha"] * adapter.random.choice([3, 5])
    adapter.config["alpha_pattern"] = {word: alpha}
    adapter.scales |= {path: alpha / adapter.config["r"] for path in adapter.pairs if path.endswith(word)}
    return adapter.updates


def pissa(adapter: Draft) -> dict[str, Tensor]:
    """State an initialisation that has changed the base."""
    adapter.config["init_lora_weights"] = adapter.random.choice(["pissa", "pissa_niter_4", "olora", "corda"])
    return adapter.updates


def no_alpha(adapter: Draft) -> dict[str, Tensor]:
    """Leave alpha out of a GGUF file: it is twice the rank or more, while llama.cpp then multiplies by 1."""
    factor = adapter.random.choice([2, 3, 5])
    adapter.scales = dict.fromkeys(adapter.pairs, float(factor))
    adapter.alpha = False
    return adapter.updates


def with_norms(adapter: Draft) -> dict[str, Tensor]:
    """Add the weight of a norm to a GGUF file."""
    adapter.norms = True
    return {**adapter.updates, "model.layers.0.input_layernorm.weight": torch.tensor(2.0)}


def nothing(adapter: Draft) -> dict[str, Tensor]:
    """Leave the adapter as it is."""
    return adapter.updates


Defect = Callable[[Draft], dict[str, Tensor]]
DEFECTS: dict[str, tuple[tuple[Defect, int], ...]] = {
    "vllm": ((other_names, 5), (not_selected, 3), (one_layer, 3), (other_rank, 3)),
    "sglang": ((rslora, 3), (own_alpha, 2), (pissa, 2)),
    "tensorrt-llm": ((own_alpha, 2), (other_names, 2)),
    "mistralrs": ((one_layer, 4),),
    "llama.cpp": ((no_alpha, 4), (with_norms, 3)),
    "openvino": ((nothing, 4),),
}
"""The defects of each engine's folders, with the number of folders that have it: 40 in all."""

GOOD: dict[str, tuple[tuple[Defect, int], ...]] = {
    "vllm": ((nothing, 4), (rslora, 4), (own_alpha, 4)),
    "sglang": ((nothing, 6),),
    "tensorrt-llm": ((nothing, 2), (rslora, 2)),
    "mistralrs": ((nothing, 4), (rslora, 4), (own_alpha, 4)),
    "llama.cpp": ((nothing, 6),),
}
"""Folders that the engines compute as they are meant: 40 in all."""


def cases(
    table: dict[str, tuple[tuple[Defect, int], ...]], folder: Path, base: Path, shapes: dict[str, tuple[int, int]]
) -> Iterator[SeededCase]:
    """Write the folders of a table, and yield them."""
    seed = 0
    for engine, defects in table.items():
        for defect, count in defects:
            for _ in range(count):
                seed += 1
                adapter = draft(seed, shapes, fused=engine == "sglang")
                name = f"{engine}-{defect.__name__}-{seed}"
                updates = defect(adapter)
                if engine == "llama.cpp":
                    path = write_gguf(adapter, folder / f"{name}.gguf")
                else:
                    path = write_peft(adapter, folder / name, base)
                yield SeededCase(name, engine, path, updates)
