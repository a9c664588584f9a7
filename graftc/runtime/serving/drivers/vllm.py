"""vLLM: the base is a folder of transformers, the adapters are PEFT folders."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import vllm
from vllm.lora.request import LoRARequest


def generate(request: dict[str, Any], timed: Callable[..., Any]) -> dict[str, Any]:
    """Answer a request; prompts that are to run at once are scheduled together, whatever their adapters."""
    prompts, adapters = request["prompts"], request["adapters"]
    lora = {}
    if adapters:
        # On a CPU, release 0.32 computes rows without an adapter with the last slot, which therefore stays empty.
        lora = {"enable_lora": True, "max_loras": len(adapters) + 1, "max_lora_rank": request["max_rank"] or 16}
    engine = vllm.LLM(
        model=request["base"],
        skip_tokenizer_init=True,
        dtype="float32",
        enforce_eager=True,
        enable_prefix_caching=False,
        max_model_len=max(256, max(len(prompt["ids"]) for prompt in prompts) + request["tokens"]),
        max_num_seqs=len(prompts) if request["at_once"] else 1,
        **lora,
    )
    requests = {name: LoRARequest(name, number + 1, path) for number, (name, path) in enumerate(adapters.items())}
    wanted = request["tokens"]
    sampling = vllm.SamplingParams(
        temperature=0.0, min_tokens=wanted, max_tokens=wanted, ignore_eos=True, detokenize=False
    )

    def complete(several: list[dict[str, Any]]) -> list[list[int]]:
        answers = engine.generate(
            [{"prompt_token_ids": prompt["ids"]} for prompt in several],
            sampling,
            lora_request=[requests.get(prompt["adapter"]) for prompt in several] if adapters else None,
        )
        return [list(answer.outputs[0].token_ids) for answer in answers]

    groups = [prompts] if request["at_once"] else [[prompt] for prompt in prompts]
    tokens = [row for group in groups for row in timed(complete, group)]
    return {"tokens": tokens, "version": vllm.__version__}
