"""Load models from a transformers folder, a hub id, or a callable that returns a module.

A user's argument may be any of these (`load_model`). A name in a file is data: `load_folder` and `load_hub` accept only
a folder or an id, and never import or call anything that it names.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from graftc.compat.transformers import commit_of, path_of, set_commit
from graftc.compiler.capture.identity.fingerprint import settings_of
from graftc.compiler.capture.interface import ExampleInputs
from graftc.compiler.missing_weights import mark_fresh
from graftc.compiler.quantised_sources.convert import arrived
from graftc.compiler.quiet import quiet_quantisers
from graftc.runtime.sources.callables import from_callable
from graftc.runtime.sources.folder_checks import (
    WEIGHTS,
    ModelFolder,
    bounded_building,
    check_stored_types,
    open_model_folder,
)
from graftc.runtime.sources.folder_kinds import missing, reader_of
from graftc.runtime.sources.quantised.load import FORMATS, load_quantised, quantization_of, require_read
from graftc.runtime.sources.reference import Built, is_callable, is_hub_id
from graftc.runtime.sources.refusals import reason_of, refuse
from graftc.specs.errors.border import library_errors
from graftc.specs.errors.diagnostics import GraftError, nearest, nearest_beside
from graftc.specs.regular_files import read_regular

_FORMS = "MODEL is a transformers folder, a hub id, or package.module:callable"


def local_folder(model: nn.Module) -> Path | None:
    """Return the folder, possibly in the hub's cache, from which transformers loaded a model; None for other models."""
    name = path_of(getattr(model, "config", None))
    if not name:
        return None
    return Path(name) if Path(name).is_dir() else _cached_config(name, commit_of(model.config))


def local_config(name: str) -> Path | None:
    """Return the folder on this machine that holds the config of a folder or hub id; None if there is none."""
    return Path(name) if (Path(name) / "config.json").is_file() else _cached_config(name)


def _cached_config(name: str, revision: str | None = None) -> Path | None:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(name, "config.json", revision=revision)
    except HFValidationError:
        return None
    return Path(cached).parent if isinstance(cached, str) else None


def load_model(text: str, *, meta: bool = False, revision: str | None = None, built: Built | None = None) -> nn.Module:
    """Load the model that a MODEL argument names, in eval mode but otherwise as its source provides it.

    Args:
        text: a folder whose ``config.json`` names the class in ``architectures``; the id of such a repository on the
            hub (without a network, only cached files are used); or ``package.module:callable``, called without
            arguments, which may be imported from the current folder.
        meta: whether to build it on the meta device. A folder then needs no weights, and a hub id only its config.
        revision: commit of a hub repository; the newest by default.
        built: the class, labels, dtype and settings to build it with; by default those of the folder or repository.

    Raises:
        GraftError: GC032 with the reason, and the nearest alternative if there is one.
    """
    return load_model_and_inputs(text, meta=meta, revision=revision, built=built)[0]


def load_as_built(text: str, built: Built) -> nn.Module:
    """Load the model that a MODEL argument names, built like an earlier model or, if that fails, as its files define.

    Raises:
        GraftError: as in `load_model`.
    """
    try:
        return load_model(text, built=built)
    except GraftError as error:
        if error.code != "GC032":
            raise
        return load_model(text)


def load_model_and_inputs(
    text: str, *, meta: bool = False, revision: str | None = None, built: Built | None = None
) -> tuple[nn.Module, ExampleInputs | None]:
    """Load a model as `load_model` does, with example inputs if a callable returns ``(model, example_inputs)``.

    The example inputs are tensors by name or in order, or one tensor, for models whose interface does not determine
    their inputs.

    Raises:
        GraftError: as in `load_model`.
    """
    inputs: ExampleInputs | None = None
    folder = Path(text).expanduser()
    if is_callable(text):
        model, inputs = from_callable(text, meta)
    elif folder.is_dir():
        model = load_folder(folder, meta=meta, built=built)
    elif folder.is_file():
        hint = reader_of(folder) or f"did you mean {str(folder.parent)!r}?"
        refuse(f"{text!r} is a file, not a transformers folder", hint)
    elif not is_hub_id(text):
        refuse(f"there is no folder {text!r}", _neighbour(folder) or _FORMS)
    else:
        model = load_hub(text, meta=meta, revision=revision, built=built)
    return model.eval(), inputs


# --- transformers folders and hub ids ---------------------------------------------------------------------------


def load_folder(
    folder: Path, *, meta: bool = False, built: Built | None = None, dtype: torch.dtype | None = None
) -> nn.Module:
    """Load the model in a transformers folder, in eval mode. No code in the folder is run.

    Args:
        folder: the folder.
        meta: whether to build it on the meta device.
        built: the class, labels, dtype and settings to build it with; by default those of its config.
        dtype: the dtype of its tensors, instead of the one in ``built``.

    Raises:
        GraftError: GC032; GC161 and GC163 for quantised folders that cannot be read.
    """
    _check_folder(folder, meta)
    with quiet_transformers():
        return _from_transformers(str(folder), folder, meta, built, dtype)


def load_hub(
    name: str,
    *,
    meta: bool = False,
    revision: str | None = None,
    built: Built | None = None,
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """Load the model in a hub repository, in eval mode, even if a local folder has its name. None of its code is run.

    See `load_folder`.

    Raises:
        GraftError: GC032.
    """
    with quiet_transformers():
        try:
            folder = _snapshot(name, meta, revision)
        except Exception as error:
            hint = _neighbour(Path(name)) or _cached(name) or _FORMS
            refuse(
                f"{name!r} is not a folder here, and the hub has no such model: {reason_of(error)}", hint, cause=error
            )
        model = _from_transformers(name, folder, meta, built, dtype)
    config: Any = model.config
    config.name_or_path = name
    set_commit(config, folder.name)
    return model


def _snapshot(name: str, meta: bool, revision: str | None) -> Path:
    """Return a repository's folder in the hub's cache; transformers would prefer a local folder with the same name."""
    from huggingface_hub import list_repo_files, snapshot_download
    from huggingface_hub.constants import HF_HUB_OFFLINE

    cached = _cached_config(name, revision)
    if cached is not None and HF_HUB_OFFLINE:
        return cached
    try:
        files = ["config.json"] if meta else list_repo_files(name, revision=revision)
        safe = any("/" not in file and file.endswith(".safetensors") for file in files)
        wanted = files if meta else ["*.json", "*.safetensors" if safe else "*.bin"]
        downloaded = snapshot_download(name, revision=revision, allow_patterns=wanted, ignore_patterns=["*/*"])
    except OSError:  # no network, or no such repository
        if cached is None:
            raise
        return cached
    return Path(downloaded)


def _from_transformers(
    text: str, folder: Path, meta: bool, built: Built | None = None, wanted: torch.dtype | None = None
) -> nn.Module:
    looked_at = open_model_folder(folder, text, weights=not meta)
    config = _config(text, folder)
    cls = _architecture(text, config)
    options: dict[str, Any] = {}
    if built is not None:
        cls = _built_as(built.architecture, cls, config)
        _set(config, built.settings)
        if built.labels is not None and isinstance(getattr(config, "id2label", None), dict):
            config.id2label = dict(enumerate(built.labels))
            config.label2id = {label: number for number, label in enumerate(built.labels)}
        dtype = getattr(torch, built.dtype, None)
        options = {"dtype": dtype} if isinstance(dtype, torch.dtype) and dtype.is_floating_point else {}
    if wanted is not None:
        options = {"dtype": wanted}
    with library_errors("GC032", f"{cls.__name__} cannot be loaded from {text!r}"):
        if not meta:
            require_read(config, text)
            return from_checkpoint(cls, folder, text, looked_at=looked_at, config=config, **options)
        with torch.device("meta"), bounded_building(looked_at, text):
            model: nn.Module = cls._from_config(config, **_dtype(config))
        return model.to("meta").eval()


def from_checkpoint(
    cls: Any, folder: Path, where: str, *, looked_at: ModelFolder | None = None, **options: Any
) -> nn.Module:
    """Load a model of a transformers class, or of an auto class, with a folder's weights, in eval mode.

    Tensors that the folder lacks are drawn with a fixed seed and recorded: see `graftc.compiler.missing_weights` for
    how they may be used.

    Args:
        cls: the class.
        folder: a transformers folder.
        where: its name in errors.
        looked_at: the result of `open_model_folder`, which is called by default.
        options: options of ``from_pretrained``.

    Raises:
        GraftError: GC032 and GC101 as in `open_model_folder`, and GC032 if the files have dtypes that are not for
            weights; GC161 and GC163 for quantised folders.
    """
    own = looked_at or open_model_folder(folder, where)
    with torch.random.fork_rng(devices=()), bounded_building(own, where):
        torch.manual_seed(0)
        quantization = quantization_of(options["config"]) if "config" in options else None
        if quantization is not None and quantization.get("quant_method") in FORMATS:
            model, loading_info = load_quantised(cls, own, where, quantization, **options)
        else:
            model, loading_info = cls.from_pretrained(
                folder, trust_remote_code=False, output_loading_info=True, **options
            )
            if own.stored is not None:
                check_stored_types(model, own.stored, "GC032", where)
    mismatched = [key[0] if isinstance(key, tuple) else key for key in loading_info["mismatched_keys"]]
    mark_fresh(model, {*loading_info["missing_keys"], *mismatched}, where)
    return arrived(model)


def _check_folder(folder: Path, meta: bool) -> None:
    if not (folder / "config.json").is_file():
        adapter = folder / "adapter_config.json"
        if adapter.is_file():
            refuse(f"{str(folder)!r} contains a PEFT adapter, not a model", _base_of(adapter))
        inner = sorted(p.parent.name for p in folder.glob("*/config.json"))
        hint = f"did you mean {str(folder / inner[0])!r}?" if inner else reader_of(folder) or _FORMS
        refuse(f"{str(folder)!r} {missing(folder, 'config.json')}", hint)
    if not meta and not any(next(folder.glob(pattern), None) for pattern in WEIGHTS):
        refuse(f"{str(folder)!r} has a config.json but no weights", "add --meta to work without weights")


def _base_of(adapter: Path) -> str | None:
    try:
        base = json.loads(read_regular(adapter)).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError, RecursionError):
        return None
    return f"use its base model: {base}" if base else None


def config_of_folder(folder: Path, where: str) -> Any:
    """Return a folder's config as transformers reads it, after checking it.

    Args:
        folder: a folder with a ``config.json``.
        where: its name in errors.

    Raises:
        GraftError: GC032 if it cannot be read or is not a model's config.
    """
    open_model_folder(folder, where, weights=False)
    return _config(where, folder)


def _config(text: str, folder: Path) -> Any:
    from transformers import AutoConfig

    with library_errors("GC032", f"the config.json of {text!r} cannot be read"):
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)


def _architecture(text: str, config: Any) -> Any:
    import transformers

    names = getattr(config, "architectures", None)
    if not names:
        message = f"the config of {text!r} does not name its class"
        refuse(message, 'add "architectures" to config.json, with the class, such as ["BertModel"]')
    cls = getattr(transformers, names[0], None)
    if not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)):
        shared = os.path.commonprefix
        known = [n for n in dir(transformers) if n[:1].isupper() and len(shared([n, names[0]])) > 2]
        close = nearest(names[0], known, n=1)
        own = "to load your own class, use package.module:callable"
        refuse(f"transformers has no model {names[0]!r}", f"did you mean {close[0]!r}?" if close else own)
    return cls


def _built_as(name: str, cls: Any, config: Any) -> Any:
    """Return the transformers class that a file names if it has the same config class; otherwise ``cls``."""
    import transformers

    named = getattr(transformers, name, None) if name.isidentifier() else None
    fits = isinstance(named, type) and issubclass(named, transformers.PreTrainedModel)
    return named if fits and getattr(named, "config_class", None) is type(config) else cls


def _set(config: Any, settings: Mapping[str, Any]) -> None:
    """Set the config values that a file gives, if they are numbers or truth values that the config also has.

    Integers larger than the config's, which could make the model larger, are ignored, and so are strings, which may
    name code.
    """
    for name, value in settings_of(config).items():
        wanted = settings.get(name)
        grows = type(value) is int and type(wanted) is int and wanted > value
        if type(wanted) is type(value) and not isinstance(value, str) and wanted != value and not grows:
            setattr(config, name, wanted)


def _dtype(config: Any) -> dict[str, Any]:
    """Return, as an option, the dtype that loading the weights would produce."""
    dtype = getattr(config, "dtype", None)
    return {} if dtype is None else {"dtype": dtype}


def _neighbour(path: Path) -> str | None:
    """Return a hint that suggests the folder with the nearest name to a missing path; None if none is near."""
    near = nearest_beside(path, lambda other: (other / "config.json").is_file())
    return f"did you mean {str(near)!r}?" if near is not None else None


def _cached(text: str) -> str | None:
    """Return a hint that suggests the model with the nearest name in the hub's cache; None if none is near."""
    from huggingface_hub.constants import HF_HUB_CACHE

    try:
        folders = [p.name.removeprefix("models--") for p in Path(HF_HUB_CACHE).glob("models--*")]
    except OSError:
        return None
    close = nearest(text, [name.replace("--", "/", 1) for name in folders], n=1)
    return f"did you mean {close[0]!r}, which is in the cache?" if close else None


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Suppress transformers' progress bars and warnings, such as those about missing weights, while the block runs.

    The output of quantisation libraries, which transformers imports on its own, is suppressed as well.
    """
    from transformers.utils import logging as untyped

    logging: Any = untyped
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with quiet_quantisers():
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
