"""Identify code for a key: digests of functions, the names that they mention, who wrote them, and graftc's own files.

Digests cover the code that Python runs, not files: a class in a notebook has no file, and a function that replaces
another one may be in a different file.
"""

from __future__ import annotations

import hashlib
import os
import sys
import sysconfig
from collections.abc import Iterator
from functools import cache, lru_cache
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any, Literal

import torch

Home = Literal["fixed", "library", "user"]
"""Who wrote a piece of code: "fixed" means torch, Python or graftc, which versions and `own_digest` identify; "library"
means an installed package; "user" means anyone else."""

_TORCH = os.path.dirname(torch.__file__) + os.sep
_GRAFTC = str(Path(__file__).parents[3]) + os.sep
_STANDARD = tuple({sysconfig.get_path(name) + os.sep for name in ("stdlib", "platstdlib")})
_INSTALLED = (f"{os.sep}site-packages{os.sep}", f"{os.sep}dist-packages{os.sep}")
_BY_NAME = frozenset({"getattr", "hasattr", "attrgetter", "methodcaller"})


@lru_cache(maxsize=32768)
def home_of_file(file: str) -> Home:
    """Return who wrote the code in a file."""
    if file.startswith((_TORCH, _GRAFTC, "<frozen ")):
        return "fixed"
    if any(part in file for part in _INSTALLED):
        return "library"
    return "fixed" if file.startswith(_STANDARD) else "user"


@lru_cache(maxsize=4096)
def home_of_module(name: str) -> Home:
    """Return who wrote a module's code, given the module's name."""
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
    """Return who wrote a function, judging by its file or, for generated code, by the module in which it runs."""
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
    """Return a digest of a function's code, independent of its file and line."""
    return _digest(id(code), code)  # Python treats equal code in different places as equal, but constants may be NaN


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
    names: dict[str, None] = {}
    for each in codes_in(code):
        names |= dict.fromkeys(each.co_names)
        if not _BY_NAME.isdisjoint(each.co_names):
            names |= dict.fromkeys(v for v in each.co_consts if isinstance(v, str) and v.isidentifier())
    return tuple(names)


def codes_in(code: CodeType) -> Iterator[CodeType]:
    """Yield a function's code, and the code of the functions within it."""
    yield code
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from codes_in(inner)


def names_of(code: CodeType) -> tuple[str, ...]:
    """Return the globals and attributes that a function and the functions within it mention."""
    return _names(id(code), code)


@cache
def own_digest() -> str:
    """Return a digest of the graftc code that creates and reads captures; a change makes old captures unreachable."""
    digest = hashlib.sha256()
    for path in own_files(Path(__file__).parents[3]):
        digest.update(path.read_bytes())
    return digest.hexdigest()


_OWN = (
    ".",
    "compat",
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
    "records",
    "specs",
    "specs/errors",
    "specs/records",
)
"""Folders of the files that `capture` and `capture_cache` import, even indirectly, and of classes that are captured."""


def own_files(package: Path) -> list[Path]:
    """Return the files under ``package`` that `own_digest` covers, sorted."""
    return sorted(path for folder in _OWN for path in package.glob(f"{folder}/*.py"))
