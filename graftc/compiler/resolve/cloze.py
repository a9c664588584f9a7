"""Copy a language model and replace its forward, so that it classifies by filling blanks."""

from __future__ import annotations

import functools
import inspect
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graftc.compiler.capture.defaults import ROW_INPUTS
from graftc.compiler.capture.interface import config_of, is_transformers
from graftc.compiler.resolve.token_embeddings import looking_up, output_head
from graftc.compiler.resolve.untie import sharing_copy
from graftc.specs.errors.diagnostics import GraftError, Place
from graftc.specs.options.cloze import ClozeOptions

TOKEN_TARGETS = "token_targets"
"""The input for token labels in the model's own format; a call with this input returns the language model's own result
and loss. The name avoids "label" because trainers expect all inputs with "label" in their names in every evaluation."""

PATTERN = "pattern"
"""The input with the index of each row's verbalizer, ``int64[batch]``."""

_DECODERS = ("decoder_input_ids", "decoder_attention_mask", "decoder_inputs_embeds")


class Filling:
    """Mixin that makes a language model's class classify by filling blanks.

    Attributes:
        cloze: the blank, the decoder's tokens, and the words with their shares, as plain lists.
    """

    cloze: dict[str, Any]

    @classmethod
    def can_generate(cls) -> bool:
        """Return false, since the model classifies."""
        return False

    def fill(self, language_model: Any, given: dict[str, Any]) -> Any:
        """Return the classification of a call's texts, or the language model's own result.

        The result is transformers' ``SequenceClassifierOutput`` with ``logits[batch, labels]`` and, if ``labels`` are
        given (``int64[batch]``, or probabilities ``[batch, labels]``), the cross-entropy. With ``token_targets``, it is
        the language model's own result.

        Args:
            language_model: the forward of the model's own class.
            given: the call's arguments by name.
        """
        from transformers.modeling_outputs import SequenceClassifierOutput

        tokens, labels = given.pop(TOKEN_TARGETS, None), given.pop("labels", None)
        pattern, count = given.pop(PATTERN, None), given.pop("num_items_in_batch", None)
        given = {name: value for name, value in given.items() if value is not None}
        if tokens is not None and labels is not None:
            hint = "labels classify texts, token_targets tokens: call the model once with each"
            raise GraftError("GC031", "the call has both labels and token_targets", hint=hint)
        if tokens is not None:
            return language_model(**given, labels=tokens)
        places = self._places(given)
        if self.cloze["decoder"]:
            rows = given["input_ids"].shape[0]
            start = torch.tensor(self.cloze["decoder"], device=given["input_ids"].device)
            given["decoder_input_ids"] = start.unsqueeze(0).expand(rows, -1)
        logits = _logits_of(language_model(**given, return_dict=True))
        scores = self._scores(logits.gather(1, places.unsqueeze(-1).expand(-1, -1, logits.shape[-1])), pattern)
        if labels is None:
            return SequenceClassifierOutput(logits=scores)
        how = "mean" if count is None else "sum"
        loss = F.cross_entropy(scores.float(), labels, reduction=how)
        return SequenceClassifierOutput(loss=loss if count is None else loss / count, logits=scores)

    def _places(self, given: dict[str, Any]) -> Tensor:
        """Return the positions of the blanks, ``int64[batch, blanks]``.

        Rows with fewer blanks are padded with other positions.
        """
        ids: Tensor | None = given.get("input_ids")
        blank = self.cloze["blank"]
        if ids is None:
            raise GraftError("GC031", "blanks are located by token ids", hint="call the model with input_ids")
        if self.cloze["decoder"]:
            return ids.new_full((ids.shape[0], 1), len(self.cloze["decoder"]) - 1)
        length = ids.shape[1]
        numbers = torch.arange(length, device=ids.device).unsqueeze(0)
        if blank == "last":
            mask = given.get("attention_mask")
            last: Tensor = numbers.expand_as(ids) if mask is None else numbers * (mask != 0)
            return last.amax(1, keepdim=True)
        # Counted from the end, so that the first blank has the highest number.
        order, count = torch.where(ids == blank, 2 * length - numbers, length - numbers), self.cloze["blanks"]
        if count == 1:
            return order.argmax(1, keepdim=True)
        # A text may have fewer tokens than blanks, for example during capture.
        return F.pad(order, (0, count)).topk(count, dim=1).indices.clamp(max=length - 1)

    def _scores(self, logits: Tensor, pattern: Tensor | None) -> Tensor:
        """Return label logits, ``[batch, labels]``, from token logits at the blanks, ``[batch, blanks, tokens]``."""
        words = torch.tensor(self.cloze["words"], device=logits.device)
        shares = torch.tensor(self.cloze["shares"], dtype=logits.dtype, device=logits.device)
        if len(self.cloze["words"]) == 1:
            words, shares = words.expand(logits.shape[0], -1, -1), shares.expand(logits.shape[0], -1, -1)
        elif pattern is None or pattern.dim() != 1 or pattern.shape[0] != logits.shape[0]:
            several = len(self.cloze["words"])
            message = f"there are {several} verbalizers, but {PATTERN} does not choose one for every row"
            raise GraftError("GC031", message, hint=f"pass {PATTERN} as integers below {several}, of shape [batch]")
        else:
            words, shares = words.index_select(0, pattern), shares.index_select(0, pattern)
        scores = (logits.gather(2, words) * shares).sum(1)
        return scores.view(scores.shape[0], len(self.cloze["labels"]), -1).sum(-1)


def filling(model: nn.Module, options: ClozeOptions) -> nn.Module:
    """Return a copy of a language model that classifies by filling blanks and shares all storage with the model.

    The model is not changed.

    Raises:
        GraftError: GC170 for a model that is not a transformers language model or that lacks one of the tokens.
    """
    config = config_of(model)
    if config is None or not is_transformers(model) or output_head(model) is None:
        hint = "use a masked, causal or sequence-to-sequence transformers language model with its head"
        raise GraftError("GC170", f"{type(model).__name__} has no head over a vocabulary", place=_PLACE, hint=hint)
    _require_tokens(model, options)
    decodes = bool(getattr(config, "is_encoder_decoder", False))
    if options.decoder and not decodes:
        message = f"{type(model).__name__} has no separate decoder that could start with given tokens"
        hint = "set blank to the mask token or, for a model that generates from left to right, to last"
        raise GraftError("GC170", message, place=Place(path="cloze.decoder"), hint=hint)
    patched = next((name for name, module in model.named_modules() if "forward" in vars(module)), None)
    if patched is not None:  # the replacement uses the tensors of the model, not those of a copy
        message = f"forward of {patched or type(model).__name__} was replaced on the instance, so a copy cannot run it"
        raise GraftError("GC170", message, place=_PLACE, hint="override it in a subclass, or use a hook")
    classifier = sharing_copy(model)
    classifier.__class__ = _filling_class(cast("Any", type(model)), len(options.verbalizers) > 1, decodes)
    classifier.cloze = _plain(options)
    classifier.config.num_labels = len(options.labels)
    classifier.config.id2label = dict(enumerate(options.labels))
    classifier.config.label2id = {label: number for number, label in enumerate(options.labels)}
    return classifier  # type: ignore[no-any-return]


def not_filling(error: GraftError, model: nn.Module, options: ClozeOptions) -> GraftError:
    """Return the error to raise for a model that fails to run while filling blanks.

    This is GC170 if the model's decoder receives no input, and otherwise the original error.
    """
    if error.code != "GC030" or options.decoder or not getattr(config_of(model), "is_encoder_decoder", False):
        return error
    message = f"{type(model).__name__} cannot fill blanks in its input: its decoder receives no tokens"
    hint = "leave blank out, and set the decoder's first tokens, for T5 decoder: [pad token, first sentinel]"
    return GraftError("GC170", message, place=Place(path="cloze.blank"), hint=hint, details=[error.message])


_PLACE = Place(path="cloze")


def _require_tokens(model: Any, options: ClozeOptions) -> None:
    """Check that the model's embedding table contains all tokens.

    Raises:
        GraftError: GC170 for a token that it lacks.
    """
    weight = getattr(looking_up(model), "weight", None)
    if weight is None:
        return
    rows = weight.shape[0]
    named: list[tuple[str, int]] = [("blank", options.blank)] if isinstance(options.blank, int) else []
    named += [(f"decoder[{at}]", token) for at, token in enumerate(options.decoder)]
    named += [
        (f"verbalizers[{v}][{a}][{w}][{t}]", token)
        for v, verbalizer in enumerate(options.verbalizers)
        for a, words in enumerate(verbalizer)
        for w, word in enumerate(words)
        for t, token in enumerate(word)
    ]
    for path, token in named:
        if token >= rows:
            place, hint = Place(path=f"cloze.{path}"), "take the ids from this model's own tokenizer"
            raise GraftError("GC170", f"there is no token {token}: the model has {rows}", place=place, hint=hint)


def _plain(options: ClozeOptions) -> dict[str, Any]:
    """Return the options as plain values, with the words and shares as lists of equal size.

    For each pattern and blank, these lists contain one token from every word of every label, with the token's share of
    the label's logit; padding has a share of 0.
    """
    blanks, most = options.blanks, max(len(words) for verbalizer in options.verbalizers for words in verbalizer)
    tokens, shares = list[list[list[int]]](), list[list[list[float]]]()
    for verbalizer in options.verbalizers:
        length = len(verbalizer[0][0])
        filled = [(word, 1 / len(words)) for words in verbalizer for word in (*words, *[()] * (most - len(words)))]
        tokens.append([[w[at] if w and at < length else 0 for w, _ in filled] for at in range(blanks)])
        shares.append([[share if w and at < length else 0.0 for w, share in filled] for at in range(blanks)])
    return {
        "blank": options.blank,
        "decoder": list(options.decoder),
        "labels": list(options.labels),
        "blanks": blanks,
        "words": tokens,
        "shares": shares,
    }


@functools.lru_cache
def _filling_class(cls: type[nn.Module], several: bool, decodes: bool) -> type[nn.Module]:
    """Return a subclass of a model's class, with the same name, whose forward is that of `Filling`."""
    signature = inspect.signature(cls.forward)
    kept = [p for p in signature.parameters.values() if not (decodes and p.name in _DECODERS)]
    rest = [p for p in kept if p.kind is inspect.Parameter.VAR_KEYWORD]
    kind = inspect.Parameter.KEYWORD_ONLY
    new = [inspect.Parameter(n, kind, default=None) for n in (TOKEN_TARGETS, *([PATTERN] if several else []))]
    # Annotations are dropped, because the capture cache would have to know everything that they name.
    plain = [p.replace(annotation=inspect.Parameter.empty) for p in [*(p for p in kept if p not in rest), *new, *rest]]
    signature = inspect.Signature(plain)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(self, *args, **kwargs).arguments
        given = {name: value for name, value in bound.items() if name not in ("self", *(p.name for p in rest))}
        for each in rest:
            given |= bound.get(each.name, {})
        return self.fill(functools.partial(cls.forward, self), given)

    forward.__signature__ = signature  # type: ignore[attr-defined]
    forward.__doc__ = Filling.fill.__doc__
    namespace = {"forward": forward, ROW_INPUTS: (PATTERN,) if several else ()}
    return type(cls.__name__, (Filling, cls), {**namespace, "__module__": __name__, "__doc__": cls.__doc__})


def _logits_of(outputs: Any) -> Tensor:
    """Return the logits over the vocabulary, ``[batch, sequence, vocabulary]``."""
    logits = getattr(outputs, "logits", None)
    if not isinstance(logits, Tensor) or logits.dim() != 3:
        raise ValueError("the model does not return token logits of shape [batch, sequence, vocabulary]")
    return logits
