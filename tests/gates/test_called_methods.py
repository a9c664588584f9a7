"""Every method, on models whose layers are called as functions."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from graftc.compiler.resolution import CalledResolution
from graftc.testing.families import tiny
from tests.compiler.test_called_layers import DEPTH, compilation_of, require_every_layer, require_the_same
from tests.frozen.freeze import entries

pytestmark = pytest.mark.full


@pytest.mark.parametrize("name", list(entries()))
def test_calls_do_what_every_layer_does(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Recorded calls do what every layer does, on deeper models; layers treated differently are written out."""

    def deep(family: str, *args: Any, **options: Any) -> nn.Module:
        return tiny(family, *args, **{"layers": DEPTH, **options})

    monkeypatch.setattr("graftc.testing.contract.tiny", deep)
    entry = entries()[name]
    compiled = entry.contract.compiled(entry.family, entry.contract.model(entry.family))
    require_every_layer(compiled)
    if isinstance(compilation_of(compiled).main, CalledResolution):
        require_the_same(compiled)
