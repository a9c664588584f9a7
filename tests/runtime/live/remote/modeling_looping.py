"""Code as shipped in a model's folder: a text model that puts images of any size into its text, one by one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput


class LoopingConfig(PretrainedConfig):
    """The sizes of the model."""

    model_type = "looping"

    def __init__(self, vocab_size: int = 60, hidden_size: int = 24, layers: int = 2, image: int = 50, **options: Any):
        self.vocab_size, self.hidden_size, self.layers, self.image = vocab_size, hidden_size, layers, image
        super().__init__(**options)


class Layer(nn.Module):
    """Attention over earlier tokens, and a feed-forward part."""

    def __init__(self, config: LoopingConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.q_proj, self.k_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.v_proj, self.o_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        heads = (part(y).unflatten(-1, (2, -1)).transpose(1, 2) for part in (self.q_proj, self.k_proj, self.v_proj))
        mixed = nn.functional.scaled_dot_product_attention(*heads, is_causal=True)
        x = x + self.o_proj(mixed.transpose(1, 2).flatten(2))
        return x + self.down(torch.nn.functional.gelu(self.up(self.second(x))))


class LoopingForCausalLM(PreTrainedModel):
    """A model that reads the number of an image's patches from a tensor, and searches for their positions."""

    config_class = LoopingConfig

    def __init__(self, config: LoopingConfig) -> None:
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.patches = nn.Linear(12, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        counts: Tensor | None = None,
        labels: Tensor | None = None,
        **_: Any,
    ) -> CausalLMOutput:
        """Run on patches ``[all, 12]`` of all images, where ``counts`` has the number of patches of each image."""
        x = self.embed(input_ids).clone()
        if pixel_values is not None and counts is not None:
            places, done = torch.nonzero(input_ids == self.config.image), 0
            for index in range(counts.shape[0]):
                count = counts[index].item()
                own = places[done : done + count]
                x[own[:, 0], own[:, 1]] = self.patches(pixel_values[done : done + count])
                done += count
        for layer in self.layers:
            x = layer(x)
        logits = self.head(x)
        loss = None
        if labels is not None:
            loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return CausalLMOutput(loss=loss, logits=logits)
