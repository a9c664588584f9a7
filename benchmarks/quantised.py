"""LoRA on a quantised base: stored bytes, the memory that a step saves and its peak, and its time.

    python -m benchmarks.quantised [--rounds 10] [--quick] [--threads N] [--out benchmarks/results]

Writes quantised.json and quantised.md. The model and the batch are those of `benchmarks.train`; peft runs on a model
with layers of bitsandbytes if that is installed.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

import torch
from torch import nn

from benchmarks.command import command_line, machine_line, parse, parser, verdict, write
from benchmarks.train.contestants import PROJECTIONS, ROLES, Aims, Entry, Live, UnavailableError, ours
from benchmarks.train.measure import Measured, contest
from benchmarks.train.models import FULL, TINY, Base, base, fill, shared_copy
from benchmarks.train.report import cell, figures, machine

PLAIN = "graftc LoRA, float32"


@dataclass
class Stored:
    """The bytes of parameters and buffers by entry."""

    sizes: dict[str, int]

    def noted(self, entry: Entry) -> Entry:
        """Return the same entry, which records the bytes of its model when that is made."""

        def make(given: Base) -> Live:
            live = entry.make(given)
            sizes = {id(t): t.numel() * t.element_size() for t in (*live.model.parameters(), *live.model.buffers())}
            self.sizes[entry.name] = sum(sizes.values())
            return live

        return replace(entry, make=make)


def bfloat16() -> Entry:
    """Build an entry with LoRA on the base in bfloat16."""

    def make(given: Base) -> Live:
        import graftc

        model = copy.deepcopy(given.model).bfloat16()
        batch = {"inputs_embeds": given.embeddings.bfloat16().detach().requires_grad_(), "labels": given.labels}
        adapt = [{"method": "lora", "target": {"role": ROLES}, "rank": given.shape.rank, "alpha": 16}]
        compiled = graftc.compile(graftc.load_spec({"adapt": adapt}), model, batch).train()
        return Live(compiled, lambda: compiled(**batch).loss, fill(compiled))

    return Entry("graftc LoRA, bfloat16", "graftc", make, PLAIN)


def bitsandbytes(kind: str, name: str) -> Entry:
    """Build an entry with peft's LoRA on layers of bitsandbytes."""

    def make(given: Base) -> Live:
        try:
            import bitsandbytes
        except ImportError as error:
            raise UnavailableError("bitsandbytes is not installed") from error
        import peft

        model = shared_copy(given.model)
        for path, module in list(model.named_modules()):
            if isinstance(module, nn.Linear) and path.rpartition(".")[2] in PROJECTIONS:
                layer = bitsandbytes.nn.Linear4bit(
                    module.in_features, module.out_features, False, torch.float32, False, kind
                )
                layer.weight = bitsandbytes.nn.Params4bit(module.weight.data, requires_grad=False, quant_type=kind)
                parent, _, last = path.rpartition(".")
                setattr(model.get_submodule(parent), last, layer.to("cpu"))
        config = peft.LoraConfig(r=given.shape.rank, lora_alpha=16, target_modules=PROJECTIONS, task_type="CAUSAL_LM")
        adapted = peft.get_peft_model(model, config).train()
        return Live(adapted, lambda: adapted.base_model(**given.batch).loss, fill(adapted))

    return Entry(name, "peft", make, PLAIN)


def entries() -> tuple[Entry, ...]:
    """Return the contestants."""
    formats: Mapping[str, dict[str, Any]] = {
        "int8": {"quantize": "int8"},
        "int4": {"quantize": "int4"},
        "nf4": {"quantize": "nf4"},
        "nf4, double": {"quantize": "nf4", "double": True},
    }
    peers = {"nf4": "peft LoRA, bitsandbytes nf4"}
    return (
        ours(PLAIN, "lora", PLAIN, Aims(), alpha=16, exact=False),
        bfloat16(),
        bitsandbytes("nf4", peers["nf4"]),
        *(
            ours(f"graftc LoRA, {name}", "lora", peers.get(name, PLAIN), Aims(), alpha=16, document={"base": own})
            if name in peers
            else ours(f"graftc LoRA, {name}", "lora", PLAIN, Aims(), alpha=16, exact=False, document={"base": own})
            for name, own in formats.items()
        ),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; return 1 if an entry does not compute what its peer does."""
    prog = "python -m benchmarks.quantised"
    options = parse(parser(prog, "LoRA on a quantised base.", 10), arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    shape, rounds = (replace(TINY, layers=2), 2) if options.quick else (FULL, options.rounds)
    date, before = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"), machine()
    stored = Stored({})
    measured, skipped = contest(
        [stored.noted(entry) for entry in entries()],
        base(shape),
        rounds,
        tell=lambda line: print(line, file=sys.stderr, flush=True),
    )
    data = figures(measured, skipped, shape, command=command_line(prog, arguments), date=date, before=before)
    for name, entry in data["entries"].items():
        entry["stored_bytes"] = stored.sizes[name]
    write(options.out, "quantised", data, "\n".join(_lines(data, measured)) + "\n")
    return verdict(measured)


def _lines(data: Mapping[str, Any], found: Sequence[Measured]) -> Iterator[str]:
    model = data["model"]
    yield "# LoRA on a quantised base"
    yield ""
    yield f"Made by `{data['command']}` on {data['date']}; [how to read it](../README.md)."
    yield ""
    yield (
        f"Model: Llama-shaped, {model['width']} wide, {model['layers']} layers, batch {model['batch']} x "
        f"{model['length']}, LoRA of rank {model['rank']} on all seven projections, eager. "
        "Stored are all parameters and buffers, those of the adapters too; ratios are to the entry that is named."
    )
    yield ""
    yield machine_line(data)
    yield ""
    yield "| | stored, MB | of float32 | step, ms | over | saved, MB | peak, MB | of | beside |"
    yield "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- |"
    plain = data["entries"][PLAIN]["stored_bytes"]
    for one in found:
        entry = data["entries"][one.entry.name]
        cells = [one.entry.name, f"{entry['stored_bytes'] / 1e6:.1f}", f"{entry['stored_bytes'] / plain:.2f}"]
        cells += [f"{1e3 * entry['seconds']['median']:.0f}", cell(entry, "over_peer")]
        cells += [f"{entry['saved_bytes'] / 1e6:.1f}", f"{entry['peak_bytes'] / 1e6:.1f}", cell(entry, "peak_of_peer")]
        yield "| " + " | ".join([*cells, str(one.entry.peer)]) + " |"
    for name, why in data["skipped"].items():
        yield f"\nSkipped: {name} ({why})."


if __name__ == "__main__":
    sys.exit(main())
