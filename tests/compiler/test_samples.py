"""Models that certificates may run on random inputs, and others."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from graftc.compiler.folding.samples import beyond_text


@pytest.mark.parametrize(
    ("names", "beyond"),
    [
        (["input_ids"], False),
        (["input_ids", "attention_mask", "labels"], False),
        (["decoder_input_ids", "input_ids"], False),
        (["pixel_values"], False),
        (["input_ids", "pixel_values"], True),
        (["input_ids", "attention_mask", "pixel_values"], True),
        (["pixel_values", "decoder_input_ids"], True),
    ],
)
def test_ids_that_mark_the_places_of_other_inputs(names: list[str], beyond: bool) -> None:
    """Ids beside images are not random; text alone may be, and so may images alone."""
    program: Any = SimpleNamespace(signature=names)
    assert beyond_text(program) is beyond
