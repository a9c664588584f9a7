"""The public surface is the one that is written down, and the writing sees what it has to."""

from __future__ import annotations

import re

import pytest

import graftc
from graftc.records.certificate import Certificate
from graftc.records.reading import json_schema
from tools.surface import STORED, surface

WRITTEN = STORED.read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_public_surface_is_as_stored() -> None:
    """The first JSON Schema of a record changes the classes of all records, which the surface does not show."""
    json_schema(Certificate)
    assert surface() == WRITTEN, (
        "the public surface has changed: see docs/stability.md, run `python -m tools.surface`, write the changelog"
    )


def test_every_public_name_is_in_it_and_no_address_or_private_name() -> None:
    for name in graftc.__all__:
        assert re.search(rf"^(class |# graftc\.)?{name}\b", WRITTEN, re.MULTILINE), name
    assert "0x" not in WRITTEN
    assert not re.search(r"^    (property |classmethod )?_", WRITTEN, re.MULTILINE)


def test_methods_of_a_compiled_model_have_signatures() -> None:
    members = WRITTEN.split("class Compiled(")[1].split("\nclass ")[0]
    assert "    begin(self, total_steps: int) -> None\n" in members
    assert "allow_unchanged: bool = False" in members
