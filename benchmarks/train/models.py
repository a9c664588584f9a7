"""The base model, its batch, and copies of it that share its tensors."""

from __future__ import annotations

import copy
import zlib
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.hardware import device

__all__ = ["FULL", "TINY", "Base", "Shape", "base", "fill", "shared_copy"]


@dataclass(frozen=True)
class Shape:
    """The sizes of the model and of its batch; the model is a Llama with a language model head.

    Attributes:
        width: the width of the residual stream.
        intermediate: the width of the feed-forward parts.
        layers: the number of layers.
        heads: the number of attention heads, each with its own keys and values.
        vocabulary: the number of entries in the table and in the head; small, since the head is not part of any method.
        batch: the number of sequences in a batch.
        length: the length of each sequence.
        rank: the rank of the adapters.
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
"""The sizes for the figures."""

TINY = Shape(width=32, intermediate=48, layers=1, heads=2, vocabulary=31, batch=2, length=5, rank=2)
"""Tiny sizes to try the harness."""


@dataclass(frozen=True)
class Base:
    """The frozen model and the batch that all contestants share.

    Attributes:
        shape: the sizes of both.
        model: the frozen model in float32, in train mode.
        embeddings: the input of the first layer, ``float32[batch, length, width]``; it requires a gradient.
        labels: the labels, ``int64[batch, length]``.
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
    """Build a model and a batch with random values.

    The batch consists of embeddings that require a gradient, so that the backward pass goes through the whole model,
    regardless of what is adapted: the cost of a contestant beyond the floor is then its own.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    built: nn.Module = LlamaForCausalLM(
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
    model = built.to(device()).requires_grad_(False).train()
    numbers = torch.randint(shape.vocabulary, (shape.batch, shape.length)).to(device())
    embeddings = model.get_input_embeddings()(numbers).detach().clone().requires_grad_()
    return Base(shape, model, embeddings, numbers)


def shared_copy(model: nn.Module) -> nn.Module:
    """Copy the modules of a model, so that they can be changed, over the same tensors."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


@torch.no_grad()
def fill(model: nn.Module) -> int:
    """Give adapter tensors the values of a model after some training, the same in every library.

    Factors are drawn by their place and letter; vectors (magnitudes, scales) stay within a few percent of their initial
    values.

    Returns:
        The number of parameters that train.
    """
    trained = 0
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        trained += parameter.numel()
        module, part = place_of(name)
        generator = torch.Generator().manual_seed(zlib.crc32(f"{module}.{part}".encode()))
        noise = torch.randn(parameter.numel(), generator=generator).view_as(parameter).to(parameter.device)
        if part in ("A", "B"):
            parameter.copy_(0.02 * noise)
        else:
            parameter.copy_(torch.where(parameter == 0, 0.05 * noise, parameter * (1 + 0.05 * noise)))
    return trained


MARKS = (".graftc.", *(f".{word}_" for word in ("lora", "ia3", "vera", "hada", "lokr", "oft", "boft", "hira", "miss")))
MARKS += (".gralora_", ".c3a_", ".shira_", ".lily_")
"""The text between a module's path and the name of an adapter's tensor, in graftc and in peft."""


def place_of(name: str) -> tuple[str, str]:
    """Return the module of an adapter tensor, and ``A``, ``B`` or ``vector``, from its name in peft or graftc."""
    for mark in MARKS:
        module, separator, rest = name.partition(mark)
        if separator:
            # peft: lora_A.default.weight; graftc: <adaptation>.A
            letter = rest.rpartition(".")[2] if mark == ".graftc." else rest.partition(".")[0]
            return module.removeprefix("base_model.model."), letter if letter in ("A", "B") else "vector"
    raise ValueError(f"{name!r} is not an adapter's tensor")
