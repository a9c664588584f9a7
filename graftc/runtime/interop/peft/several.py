"""Import several peft folders into one model, or one more folder into a compiled model.

Each folder is first imported on its own, with all the checks of an import; its tensors then move to an adaptation with
the folder's name.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from graftc.compiler.capture.interface import Flags
from graftc.compiler.capture.signature import Axis
from graftc.compiler.compilation import Compilation
from graftc.compiler.inspect.snapshot import adapter_values
from graftc.compiler.pipeline import recompile
from graftc.compiler.roles.structure import Structure
from graftc.passes.core.weights.names import owner_of, renamed
from graftc.runtime.interop.peft.importing import imported
from graftc.specs.base import check_name
from graftc.specs.document import Spec
from graftc.specs.errors.arguments import as_path
from graftc.specs.errors.diagnostics import GraftError, GraftWarning, Place
from graftc.specs.errors.text import quoted
from graftc.specs.foreign.config import CONFIG


def names_of(folders: Sequence[str | Path] | Mapping[str, str | Path]) -> dict[str, Path]:
    """Return the folders by their adaptations' names: the given names, or otherwise the folders' own.

    Raises:
        GraftError: GC005 for two folders with one name, GC002 for an invalid name, GC073 if there is no folder.
    """
    if not folders:
        raise GraftError("GC073", "there is no folder to import", hint="pass one or several")
    paths: dict[str, Path] = {}
    pairs = folders.items() if isinstance(folders, Mapping) else [(None, folder) for folder in folders]
    for name, folder in pairs:
        path = as_path(folder)
        label = str(name) if name is not None else _plain(Path(os.path.realpath(path)).name)
        if (wrong := check_name(label)) is not None:
            raise wrong
        if label in paths:
            hint = "pass the folders by name: {'one': ..., 'other': ...}"
            raise GraftError("GC005", f"{paths[label]} and {path} would both be named {quoted(label)}", hint=hint)
        paths[label] = path
    return paths


def _plain(text: str) -> str:
    word = re.sub(r"\W", "_", text, flags=re.ASCII).strip("_")
    return f"_{word}" if not word or word[0].isdigit() else word


def imported_together(
    folders: Mapping[str, Path],
    model: nn.Module,
    axes: Sequence[Axis] | None,
    flags: Flags,
    *,
    cache: bool,
    structure: Callable[[], Structure],
) -> Compilation:
    """Compile a model with several folders' adapters, for `graftc.import_peft`."""
    alone: Compilation | None = None
    adapt: list[dict[str, Any]] = []
    values: dict[str, Tensor] = {}
    base: dict[str, Any] = {}
    for name, folder in folders.items():
        compilation = imported(folder, model, axes, flags, name=None, cache=cache, structure=structure)
        entries, tensors = _renamed(compilation, name)
        _require_same_layers(folder, compilation)
        more = {
            field: getattr(compilation.spec, field) for field in ("train", "untie") if getattr(compilation.spec, field)
        }
        if more and base:
            raise _trains_base(folder, "so does another one")
        base, alone = (more, compilation) if more or alone is None else (base, alone)
        adapt += entries
        values |= tensors
    assert alone is not None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GraftWarning)  # each compilation has already issued them
        return recompile(alone, Spec.model_validate({"version": 1, "adapt": adapt, **base}), values)


def entry_of(
    folder: Path,
    name: str,
    model: nn.Module,
    axes: Sequence[Axis] | None,
    flags: Flags,
    structure: Callable[[], Structure],
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return a folder's contribution to a compiled model: a spec entry, and its tensors by their names in the model.

    Raises:
        GraftError: as for `graftc.import_peft`; GC112 for a folder that trains base modules in full, or table rows
            along with its method.
    """
    compilation = imported(folder, model, axes, flags, name=None, cache=True, structure=structure)
    spec = compilation.spec
    _require_same_layers(folder, compilation)
    if spec.train or spec.untie:
        raise _trains_base(folder, "the model is already compiled")
    entries, values = _renamed(compilation, name)
    if len(entries) > 1:
        hint = "import it with the others: graftc.import_peft([folder, folder], model)"
        place = Place(str(folder / CONFIG), path="trainable_token_indices")
        raise GraftError("GC112", "the adapter trains table rows beside its method", place=place, hint=hint)
    return entries[0], values


def _trains_base(folder: Path, why: str) -> GraftError:
    what = f"the adapter trains modules of the base in full, and {why}"
    hint = "import it first, with the others: graftc.import_peft([folder, folder], model)"
    return GraftError("GC112", what, place=Place(str(folder / CONFIG), path="modules_to_save"), hint=hint)


def _require_same_layers(folder: Path, compilation: Compilation) -> None:
    """Raise GC112 for an adapter of a deeper model, beside which no other adapter fits."""
    if compilation.spec.layer_replication:
        place = Place(str(folder / CONFIG), path="layer_replication")
        message = "the adapter is for a model with more layers, so it cannot be combined with others"
        raise GraftError("GC112", message, place=place, hint="import it alone")


def _renamed(compilation: Compilation, name: str) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """Return a compilation's spec entries and their tensors, renamed.

    Entries after the first, which train table rows, get the name with a number appended.
    """
    adapt = compilation.spec.adapt
    names = {str(own.name): name if not number else f"{name}_{number}" for number, own in enumerate(adapt)}
    entries = [
        {**own.model_dump(mode="json", exclude_unset=True), "method": own.method, "name": names[str(own.name)]}
        for own in adapt
    ]
    values = {}
    for fqn, tensor in adapter_values(compilation.store):
        owner = owner_of(fqn)
        values[renamed(fqn, names[owner]) if owner in names else fqn] = tensor
    return entries, values
