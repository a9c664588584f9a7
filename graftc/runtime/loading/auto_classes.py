"""Folders that transformers' ``Auto`` classes load: what ``save_pretrained`` of a compiled model writes.

Such a folder has a ``config.json`` whose model type is ``graftc``, and the artifact beside it. Importing this module,
or `graftc.auto`, lets ``AutoConfig`` and the ``AutoModel`` classes load it, as peft's integration does for adapters.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto import modeling_auto
from transformers.models.auto.auto_factory import _BaseAutoModelClass

from graftc.compiler.capture.interface import config_of
from graftc.runtime.artifact.places import is_ours
from graftc.runtime.artifact.write import require_values, save
from graftc.runtime.destinations import overlap
from graftc.runtime.files import check_destination
from graftc.runtime.loading.load import load
from graftc.runtime.models import local_folder
from graftc.specs.errors.arguments import as_path
from graftc.specs.errors.diagnostics import GraftError

if TYPE_CHECKING:
    from graftc.runtime.compiled import Compiled

FOLDER = "graftc"
"""Where the artifact is within a folder that ``save_pretrained`` wrote."""

_IGNORED = frozenset(
    {
        *("cache_dir", "force_download", "local_files_only", "proxies", "revision", "token", "trust_remote_code"),
        *("use_safetensors", "weights_only", "code_revision", "_commit_hash", "_from_auto", "adapter_kwargs"),
    }
)
"""Options of ``from_pretrained`` that say where files come from, which do not concern a folder."""


_AS_ALWAYS: Mapping[str, tuple[Any, ...]] = {
    "is_main_process": (True, False),
    "safe_serialization": (True,),
    "save_original_format": (True, False),
    "save_peft_format": (True, False),
}
"""Values that options of ``save_pretrained`` may have; others are to be false or None."""


class AdaptedConfig(PreTrainedConfig):  # type: ignore[no-untyped-call]
    """The config of a folder with a compiled model.

    Attributes:
        source: the config of the source model, as ``to_dict`` gives it.
    """

    model_type = "graftc"

    def __init__(self, source: dict[str, Any] | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.source = source or {}


def save_pretrained(compiled: Any, folder: str | os.PathLike[str], options: Mapping[str, Any]) -> None:
    """Write a compiled model into a folder that may hold files of another library, as a tokenizer.

    Args:
        compiled: what to write; its base's weights are not written.
        folder: made where it is missing; ``config.json`` and the folder ``graftc`` in it are replaced.
        options: of transformers' method.

    Raises:
        GraftError: as `Compiled.save`; GC032 for a model without a config of transformers, GC063 for the base's own
            folder, whose config would be lost, GC072 for options that ask for another form.
    """
    for name, value in options.items():
        if value not in _AS_ALWAYS.get(name, (None, False)):
            hint = "compiled.merge().save(path) writes a plain transformers folder"
            raise GraftError("GC072", f"save_pretrained of a compiled model has no {name}={value!r}", hint=hint)
    if options.get("is_main_process") is False:
        return
    source = compiled._compilation.model
    config = config_of(source)
    if not isinstance(config, PreTrainedConfig):
        hint = "compiled.save(path) keeps it without one"
        raise GraftError("GC032", f"{type(source).__name__} has no config of transformers", hint=hint)
    require_values(compiled)
    place = as_path(folder)
    base = local_folder(compiled._compilation.source)
    if base is not None and os.path.realpath(base) == os.path.realpath(place):
        raise overlap(place, base)
    check_destination(place / FOLDER, force=True, replaceable=is_ours)
    place.mkdir(parents=True, exist_ok=True)
    save(compiled, place / FOLDER, force=True, base=None, certificate=None, kept={}, full=False)
    AdaptedConfig(source=config.to_dict(), architectures=[type(source).__name__]).save_pretrained(place)


def _changed(config: PreTrainedConfig, saved: PreTrainedConfig) -> set[str]:
    """Fields of a config that are not as they were saved, as ``num_labels`` that was given to an ``Auto`` class."""
    given, kept = ({**one.to_dict(), "num_labels": one.num_labels} for one in (config, saved))
    changed = {name for name in given.keys() | kept.keys() if given.get(name) != kept.get(name)}
    return {name for name in changed if not name.startswith("_")}


class _Loader:
    """What an ``Auto`` class takes for the class of the model in such a folder."""

    config_class = AdaptedConfig
    auto: type[_BaseAutoModelClass]

    @classmethod
    def from_pretrained(
        cls, folder: str | os.PathLike[str], *, config: Any = None, subfolder: str = "", **options: Any
    ) -> Compiled:
        """The compiled model in a folder.

        Raises:
            GraftError: as `graftc.load`; GC072 for options that a compiled model does not have, and where the class of
                the source model is not one of this ``Auto`` class.
        """
        place = Path(folder) / subfolder
        wanted = {name for name, value in options.items() if value is not None and name not in _IGNORED}
        wanted -= {name for name in ("dtype", "torch_dtype") if options.get(name) == "auto"}
        if isinstance(config, AdaptedConfig):
            wanted |= _changed(config, AdaptedConfig.from_pretrained(place))
        if wanted:
            message = f"{cls.auto.__name__} loads a compiled model as it was saved, without {sorted(wanted)[0]}"
            raise GraftError("GC072", message, hint="load the base with it, and give it: graftc.load(path, model=base)")
        compiled = load(place / FOLDER)
        source = type(compiled._compilation.model)
        mapping: Any = cls.auto._model_mapping
        found = mapping.get(type(config_of(compiled._compilation.model)), None)
        if source not in (found if isinstance(found, tuple | list) else (found,)):
            message = f"{place} has a {source.__name__}, which {cls.auto.__name__} does not load"
            raise GraftError("GC072", message, hint=f"graftc.load({str(place / FOLDER)!r}) loads it")
        return compiled


def _auto_classes() -> Iterator[type[_BaseAutoModelClass]]:
    for found in vars(modeling_auto).values():
        if (
            isinstance(found, type)
            and issubclass(found, _BaseAutoModelClass)
            and getattr(found, "_model_mapping", None)
        ):
            yield found


def register() -> None:
    """Let the ``Auto`` classes load such folders; again, it does nothing."""
    AutoConfig.register(AdaptedConfig.model_type, AdaptedConfig, exist_ok=True)
    for auto in set(_auto_classes()):
        loader = type(f"Adapted{auto.__name__}", (_Loader,), {"auto": auto})
        auto.register(AdaptedConfig, loader, exist_ok=True)


register()
