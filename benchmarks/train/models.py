"""The base model, its batch, and copies of it that share its tensors."""

from __future__ import annotations

import copy
import zlib
from dataclasses import dataclass

import torch
from torch import Tensor, nn

__all__ = ["FULL", "TINY", "Base", "Shape", "base", "fill", "shared_copy"]


@dataclass(frozen=True)
class Shape:
    """Sizes of the model and of its batch; the model is a Llama with a language model head.

    Attributes:
        width: of the residual stream.
        intermediate: of the feed-forward parts.
        layers: how many.
        heads: of attention, each with keys and values of its own.
        vocabulary: entries of the table and of the head; small, since the head is not part of any method.
        batch: sequences in a batch.
        length: of each sequence.
        rank: of the adapters.
    """

    width: int
    intermediate: int
    layers: int
    heads: int
    vocabulary: int
    batch: int
    length: int
    rank: int


FULL = Shape(width=768, intermediate=2048, layers=4, heads=12, vocabulary=1000, batch=4, length=128, rank=8)
"""What the figures are about."""

TINY = Shape(width=32, intermediate=48, layers=1, heads=2, vocabulary=31, batch=2, length=5, rank=2)
"""To try the harness."""


@dataclass(frozen=True)
class Base:
    """The frozen model and the batch that all contestants share.

    Attributes:
        shape: its sizes.
        model: frozen, float32, in train mode.
        embeddings: ``float32[batch, length, width]``, what enters the first layer; it wants a gradient.
        labels: ``int64[batch, length]``.
    """

    shape: Shape
    model: nn.Module
    embeddings: Tensor
    labels: Tensor

    @property
    def batch(self) -> dict[str, Tensor]:
        """The inputs by name."""
        return {"inputs_embeds": self.embeddings, "labels": self.labels}


def base(shape: Shape, seed: int = 0) -> Base:
    """A model and a batch with random values.

    The batch is embeddings that want a gradient, so that the backward pass goes through the whole model whatever
    is adapted: what a contestant takes beyond the floor is then its own.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=shape.width,
            intermediate_size=shape.intermediate,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.heads,
            vocab_size=shape.vocabulary,
            use_cache=False,
        )
    )
    model.requires_grad_(False).train()
    numbers = torch.randint(shape.vocabulary, (shape.batch, shape.length))
    embeddings = model.get_input_embeddings()(numbers).detach().clone().requires_grad_()
    return Base(shape, model, embeddings, numbers)


def shared_copy(model: nn.Module) -> nn.Module:
    """A copy with modules of its own, to be changed as one likes, over the same tensors."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


@torch.no_grad()
def fill(model: nn.Module) -> int:
    """Give adapter tensors values as after some training, the same whichever library they are of.

    Factors are drawn by the place and the letter that they are for; vectors (magnitudes, scales) keep the value they
    start at, less or more by a few percent.

    Returns:
        How many parameters train.
    """
    trained = 0
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        trained += parameter.numel()
        module, part = place_of(name)
        generator = torch.Generator().manual_seed(zlib.crc32(f"{module}.{part}".encode()))
        noise = torch.randn(parameter.numel(), generator=generator).view_as(parameter)
        if part in ("A", "B"):
            parameter.copy_(0.02 * noise)
        else:
            parameter.copy_(torch.where(parameter == 0, 0.05 * noise, parameter * (1 + 0.05 * noise)))
    return trained


def place_of(name: str) -> tuple[str, str]:
    """The module that an adapter tensor is for, and ``A``, ``B`` or ``vector``, from its name in peft or graftc."""
    for mark in (".graftc.", ".lora_", ".ia3_", ".vera_", ".hada_", ".lokr_"):
        module, found, rest = name.partition(mark)
        if found:
            # peft: lora_A.default.weight; graftc: <adaptation>.A
            letter = rest.rpartition(".")[2] if mark == ".graftc." else rest.partition(".")[0]
            return module.removeprefix("base_model.model."), letter if letter in ("A", "B") else "vector"
    raise ValueError(f"{name!r} is not an adapter's tensor")
