"""The cost of generating: a prompt, and a token after it, in graftc, transformers and ONNX Runtime.

    python -m benchmarks.generate [--rounds 12] [--only merged] [--case llama] [--layers N] [--context 256] [--steps 4]
        [--inductor] [--quick] [--threads N] [--out benchmarks/results]

Writes generate.json and generate.md. A turn is a prompt of ``--context`` tokens with an empty cache, and then
``--steps`` single tokens after a context of that length; the inputs are those that the loop of transformers passes. The
floor reads as many bytes as the model has weights. README.md describes how it is measured.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import torch
from torch import Tensor

from benchmarks.command import command_line, parse, parser, write
from benchmarks.generation import FLOOR, Case, Entry, Live, entries
from benchmarks.hardware import Stopwatch, device
from benchmarks.train.report import load_text, machine
from benchmarks.turns import all_ready, in_turns

PARTS = ("prefill", "decode")
TOLERANCE = 1e-3
"""The largest difference of logits allowed, relative to the largest logit."""


@dataclass
class Running:
    """An entry that is ready, and the seconds that its turns took."""

    entry: Entry
    live: Live
    seconds: dict[str, list[float]] = field(default_factory=lambda: {part: [] for part in PARTS})
    processor: dict[str, list[float]] = field(default_factory=lambda: {part: [] for part in PARTS})
    logits: Tensor | None = None

    @property
    def name(self) -> str:
        """The name of the entry."""
        return self.entry.name


def cases(options: argparse.Namespace) -> Iterator[Case]:
    """Yield the models with their inputs."""
    from transformers import LlamaConfig, LlamaForCausalLM

    quick = options.quick
    context, steps = (7, 2) if quick else (options.context, options.steps)
    for name in ("llama",) if quick else options.case or ("llama", "smollm2"):
        torch.manual_seed(0)
        if name == "smollm2":
            from graftc.applications.demo.decoder import load_decoder

            model: Any = load_decoder(options.layers)
        else:
            sizes = {"hidden_size": 32 if quick else 256, "intermediate_size": 48 if quick else 704}
            sizes |= {"num_hidden_layers": 2 if quick else 8, "num_attention_heads": 4, "num_key_value_heads": 2}
            model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=100 if quick else 4096))
        model = model.eval().requires_grad_(False).to(device())
        ids = torch.randint(3, model.config.vocab_size, (1, context + steps)).to(device())
        yield Case(name, model, ids, context)


def turn(running: Running, steps: int) -> None:
    """Time a prompt and some steps after it; the time of a step is the mean of these steps."""
    live = running.live
    watch, used = Stopwatch(), time.process_time()
    live.prefill()
    watch.mark()
    running.seconds["prefill"] += watch.seconds()
    running.processor["prefill"].append(time.process_time() - used)
    step = live.begin()
    watch, used = Stopwatch(), time.process_time()
    for number in range(steps):
        running.logits = step(number)
    watch.mark()
    running.seconds["decode"].append(watch.seconds()[0] / steps)
    running.processor["decode"].append((time.process_time() - used) / steps)


def ratio(own: Sequence[float], other: Sequence[float]) -> float:
    """Return the median of the ratios within rounds."""
    return statistics.median(a / b for a, b in zip(own, other, strict=True))


def measure(case: Case, wanted: Sequence[Entry], rounds: int, tell: Callable[[str], None]) -> dict[str, Any]:
    """Measure a case and return its figures."""

    def ready(entry: Entry) -> Running:
        tell(f"{case.name}: {entry.name}")
        running = Running(entry, entry.make(case))
        for _ in range(2):
            turn(running, case.ids.shape[1] - case.context)
        running.seconds, running.processor = ({part: [] for part in PARTS} for _ in range(2))
        return running

    contestants, skipped = all_ready(wanted, ready, tell)
    steps = case.ids.shape[1] - case.context
    in_turns(contestants, rounds, lambda one, _: turn(one, steps), tell)
    by_name = {one.name: one for one in contestants}
    data: dict[str, Any] = {}
    for one in contestants:
        peer = by_name.get(one.entry.peer or "")
        aim = dict(one.entry.aims.get(case.name, {}))
        figures: dict[str, Any] = {"peer": one.entry.peer, "aim": aim, "equals": one.entry.equals, "difference": None}
        for part in PARTS:
            figures[part] = {
                "seconds": one.seconds[part],
                "median": statistics.median(one.seconds[part]),
                "processor": statistics.median(one.processor[part]),
                "over_floor": ratio(one.seconds[part], by_name[FLOOR].seconds[part]),
                "over_peer": None if peer is None else ratio(one.seconds[part], peer.seconds[part]),
                "over_peer_processor": None if peer is None else ratio(one.processor[part], peer.processor[part]),
            }
        if (same := by_name.get(one.entry.equals or "")) is not None:
            assert one.logits is not None and same.logits is not None
            figures["difference"] = float((one.logits - same.logits).abs().max() / same.logits.abs().max())
        data[one.name] = figures
    read = case.weights / statistics.median(by_name[FLOOR].seconds["decode"])
    sizes = {"weights": case.weights, "context": case.context, "steps": steps, "bytes_per_second": read}
    layers = case.model.config.num_hidden_layers
    return {**sizes, "layers": layers, "entries": data, "skipped": skipped}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; return 1 if an entry does not compute what it has to."""
    prog = "python -m benchmarks.generate"
    options_of = parser(prog, "Prompts and tokens behind them.", 12)
    options_of.add_argument("--only", help="a regular expression of entries; their peers run too")
    options_of.add_argument("--case", action="append", choices=("llama", "smollm2"), help="one model (default: both)")
    options_of.add_argument("--layers", type=int, help="the first layers of SmolLM2 only (default: all)")
    options_of.add_argument("--context", type=int, default=256, help="tokens of the prompt (default: 256)")
    options_of.add_argument("--steps", type=int, default=4, help="tokens behind it in each round (default: 4)")
    options_of.add_argument(
        "--inductor", action="store_true", help="torch.compile with a static cache too: some minutes"
    )
    options = parse(options_of, arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    rounds = min(options.rounds, 2) if options.quick else options.rounds
    date, before = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"), machine()

    def tell(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    wanted = chosen(entries(options.inductor), options.only)
    results = {case.name: measure(case, wanted, rounds, tell) for case in cases(options)}
    host = {**before, "load_after": machine()["load"]}
    data = {"command": command_line(prog, arguments), "date": date, "rounds": rounds, "machine": host, "cases": results}
    write(options.out, "generate", data, "\n".join(_lines(data)) + "\n")
    return status(results, tell)


def status(results: Mapping[str, Any], tell: Callable[[str], None]) -> int:
    """Report every entry with other logits than it has to have, and return the exit status: 1 if there are any."""
    wrong = [
        f"{name}: {entry}: its logits are {one['difference']:.1e} from those of {one['equals']}"
        for name, case in results.items()
        for entry, one in case["entries"].items()
        if one["difference"] is not None and one["difference"] > TOLERANCE
    ]
    for line in wrong:
        tell(line)
    return 1 if wrong else 0


def chosen(all_of_them: Sequence[Entry], pattern: str | None) -> list[Entry]:
    """Return the entries whose names match a regular expression, with the floor and those they are compared with.

    None selects all.
    """
    if pattern is None:
        return [*all_of_them]
    names = {FLOOR, *(e.name for e in all_of_them if re.search(pattern, e.name))}
    for entry in reversed(all_of_them):  # a peer precedes the entries compared with it
        if entry.name in names:
            names |= {other for other in (entry.peer, entry.equals) if other is not None}
    return [entry for entry in all_of_them if entry.name in names]


def _lines(data: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines of the report in Markdown."""
    host = data["machine"]
    before, after = load_text(host["load"]), load_text(host["load_after"])
    yield "# Generating\n"
    yield f"`{data['command']}`, {data['date']}.\n"
    yield (
        f"Machine: {host.get('gpu') or host['processor']}, "
        f"{host['cores']} cores, {host['threads']} threads, {host['capability']}; load "
        f"{before} before and {after} after. Medians of {data['rounds']} alternated rounds; an aim stands in brackets, "
        "**bold** where it was missed. `processor` is the same ratio of the processor's time, which other work on the "
        "machine disturbs less."
    )
    for name, case in data["cases"].items():
        yield f"\n## {name}\n"
        yield (
            f"{case['layers']} layers, {case['weights'] / 1e6:.0f} MB of weights that a token reads, a context of "
            f"{case['context']} tokens, {case['steps']} steps a round. The floor reads "
            f"{case['bytes_per_second'] / 1e9:.1f} GB/s.\n"
        )
        columns = "prefill ms | ratio | processor | decode ms | ratio | processor | over the floor"
        yield f"| entry | compared with | {columns} |"
        yield f"| --- | --- |{' ---: |' * 7}"
        for entry, one in case["entries"].items():
            cells = [entry, one["peer"] or ""]
            for part in PARTS:
                cells.append(f"{1e3 * one[part]['median']:.2f}")
                cells += [_ratio(one[part]["over_peer"], one["aim"].get(part))]
                cells += [_ratio(one[part]["over_peer_processor"], None)]
            yield f"| {' | '.join(cells)} | {one['decode']['over_floor']:.2f} |"
        for entry, reason in case["skipped"].items():
            yield f"\n{entry}: skipped: {reason}"


def _ratio(value: float | None, aim: float | None) -> str:
    if value is None:
        return ""
    shown = f"{value:.2f}"
    if aim is None:
        return shown
    return f"**{shown}** ({aim})" if value > aim else f"{shown} ({aim})"


if __name__ == "__main__":
    sys.exit(main())
