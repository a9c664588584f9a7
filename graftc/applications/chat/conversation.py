"""Conversations: their messages, and the cache of keys and values computed for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from graftc.applications.chat.answering import Message, answer, prompt_ids
from graftc.applications.chat.opening import TextModel
from graftc.records.applications.answers import Answer, Settings


class Conversation:
    """A chat with a model that has a chat template.

    Args:
        model: the model that answers.
        settings: how to generate.
        system: the system message that opens the conversation; none by default.

    Raises:
        GraftError: GC147 if the tokenizer has no chat template, or if its template rejects a system message.
    """

    def __init__(self, model: TextModel, settings: Settings, system: str | None = None) -> None:
        self._model, self._settings = model, settings
        self._begin: list[Message] = [] if system is None else [{"role": "system", "content": system}]
        self.messages: list[Message] = [*self._begin]
        self._kept = _Kept(model) if settings.use_cache and (settings.num_beams or 1) == 1 else None
        prompt_ids(model, [*self._begin, {"role": "user", "content": "a"}])

    def say(
        self, text: str, hear: Callable[[str], None] = lambda _: None, stopped: Callable[[], bool] = lambda: False
    ) -> Answer:
        """Add the user's message and the model's answer to the conversation, and return the answer.

        An answer that was stopped is added as well.

        Args:
            text: the user's message.
            hear: a callback that receives the answer piece by piece.
            stopped: a function that is called after every token and returns whether to stop.

        Raises:
            GraftError: as for `graftc.applications.chat.answering.answer`; the conversation is then unchanged.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        ids = prompt_ids(self._model, messages)
        past, cached = (None, 0) if self._kept is None else self._kept.before(ids)
        try:
            reply = answer(self._model, ids, self._settings, say=hear, stopped=stopped, past=past, cached=cached)
        except BaseException:
            self._forget()
            raise
        if self._kept is not None:
            self._kept.after([*ids[0].tolist(), *reply.ids])
        self.messages = [*messages, {"role": "assistant", "content": reply.text}]
        return reply

    def reset(self) -> None:
        """Remove all messages except the system message."""
        self.messages = [*self._begin]
        self._forget()

    def _forget(self) -> None:
        if self._kept is not None:
            self._kept.forget()


class _Kept:
    """A cache of keys and values, reused for the tokens that a new prompt shares with the previous text."""

    def __init__(self, model: TextModel) -> None:
        self._model = model
        self._ids: list[int] = []
        self._cache: Any = None

    def before(self, ids: Tensor) -> tuple[Any, int]:
        """Return a cache for a prompt, and the number of leading prompt tokens that it contains.

        The cache is None if tokens cannot be removed from the model's cache.
        """
        wanted = ids[0].tolist()
        same = next((i for i, (a, b) in enumerate(zip(self._ids, wanted, strict=False)) if a != b), None)
        common = min(len(self._ids), len(wanted)) if same is None else same
        common = min(common, len(wanted) - 1)  # at least one token has to be computed
        if self._cache is None or common < 1:
            self._cache, self._ids = _fresh(self._model), []
            return self._cache, 0
        if common < len(self._ids):
            self._cache.crop(common - len(self._ids))
        return self._cache, common

    def after(self, ids: list[int]) -> None:
        """Record that the cache contains all tokens of a text except the last one.

        A cache of any other length does not match the text and is dropped.
        """
        if self._cache is not None and self._cache.get_seq_length() == len(ids) - 1:
            self._ids = ids[:-1]
        else:
            self.forget()

    def forget(self) -> None:
        """Drop the cache."""
        self._cache, self._ids = None, []


def _fresh(model: TextModel) -> Any:
    """Return an empty cache in which every layer keeps all tokens; None if the model's own cache works differently."""
    from transformers.cache_utils import DynamicCache, DynamicLayer

    if model.has_encoder or model.cache_name is None:
        return None
    own = DynamicCache(config=model.text_config)
    return DynamicCache() if all(type(layer) is DynamicLayer for layer in own.layers) else None
