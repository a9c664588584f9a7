"""Writing a compiled model as ``save_pretrained`` does: a folder with a config of transformers and the artifact."""

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
"""The folder of the artifact within one that ``save_pretrained`` wrote."""

_AS_ALWAYS: Mapping[str, tuple[Any, ...]] = {
    "is_main_process": (True, False),
    "safe_serialization": (True,),
    "save_original_format": (True, False),
    "save_peft_format": (True, False),
}
"""Values that options of ``save_pretrained`` may have; all other options have to be false or None."""


@cache
def adapted_config() -> Any:
    """Return the class of the config of a folder with a compiled model."""
    from transformers import PreTrainedConfig

    class AdaptedConfig(PreTrainedConfig):  # type: ignore[no-untyped-call]
        """The config of a folder with a compiled model.

        Attributes:
            source: the config of the source model, as ``to_dict`` gives it.
        """

        model_type = "graftc"

        def __init__(self, source: dict[str, Any] | None = None, **options: Any) -> None:
            super().__init__(**options)
            self.source = source or {}

    return AdaptedConfig


def save_pretrained(runner: AdaptedRunner, folder: str | os.PathLike[str], options: Mapping[str, Any]) -> None:
    """Write a compiled model into a folder that may contain files of another library, such as a tokenizer.

    Args:
        runner: the Runner of the model to write; the base's weights are not written.
        folder: the folder, created if it is missing; ``config.json`` and the folder ``graftc`` in it are replaced.
        options: options of transformers' method.

    Raises:
        GraftError: as `Compiled.save`; GC032 for a model without a config of transformers, GC063 for the base's own
            folder, whose config would be lost, GC072 for options that request another form.
    """
    from transformers import PreTrainedConfig

    for name, value in options.items():
        if value not in _AS_ALWAYS.get(name, (None, False)):
            hint = "compiled.merge().save(path) writes a plain transformers folder"
            raise GraftError("GC072", f"save_pretrained of a compiled model has no {name}={value!r}", hint=hint)
    if options.get("is_main_process") is False:
        return
    source = runner.compilation.model
    config = config_of(source)
    if not isinstance(config, PreTrainedConfig):
        hint = "compiled.save(path) keeps it without one"
        raise GraftError("GC032", f"{type(source).__name__} has no config of transformers", hint=hint)
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
