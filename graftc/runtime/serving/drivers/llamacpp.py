"""llama.cpp, with its server as built by the package ``xllamacpp``: the base and the adapters are GGUF files."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any
from urllib.request import Request, urlopen

import xllamacpp


def generate(request: dict[str, Any], timed: Callable[..., Any]) -> dict[str, Any]:
    """Answer a request; prompts that are to run at once are sent at once, each to its own slot."""
    prompts, adapters = request["prompts"], request["adapters"]
    at_once = len(prompts) if request["at_once"] else 1
    server = xllamacpp.Server(_settings(request, at_once))
    numbers = {name: number for number, name in enumerate(adapters)}

    def complete(prompt: dict[str, Any]) -> list[int]:
        scales = [{"id": number, "scale": float(name == prompt["adapter"])} for name, number in numbers.items()]
        body = {
            "prompt": prompt["ids"],
            "n_predict": request["tokens"],
            "temperature": 0.0,
            "ignore_eos": True,
            "cache_prompt": False,
            "return_tokens": True,
            "lora": scales,
        }
        call = Request(f"{server.listening_address}/completion", json.dumps(body).encode())
        call.add_header("Content-Type", "application/json")
        with urlopen(call) as response:
            return list(json.load(response)["tokens"])

    with ThreadPoolExecutor(at_once) as pool:
        return {"tokens": list(pool.map(partial(timed, complete), prompts)), "version": xllamacpp.__version__}


def _settings(request: dict[str, Any], at_once: int) -> Any:
    settings = xllamacpp.CommonParams()
    settings.model.path = request["base"]
    longest = max(len(prompt["ids"]) for prompt in request["prompts"]) + request["tokens"]
    settings.n_parallel = at_once
    settings.n_ctx = at_once * max(256, longest)
    settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    settings.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    settings.fit_params = settings.warmup = False
    if request["threads"]:
        settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = request["threads"]
    loaded = []
    for path in request["adapters"].values():
        adapter = xllamacpp.CommonAdapterLoraInfo()
        adapter.path, adapter.scale = path, 1.0
        loaded.append(adapter)
    settings.lora_adapters = loaded
    return settings
