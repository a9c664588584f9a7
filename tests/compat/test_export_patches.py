"""Lists of patches for exports in the forms that versions of transformers give them."""

from __future__ import annotations

from typing import Any

import pytest

from graftc.compat.transformers import export_patches


def anything(original: Any) -> Any:
    return original


@pytest.mark.parametrize(
    ("patches", "is_known"),
    [
        ({"dynamo": [("torch.nn.functional", "relu", anything)], "onnx": []}, True),
        ({"dynamo": [(int, "real", anything)]}, False),
        ({"dynamo": [], "onnx": [(int, "real", anything)]}, False),
        (None, False),
    ],
)
def test_lists_are_known_by_paths(patches: Any, is_known: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers 5.13 lists the patched objects themselves, which are imported by then."""
    from transformers.exporters import utils

    if patches is None:
        monkeypatch.delattr(utils, "_PATCHES")
    else:
        monkeypatch.setattr(utils, "_PATCHES", patches)
    assert export_patches() is (patches if is_known else None)
