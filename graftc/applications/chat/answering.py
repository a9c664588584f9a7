"""Generate the answer to a prompt piece by piece, and record its tokens and timings."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor

from graftc.applications.chat.opening import TextModel
from graftc.applications.chat.settings import generation_errors, require_settings
from graftc.applications.chat.templates import require_bounded
from graftc.records.applications.answers import Answer, Settings
from graftc.runtime.sources.models import quiet_transformers
from graftc.specs.errors.border import library_errors
from graftc.specs.errors.diagnostics import GraftError

Message = Mapping[str, str]
"""A chat message: its ``role`` (``system``, ``user`` or ``assistant``) and its ``content``."""

Finish = Literal["stop", "length", "interrupted"]
"""Why an answer ended: the model ended it, it reached the maximum length, or it was stopped."""

_WARM = 4
"""The maximum number of prompt tokens used to prepare graphs."""


def prompt_ids(model: TextModel, prompt: str | Sequence[Message]) -> Tensor:
    """Return a prompt's tokens, int64 ``[1, length]``.

    The prompt is either a text for the model to continue, or a chat in which the assistant speaks next.

    Raises:
        GraftError: GC147 if the tokenizer has no chat template, or if its template rejects these messages; GC090 for
            an empty text; GC146 for tokens that the model does not have.
    """
    tokenizer = model.tokenizer
    if isinstance(prompt, str):
        with library_errors("GC146", "the tokenizer failed"):
            ids = list(tokenizer(prompt)["input_ids"])
    else:
        ids = _rendered(tokenizer, prompt)
    if not ids and tokenizer.bos_token_id is not None:
        ids = [tokenizer.bos_token_id]
    if not ids:
        raise GraftError("GC090", "the prompt is empty, and the tokenizer has no token for the beginning of a text")
    table = _table(model)
    if table is not None and max(ids) >= table:
        message = f"the tokenizer produced token {max(ids)}, but the model has only {table} tokens"
        raise GraftError("GC146", message, hint="use the model's own tokenizer: --tokenizer NAME")
    return torch.tensor([ids], dtype=torch.int64, device=model.device)


def _rendered(tokenizer: Any, messages: Sequence[Message]) -> list[int]:
    if not getattr(tokenizer, "chat_template", None):
        hint = "use a model that is tuned for chat, or graftc generate"
        raise GraftError("GC147", "the model's tokenizer has no chat template", hint=hint)
    roles = ", ".join(dict.fromkeys(message["role"] for message in messages))
    with library_errors("GC147", f"the chat template does not accept messages with the roles {roles}"):
        given = {**tokenizer.special_tokens_map, "tools": None, "documents": None, "add_generation_prompt": True}
        require_bounded(tokenizer.get_chat_template(), messages, given)
        listed = [dict(message) for message in messages]
        return list(tokenizer.apply_chat_template(listed, add_generation_prompt=True, return_dict=True)["input_ids"])


def _table(model: TextModel) -> int | None:
    try:
        return int(model.model.get_input_embeddings().weight.shape[0])
    except (AttributeError, NotImplementedError):
        return None


def prepare(model: TextModel, settings: Settings) -> None:
    """Capture a compiled model's graphs in advance.

    The first answer then starts without delay, and its timings do not include the capture.
    """
    if model.compiled is None:
        return
    ids = prompt_ids(model, [{"role": "user", "content": "a"}] if _chats(model) else "a")[:, :_WARM]
    quick = Settings(max_new_tokens=3, sample=False, num_beams=settings.num_beams, use_cache=settings.use_cache)
    answer(model, ids, quick)


def _chats(model: TextModel) -> bool:
    return bool(getattr(model.tokenizer, "chat_template", None))


def answer(
    model: TextModel,
    ids: Tensor,
    settings: Settings,
    *,
    say: Callable[[str], None] = lambda _: None,
    stopped: Callable[[], bool] = lambda: False,
    past: Any = None,
    cached: int = 0,
) -> Answer:
    """Generate the answer to a prompt.

    Args:
        model: the model that generates.
        ids: the tokens of the prompt, ``[1, length]``.
        settings: how to generate.
        say: a callback that receives the text piece by piece as it is generated, or all at once with beam search.
        stopped: a function that is called after every token and returns whether to stop.
        past: a cache that holds the first ``cached`` tokens of the prompt; the remaining tokens and the answer are
            added to it.
        cached: the number of prompt tokens in the cache.

    Raises:
        GraftError: GC031 for a prompt that fills all of the model's positions; otherwise as for the model's
            ``generate``.
    """
    length = int(ids.shape[1])
    room = None if model.positions is None else model.positions - length
    if room is not None and room < 1:
        message = f"the prompt has {length} tokens, but the model has only {model.positions} positions"
        raise GraftError("GC031", message, hint="shorten the prompt; in a chat, /reset clears the conversation")
    require_settings(model.source.generation_config, settings.num_beams)
    options = {**settings.options(), **_ends(model)}
    options["max_new_tokens"] = min(settings.max_new_tokens, room or settings.max_new_tokens)
    name = model.cache_name
    if past is not None and name is not None:
        options[name] = past
    streamer = None
    if getattr(model.source.generation_config, "stop_strings", None) is not None:
        options["tokenizer"] = model.tokenizer
    beams = settings.num_beams or getattr(model.source.generation_config, "num_beams", None) or 1
    if beams == 1:
        streamer = options["streamer"] = _streamer_class()(model.tokenizer, say)
    if settings.seed is not None:
        torch.manual_seed(settings.seed)
    asked = False

    def ask(sequences: Tensor, *_: Any, **__: Any) -> Tensor:
        nonlocal asked
        asked = asked or stopped()
        return torch.full((sequences.shape[0],), asked, dtype=torch.bool, device=sequences.device)

    begun = time.perf_counter()
    with torch.no_grad(), quiet_transformers(), generation_errors():
        generated = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), stopping_criteria=[ask], **options
        )
    seconds = time.perf_counter() - begun
    if not isinstance(generated, Tensor):  # the settings request other outputs besides tokens
        generated = generated.sequences
    new = generated[0, 1 if model.has_encoder else length :].tolist()
    text = model.tokenizer.decode(new, skip_special_tokens=True)
    if streamer is None:
        say(text)
    first = streamer.first - begun if streamer is not None and streamer.first is not None else None
    ended = bool(new) and new[-1] in options["eos_token_id"]
    finish: Finish = "stop" if ended else "interrupted" if asked else "length"
    return Answer(text, tuple(new), length, cached, finish, first, seconds)


def _ends(model: TextModel) -> dict[str, Any]:
    """Return the end and padding tokens for ``generate``.

    The end tokens are the model's own and the tokenizer's, which may end the turns of a chat.
    """
    eos = model.source.generation_config.eos_token_id
    listed = [eos] if isinstance(eos, int) else list(eos or [])
    end = model.tokenizer.eos_token_id
    ends = list(dict.fromkeys([*listed, *([end] if end is not None else [])]))
    pad = model.source.generation_config.pad_token_id
    if pad is None:
        pad = model.tokenizer.pad_token_id if model.tokenizer.pad_token_id is not None else next(iter(ends), 0)
    return {"eos_token_id": ends, "pad_token_id": pad}


@cache
def _streamer_class() -> Any:
    from transformers import TextStreamer

    class Streamer(TextStreamer):
        """Streamer that passes text on as it is generated, and records when the first token arrives."""

        def __init__(self, tokenizer: Any, say: Callable[[str], None]) -> None:
            super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
            self.say = say
            self.first: float | None = None

        def put(self, value: Tensor) -> None:
            if not self.next_tokens_are_prompt and self.first is None:
                self.first = time.perf_counter()
            super().put(value)  # type: ignore[no-untyped-call]

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            if text:
                self.say(text)

    return Streamer
