"""The folder of a recipe: ``recipe.json`` says which one is kept there."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from graftc.runtime.destinations import cannot_write
from graftc.runtime.files import recover, write_text
from graftc.specs.errors.diagnostics import GraftError

__all__ = ["RECIPE", "begin_recipe", "has_recipe", "make_folder", "read_plain"]

RECIPE = "recipe.json"


def has_recipe(folder: Path, identity: Mapping[str, Any]) -> bool:
    """Whether a folder holds this recipe already. What a killed run has left is put in order; nothing else is written.

    Args:
        folder: need not be there.
        identity: all that the recipe depends on, as plain data.

    Raises:
        GraftError: GC058 where the folder holds another recipe, which is said, or files and no recipe.
    """
    recover(folder)
    path = folder / RECIPE
    if not path.exists():
        if folder.is_dir() and any(not each.name.startswith(".") for each in folder.iterdir()):
            message = f"{folder} holds files and no {RECIPE}, so that nobody knows what they belong to"
            raise GraftError("GC058", message, hint="take an empty folder")
        return False
    mine, held = json.loads(json.dumps(identity)), read_plain(path)
    other = [key for key in mine if not isinstance(held, dict) or held.get(key) != mine[key]]
    if other:
        raise GraftError("GC058", f"{folder} holds a recipe of another {' and '.join(other)}")
    return True


def begin_recipe(folder: Path, identity: Mapping[str, Any]) -> None:
    """Make the folder of a recipe, and write which one it is; what is there already is checked.

    Raises:
        GraftError: as `has_recipe`; GC064 where the folder cannot be written.
    """
    if has_recipe(folder, identity):
        return
    make_folder(folder)
    write_text(folder / RECIPE, json.dumps(identity, indent=2))


def make_folder(folder: Path) -> Path:
    """Make a folder and those above it where they are missing.

    Raises:
        GraftError: GC064.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise GraftError("GC064", f"{folder} cannot be made: it is a file", hint="choose another path") from error
    except OSError as error:
        raise cannot_write(folder, error) from error
    return folder


def read_plain(path: Path) -> Any:
    """Plain data of a JSON file.

    Raises:
        GraftError: GC058 where it is none.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise GraftError("GC058", f"{path} is damaged: it is no JSON", hint="take another folder") from error
