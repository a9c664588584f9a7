"""The cost of a training step with virtual tokens or prefixes: graftc beside peft.

    python -m benchmarks.inputs [--rounds 30] [--quick] [--threads N] [--out benchmarks/results]

Writes inputs.json and inputs.md. The model, the batch and the way of measuring are those of `benchmarks.train`, except
that texts are token ids with an attention mask, since these methods look words up themselves.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.command import machine_line, parse, parser, timed, verdict, write
from benchmarks.train.contestants import Aims, Entry, Live, floor
from benchmarks.train.models import Base, shared_copy

LENGTH, HIDDEN = 20, 512
AIMS = Aims(over_peer=0.9, saved_of_peer=0.9)


def batch(base: Base) -> dict[str, Tensor]:
    """Return the texts; peft lets the last virtual token predict the first word, which is not a target here."""
    labels = base.labels.clone()
    labels[:, 0] = -100
    return {"input_ids": base.labels, "attention_mask": torch.ones_like(base.labels), "labels": labels}


def values(shape: Sequence[int], seed: int) -> Tensor:
    """Return the values of a tensor after some training, the same in both libraries."""
    return 0.05 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def theirs(name: str, config: str, **options: Any) -> Entry:
    """Build an entry with a method of peft."""

    def make(base: Base) -> Live:
        import peft

        peft_config = getattr(peft, config)(task_type="CAUSAL_LM", num_virtual_tokens=LENGTH, **options)
        model = peft.get_peft_model(shared_copy(base.model), peft_config).train()
        trained = [p for p in model.parameters() if p.requires_grad]
        with torch.no_grad():
            for seed, parameter in enumerate(trained):
                parameter.copy_(values(parameter.shape, seed))
        inputs = batch(base)
        return Live(model, lambda: model(**inputs).loss, sum(p.numel() for p in trained))

    return Entry(name, "peft", make)


Tensors = Callable[[Mapping[str, Tensor], Base], Mapping[str, Tensor]]


def ours(name: str, peer: str, tensors: Tensors | None, **entry: Any) -> Entry:
    """Build an entry with the same method in graftc, with the same values if the shapes are the same."""

    def make(base: Base) -> Live:
        import graftc

        inputs = batch(base)
        model = graftc.compile({"adapt": [{"length": LENGTH, **entry}]}, shared_copy(base.model), inputs).train()
        if tensors is not None:
            model.load_adapter_state_dict(tensors(model.adapter_state_dict(), base))
        return Live(model, lambda: model(**inputs).loss, sum(p.numel() for p in model.parameters() if p.requires_grad))

    return Entry(name, "graftc", make, peer, AIMS, exact=tensors is not None)


def prompt_values(held: Mapping[str, Tensor], base: Base) -> Mapping[str, Tensor]:
    """Return the values of peft's table of virtual tokens."""
    return {name: values(tensor.shape, 0) for name, tensor in held.items()}


def prefix_values(held: Mapping[str, Tensor], base: Base) -> Mapping[str, Tensor]:
    """Return the values of peft's table ``[length, layers * 2 * width]``, by layers."""
    layers, width = base.shape.layers, base.shape.width
    table = values((LENGTH, layers * 2 * width), 0).view(LENGTH, layers, 2, width)
    places = sorted({name.rpartition(".")[0] for name in held}, key=lambda n: int(n.split(".")[2]))
    return {
        f"{place}.{part}": table[:, i, j].contiguous()
        for i, place in enumerate(places)
        for j, part in enumerate(("keys", "values"))
    }


ENTRIES: tuple[Entry, ...] = (
    floor(),
    theirs("peft prompt", "PromptTuningConfig"),
    ours("graftc prompt", "peft prompt", prompt_values, method="prompt"),
    theirs("peft prefix", "PrefixTuningConfig"),
    ours("graftc prefix", "peft prefix", prefix_values, method="prefix", positions="shifted"),
    theirs("peft prefix, network", "PrefixTuningConfig", prefix_projection=True, encoder_hidden_size=HIDDEN),
    ours(
        "graftc prefix, network",
        "peft prefix, network",
        None,
        method="prefix",
        positions="shifted",
        reparameterization={"hidden": HIDDEN},
    ),
)
"""The floor, and each of peft's entries before graftc's."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; return 1 if losses differ from those of peft."""
    prog = "python -m benchmarks.inputs"
    options = parse(parser(prog, "Virtual tokens and prefixes.", 30), arguments)
    measured, data = timed(prog, options, ENTRIES, arguments)
    write(options.out, "inputs", data, "\n".join(_lines(data)) + "\n")
    return verdict(measured)


def _lines(data: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines of the report in Markdown."""
    model = data["model"]
    yield "# A training step with virtual tokens or prefixes"
    yield ""
    yield f"Made by `{data['command']}` on {data['date']}; [how to read it](../README.md#virtual-tokens-and-prefixes)."
    yield ""
    yield (
        f"Model: Llama-shaped, {model['width']} wide, {model['layers']} layers, feed-forward {model['intermediate']}, "
        f"batch {model['batch']} x {model['length']}, float32, eager; {LENGTH} virtual tokens or places of a prefix, "
        f"whose network has a hidden width of {HIDDEN}."
    )
    yield ""
    yield machine_line(data)
    yield ""
    yield "| | step, ms | over the floor | over peft's | saved, MB | saved over peft's |"
    yield "| --- | ---: | ---: | ---: | ---: | ---: |"
    for name, entry in data["entries"].items():
        cells = [name, f"{1e3 * entry['seconds']['median']:.0f}", f"{entry['over_floor']:.2f}"]
        saved = f"{entry['saved_bytes'] / 1e6:.1f}"
        yield "| " + " | ".join([*cells, _cell(entry, "over_peer"), saved, _cell(entry, "saved_of_peer")]) + " |"


def _cell(entry: Mapping[str, Any], figure: str) -> str:
    value, aim = entry[figure], entry["aims"][figure]
    if value is None:
        return "-"
    if aim is None:
        return f"{value:.3f}"
    return f"{value:.3f} ({aim:.2f})" if entry["reached"][figure] else f"**{value:.3f}** ({aim:.2f})"


if __name__ == "__main__":
    sys.exit(main())
