"""``constraints.txt`` has a release of everything that ``make setup`` installs, so that two machines get the same."""

from __future__ import annotations

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tools.matrix.environments import read_project
from tools.sources import ROOT

BUILDS = {"torch", "torchvision"}
"""What is built for the machine, such as for its GPU."""


def test_every_requirement_is_pinned_to_a_release_that_it_admits() -> None:
    project = read_project()
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = {canonicalize_name(pin.name): pin for pin in map(Requirement, lines[1:])}
    assert not pins.keys() & BUILDS
    for requirement in [*project.requirements(project.setup), *map(Requirement, project.bare)]:
        if (name := canonicalize_name(requirement.name)) in BUILDS:
            continue
        assert name in pins, f"{name} is not in constraints.txt: run `make setup PINS=`, then `make pins`"
        (pin,) = pins[name].specifier
        assert pin.operator == "==" and pin.version in requirement.specifier, f"{pins[name]}, not {requirement}"
