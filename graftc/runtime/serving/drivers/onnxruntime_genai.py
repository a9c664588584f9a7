"""ONNX Runtime GenAI: the base is a folder of ``onnx-generate``, the adapters are ``.onnx_adapter`` files."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import onnxruntime_genai as genai


def generate(request: dict[str, Any], timed: Callable[..., Any]) -> dict[str, Any]:
    """Answer a request, one prompt after the other: a generator has one adapter."""
    config = genai.Config(request["base"])
    if request["threads"]:
        threads = {"intra_op_num_threads": request["threads"]}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": threads}}}))
    model = genai.Model(config)
    adapters = genai.Adapters(model)
    for name, path in request["adapters"].items():
        adapters.load(path, name)

    def complete(ids: list[int], adapter: str | None) -> list[int]:
        wanted = len(ids) + request["tokens"]
        options = genai.GeneratorParams(model)
        options.set_search_options(do_sample=False, min_length=wanted, max_length=wanted)
        generator = genai.Generator(model, options)
        if adapter is not None:
            generator.set_active_adapter(adapters, adapter)
        generator.append_tokens([ids])
        while not generator.is_done():
            generator.generate_next_token()
        return [int(token) for token in generator.get_sequence(0)[len(ids) :]]

    tokens = [timed(complete, prompt["ids"], prompt["adapter"]) for prompt in request["prompts"]]
    return {"tokens": tokens, "version": genai.__version__}
