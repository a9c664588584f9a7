"""Put cloze questions to compiled models, with a pattern and a slot for each row of a batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from graftc.applications.pet.blank_tokenizer import BlankKind
from graftc.applications.pet.direction import blank_kind
from graftc.applications.pet.encoding import ClozeEncoder
from graftc.applications.pet.plain import positions_of
from graftc.applications.pet.task import Fields
from graftc.applications.pet.training import Batch, logits_of
from graftc.compiler.resolve.cloze import PATTERN
from graftc.runtime.compiled import Compiled
from graftc.specs.pet.document import PetSpec

AT_ONCE = 64
"""The number of rows in a batch that is answered without training."""


@dataclass(frozen=True)
class Asking:
    """The inputs and calls that ask the members of one compiled model.

    Attributes:
        encoder: the encoder that puts texts into patterns.
        patterns: the index of each member's pattern.
        known: the patterns whose verbalizers the model has, in the model's order.
        banks: the names of the inputs that select the slot of the member that answers a row; empty for a single member.
        device: the model's device.
    """

    encoder: ClozeEncoder
    patterns: Sequence[int]
    known: Sequence[int]
    banks: Sequence[str]
    device: torch.device

    def questions(self, texts: Sequence[Fields], members: Sequence[int]) -> dict[str, Tensor]:
        """Return the model inputs that ask the corresponding member about each text."""
        patterns = [self.patterns[member] for member in members]
        inputs = self.encoder.encode(texts, patterns)
        if len(self.encoder.options(self.known)["verbalizers"]) > 1:
            inputs[PATTERN] = torch.tensor([self.known.index(pattern) for pattern in patterns])
        return self._chosen(inputs, members)

    def texts(self, texts: Sequence[Fields], member: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Return the model inputs for a member's language modelling loss."""
        inputs = self.encoder.token_batch(texts, self.patterns[member], generator)
        return self._chosen(inputs, [member] * len(texts))

    def _chosen(self, inputs: dict[str, Tensor], members: Sequence[int]) -> dict[str, Tensor]:
        slots = dict.fromkeys(self.banks, torch.tensor(list(members)))
        return {name: tensor.to(self.device) for name, tensor in {**inputs, **slots}.items()}

    def answers(self, compiled: Compiled, texts: Sequence[Fields]) -> Tensor:
        """Return every member's logits, float32 ``[members, rows, labels]`` on the CPU.

        The model is left in eval mode.
        """
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
    """Return the encoder that puts rows into a document's patterns, for a model and its tokenizer.

    Args:
        spec: the document.
        tokenizer: the model's tokenizer.
        model: the model, which limits the length of texts by its positions, and determines the kind of blank and the
            first token of its decoder, if it has one.
        max_length: the maximum number of tokens in a text; by default the document's limit for training members.
        blank: the kind of blank, if it is already known.
    """
    start = getattr(getattr(model, "config", None), "decoder_start_token_id", None)
    blank = blank if blank is not None else blank_kind(model, tokenizer)
    return ClozeEncoder.of(spec, tokenizer, max_length, blank=blank, positions=positions_of(model), start=start)


def by_length(texts: Sequence[Fields], copies: int = 1) -> Iterator[list[int]]:
    """Yield batches of rows of similar length, to keep padding small.

    Args:
        texts: the rows.
        copies: the number of questions about each row; the index of a row's copy is ``copy * rows + row``.
    """
    sizes = [sum(map(len, text.values())) for text in texts]
    order = sorted(range(copies * len(texts)), key=lambda at: sizes[at % len(texts)])
    for first in range(0, len(order), AT_ONCE):
        yield order[first : first + AT_ONCE]
