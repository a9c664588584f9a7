"""The cost of starting a training and of each step, beside peft: set-up, first step, later steps, and memory.

    python -m benchmarks.first_steps [--rounds 3] [--only bert] [--out benchmarks/results]

``bert`` is a tiny BERT whose batches are padded to their longest text, so that the length differs from step to step;
``llama`` has 1.5 billion parameters in bfloat16. Each run is a process of its own with one thread. Contestants take
turns; graftc runs with an empty cache folder, and again with the cache of that run. Figures are medians over the
rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

STEPS = {"bert": 40, "llama": 3}
CONTESTANTS = ("peft", "graftc", "graftc, from the cache")
COLUMNS = {
    "setup": "set-up s",
    "first": "first step s",
    "step": "step s",
    "processor": "processor s a step",
    "memory": "memory over the model MB",
}


def model_of(case: str) -> Any:
    """Build the base, with random weights."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    if case == "bert":
        sizes: dict[str, Any] = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
        return BertForSequenceClassification(BertConfig(**sizes, intermediate_size=512))
    sizes = {"hidden_size": 2048, "num_hidden_layers": 28, "num_attention_heads": 16, "intermediate_size": 5632}
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        return LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=16, vocab_size=32000, use_cache=False))
    finally:
        torch.set_default_dtype(default)


def batches(case: str) -> list[dict[str, Any]]:
    """Return the batches of all steps."""
    import torch

    rng = torch.Generator().manual_seed(0)
    all_batches = []
    for _ in range(STEPS[case]):
        rows, length = (8, int(torch.randint(12, 96, (), generator=rng))) if case == "bert" else (1, 64)
        ids = torch.randint(5, 30000, (rows, length), generator=rng)
        labels = torch.randint(0, 2, (rows,), generator=rng) if case == "bert" else ids
        mask = torch.ones_like(ids)
        mask[::2, length * 3 // 4 :] = 0 if case == "bert" else 1
        all_batches.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return all_batches


def adapted(case: str, contestant: str, model: Any) -> Any:
    """Return the model with LoRA of rank 8 on queries and values."""
    if contestant == "peft":
        import peft

        names = ["query", "value"] if case == "bert" else ["q_proj", "v_proj"]
        return peft.get_peft_model(model, peft.LoraConfig(r=8, lora_alpha=16, target_modules=names))
    import graftc

    target = {"role": ["attn.q", "attn.v"]}
    return graftc.compile({"adapt": [{"method": "lora", "rank": 8, "alpha": 16, "target": target}]}, model)


def resident() -> float:
    """Return the anonymous resident memory of this process, in megabytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) / 1024


def watched(work: Callable[[], None]) -> float:
    """Call a function, and return the peak of anonymous memory during the call, in megabytes."""
    peak, stop = resident(), threading.Event()

    def watch() -> None:
        nonlocal peak
        while not stop.wait(0.01):
            peak = max(peak, resident())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        work()
    finally:
        stop.set()
        thread.join()
    return peak


def measure(case: str, contestant: str) -> dict[str, Any]:
    """Measure one contestant in this process."""
    import torch

    if contestant == "peft":
        import peft

        assert peft is not None  # imported before the clock starts, like graftc
    else:
        import graftc

        assert graftc is not None
    torch.set_num_threads(1)
    model, all_batches = model_of(case), batches(case)
    before = resident()
    took: list[float] = []
    processor: list[float] = []
    losses: list[float] = []
    setup = 0.0

    def run() -> None:
        nonlocal setup
        start = time.perf_counter()
        trained = adapted(case, contestant, model).train()
        setup = time.perf_counter() - start
        optimiser = torch.optim.AdamW([p for p in trained.parameters() if p.requires_grad], lr=1e-4)
        for batch in all_batches:
            start, used = time.perf_counter(), time.process_time()
            loss = trained(**batch).loss
            loss.backward()
            optimiser.step()
            optimiser.zero_grad()
            took.append(time.perf_counter() - start)
            processor.append(time.process_time() - used)
            losses.append(float(loss.detach()))

    peak = watched(run)
    later = (statistics.median(took[1:]), statistics.median(processor[1:]))
    return {
        **{"setup": setup, "first": took[0], "step": later[0], "processor": later[1]},
        **{"memory": peak - before, "losses": losses},
    }


def started(case: str, contestant: str, cache: str) -> dict[str, Any]:
    """Run `measure` in a process of its own."""
    environment = {**os.environ, "GRAFTC_CACHE": cache, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "benchmarks.first_steps", "--one", case, contestant]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    measured: dict[str, Any] = json.loads(finished.stdout.splitlines()[-1])
    return measured


def table(case: str, median: dict[str, dict[str, float]]) -> list[str]:
    """Return the figures of a case as lines of Markdown, each with its ratio to peft's."""
    lines = ["", f"## {case}", "", "| | " + " | ".join(COLUMNS.values()) + " |", "| --- |" + " ---: |" * len(COLUMNS)]
    for contestant, own in median.items():
        cells = [f"{own[key]:.3g} ({own[key] / median['peft'][key]:.2f})" for key in COLUMNS]
        lines.append(f"| {contestant} | " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    """Run the cases and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=list(STEPS))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(*arguments.one)))
        return
    results: dict[str, Any] = {"command": " ".join(["python -m benchmarks.first_steps", *sys.argv[1:]])}
    lines = ["# First steps", "", f"`{results['command']}`; in brackets, over peft's."]
    for case in [arguments.only] if arguments.only else list(STEPS):
        runs: dict[str, list[dict[str, Any]]] = {contestant: [] for contestant in CONTESTANTS}
        for number in range(arguments.rounds):
            with tempfile.TemporaryDirectory() as cache:
                order = CONTESTANTS if number % 2 else (*CONTESTANTS[1:], CONTESTANTS[0])
                for contestant in order:
                    runs[contestant].append(started(case, contestant, cache))
            print(f"{case}: round {number + 1} of {arguments.rounds}", file=sys.stderr)
        median = {
            name: {key: statistics.median(run[key] for run in own) for key in COLUMNS} for name, own in runs.items()
        }
        results[case] = {"median": median, "runs": runs}
        lines += table(case, median)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "first_steps.json").write_text(json.dumps(results, indent=1) + "\n")
    (arguments.out / "first_steps.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
