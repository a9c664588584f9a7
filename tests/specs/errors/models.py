"""Models that graftc has to refuse or that a spec does not fit, for the command line to refer to by name."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from graftc.testing.families import bert


def with_a_spare_layer() -> Any:
    """Return a BERT with a linear layer that no output needs."""
    model = bert()
    model.add_module("spare", nn.Linear(48, 80))
    return model


class Wilful(nn.Module):
    """A model whose control flow depends on the values of its input."""

    main_input_name = "input_ids"

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Return logits, with the opposite sign for large ids."""
        hidden = self.table(input_ids)
        if input_ids.sum() > 40:
            hidden = -hidden
        return torch.tanh(self.head(hidden))
