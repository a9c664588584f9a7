"""Test settings: no network, a capture cache of this run's own, fixed seeds."""

from __future__ import annotations

import gc
import os
import shutil
import tempfile
from collections.abc import Sequence

import pytest
import torch

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

# Graphs are many small objects that live on: with Python's own thresholds, a tenth of the time goes into looking for
# garbage among them.
gc.set_threshold(50_000, 20, 5)

QUICK_FAMILIES = frozenset({"bert", "gpt2"})
"""What runs once for each family is quick on these, and on its first family where it has none of them."""

VARIANT_FAMILIES = QUICK_FAMILIES | {"t5", "mixtral"}
"""Where the contract of another setting of a method runs in ``make test``; ``make test-full`` has the other families.
Such a class says ``variant = True``."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: Sequence[pytest.Item]) -> None:
    """Mark the other families of tests with a ``family`` as slow, some of them as full, before ``-m`` chooses."""
    families: dict[str, dict[str, list[pytest.Item]]] = {}
    for item in items:
        if isinstance(item, pytest.Function) and hasattr(item, "callspec"):
            family = item.callspec.params.get("family")
            if getattr(item.cls, "variant", False) and family not in VARIANT_FAMILIES:
                item.add_marker(pytest.mark.full)
            if _once(item) and family != item.cls.families[0]:
                item.add_marker(pytest.mark.full)
            if isinstance(family, str):
                families.setdefault(item.nodeid.partition("[")[0], {}).setdefault(family, []).append(item)
    for found in families.values():
        quick = QUICK_FAMILIES & found.keys() or {next(iter(found))}
        for family, tests in found.items():
            if family not in quick:
                for item in tests:
                    item.add_marker(pytest.mark.slow)


def _once(item: pytest.Function) -> bool:
    """Whether ``make test`` has one family of it: exports and ``torch.compile``, which take seconds, of classes that
    do not say ``every_family = True``."""
    from graftc.testing import DeploymentContract

    of = item.cls
    return of is not None and issubclass(of, DeploymentContract) and not getattr(of, "every_family", False)


def pytest_collection_finish() -> None:
    """What has been imported stays: no collection has to look at it again."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure(config: pytest.Config) -> None:
    """Remove the cache that this process made."""
    if _OWN_CACHE is not None:
        shutil.rmtree(_OWN_CACHE, ignore_errors=True)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
