"""Treat a model sharded over several processes as if it were unsharded, to read, fold, save and export it.

All processes in the mesh first gather the adapter tensors together, once. The base never trains, so its values are
those of the source model and are not sent. Everything else runs within one process, on an unsharded model, and waits
for no other process.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from torch import nn

from graftc.compat.fsdp import process_store
from graftc.compiler.inspect.snapshot import adapter_values
from graftc.passes.core.weights.sharding import is_sharded, sharded_modules
from graftc.passes.core.weights.store import Store
from graftc.runtime.model.adapted import AdaptedRunner
from graftc.specs.errors.arguments import as_path
from graftc.specs.errors.diagnostics import GraftError

P = ParamSpec("P")
R = TypeVar("R")

_numbers: defaultdict[tuple[int, ...], Iterator[int]] = defaultdict(itertools.count)
"""Counters of joint operations, keyed by the ranks of the processes that take part."""


@dataclass(frozen=True)
class Meeting:
    """A joint operation of several processes.

    The processes exchange the name of the operation through the process group's store, so that a process that does
    something else, or nothing, causes an error instead of a deadlock.

    Attributes:
        ranks: the ranks of the processes.
        what: the name of the operation.
        key: the prefix of this operation's keys in the process group's store.
    """

    ranks: tuple[int, ...]
    what: str
    key: str

    @classmethod
    def of(cls, root: nn.Module, what: str) -> Meeting | None:
        """Wait for all processes over which a module tree is sharded, and return their meeting.

        Return None if the tree is not sharded.

        Raises:
            GraftError: GC131 if a process does not arrive before the process group's timeout, or calls something else.
        """
        for module in sharded_modules(root):
            module.reshard()  # type: ignore[operator]  # passes without gradients leave the root gathered
        tensor = next((p for p in root.parameters() if is_sharded(p)), None)
        if tensor is None:
            return None
        ranks = ranks_of(tensor)
        name = "-".join(map(str, ranks)) if len(ranks) <= 8 else f"{ranks[0]}-{ranks[-1]}-{len(ranks)}"
        meeting = cls(ranks, what, f"graftc/{name}/{next(_numbers[ranks])}")
        meeting._meet()
        return meeting

    @property
    def _store(self) -> Any:
        return process_store()

    @property
    def first(self) -> bool:
        """Whether this is the process that writes."""
        return torch.distributed.get_rank() == self.ranks[0]

    def _meet(self) -> None:
        keys = [f"{self.key}/{rank}" for rank in self.ranks]
        self._store.set(f"{self.key}/{torch.distributed.get_rank()}", self.what)
        self._wait(keys)
        said = [text.decode() for text in self._store.multi_get(keys)]
        others = [(rank, text) for rank, text in zip(self.ranks, said, strict=True) if text != self.what]
        if others:
            rank, text = others[0]
            raise _apart(f"{self.what} was called in this process, but {text} in process {rank}")

    def _wait(self, keys: list[str]) -> None:
        try:
            self._store.wait(keys)
        except RuntimeError as error:
            absent = [key.rpartition("/")[2] for key in keys if not self._store.check([key])]
            raise _apart(f"{self.what} was called, but not in process {', '.join(absent[:5])}") from error

    def by_first(self, action: Callable[[], object]) -> None:
        """Run an action in the first process while the others wait; if it fails, raise an error in all of them.

        Raises:
            GraftError: the first process's error; the others raise GC131 if that error is not a `GraftError`.
        """
        key = f"{self.key}/done"
        if self.first:
            failure: dict[str, Any] = {"code": "GC131", "message": f"{self.what} failed in process {self.ranks[0]}"}
            try:
                action()
                failure = {}
            except GraftError as error:
                failure = {"code": error.code, "message": error.message, "hint": error.hint}
                raise
            finally:
                self._store.set(key, json.dumps(failure))
            return
        try:
            self._store.wait([key])
        except RuntimeError as error:
            raise _apart(f"process {self.ranks[0]} did not finish {self.what}") from error
        failed = json.loads(self._store.get(key))
        if failed:
            raise GraftError(**failed)


def ranks_of(tensor: torch.Tensor) -> tuple[int, ...]:
    """Return the ranks of the processes over which a tensor is sharded."""
    return tuple(sorted(tensor.device_mesh.mesh.flatten().tolist()))  # type: ignore[attr-defined]


def _apart(message: str) -> GraftError:
    return GraftError("GC131", message, hint="call it in every process; one of them writes")


def in_every_process(method: Callable[Concatenate[Any, P], R]) -> Callable[Concatenate[Any, P], R]:
    """Wrap a method of an object that has a Runner (``self.runner``), to run it on an unsharded model in each process.

    If the model is sharded, every process must call the method.

    Raises:
        GraftError: GC131 as for `Meeting.of`, GC130 as for `whole_model`.
    """

    @functools.wraps(method)
    def called(self: Any, *args: P.args, **kwargs: P.kwargs) -> R:
        meeting = Meeting.of(self.runner.module, method.__name__)
        return method(self if meeting is None else type(self)(whole_model(self.runner)), *args, **kwargs)

    return called  # type: ignore[return-value]


def written_once(method: Callable[Concatenate[Any, Any, P], Path]) -> Callable[Concatenate[Any, Any, P], Path]:
    """Wrap a method that writes to a path, its first argument, so that one process runs it on an unsharded model.

    If the model is sharded, every process must call the method; the others wait for the one that writes.

    Raises:
        GraftError: as for `in_every_process`; an error while writing is raised in all processes.
    """

    @functools.wraps(method)
    def called(self: Any, path: Any, *args: P.args, **kwargs: P.kwargs) -> Path:
        meeting = Meeting.of(self.runner.module, method.__name__)
        if meeting is None:
            return method(self, path, *args, **kwargs)
        values = dict(adapter_values(self.runner.store))
        meeting.by_first(lambda: method(type(self)(whole_model(self.runner, values)), path, *args, **kwargs))
        return as_path(path)

    return called  # type: ignore[return-value]


def whole_model(runner: AdaptedRunner, values: dict[str, torch.Tensor] | None = None) -> AdaptedRunner:
    """Return a Runner with the same graphs over unsharded tensors, on the source model's device.

    Args:
        runner: the Runner of the sharded model.
        values: its adapter tensors; gathered if None.

    Raises:
        GraftError: GC130 if the source model has no weights in this process.
    """
    compilation, store = runner.compilation, runner.store
    values = dict(adapter_values(store)) if values is None else values
    base = dict(Store.mirror(compilation.model).tensors())
    if any(tensor.device.type == "meta" for tensor in base.values()):
        message = "the model was compiled without the base's weights in this process, but this operation needs them"
        raise GraftError("GC130", message, hint="compiled.adapter_state_dict() gathers what was trained")
    device = next((tensor.device for tensor in base.values()), torch.device("cpu"))
    whole = Store()
    whole.shape(compilation.model)
    for name, tensor in store.tensors():
        if name not in store.aliases:
            value = values[name] if name in values else base.get(name, tensor)
            whole.add_like(store, name, value.detach().to(device))
    whole.constants, whole.settled, whole.updated = set(store.constants), set(store.settled), dict(store.updated)
    whole.packed = {name: own for name, own in store.packed.items() if name not in store.aliases}
    for alias, owner in store.aliases.items():
        whole.alias(alias, owner)
    twin = runner.over(replace(compilation, store=whole))
    twin.progress.trained.update(runner.progress.trained)
    twin.progress.extra_losses = runner.progress.extra_losses
    return twin
