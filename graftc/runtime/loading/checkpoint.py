"""Load a trainer's checkpoint of a compiled model as a compiled model.

Trainers write the result of `Compiled.state_dict`. The record in it contains everything else, except for the optimiser,
the schedule and the random state, which belong to the trainer.
"""

from __future__ import annotations

import os
from pathlib import Path

from torch import Tensor, nn

from graftc.compiler.capture.identity.fingerprint import Identity, identify
from graftc.compiler.capture.interface import device_of
from graftc.compiler.pipeline import StartingPoint, compile_model
from graftc.compiler.quantised_sources.recorded_packing import packed_as
from graftc.files.tensors.folder import Refusal, TensorFolder
from graftc.passes.core.packing.packing import weight_name
from graftc.passes.core.weights.store import Store
from graftc.runtime.artifact.checkpoint_record import RECORD, StateRecord, from_tensor, weights_of
from graftc.runtime.artifact.manifest import MANIFEST
from graftc.runtime.compiled import Compiled, make_compiled
from graftc.runtime.loading.base import find_base
from graftc.runtime.sources.folder_kinds import is_state_dict, reader_of
from graftc.runtime.sources.models import load_as_built
from graftc.specs.errors.diagnostics import GraftError
from graftc.specs.io import parse_spec

WEIGHTS = "model.safetensors"


def checkpoint_file(path: str | os.PathLike[str]) -> Path | None:
    """Return a checkpoint's tensor file; None for an artifact, or if there is no such file."""
    place = Path(path)
    if os.path.isdir(place) and not os.path.exists(place / MANIFEST):
        place = place / WEIGHTS
    return place if os.path.isfile(place) and place.suffix == Path(WEIGHTS).suffix else None


def is_checkpoint(path: Path) -> bool:
    """Return whether a folder contains a trainer's checkpoint of a compiled model, not a transformers model."""
    file = checkpoint_file(path)
    return file is not None and is_state_dict(file)


def load_checkpoint(file: Path, model: nn.Module | str | None = None, *, cache: bool = True) -> Compiled:
    """Compile a checkpoint's spec again, with the checkpoint's tensors.

    Args:
        file: the checkpoint's tensor file.
        model: the base, or a MODEL argument that names it; by default the base that the checkpoint names.
        cache: whether to look up and keep captured graphs in the user's cache folder.

    Raises:
        GraftError: GC080 if the file contains no compiled model, GC081 or GC082 if it cannot be read, GC084 for tensors
            that have no place in the spec, GC086 if the base does not exist, GC087 if it is a different model.
    """
    state = _read(file)
    record = from_tensor(state[RECORD], str(file))
    base = find_base(record.base.place, file.parent) if model is None else model
    base = load_as_built(base, record.base.built) if isinstance(base, str) else base
    packed = packed_as(base, record.base.packed)
    _check_base(file, record, packed)
    if not any(weight_name(name) in record.base.packed for name in record.base.replaced):
        base = packed  # otherwise, an adaptation chose codes, which follow from the original weights
    try:
        compilation = compile_model(
            parse_spec(record.spec, file=str(file)),
            base,
            record.axes,
            flags=record.flags,
            start=StartingPoint(
                record.seed, cache, {name: tensor for name, tensor in state.items() if Store.is_adapter(name)}
            ),
        )
        if compilation.chosen_codes and compilation.identity().fingerprint != record.base.fingerprint:
            raise _foreign(file, "its spec packs another base")
        compiled = make_compiled(compilation)
        compiled.load_state_dict(state)
    except RuntimeError as error:
        raise _foreign(file, str(error).splitlines()[-1].strip()) from error
    except GraftError as error:
        if error.code != "GC053":
            raise
        raise _foreign(file, error.message) from error
    return compiled


def _foreign(file: Path, reason: str) -> GraftError:
    return GraftError(
        "GC084", f"{file} has changed since it was written: {reason}", hint="copy it again from its source"
    )


def _read(file: Path) -> dict[str, Tensor]:
    opened = TensorFolder(file, Refusal("GC082", hint="copy it again from its source"))
    if RECORD not in opened:
        message = f"{file} contains weights, but not a compiled model's state dict"
        hint = (
            reader_of(file.parent if file.name == WEIGHTS else file)
            or "compiled.save(path) and trainers write compiled models"
        )
        raise GraftError("GC080", message, hint=hint)
    return dict(opened)


def _check_base(file: Path, record: StateRecord, model: nn.Module) -> None:
    if device_of(model).type == "meta":
        raise GraftError("GC087", "the base is on the meta device, so its weights cannot be compared")
    identity = identify(model, replaced=record.base.replaced)
    if record.base.fingerprint != identity.fingerprint:
        same = record.base.weights in (None, weights_of(identity))
        message = f"{file} adapts a {record.base.model} other than this {type(model).__name__}: "
        mine = Identity("", {}, settings=record.base.settings)
        message += mine.other_config(identity) if same else "its weights differ"
        raise GraftError("GC087", message, hint="name the base: graftc.load(path, model=...)")
