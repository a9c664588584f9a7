"""Milliseconds a token of serving engines: one LoRA beside the model that it was merged into.

    python -m benchmarks.engines [--rounds 8] [--tokens 48] [--layers N] [--engines llama.cpp,genai,mistralrs,openvino]
        [--vllm PYTHON] [--threads 2] [--quick] [--out benchmarks/results]

Writes engines.json and engines.md. The model is SmolLM2 in float32, the adapter a LoRA of rank 8 on all projections of
random values; every contestant gives the same tokens. In each round each contestant continues three prompts of five
tokens in a process of its own, one after the other, and the first one, which prepares, does not count.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import graftc
from benchmarks.command import command_line, machine_line, parse, parser, write
from benchmarks.train.report import machine
from graftc.runtime.serving.running import DRIVERS, run_engine
from graftc.specs.errors.diagnostics import GraftError
from tools.serving.forms import Forms, base_files, load, prompts
from tools.serving.methods import Case

PROMPTS = 3
MAPS = {"role": ["attn.{q,k,v,o}", "ffn.{gate,up,down}"]}
LORA = Case("LoRA", {"adapt": [{"method": "lora", "rank": 8, "target": MAPS}]})
REFERENCE = "transformers, merged"
ROUNDED = ("openvino, merged",)
"""Contestants whose weights are rounded to float16, and whose tokens may be others."""
TORCH = ("transformers", "graftc")
"""The contestants that run in torch: transformers' loop with PEFT, and graftc's."""
FORMS: Mapping[str, tuple[str | None, str, str | None]] = {
    "transformers": ("peft-vllm", "merged-folder", "base"),
    "graftc": ("artifact", "artifact", None),
    "llama.cpp": ("gguf-adapter", "merged-gguf", "base.gguf"),
    "genai": ("onnx", "merged-onnx", None),
    "mistralrs": ("peft-mistralrs", "merged-folder", "base"),
    "openvino": (None, "merged-gguf-f16", None),
    "vllm": ("peft-vllm", "merged-folder", "base"),
}
"""For each contestant, the form of the unmerged and of the merged model, and the base of the former, if it is apart."""


@dataclass(frozen=True)
class Contestant:
    """A contestant: an engine with the model in one form."""

    engine: str
    kind: str
    base: Path
    adapter: Path | None

    @property
    def name(self) -> str:
        """The name in the table."""
        return f"{self.engine}, {self.kind}"


def contestants(engines: Sequence[str], forms: Forms) -> Iterator[Contestant]:
    """Yield what each engine runs; forms that do not exist are made."""
    for engine in (*TORCH, *engines):
        adapter, merged, base = FORMS[engine]
        if adapter is not None:
            path = Path(forms.get(adapter)["path"])
            own = base is not None
            yield Contestant(engine, "unmerged", forms.base.with_name(base) if base else path, path if own else None)
        yield Contestant(engine, "merged", Path(forms.get(merged)["path"]), None)


def seconds_of(
    one: Contestant, given: Sequence[Sequence[int]], tokens: int, threads: int, python: Path | None
) -> tuple[list[list[int]], list[float]]:
    """Return the tokens of a contestant, and the seconds of each prompt."""
    if one.engine in DRIVERS:
        answer = run_engine(
            one.engine,
            base=one.base,
            adapter=one.adapter,
            prompts=given,
            tokens=tokens,
            threads=threads,
            python=python if one.engine == "vllm" else None,
        )
        return [list(row) for row in answer.tokens], list(answer.seconds)
    request = {
        "engine": one.engine,
        "kind": one.kind,
        "base": str(one.base),
        "adapter": one.adapter and str(one.adapter),
    }
    request |= {"prompts": given, "tokens": tokens, "threads": threads}
    words = [sys.executable, "-W", "ignore", "-m", "benchmarks.engines", "--child", json.dumps(request)]
    completed = subprocess.run(
        words, capture_output=True, text=True, check=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}
    )
    answer = json.loads(completed.stdout.splitlines()[-1])
    return answer["tokens"], answer["seconds"]


def child(request: Mapping[str, Any]) -> dict[str, Any]:
    """Return the tokens and the seconds of a contestant in torch."""
    torch.set_num_threads(request["threads"])
    options = {"max_new_tokens": request["tokens"], "min_new_tokens": request["tokens"], "do_sample": False}
    model, rows, seconds = _in_torch(request), [], []
    for ids in request["prompts"]:
        begun = time.perf_counter()
        row = model.generate(input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)).long(), **options)
        seconds.append(time.perf_counter() - begun)
        rows.append(row[0, len(ids) :].tolist())
    return {"tokens": rows, "seconds": seconds}


def _in_torch(request: Mapping[str, Any]) -> Any:
    if request["engine"] == "graftc":
        compiled = graftc.load(request["base"]).eval()
        return compiled if request["kind"] == "unmerged" else compiled.merge()
    model: Any = load(Path(request["base"]))
    if request["adapter"] is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, request["adapter"])
    return model.eval()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; return 1 if a contestant gives other tokens than transformers with the merged model."""
    prog = "python -m benchmarks.engines"
    options_of = parser(prog, "Serving engines: one LoRA, unmerged and merged.", 8)
    options_of.add_argument("--tokens", type=int, default=48, help="tokens behind each prompt (default: 48)")
    options_of.add_argument("--layers", type=int, help="the first layers of SmolLM2 only (default: all)")
    options_of.add_argument(
        "--engines", default="llama.cpp,genai,mistralrs,openvino", help="names, with commas between"
    )
    options_of.add_argument("--vllm", type=Path, help="the interpreter that has vLLM, which is then run as well")
    options_of.add_argument("--child", help=argparse.SUPPRESS)
    options = parse(options_of, arguments)
    if options.child is not None:
        print(json.dumps(child(json.loads(options.child))))
        return 0
    layers, rounds = (2, 2) if options.quick else (options.layers, options.rounds)
    engines = [*options.engines.split(","), *(["vllm"] if options.vllm else [])]
    threads, before = options.threads or 2, machine()
    date = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    with tempfile.TemporaryDirectory() as folder:
        forms = Forms(Path(folder) / "lora", base_files(Path(folder), layers), LORA)
        given = prompts(forms.base)[:PROMPTS]
        seconds, tokens, skipped = measured(
            list(contestants(engines, forms)),
            lambda one: seconds_of(one, given, options.tokens, threads, options.vllm),
            rounds,
        )
    wanted = tokens[REFERENCE]
    entries = {
        name: {
            "ms": [1e3 * statistics.mean(own[1:]) / options.tokens for own in times],
            "equal": sum(row == other for row, other in zip(tokens[name], wanted, strict=True)),
        }
        for name, times in seconds.items()
    }
    host = {**before, "load_after": machine()["load"]}
    data = {
        **{"command": command_line(prog, arguments), "date": date, "rounds": rounds, "machine": host},
        **{"threads": threads, "tokens": options.tokens, "layers": layers, "entries": entries, "skipped": skipped},
    }
    write(options.out, "engines", data, "\n".join(_lines(data)) + "\n")
    return int(any(one["equal"] < PROMPTS for name, one in entries.items() if name not in ROUNDED))


def measured(
    every: Sequence[Contestant], run: Callable[[Contestant], tuple[list[list[int]], list[float]]], rounds: int
) -> tuple[dict[str, list[list[float]]], dict[str, list[list[int]]], dict[str, str]]:
    """Run all contestants in each round; return their seconds and tokens, and why others could not run."""
    seconds: dict[str, list[list[float]]] = {}
    tokens: dict[str, list[list[int]]] = {}
    skipped: dict[str, str] = {}
    for number in range(rounds):
        for one in every if number % 2 == 0 else every[::-1]:
            if one.name in skipped:
                continue
            try:
                tokens[one.name], own = run(one)
            except GraftError as error:
                skipped[one.name] = error.message
                continue
            seconds.setdefault(one.name, []).append(own)
            print(f"{number + 1}/{rounds} {one.name}: {own[-1]:.2f} s", file=sys.stderr, flush=True)
    return seconds, tokens, skipped


def _lines(data: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines of the report in Markdown."""
    entries = data["entries"]
    yield "# Serving engines: milliseconds a token\n"
    yield f"`{data['command']}`, {data['date']}.\n"
    yield machine_line(data)
    yield f"\nEvery engine has {data['threads']} threads. Ratios are medians over rounds.\n"
    yield "| contestant | ms a token | over transformers, merged | unmerged over merged | equal rows |"
    yield "| --- | ---: | ---: | ---: | ---: |"
    for name, one in entries.items():
        merged = name.replace("unmerged", "merged")
        over = f"{_ratio(one, entries[merged]):.2f}" if merged != name and merged in entries else ""
        of_torch = _ratio(one, entries[REFERENCE])
        yield f"| {name} | {statistics.median(one['ms']):.1f} | {of_torch:.2f} | {over} | {one['equal']} of {PROMPTS} |"
    for name, reason in data["skipped"].items():
        yield f"\n{name}: skipped: {reason}"


def _ratio(one: Mapping[str, Any], other: Mapping[str, Any]) -> float:
    return statistics.median(a / b for a, b in zip(one["ms"], other["ms"], strict=True))


if __name__ == "__main__":
    sys.exit(main())
