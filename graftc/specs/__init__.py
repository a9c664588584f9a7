"""Everything that a user may write: specs, targets, roles and coded errors. No torch; names are loaded on first use."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from graftc.specs.base import Items as Items
    from graftc.specs.base import MethodSpec as MethodSpec
    from graftc.specs.base import SpecModel as SpecModel
    from graftc.specs.claims import Claims as Claims
    from graftc.specs.claims import FoldKind as FoldKind
    from graftc.specs.claims import SiteKind as SiteKind
    from graftc.specs.document import Budget as Budget
    from graftc.specs.document import FoldOptions as FoldOptions
    from graftc.specs.document import Spec as Spec
    from graftc.specs.errors.diagnostics import CATALOGUE as CATALOGUE
    from graftc.specs.errors.diagnostics import Code as Code
    from graftc.specs.errors.diagnostics import GraftError as GraftError
    from graftc.specs.errors.diagnostics import GraftWarning as GraftWarning
    from graftc.specs.errors.diagnostics import Place as Place
    from graftc.specs.errors.diagnostics import nearest as nearest
    from graftc.specs.errors.diagnostics import warn as warn
    from graftc.specs.io import dump_spec as dump_spec
    from graftc.specs.io import load_spec as load_spec
    from graftc.specs.io import parse_spec as parse_spec
    from graftc.specs.methods.lora import LoRA as LoRA
    from graftc.specs.methods.lora import LoRAOverride as LoRAOverride
    from graftc.specs.overrides import Override as Override
    from graftc.specs.registry import SpecEntry as SpecEntry
    from graftc.specs.registry import method_specs as method_specs
    from graftc.specs.roles import ROLES as ROLES
    from graftc.specs.roles import Role as Role
    from graftc.specs.roles import RoleInfo as RoleInfo
    from graftc.specs.roles import parse_role as parse_role
    from graftc.specs.roles import widen as widen
    from graftc.specs.target import Target as Target

_HOME = {
    "base": ("Items", "MethodSpec", "SpecModel"),
    "claims": ("Claims", "FoldKind", "SiteKind"),
    "errors.diagnostics": ("CATALOGUE", "Code", "GraftError", "GraftWarning", "Place", "nearest", "warn"),
    "document": ("Budget", "FoldOptions", "Spec"),
    "io": ("dump_spec", "load_spec", "parse_spec"),
    "overrides": ("Override",),
    "registry": ("SpecEntry", "method_specs"),
    "roles": ("ROLES", "Role", "RoleInfo", "parse_role", "widen"),
    "target": ("Target",),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = [*_MODULE_OF]


def __getattr__(name: str) -> Any:
    if name in _MODULE_OF:
        return getattr(importlib.import_module(f"graftc.specs.{_MODULE_OF[name]}"), name)
    if not name[:1].isupper():  # a submodule that is not imported yet, or an unknown name
        raise AttributeError(f"module 'graftc.specs' has no attribute '{name}'")
    # Spec classes of methods are discovered, so that a new method needs no line here.
    from graftc.specs.registry import method_specs

    for entry in method_specs().values():
        attribute = getattr(importlib.import_module(entry.module), name, None)
        if name in (entry.spec_class.__name__, f"{entry.spec_class.__name__}Override"):
            return attribute
    raise AttributeError(f"module 'graftc.specs' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULE_OF])
