"""The memory for training LLaMA according to the planner, beside the table of the SpIEL paper's authors.

    python -m benchmarks.planner [--sizes 7B 13B] [--out benchmarks/results]

Writes planner.json and planner.md. Models are on the meta device. The setting is that of the authors' script: a
micro-batch of one row of 2048 tokens, gradients of other micro-batches, rank 64, and as many entries, on all
projections.

Cells are planned as graftc trains them, without dropout. The authors trained LoRA with PEFT and dropout 0.1: cells
named PEFT plan a model with such modules (`PeftLinear`) that trains as in plain PyTorch, which graftc plans like any
other model. They are the peak without originals (`MemoryPlan.originals`), which graftc keeps for weights that it trains
and PEFT does not, and with the float32 logits that the authors' loop keeps alive. Factors are in float32, as PEFT
creates them; qLoRA also has cells with bfloat16, which the released script sets for it. That script also pages the
state of qLoRA's optimiser, which is counted here.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import nn

import graftc
from benchmarks.command import command_line, write

ROLES = ["attn.q", "attn.k", "attn.v", "attn.o", "ffn.gate", "ffn.up", "ffn.down"]
RANK, BATCH, SEQUENCE = 64, 1, 2048
VOCABULARY = 32_000
METHODS: dict[str, dict[str, Any]] = {
    "LoRA": {"method": "lora", "rank": RANK, "target": {"role": ROLES}},
    "SpIEL-AG": {"method": "spiel", "variant": "AG", "equivalent_rank": RANK},
    "SpIEL-MA": {"method": "spiel", "variant": "MA", "equivalent_rank": RANK},
}
SIZES: dict[str, dict[str, int]] = {
    "7B": {},
    "13B": {
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "num_key_value_heads": 40,
    },
}
PUBLISHED: dict[str, dict[str, tuple[int, int]]] = {
    "LoRA": {"7B": (40, 18), "13B": (66, 31)},
    "SpIEL-AG": {"7B": (34, 20), "13B": (56, 36)},
    "SpIEL-MA": {"7B": (30, 17), "13B": (51, 31)},
    "qLoRA": {"7B": (30, 8), "13B": (46, 12)},
    "qSpIEL-AG": {"7B": (26, 13), "13B": (40, 19)},
    "qSpIEL-MA": {"7B": (22, 10), "13B": (35, 14)},
}
"""The published GB without and with checkpointing, in bfloat16, on an A100; a q marks a 4-bit base."""

QUANTISED: dict[str, Any] = {"quantize": "nf4", "double": True}

ASKED = 2.0
"""The GB by which cells may differ: those in bfloat16 with checkpointing as graftc trains them, and all of qLoRA's as
PEFT trains them, with factors in float32."""

DROPOUT, ALPHA = 0.1, 16

PLAIN: dict[str, Any] = {"optimise": {"off": ["projections", "recompute"]}}
"""The part of a spec that trains as in plain PyTorch."""

HELD = BATCH * SEQUENCE * VOCABULARY * 4
"""Bytes of logits in float32. The authors' version of transformers returns them, and their loop keeps the outputs until
the next ones; the planner counts a loop that keeps only the loss."""


class PeftLinear(nn.Module):
    """A linear map with LoRA as PEFT computes it: with its own dropout, in the dtype of the factors.

    Args:
        base: the map.
        factors: the dtype of the factors.
    """

    def __init__(self, base: nn.Linear, factors: torch.dtype) -> None:
        super().__init__()
        self.base = base
        with torch.device(base.weight.device):
            self.lora_A = nn.Linear(base.in_features, RANK, bias=False, dtype=factors)
            self.lora_B = nn.Linear(RANK, base.out_features, bias=False, dtype=factors)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the map to ``x: [..., in]``; the result has the dtype of `x`."""
        # As nn.Dropout runs on CUDA, with a mask of one byte per element; on a CPU the mask has the input's dtype.
        dropped, _ = torch.native_dropout(x.to(self.lora_A.weight.dtype), DROPOUT, self.training)
        update = self.lora_B(self.lora_A(dropped)) * (ALPHA / RANK)
        return (self.base(x) + update).to(x.dtype)


def with_peft_modules(model: nn.Module, factors: torch.dtype) -> nn.Module:
    """Replace the projections of the model by `PeftLinear`, in place, and return it."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name.endswith("_proj"):
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, PeftLinear(module, factors))
    return model


def llama(size: str) -> nn.Module:
    """Build LLaMA in bfloat16 on the meta device."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        model: nn.Module = LlamaForCausalLM._from_config(LlamaConfig(**SIZES[size]), dtype=torch.bfloat16)
    return model


def planned(method: str, size: str, checkpoint: bool, peft: torch.dtype | None = None) -> graftc.MemoryPlan:
    """Plan a cell.

    Args:
        method: a row of `PUBLISHED`.
        size: the size of the model.
        checkpoint: whether layers are recomputed in the backward pass.
        peft: the dtype of the factors if LoRA is PEFT's and trains as in plain PyTorch; None to train with graftc.
    """
    model, quantised = llama(size), QUANTISED if method.startswith("q") else {}
    spec: dict[str, Any] = {"adapt": [METHODS[method.removeprefix("q")]]}
    if peft is not None:
        factors = ["**.lora_A", "**.lora_B"]
        # In their own dtype: the trained copies of 16-bit weights would be float32 otherwise.
        trained = {"method": "full", "target": {"modules": factors}, "dtype": "base"}
        model, spec = with_peft_modules(model, peft), {"adapt": [trained], **PLAIN}
        quantised = {**quantised, "skip": factors} if quantised else {}
    return graftc.plan(
        {**spec, **({"base": quantised} if quantised else {})},
        model,
        batch=BATCH,
        sequence=SEQUENCE,
        checkpoint=checkpoint,
        accumulate=True,
    )


def bytes_of_cell(plan: graftc.MemoryPlan, peft: torch.dtype | None = None) -> int:
    """Return the bytes that are compared with the published figure; the arguments are those of `planned`."""
    return plan.peak if peft is None else plan.peak - plan.originals + HELD


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; return 1 if a cell differs by more than the tolerance."""
    prog = "python -m benchmarks.planner"
    parser = argparse.ArgumentParser(prog=prog, description="What training LLaMA takes by the planner.")
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(SIZES), help="sizes of the model")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="where files are written")
    options = parser.parse_args(arguments)
    cells = list(_cells(options.sizes))
    data = {
        "command": command_line(prog, arguments),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "batch": BATCH,
        "sequence": SEQUENCE,
        "rank": RANK,
        "cells": cells,
    }
    write(options.out, "planner", data, "\n".join(_lines(data)) + "\n")
    return int(any(_is_asked(cell) and abs(cell["error"]) > ASKED for cell in cells))


def _is_asked(cell: Mapping[str, Any]) -> bool:
    return bool(cell["method"] == "qLoRA, PEFT" or (cell["checkpoint"] and cell["method"] in METHODS))


def _cells(sizes: Sequence[str]) -> Iterator[dict[str, Any]]:
    for size in sizes:
        for method in PUBLISHED:
            for (name, peft), checkpoint in itertools.product(_kinds(method).items(), (True, False)):
                started = time.perf_counter()
                plan = planned(method, size, checkpoint, peft)
                published = PUBLISHED[method][size][checkpoint]
                gb = bytes_of_cell(plan, peft) / 1e9
                cell = {"size": size, "method": name, "checkpoint": checkpoint, "published": published}
                print(f"{size} {name} {checkpoint}: {gb:.1f} GB, {published} published", file=sys.stderr)
                seconds = time.perf_counter() - started
                yield {**cell, "planned": gb, "error": gb - published, "seconds": seconds, "plan": plan.to_json()}


def _kinds(method: str) -> dict[str, torch.dtype | None]:
    """Return the variants planned beside the published figures of a method, by name; values are `peft` of `planned`."""
    kinds: dict[str, torch.dtype | None] = {method: None}
    if method.endswith("LoRA"):
        kinds[f"{method}, PEFT"] = torch.float32
    if method == "qLoRA":
        kinds[f"{method}, PEFT, bfloat16 factors"] = torch.bfloat16
    return kinds


def _lines(data: Mapping[str, Any]) -> Iterator[str]:
    yield "# What training LLaMA takes: planned and published"
    yield ""
    yield f"Made by `{data['command']}` on {data['date']}; [how to read it](../README.md)."
    yield ""
    yield (
        f"bfloat16, rank {data['rank']} and as many entries on all projections, {data['batch']} x {data['sequence']} "
        "tokens a micro-batch, gradients accumulated; GB are 1e9 bytes, errors are planned less published. "
        "Cells named PEFT are without `originals`, which are part of `base` here and which PEFT does not have, "
        f"and with {HELD / 1e9:.2f} GB of logits that the authors' loop holds on to."
    )
    yield ""
    parts = {"base": "frozen", "originals": "originals", "adapter": "trainable", "buffers": "buffers"}
    parts |= {"state": "optimizer_state", "step": "step", "update": "update"}
    yield f"| | layers again | planned | published | error | {' | '.join(parts)} | s |"
    yield "| --- | --- " + "| ---: " * (len(parts) + 4) + "|"
    for cell in data["cells"]:
        plan = cell["plan"]
        row = [f"{cell['method']} {cell['size']}", "yes" if cell["checkpoint"] else "no", f"{cell['planned']:.1f}"]
        row += [str(cell["published"]), f"{cell['error']:+.1f}"]
        row += [*(f"{plan[part] / 1e9:.2f}" for part in parts.values()), f"{cell['seconds']:.0f}"]
        yield "| " + " | ".join(row) + " |"


if __name__ == "__main__":
    sys.exit(main())
