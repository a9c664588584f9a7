"""Test settings: no network, a capture cache used by this run only, fixed seeds."""

from __future__ import annotations

import gc
import os
import shutil
import subprocess
import tempfile
import unittest
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import hypothesis
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from graftc.runtime.activations import minimum_cut
from tests.kit.timing import Timing, name_of

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Worker processes inherit the folder from the first process, which creates and removes it.
_OWN_CACHE = None if "GRAFTC_CACHE" in os.environ else tempfile.mkdtemp(prefix="graftc-test-captures-")
if _OWN_CACHE is not None:
    os.environ["GRAFTC_CACHE"] = _OWN_CACHE
# Two processes that compile the same kernel into one folder would read each other's half-written files, and kernels
# depend on the capability of the processor.
_WORKER = os.environ.get("PYTEST_XDIST_WORKER", "main")
_KERNELS = f"inductor-{os.environ.get('ATEN_CPU_CAPABILITY', 'own')}-{_WORKER}"
os.environ["TORCHINDUCTOR_CACHE_DIR"] = os.path.join(os.environ["GRAFTC_CACHE"], _KERNELS)
# Workers of pytest-xdist inherit the width of the terminal, and tables would be fitted to it.
os.environ.pop("COLUMNS", None)

# Tests must not fail because the machine is busy.
hypothesis.settings.register_profile("graftc", deadline=None)
hypothesis.settings.load_profile("graftc")

# Recompute the activations of tiny models as well, like those of large ones.
minimum_cut.WORTH = 1

# Graphs are many small, long-lived objects: with Python's own thresholds, garbage collection takes a tenth of the time.
gc.set_threshold(50_000, 20, 5)


def pytest_configure(config: pytest.Config) -> None:
    """Measure the time of the tests; GRAFTC_TIMES, set by continuous integration, lists what ran before them."""
    config.pluginmanager.register(Timing(os.environ.get("GRAFTC_TIMES")), "graftc timing")


STRICT = os.environ.get("GRAFTC_SKIPS") == "fail"
"""Whether a skipped test is a failure, as continuous integration has it."""

QUICK_FAMILIES = frozenset({"bert", "gpt2"})
"""Families on which a test of every family is quick; one that has none of them is quick on its first family."""

CONTRACT_FAMILIES = ("gpt2", "llama")
"""``make test`` runs contracts on these: fused and transposed weights with a tied head, and grouped keys and values
without biases. Each class runs on one of them, which depends on its name. A class that has none of them runs on its
first family. Classes may name others as ``contract_families``, as some name T5, an encoder with a decoder, which takes
twice as long."""

QUICK_CONTRACT_FAMILIES = frozenset({"gpt2", "llama"})
"""The families on which a contract is quick."""

LONGEST = frozenset(
    {
        *("test_sites", "test_identity_at_init", "test_initial_values_depend_on_the_seed_only"),
        *("test_only_own_tensors_train", "test_source_model_is_left_alone", "test_sixteen_bits", "test_cache"),
        *("test_bank", "test_disabled_is_the_base"),
    }
)
"""Tests of the contract that take longest: ``make test`` runs each of them for a third of the classes, which depends on
the names of both, and not for another setting or more families of a method (``variant = True``)."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Add marks before ``-m`` selects tests, and group tests that share a model so that one process captures it."""
    tests: dict[str, list[pytest.Function]] = {}
    for item in items:
        if isinstance(item, pytest.Function) and hasattr(item, "callspec"):
            tests.setdefault(name_of(item.nodeid), []).append(item)
    for cases in tests.values():
        _mark_slow_families(cases)
        if _is_contract(cases[0]):
            chosen = [item for item in cases if _in_make_test(item, item.callspec.params["family"])]
        else:
            chosen = _sampled(cases)
        for item in cases:
            if item not in chosen:
                item.add_marker(pytest.mark.full)
    _group(items)


def _sampled(cases: list[pytest.Function]) -> list[pytest.Function]:
    """Return the cases that ``@pytest.mark.sample`` names, or all cases without that mark.

    Raises:
        pytest.UsageError: the mark names a case that the test does not have.
    """
    sample = cases[0].get_closest_marker("sample")
    if sample is None:
        return cases
    by_name = {item.callspec.id: item for item in cases}
    unknown = [name for name in sample.args if name not in by_name]
    # A run that names single cases has not collected the others.
    if unknown and not any("[" in argument for argument in cases[0].config.args):
        raise pytest.UsageError(f"{name_of(cases[0].nodeid)}: its sample names {unknown}, which it has no cases for")
    return [by_name[name] for name in sample.args if name in by_name]


def _family(item: pytest.Function) -> str | None:
    family = item.callspec.params.get("family")
    return family if isinstance(family, str) else None


def _architecture(item: pytest.Function) -> object:
    """Return the model that a test runs on; tests of `tests/compiler` name more models than there are families."""
    parameters = item.callspec.params
    return parameters.get("family", parameters.get("name"))


def _mark_slow_families(cases: Sequence[pytest.Function]) -> None:
    """Mark the cases as slow whose families are not quick."""
    each = {item: _architecture(item) for item in cases}
    families = [family for family in dict.fromkeys(each.values()) if isinstance(family, str)]
    quick = QUICK_FAMILIES.intersection(families)
    if "family" not in cases[0].callspec.params and not quick:
        return  # the names are not those of models
    if _is_contract(cases[0]):
        long = getattr(cases[0].cls, "variant", False) or cases[0].originalname in LONGEST
        long = long or _is_deployment(cases[0])
        quick = frozenset() if long else QUICK_CONTRACT_FAMILIES.intersection(families)
    else:
        quick = quick or frozenset(families[:1])
    for item, family in each.items():
        if isinstance(family, str) and family not in quick:
            item.add_marker(pytest.mark.slow)


def _is_deployment(item: pytest.Function) -> bool:
    """Return whether a test is one of the exports and compilations of `DeploymentContract`."""
    from graftc.testing import DeploymentContract

    return (
        item.cls is not None
        and issubclass(item.cls, DeploymentContract)
        and item.originalname in vars(DeploymentContract)
    )


def _is_contract(item: pytest.Function) -> bool:
    from graftc.testing.contract import Contract

    return item.cls is not None and issubclass(item.cls, Contract)


def _in_make_test(item: pytest.Function, family: str) -> bool:
    """Return whether ``make test`` runs a contract's test on this family.

    Exports and ``torch.compile``, which take seconds, run for classes that say ``exported = True``, on their first
    family. ``make test-full`` has them for all classes, and Inductor. A folded export is the base's graph with other
    weights (`MethodContract.test_fold`), so it runs only for classes that say ``folded = True``.
    """
    of, test = item.cls, item.originalname
    assert of is not None
    named = getattr(of, "contract_families", CONTRACT_FAMILIES)
    families = [family for family in named if family in of.families] or [of.families[0]]
    chosen = families[_drawn(f"{of.__module__}.{of.__qualname__}", len(families))]
    if getattr(of, "variant", False):
        return family == chosen and test not in LONGEST
    if not _is_deployment(item):
        return family == chosen and (test not in LONGEST or _drawn(f"{of.__qualname__}.{test}", 3) == 0)
    if test == "test_inductor":
        return False
    wanted = getattr(of, "folded" if test == "test_onnx_folded" else "exported", False)
    return wanted and family == of.families[0]


def _drawn(name: str, count: int) -> int:
    """Return a number below ``count`` that a name always has."""
    return zlib.crc32(name.encode()) % count


def _group(items: list[pytest.Item]) -> None:
    """Sort tests of one family together within a class or a file's functions, in the order of first appearance."""
    order: dict[tuple[object, object], int] = {}
    places: dict[str, int] = {}

    def key(item: pytest.Item) -> tuple[int, int]:
        parent = item.parent.nodeid if item.parent is not None else ""
        place = places.setdefault(parent, len(places))
        parameters = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
        of = next((parameters[name] for name in ("family", "name") if isinstance(parameters.get(name), str)), None)
        return place, order.setdefault((parent, of), len(order))

    items.sort(key=key)


def _says_skipped(reason: object) -> str:
    return f"skipped, though what a test needs is installed by `make setup`: {reason}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[pytest.TestReport]:
    """Report skipped tests as failed if GRAFTC_SKIPS is ``fail``.

    A test that does not apply (folding a method that does not fold) raises `unittest.SkipTest` and is always skipped.
    """
    applies = call.excinfo is None or not isinstance(call.excinfo.value, unittest.SkipTest)
    report: pytest.TestReport = yield
    if report.skipped and applies and not hasattr(report, "wasxfail") and STRICT:
        report.outcome, report.longrepr = "failed", _says_skipped(report.longrepr)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Iterator[pytest.CollectReport]:
    """Report whole files that were skipped as failed if GRAFTC_SKIPS is ``fail``."""
    report: pytest.CollectReport = yield
    if report.skipped and STRICT:
        report.outcome, report.longrepr = "failed", _says_skipped(report.longrepr)  # type: ignore[assignment]
    return report


def pytest_collection_finish() -> None:
    """Freeze the imported objects so that later garbage collections ignore them."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Clear, after each file, what torch keeps of every traced graph.

    Without this a process ends up with gigabytes of objects that each garbage collection has to traverse, and the
    Trainer runs one when it starts and one when it ends.
    """
    if nextitem is None or nextitem.path != item.path:
        FakeTensorMode.cache_clear()
        for method in vars(ShapeEnv).values():  # each caches hundreds of arguments, which keep their types alive
            getattr(method, "cache_clear", int)()
        torch._dynamo.reset()
        gc.collect()
        gc.freeze()


def pytest_unconfigure(config: pytest.Config) -> None:
    """Remove the cache that this process created."""
    if _OWN_CACHE is not None:
        shutil.rmtree(_OWN_CACHE, ignore_errors=True)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Seed torch before the fixtures of a module or class, so that adapters start from a fixed seed."""
    torch.manual_seed(0)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Return a function that mounts a file system of some KiB, or resizes the mounted one; it requires root."""
    folder = tmp_path / "small"
    folder.mkdir()

    def mount(room: int) -> Path:
        options = f"remount,size={room}k" if folder.is_mount() else f"size={room}k"
        command = ["mount", "-t", "tmpfs", "-o", options, "graftc-test", str(folder)]
        if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("no file system can be mounted here")
        return folder

    yield mount
    subprocess.run(["umount", str(folder)], capture_output=True)
