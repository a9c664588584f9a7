"""Follow an engine through folders of whole models: transformers' own, and graphs for ONNX Runtime GenAI."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from graftc.applications.serving.bases import ServedBase
from graftc.files.tensors.folder import TensorFolder
from graftc.files.tensors.weights import embedded_adapter
from graftc.records.serving.certificates import ServingProblem
from graftc.runtime.onnx_generation.genai import genai_config, genai_obstacle
from graftc.runtime.onnx_generation.io_names import DECODER
from graftc.runtime.serving.engines import Engine
from graftc.runtime.sources.folder_checks import plain_config
from graftc.runtime.sources.models import config_of_folder
from graftc.specs.errors.border import library_errors
from graftc.specs.errors.diagnostics import GraftError
from graftc.specs.errors.packages import optional_package
from graftc.specs.errors.text import shown, some
from graftc.specs.regular_files import JSON_BYTES, read_regular
from graftc.specs.strict_json import read_json

GENAI, ADDED = "genai_config.json", "added_tokens.json"
_AGAIN = "export the folder again: --format onnx-generate"
_WITH_GRAFTC = "run the folder with graftc generate"


def folder_problems(engine: Engine, folder: Path) -> Iterator[ServingProblem]:
    """Yield the reasons why an engine does not load a model folder, or computes something else with it.

    Raises:
        GraftError: GC032 and GC100 for a folder that cannot be read.
    """
    if (adapter := embedded_adapter(folder)) is not None:
        reason = f"the folder contains {adapter}, which transformers would apply and {engine.title} does not"
        yield ServingProblem("ignored", str(adapter), reason, "merge it, or move it to a separate folder")
        return
    config, tensors = plain_config(folder, str(folder)), TensorFolder(folder, strict=False)
    yield from field_problems(engine, config, folder)
    text = config.get("text_config") or config
    if text.get("tie_word_embeddings", config.get("tie_word_embeddings")) and "lm_head.weight" in tensors:
        table = next((tensors[name] for name in tensors if name.endswith("embed_tokens.weight")), None)
        if table is not None and not table.equal(tensors["lm_head.weight"]):
            reason = "lm_head.weight is not the embedding, but config.json has tie_word_embeddings, so it is ignored"
            yield ServingProblem("ignored", "tie_word_embeddings", reason, "set tie_word_embeddings to false")


def field_problems(engine: Engine, config: Mapping[str, Any], folder: Path) -> Iterator[ServingProblem]:
    """Yield the fields that an engine needs at the top level of a model's config, where they are not."""
    rope = config.get("rope_parameters") or {}
    for field in engine.needs:
        if field in rope and field not in config:
            file = folder / "config.json"
            reason = f"{file} has {field} only in rope_parameters, and {engine.title} reads it at the top level"
            yield ServingProblem("refused", field, reason, f'add "{field}": {shown(rope[field])} to {file}')


def genai_problems(engine: Engine, folder: Path) -> Iterator[ServingProblem]:
    """Yield the reasons why ONNX Runtime GenAI does not load a folder, or computes something else with it."""
    onnx = optional_package("onnx", "reading graphs", "export")
    if not (folder / GENAI).is_file():
        yield _without_genai_config(onnx, folder)
        return
    try:
        found: Any = read_json(read_regular(folder / GENAI), JSON_BYTES)
        decoder = found["model"]["decoder"]
        graph = onnx.load(folder / str(decoder["filename"]), load_external_data=False).graph
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"{GENAI} or the graph that it names cannot be read: {getattr(error, 'strerror', None) or error}"
        yield ServingProblem("refused", GENAI, reason, _AGAIN)
        return
    inputs, outputs = [each.name for each in graph.input], [each.name for each in graph.output]
    config = config_of_folder(folder, str(folder))
    if (obstacle := genai_obstacle(config, inputs, outputs)) is not None:
        yield ServingProblem("refused", GENAI, obstacle, _WITH_GRAFTC)
        return
    wanted: Any = genai_config(config, None, str(decoder["filename"]), inputs, outputs)
    sizes = ("head_size", "hidden_size", "num_attention_heads", "num_hidden_layers", "num_key_value_heads")
    pairs = [(f"model.decoder.{name}", decoder.get(name), wanted["model"]["decoder"][name]) for name in sizes]
    pairs += [(f"model.{name}", found["model"].get(name), wanted["model"][name]) for name in ("type", "vocab_size")]
    pairs += [
        (f"model.decoder.{side}", decoder.get(side), wanted["model"]["decoder"][side]) for side in ("inputs", "outputs")
    ]
    for place, own, value in pairs:
        if own != value:
            reason = f"{place} is {shown(own)} in {GENAI}, but the model has {shown(value)}"
            yield ServingProblem("wrong", place, reason, _AGAIN)


def _without_genai_config(onnx: Any, folder: Path) -> ServingProblem:
    """Return why a folder of graphs has no ``genai_config.json``: the engine does not run the model, or it is lost."""
    names: tuple[list[str], list[str]] = ([], [])
    if (folder / DECODER).is_file():
        with library_errors("GC110", f"{folder / DECODER} cannot be read"):
            graph = onnx.load(folder / DECODER, load_external_data=False).graph
        names = [each.name for each in graph.input], [each.name for each in graph.output]
    if (obstacle := genai_obstacle(config_of_folder(folder, str(folder)), *names)) is not None:
        return ServingProblem("refused", GENAI, obstacle, _WITH_GRAFTC)
    return ServingProblem("refused", GENAI, f"the folder has no {GENAI}", _AGAIN)


def added_token_problems(engine: Engine, folder: Path, base: ServedBase) -> Iterator[ServingProblem]:
    """Yield the problem of an adapter that brings tokens that the base does not have."""
    file = folder / ADDED
    if not engine.added_tokens or not file.is_file():
        return
    try:
        tokens = read_json(read_regular(file, JSON_BYTES), JSON_BYTES)
    except (OSError, ValueError):
        return  # the engine warns and goes on without the file
    size = base.vocabulary
    numbers = tokens.values() if isinstance(tokens, dict) else [None]
    if any(type(number) is not int for number in numbers):
        reason = f"{ADDED} is not a mapping from tokens to their numbers"
        yield ServingProblem("refused", ADDED, reason, "remove the file if the adapter adds no tokens")
    elif size is not None and (beyond := [token for token, number in tokens.items() if number >= size]):
        reason = f"{ADDED} adds {some(beyond, 3)} to a vocabulary of {size}"
        remedy = "remove the file if the adapter does not use them; otherwise merge it: graftc merge"
        yield ServingProblem("refused", ADDED, reason, remedy)


def require_folder(path: Path) -> None:
    """Raise if there is nothing at a path.

    Raises:
        GraftError: GC110.
    """
    if not path.exists():
        raise GraftError("GC110", f"{path} does not exist")
