"""Cloze questions to compiled models: which pattern and which slot every row of a batch has."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from graftc.compiler.resolve.cloze import PATTERN
from graftc.runtime.compiled import Compiled
from graftc.runtime.pet.blanks import BlankKind
from graftc.runtime.pet.direction import blank_kind
from graftc.runtime.pet.encoding import ClozeEncoder
from graftc.runtime.pet.plain import positions_of
from graftc.runtime.pet.task import Fields
from graftc.runtime.pet.training import Batch, logits_of
from graftc.specs.pet.document import PetSpec

AT_ONCE = 64
"""Rows of a batch that is only answered."""


@dataclass(frozen=True)
class Asking:
    """How members are asked that one compiled model answers for.

    Attributes:
        encoder: puts texts into patterns.
        patterns: the pattern of each member.
        known: the patterns whose verbalizers the model has, in its order.
        banks: inputs that say which member answers a row, by the number of its slot; none for a member alone.
        device: where the model is.
    """

    encoder: ClozeEncoder
    patterns: Sequence[int]
    known: Sequence[int]
    banks: Sequence[str]
    device: torch.device

    def questions(self, texts: Sequence[Fields], members: Sequence[int]) -> dict[str, Tensor]:
        """What the model is called with, to ask a member each."""
        patterns = [self.patterns[member] for member in members]
        made = self.encoder.encode(texts, patterns)
        if len(self.encoder.options(self.known)["verbalizers"]) > 1:
            made[PATTERN] = torch.tensor([self.known.index(pattern) for pattern in patterns])
        return self._chosen(made, members)

    def texts(self, texts: Sequence[Fields], member: int, generator: torch.Generator) -> dict[str, Tensor]:
        """What the model is called with, for a member's loss as a language model."""
        made = self.encoder.token_batch(texts, self.patterns[member], generator)
        return self._chosen(made, [member] * len(texts))

    def _chosen(self, made: dict[str, Tensor], members: Sequence[int]) -> dict[str, Tensor]:
        slots = dict.fromkeys(self.banks, torch.tensor(list(members)))
        return {name: tensor.to(self.device) for name, tensor in {**made, **slots}.items()}

    def answers(self, compiled: Compiled, texts: Sequence[Fields]) -> Tensor:
        """The logits of every member, float32 ``[members, rows, labels]`` on the CPU; the model is in eval mode
        afterwards."""
        members, rows = len(self.patterns), len(texts)
        logits = logits_of(compiled, self._batches(texts), members * rows)
        return logits.view(members, rows, -1)

    def _batches(self, texts: Sequence[Fields]) -> Iterator[tuple[list[int], Batch]]:
        rows = len(texts)
        for some in by_length(texts, len(self.patterns)):
            yield some, self.questions([texts[at % rows] for at in some], [at // rows for at in some])


def encoder_of(
    spec: PetSpec, tokenizer: Any, model: nn.Module, max_length: int | None = None, *, blank: BlankKind | None = None
) -> ClozeEncoder:
    """What puts rows into the patterns of a document, for a model and its tokenizer.

    Args:
        spec: the document.
        tokenizer: the model's.
        model: bounds lengths by its positions, and says what a blank is and how its decoder starts, if it has one.
        max_length: tokens of a text at most; by default that of members' training.
        blank: what a blank is, where that is known already.
    """
    start = getattr(getattr(model, "config", None), "decoder_start_token_id", None)
    blank = blank if blank is not None else blank_kind(model, tokenizer)
    return ClozeEncoder.of(spec, tokenizer, max_length, blank=blank, positions=positions_of(model), start=start)


def by_length(texts: Sequence[Fields], copies: int = 1) -> Iterator[list[int]]:
    """Batches of rows with about the same length, so that little is padded.

    Args:
        texts: the rows.
        copies: how often each is asked; the number of a row's copy is ``copy * rows + row``.
    """
    sizes = [sum(map(len, text.values())) for text in texts]
    order = sorted(range(copies * len(texts)), key=lambda at: sizes[at % len(texts)])
    for first in range(0, len(order), AT_ONCE):
        yield order[first : first + AT_ONCE]
