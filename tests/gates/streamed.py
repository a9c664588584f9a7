"""Merges a folder file by file and reports the time and the anonymous memory that it took; runs as a process.

``python -m tests.gates.streamed ADAPTER OUT`` prints JSON. ``python -m tests.gates.streamed peft ADAPTER OUT`` does the
same with peft's ``merge_and_unload``, and ``mergekit`` instead of ``peft`` with mergekit, if that is installed.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path


def anonymous() -> float:
    """Return the megabytes of memory that no file backs, which the system cannot reclaim."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) / 1024


def measured(work: Callable[[], object]) -> dict[str, float]:
    """Run the work while sampling memory a hundred times a second."""
    before = peak = anonymous()
    stop = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not stop.wait(0.01):
            peak = max(peak, anonymous())

    thread = threading.Thread(target=watch)
    thread.start()
    start, processor = time.perf_counter(), time.process_time()
    work()
    took = {"seconds": time.perf_counter() - start, "processor": time.process_time() - processor}
    stop.set()
    thread.join()
    return {"imports": before, "peak": peak, **took}


def with_graftc(adapter: Path, out: Path) -> Callable[[], object]:
    """Return the merge by graftc."""
    import graftc
    from graftc.runtime.streaming import peft

    assert peft is not None  # imported before memory is measured
    return lambda: graftc.merge_checkpoint(adapter, None, out)


def with_peft(adapter: Path, out: Path) -> Callable[[], object]:
    """Return the merge by peft, from loading the base to saving the merged model."""
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    base = json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]

    def work() -> None:
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
        peft.PeftModel.from_pretrained(model, str(adapter)).merge_and_unload().save_pretrained(out)

    return work


def with_mergekit(adapter: Path, out: Path) -> Callable[[], object]:
    """Return the merge by mergekit, which merges with peft into its own folder and copies that by tensor."""
    from mergekit.config import MergeConfiguration
    from mergekit.merge import MergeOptions, run_merge

    base = json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
    models = [{"model": f"{base}+{adapter}"}]
    config = {"merge_method": "passthrough", "models": models, "dtype": "bfloat16"}
    cache = {"lora_merge_cache": f"{out}-cache", "lora_merge_dtype": "bfloat16"}
    options = MergeOptions(copy_tokenizer=False, quiet=True, **cache)
    return lambda: run_merge(MergeConfiguration.model_validate(config), str(out), options)


WAYS = {"peft": with_peft, "mergekit": with_mergekit, "graftc": with_graftc}

if __name__ == "__main__":
    way, adapter, out = ["graftc", *sys.argv[1:]][-3:]
    written = WAYS[way](Path(adapter), Path(out))
    print(json.dumps(measured(written)))
