"""The classes that export in ``make test`` cover every operator that a method inserts into an exported graph."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from graftc.passes.core.ir.verify import provenance
from graftc.runtime.model.runner import runner_of
from graftc.testing import DeploymentContract

HERE = Path(__file__).parent


def deployed() -> list[type[DeploymentContract]]:
    """Return every class in this directory that inherits the contract of exports."""
    contracts: list[type[DeploymentContract]] = []
    for path in sorted(HERE.glob("test_*.py")):
        if "DeploymentContract" in path.read_text(encoding="utf-8") and path != Path(__file__):
            module = importlib.import_module(f"tests.passes.methods.{path.stem}")
            classes = [c for c in vars(module).values() if isinstance(c, type) and issubclass(c, DeploymentContract)]
            contracts += [c for c in classes if c.__module__ == module.__name__]
    return contracts


def inserted(contract: type[DeploymentContract]) -> set[str]:
    """Return the operators of the adaptation's nodes in eval mode, on the class's first family."""
    _, compiled = contract().shared(contract.families[0], perturbed=True)
    nodes = runner_of(compiled).compilation.program("eval").graph.nodes
    return {str(node.target) for node in nodes if node.op == "call_function" and provenance(node) is not None}


@pytest.mark.full
def test_every_inserted_operator_is_exported() -> None:
    classes = deployed()
    exporting = [c for c in classes if getattr(c, "exported", False)]
    assert len(classes) > len(exporting) > 10
    met = set().union(*map(inserted, exporting))
    assert {c.__qualname__: sorted(missing) for c in classes if (missing := inserted(c) - met)} == {}
