"""Time the first training step and the first generated tokens of a model by stage, beside peft and transformers.

    python -m benchmarks.first_calls [--gates] [--rounds 5] [--only smollm2] [--out benchmarks/results]

Every run is a process of its own. Those of graftc start with an empty folder of captures (cold), and again with the
captures of that run (warm). All times are processor seconds of all threads; waiting threads sleep
(``OMP_WAIT_POLICY=passive``), because time spent spinning would measure the load of the machine. ``--gates`` measures
the figures that have bounds, in alternating processes, and exits with status 1 if a median exceeds its bound.
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
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
THREADS = 2
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ROWS, LENGTH, TOKENS = 2, 64, 16
CASES: Mapping[str, Mapping[str, Any]] = {
    "minilm": {
        **{"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536},
    },
    "smollm2": {
        **{"hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9, "intermediate_size": 1536},
        **{"num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True},
    },
    "llama": {
        **{"hidden_size": 2048, "num_hidden_layers": 28, "num_attention_heads": 16, "intermediate_size": 5632},
        **{"num_key_value_heads": 16, "vocab_size": 32000},
    },
}
"""A BERT with MiniLM's sizes and SmolLM2-135M, both in float32, and a Llama with 1.5 billion parameters in bfloat16."""
STAGES = (
    *("import", "capture", "anchor", "roles", "insert", "rest of compiling", "planning"),
    *("first forward", "first backward", "optimiser", "certificate", "first tokens"),
)
"""The rows of a table. Capturing and the stages after it include all signatures until the step is done."""
GATES: Mapping[str, float] = {
    "first step, warm, over peft": 2.0,
    "first step, cold, over peft": 4.0,
    "peak memory, warm, over peft": 1.1,
    "peak memory, cold, over peft": 1.1,
    "first tokens, warm, over transformers": 2.0,
    "first tokens, cold, over transformers": 4.0,
    "compiling 126 layers over 4": 2.5,
}
"""The upper bound of each figure."""


class Clock:
    """A clock of processor seconds by stage.

    Attributes:
        seconds: the seconds of each stage, by its name.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._stage, self._since = "", time.process_time()

    def at(self, stage: str) -> str:
        """Switch to another stage, and return the previous one."""
        now, before = time.process_time(), self._stage
        self.seconds[before] += now - self._since
        self._stage, self._since = stage, now
        return before

    def within(self, stage: str, run: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function whose calls count as a stage of their own."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            before = self.at(stage)
            try:
                return run(*args, **kwargs)
            finally:
                self.at(before)

        return timed


def model_of(case: str) -> Any:
    """Build the base; SmolLM2 gets its own weights if the demo has downloaded them, all other weights are random."""
    import torch
    import transformers

    torch.manual_seed(0)
    if case == "minilm":
        return transformers.BertForSequenceClassification(transformers.BertConfig(**CASES[case]))
    folder = next((Path.home() / ".cache" / "graftc" / "models").glob("SmolLM2-135M*"), None)
    if case == "smollm2" and folder is not None:
        return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32 if case == "smollm2" else torch.bfloat16)
    try:
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**CASES[case]))
    finally:
        torch.set_default_dtype(default)


def batch_of(case: str) -> dict[str, Any]:
    """Return a batch with labels."""
    import torch

    ids = torch.randint(5, 30000, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids[:, 0] % 2 if case == "minilm" else ids}


def peak_memory() -> float:
    """Return the peak resident memory of this process so far, in megabytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024


def adapted(case: str, contestant: str, model: Any) -> Any:
    """Return the model with LoRA of rank 8 on all projections, or on queries and values if it is a BERT."""
    names = ("query", "value") if case == "minilm" else PROJECTIONS
    if contestant == "peft":
        import peft

        return peft.get_peft_model(model, peft.LoraConfig(r=8, target_modules=list(names)))
    import graftc

    target = {"modules": [f"**.{name}" for name in names]}
    return graftc.compile({"adapt": [{"method": "lora", "rank": 8, "target": target}]}, model)


def _by_steps(clock: Clock) -> None:
    """Report the steps of the compiler to the clock as stages."""
    from graftc.compiler import signatures
    from graftc.passes.core import progress
    from graftc.runtime.activations.training_code import TrainingCode
    from graftc.runtime.compiled import CompiledRunner

    def step(name: str) -> None:
        stage = name.partition("(")[0]
        clock.at(stage if stage in STAGES else "rest of compiling")

    progress.step = step
    for owner, name, stage in (
        (signatures, "adapt_signature", "rest of compiling"),
        (CompiledRunner, "install", "rest of compiling"),
        (TrainingCode, "choose", "planning"),
    ):
        setattr(owner, name, clock.within(stage, getattr(owner, name)))


def measure(case: str, contestant: str, certify: bool) -> dict[str, float]:
    """Measure one contestant in this process: seconds by stage, and the peak of memory at the end of the step."""
    import torch
    import transformers

    clock = Clock()
    model, batch = model_of(case).train(), batch_of(case)
    clock.at("import")
    if contestant == "peft":
        import peft

        assert peft is not None
    elif contestant == "graftc":
        import graftc.runtime.api

        assert graftc.runtime.api is not None
        _by_steps(clock)
    assert transformers is not None
    torch.set_num_threads(THREADS)
    clock.at("rest of compiling")
    memory = 0.0
    if contestant != "transformers":
        model = adapted(case, contestant, model).train()
        clock.at("optimiser")
        optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
        clock.at("first forward")
        loss = model(**batch).loss
        clock.at("first backward")
        loss.backward()
        clock.at("optimiser")
        optimiser.step()
        clock.at("")
        memory = peak_memory()
    if case != "minilm":
        model.eval()
        clock.at("first tokens")
        before = dict(clock.seconds)
        with torch.no_grad():
            model.generate(
                batch["input_ids"][:1, :TOKENS], max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False
            )
        clock.at("")
        for stage in clock.seconds:  # every stage of generating counts as first tokens
            if stage not in ("", "first tokens"):
                clock.seconds["first tokens"] += clock.seconds[stage] - before.get(stage, 0.0)
                clock.seconds[stage] = before.get(stage, 0.0)
    if contestant == "graftc" and certify:
        clock.at("certificate")
        before = dict(clock.seconds)
        model.merge()
        clock.at("")
        clock.seconds["certificate"] = sum(clock.seconds.values()) - sum(before.values())
        clock.seconds.update({stage: before[stage] for stage in before if stage not in ("", "certificate")})
    return {**{stage: clock.seconds[stage] for stage in STAGES if stage in clock.seconds}, "memory": memory}


def growth() -> dict[str, float]:
    """Measure the seconds of compiling a Llama with the sizes of 405B on the meta device, with 4 and 126 layers."""
    import torch
    import transformers

    import graftc

    target = {"role": ["attn.{q,k,v,o}", "ffn.{gate,up,down}"]}
    spec = {"adapt": [{"method": "lora", "rank": 8, "target": target}]}
    sizes: dict[str, Any] = {"hidden_size": 16384, "intermediate_size": 53248, "num_attention_heads": 128}

    def seconds(layers: int) -> float:
        with torch.device("meta"):
            config = transformers.LlamaConfig(
                **sizes, num_key_value_heads=8, vocab_size=128256, num_hidden_layers=layers
            )
            model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
        started = time.process_time()
        graftc.compile(spec, model, cache=False)
        return time.process_time() - started

    seconds(2)
    return {"4": seconds(4), "126": seconds(126)}


def started(*arguments: str, cache: str = "off") -> dict[str, float]:
    """Run a measurement in a process of its own."""
    threads = str(THREADS)
    environment = {**os.environ, "GRAFTC_CACHE": cache, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    environment |= {"OMP_WAIT_POLICY": "passive", "TOKENIZERS_PARALLELISM": "false"}
    environment |= {"PYTHONDONTWRITEBYTECODE": ""}  # as installed packages: imports read bytecode
    command = [sys.executable, "-m", "benchmarks.first_calls", "--one", *arguments]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    seconds: dict[str, float] = json.loads(finished.stdout.splitlines()[-1])
    return seconds


def step_seconds(run: Mapping[str, float]) -> float:
    """Return the seconds from the loaded model to the end of the first optimiser step, without imports."""
    return sum(run.get(stage, 0.0) for stage in STAGES[1:] if stage not in ("certificate", "first tokens"))


def contest(case: str, rounds: int, certify: bool) -> dict[str, list[dict[str, float]]]:
    """Run all contestants in turns."""
    runs: dict[str, list[dict[str, float]]] = defaultdict(list)
    others = ["peft"] if case == "minilm" else ["peft", "transformers"]
    for number in range(rounds):
        with tempfile.TemporaryDirectory() as cache:
            for name in ("cold", "warm"):
                runs[f"graftc, {name}"].append(started(case, "graftc", str(int(certify)), cache=cache))
                if other := next(iter(others[("cold", "warm").index(name) :]), None):
                    runs[other].append(started(case, other, "0"))
        print(f"{case}: round {number + 1} of {rounds}", file=sys.stderr)
    return dict(runs)


def medians(runs: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the median of each figure."""
    return {key: statistics.median(run.get(key, 0.0) for run in runs) for key in {k: None for run in runs for k in run}}


def gates(
    runs: Mapping[str, Sequence[Mapping[str, float]]], growths: Sequence[Mapping[str, float]]
) -> dict[str, float]:
    """Return the figures that have bounds."""
    figures: dict[str, float] = {}
    peft = statistics.median(map(step_seconds, runs["peft"]))
    memory, tokens = medians(runs["peft"])["memory"], medians(runs["transformers"])["first tokens"]
    for name in ("warm", "cold"):
        ours = runs[f"graftc, {name}"]
        figures[f"first step, {name}, over peft"] = statistics.median(map(step_seconds, ours)) / peft
        figures[f"peak memory, {name}, over peft"] = medians(ours)["memory"] / memory
        figures[f"first tokens, {name}, over transformers"] = medians(ours)["first tokens"] / tokens
    figures["compiling 126 layers over 4"] = statistics.median(each["126"] / each["4"] for each in growths)
    return figures


def table(case: str, median: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Return the stages of a case as lines of Markdown."""
    lines = ["", f"## {case}", "", "| | " + " | ".join(median) + " |", "| --- |" + " ---: |" * len(median)]
    for stage in STAGES:
        if any(stage in own for own in median.values()):
            cells = [f"{own[stage]:.2f}" if own.get(stage) else "-" for own in median.values()]
            lines.append(f"| {stage}, s | " + " | ".join(cells) + " |")
    total = [f"{step_seconds(own):.2f}" if name != "transformers" else "-" for name, own in median.items()]
    lines.append("| to the end of the first step, without imports, s | " + " | ".join(total) + " |")
    memory = [f"{own['memory']:.0f}" if own["memory"] else "-" for own in median.values()]
    return [*lines, "| peak memory until then, MB | " + " | ".join(memory) + " |"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write the results; return 1 if a gate is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gates", action="store_true", help="SmolLM2 and growth alone, held to their bounds")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=list(CASES))
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--one", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.one:
        case, *rest = options.one
        print(json.dumps(growth() if case == "growth" else measure(case, rest[0], rest[1] == "1")))
        return 0
    command = " ".join(["python -m benchmarks.first_calls", *(sys.argv[1:] if arguments is None else arguments)])
    results: dict[str, Any] = {"command": command, "threads": THREADS}
    lines = ["# First calls", "", f"`{command}`: seconds of the processor, medians of {options.rounds} rounds."]
    missed: list[str] = []
    for case in ["smollm2"] if options.gates else [options.only] if options.only else list(CASES):
        runs = contest(case, options.rounds, certify=not options.gates and case != "llama")
        median = {name: medians(own) for name, own in runs.items()}
        results[case] = {"median": median, "runs": runs}
        lines += table(case, median)
        if options.gates:
            growths = [started("growth") for _ in range(options.rounds)]
            figures = gates(runs, growths)
            missed = [name for name, most in GATES.items() if figures[name] > most]
            results |= {"gates": figures, "growth": growths}
            lines += ["", "| gate | measured | at most |", "| --- | ---: | ---: |"]
            lines += [f"| {name} | {figures[name]:.2f} | {most} |" for name, most in GATES.items()]
    name = "first_calls_gates" if options.gates else "first_calls"
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / f"{name}.json").write_text(json.dumps(results, indent=1) + "\n")
    (options.out / f"{name}.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    for each in missed:
        print(f"missed: {each}", file=sys.stderr)
    return 1 if missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
