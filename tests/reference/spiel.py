"""A reference for SpIEL with dense weights, gradients and masks, written for clarity in plain torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class Settings:
    """The settings of a training; ``own`` has the flat indices of the trainable entries of each weight, by name."""

    variant: str
    interval: int
    accumulation_steps: int
    drop_fraction: float
    decay: str
    total: int
    own: Mapping[str, Tensor]
    lr: float
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8


class Dense:
    """One weight and its state, in flat tensors of the weight's size."""

    def __init__(self, weight: nn.Parameter, indices: Tensor, own: Tensor, settings: Settings) -> None:
        self.weight, self.settings = weight, settings
        self.base = weight.detach().clone().flatten()
        self.delta = torch.zeros_like(self.base)
        self.active = torch.zeros(self.base.shape, dtype=torch.bool)
        self.active[indices.long()] = True
        self.own = torch.zeros_like(self.active)
        self.own[own] = True
        self.count = int(self.active.sum())
        self.first, self.second, self.age = (torch.zeros_like(self.base) for _ in range(3))
        columns = weight.shape[-1]
        self.row = torch.arange(self.base.numel()) // columns
        self.column = torch.arange(self.base.numel()) % columns
        self.rows = self.base.new_zeros(self.base.numel() // columns)
        self.columns = self.base.new_zeros(columns)
        self.candidates: Tensor | None = None
        self.sum, self.square = torch.zeros_like(self.base), torch.zeros_like(self.base)
        self.history: list[Tensor] = []

    def put(self) -> None:
        """Write the changed weight into the model."""
        with torch.no_grad():
            self.weight.copy_((self.base + self.delta).view_as(self.weight))

    def adamw(self, g: Tensor) -> None:
        """Take an AdamW step, with a step count for each entry."""
        s, on = self.settings, self.active
        b1, b2 = s.betas
        self.age[on] += 1
        self.first[on] = b1 * self.first[on] + (1 - b1) * g[on]
        self.second[on] = b2 * self.second[on] + (1 - b2) * g[on] ** 2
        m = self.first[on] / (1 - b1 ** self.age[on])
        v = self.second[on] / (1 - b2 ** self.age[on])
        self.delta[on] = self.delta[on] * (1 - s.lr * s.weight_decay) - s.lr * m / (v.sqrt() + s.eps)

    def sm3(self, g: Tensor) -> None:
        """Take an SM3 step on active entries, with the accumulators of the full weight."""
        on = self.active.nonzero().flatten()
        bound = torch.minimum(self.rows[self.row[on]], self.columns[self.column[on]]) + g[on] ** 2
        for entry, value in zip(on.tolist(), bound, strict=True):
            i, j = self.row[entry], self.column[entry]
            self.rows[i] = torch.maximum(self.rows[i], value)
            self.columns[j] = torch.maximum(self.columns[j], value)
        self.delta[on] -= self.settings.lr * g[on] / (bound + self.settings.eps).sqrt()

    def look(self, g: Tensor) -> None:
        """Record the gradients of one optimiser step of a window."""
        if self.candidates is None:
            own = self.own.nonzero().flatten()
            self.candidates = own[g[own].abs().argsort(descending=True, stable=True)[: self.count]]
            self.sum.zero_()
            self.square.zero_()
        self.sum[self.candidates] += g[self.candidates]
        self.square[self.candidates] += g[self.candidates] ** 2

    def replace(self, share: float) -> None:
        """Drop and grow a share of the entries."""
        s = self.settings
        on = self.active.nonzero().flatten()
        n = math.floor(share * self.count + 1e-9)
        dropped = on[self.delta[on].abs().argsort(stable=True)[:n]]
        if s.variant == "AG":
            assert self.candidates is not None
            stays = self.active.clone()
            stays[dropped] = False
            free = self.candidates[~stays[self.candidates]].sort().values
            grown = free[self.sum[free].abs().argsort(descending=True, stable=True)[:n]]
        else:
            free = (self.own & ~self.active).nonzero().flatten()
            score = self.rows[self.row[free]] * self.columns[self.column[free]]
            grown = free[score.argsort(descending=True, stable=True)[:n]]
        both = set(dropped.tolist()) & set(grown.tolist())
        new = [e for e in grown.tolist() if e not in both]
        old = [e for e in dropped.tolist() if e not in both][: len(new)]
        assert len(old) == len(new)
        for kind in (self.delta, self.first, self.second, self.age):
            kind[old] = 0
        self.active[old] = False
        self.active[new] = True
        if s.variant == "AG":
            steps, (b1, b2) = s.accumulation_steps, s.betas
            self.first[new] = self.sum[new] / steps * (1 - b1**steps)
            self.second[new] = self.square[new] / steps * (1 - b2**steps)
            self.age[new] = steps


def train(
    model: nn.Module,
    indices: Mapping[str, Tensor],
    settings: Settings,
    steps: int,
    loss: Callable[[nn.Module, int], Tensor],
) -> dict[str, Dense]:
    """Train some entries of a model's weights; the model is changed.

    Args:
        model: a plain model of any class.
        indices: flat indices of the entries that train at first, by the weight's name.
        settings: the settings of the training.
        steps: the number of steps to take.
        loss: the loss of a step, counted from 1.
    """
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    weights: dict[str, Dense] = {}
    for name, start in indices.items():
        weight: Any = model.get_parameter(name)
        weight.requires_grad_(True)
        weights[name] = Dense(weight, start, settings.own[name], settings)
    model.train()
    for t in range(1, steps + 1):
        for dense in weights.values():
            dense.put()
            dense.weight.grad = None
        loss(model, t).backward()
        phase = (t - 1) % settings.interval + 1
        for dense in weights.values():
            assert dense.weight.grad is not None
            g = dense.weight.grad.detach().flatten()
            if settings.variant == "AG":
                dense.adamw(g)
                if phase <= settings.accumulation_steps:
                    dense.look(g)
            else:
                dense.sm3(g)
            if phase == settings.accumulation_steps:
                dense.replace(share_of(settings, t))
                dense.candidates = None
            dense.history.append(dense.active.nonzero().flatten())
    return weights


def share_of(settings: Settings, t: int) -> float:
    """Return the share of entries that is replaced after step ``t``."""
    if t == settings.accumulation_steps:
        return 1.0
    left = t / settings.total
    fall = 1 - left if settings.decay == "linear" else (1 + math.cos(math.pi * left)) / 2
    return settings.drop_fraction * fall
