"""Several threads at once: new signatures, compiles and running models."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import graftc
from graftc.compiler.capture.isolation import exclusive
from graftc.compiler.resolve.untie import sharing_copy
from graftc.runtime.deploy.widening import widened
from graftc.runtime.model.runner import runner_of
from graftc.testing import tiny
from tests.kit.forks import fork

SPEC = {"adapt": [{"method": "lora", "rank": 2, "target": {"role": ["attn.q", "ffn.down"]}}]}


class Net(nn.Module):
    """A model that is captured quickly, with optional inputs and flags, each of which is a signature."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.out = nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor, shift: Tensor | None = None, scale: float = 1.0, double: bool = False) -> Tensor:
        hidden = self.fc(x) * scale
        if shift is not None:
            hidden = hidden + shift
        return self.out(hidden.relu()) * (2 if double else 1)


NET = {"adapt": [{"method": "lora", "rank": 2, "target": {"modules": "*"}}]}


def at_once(*jobs: Callable[[], Any]) -> list[Any]:
    """Run jobs in threads that start together, and return their results; the first error is raised."""
    results: list[Any] = [None] * len(jobs)
    barrier = threading.Barrier(len(jobs))

    def run(number: int, job: Callable[[], Any]) -> None:
        barrier.wait()
        try:
            results[number] = job()
        except BaseException as error:
            results[number] = error

    threads = [threading.Thread(target=run, args=item) for item in enumerate(jobs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for item in results:
        if isinstance(item, BaseException):
            raise item
    assert not torch.compiler.is_compiling() and not torch.compiler.is_exporting()
    return results


def calls() -> Sequence[dict[str, Any]]:
    x, shift = torch.randn(4, 6), torch.randn(4, 5)
    return [
        {"x": x},
        {"x": x, "shift": shift},
        {"x": x, "scale": 2.0},
        {"x": x, "scale": 3.0},
        {"x": x, "double": True},
        {"x": x, "shift": shift, "double": True},
        {"x": x, "shift": shift, "scale": 2.0},
        {"x": x, "scale": 3.0, "double": True},
    ]


@pytest.fixture
def net() -> nn.Module:
    return Net().requires_grad_(False).eval()


@pytest.mark.full
@pytest.mark.parametrize("same", [False, True])
def test_eight_threads_with_new_signatures(net: nn.Module, same: bool) -> None:
    given = [calls()[5]] * 8 if same else calls()
    compiled = graftc.compile(NET, net, {"x": torch.zeros(2, 6)}, cache=False).eval()
    before = dict(vars(net))
    results = at_once(*(lambda call=call: compiled(**call) for call in given))
    for call, result in zip(given, results, strict=True):
        assert torch.equal(result, net(**call))
    assert vars(net) == before
    assert len(compiled.compilation.signatures) == (2 if same else 8)


@pytest.mark.slow
def test_both_modes_and_the_base_in_threads(net: nn.Module) -> None:
    """Code of another mode is lowered at its first use, while other threads run."""
    models = [graftc.compile(NET, net, {"x": torch.zeros(2, 6)}, cache=False).train(mode) for mode in (True, False)]
    given = calls()
    results = at_once(*(lambda m=m, c=c: m(**c) for m in models for c in given[:4]))
    for call, result in zip([*given[:4], *given[:4]], results, strict=True):
        assert torch.equal(result, net(**call))


@pytest.mark.slow
def test_two_compiles_of_one_model_at_once(net: nn.Module) -> None:
    x = torch.randn(3, 6)
    for _ in range(3):
        models = at_once(*[lambda: graftc.compile(NET, net, {"x": torch.zeros(2, 6)}, cache=False)] * 2)
        for compiled in models:
            assert torch.equal(compiled.eval()(x), net(x))


@pytest.mark.full
def test_a_compile_beside_models_that_run(net: nn.Module) -> None:
    """Neither another compiled model nor plain modules are affected by a capture in another thread."""
    given = calls()[1]
    running = graftc.compile(NET, net, given, cache=False).eval()
    bank = graftc.compile(SPEC, tiny("bert"), cache=False).train()
    ids = torch.randint(2, 90, (2, 7))
    expected, done = net(**given), threading.Event()

    def compile_some() -> int:
        try:
            graftc.compile(SPEC, tiny("bert", seed=1), cache=False)
        finally:
            done.set()
        return 0

    def run() -> int:
        count = 0
        while not done.is_set() or count == 0:
            assert torch.equal(running(**given), expected)
            loss = bank(input_ids=ids, labels=torch.tensor([0, 1])).loss
            loss.backward()
            count += 1
            time.sleep(0.05)
        return count

    assert at_once(compile_some, run)[1] > 0


@pytest.mark.full
def test_a_new_signature_while_another_thread_captures(net: nn.Module) -> None:
    """A run of torch.export elsewhere in the process does not make this call count as compiled."""
    first = graftc.compile(NET, net, {"x": torch.zeros(2, 6)}, cache=False).eval()
    other = Net().requires_grad_(False).eval()
    second = graftc.compile(NET, other, {"x": torch.zeros(2, 6)}, cache=False).eval()
    jobs = [lambda m=m, c=c: m(**c) for c in calls()[1:5] for m in (first, second)]
    results = at_once(*jobs)
    for number, call in enumerate(calls()[1:5]):
        assert results[2 * number].shape == net(**call).shape


class Stack(nn.Module):
    """A model of equal layers, most of which are hidden while it is traced."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Net() for _ in range(8)])
        self.back = nn.Linear(3, 6)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        for layer in self.layers:
            x = self.back(layer(x))
        return x * scale


def _source_names(runner: Any) -> list[str]:
    return [*runner.compilation.source.state_dict()]


def _merged(compiled: Any, merged: Any, folder: Path) -> Any:
    merged.save(folder)
    return load_file(folder / "model.safetensors").keys()


READERS: dict[str, Callable[[Any, Any, Path], Any]] = {
    "fingerprint": lambda compiled, merged, _: compiled.compilation.identity().fingerprint,
    "widened": lambda compiled, merged, _: [
        *widened(runner_of(compiled), torch.float32).compilation.source.state_dict()
    ],
    "copy": lambda compiled, merged, _: [*sharing_copy(compiled.compilation.source).state_dict()],
    "artifact": lambda compiled, merged, folder: json.loads(
        (compiled.save(folder, certify=False) / "manifest.json").read_bytes()
    )["base"],
    "merged": _merged,
}


@pytest.mark.sample("fingerprint")
@pytest.mark.slow
@pytest.mark.parametrize("reader", READERS)
def test_reading_the_source_waits_for_a_capture(reader: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """During a trace, the model's tables are empty or contain fake tensors, and a file would lack layers."""
    x = torch.randn(4, 6, dtype=torch.bfloat16)
    compiled: Any = graftc.compile(NET, Stack().bfloat16(), {"x": x}, cache=False).eval()
    merged = compiled.merge(allow_unchanged=True)
    wanted, export = READERS[reader](compiled, merged, tmp_path / "quiet"), torch.export.export
    tracing, read = threading.Event(), threading.Event()

    def paused(*args: Any, **kwargs: Any) -> Any:
        tracing.set()
        read.wait(0.5)
        return export(*args, **kwargs)

    def beside() -> Any:
        assert tracing.wait(60)
        try:
            return READERS[reader](compiled, merged, tmp_path / "beside")
        finally:
            read.set()

    monkeypatch.setattr(torch.export, "export", paused)
    _, seen = at_once(lambda: compiled(x, scale=2.0), beside)
    assert seen == wanted


@pytest.mark.slow
def test_a_forked_child_is_not_locked_out(net: nn.Module) -> None:
    if not hasattr(os, "fork"):
        pytest.skip("no fork")
    locked, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with exclusive():
            locked.set()
            leave.wait(30)

    thread = threading.Thread(target=hold)
    thread.start()
    locked.wait(10)
    child = fork()
    if child == 0:  # whatever happens here, the child must not continue as a second test run
        try:
            with exclusive():
                os._exit(0)
        finally:
            os._exit(1)
    leave.set()
    thread.join()
    assert os.waitpid(child, 0)[1] == 0
