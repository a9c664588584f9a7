"""Test settings: no network, a capture cache of this run's own, fixed seeds."""

from __future__ import annotations

import gc
import math
import os
import shutil
import subprocess
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import hypothesis
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from graftc.runtime.activations import plan
from tests.timing import LONG, SLOW, Timing, name_of, recorded

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

# Activations of tiny models are computed again as those of large ones are.
plan.WORTH = 1

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


ELSEWHERE = ("full", "gate", "gpu")
"""Marks of tests that are not among those of ``make test``."""

QUICK_FAMILIES = frozenset({"bert", "gpt2"})
"""What runs once for each family is quick on these, and on its first family where it has none of them."""

TRANSPOSED = "gpt2"
"""Each contract runs on this family, whose weights are fused and transposed, where the class has it. It is quick on
this one only, and not for another setting of a method."""

CONTRACT_SHARE = 4
"""One in so many of a class's families runs its contract in ``make test``, two at least."""

EXPORTED_SHARE = 4
"""The same for exports of the classes that say ``every_family = True``."""

ONE_FAMILY = frozenset({"test_initial_values_depend_on_the_seed_only", "test_bank"})
"""Tests of the contract that run in ``make test`` on one of a class's families alone."""

VARIANT_FAMILIES = 1
"""On how many families the contract of another setting of a method runs there, a class with ``variant = True``."""

BUDGET = 1.0
"""Processor seconds that the cases of one parametrised test may take there. Those that fit, one at least, are evenly
spread, from one on that the test's name decides."""

EVERY_CASE = frozenset({"tests/docs/test_snippets.py::test_the_page_runs"})
"""Tests of which each case is something of its own."""

FILE_BUDGET = 2.0
"""Processor seconds that the tests of one file may take there: the shortest run, one at least."""

RARE = frozenset(
    {
        *(f"tests/methods/test_{name}.py" for name in ("bottleneck_stacks", "dora_stacked", "prefix_masks")),
        *("tests/methods/test_prefix_tokens.py", "tests/parity/test_adapterhub_compose.py"),
        *("tests/compose/test_rest.py", "tests/runtime/test_repeated_trainer.py"),
        *(f"tests/benchmarks/test_{name}.py" for name in ("adapters", "inputs", "sparse", "train")),
    }
)
"""Files about rare combinations, and about benchmarks, which are no part of the product: they have a quarter of it."""

MAIN_JOBS = frozenset(
    {
        *("tests/demo/test_demo.py", "tests/demo/test_llm.py", "tests/test_readme.py"),
        *("tests/docs/test_snippets.py", "tests/test_plugin.py"),
        *("tests/artifact/test_stored.py", "tests/frozen/test_frozen.py", "tests/test_no_model_tables.py"),
    }
)
"""Files that run whole: what the README and the pages of docs/ show, what earlier versions wrote, and the rule that no
line decides by the kind of a model."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark before ``-m`` chooses, and put together what shares a model: a capture then happens in one process only."""
    durations = recorded()
    tests: dict[str, list[pytest.Function]] = {}
    for item in items:
        if durations.get(name_of(item.nodeid), 0.0) >= SLOW:
            item.add_marker(pytest.mark.slow)
        if isinstance(item, pytest.Function) and hasattr(item, "callspec"):
            tests.setdefault(name_of(item.nodeid), []).append(item)
    for name, cases in tests.items():
        _mark_slow_families(cases)
        if _is_contract(cases[0]):
            chosen = [item for item in cases if _in_make_test(item, item.callspec.params["family"])]
        else:
            chosen = [item for item in cases if not any(map(item.get_closest_marker, ELSEWHERE))]  # by hand
            chosen = _of_one_family(name, chosen, durations.get(name, 0.0))
            if name in durations and name not in EVERY_CASE:
                chosen = _within_budget(name, chosen, durations[name])
        for item in cases:
            if item not in chosen:
                item.add_marker(pytest.mark.full)
    files: dict[str, dict[str, list[pytest.Item]]] = {}
    for item in items:
        if not any(map(item.get_closest_marker, ELSEWHERE)) and not _is_deployment(item):
            files.setdefault(item.nodeid.partition("::")[0], {}).setdefault(name_of(item.nodeid), []).append(item)
    for path in files.keys() - MAIN_JOBS:
        _within_file_budget(files[path], durations, FILE_BUDGET / 4 if path in RARE else FILE_BUDGET)
    _group(items)


def _within_file_budget(tests: dict[str, list[pytest.Item]], durations: dict[str, float], budget: float) -> None:
    """Leave the shortest tests of a file to ``make test``, as many as fit into so many seconds, one at least."""
    took = {name: len(cases) * durations.get(name, 0.0) for name, cases in tests.items()}
    for position, name in enumerate(sorted(tests, key=took.__getitem__)):
        budget -= took[name]
        if budget < 0 and position > 0:
            for item in tests[name]:
                item.add_marker(pytest.mark.full)


def _family(item: pytest.Function) -> str | None:
    family = item.callspec.params.get("family")
    return family if isinstance(family, str) else None


def _architecture(item: pytest.Function) -> object:
    """The model it runs on: tests of `tests/compiler` have names of their own for more models than the families."""
    parameters = item.callspec.params
    return parameters.get("family", parameters.get("name"))


def _mark_slow_families(cases: Sequence[pytest.Function]) -> None:
    """Mark as slow the cases of families that are not quick."""
    each = {item: _architecture(item) for item in cases}
    families = [family for family in dict.fromkeys(each.values()) if isinstance(family, str)]
    quick = QUICK_FAMILIES.intersection(families)
    if "family" not in cases[0].callspec.params and not quick:
        return  # names of something else
    if _is_contract(cases[0]):
        quick = frozenset() if getattr(cases[0].cls, "variant", False) else quick & {TRANSPOSED}
    else:
        quick = quick or frozenset(families[:1])
    for item, family in each.items():
        if isinstance(family, str) and family not in quick:
            item.add_marker(pytest.mark.slow)


def _of_one_family(name: str, cases: list[pytest.Function], seconds: float) -> list[pytest.Function]:
    """The cases of a test of so many seconds that ``make test`` may run: each set of its other parameters on one family
    where the test is long, which the name and these decide, so that all tests together meet all families."""
    if seconds < LONG:
        return cases
    alike: dict[tuple[str, ...], dict[str, pytest.Function]] = {}
    chosen = [item for item in cases if _family(item) is None]
    for item in cases:
        if (family := _family(item)) is not None:
            others = tuple(part for part in item.callspec.id.split("-") if part != family)
            alike.setdefault(others, {})[family] = item
    for others, each in alike.items():
        chosen += [each[family] for family in _some(list(each), 1, "-".join((name, *others)))]
    return chosen


def _within_budget(name: str, cases: list[pytest.Function], seconds: float) -> list[pytest.Function]:
    """As many of the cases, each of so many seconds, as fit into `BUDGET`."""
    chosen = _some([item.nodeid for item in cases], math.ceil(BUDGET / seconds), name)
    return [item for item in cases if item.nodeid in chosen]


def _is_deployment(item: pytest.Item) -> bool:
    """Whether it is one of the exports of `DeploymentContract`, which `_in_make_test` chooses."""
    from graftc.testing import DeploymentContract

    return isinstance(item, pytest.Function) and item.cls is not None and issubclass(item.cls, DeploymentContract)


def _is_contract(item: pytest.Function) -> bool:
    from graftc.testing.contract import Contract

    return item.cls is not None and issubclass(item.cls, Contract)


def _in_make_test(item: pytest.Function, family: str) -> bool:
    """Whether a test of a contract is among those of ``make test`` on this family.

    It is on `TRANSPOSED` and on others that the class's name decides. What a seed decides is seen on one of them, and
    so are banks, which `tests/compose` has on every family. Exports and ``torch.compile``, which take seconds, run on a
    class's first family for the classes that say ``exported = True``, and on several where they say ``every_family =
    True``. Together they meet every operator that methods insert, to which
    `tests/methods/test_exported_operators.py` holds them. Inductor has what says ``inductor = True``. A folded export
    is the base's graph with other weights (`MethodContract.test_fold`), so those that say ``folded = True`` have it.
    """
    from graftc.testing import DeploymentContract

    of, test = item.cls, item.originalname
    assert of is not None
    if getattr(of, "variant", False):
        return family in _some(of.families, VARIANT_FAMILIES, of.__name__)
    if not issubclass(of, DeploymentContract):
        chosen = _sample(of.families, CONTRACT_SHARE, of.__name__)
        return family in (chosen[:1] if test in ONE_FAMILY else chosen)
    first = family == of.families[0]
    if test == "test_inductor":
        return first and getattr(of, "inductor", False)
    if test == "test_onnx_folded":
        return first and getattr(of, "folded", False)
    if getattr(of, "every_family", False):
        return family in _sample(of.families, EXPORTED_SHARE, of.__name__)
    return first and getattr(of, "exported", False)


def _sample(families: Sequence[str], share: int, name: str) -> list[str]:
    """One in ``share`` of the families, two at least: `TRANSPOSED` where it is among them, then some others."""
    chosen = [family for family in families if family == TRANSPOSED]
    rest = [family for family in families if family != TRANSPOSED]
    number = max(2, math.ceil(len(families) / share)) - len(chosen)
    return chosen + [family for family in rest if family in _some(rest, number, name)]


def _some(families: Sequence[str], number: int, name: str) -> set[str]:
    """Some of the families, evenly spread, from one on that the name decides."""
    number = min(number, len(families))  # none where there are none
    start = zlib.crc32(name.encode())
    return {families[(start + index * len(families) // number) % len(families)] for index in range(number)}


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


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Makes a file system of some KiB, or gives the one that is there another size; only root may."""
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
