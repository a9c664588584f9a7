"""An adaptation reads a site's input as the site's own map does, even if the model changes it in place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graftc


class Net(nn.Module):
    """Two maps, with a change in between."""

    def __init__(self, change: Callable[[Tensor], Tensor], behind: bool) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 5)
        self.change, self.behind = change, behind

    def forward(self, x: Tensor) -> Any:
        h = torch.nn.functional.silu(self.a(x)) + 0.5
        y = self.b(h if self.behind else self.change(h))
        return self.change(y * 1) if self.behind else y


def scaled(h: Tensor) -> Tensor:
    h[:, 0] *= 2
    return h


def zeroed(h: Tensor) -> Tensor:
    h[:, 1:4].zero_()
    return h


def twice(h: Tensor) -> Tensor:
    h2 = h * 1
    h2 += 0.3
    h2[:, 1:3].copy_(h[:, 3:5] * 0.5)
    return h2


@pytest.mark.parametrize("behind", [False, True])
@pytest.mark.parametrize("change", [scaled, zeroed, twice])
def test_the_input_is_read_when_the_map_reads_it(change: Callable[[Tensor], Tensor], behind: bool) -> None:
    torch.manual_seed(0)
    net = Net(change, behind).double()
    spec = {"adapt": [{"method": "lora", "rank": 2, "alpha": 2, "target": {"modules": "b"}}]}
    compiled: Any = graftc.compile(spec, net, {"x": torch.randn(3, 6).double()}).train()
    factors = {name.rpartition(".")[2]: p for name, p in compiled.named_parameters() if p.requires_grad}
    with torch.no_grad():
        factors["B"].normal_()
    x = torch.randn(4, 6).double()
    seen: list[Tensor] = []
    handle = net.b.register_forward_hook(lambda module, given, result: seen.append(given[0].clone()) or None)
    with torch.no_grad():
        plain = net(x)
    handle.remove()
    update = seen[0] @ factors["A"].T @ factors["B"].T
    expected = plain + update if not behind else change((net.b(seen[0]) + update) * 1)
    for mode in (True, False):
        torch.testing.assert_close(compiled.train(mode)(x), expected, rtol=1e-12, atol=1e-12)
    compiled.train()(x).square().sum().backward()
    (gradient,) = torch.autograd.grad(expected.square().sum(), [factors["B"]])
    torch.testing.assert_close(factors["B"].grad, gradient, rtol=1e-10, atol=1e-12)
