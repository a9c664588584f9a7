"""Every private name that `graftc.compat` uses has a probe, which passes, and fails when the name is gone."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
import sys
import textwrap
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import graftc
import graftc.compat
from tests.compat.private_names import used_in_compat
from tests.compat.probes import PROBES
from tests.compat.table import SINCE, UNTIL, Probe
from tests.kit.releases import is_older, needs

NAMES = sorted(PROBES)
GONE = {probe for probe, release in UNTIL.items() if not is_older(*release)}
"""Probes of what the installed libraries do without."""
LONG = ("peft.", "trl.", "torch._dynamo.", "torch.ops.aten._assert", "torch.ops.aten._is_all", "transformers.")
"""The beginnings of names whose probes import, compile or build something."""
CASES = [
    pytest.param(name, marks=[pytest.mark.slow] * name.startswith(LONG)) for name in NAMES if PROBES[name] not in GONE
]


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Let the probe import `graftc.compat` anew, as a process with another release would; restore everything."""
    for module in pkgutil.iter_modules(graftc.compat.__path__, "graftc.compat."):
        importlib.import_module(module.name)
    monkeypatch.setattr(graftc, "compat", graftc.compat)
    monkeypatch.setattr(torch._ops, "_mode_stack_state_for_pre_dispatch", torch._ops._mode_stack_state_for_pre_dispatch)
    for name in [name for name in sys.modules if f"{name}.".startswith("graftc.compat.")]:
        monkeypatch.delitem(sys.modules, name)
    yield monkeypatch
    monkeypatch.undo()
    while torch._C._len_torch_function_stack():  # a failed probe may leave its modes
        torch._C._pop_torch_function_stack()


class Gone:
    """A descriptor for an attribute that has another name now: what is written to it is kept under that name."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, instance: Any, owner: type) -> Any:
        raise AttributeError(f"{owner.__name__} has no {self.name}", name=self.name, obj=instance)

    def __set__(self, instance: Any, value: Any) -> None:
        vars(instance)[f"renamed{self.name}"] = value


def resolved(path: str) -> tuple[Any, str]:
    """Return the owner of a dotted name, and the last part of the name."""
    *parts, last = path.split(".")
    owner: Any = importlib.import_module(parts[0])
    for at, part in enumerate(parts[1:], 2):
        try:
            owner = getattr(owner, part)
        except AttributeError:
            owner = importlib.import_module(".".join(parts[:at]))
    return owner, last


def rewritten(function: Any, owner: Any, text: str) -> Any:
    """Return a function of a library whose code has another text in the place of one, or such a text."""
    if isinstance(function, str):
        return function.replace(text, f"renamed{text}")
    source = textwrap.dedent(inspect.getsource(function))
    word = re.compile(rf"\b{text}\b")
    assert word.search(source), f"{function.__qualname__} does not mention {text}"
    source = word.sub(f"renamed{text}", source.replace("super()", "super(_owner, self)"))
    scope: dict[str, Any] = {**function.__globals__, "_owner": owner}
    exec(compile(f"from __future__ import annotations\n{source}", "<rewritten>", "exec"), scope)
    return scope[function.__name__]


def remove(patch: pytest.MonkeyPatch, path: str) -> None:
    """Remove a private name from its library, as a release might."""
    path, _, text = path.partition("('")
    owner, name = resolved(path)
    if text:
        patch.setattr(owner, name, rewritten(getattr(owner, name), owner, text.removesuffix("')")))
    elif isinstance(owner, type):
        patch.setattr(owner, name, Gone(name), raising=False)
    elif owner is torch.ops.aten:  # looks a missing name up again
        patch.setattr(owner, name, None)
    elif owner is torch._dynamo.config:
        patch.delitem(owner._config, name)
    else:
        patch.delattr(owner, name)


def needs_what_it_looks_for(probe: Probe) -> None:
    """Skip a test of a probe if the installed library does not have it yet, and graftc does without it."""
    if probe in SINCE:
        needs(*SINCE[probe], "earlier ones do not have it, and graftc does without it")


@pytest.mark.parametrize("name", CASES)
def test_a_name_is_what_graftc_takes_it_for(name: str) -> None:
    needs_what_it_looks_for(PROBES[name])
    PROBES[name]()


@pytest.mark.parametrize("name", CASES)
def test_a_probe_fails_where_the_name_is_gone(name: str, fresh: pytest.MonkeyPatch) -> None:
    needs_what_it_looks_for(PROBES[name])
    remove(fresh, name)
    with pytest.raises(Exception):  # noqa: B017
        PROBES[name]()


@pytest.mark.slow
def test_probes_pass_where_nothing_is_gone(fresh: pytest.MonkeyPatch) -> None:
    """The failures above are not due to importing `graftc.compat` anew."""
    for probe in dict.fromkeys(PROBES.values()):
        if probe not in GONE and (probe not in SINCE or not is_older(*SINCE[probe])):
            probe()


def test_every_private_name_has_a_probe() -> None:
    covered = {part for name in NAMES for part in re.findall(r"\w+", name) if part.startswith("_")}
    assert used_in_compat() - covered == set()
