"""Write a merged model as a folder that transformers loads, with the fold's certificate in a separate file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from graftc.compat.transformers import attention_of
from graftc.compiler.capture.interface import config_of
from graftc.compiler.missing_weights import require_weights
from graftc.files.tensors.writing import save_tensors, writing
from graftc.files.writing import staged
from graftc.passes.core.weights.source_lock import source_lock
from graftc.records.certificate import Certificate
from graftc.runtime.artifact.places import is_ours
from graftc.runtime.artifact.records import write_merged_record
from graftc.runtime.artifact.write import listed
from graftc.runtime.deploy.folded_runner import FoldedRunner
from graftc.runtime.interop.rebuilt import require_same_outputs
from graftc.runtime.interop.transformers import no_place, rebuild, require_plain
from graftc.runtime.model.runner import ModelRoot, runner_of
from graftc.runtime.sources.companions import companions_of_model
from graftc.runtime.sources.models import from_checkpoint, local_folder, quiet_transformers
from graftc.specs.errors.diagnostics import GraftError
from graftc.specs.io import dump_spec


def save_merged(merged: FoldedRunner, path: Path, *, force: bool = False) -> Path:
    """Write a merged model; see `Merged.save`."""
    if merged.kept:
        name, reason = next(iter(merged.kept.items()))
        raise GraftError("GC050", f"{name!r} is still in the graph: {reason}", hint="merge it, or save an artifact")
    origin = local_folder(merged.compilation.source)
    with staged(path, force=force, replaceable=is_ours, sources=[origin]) as folder:
        write_recorded(merged, merged.certificate, folder)
    return path


def write_recorded(merged: ModelRoot | FoldedRunner, certificate: Certificate, folder: Path) -> None:
    """Write the model itself and the record of its origin, with the certificate of the fold.

    Raises:
        GraftError: as in `write_merged`.
    """
    write_merged(merged, folder)
    write_merged_record(folder, dump_spec(runner_of(merged).compilation.spec), certificate, dict(listed(folder)))


def write_merged(merged: ModelRoot | FoldedRunner, folder: Path) -> Any:
    """Write the model itself, with a tokenizer if the base has one, and return it.

    For a model without a config, the folded weights go into ``model.safetensors``, by the source's own names.

    Raises:
        GraftError: GC052 if the class cannot hold a folded tensor, or the written model computes something else.
        OSError: if it cannot be written.
    """
    runner: FoldedRunner = runner_of(merged)
    require_plain(runner.store)
    folder.mkdir()
    source = runner.compilation.source
    weights = folder / "model.safetensors"
    if config_of(source) is None:
        if runner.additions:
            raise no_place(runner.additions, source)
        aliases = runner.compilation.store.aliases
        with source_lock():
            known = {*source.state_dict(), *runner.compilation.store.packed}
        own = {n: t for n, t in runner.folded_state_dict().items() if n not in aliases and n in known}
        save_tensors(own, weights)
        return source
    with quiet_transformers(), writing(weights):
        # The model is released before the folder is loaded again, so that there is one copy at a time.
        rebuild(runner).save_pretrained(folder)
        _repeat_rotation(folder / "config.json")
    model = _loaded_again(runner, folder)
    for file in companions_of_model(source):
        if not (folder / file.name).exists():
            shutil.copyfile(file, folder / file.name)
    return model


def _loaded_again(merged: FoldedRunner, folder: Path) -> Any:
    """Load the model that was written, and return it if it computes what the merged model does.

    Raises:
        GraftError: GC052.
    """
    source: Any = merged.compilation.source
    named = f"the {type(source).__name__} that transformers loads from the merged folder"
    try:
        with quiet_transformers():
            model: Any = from_checkpoint(type(source), folder, "the merged folder", dtype=merged.dtype)
        require_weights(model)
    except GraftError as error:
        message = f"transformers cannot load the merged folder: {error.message}"
        raise GraftError("GC052", message, hint=error.hint, details=error.details) from error
    if attention_of(model.config) != attention_of(source.config):
        model.set_attn_implementation(attention_of(source.config))
    require_same_outputs(merged, model, named)
    return model


def _repeat_rotation(file: Path) -> None:
    """Also write the rotation's base under transformers 4's key, since some engines read only that key."""
    config = json.loads(file.read_text(encoding="utf-8"))
    rotation = config.get("rope_parameters")
    theta = rotation.get("rope_theta") if isinstance(rotation, dict) else None
    if isinstance(theta, int | float) and "rope_theta" not in config:
        text = json.dumps({**config, "rope_theta": theta}, indent=2, sort_keys=True) + "\n"
        file.write_text(text, encoding="utf-8")
