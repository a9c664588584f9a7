"""Certificates with damaged numbers are refused by the reader, without a traceback."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from graftc.records.certificate import Certificate, SiteEvidence
from graftc.records.reading import from_json
from graftc.records.retention import Retention

RATIOS = {"norm": 0.5, "error": 0.25, "entries": 0.75}
NO_NUMBERS = st.none() | st.booleans() | st.text(max_size=3) | st.sampled_from([[], {}, 1e155, -1e200])


def with_retention(retention: Any) -> str:
    """Return a certificate as JSON, with one site that has this retention."""
    site = SiteEvidence("a", ("lora",), 1.0, 0.0, 0.0, Retention(4.0, 2.0, 1.0, 4, 3))
    written = Certificate((site,), {"logits": 0.0}, 1.0, "same", "same").to_json()
    written["sites"][0]["retention"] = retention
    return json.dumps(written)


def test_an_intact_one_is_read() -> None:
    (site,) = from_json(Certificate, with_retention(RATIOS)).sites
    assert (site.retention.norm, site.retention.error, site.retention.entries) == (0.5, 0.25, 0.75)


@pytest.mark.parametrize("name", RATIOS)
@given(value=NO_NUMBERS)
def test_ratios_that_are_not_usable_numbers(name: str, value: Any) -> None:
    with pytest.raises(ValidationError):
        from_json(Certificate, with_retention({**RATIOS, name: value}))


@pytest.mark.parametrize("name", RATIOS)
def test_ratios_that_are_missing(name: str) -> None:
    with pytest.raises(ValidationError, match=f"{name} must be a finite number"):
        from_json(Certificate, with_retention({key: value for key, value in RATIOS.items() if key != name}))


@pytest.mark.parametrize(("name", "value"), [("error", -0.5), ("entries", -1), ("entries", 1.5)])
def test_ratios_out_of_range(name: str, value: float) -> None:
    with pytest.raises(ValidationError, match="error must be at least 0"):
        from_json(Certificate, with_retention({**RATIOS, name: value}))
