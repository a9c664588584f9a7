"""Code as shipped in a model's folder: a classifier whose layers send each token to one of a few experts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput


class RoutedConfig(PretrainedConfig):
    """The sizes of the model."""

    model_type = "routed"

    def __init__(self, vocab_size: int = 60, hidden_size: int = 24, layers: int = 2, experts: int = 3, **options: Any):
        self.vocab_size, self.hidden_size, self.layers, self.experts = vocab_size, hidden_size, layers, experts
        super().__init__(**options)


class Expert(nn.Module):
    """Two maps."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))


class Routed(nn.Module):
    """A layer in which each expert processes the tokens that chose it, found with ``torch.where``."""

    def __init__(self, config: RoutedConfig) -> None:
        super().__init__()
        self.router = nn.Linear(config.hidden_size, config.experts)
        self.experts = nn.ModuleList(Expert(config.hidden_size) for _ in range(config.experts))
        self.norm = nn.LayerNorm(config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.norm(x).flatten(0, 1)
        weights, chosen = torch.softmax(self.router(tokens), -1).topk(2)
        mixed = torch.zeros_like(tokens)
        for number, expert in enumerate(self.experts):
            rows, slots = torch.where(chosen == number)
            if rows.numel() == 0:
                continue
            mixed.index_add_(0, rows, expert(tokens[rows]) * weights[rows, slots, None])
        return x + mixed.view_as(x)


class RoutedForSequenceClassification(PreTrainedModel):
    """A classifier of the mean of all tokens."""

    config_class = RoutedConfig

    def __init__(self, config: RoutedConfig) -> None:
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Routed(config) for _ in range(config.layers))
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, **_: Any) -> SequenceClassifierOutput:
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)
        logits = self.classifier(x.mean(1))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)
