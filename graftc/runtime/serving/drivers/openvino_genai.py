"""OpenVINO GenAI: the base is a GGUF file in float16, or a folder of OpenVINO's graphs; adapters are safetensors."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import numpy as np
import openvino
import openvino_genai as genai


def generate(request: dict[str, Any], timed: Callable[..., Any]) -> dict[str, Any]:
    """Answer a request, one prompt after the other."""
    options: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
    if request["threads"]:
        options["INFERENCE_NUM_THREADS"] = request["threads"]
    loaded = {name: genai.Adapter(path) for name, path in request["adapters"].items()}
    if loaded:
        options["adapters"] = genai.AdapterConfig(list(loaded.values()))
    pipeline = genai.LLMPipeline(request["base"], "CPU", **options)
    settings = genai.GenerationConfig(
        min_new_tokens=request["tokens"], max_new_tokens=request["tokens"], ignore_eos=True, do_sample=False
    )

    def complete(ids: list[int], adapter: str | None) -> list[int]:
        settings.adapters = genai.AdapterConfig([loaded[adapter]] if adapter is not None else [])
        inputs = genai.TokenizedInputs(
            openvino.Tensor(np.array([ids], dtype=np.int64)), openvino.Tensor(np.ones((1, len(ids)), dtype=np.int64))
        )
        return [int(token) for token in pipeline.generate(inputs, settings).tokens[0]]

    tokens = [timed(complete, prompt["ids"], prompt["adapter"]) for prompt in request["prompts"]]
    return {"tokens": tokens, "version": version("openvino-genai")}
