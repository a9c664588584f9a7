"""Let transformers' ``Auto`` classes load the folders that a compiled model's ``save_pretrained`` writes.

Such a folder has a ``config.json`` with the model type ``graftc`` and, beside it, the artifact. Importing this module,
or `graftc.auto`, lets ``AutoConfig`` and the ``AutoModel`` classes load it, as PEFT's integration does for adapters.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from graftc.compat.transformers import LOADING_OPTIONS, auto_classes, loaded_by
from graftc.compiler.capture.interface import config_of
from graftc.runtime.artifact.pretrained import FOLDER, adapted_config
from graftc.runtime.compiled import Compiled
from graftc.runtime.loading.load import load
from graftc.specs.errors.diagnostics import GraftError

_IGNORED = frozenset(
    {
        *("cache_dir", "force_download", "local_files_only", "proxies", "revision", "token", "trust_remote_code"),
        *("use_safetensors", "weights_only", "code_revision", "adapter_kwargs", *LOADING_OPTIONS),
    }
)
"""Options of ``from_pretrained`` that determine the source of files and therefore have no effect for a folder."""


AdaptedConfig: Any = adapted_config()


def _changed(config: PreTrainedConfig, saved: PreTrainedConfig) -> set[str]:
    """Return the fields of a config that differ from the saved one, such as a changed ``num_labels``."""
    given, kept = ({**one.to_dict(), "num_labels": one.num_labels} for one in (config, saved))
    changed = {name for name in given.keys() | kept.keys() if given.get(name) != kept.get(name)}
    return {name for name in changed if not name.startswith("_")}


class _Loader:
    """Stand-in that an ``Auto`` class uses as the class of the model in such a folder."""

    config_class = AdaptedConfig
    auto: type[Any]

    @classmethod
    def from_pretrained(
        cls, folder: str | os.PathLike[str], *, config: Any = None, subfolder: str = "", **options: Any
    ) -> Compiled:
        """Load the compiled model in a folder.

        Raises:
            GraftError: as for `graftc.load`; GC072 for options that a compiled model does not support, or if this
                ``Auto`` class does not load the source model's class.
        """
        place = Path(folder) / subfolder
        wanted = {name for name, value in options.items() if value is not None and name not in _IGNORED}
        wanted -= {name for name in ("dtype", "torch_dtype") if options.get(name) == "auto"}
        if isinstance(config, AdaptedConfig):
            wanted |= _changed(config, AdaptedConfig.from_pretrained(place))
        if wanted:
            message = f"{cls.auto.__name__} loads a compiled model as it was saved, without {sorted(wanted)[0]}"
            hint = "load the base with this option, and pass it: graftc.load(path, model=base)"
            raise GraftError("GC072", message, hint=hint)
        compiled = load(place / FOLDER)
        source = type(compiled.compilation.model)
        if source not in loaded_by(cls.auto, config_of(compiled.compilation.model)):
            message = f"{place} contains a {source.__name__}, which {cls.auto.__name__} does not load"
            raise GraftError("GC072", message, hint=f"use graftc.load({str(place / FOLDER)!r})")
        return compiled


def register() -> None:
    """Register such folders with the ``Auto`` classes, which can then load them; calling this again does nothing."""
    AutoConfig.register(AdaptedConfig.model_type, AdaptedConfig, exist_ok=True)
    for auto in set(auto_classes()):
        loader = type(f"Adapted{auto.__name__}", (_Loader,), {"auto": auto})
        auto.register(AdaptedConfig, loader, exist_ok=True)


register()
