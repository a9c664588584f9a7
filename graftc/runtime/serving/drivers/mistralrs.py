"""mistral.rs: the base is a folder of transformers with a tokenizer, the adapters are PEFT folders.

The engine takes text, so a prompt is turned into text, of which it must be the tokens. Of an answer, it only states the
tokens among the most probable ones of a chat, whose template is therefore one that leaves the text alone.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mistralrs


def generate(request: dict[str, Any], timed: Callable[..., Any]) -> dict[str, Any]:
    """Answer a request, one prompt after the other: release 0.9.5 answers requests that are sent at once with ''."""
    base, dtype = request["base"], mistralrs.ModelDType.F32
    which: Any = mistralrs.Which.Plain(base, dtype=dtype)
    if request["adapters"]:
        adapters = [mistralrs.LoraAdapter(name, path) for name, path in request["adapters"].items()]
        limit = {"max_rank": request["max_rank"]} if request["max_rank"] else {}
        which = mistralrs.Which.Lora(base, adapters=adapters, dtype=dtype, **limit)
    with tempfile.NamedTemporaryFile("w", suffix=".jinja") as template:
        template.write("{{ messages[0]['content'] }}")
        template.flush()
        runner = mistralrs.Runner(
            which, token_source="none", no_paged_attn=True, prefix_cache_n=0, jinja_explicit=template.name
        )

    config = json.loads(Path(request["base"], "config.json").read_text(encoding="utf-8"))
    named = config.get("eos_token_id")
    ends = {end: -1e9 for end in (named if isinstance(named, list) else [named]) if end is not None}

    def complete(ids: list[int], adapter: str | None) -> list[int]:
        text = runner.detokenize_text(ids, False)
        if runner.tokenize_text(text, False, None) != ids:
            raise ValueError(f"the prompt {ids} is not what the tokenizer makes of its text")
        call = mistralrs.ChatCompletionRequest(
            [{"role": "user", "content": text}],
            "default",
            logprobs=True,
            top_logprobs=1,
            max_tokens=request["tokens"],
            temperature=0.0,
            ignore_eos=True,
            logit_bias=ends,
            adapter=adapter,
        )
        answer: Any = runner.send_chat_completion_request(call)
        if (found := answer.usage.prompt_tokens) != len(ids):
            raise ValueError(f"the engine made {found} tokens of a prompt of {len(ids)}")
        return [token.top_logprobs[0].token for token in answer.choices[0].logprobs.content]

    tokens = [timed(complete, prompt["ids"], prompt["adapter"]) for prompt in request["prompts"]]
    return {"tokens": tokens, "version": version("mistralrs")}
