"""Code as part of a key: digests of functions, the names that they mention, where they come from, graftc's own files.

What is digested is what Python runs, not a file: a class of a notebook has no file, and a function that was put in the
place of another is in the wrong one.
"""

from __future__ import annotations

import hashlib
import os
import sys
import sysconfig
from functools import cache, lru_cache
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any, Literal

import torch

Home = Literal["fixed", "library", "user"]
"""Who wrote a piece of code: "fixed" is torch, Python or graftc, which versions and `own_digest` identify; "library" is
an installed package; "user" is anyone else."""

_TORCH = os.path.dirname(torch.__file__) + os.sep
_GRAFTC = str(Path(__file__).parents[3]) + os.sep
_STANDARD = tuple({sysconfig.get_path(name) + os.sep for name in ("stdlib", "platstdlib")})
_INSTALLED = (f"{os.sep}site-packages{os.sep}", f"{os.sep}dist-packages{os.sep}")
_BY_NAME = ("getattr", "hasattr", "attrgetter", "methodcaller")


@lru_cache(maxsize=32768)
def home_of_file(file: str) -> Home:
    """Whose code a file has."""
    if file.startswith((_TORCH, _GRAFTC, "<frozen ")):
        return "fixed"
    if any(part in file for part in _INSTALLED):
        return "library"
    return "fixed" if file.startswith(_STANDARD) else "user"


@lru_cache(maxsize=4096)
def home_of_module(name: str) -> Home:
    """Whose code a module has, by its name."""
    root = name.partition(".")[0]
    if root == "transformers":
        return "library"
    if root == "builtins":
        return "fixed"
    module = sys.modules.get(name) or sys.modules.get(root)
    file = getattr(module, "__file__", None)
    if file is None:
        return "fixed" if root in sys.stdlib_module_names and root != "__main__" else "user"
    return home_of_file(file)


def home_of(function: FunctionType) -> Home:
    """Whose code a function has: that of its file, and for code that was generated that of the module it runs in."""
    return _home(function.__code__.co_filename, str(function.__globals__.get("__name__", "")))


@lru_cache(maxsize=32768)
def _home(file: str, module: str) -> Home:
    if not file.startswith("<") or file.startswith("<frozen "):
        return "library" if module.startswith("transformers.") and "transformers" in file else home_of_file(file)
    return home_of_module(module)


@lru_cache(maxsize=32768)
def _digest(number: int, code: CodeType) -> str:
    parts = [
        code.co_code.hex(),
        repr((code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars)),
        repr((code.co_flags, code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount)),
        *(_constant(value) for value in code.co_consts),
    ]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


def digest_of(code: CodeType) -> str:
    """A digest of what a function does, whatever file and line it stands in."""
    return _digest(id(code), code)  # equal code in other places is equal to Python, but its constants may be NaN


def _constant(value: Any) -> str:
    if isinstance(value, CodeType):
        return digest_of(value)
    if isinstance(value, frozenset):
        return repr(sorted(map(_constant, value)))
    if isinstance(value, tuple):
        return repr(tuple(map(_constant, value)))
    return f"{type(value).__name__} {value!r}"


@lru_cache(maxsize=32768)
def _names(number: int, code: CodeType) -> tuple[str, ...]:
    nested = [value for value in code.co_consts if isinstance(value, CodeType)]
    found = dict.fromkeys(code.co_names)
    if not found.keys().isdisjoint(_BY_NAME):
        found.update(dict.fromkeys(v for v in code.co_consts if isinstance(v, str) and v.isidentifier()))
    for inner in nested:
        found.update(dict.fromkeys(names_of(inner)))
    return tuple(found)


def names_of(code: CodeType) -> tuple[str, ...]:
    """Globals and attributes that a function mentions, and the functions within it."""
    return _names(id(code), code)


@cache
def own_digest() -> str:
    """A digest of graftc's own code that takes part in making and reading captures: a change makes old ones
    unreachable."""
    digest = hashlib.sha256()
    for path in own_files(Path(__file__).parents[3]):
        digest.update(path.read_bytes())
    return digest.hexdigest()


_OWN = (
    ".",
    "compiler",
    "compiler/capture",
    "compiler/capture/alike",
    "compiler/capture/anchoring",
    "compiler/capture/identity",
    "compiler/live",
    "compiler/resolve",
    "passes/core",
    "passes/core/*",
    "passes/core/*/*",
    "passes/graph",
    "specs",
    "specs/errors",
)
"""Folders with every file that `capture` and `cache` import, and so on, and those with classes that graftc captures."""


def own_files(package: Path) -> list[Path]:
    """Files under ``package`` of which `own_digest` is made, sorted."""
    return sorted(path for folder in _OWN for path in package.glob(f"{folder}/*.py"))
