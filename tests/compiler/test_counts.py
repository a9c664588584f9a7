"""Published counts of trainable parameters, from configs alone on the meta device, in bounded time and memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

import pytest

SECONDS, BYTES = 30.0, 2 * 2**30

_SCRIPT = """
import json, resource, sys
import torch, transformers, graftc
name, config, values, spec = json.loads(sys.argv[1])
config = getattr(transformers, config)(**values)
with torch.device("meta"):
    model = getattr(transformers, name)(config)
report = graftc.check(spec, model, cache=False).to_json()
usage = resource.getrusage(resource.RUSAGE_SELF)
report["peak"] = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
try:  # on Linux ru_maxrss begins with that of the process that started this one
    with open("/proc/self/status") as status:
        report["peak"] = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
except OSError:
    pass
report["seconds"] = usage.ru_utime + usage.ru_stime
print(json.dumps(report))
"""


@dataclass(frozen=True)
class Count:
    """One published count: ``sites`` adapted places with ``trainable`` parameters in total."""

    model: str
    config: str
    values: dict[str, Any]
    roles: list[str]
    rank: int
    sites: int
    trainable: int
    percent: float | None = None


LLAMA_7B = Count(
    *("LlamaForCausalLM", "LlamaConfig", {}),  # the defaults of LlamaConfig are those of LLaMA-7B
    roles=["attn.q", "attn.k", "attn.v", "ffn.up", "ffn.down"],
    rank=32,
    sites=5 * 32,
    trainable=56_098_816,
    percent=0.826,
)
ROBERTA_LARGE = Count(
    *("RobertaForSequenceClassification", "RobertaConfig"),
    {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "vocab_size": 50265,
        "max_position_embeddings": 514,
        "type_vocab_size": 1,
    },
    roles=["attn.q", "attn.v"],
    rank=8,
    sites=2 * 24,
    trainable=786_432,
)
GPT2_MEDIUM = Count(
    *("GPT2LMHeadModel", "GPT2Config", {"n_embd": 1024, "n_layer": 24, "n_head": 16}),
    roles=["attn.q", "attn.v"],
    rank=4,
    sites=2 * 24,
    trainable=393_216,
)


@pytest.mark.full  # the same counts from two depths are in tests/compiler/test_published_counts.py
@pytest.mark.parametrize("count", [GPT2_MEDIUM, ROBERTA_LARGE, LLAMA_7B], ids=lambda c: c.config)
def test_count(count: Count) -> None:
    spec = {"adapt": [{"method": "lora", "target": {"role": count.roles}, "rank": count.rank}]}
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    argument = json.dumps([count.model, count.config, count.values, spec])
    done = subprocess.run([sys.executable, "-c", _SCRIPT, argument], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["trainable_parameters"] == report["deployed_parameters"] == count.trainable
    assert [entry["sites"] for entry in report["adaptations"]] == [count.sites]
    if count.percent is not None:
        assert round(report["percent"], 3) == count.percent
    assert report["peak"] < BYTES
    # Processor time of one thread, imports included; other processes on the machine do not count.
    assert report["seconds"] < SECONDS
