"""Names of added tensors are parsed back into the parts that they were built from."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graftc.passes.core.weights.names import RESERVED, adapter_name, module_of, owner_of, parsed, renamed

SEGMENT = st.from_regex(r"[a-z_][a-z0-9_]{0,6}|[0-9]{1,2}", fullmatch=True).filter(lambda s: s != RESERVED)
PATH = st.lists(SEGMENT, max_size=4).map(".".join)


@pytest.mark.full
@given(PATH, SEGMENT, PATH, SEGMENT)
def test_round_trip(module: str, adaptation: str, scope: str, part: str) -> None:
    name = adapter_name(module, adaptation, scope, part)
    assert name == ".".join(s for s in (module, RESERVED, adaptation, scope, part) if s)
    parts = parsed(name)
    assert parts is not None and str(parts) == name
    assert (parts.module, parts.adaptation) == (module, adaptation) == (module_of(name), owner_of(name))
    assert parts.part == (f"{scope}.{part}" if scope else part)
    assert renamed(renamed(name, "other"), adaptation) == name and owner_of(renamed(name, "other")) == "other"


@pytest.mark.slow
@given(PATH, SEGMENT)
def test_base_tensors(module: str, last: str) -> None:
    name = f"{module}.{last}".lstrip(".")
    assert parsed(name) is None and owner_of(name) == "" and module_of(name) == module and renamed(name, "x") == name
