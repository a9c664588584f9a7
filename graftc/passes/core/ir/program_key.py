"""Keys that identify the graphs of a Compilation."""

from __future__ import annotations

from typing import Literal, NamedTuple

Mode = Literal["train", "eval"]

Modes = Mode | frozenset[str]
"""The mode of all modules, or the paths of the modules in eval mode while the others are in train mode. Marked paths
(`graftc.passes.core.ir.eval_mode.silent`) are those of modules in which only the dropouts were set to zero."""

Entry = Literal["forward", "embeds", "hidden", "losses", "routes", "scores"]
"""The part of the model that a graph computes: its whole ``forward``; the same from token embeddings (``embeds``), to
the last hidden state (``hidden``), or to the losses of single tokens (``losses``) and their metrics (``scores``);
``routes`` is ``forward`` with its expert choices exposed to `graftc::route`."""

Stage = Literal["source", "base", "adapted"]
"""The source model's own graph, the base to adapt (the same with room for virtual tokens), or the adapted graph."""


class Signature(NamedTuple):
    """The properties that distinguish calls of one graph from calls of another.

    Keys are tuples, since code compiled by ``torch.compile`` looks graphs up by them.

    Attributes:
        inputs: names, dtypes and ranks of tensors, and values of flags, sorted: ``input_ids:int64[2]``,
            ``output_attentions=True``.
        sizes: axes that have a fixed size in the graph, ``input_ids.0=1``, or bounds if other sizes have their own
            graphs.
    """

    inputs: tuple[str, ...]
    sizes: tuple[str, ...] = ()

    def __str__(self) -> str:
        return ",".join((*self.inputs, *self.sizes))


class ProgramKey(NamedTuple):
    """The key of a graph, both of its Program and of the code that runs it.

    A place in the model has the same `SiteKey` in all graphs.
    """

    entry: Entry
    mode: Modes
    signature: Signature
    stage: Stage = "adapted"

    def __str__(self) -> str:
        mode = self.mode if isinstance(self.mode, str) else f"train but for {' '.join(sorted(self.mode))}"
        return " ".join((self.stage, self.entry, mode, str(self.signature)))
