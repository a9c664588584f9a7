"""Determine where a language model fills blanks, by running it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from graftc.applications.pet.blank_tokenizer import BlankKind, has_sentinel
from graftc.compiler.resolve.untie import sharing_copy


def blank_kind(model: nn.Module, tokenizer: Any) -> BlankKind | None:
    """Return the kind of blank that a model fills; None if the model does not run on tokens alone.

    The blank is the mask token if tokens attend to later tokens, and otherwise the position after the text. For
    encoder-decoders, it is the sentinel if the tokenizer has one, and otherwise the mask token.

    Args:
        model: a transformers language model.
        tokenizer: the model's tokenizer.
    """
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return "sentinel" if has_sentinel(tokenizer) else "mask"
    ahead = reads_ahead(model)
    return None if ahead is None else "mask" if ahead else "last"


def reads_ahead(model: nn.Module) -> bool | None:
    """Return whether the logits of a token depend on the token after it.

    The result is None if the model does not run on tokens alone, or its logits are not finite or not three-dimensional.
    The tokenizer does not reveal this: even a model that generates from left to right may have a mask token. The model
    is run once, on two texts of three tokens.

    Args:
        model: a model that returns ``logits[batch, sequence, vocabulary]``; it is not changed.
    """
    copied = sharing_copy(model).eval()
    try:
        rows, device = copied.get_input_embeddings().weight.shape[0], next(copied.parameters()).device
        padding = getattr(copied.config, "pad_token_id", None)
        plain = [token for token in range(rows) if token != padding][-4:]
        ids = torch.tensor([plain[:3], [plain[0], plain[3], plain[2]]], device=device)
        with torch.no_grad():
            logits = copied(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.float()
    except Exception:  # compiling the model reports the error
        return None
    if logits.dim() != 3 or not bool(logits.isfinite().all()):
        return None
    one, other = logits[:, 0]
    # Summation in a different order changes logits by less than this, a different token by more.
    return bool((one - other).abs().max() > 1e-5 * one.abs().max())
