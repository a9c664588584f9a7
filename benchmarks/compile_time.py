"""How long compiling takes after capture, relative to capture, and from the cache.

    python benchmarks/compile_time.py [--repeat 3] [--out benchmarks/results/compile_time.json]

Each run is a process of its own with an empty cache folder: one compile that captures, then one from the cache.
Medians over the runs; the ratio is of medians.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

CASES = {
    "bert-base": ("BertForSequenceClassification", "BertConfig", "cpu", ["attn.q", "attn.v"]),
    "llama-7b": ("LlamaForCausalLM", "LlamaConfig", "meta", ["attn.q", "attn.k", "attn.v", "ffn.up", "ffn.down"]),
}


def measure(case: str) -> dict[str, float]:
    """One cold and one cached compile in this process."""
    import time

    import torch
    import transformers

    import graftc

    model_class, config_class, device, roles = CASES[case]
    with torch.device(device):
        model = getattr(transformers, model_class)(getattr(transformers, config_class)())
    spec = {"adapt": [{"method": "lora", "target": {"role": roles}, "rank": 8}]}
    cold = graftc.check(spec, model)
    started = time.perf_counter()
    warm = graftc.check(spec, model)
    again = time.perf_counter() - started
    assert warm.cached and not cold.cached
    return {"capture": cold.capture_seconds, "rewrite": cold.rewrite_seconds, "second": again}


def main() -> None:
    """Run all cases and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", choices=list(CASES), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments.one)))
        return
    import torch
    import transformers

    results: dict[str, Any] = {
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "command": " ".join(["python", *sys.argv]),
    }
    print(f"{'model':10} {'capture s':>10} {'after it s':>10} {'ratio':>6} {'from cache s':>13}")
    for case in CASES:
        runs = []
        for _ in range(arguments.repeat):
            with tempfile.TemporaryDirectory() as folder:
                command = [sys.executable, __file__, "--one", case]
                environment = {**os.environ, "GRAFTC_CACHE": folder}
                found = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
                runs.append(json.loads(found.stdout.splitlines()[-1]))
        median = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        ratio = median["rewrite"] / median["capture"]
        results[case] = {**median, "ratio": ratio, "runs": runs}
        print(f"{case:10} {median['capture']:10.2f} {median['rewrite']:10.2f} {ratio:6.3f} {median['second']:13.2f}")
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
