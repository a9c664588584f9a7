"""Read a folder of ONNX files with its configs, without running any code in it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from graftc.files.tensors.foreign_folders import require_regular_files
from graftc.runtime.onnx_generation.exported import MANIFEST, graph_in
from graftc.runtime.onnx_generation.graphs import OnnxGraph, Provider, providers_for, runtime
from graftc.runtime.onnx_generation.io_names import DECODER, PAIR
from graftc.runtime.onnx_generation.models import OnnxCausalLM, OnnxModel, OnnxSeq2SeqLM
from graftc.runtime.sources.folder_checks import plain_config
from graftc.specs.errors.arguments import as_path, kind_of
from graftc.specs.errors.border import library_errors
from graftc.specs.errors.diagnostics import GraftError


def _config(folder: Path) -> Any:
    from transformers import AutoConfig

    plain_config(folder, str(folder), "GC144")
    with library_errors("GC144", f"config.json in {folder} cannot be read"):
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def _generation_config(folder: Path, config: Any) -> Any:
    from transformers import GenerationConfig

    with library_errors("GC144", f"generation_config.json in {folder} cannot be read"):
        if (folder / "generation_config.json").is_file():
            return GenerationConfig.from_pretrained(folder, local_files_only=True)
        return GenerationConfig.from_model_config(config)


def _named(kind: type, config: Any) -> type:
    """Return a class with the source model's name; from this name, transformers derives what a model supports."""
    name = next(iter(getattr(config, "architectures", None) or ()), None)
    return type(name, (kind,), {}) if isinstance(name, str) and name.isidentifier() else kind


def _options(threads: Any, session_options: Any) -> Any:
    options = session_options
    if options is None:
        options = runtime().SessionOptions()
        options.log_severity_level = 3  # ONNX Runtime warns of every input that has a default
    if threads is not None:
        if not isinstance(threads, int) or isinstance(threads, bool) or threads < 1:
            shown = threads if isinstance(threads, int) else kind_of(threads)
            raise GraftError("GC073", f"threads is {shown}", hint="use a positive integer")
        options.intra_op_num_threads = threads
    return options


def open_folder(
    folder: Any, providers: Sequence[Provider] | None, threads: int | None, session_options: Any
) -> OnnxModel:
    """Implement `graftc.runtime.onnx_generation.load`."""
    folder = as_path(folder)
    if not folder.is_dir():
        raise GraftError("GC144", f"{folder} is not a folder")
    require_regular_files(folder, "GC144")
    seq2seq = any((folder / name).is_file() for name in PAIR)
    files = [folder / name for name in PAIR] if seq2seq else [folder / DECODER]
    if (folder / MANIFEST).is_file():
        seq2seq, files = False, [graph_in(folder)]
    if missing := [file.name for file in files if not file.is_file()]:
        raise GraftError("GC144", f"{folder} has no {' and no '.join(missing)}")
    config = _config(folder)
    defaults = _generation_config(folder, config)
    if bool(getattr(config, "is_encoder_decoder", False)) != seq2seq:
        described = "a decoder only" if seq2seq else "an encoder and a decoder"
        raise GraftError(
            "GC144", f"config.json describes {described}, but the files are {', '.join(f.name for f in files)}"
        )
    chosen, options = providers_for(providers), _options(threads, session_options)
    graphs = [OnnxGraph(file, chosen, options) for file in files]
    kind: Any = _named(OnnxSeq2SeqLM if seq2seq else OnnxCausalLM, config)
    return cast(OnnxModel, kind(config, defaults, *graphs))
