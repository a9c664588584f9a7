"""Keys that identify the graphs of a Compilation."""

from __future__ import annotations

from typing import Literal, NamedTuple

Mode = Literal["train", "eval"]

Modes = Mode | frozenset[str]
"""The mode of all modules, or the paths of those that are in eval mode while the others train, those among them whose
dropouts alone were set to zero marked so (`graftc.passes.core.ir.eval_mode.silent`)."""

Entry = Literal["forward", "embeds", "hidden", "losses", "routes", "scores"]
"""Which way into and out of the model: its ``forward``, with token embeddings in the place of token ids, as far as the
last hidden state, or as far as the losses of single tokens, alone or with what metrics tell of each; ``routes`` is
``forward`` with its choices among experts open to `graftc::route`."""

Stage = Literal["source", "base", "adapted"]
"""The source model's own graph, what is adapted (the same with room for virtual tokens), or the adapted graph."""


class Signature(NamedTuple):
    """The kind of a call, which distinguishes it from other calls.

    Keys are tuples, since code of ``torch.compile`` looks graphs up by them.

    Attributes:
        inputs: names, element types and ranks of tensors, and values of flags, sorted: ``input_ids:int64[2]``,
            ``output_attentions=True``.
        sizes: axes that have one size in the graph, ``input_ids.0=1``, or bounds if other sizes have their own graphs.
    """

    inputs: tuple[str, ...]
    sizes: tuple[str, ...] = ()

    def __str__(self) -> str:
        return ",".join((*self.inputs, *self.sizes))


class ProgramKey(NamedTuple):
    """The one key of graphs: of Programs, and of the code that runs them.

    A place in the model has the same `SiteKey` in all of them.
    """

    entry: Entry
    mode: Modes
    signature: Signature
    stage: Stage = "adapted"

    def __str__(self) -> str:
        mode = self.mode if isinstance(self.mode, str) else f"train but for {' '.join(sorted(self.mode))}"
        return " ".join((self.stage, self.entry, mode, str(self.signature)))
