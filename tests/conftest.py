"""Test settings: no network, a capture cache of this run's own, fixed seeds."""

from __future__ import annotations

import gc
import math
import os
import shutil
import tempfile
import zlib
from collections.abc import Sequence

import hypothesis
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from tests.timing import LONG, LONGEST, SLOW, Timing, name_of, recorded

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Worker processes inherit the folder from the first process, which alone made it and removes it.
_OWN_CACHE = None if "GRAFTC_CACHE" in os.environ else tempfile.mkdtemp(prefix="graftc-test-captures-")
if _OWN_CACHE is not None:
    os.environ["GRAFTC_CACHE"] = _OWN_CACHE
# Two processes that compile the same kernel into one folder read each other's half-written files.
_WORKER = os.environ.get("PYTEST_XDIST_WORKER", "main")
os.environ["TORCHINDUCTOR_CACHE_DIR"] = os.path.join(os.environ["GRAFTC_CACHE"], f"inductor-{_WORKER}")
# Workers of pytest-xdist inherit the width of the terminal, which tables would be fitted to.
os.environ.pop("COLUMNS", None)

# Other work on the machine is no reason to fail.
hypothesis.settings.register_profile("graftc", deadline=None)
hypothesis.settings.load_profile("graftc")

# Graphs are many small objects that live on: with Python's own thresholds, a tenth of the time goes into looking for
# garbage among them.
gc.set_threshold(50_000, 20, 5)


def pytest_addoption(parser: pytest.Parser) -> None:
    """The option that `make durations` gives."""
    parser.addoption("--record-durations", action="store_true", help="write tests/durations.json")


def pytest_configure(config: pytest.Config) -> None:
    """Measure what tests take; GRAFTC_TIMES, which continuous integration sets, says what ran before them."""
    record = config.getoption("--record-durations") and not hasattr(config, "workerinput")
    config.pluginmanager.register(Timing(record, os.environ.get("GRAFTC_TIMES")), "graftc timing")


QUICK_FAMILIES = frozenset({"bert", "gpt2"})
"""What runs once for each family is quick on these, and on its first family where it has none of them."""

SOME_FAMILIES = 2
"""On how many families a long test that is no contract runs in ``make test``. Its name and its other parameters decide
which ones, so that all tests together meet them all; ``make test-full`` has the others."""

BUDGET = 12.0
"""Seconds that one parametrised test may take in ``make test`` where its other parameters are no families. Beyond that
some of its cases run there, evenly spread, and all in ``make test-full``."""

EVERY_CASE = frozenset(
    {"tests/docs/test_snippets.py::test_the_page_runs", "tests/artifact/test_kill.py::test_killed_at_random"}
)
"""Tests of which each case is something of its own."""

ONE_FAMILY = frozenset({"test_initial_values_depend_on_the_seed_only", "test_bank"})
"""Tests of the contract that run in ``make test`` on a class's first family alone."""

VARIANT_FAMILIES = 1
"""The same for the contract of another setting of a method, a class with ``variant = True``."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark before ``-m`` chooses, and put together what shares a model: a capture then happens in one process only."""
    durations = recorded()
    families: dict[str, dict[str, list[pytest.Item]]] = {}
    cases: dict[str, list[pytest.Item]] = {}
    alike: dict[tuple[str, tuple[str, ...]], dict[str, pytest.Item]] = {}
    for item in items:
        if durations.get(name_of(item.nodeid), 0.0) >= SLOW:
            item.add_marker(pytest.mark.slow)
        if isinstance(item, pytest.Function) and hasattr(item, "callspec"):
            family = item.callspec.params.get("family")
            if not isinstance(family, str):
                cases.setdefault(name_of(item.nodeid), []).append(item)
                continue
            families.setdefault(name_of(item.nodeid), {}).setdefault(family, []).append(item)
            if not _is_contract(item):
                others = tuple(part for part in item.callspec.id.split("-") if part != family)
                alike.setdefault((name_of(item.nodeid), others), {})[family] = item
            elif not _in_make_test(item, family):
                item.add_marker(pytest.mark.full)
    for found in families.values():
        quick = QUICK_FAMILIES & found.keys() or {next(iter(found))}
        for family, tests in found.items():
            if family not in quick:
                for item in tests:
                    item.add_marker(pytest.mark.slow)
    for (name, others), each in alike.items():
        if durations.get(name, 0.0) >= LONG:
            quick = QUICK_FAMILIES & each.keys() if durations[name] >= LONGEST else set[str]()
            for family in each.keys() - (quick or _some(list(each), SOME_FAMILIES, "-".join((name, *others)))):
                each[family].add_marker(pytest.mark.full)
    for name, found in cases.items():
        kept = max(2, math.ceil(BUDGET / durations[name])) if name in durations else len(found)
        if kept < len(found) and name not in EVERY_CASE:
            chosen = _some([item.nodeid for item in found], kept, name)
            for item in found:
                if item.nodeid not in chosen:
                    item.add_marker(pytest.mark.full)
    _group(items)


def _is_contract(item: pytest.Function) -> bool:
    from graftc.testing.contract import Contract

    return item.cls is not None and issubclass(item.cls, Contract)


def _in_make_test(item: pytest.Function, family: str) -> bool:
    """Whether a test of a contract is among those of ``make test`` on this family.

    Whether a seed decides alone is seen on a class's first family, and so are banks, which `tests/compose` has on every
    family. Exports and ``torch.compile``, which take seconds,
    run there for the classes that say ``exported = True``, and on each family where they say ``every_family = True``.
    Together they meet every operator that methods insert, to which `tests/methods/test_exported_operators.py` holds
    them. Inductor has what says ``inductor = True``: one class for each mechanism. A folded export is the base's graph
    with other weights (`MethodContract.test_fold`), so those that say ``folded = True`` have it.
    """
    from graftc.testing import DeploymentContract

    of, test = item.cls, item.originalname
    assert of is not None
    if getattr(of, "variant", False):
        return family in _some(list(of.families), VARIANT_FAMILIES, of.__name__)
    if not issubclass(of, DeploymentContract):
        return test not in ONE_FAMILY or family == of.families[0]
    every, first = getattr(of, "every_family", False), family == of.families[0]
    if test == "test_inductor":
        return first and getattr(of, "inductor", False)
    if test == "test_onnx_folded":
        return first and getattr(of, "folded", False)
    return every or (first and getattr(of, "exported", False))


def _some(families: Sequence[str], number: int, name: str) -> set[str]:
    """Some of the families, evenly spread, from one on that the name decides."""
    start, step = zlib.crc32(name.encode()), max(1, len(families) // number)
    return {families[(start + index * step) % len(families)] for index in range(min(number, len(families)))}


def _group(items: list[pytest.Item]) -> None:
    """Within a class, or the functions of a file, bring tests of one family together, in the order of first sight."""
    order: dict[tuple[object, object], int] = {}
    places: dict[str, int] = {}

    def key(item: pytest.Item) -> tuple[int, int]:
        parent = item.parent.nodeid if item.parent is not None else ""
        place = places.setdefault(parent, len(places))
        parameters = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
        of = next((parameters[name] for name in ("family", "name") if isinstance(parameters.get(name), str)), None)
        return place, order.setdefault((parent, of), len(order))

    items.sort(key=key)


def pytest_collection_finish() -> None:
    """What has been imported stays: no collection has to look at it again."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Between files, let go what torch keeps of every graph that was ever traced: without it a process has gigabytes at
    the end, through which each collection of garbage goes, and the Trainer asks for one at its start and its end."""
    if nextitem is None or nextitem.path != item.path:
        FakeTensorMode.cache_clear()
        for method in vars(ShapeEnv).values():  # each keeps hundreds of what it was asked, whose types are kept with it
            getattr(method, "cache_clear", int)()
        torch._dynamo.reset()
        gc.collect()
        gc.freeze()


def pytest_unconfigure(config: pytest.Config) -> None:
    """Remove the cache that this process made."""
    if _OWN_CACHE is not None:
        shutil.rmtree(_OWN_CACHE, ignore_errors=True)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
