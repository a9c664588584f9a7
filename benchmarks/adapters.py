"""The cost of a training step with bottleneck adapters, beside hand-written ones; that of AdaMix beside one adapter.

    python -m benchmarks.adapters [--rounds 30] [--quick] [--threads N] [--out benchmarks/results]

Writes adapters.json and adapters.md. The model, the batch and the way of measuring are those of `benchmarks.train`.
"""

from __future__ import annotations

import re
import statistics
import sys
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.command import machine_line, parse, parser, timed, verdict, write
from benchmarks.train.contestants import Aims, Entry, Live, floor
from benchmarks.train.models import Base, shared_copy

REDUCTION = 16
_PART = re.compile(r"(layers\.\d+)\..*\.(down|down_bias|up|up_bias)")


class Adapter(nn.Module):
    """A hand-written adapter that computes ``g + up(gelu(down(g)))`` after a feed-forward part."""

    def __init__(self, inner: nn.Module, width: int) -> None:
        super().__init__()
        bottleneck = width // REDUCTION
        self.inner = inner
        self.down = nn.Parameter(torch.empty(bottleneck, width))
        self.down_bias = nn.Parameter(torch.zeros(bottleneck))
        self.up = nn.Parameter(torch.empty(width, bottleneck))
        self.up_bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        """Run the feed-forward part and the adapter on ``x: [batch, sequence, width]``; the shape stays the same."""
        g = self.inner(x)
        hidden = functional.gelu(functional.linear(g, self.down, self.down_bias))
        return g + functional.linear(hidden, self.up, self.up_bias)


@torch.no_grad()
def fill(model: nn.Module) -> int:
    """Give adapters values that depend only on their layer and part, and return how many parameters train."""
    trained = 0
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            match = _PART.search(name)
            assert match is not None, name
            generator = torch.Generator().manual_seed(zlib.crc32(".".join(match.groups()).encode()))
            parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
            trained += parameter.numel()
    return trained


def by_hand(base: Base) -> Live:
    """Wrap the feed-forward parts of a copy of the model in adapter modules."""
    model: Any = shared_copy(base.model)
    for layer in model.model.layers:
        layer.mlp = Adapter(layer.mlp, base.shape.width)
    return Live(model, lambda: model(**base.batch).loss, fill(model))


def ours(name: str, peer: str, aims: Aims, *, exact: bool = False, **entry: Any) -> Entry:
    """Build an entry in which graftc adapts the feed-forward parts."""

    def make(base: Base) -> Live:
        import graftc

        spec = {"adapt": [{"target": {"role": "ffn.sublayer"}, "activation": "gelu", "reduction": REDUCTION, **entry}]}
        model = graftc.compile(spec, shared_copy(base.model), base.batch).train()
        return Live(model, lambda: model(**base.batch).loss, fill(model))

    return Entry(name, "graftc", make, peer, aims, exact=exact)


ONE = {"method": "bottleneck", "reads": "projection", "adds_to": "projection"}
ENTRIES: tuple[Entry, ...] = (
    floor(),
    Entry("by hand", "torch", by_hand),
    ours("bottleneck", "by hand", Aims(over_peer=1.0), exact=True, **ONE),
    ours("AdaMix, one pass", "bottleneck", Aims(over_peer=1.1), method="adamix", consistency={"weight": 0}),
    ours("AdaMix, two passes", "bottleneck", Aims(), method="adamix"),
)
"""The floor, and every other entry after the one that it is compared with."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; return 1 if an entry does not compute what its peer does."""
    prog = "python -m benchmarks.adapters"
    options = parse(parser(prog, "What adapters cost in a step.", 30), arguments)
    measured, data = timed(prog, options, ENTRIES, arguments)
    for entry in data["entries"].values():
        other = data["entries"].get(entry["peer"])
        entry["over_peer_of_processor"] = None if other is None else _of_processor(entry, other)
    write(options.out, "adapters", data, "\n".join(_lines(data)) + "\n")
    return verdict(measured)


def _of_processor(entry: Mapping[str, Any], other: Mapping[str, Any]) -> float:
    """Return the median over the rounds of the ratio of processor times within a round."""
    pairs = zip(entry["rounds"]["processor"], other["rounds"]["processor"], strict=True)
    return statistics.median(a / b for a, b in pairs)


def _lines(data: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines of the report in Markdown."""
    model = data["model"]
    yield "# A training step with bottleneck adapters"
    yield ""
    yield f"Made by `{data['command']}` on {data['date']}; [how to read it](../README.md#bottleneck-adapters)."
    yield ""
    yield (
        f"Model: Llama-shaped, {model['width']} wide, {model['layers']} layers, feed-forward {model['intermediate']}, "
        f"batch {model['batch']} x {model['length']}, float32, eager; behind every feed-forward part an adapter of "
        f"width {model['width'] // REDUCTION}. AdaMix has 4 experts and shares the second projection."
    )
    yield ""
    yield machine_line(data)
    yield ""
    yield "| | compared with | step, ms | over the floor | over the other | of processor time | saved, MB |"
    yield "| --- | --- | ---: | ---: | ---: | ---: | ---: |"
    for name, entry in data["entries"].items():
        over, aim = entry["over_peer"], entry["aims"]["over_peer"]
        cell = "-" if over is None else f"{over:.3f}"
        if aim is not None:
            cell = f"{cell} ({aim:.2f})" if entry["reached"]["over_peer"] else f"**{cell}** ({aim:.2f})"
        processor = "-" if over is None else f"{entry['over_peer_of_processor']:.3f}"
        cells = [name, entry["peer"] or "-", f"{1e3 * entry['seconds']['median']:.0f}", f"{entry['over_floor']:.2f}"]
        yield "| " + " | ".join([*cells, cell, processor, f"{entry['saved_bytes'] / 1e6:.1f}"]) + " |"


if __name__ == "__main__":
    sys.exit(main())
