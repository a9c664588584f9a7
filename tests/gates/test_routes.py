"""Merges of routed models in 16 bits are certified or refused for a reason other than a route, on any processor."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import graftc
from graftc.records.certificate import Certificate
from graftc.runtime.deploy.merged import certificate_of
from graftc.specs.errors.diagnostics import GraftError
from graftc.testing import perturb
from tests.runtime.deploy.routed import FAMILIES, ROLES, near_twins, routed_model

ROUNDS = 40
"""Models of each family."""
TWINS = 0.5
"""Share of them in which scores of experts are a rounding apart, so that choices are others on any processor."""


def merges(family: str, seeds: range) -> Iterator[tuple[str, Certificate, str | None]]:
    """Yield perturbed models of a family: a description, the certificate, and the code that a merge is refused with."""
    for seed in seeds:
        draw = random.Random(f"{family} {seed}")
        roles = sorted(draw.sample(ROLES, draw.randint(1, len(ROLES))))
        scale, rank, twins = draw.choice((0.02, 0.05, 0.1)), draw.choice((1, 2, 4)), draw.random() < TWINS
        model = routed_model(family, seed)
        if twins:
            near_twins(model)
        spec = {"adapt": [{"method": "lora", "rank": rank, "target": {"role": roles}}]}
        compiled = graftc.compile(spec, model, seed=seed).eval()
        perturb(compiled, scale, seed)
        certificate, _ = certificate_of(compiled)
        assert certificate is not None
        yield f"{family} {seed}: {roles} by {scale}, twins {twins}", certificate, code_of_merge(compiled)


def code_of_merge(compiled: Any) -> str | None:
    """Return the code that a merge is refused with, or None."""
    try:
        compiled.merge(allow_unchanged=True)
    except GraftError as error:
        return error.code
    return None


def check(family: str, seeds: range) -> tuple[int, int, int]:
    """Return the number of merges, of certified ones, and of those in which a router chose differently."""
    certified, flipped = 0, 0
    for what, certificate, code in merges(family, seeds):
        routes = certificate.routes
        assert len(routes) == 2 and all(route.passed for route in routes), (what, certificate.failures())
        assert code in (None, "GC051") and certificate.passed is (code is None), (what, code)
        certified += code is None
        flipped += any(route.flips for route in routes)
    return len(seeds), certified, flipped


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.gate
def test_no_route_refuses_a_merge(family: str) -> None:
    count, certified, flipped = check(family, range(ROUNDS))
    capability = os.environ.get("ATEN_CPU_CAPABILITY", torch.backends.cpu.get_cpu_capability())
    print(f"{family} on {capability}: {certified} of {count} certified, routes differ in {flipped}")
    assert flipped >= count / 8, "routes hardly differ, so little is tested"


@pytest.mark.slow
def test_no_route_refuses_a_merge_sample() -> None:
    assert check(FAMILIES[0], range(2))[0] == 2
