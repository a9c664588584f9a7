"""Merging a checkpoint of 4 GB file by file: memory, time, single layers against the formula, and twenty kills."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from graftc.passes.core.weights.folds import round_once
from tests.kit.places import ROOT
from tests.runtime.streaming.support import tensors

pytestmark = pytest.mark.gate

LAYERS, HIDDEN, INNER, VOCABULARY, RANK = 9, 4096, 11008, 32000, 16
MAPS = {
    **{f"self_attn.{name}_proj": (HIDDEN, HIDDEN) for name in "qkvo"},
    **{"mlp.gate_proj": (INNER, HIDDEN), "mlp.up_proj": (INNER, HIDDEN), "mlp.down_proj": (HIDDEN, INNER)},
}
CONFIG = {
    **{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN, "torch_dtype": "bfloat16"},
    **{"intermediate_size": INNER, "num_hidden_layers": LAYERS, "num_attention_heads": 32, "num_key_value_heads": 32},
    **{"vocab_size": VOCABULARY, "tie_word_embeddings": False, "hidden_act": "silu", "rms_norm_eps": 1e-5},
}
KILLS = int(os.environ.get("GRAFTC_KILLS", "20"))


def drawn(rng: torch.Generator, *shape: int) -> Tensor:
    """Return random values of 16 bits, repeated from one pool so that a gigabyte takes a second."""
    count, start = 1, int(torch.randint(0, 2**20, (), generator=rng))
    for size in shape:
        count *= size
    pool = (torch.randn(2**22, generator=torch.Generator().manual_seed(start)) * 0.02).bfloat16()
    return pool.repeat(-(-count // pool.numel()))[:count].view(shape).clone()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a base in eleven files and a LoRA of all its projections in peft's format."""
    folder = tmp_path_factory.mktemp("streaming")
    base, adapter = folder / "base", folder / "adapter"
    base.mkdir()
    adapter.mkdir()
    rng = torch.Generator().manual_seed(0)
    (base / "config.json").write_text(json.dumps(CONFIG))
    table: dict[str, str] = {}
    factors: dict[str, Tensor] = {}
    for number in range(LAYERS + 2):
        if number in (0, LAYERS + 1):
            name = "model.embed_tokens.weight" if number == 0 else "lm_head.weight"
            shard = {name: drawn(rng, VOCABULARY, HIDDEN)}
        else:
            layer = f"model.layers.{number - 1}"
            shard = {f"{layer}.{name}.weight": drawn(rng, *shape) for name, shape in MAPS.items()}
            norms = ("input_layernorm", "post_attention_layernorm")
            shard |= {f"{layer}.{name}.weight": torch.ones(HIDDEN, dtype=torch.bfloat16) for name in norms}
            for name, (rows, columns) in MAPS.items():
                key = f"base_model.model.{layer}.{name}"
                factors[f"{key}.lora_A.weight"] = torch.randn(RANK, columns, generator=rng) * 0.01
                factors[f"{key}.lora_B.weight"] = torch.randn(rows, RANK, generator=rng) * 0.01
        if number == LAYERS:
            shard["model.norm.weight"] = torch.ones(HIDDEN, dtype=torch.bfloat16)
        file = f"model-{number + 1:05d}-of-{LAYERS + 2:05d}.safetensors"
        save_file(shard, base / file, metadata={"format": "pt"})
        table |= dict.fromkeys(shard, file)
    size = sum(file.stat().st_size for file in base.glob("*.safetensors"))
    index = {"metadata": {"total_size": size}, "weight_map": table}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file(factors, adapter / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 32, "target_modules": [n.rpartition(".")[2] for n in MAPS]}
    config |= {"base_model_name_or_path": str(base), "task_type": "CAUSAL_LM", "inference_mode": True}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    assert size > 4e9
    yield folder
    shutil.rmtree(folder)


def command(*arguments: str | Path) -> list[str]:
    """Return the command line of the process that merges."""
    return [sys.executable, "-m", "tests.gates.streamed", *map(str, arguments)]


def environment() -> dict[str, str]:
    """Return an environment with one thread."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def test_memory_and_time(place: Path) -> None:
    start = time.perf_counter()
    shutil.copytree(place / "base", place / "copy")
    subprocess.run(["sync"], check=True)
    copying = time.perf_counter() - start
    shutil.rmtree(place / "copy")
    run = subprocess.run(
        command(place / "adapter", place / "merged"), env=environment(), capture_output=True, text=True, check=True
    )
    ours = json.loads(run.stdout)
    print(f"\nours: {ours}, copying alone takes {copying:.1f} s")
    assert ours["peak"] <= 500, "with all imports"
    peers = place / "peft"
    run = subprocess.run(
        command("peft", place / "adapter", peers), env=environment(), capture_output=True, text=True, check=True
    )
    theirs = json.loads(run.stdout)
    print(f"peft: {theirs}")
    assert ours["peak"] < theirs["peak"] / 5
    counts = compared(place, peers)
    print(f"entries that differ from peft's: {counts}")
    assert counts["farther"] == 0 and counts["nearer"] > 0
    shutil.rmtree(peers)


def compared(place: Path, peers: Path) -> dict[str, int]:
    """Count the entries in which peft's merge differs from graftc's, by which of the two is nearer to the exact value.

    The first and the last layer are compared; graftc's merge must be the exact value, rounded once.
    """
    factors, theirs = tensors(place / "adapter"), {}
    for file in sorted(peers.glob("*.safetensors")):
        with safe_open(str(file), "pt") as opened:
            theirs |= {name: file for name in opened.keys()}  # noqa: SIM118 - no mapping
    counts = {"nearer": 0, "farther": 0, "entries": 0}
    index = json.loads((place / "base" / "model.safetensors.index.json").read_text())["weight_map"]
    for layer in (0, LAYERS - 1):
        for name in MAPS:
            key = f"model.layers.{layer}.{name}"
            a, b = (factors[f"base_model.model.{key}.lora_{side}.weight"].double() for side in "AB")
            stored = f"{key}.weight"
            base, own = (one(place / folder / index[stored], stored) for folder in ("base", "merged"))
            exact = torch.addmm(base.double(), b, a, alpha=2.0)
            assert torch.equal(own, round_once(exact, torch.bfloat16)), key
            other = one(theirs[stored], stored)
            ours, peer = (own.double() - exact).abs_(), (other.double() - exact).abs_()
            counts["nearer"] += int((ours < peer).sum())
            counts["farther"] += int((ours > peer).sum())
            counts["entries"] += own.numel()
    return counts


def one(file: Path, name: str) -> Tensor:
    """Return one tensor of a file."""
    with safe_open(str(file), "pt") as opened:
        tensor: Tensor = opened.get_tensor(name)
    return tensor


def test_killed_and_resumed(place: Path) -> None:
    """A merge that is killed at random moments, again and again, ends with the same files."""
    out, rng, killed, rounds = place / "resumed", random.Random(0), 0, 0
    while killed < KILLS:
        process = subprocess.Popen(
            command(place / "adapter", out), env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        before = state(place)
        while process.poll() is None and state(place) == before:
            time.sleep(0.05)  # wait until it writes
        try:
            process.wait(20 * rng.random())
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            killed += process.wait() == -signal.SIGKILL
        if out.exists():
            rounds += 1
            same_files(place / "merged", out)
            shutil.rmtree(out)
    subprocess.run(command(place / "adapter", out), env=environment(), capture_output=True, check=True)
    print(f"\n{killed} kills, done {rounds + 1} times")
    same_files(place / "merged", out)
    assert not list(place.glob(".resumed.graftc-*"))


def state(place: Path) -> list[tuple[str, int, int]]:
    """Return what a merge has written so far, which changes as soon as one begins."""
    files = []
    for file in sorted(place.glob(".resumed.graftc-*/**/*")):
        with contextlib.suppress(FileNotFoundError):
            files.append((file.name, file.stat().st_size, file.stat().st_mtime_ns))
    return files


def same_files(a: Path, b: Path) -> None:
    """Check that two folders have the same files."""
    names = sorted(file.name for file in a.iterdir())
    assert names == sorted(file.name for file in b.iterdir())
    for name in names:
        assert subprocess.run(["cmp", "-s", a / name, b / name], check=False).returncode == 0, name


def test_the_result_loads(place: Path) -> None:
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(place / "merged", dtype=torch.bfloat16, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    weight = one(place / "merged" / "model-00002-of-00011.safetensors", "model.layers.0.mlp.down_proj.weight")
    assert torch.equal(model.model.layers[0].mlp.down_proj.weight, weight)
