"""Loading a trainer's checkpoint of a compiled model as a compiled model.

Trainers write what `Compiled.state_dict` returns. The record in it contains everything else; optimiser, schedule and
random state belong to the trainer.
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
    """Return the file of tensors in a checkpoint; None for an artifact, or if there is none."""
    place = Path(path)
    if os.path.isdir(place) and not os.path.exists(place / MANIFEST):
        place = place / WEIGHTS
    return place if os.path.isfile(place) and place.suffix == Path(WEIGHTS).suffix else None


def is_checkpoint(path: Path) -> bool:
    """Return whether a folder contains a trainer's checkpoint of a compiled model, and not a model of transformers."""
    file = checkpoint_file(path)
    return file is not None and is_state_dict(file)


def load_checkpoint(file: Path, model: nn.Module | str | None = None, *, cache: bool = True) -> Compiled:
    """Compile the spec of a checkpoint again, with the checkpoint's tensors.

    Args:
        file: the checkpoint's file of tensors.
        model: its base, or a MODEL argument that names it; by default the base that the checkpoint names.
        cache: whether to look up and keep captured graphs in the user's cache folder.

    Raises:
        GraftError: GC080 if the file is not of a compiled model, GC081 or GC082 if it cannot be read, GC084 for tensors
            that the spec has no place for, GC086 if the base is not there, GC087 if it is another one.
    """
    state = _read(file)
    record = from_tensor(state[RECORD], str(file))
    base = find_base(record.base.place, file.parent) if model is None else model
    base = load_as_built(base, record.base.built) if isinstance(base, str) else base
    base = packed_as(base, record.base.packed)
    _check_base(file, record, base)
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
    return GraftError("GC084", f"{file} is not as it was written: {reason}", hint="copy it again from where it came")


def _read(file: Path) -> dict[str, Tensor]:
    opened = TensorFolder(file, Refusal("GC082", hint="copy it again from where it came"))
    if RECORD not in opened:
        message = f"{file} holds weights, and not what a compiled model's state dict has"
        hint = (
            reader_of(file.parent if file.name == WEIGHTS else file)
            or "a compiled model is written by compiled.save(path) or a trainer"
        )
        raise GraftError("GC080", message, hint=hint)
    return dict(opened)


def _check_base(file: Path, record: StateRecord, model: nn.Module) -> None:
    if device_of(model).type == "meta":
        raise GraftError("GC087", "the base is on the meta device, so that its weights cannot be told")
    identity = identify(model, replaced=record.base.replaced)
    if record.base.fingerprint != identity.fingerprint:
        same = record.base.weights in (None, weights_of(identity))
        message = f"{file} adapts another model, a {record.base.model}, than this {type(model).__name__}: "
        mine = Identity("", {}, settings=record.base.settings)
        message += mine.other_config(identity) if same else "its weights differ"
        raise GraftError("GC087", message, hint="name the base: graftc.load(path, model=...)")
