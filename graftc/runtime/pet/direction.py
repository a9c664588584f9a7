"""Where a language model fills blanks: found out by running it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from graftc.compiler.resolve.untie import sharing_copy
from graftc.runtime.pet.blanks import BlankKind, has_sentinel

__all__ = ["blank_kind", "reads_ahead"]


def blank_kind(model: nn.Module, tokenizer: Any) -> BlankKind | None:
    """What a blank is for a model: the mask token where tokens see those behind them, or else what comes after the
    text; for encoder-decoders the sentinel, where the tokenizer has one. None where the model does not run on tokens
    alone.

    Args:
        model: a language model of transformers.
        tokenizer: its own.
    """
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return "sentinel" if has_sentinel(tokenizer) else "mask"
    ahead = reads_ahead(model)
    return None if ahead is None else "mask" if ahead else "last"


def reads_ahead(model: nn.Module) -> bool | None:
    """Whether the logits of a token depend on the token behind it; None where the model does not run on tokens alone,
    or gives no numbers.

    A tokenizer does not tell: that of a model which writes from left to right may have a mask token. The model is run
    once, on two texts of three tokens.

    Args:
        model: gives ``logits[batch, sequence, vocabulary]``; it is not changed.
    """
    own = sharing_copy(model).eval()
    try:
        rows, device = own.get_input_embeddings().weight.shape[0], next(own.parameters()).device
        padding = getattr(own.config, "pad_token_id", None)
        plain = [token for token in range(rows) if token != padding][-4:]
        ids = torch.tensor([plain[:3], [plain[0], plain[3], plain[2]]], device=device)
        with torch.no_grad():
            logits = own(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.float()
    except Exception:  # compiling says what is wrong
        return None
    if logits.dim() != 3 or not bool(logits.isfinite().all()):
        return None
    one, other = logits[:, 0]
    # The same sums in another order differ by less, other tokens by more.
    return bool((one - other).abs().max() > 1e-5 * one.abs().max())
