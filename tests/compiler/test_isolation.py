"""Graphs do not depend on the state of the thread that creates them, and that state is the same afterwards."""

from __future__ import annotations

import gc
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_buffer_registration_hook
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.module_tracker import ModuleTracker

import graftc
from graftc.compat.hooks import global_hooks
from graftc.compiler.capture.isolation import exclusive, isolated
from graftc.passes.core.ir.printer import format_program
from graftc.specs.errors.diagnostics import GraftError

SPEC = {"adapt": [{"method": "lora", "rank": 2, "target": {"modules": "fc"}}]}
EXAMPLE = {"x": torch.zeros(2, 6)}


class Net(nn.Module):
    """A model whose forward creates tensors of the default dtype, on the default device."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) * torch.linspace(0, 1, 4) + torch.ones(4).softmax(-1)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def default_device(device: str) -> Iterator[None]:
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


class Halving(TorchFunctionMode):
    """A function mode that halves every floating-point result."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        return result / 2 if isinstance(result, torch.Tensor) and result.is_floating_point() else result


class Several(Net):
    """A model for which a second input leads to a second graph."""

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        return super().forward(x if y is None else x + y)


class Passing(TorchFunctionMode):
    """A function mode that changes nothing."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class Looking(TorchDispatchMode):
    """A dispatch mode that changes nothing."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class Failing(TorchDispatchMode):
    """A dispatch mode in which no operator works."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(str(func))


STATES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "autocast bfloat16": lambda: torch.autocast("cpu", torch.bfloat16),
    "autocast float16": lambda: torch.autocast("cpu", torch.float16),
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "default dtype float64": lambda: default_dtype(torch.float64),
    "default dtype bfloat16": lambda: default_dtype(torch.bfloat16),
    "default device": lambda: default_device("meta"),
    "device context": lambda: torch.device("meta"),
    "function mode": Halving,
    "dispatch mode": Failing,
}


def state() -> tuple[Any, ...]:
    """Return the current values of everything that `isolated` changes."""
    modes = torch.overrides._get_current_function_mode_stack()
    return (
        torch.is_autocast_enabled("cpu"),
        torch.get_autocast_dtype("cpu"),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.get_default_dtype(),
        torch.get_default_device(),
        [id(mode) for mode in modes],
        [id(mode) for mode in torch.utils._python_dispatch._get_current_dispatch_mode_stack()],
        torch.compiler.is_compiling(),
        torch.compiler.is_exporting(),
    )


@pytest.fixture(scope="module")
def source() -> nn.Module:
    return Net().requires_grad_(False).eval()


@pytest.fixture(scope="module")
def plain(source: nn.Module) -> str:
    return format_program(graftc.compile(SPEC, source, EXAMPLE, cache=False).compilation.program("train"))


@pytest.mark.parametrize("name", STATES)
def test_inside_torch_is_as_in_a_new_process_and_afterwards_as_before(name: str) -> None:
    fresh = state()
    with STATES[name]():
        before = state()
        assert before != fresh
        for manager in (isolated, exclusive):
            with manager():
                assert state()[:1] + state()[2:] == fresh[:1] + fresh[2:]
            assert state() == before
            with pytest.raises(KeyError), manager(), manager():
                raise KeyError
            assert state() == before
    assert state() == fresh


@pytest.mark.parametrize("name", ["autocast bfloat16", "inference_mode", "default dtype float64", "default device"])
def test_graphs_are_the_same_whatever_state_they_are_made_in(name: str, source: nn.Module, plain: str) -> None:
    with STATES[name]():
        before = state()
        compiled = graftc.compile(SPEC, source, EXAMPLE, cache=False)
        assert state() == before
    assert format_program(compiled.compilation.program("train")) == plain
    assert all(p.dtype == torch.float32 and p.device.type == "cpu" for p in compiled.parameters())
    assert not any(p.is_inference() for p in compiled.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", STATES)
def test_a_failed_compile_leaves_the_callers_state(name: str, source: nn.Module) -> None:
    with STATES[name]():
        before = state()
        with pytest.raises(graftc.GraftError):
            graftc.compile(
                {"adapt": [{"method": "lora", "target": {"modules": "nowhere"}}]}, source, EXAMPLE, cache=False
            )
        assert state() == before


def test_the_default_dtype_is_restored_when_threads_overlap() -> None:
    """It belongs to the whole process: the last thread to leave restores what the first one found."""
    entered, leave = threading.Event(), threading.Event()

    def other() -> None:
        with isolated():
            entered.set()
            leave.wait(10)

    with default_dtype(torch.float64):
        thread = threading.Thread(target=other)
        with isolated():
            thread.start()
            entered.wait(10)
        assert torch.get_default_dtype() == torch.float32
        leave.set()
        thread.join()
        assert torch.get_default_dtype() == torch.float64


def test_cycles_of_objects_are_looked_for_as_before_once_a_graph_is_made() -> None:
    """While a graph is created, garbage collection is rare, unless the caller has made it rarer still."""
    before, inside = gc.get_threshold(), list[tuple[int, int, int]]()

    class Asking(Net):
        def forward(self, x: Tensor) -> Tensor:
            inside.append(gc.get_threshold())
            return super().forward(x)

    def asked(*thresholds: int) -> tuple[int, int, int]:
        gc.set_threshold(*thresholds)
        inside.clear()
        graftc.check(SPEC, Asking(), EXAMPLE)
        assert gc.get_threshold() == thresholds
        return inside[0]

    try:
        assert min(asked(700, 10, 10)) > 10
        assert asked(10**6, 10, 10)[0] == 10**6
        assert asked(0, 10, 10) == (0, 10, 10)
    finally:
        gc.set_threshold(*before)


def counting(calls: list[Any]) -> AbstractContextManager[Any]:
    """Return a context with hooks on every module of the process, as profilers install them."""

    @contextmanager
    def hooked() -> Iterator[None]:
        hear = lambda module, *_: calls.append(module)  # noqa: E731
        handles = [
            torch.nn.modules.module.register_module_forward_pre_hook(hear),
            torch.nn.modules.module.register_module_forward_hook(hear, always_call=True),
            torch.nn.modules.module.register_module_full_backward_hook(hear),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    return hooked()


WATCHING: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "flops": lambda: FlopCounterMode(display=False),
    "modules": ModuleTracker,
    "global hooks": lambda: counting([]),
    "function mode": Passing,
    "dispatch mode": Looking,
    "profiler": lambda: torch.profiler.profile(with_modules=True),
}


@pytest.mark.slow
@pytest.mark.sample("True-flops")
@pytest.mark.parametrize("name", WATCHING)
@pytest.mark.parametrize("cached", [True, False])
def test_who_watches_a_call_finds_no_change(name: str, cached: bool, tmp_path: Path, monkeypatch: Any) -> None:
    """A call that is captured while something watches warns of no change, and its graph is the usual one."""
    monkeypatch.setenv("GRAFTC_CACHE", str(tmp_path))
    source = Several().eval()
    expected, compiled = (graftc.compile(SPEC, source, EXAMPLE, cache=cached).eval() for _ in range(2))
    given = {"x": torch.ones(2, 6), "y": torch.ones(2, 6)}
    wanted = expected(**given)
    with warnings.catch_warnings(), WATCHING[name]():
        warnings.simplefilter("error", graftc.GraftWarning)
        actual = compiled(**given)
    torch.testing.assert_close(actual, wanted)
    keys = [key for key in compiled.compilation.programs if "y:f32[2]" in key.signature.inputs]
    assert keys
    for key in keys:
        assert format_program(compiled.compilation.programs[key]) == format_program(expected.compilation.programs[key])


def test_hooks_on_every_module_hear_of_other_threads_while_a_graph_is_made() -> None:
    calls: list[Any] = []
    plain, leave, entered = nn.Linear(2, 2), threading.Event(), threading.Event()

    def other() -> None:
        entered.wait(10)
        plain(torch.ones(1, 2))
        leave.set()

    thread = threading.Thread(target=other)
    thread.start()
    with counting(calls):
        with exclusive():
            plain(torch.ones(1, 2))
            assert not calls
            entered.set()
            assert leave.wait(10)
        assert len(calls) == 2
        plain(torch.ones(1, 2))
        assert len(calls) == 4
    thread.join()
    plain(torch.ones(1, 2))
    assert len(calls) == 4


def test_hooks_that_a_failed_export_leaves_behind_are_removed() -> None:
    """torch 2.11 leaves one in every module of the process; hooks of others stay."""
    table = global_hooks()["global_buffer_registration_hooks"]

    def of_torch(*_: Any) -> None:
        pass

    of_torch.__module__ = "torch._functorch._aot_autograd.utils"
    before = dict(table)
    with pytest.raises(ValueError, match="the export failed"), exclusive():
        register_module_buffer_registration_hook(of_torch)
        other = register_module_buffer_registration_hook(lambda *_: None)
        raise ValueError("the export failed")
    try:
        assert table.keys() - before.keys() == {other.id}
    finally:
        other.remove()


def test_a_model_that_cannot_be_captured_leaves_no_hook() -> None:
    class Undecided(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * float(x.sum()) if x.sum() > 0 else x

    before = {name: dict(table) for name, table in global_hooks().items()}
    model = nn.Sequential(nn.Linear(2, 2), Undecided())
    spec = {"adapt": [{"method": "lora", "rank": 2, "target": {"modules": "0"}}]}
    with pytest.raises(GraftError):
        graftc.compile(spec, model, example_inputs={"input": torch.ones(1, 2)})
    assert {name: dict(table) for name, table in global_hooks().items()} == before
