"""Whatever reads all slots of a bank sees one moment, although other threads change them meanwhile."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graftc
from graftc.files.tensors.writing import save_tensors
from graftc.runtime.artifact import write
from graftc.runtime.export.exporting import Exporting, ready_export
from graftc.runtime.export.registry import exporter_of
from graftc.runtime.model.runner import runner_of
from graftc.testing import tiny
from tests.kit.serving import IDS

pytestmark = pytest.mark.slow
SPEC = {
    "adapt": [{"name": "first", "method": "lora", "rank": 2, "target": {"role": "attn.q"}}],
    "compose": {"bank": ["first"], "slots": 2, "name": "users"},
}
ONE, TWO = 1.0, 2.0


@pytest.fixture(scope="module")
def once() -> Any:
    compiled = graftc.compile(SPEC, tiny("llama").eval()).eval()
    compiled.bank().add("x", values(compiled, ONE))
    return compiled


@pytest.fixture
def compiled(once: Any) -> Any:
    """A bank in which every tensor of the adapter ``x`` is full of ones."""
    return copy.deepcopy(once)


def values(compiled: Any, value: float) -> dict[str, Tensor]:
    return {fqn: torch.full(t.shape[1:], value) for fqn, t in compiled.bank().slots.tensors.items()}


def numbers(compiled: Any, tensors: dict[str, Tensor]) -> set[float]:
    """Return the numbers in the slot of ``x``."""
    wanted = compiled.bank().slots.tensors
    return {number for fqn, tensor in tensors.items() if fqn in wanted for number in tensor[1].flatten().tolist()}


@contextmanager
def beside(change: Callable[[], object]) -> Iterator[threading.Thread]:
    """Make a change in another thread, which ends after the block at the latest."""
    thread = threading.Thread(target=change, daemon=True)
    thread.start()
    yield thread
    thread.join(20)
    assert not thread.is_alive()


def test_an_artifact_is_of_one_moment(compiled: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Digests and values are of the same tensors, though the adapter is replaced between the two."""
    bank, saved = compiled.bank(), save_tensors

    def save_and_change(tensors: Any, path: Path, **more: Any) -> None:
        saved(tensors, path, **more)
        bank.replace("x", values(compiled, TWO))
        bank.add("y", values(compiled, TWO))

    monkeypatch.setattr(write, "save_tensors", save_and_change)
    path = compiled.save(tmp_path / "artifact", certify=False)
    assert bank.names == ("first", "x", "y")
    loaded = graftc.load(path, tiny("llama").eval())
    assert loaded.bank().names == ("first", "x")
    assert numbers(loaded, loaded.bank().slots.tensors) == {ONE}


@pytest.mark.parametrize("name", ["adapter_state_dict", "full_state_dict", "state_dict"])
def test_state_dicts_do_not_change(compiled: Any, name: str) -> None:
    state = getattr(compiled, name)()
    compiled.bank().replace("x", values(compiled, TWO))
    assert numbers(compiled, state) == {ONE}
    if name == "state_dict":  # torch's promise for this argument is the parameters themselves
        kept = compiled.state_dict(keep_vars=True)
        assert numbers(compiled, kept) == {TWO}
        own = dict(compiled.named_parameters())
        assert all(kept[fqn] is own[fqn] for fqn in compiled.bank().slots.tensors)


def test_an_export_is_of_one_moment_and_shares_the_base(compiled: Any) -> None:
    job = ready_export(Exporting(runner_of(compiled)), exporter_of("pt2"), {}, None).job
    compiled.bank().replace("x", values(compiled, TWO))
    assert numbers(compiled, dict(job.runner.store.adapters())) == {ONE}
    mine, theirs = (dict(runner.store.base()) for runner in (runner_of(compiled), job.runner))
    assert mine.keys() == theirs.keys() and all(theirs[n].data_ptr() == t.data_ptr() for n, t in mine.items())


def test_changes_wait_for_a_copy_and_calls_do_not(compiled: Any) -> None:
    bank, found = compiled.bank(), {}

    class Probe(nn.Module):
        def __deepcopy__(self, memo: Any) -> Probe:
            for name, change in changes.items():
                thread = threading.Thread(target=change, daemon=True)
                thread.start()
                thread.join(0.1)
                found[name] = thread
            assert all(thread.is_alive() for thread in found.values())
            with torch.no_grad(), bank.use("x") as rows:
                compiled(IDS, adapter_ids=rows, use_cache=False)
            return self

    changes: dict[str, Callable[[], object]] = {
        "replace": lambda: bank.replace("x", values(compiled, TWO), wait=0.0),
        "add": lambda: bank.add("y", values(compiled, TWO)),
        "activate": lambda: compiled.activate("x"),
    }
    compiled.probe = Probe()
    copied = copy.deepcopy(compiled)
    for thread in found.values():
        thread.join(20)
        assert not thread.is_alive()
    assert bank.names == ("first", "x", "y") and compiled.active() == "x"
    assert numbers(compiled, bank.slots.tensors) == {TWO}
    assert copied.bank().names == ("first", "x") and copied.active() == "first"
    assert numbers(copied, copied.bank().slots.tensors) == {ONE}


def test_a_slot_is_emptied_after_the_reader(compiled: Any) -> None:
    bank, changes = compiled.bank(), runner_of(compiled).store.changes
    with bank.use("x"):
        bank.evict("x")
        still = changes.still()
        still.__enter__()
    assert numbers(compiled, bank.slots.tensors) == {ONE}
    still.__exit__(None, None, None)
    assert numbers(compiled, bank.slots.tensors) == {0.0}


def test_a_reader_waits_for_changes_that_have_begun(compiled: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    bank, slots = compiled.bank(), compiled.bank().slots
    begun, go_on, write_slot = threading.Event(), threading.Event(), slots.write

    def half(slot: int, own: dict[str, Tensor]) -> None:
        first = next(iter(own))
        slots.tensors[first][slot].copy_(own[first])
        begun.set()
        assert go_on.wait(20)
        write_slot(slot, own)

    monkeypatch.setattr(slots, "write", half)
    states: list[dict[str, Tensor]] = []
    with beside(lambda: bank.replace("x", values(compiled, TWO))):
        assert begun.wait(20)
        with beside(lambda: states.append(compiled.adapter_state_dict())) as reader:
            reader.join(0.1)
            assert reader.is_alive() and not states
            go_on.set()
    assert numbers(compiled, states[0]) == {TWO}


def test_a_reader_that_is_interrupted_keeps_nothing(compiled: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = runner_of(compiled).store.changes
    changes.written.add(("users", 2))
    with monkeypatch.context() as patch:
        patch.setattr(changes.condition, "wait", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt), changes.still():
            pass
    changes.written.clear()
    assert not changes.refused
    compiled.bank().replace("x", values(compiled, TWO))


def test_a_pool_loads_after_the_reader(compiled: Any) -> None:
    changes = runner_of(compiled).store.changes
    pool = graftc.AdapterPool(compiled, lambda name: values(compiled, TWO), wait=0.0)
    found: list[tuple[str, ...]] = []

    def request() -> None:
        with pool.use("new"):
            found.append(compiled.bank().names)

    with changes.still():
        thread = threading.Thread(target=request, daemon=True)
        thread.start()
        thread.join(0.1)
        assert thread.is_alive() and compiled.bank().names == ("first", "x")
    thread.join(20)
    assert found == [("first", "x", "new")]
