"""Modules whose eval mode differs from train mode without dropout, each in its own way."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations


class Base(nn.Module):
    """Two layers for all of them to adapt; subclasses define in `body` or `head` what eval mode does differently."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 12)
        self.fc = nn.Linear(12, 5)
        self.build()

    def build(self) -> None:
        """Add more modules."""

    def forward(self, x: Tensor) -> Any:
        return self.head(self.fc(torch.tanh(self.body(self.inner(x)))))

    def body(self, h: Tensor) -> Tensor:
        return h

    def head(self, z: Tensor) -> Any:
        return z


class Softmax(Base):
    def head(self, z: Tensor) -> Tensor:
        return z if self.training else z.softmax(-1)


class Scaled(Base):
    def body(self, h: Tensor) -> Tensor:
        return h * (1.0 if self.training else 0.5)


class SmallScale(Base):
    def head(self, z: Tensor) -> Tensor:
        return z if self.training else z * 1.001


class TrainOnlyOutput(Base):
    def head(self, z: Tensor) -> Any:
        return (z, z.exp()) if self.training else z


class EvalOnlyOutput(Base):
    def head(self, z: Tensor) -> Any:
        return {"z": z} if self.training else {"z": z, "probabilities": z.softmax(-1)}


class OtherShape(Base):
    def head(self, z: Tensor) -> Tensor:
        return z if self.training else z.argmax(-1)


class OtherType(Base):
    def head(self, z: Tensor) -> Tensor:
        return z if self.training else z.double()


class Spectral(Base):
    def build(self) -> None:
        self.bounded = parametrizations.spectral_norm(nn.Linear(12, 12))

    def body(self, h: Tensor) -> Tensor:
        return h + self.bounded(h)


class EmaBuffer(Base):
    mean: Tensor

    def build(self) -> None:
        self.register_buffer("mean", torch.full((12,), 0.3))

    def body(self, h: Tensor) -> Tensor:
        if self.training:
            self.mean.mul_(0.9).add_(h.detach().mean(0), alpha=0.1)
            return h - h.mean(0)
        return h - self.mean


class GaussianNoise(Base):
    def body(self, h: Tensor) -> Tensor:
        return h + 0.1 * torch.randn_like(h) if self.training else h


class OtherPath(Base):
    def build(self) -> None:
        self.student, self.teacher = nn.Linear(12, 12), nn.Linear(12, 12)

    def body(self, h: Tensor) -> Tensor:
        return self.student(h) if self.training else self.teacher(h)


class SkippedLayer(Base):
    def build(self) -> None:
        self.auxiliary = nn.Linear(12, 12)

    def body(self, h: Tensor) -> Tensor:
        return h + self.auxiliary(h) if self.training else h


class Clipped(Base):
    def head(self, z: Tensor) -> Tensor:
        return z if self.training else z.clamp(-0.05, 0.05)


class Temperature(Base):
    def build(self) -> None:
        self.temperature = nn.Parameter(torch.tensor(2.0))

    def head(self, z: Tensor) -> Tensor:
        return z if self.training else z / self.temperature


class UnscaledDropout(Base):
    """Dropout in its original form: kept elements are scaled down in eval mode instead of up in training."""

    def body(self, h: Tensor) -> Tensor:
        return F.dropout(h, 0.5) * 0.5 if self.training else h * 0.5 + 0.01


class Ensemble(Base):
    def body(self, h: Tensor) -> Tensor:
        return h if self.training else (h + h.flip(-1)) / 2


class SubmoduleFlag(Base):
    def build(self) -> None:
        self.gate = _Gate()

    def body(self, h: Tensor) -> Tensor:
        gated: Tensor = self.gate(h)
        return gated


class _Gate(nn.Module):
    def forward(self, h: Tensor) -> Tensor:
        return h.relu() if self.training else F.gelu(h)


def _hooked() -> Base:
    model = Base()
    model.inner.register_forward_hook(lambda module, args, out: out if module.training else out * 0.7)
    return model


DIFFERING: Mapping[str, Callable[[], Base]] = {
    **{cls.__name__: cls for cls in Base.__subclasses__()},
    "Hook": _hooked,
}
