"""A capture is unharmed if another thread leaves out modes in the middle of it, as first calls and prints do."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes

import graftc
from graftc.compiler.capture.isolation import is_traced, isolated
from graftc.passes.core.packing.packing import real_values
from graftc.runtime.activations import training_code

SPEC = {"adapt": [{"method": "lora", "rank": 2, "target": {"modules": "*"}}]}
Run = Callable[[Callable[[], None]], object]
X = torch.linspace(-1, 1, 12).reshape(2, 6)


class Net(nn.Module):
    """A model that calls a function in the middle of its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.out = nn.Linear(6, 5), nn.Linear(5, 3)
        self.between: Callable[[], object] = list

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.fc(x)
        self.between()
        output: Tensor = self.out(hidden.relu())
        return output


class Step:
    """Work of another thread that stops at some point and, on request, runs to its end."""

    def __init__(self, run: Run) -> None:
        self.run, self.reached, self.leave = run, threading.Event(), threading.Event()
        self.error: BaseException | None = None
        self.waited = False
        self.thread = threading.Thread(target=self.whole)

    def whole(self) -> None:
        try:
            self.run(self.wait)
        except BaseException as error:
            self.error = error
        self.reached.set()

    def wait(self) -> None:
        self.waited = True
        self.reached.set()
        assert self.leave.wait(60)

    def begin(self) -> None:
        if not self.thread.ident:
            self.thread.start()
            assert self.reached.wait(60)

    def end(self) -> None:
        self.leave.set()
        self.thread.join()
        if self.error is not None:
            raise self.error


def inside(context: Callable[[], AbstractContextManager[Any]]) -> Callable[[], Run]:
    def run(wait: Callable[[], None]) -> None:
        with context():
            wait()

    return lambda: run


def training_call() -> Run:
    """Return a first training call, which plans with fake tensors what is kept for the backward pass."""
    other, record = with_lora(Net()).train(), training_code.record
    with torch.no_grad():
        other(X)  # code is lowered by one thread at a time

    def run(wait: Callable[[], None]) -> None:
        def waiting(*args: Any, **kwargs: Any) -> Any:
            wait()
            return record(*args, **kwargs)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(training_code, "record", waiting)
            other(X).sum().backward()

    return run


def with_lora(net: Net) -> Any:
    return graftc.compile(SPEC, net.requires_grad_(False).eval(), {"x": torch.zeros(2, 6)}, cache=False)


OTHERS = {
    "isolated": inside(isolated),
    "values of codes": inside(real_values),
    "torch, to print a tensor": inside(_disable_current_modes),
    "fake tensors": inside(FakeTensorMode),
    "first training call": training_call,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("ends", ["within", "after"])
def test_a_capture_goes_on(name: str, ends: str) -> None:
    """Work that another thread begins in the middle of the capture ends in the middle of it, or after it."""
    step, net, once = Step(OTHERS[name]()), Net(), list[bool]()

    def between() -> None:
        if not once and is_traced():
            once.append(True)
            step.begin()
            if ends == "within":
                step.end()

    net.between = between
    try:
        compiled = with_lora(net)
    finally:
        if ends == "after":
            step.end()
    assert once and step.waited
    net.between = list
    assert torch.equal(compiled.eval()(X), net(X))
    assert not torch._ops._len_torch_dispatch_stack_pre_dispatch()
