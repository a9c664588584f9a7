"""A server of adapters, to measure what remains of the adapters that it has removed."""

from __future__ import annotations

import gc
from collections import Counter
from typing import Any

import torch
from torch import nn

import graftc

INPUTS = torch.ones(2, 4)


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        outputs: torch.Tensor = self.down(torch.relu(self.up(x)))
        return outputs


class Server:
    """A server with one live model that also compiles other models over the same base."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.base = Base().eval()
        self.live: Any = graftc.compile({"adapt": [self.entry("first", "up")]}, self.base, (INPUTS,)).eval()
        self.served = 0

    @staticmethod
    def entry(name: str, module: str) -> dict[str, Any]:
        return {"method": "lora", "name": name, "rank": 1, "target": {"modules": [module]}}

    @torch.no_grad()
    def serve(self) -> None:
        """Serve one adapter in the live model and remove it again.

        Every sixth adapter is also disabled for one call in the live model and served by a model of its own.
        """
        self.served += 1
        name = f"adapter_{self.served}"
        self.live.add(self.entry(name, "down"))
        self.live(INPUTS)
        if self.served % 6 == 1:
            with self.live.disabled(name):
                self.live(INPUTS)
            own: Any = graftc.compile({"adapt": [self.entry(name, "up")]}, self.base, (INPUTS,)).eval()
            own(INPUTS)
        self.live.remove(name)


def live_objects() -> Counter[str]:
    """Return the number of live objects of graftc, of graphs and of modules, by type."""
    gc.collect()
    kinds = (type(each) for each in gc.get_objects())
    names = (f"{kind.__module__}.{kind.__qualname__}" for kind in kinds)
    return Counter(name for name in names if name.startswith(("graftc.", "torch.fx", "torch.nn", "builtins.function")))
