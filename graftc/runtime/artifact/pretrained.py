"""Write a compiled model as ``save_pretrained`` does: a folder with a transformers config and the artifact."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import cache
from typing import Any

from graftc.compiler.capture.interface import config_of
from graftc.files.destinations import overlap
from graftc.files.writing import check_destination
from graftc.runtime.artifact.places import is_ours
from graftc.runtime.artifact.write import require_values, save
from graftc.runtime.artifact.written import FOLLOWERS
from graftc.runtime.model.adapted import AdaptedRunner
from graftc.runtime.sources.models import local_folder
from graftc.specs.errors.arguments import as_path
from graftc.specs.errors.diagnostics import GraftError

FOLDER = "graftc"
"""The artifact's folder within a folder that ``save_pretrained`` wrote."""

_AS_ALWAYS: Mapping[str, tuple[Any, ...]] = {
    "is_main_process": (True, False),
    "safe_serialization": (True,),
    "save_original_format": (True, False),
    "save_peft_format": (True, False),
}
"""The accepted values for options of ``save_pretrained``; all other options must be false or None."""


@cache
def adapted_config() -> Any:
    """Return the config class for a folder with a compiled model."""
    from transformers import PreTrainedConfig

    class AdaptedConfig(PreTrainedConfig):  # type: ignore[no-untyped-call]
        """The config of a folder with a compiled model.

        Attributes:
            source: the source model's config, as returned by ``to_dict``.
        """

        model_type = "graftc"

        def __init__(self, source: dict[str, Any] | None = None, **options: Any) -> None:
            super().__init__(**options)
            self.source = source or {}

    return AdaptedConfig


def save_pretrained(runner: AdaptedRunner, folder: str | os.PathLike[str], options: Mapping[str, Any]) -> None:
    """Write a compiled model into a folder that may contain other libraries' files, such as a tokenizer.

    Args:
        runner: the Runner of the model to write; the base's weights are not written.
        folder: the folder, created if it does not exist; its ``config.json`` and its folder ``graftc`` are replaced.
        options: the options of transformers' method.

    Raises:
        GraftError: as for `Compiled.save`; GC032 for a model without a transformers config, GC063 for the base's own
            folder, whose config would be lost, GC072 for options that request another format.
    """
    from transformers import PreTrainedConfig

    for name, value in options.items():
        if value not in _AS_ALWAYS.get(name, (None, False)):
            hint = "use compiled.merge().save(path) to write a plain transformers folder"
            message = f"save_pretrained of a compiled model does not support {name}={value!r}"
            raise GraftError("GC072", message, hint=hint)
    if options.get("is_main_process") is False:
        return
    source = runner.compilation.model
    config = config_of(source)
    if not isinstance(config, PreTrainedConfig):
        hint = "use compiled.save(path), which needs no config"
        raise GraftError("GC032", f"{type(source).__name__} has no transformers config", hint=hint)
    require_values(runner)
    place = as_path(folder)
    base = local_folder(runner.compilation.source)
    if base is not None and os.path.realpath(base) == os.path.realpath(place):
        raise overlap(place, base)
    check_destination(place / FOLDER, force=True, replaceable=is_ours)
    place.mkdir(parents=True, exist_ok=True)
    save(runner, place / FOLDER, force=True)
    adapted_config()(source=config.to_dict(), architectures=[type(source).__name__]).save_pretrained(place)
    for act in FOLLOWERS.values():
        act()
