"""Make an example call for a model that reads text with images or sound, with the processor in its folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from graftc.compiler.capture.interface import device_of, dtype_of, parameters
from graftc.files.tensors.foreign_folders import require_regular_files
from graftc.runtime.sources.models import local_folder
from graftc.specs.errors.diagnostics import GraftError, warn

_FILES = ("processor_config.json", "preprocessor_config.json")
_KINDS = {"pixel_values": "image", "input_features": "audio", "input_values": "audio"}
"""The kind of content behind each input other than text, as chat templates name it."""
_WORKER = Path(__file__).with_name("worker.py")
_WAIT = 120.0
"""Seconds for which the other process may run; importing transformers takes most of them."""
_MOST = 2**25
"""The maximum number of entries in an example."""


def processor_example(model: nn.Module) -> dict[str, Any] | None:
    """Return a call of two rows, each a text with an image or a sound, made by the processor in a model's folder.

    The number of text tokens that an image occupies is not part of a model's interface; only its processor determines
    it. The processor runs in a separate process, with bounded time and memory, and no code in the folder is run. A
    processor that fails causes a warning.

    Returns:
        Tensors by name on the model's device, floating-point ones in its dtype. None for a model that reads only text
        or only images, for one on the meta device, which cannot be run, or if the processor is missing or fails.
    """
    folder, known, device = local_folder(model), parameters(model), device_of(model)
    kind = next((kind for name, kind in _KINDS.items() if name in known), None)
    if kind is None or "input_ids" not in known or folder is None or device.type == "meta":
        return None
    if not any((folder / name).exists() for name in _FILES):
        return None
    try:
        require_regular_files(folder, "GC030")
        tensors = _arrays(folder, kind)
    except GraftError as error:
        message = f"the processor in {str(folder)!r} cannot make an example of text with {kind}: {error.message}"
        warn("GC183", message, hint="pass a batch: example_inputs={name: tensor}")
        return None
    dtype, wanted = dtype_of(model), {name: tensor for name, tensor in tensors.items() if name in known}
    return {name: tensor.to(device, dtype if tensor.is_floating_point() else None) for name, tensor in wanted.items()}


def _arrays(folder: Path, kind: str) -> dict[str, Tensor]:
    """Return the arrays that the other process writes.

    Raises:
        GraftError: GC030, with the reason, if there are none.
    """
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / "example.npz"
        command = [sys.executable, "-P", str(_WORKER), str(folder.absolute()), kind, str(file)]
        quiet: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        try:
            run = subprocess.run(command, stdout=subprocess.PIPE, env=environment, timeout=_WAIT, **quiet)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise GraftError("GC030", f"it did not finish: {type(error).__name__}") from error
        if run.returncode != 0:
            raise GraftError("GC030", "it used more time or memory than allowed")
        told = json.loads(run.stdout.decode("utf-8", "replace").rstrip().rpartition("\n")[2])
        if told is not None:
            raise GraftError("GC030", str(told).partition("\n")[0])
        with np.load(file, allow_pickle=False) as arrays:
            tensors = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    if (entries := sum(tensor.numel() for tensor in tensors.values())) > _MOST:
        raise GraftError("GC030", f"it has {entries:,} entries, more than {_MOST:,}")
    return tensors
