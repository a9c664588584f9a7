"""The Builder's seams: a composition defines nothing else, and the Builder does nothing that bypasses them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import fx

import graftc
from graftc.passes.core.build.builder import Builder
from graftc.passes.core.build.nodes import Nodes, Seams
from graftc.passes.core.weights.store import Store
from graftc.specs.errors.diagnostics import GraftError
from graftc.testing.families import tiny

PARTS = Builder.__mro__[1:-1]
"""The classes that the Builder is made of."""

SEAMS = {"make", "mix", "read", "write"}
ROLES: dict[str, Any] = {"target": {"role": ["attn.q", "ffn.down"]}}
PASSED: list[tuple[str, dict[str, Any]]] = [
    ("bert", {"adapt": [{"method": "lora", **ROLES, "bias": "all", "dropout": 0.1}]}),
    ("gpt2", {"adapt": [{"method": "lora", **ROLES}, {"method": "dora", **ROLES}]}),
    ("bert", {"adapt": [{"method": "dora", **ROLES}]}),
    ("bert", {"adapt": [{"method": "ia3"}]}),
    ("bert", {"adapt": [{"method": "houlsby"}, {"method": "pasta", "special_tokens": [1, 2]}]}),
    ("bert", {"adapt": [{"method": "bottleneck", "bottleneck": 4, "norm": "before"}]}),
    ("gpt2", {"adapt": [{"method": "unipelt"}]}),
    ("bert", {"adapt": [{"method": "prefix", "length": 2, "positions": "shifted"}]}),
    ("bert", {"adapt": [{"method": "prompt", "length": 2, "init": "vocabulary"}]}),
    ("bert", {"adapt": [{"method": "pre_layer", "length": 2, "infix": 1}]}),
    ("bert", {"adapt": [{"method": "dylora", **ROLES}, {"method": "mask", "density": 0.01}]}),
    ("bert", {"adapt": [{"method": "rows", **ROLES, "density": 0.5}]}),
    ("bert", {"adapt": [{"method": "pruning", "variant": "iterative", "stage": 2}]}),
    ("gpt2", {"adapt": [{"method": "lora", **ROLES}], "tokens": {"add": ["<new>"]}}),
    (
        "bert",
        {"adapt": [{"method": "lora", **ROLES, "init": "loftq", "loftq_iterations": 3}], "base": {"quantize": "nf4"}},
    ),
    (
        "bert",
        {"adapt": [{"method": "lora", **ROLES, "name": name} for name in "ab"], "compose": {"bank": ["a", "b"]}},
    ),
    ("bert", {"adapt": [{"method": "lora", **ROLES, "name": "a"}], "compose": {"bank": ["a"], "slots": 2}}),
]
"""Specs that together call everything public of the Builder."""


def public() -> dict[str, type]:
    """Return the public functions of the Builder, each with the part that implements it."""
    return {
        name: part
        for part in PARTS
        for name, value in vars(part).items()
        if inspect.isroutine(value) and not name.startswith("_")
    }


def part_class(name: str) -> type:
    return next(cls for cls in PARTS if cls.__name__ == name)


class Watch:
    """A recorder that follows public functions of the Builder and notes what they do past the seams."""

    def __init__(self) -> None:
        self.open: list[str] = []
        self.seams: list[str] = []
        self.called: set[str] = set()
        self.past: set[str] = set()

    @contextmanager
    def within(self, stack: list[str], name: str) -> Iterator[None]:
        stack.append(name)
        try:
            yield
        finally:
            stack.pop()

    def public(self, name: str, run: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any, **kwargs: Any) -> Any:
            self.called.add(name)
            with self.within(self.open, name):
                return run(*args, **kwargs)

        return watched

    def seam(self, name: str, run: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any, **kwargs: Any) -> Any:
            with self.within(self.seams, name):
                return run(*args, **kwargs)

        return watched

    def needs(self, seam: str, what: str, run: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any, **kwargs: Any) -> Any:
            if self.open and seam not in self.seams:
                self.past.add(f"{self.open[0]}: {what}")
            return run(*args, **kwargs)

        return watched


def watching(patch: pytest.MonkeyPatch) -> Watch:
    """Install a `Watch`."""
    watch = Watch()
    for name, part in public().items():
        patch.setattr(part, name, watch.public(name, getattr(part, name)))
    for cls in (Seams, *derived(Seams)):
        for seam in ("make", "write"):
            if seam in vars(cls):
                patch.setattr(cls, seam, watch.seam(seam, vars(cls)[seam]))
    for add in ("add_parameter", "add_buffer"):
        patch.setattr(Store, add, watch.needs("make", add, getattr(Store, add)))
    patch.setattr(Nodes, "_redirect", watch.needs("write", "redirect", Nodes._redirect))
    uses = fx.Node.replace_all_uses_with
    patch.setattr(fx.Node, "replace_all_uses_with", watch.needs("write", "replace_all_uses_with", uses))
    return watch


@pytest.mark.full
def test_nothing_of_the_builder_goes_past_the_seams(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every public function runs, and creates tensors and redirects readers only within a seam.

    A new function that no spec here reaches fails as well: add a spec that calls it.
    """
    watch = watching(monkeypatch)
    for family, spec in PASSED:
        graftc.compile(spec, tiny(family))
    assert watch.past == set()
    assert public().keys() - watch.called == set()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("owner", "name", "wrong"),
    [
        ("LinearMaps", "set_output", lambda self, site, own, part="": self._put(site, own, part)),
        (
            "Tensors",
            "parameter",
            lambda self, part, shape, init, *, dtype, trainable=True: (
                self.store.add_parameter(self._enter(part), torch.zeros(shape), trainable=trainable)
                or self.attribute(self._name(part))
            ),
        ),
    ],
)
def test_going_past_a_seam_is_noticed(
    owner: str, name: str, wrong: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(part_class(owner), name, wrong)
    watch = watching(monkeypatch)
    graftc.compile({"adapt": [{"method": "ia3"}]}, tiny("bert"))
    assert {entry.partition(":")[0] for entry in watch.past} == {name}


def derived(cls: type) -> list[type]:
    return [each for sub in cls.__subclasses__() for each in (sub, *derived(sub))]


def test_a_composition_defines_the_seams_alone() -> None:
    """A composition defines only seams, its own data and private members; there is one class of builders."""
    every = derived(Seams)
    assert {cls.__name__ for cls in every} >= {"Chosen", "Rows", "Collecting"}
    for cls in every:
        public = {n for n, v in vars(cls).items() if inspect.isroutine(v) and not n.startswith("_")}
        assert public <= SEAMS, cls
    assert {n for n, v in vars(Seams).items() if inspect.isroutine(v)} == SEAMS
    assert Builder.__subclasses__() == []
    assert {*derived(Nodes)} == {Builder, *PARTS} - {Nodes}


@pytest.mark.parametrize(
    "adaptation",
    [
        {"method": "mask", "density": 0.01},
        {"method": "diff_pruning", "density": 0.01},
        {"method": "pruning"},
        {"method": "pasta", "special_tokens": [1, 2]},
        {"method": "full", "target": {"role": "attn.q"}},
    ],
    ids=lambda adaptation: adaptation["method"],
)
def test_what_is_not_added_is_not_collected(adaptation: dict[str, Any]) -> None:
    """Methods that do something other than adding raise GC036."""
    spec = {"adapt": [{**adaptation, "name": name} for name in "ab"], "compose": {"average": ["a", "b"]}}
    with pytest.raises(GraftError, match="does not only add to values") as caught:
        graftc.compile(spec, tiny("bert"))
    assert caught.value.code == "GC036"


@pytest.mark.slow
def test_positions_are_not_refused() -> None:
    """A gate accepts a prefix that shifts the positions of the text."""
    prefix = {"method": "prefix", "length": 2, "positions": "shifted", "name": "a"}
    compiled = graftc.compile({"adapt": [prefix], "compose": {"gate": ["a"]}}, tiny("bert"))
    parts = [str(node.meta.get("custom")) for node in compiled.compilation.program("train").graph.nodes]
    assert any("positions" in part for part in parts)
