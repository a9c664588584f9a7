"""The folder of a recipe, in which ``recipe.json`` identifies the recipe."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from graftc.files.destinations import cannot_write, check_path
from graftc.files.writing import recover, write_text
from graftc.specs.errors.diagnostics import GraftError
from graftc.specs.regular_files import JSON_BYTES, read_regular
from graftc.specs.strict_json import read_json

RECIPE = "recipe.json"


def has_recipe(folder: Path, identity: Mapping[str, Any]) -> bool:
    """Return whether a folder already contains this recipe.

    What a killed run has left is recovered first; nothing else is written.

    Args:
        folder: the folder, which need not exist.
        identity: everything that the recipe depends on, as plain data.

    Raises:
        GraftError: GC058 if the folder contains another recipe, naming what differs, or files and no recipe.
    """
    recover(folder)
    path = folder / RECIPE
    if not os.path.lexists(path):
        if folder.is_dir() and any(not each.name.startswith(".") for each in folder.iterdir()):
            message = f"{folder} holds files and no {RECIPE}, so that nobody knows what they belong to"
            raise GraftError("GC058", message, hint="take an empty folder")
        return False
    mine, recorded = json.loads(json.dumps(identity)), _read(path)
    other = [key for key in mine if recorded.get(key) != mine[key]]
    if other:
        raise GraftError("GC058", f"{folder} holds a recipe of another {' and '.join(other)}")
    return True


def begin_recipe(folder: Path, identity: Mapping[str, Any]) -> None:
    """Create the folder of a recipe, and write the file that identifies it; an existing one is checked.

    Raises:
        GraftError: as `has_recipe`; GC064 if the folder cannot be written.
    """
    if has_recipe(folder, identity):
        return
    make_folder(folder)
    write_text(folder / RECIPE, json.dumps(identity, indent=2))


def recorded_seed(folder: Path) -> int | None:
    """Return the seed that the recipe in a folder was begun with; None if there is no recipe, or it has no seed.

    Raises:
        GraftError: GC058 if the file is damaged.
    """
    if not os.path.lexists(folder / RECIPE):
        return None
    seed = _read(folder / RECIPE).get("seed")
    return seed if isinstance(seed, int) else None


def make_folder(folder: Path) -> Path:
    """Create a folder and those above it that are missing, and return it.

    Raises:
        GraftError: GC064 if it cannot be created.
    """
    check_path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise GraftError("GC064", f"{folder} cannot be made: it is a file", hint="choose another path") from error
    except OSError as error:
        raise cannot_write(folder, error) from error
    return folder


def _read(path: Path) -> dict[str, Any]:
    """Return what the recipe in a folder depends on.

    Raises:
        GraftError: GC058 if the file is damaged.
    """
    try:
        data = read_json(read_regular(path), JSON_BYTES)
    except (OSError, ValueError):
        data = None
    if not isinstance(data, dict):
        raise GraftError("GC058", f"{path} is damaged: it does not say what is kept here", hint="take another folder")
    return data
