"""A model that is sharded over processes, treated as a whole one when it is read, folded, saved and exported.

All processes of the mesh gather the adapter tensors together, once and before anything else. The base never trains, so
its values are the source model's and are not sent. Everything that follows runs within one process, on a whole model,
and waits for no other process.
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
"""Of what processes do together, by their ranks."""


@dataclass(frozen=True)
class Meeting:
    """Processes that do something together.

    They exchange what they are doing through the store of the process group, so that a process that does something
    else, or nothing, causes an error instead of a deadlock.

    Attributes:
        ranks: the ranks of the processes.
        what: the name of what they do.
        key: the key of this occasion.
    """

    ranks: tuple[int, ...]
    what: str
    key: str

    @classmethod
    def of(cls, root: nn.Module, what: str) -> Meeting | None:
        """Wait for all processes over which a tree of modules is sharded, and return their meeting.

        Return None if it is not sharded.

        Raises:
            GraftError: GC131 for a process that is absent when the time limit of the process group is over, or that
                does something else.
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
            raise _apart(f"{self.what} is called here, and {text} in process {rank}")

    def _wait(self, keys: list[str]) -> None:
        try:
            self._store.wait(keys)
        except RuntimeError as error:
            absent = [key.rpartition("/")[2] for key in keys if not self._store.check([key])]
            raise _apart(f"{self.what} was called, and not in process {', '.join(absent[:5])}") from error

    def by_first(self, action: Callable[[], object]) -> None:
        """Run an action in the first process while the others wait; an error there is raised in all of them.

        Raises:
            GraftError: the error of the first process; in the others, GC131 if that is not a `GraftError`.
        """
        key = f"{self.key}/done"
        if self.first:
            failure: dict[str, Any] = {"code": "GC131", "message": f"{self.what} has failed in process {self.ranks[0]}"}
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
            raise _apart(f"process {self.ranks[0]} did not end {self.what}") from error
        failed = json.loads(self._store.get(key))
        if failed:
            raise GraftError(**failed)


def ranks_of(tensor: torch.Tensor) -> tuple[int, ...]:
    """Return the ranks of the processes over which a tensor is sharded."""
    return tuple(sorted(tensor.device_mesh.mesh.flatten().tolist()))  # type: ignore[attr-defined]


def _apart(message: str) -> GraftError:
    return GraftError("GC131", message, hint="call it in every process; one of them writes")


def in_every_process(method: Callable[Concatenate[Any, P], R]) -> Callable[Concatenate[Any, P], R]:
    """Wrap a method of an object with a Runner, ``self.runner``, so that it runs on a whole model in each process.

    If the model is sharded, every process has to call it.

    Raises:
        GraftError: GC131 as `Meeting.of`, GC130 as `whole_model`.
    """

    @functools.wraps(method)
    def called(self: Any, *args: P.args, **kwargs: P.kwargs) -> R:
        meeting = Meeting.of(self.runner.module, method.__name__)
        return method(self if meeting is None else type(self)(whole_model(self.runner)), *args, **kwargs)

    return called  # type: ignore[return-value]


def written_once(method: Callable[Concatenate[Any, Any, P], Path]) -> Callable[Concatenate[Any, Any, P], Path]:
    """Wrap a method that writes to a path, its first argument, so that one process runs it on a whole model.

    If the model is sharded, every process has to call it; the others wait for the one that writes.

    Raises:
        GraftError: as `in_every_process`, and an error of the writing, in all processes.
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
    """Return a compiled model with the same graphs over whole tensors, on the device of the source model.

    Args:
        runner: the Runner of the sharded model.
        values: its adapter tensors; gathered if not given.

    Raises:
        GraftError: GC130 if the source model has no weights in this process.
    """
    compilation, store = runner.compilation, runner.store
    values = dict(adapter_values(store)) if values is None else values
    base = dict(Store.mirror(compilation.model).tensors())
    if any(tensor.device.type == "meta" for tensor in base.values()):
        message = "the model was compiled without the base's weights in this process, and what is asked for needs them"
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
