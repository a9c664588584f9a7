"""The peak memory of a process in sharded training, measured in processes that `tests.runtime.processes` starts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import graftc
from tests.applications.planner.measured_memory import peak_of_training
from tests.runtime.model.distributed_jobs import sharded

BATCH, LENGTH = 2, 64
ROLES = ["attn.q", "attn.k", "attn.v", "attn.o", "ffn.gate", "ffn.up", "ffn.down"]
SPECS: dict[str, dict[str, Any]] = {
    "lora": {"adapt": [{"method": "lora", "rank": 8, "target": {"role": ROLES}}]},
    "full": {"adapt": [{"method": "full", "target": {"modules": "**.mlp.*"}}], "checkpoint": "layers"},
}


def base() -> nn.Module:
    """A Llama with most of its parameters in its layers."""
    config = LlamaConfig(
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=6,
        num_attention_heads=4,
        vocab_size=500,
        use_cache=False,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).requires_grad_(False)


def measure(rank: int, processes: int, folder: Path, name: str) -> None:
    """Write the lowest and the highest peak of the first process over five trainings, and the plan for it.

    The number of tensors gathered at a time depends on when the other process answers.
    """
    ids = torch.ones(BATCH, LENGTH, dtype=torch.int64)
    batch = {"input_ids": ids, "attention_mask": ids, "labels": ids}
    compiled = graftc.compile(SPECS[name], base(), batch)
    peaks = [
        peak_of_training(
            compiled,
            batch,
            lambda model: torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], foreach=False),
            lambda model: sharded(model, processes),
        )
        for _ in range(5)
    ]
    if rank == 0:
        plan = graftc.plan(SPECS[name], base(), batch=BATCH, sequence=LENGTH, device="cpu", devices=processes)
        (folder / f"{name}.json").write_text(json.dumps({"least": min(peaks), "most": max(peaks), **plan.to_json()}))
