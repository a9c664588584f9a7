"""Names that a manifest may use."""

from __future__ import annotations

import pytest
from pydantic import TypeAdapter, ValidationError

from graftc.runtime.artifact.fields import AxisName

AXIS: TypeAdapter[str] = TypeAdapter(AxisName)


@pytest.mark.parametrize("name", ["tokens", "past+tokens", "tokens+1", "tokens+999999999"])
def test_axes_are_names_and_sums(name: str) -> None:
    assert AXIS.validate_python(name) == name


@pytest.mark.parametrize("name", ["", "1", "1+tokens", "a+b+c", "tokens+1000000000", "tokens+", "class", "a b", "a+-1"])
def test_other_axes_are_refused(name: str) -> None:
    """Numbers have up to nine digits, since longer ones are no sizes and slow to read."""
    with pytest.raises(ValidationError):
        AXIS.validate_python(name)
