"""The cost of merging a LoRA into a checkpoint's files: graftc beside peft, and beside a copy with digests.

    python -m benchmarks.merging [--rounds 8] [--layers 36] [--quick] [--threads N] [--work FOLDER]
        [--out benchmarks/results]

Writes merging.json and merging.md. The checkpoint is Llama-shaped, in bfloat16 and in files of 1 GB, with random
values; a LoRA of rank 16 is on all seven projections, or only on the values of the attention, which changes few
tensors. A turn is a process of its own, timed from the end of its imports until every written file is flushed to the
disk. The peak is of the memory that belongs to no file, above that at the end of the imports.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks.command import command_line, machine_line, parse, parser, write
from benchmarks.train.report import machine

COPY, PEFT, GRAFTC = "copy", "peft", "graftc"
ALL, FEW = "all projections", "values only"
MODULES = {ALL: ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], FEW: ["v_proj"]}
AIMS = {(ALL, "time over peft"): 1.0, (ALL, "peak over peft"): 0.12, (FEW, "time over copy"): 1.5}
TOLERANCE = 1e-2
"""The difference of a weight from peft's, over the weight's size: two roundings to bfloat16."""


def make(work: Path, layers: int, width: int) -> None:
    """Write the checkpoint, and an adapter for each case."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        **{"hidden_size": width, "intermediate_size": width * 11 // 4, "num_hidden_layers": layers},
        **{"num_attention_heads": width // 16, "num_key_value_heads": width // 64, "vocab_size": 32000},
    )
    with torch.device("meta"):
        model: Any = LlamaForCausalLM(config)
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.02) if parameter.dim() > 1 else parameter.fill_(1)
    model.save_pretrained(work / "base", max_shard_size="1GB")
    for case, modules in MODULES.items():
        adapted = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules=modules))
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "lora_" in name:
                    parameter.normal_(0, 0.01)
        adapted.peft_config["default"].base_model_name_or_path = str(work / "base")
        adapted.save_pretrained(work / case)
        model = adapted.unload()


def copied(base: Path, adapter: Path, out: Path) -> None:
    """Copy the checkpoint and compute the digests of its files: the least that a merge with a record has to do."""
    shutil.copytree(base, out)
    for file in out.glob("*.safetensors"):
        with file.open("rb") as opened:
            hashlib.file_digest(opened, "sha256")


def by_peft(base: Path, adapter: Path, out: Path) -> None:
    """Merge as peft's users do."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    merged: Any = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    merged.save_pretrained(out, max_shard_size="1GB")


def by_graftc(base: Path, adapter: Path, out: Path) -> None:
    """Merge file by file."""
    import graftc

    graftc.merge_checkpoint(adapter, base, out)


CONTESTANTS: Mapping[str, Callable[[Path, Path, Path], None]] = {COPY: copied, PEFT: by_peft, GRAFTC: by_graftc}


def run(name: str, work: Path, case: str) -> dict[str, float]:
    """Return the seconds, the processor seconds and the peak memory in bytes of one merge in this process."""
    import peft  # noqa: F401
    import transformers  # noqa: F401

    import graftc  # noqa: F401

    out = work / "out" / name
    shutil.rmtree(out, ignore_errors=True)
    out.parent.mkdir(exist_ok=True)
    memory = Peak()
    start, before = time.perf_counter(), time.process_time()
    CONTESTANTS[name](work / "base", work / case, out)
    for file in out.iterdir():
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
    seconds, processor = time.perf_counter() - start, time.process_time() - before
    return {"seconds": seconds, "processor": processor, "peak": memory.end()}


class Peak:
    """The most memory that this process has that belongs to no file, above what it had at the beginning."""

    def __init__(self) -> None:
        self._first = self._most = _anonymous()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._ended.wait(0.02):
            self._most = max(self._most, _anonymous())

    def end(self) -> int:
        """Stop watching, and return the number of bytes."""
        self._ended.set()
        self._thread.join()
        return self._most - self._first


def _anonymous() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def turn(name: str, work: Path, case: str, threads: int) -> dict[str, float]:
    """Return the figures of a merge in a process of its own."""
    arguments = ["-W", "ignore", "-m", "benchmarks.merging", "--worker", name, "--case", case, "--work", str(work)]
    told = subprocess.run(
        [sys.executable, *arguments, "--threads", str(threads)], check=True, capture_output=True, text=True
    )
    figures: dict[str, float] = json.loads(told.stdout.splitlines()[-1])
    return figures


def difference(work: Path) -> float:
    """Return the largest difference between graftc's and peft's weights, over the size of the weight."""
    from graftc.files.tensors.folder import TensorFolder

    ours, theirs = (TensorFolder(work / "out" / name) for name in (GRAFTC, PEFT))
    return max(float((own.float() - theirs[name].float()).norm() / own.float().norm()) for name, own in ours.items())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line, and return the exit status: 1 if the merged weights are not peft's."""
    options = _parsed(arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    if options.worker:
        print(json.dumps(run(options.worker, options.work, options.case)))
        return 0
    layers, width, rounds = (2, 64, 2) if options.quick else (options.layers, 2048, options.rounds)
    date, before = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"), machine()
    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        work = Path(folder)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            make(work, layers, width)
        size = sum(file.stat().st_size for file in (work / "base").glob("*.safetensors"))
        figures: dict[str, dict[str, list[dict[str, float]]]] = {case: {n: [] for n in CONTESTANTS} for case in MODULES}
        apart = 0.0
        for number in range(rounds):
            for case in MODULES:
                for name in _order(number):
                    figures[case][name].append(turn(name, work, case, torch.get_num_threads()))
                apart = max(apart, difference(work))
            print(f"round {number + 1} of {rounds}", file=sys.stderr, flush=True)
    host = {**before, "load_after": machine()["load"]}
    data = {
        **{"command": command_line("python -m benchmarks.merging", arguments), "date": date, "machine": host},
        **{"rounds": rounds, "bytes": size, "difference": apart, "cases": _summary(figures), "turns": figures},
    }
    write(options.out, "merging", data, rendered(data))
    return int(apart > TOLERANCE)


def _parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    options = parser("python -m benchmarks.merging", (__doc__ or "").splitlines()[0], 8)
    options.add_argument("--layers", type=int, default=36, help="layers of the checkpoint (default: 36, 4 GB)")
    options.add_argument("--work", type=Path, help="folder for the checkpoints (default: the system's)")
    options.add_argument("--worker", choices=list(CONTESTANTS), help=argparse.SUPPRESS)
    options.add_argument("--case", choices=list(MODULES), help=argparse.SUPPRESS)
    return parse(options, arguments)


def _order(number: int) -> list[str]:
    names = list(CONTESTANTS)
    return names[number % len(names) :] + names[: number % len(names)]


def _summary(figures: Mapping[str, Mapping[str, Sequence[Mapping[str, float]]]]) -> dict[str, Any]:
    """Return medians over the rounds, and medians of the ratios within a round."""
    summary: dict[str, Any] = {}
    for case, turns in figures.items():
        medians = {
            name: {figure: statistics.median(one[figure] for one in own) for figure in ("seconds", "processor", "peak")}
            for name, own in turns.items()
        }
        ratios = {
            f"{label} over {other}": statistics.median(
                own[figure] / peer[figure] for own, peer in zip(turns[GRAFTC], turns[other], strict=True)
            )
            for label, figure in (("time", "seconds"), ("peak", "peak"))
            for other in (PEFT, COPY)
        }
        summary[case] = {"medians": medians, "ratios": ratios}
    return summary


def rendered(data: Mapping[str, Any]) -> str:
    """Return the results as a page."""
    lines = [
        "# Merging a LoRA into a checkpoint's files",
        "",
        f"`{data['command']}`, {data['date']}. {machine_line(data)}",
        "",
        f"A checkpoint of {data['bytes'] / 1e9:.2f} GB in bfloat16; `copy` copies the files and computes digests. "
        f"Largest difference from peft's weights, over their size: {data['difference']:.1e}.",
    ]
    for case, own in data["cases"].items():
        lines += ["", f"## {case}", "", "| | seconds | processor seconds | peak, MB |", "| --- | ---: | ---: | ---: |"]
        for name, figures in own["medians"].items():
            lines.append(
                f"| {name} | {figures['seconds']:.1f} | {figures['processor']:.1f} | {figures['peak'] / 1e6:.0f} |"
            )
        lines += ["", "| graftc's | ratio |", "| --- | ---: |"]
        for label, ratio in own["ratios"].items():
            aim = AIMS.get((case, label))
            text = f"{ratio:.2f}" if aim is None or ratio <= aim else f"**{ratio:.2f}**"
            lines.append(f"| {label} | {text}{'' if aim is None else f' ({aim:.2f})'} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
