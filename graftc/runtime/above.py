"""What a compiled model does by code that makes compiled models, which stands above it and is looked up when used."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

_ABOVE: Mapping[str, str] = MappingProxyType(
    {
        "entry_of": "graftc.runtime.loading.peft_several",
        "names_of": "graftc.runtime.loading.peft_several",
        "save_pretrained": "graftc.runtime.loading.auto_classes",
    }
)


def above(name: str) -> Callable[..., Any]:
    """A function of a loader. Modules import downwards only, so that this name table is the one way up."""
    found: Callable[..., Any] = getattr(importlib.import_module(_ABOVE[name]), name)
    return found
