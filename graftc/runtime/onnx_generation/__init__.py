"""Generate text with ONNX Runtime, without a torch model: ``load(folder).generate(...)``.

Nothing is imported from torch or transformers until a model is loaded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path
    from typing import Any

    from graftc.runtime.onnx_generation.exported import write_exported_model
    from graftc.runtime.onnx_generation.genai import genai_config, genai_obstacle
    from graftc.runtime.onnx_generation.graphs import Provider
    from graftc.runtime.onnx_generation.models import OnnxCausalLM, OnnxModel, OnnxSeq2SeqLM

_HOMES = {
    "OnnxCausalLM": "models",
    "OnnxModel": "models",
    "OnnxSeq2SeqLM": "models",
    "genai_config": "genai",
    "genai_obstacle": "genai",
    "write_exported_model": "exported",
}

__all__ = [
    "OnnxCausalLM",
    "OnnxModel",
    "OnnxSeq2SeqLM",
    "genai_config",
    "genai_obstacle",
    "load",
    "write_exported_model",
]


def load(
    folder: str | Path,
    *,
    providers: Sequence[Provider] | None = None,
    threads: int | None = None,
    session_options: Any = None,
) -> OnnxModel:
    """Load the graphs of a language model for generation.

    No torch model is built, and no code in the folder is run.

    Args:
        folder: a folder with a decoder's ``model.onnx``; or with ``encoder_model.onnx``, ``decoder_model.onnx`` and
            ``decoder_with_past_model.onnx``; or with transformers' `ExportedModel` that has a decode step. It must also
            contain ``config.json``, and may contain ``generation_config.json`` with defaults.
        providers: ONNX Runtime's execution providers, with or without options; by default CUDA if onnxruntime and the
            machine support it, otherwise the CPU.
        threads: the number of threads that ONNX Runtime uses within an operator; by default the machine's number of
            cores.
        session_options: ``onnxruntime.SessionOptions`` for all other options.

    Returns:
        A model with transformers' ``generate``, which also works in ``transformers.pipeline``.

    Raises:
        GraftError: GC061 without onnxruntime, GC073 for arguments of the wrong type, GC144 for a folder whose graphs
            cannot generate.
    """
    from graftc.runtime.onnx_generation.folders import open_folder

    return open_folder(folder, providers, threads, session_options)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
