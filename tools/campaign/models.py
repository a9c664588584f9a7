"""The modules of `grammar`'s descriptions, and inputs for them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from graftc.testing import randomise, tiny
from graftc.testing.families import VOCABULARY
from tools.campaign.blocks import PARTS
from tools.campaign.grammar import Layer, Model


def _norm(kind: str, width: int) -> nn.Module:
    return {"layer": nn.LayerNorm, "rms": nn.RMSNorm}.get(kind, lambda width: nn.Identity())(width)


class Stage(nn.Module):
    """A layer: blocks, each behind a norm and beside a residual."""

    def __init__(self, width: int, layer: Layer) -> None:
        super().__init__()
        # Paths do not depend on what else is in a layer, so that a reduced case still has the places of its spec.
        self.norms = nn.ModuleDict({block.kind: _norm(layer.norm, width) for block in layer.blocks})
        self.parts = nn.ModuleDict({block.kind: PARTS[block.kind](width, **block.options) for block in layer.blocks})
        self.scale, self.runs = layer.scale, layer.runs

    def forward(self, x: Tensor) -> Tensor:
        """See `MLP.forward`."""
        for _ in range(self.runs):
            for name, part in self.parts.items():
                added = part(self.norms[name](x))
                x = x + (added if self.scale == 1 else added * self.scale)
        return x


class Grown(nn.Module):
    """The model of a description that is no library's."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.kind, self.tied, width = model.input, model.outputs == 0, model.width
        if model.input == "tokens":
            self.embed = nn.Embedding(model.vocabulary, width)
        elif model.input == "features":
            self.stem = nn.Linear(model.vocabulary, width)
        else:
            self.patches = nn.Conv2d(model.vocabulary, width, 2, stride=2)
        self.positions = nn.Embedding(model.positions, width) if model.positions else None
        self.layers = nn.ModuleList()
        for layer in model.layers:
            stages = [Stage(width, layer) for _ in range(layer.copies)]
            if layer.tied:
                for stage in stages[1:]:
                    _tie(stage, stages[0])
            self.layers.extend(stages)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, model.outputs or model.vocabulary, bias=model.outputs > 0)
        if self.tied:
            self.head.weight = self.embed.weight
        self.pool = nn.Linear(width, 3) if model.pooled else None

    def forward(self, inputs: Tensor, mask: Tensor | None = None) -> Any:
        """Return scores ``[batch, positions, outputs]``, in a mapping if there is a second output, ``[batch, 3]``.

        Args:
            inputs: ids ``[batch, positions]``, features ``[batch, positions, features]``, or an image ``[batch,
                channels, height, width]``.
            mask: a factor for every position, ``[batch, positions]``.
        """
        if self.kind == "tokens":
            x = self.embed(inputs)
        elif self.kind == "features":
            x = self.stem(inputs)
        else:
            x = self.patches(inputs).flatten(2).mT
        if self.positions is not None:
            x = x + self.positions(torch.arange(x.shape[1], device=x.device))
        if mask is not None:
            x = x * mask.unsqueeze(-1)
        for stage in self.layers:
            x = stage(x)
        x = self.norm(x)
        logits: Tensor = self.head(x)
        return logits if self.pool is None else {"logits": logits, "pooled": torch.tanh(self.pool(x.mean(1)))}


def _tie(stage: Stage, first: Stage) -> None:
    """Let a stage share the first weight of another, under all of its names."""
    shared = next(p for p in first.parts.parameters() if p.dim() > 1)
    for name, parameter in first.parts.named_parameters(remove_duplicate=False):
        if parameter is shared:
            path, _, last = name.rpartition(".")
            setattr(stage.parts.get_submodule(path), last, shared)


def build(model: Model, dtype: torch.dtype = torch.float64) -> nn.Module:
    """Return the module of a description in eval mode and frozen; the same description has the same weights."""
    if model.family is not None:
        return tiny(model.family, seed=model.seed, dtype=dtype, **model.config).requires_grad_(False)
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(model.seed)
        grown = Grown(model)
    return randomise(grown, seed=model.seed).to(dtype).eval().requires_grad_(False)


def untied(built: nn.Module, paths: Sequence[str]) -> nn.Module:
    """Return a copy of a module in which modules have weights of their own, with the values of those they share."""
    copied = copy.deepcopy(built)
    for path in paths:
        module = copied.get_submodule(path)
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(parameter.detach().clone(), requires_grad=False))
    return copied


def inputs_of(model: Model, built: nn.Module, sizes: tuple[int, int], seed: int = 0) -> dict[str, Tensor]:
    """Return random inputs for a model.

    Args:
        model: the description.
        built: its module, whose dtype the inputs have.
        sizes: batch, and positions. An image of the grammar has twice as many rows, and four columns; those of
            transformers' classes have one size.
        seed: the seed of the values.
    """
    generator = torch.Generator().manual_seed(seed)
    dtype = next(built.parameters()).dtype
    if model.family is not None:
        return _library_inputs(model.family, sizes, dtype, generator)
    batch, length = sizes
    if model.input == "tokens":
        inputs = torch.randint(0, model.vocabulary, sizes, generator=generator)
    elif model.input == "image":
        inputs = torch.randn(batch, model.vocabulary, 2 * length, 4, generator=generator).to(dtype)
    else:
        inputs = torch.randn(batch, length, model.vocabulary, generator=generator).to(dtype)
    call = {"inputs": inputs}
    if model.masked:
        positions = 2 * length if model.input == "image" else length
        call["mask"] = torch.rand(batch, positions, generator=generator).to(dtype)
    return call


def _library_inputs(
    family: str, sizes: tuple[int, int], dtype: torch.dtype, generator: torch.Generator
) -> dict[str, Tensor]:
    """Return ids with padding at the end of the first row, or images of the size that `graftc.testing.tiny` has."""
    if family == "vit":
        return {"pixel_values": torch.randn(sizes[0], 3, 32, 32, generator=generator).to(dtype)}
    call = {"input_ids": torch.randint(5, VOCABULARY, sizes, generator=generator)}
    call["attention_mask"] = torch.ones(sizes, dtype=torch.int64)
    call["attention_mask"][0, -1] = 0
    if family == "t5":
        call["decoder_input_ids"] = torch.randint(5, VOCABULARY, (sizes[0], sizes[1] - 1), generator=generator)
    return call
