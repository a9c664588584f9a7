"""Export a merged model as GGUF."""

from __future__ import annotations

from functools import partial
from typing import Any

from graftc.compiler.capture.interface import config_of
from graftc.runtime.export.gguf.families import Family, architecture, family_of, heads_of, rope_factors, stored
from graftc.runtime.export.gguf.vocabulary import add_vocabulary
from graftc.runtime.export.gguf.writing import Entry, GgufFile, name_of, package
from graftc.runtime.interop.transformers import FoldedModel, no_place, to_transformers
from graftc.runtime.sources.models import local_folder
from graftc.specs.errors.diagnostics import GraftError


def merged_file(merged: FoldedModel) -> GgufFile:
    """Return a merged model's file, with a tokenizer if the base has one that llama.cpp supports.

    Args:
        merged: the merged model, whose adaptations must all be folded.

    Raises:
        GraftError: GC032 for a model without a config, GC050 if an adaptation is left in the graph, GC052 for an added
            bias, GC060 for a model type or a tensor that GGUF cannot store, GC061 without the package.
    """
    gguf = package()
    if merged.kept:
        name, reason = next(iter(merged.kept.items()))
        raise GraftError("GC050", f"{name!r} is still in the graph: {reason}", hint="convert it to a LoRA, or merge it")
    source = merged.compilation.source
    config = config_of(source)
    if config is None:
        raise GraftError("GC032", f"{type(source).__name__} has no config", hint="GGUF needs a transformers model")
    if merged.additions:
        raise no_place(merged.additions, source)
    family = family_of(config)
    entries = _entries(gguf, family, config, to_transformers(merged))
    folder = local_folder(source)

    def fill(writer: Any) -> str | None:
        writer.add_type(gguf.GGUFType.MODEL)
        writer.add_name(folder.name if folder is not None else type(source).__name__)
        _add_numbers(writer, family, config)
        return add_vocabulary(writer, gguf, folder, int(config.vocab_size))

    return GgufFile(family.arch, entries, fill)


def _entries(gguf: Any, family: Family, config: Any, model: Any) -> list[Entry]:
    names = gguf.get_tensor_name_map(architecture(gguf, family), config.num_hidden_layers)
    heads = heads_of(config)
    entries: list[Entry] = []
    seen: dict[int, str] = {}
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() in seen and seen[tensor.data_ptr()] != name:
            continue  # a tied head repeats the embedding table
        seen[tensor.data_ptr()] = name
        make = partial(stored, family, heads, name, tensor)
        exact = tensor.dim() < 2 or name.endswith("wpe.weight")
        entries.append(Entry(name_of(names, name), tuple(make().shape), make, exact))
    factors = rope_factors(config)
    if factors is not None:
        entries.append(Entry.of("rope_freqs.weight", factors, exact=True))
    return entries


def _add_numbers(writer: Any, family: Family, config: Any) -> None:
    for function, names in family.fields.items():
        value = next((number for name in names if (number := getattr(config, name, None)) is not None), None)
        if value is None:
            raise GraftError("GC060", f"the config has no {names[0]}")
        getattr(writer, function)(value)
    heads = heads_of(config)
    if family.arch == "gpt2":
        writer.add_feed_forward_length(config.n_inner or 4 * config.n_embd)
        return
    writer.add_rope_freq_base(float((getattr(config, "rope_parameters", None) or {}).get("rope_theta", 10000.0)))
    writer.add_rope_dimension_count(heads.size)
    writer.add_key_length(heads.size)
    writer.add_value_length(heads.size)
