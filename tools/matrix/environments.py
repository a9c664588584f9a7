"""Environments as data: their Python and their packages, with lowest versions read from pyproject.toml."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

from tools.makefile import makefile_variable
from tools.sources import ROOT


@dataclass(frozen=True)
class Environment:
    """The description of an environment.

    Attributes:
        name: the name of its folder.
        python: the version of Python, as in ``3.13``; empty for the Python that runs this.
        extras: the extras of graftc that are installed; by default those of ``make setup``.
        lowest: the packages that are installed in the lowest version that ``pyproject.toml`` admits; others are as new
            as pip finds.
        without: packages of the extras that are left out, each with the reason.
    """

    name: str
    python: str = ""
    extras: tuple[str, ...] = ()
    lowest: tuple[str, ...] = ()
    without: Mapping[str, str] = field(default_factory=dict)


OLDEST = Environment(
    "oldest",
    "3.11",
    # torchao because PEFT 0.18 imports a class that torchao 0.18 no longer has.
    lowest=("torch", "transformers", "peft", "onnxruntime", "pydantic", "torchao"),
    without={"onnxruntime-genai": "0.18, the lowest version in the dev extra, needs ONNX Runtime 1.31"},
)
NEWEST = Environment("newest", "3.13")
PLAIN = Environment("plain")
"""The Python that runs this, with the releases that pip finds: where walks run unless told otherwise."""

ENVIRONMENTS = (OLDEST, NEWEST)
"""The environments in which ``make test-matrix`` runs the tests."""


@dataclass(frozen=True)
class Project:
    """The requirements of graftc, as its files state them.

    Attributes:
        dependencies: the requirements without extras.
        optional: the requirements of each extra.
        setup: the extras that ``make setup`` installs.
        bare: the packages that ``make setup`` installs without their requirements.
    """

    dependencies: tuple[str, ...]
    optional: Mapping[str, tuple[str, ...]]
    setup: tuple[str, ...]
    bare: tuple[str, ...]

    def requirements(self, extras: Iterable[str]) -> list[Requirement]:
        """Return the requirements with extras, those of graftc's own extras taken apart."""
        return [Requirement(text) for text in (*self.dependencies, *self._of_extras(extras))]

    def _of_extras(self, extras: Iterable[str]) -> Iterator[str]:
        for extra in extras:
            for text in self.optional[extra]:
                requirement = Requirement(text)
                if requirement.name == "graftc":
                    yield from self._of_extras(sorted(requirement.extras))
                else:
                    yield text


def read_project(root: Path = ROOT) -> Project:
    """Read ``pyproject.toml`` and the variables of the ``Makefile`` in a folder."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    optional = {name: tuple(texts) for name, texts in project["optional-dependencies"].items()}
    return Project(
        tuple(project["dependencies"]),
        optional,
        tuple(makefile_variable("EXTRAS", root).split(",")),
        tuple(makefile_variable("BARE", root).split()),
    )


def lowest_version(requirements: Iterable[Requirement], name: str) -> str:
    """Return the lowest version of a package that all requirements admit.

    Raises:
        ValueError: no requirement names the package with a lower bound, ``>=`` or ``==``.
    """
    specifiers = [each for requirement in requirements if requirement.name == name for each in requirement.specifier]
    bounds = [each.version for each in specifiers if each.operator in (">=", "==")]
    if not bounds:
        raise ValueError(f"pyproject.toml states no lowest version of {name}")
    return max(bounds, key=Version)


def complete(environment: Environment, project: Project) -> Environment:
    """Return an environment that names its extras."""
    return environment if environment.extras else replace(environment, extras=project.setup)


def constraints(environment: Environment, project: Project) -> list[str]:
    """Return the lines of pip's constraints: the lowest versions of an environment."""
    stated = project.requirements(project.optional)
    return [f"{name}=={lowest_version(stated, name)}" for name in environment.lowest]


def required(environment: Environment, project: Project) -> list[Requirement]:
    """Return the requirements of an environment, except for the packages that it leaves out."""
    requirements = project.requirements(complete(environment, project).extras)
    return [each for each in requirements if each.name not in environment.without]


def targets(environment: Environment, project: Project, wheel: Path) -> list[str]:
    """Return what pip is told to install: the wheel with extras, or with single requirements if some are left out."""
    if not environment.without:
        return [f"{wheel}[{','.join(complete(environment, project).extras)}]"]
    return [str(wheel), *dict.fromkeys(map(str, required(environment, project)))]
