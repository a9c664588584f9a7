"""A recipe's folder, in which ``recipe.json`` identifies the recipe."""

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

    Files left behind by a killed run are recovered first; nothing else is written.

    Args:
        folder: the folder, which need not exist.
        identity: everything on which the recipe depends, as plain data.

    Raises:
        GraftError: GC058 if the folder contains another recipe (the message names the differences), or contains files
            but no recipe.
    """
    recover(folder)
    path = folder / RECIPE
    if not os.path.lexists(path):
        if folder.is_dir() and any(not each.name.startswith(".") for each in folder.iterdir()):
            message = f"{folder} contains files but no {RECIPE}, so it is unknown what they belong to"
            raise GraftError("GC058", message, hint="use an empty folder")
        return False
    mine, recorded = json.loads(json.dumps(identity)), _read(path)
    other = [key for key in mine if recorded.get(key) != mine[key]]
    if other:
        raise GraftError("GC058", f"{folder} contains a recipe with a different {' and '.join(other)}")
    return True


def begin_recipe(folder: Path, identity: Mapping[str, Any]) -> None:
    """Create a recipe's folder and write the file that identifies the recipe; an existing file is checked.

    Raises:
        GraftError: as for `has_recipe`; GC064 if the folder cannot be written.
    """
    if has_recipe(folder, identity):
        return
    make_folder(folder)
    write_text(folder / RECIPE, json.dumps(identity, indent=2))


def recorded_seed(folder: Path) -> int | None:
    """Return the seed with which a folder's recipe was begun; None if there is no recipe, or it has no seed.

    Raises:
        GraftError: GC058 if the file is damaged.
    """
    if not os.path.lexists(folder / RECIPE):
        return None
    seed = _read(folder / RECIPE).get("seed")
    return seed if isinstance(seed, int) else None


def make_folder(folder: Path) -> Path:
    """Create a folder and any missing parent folders, and return it.

    Raises:
        GraftError: GC064 if it cannot be created.
    """
    check_path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise GraftError("GC064", f"{folder} cannot be created: it is a file", hint="choose another path") from error
    except OSError as error:
        raise cannot_write(folder, error) from error
    return folder


def _read(path: Path) -> dict[str, Any]:
    """Return the identity stored in a recipe's file.

    Raises:
        GraftError: GC058 if the file is damaged.
    """
    try:
        data = read_json(read_regular(path), JSON_BYTES)
    except (OSError, ValueError):
        data = None
    if not isinstance(data, dict):
        raise GraftError("GC058", f"{path} is damaged: it does not identify a recipe", hint="use another folder")
    return data
