"""How much attention goes to special tokens (Yang et al. 2023, PASTA, section 3)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import SequenceClassifierOutput

from experiments.encoder import MeanClassifier, encoder_of
from experiments.probing import chosen_by, encoded_texts, fitted, scores
from experiments.tasks import task_of
from graftc.applications.demo.data import Encoded

TEXTS = 64
"""Test texts that attention is measured on."""


class AttentiveClassifier(MeanClassifier):  # type: ignore[no-untyped-call]
    """The classifier, whose outputs have the attention of every layer as well."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> SequenceClassifierOutput:
        """Return logits, a loss, and attention ``[batch, heads, tokens, tokens]`` by layer."""
        assert attention_mask is not None
        outputs = self.bert(
            input_ids=input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds, output_attentions=True
        )
        mask = attention_mask.unsqueeze(-1).to(outputs.last_hidden_state.dtype)
        logits = self.classifier((outputs.last_hidden_state * mask).sum(1) / mask.sum(1))
        entropy = None if labels is None else torch.nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=entropy, logits=logits, attentions=outputs.attentions)


def figures(cell: Mapping[str, Any]) -> dict[str, Any]:
    """Return the figures of a cell.

    Every head of a layer gives a share of its attention to the special tokens, the first and the last of a text: the
    mean over the texts and their tokens. ``share`` is the largest of a layer's heads, the mean over the layers;
    ``least`` is that of the layer where it is smallest; ``even`` is the share if every token got as much as any other.

    Args:
        cell: as for `experiments.classifying.figures`; without a spec the model is measured as it is.
    """
    settings, seed = cell["settings"], cell["seed"]
    task = task_of(settings, seed)
    texts, validation, test = encoded_texts(cell, task)
    plain = encoder_of(cell["model"], task.outputs, seed)
    plain.set_attn_implementation("eager")
    base = AttentiveClassifier(plain.config)
    base.load_state_dict(plain.state_dict())
    if settings["spec"] is None:
        return _shares(base.eval(), test)  # type: ignore[no-untyped-call]
    compiled = fitted(cell, base, texts)
    return {
        **_shares(compiled.eval(), test),
        "test": scores(compiled, test, task.outputs)[0],
        **chosen_by(compiled, validation, task.outputs),
    }


def _shares(model: Any, data: Encoded) -> dict[str, float]:
    batch = data.collate(range(min(TEXTS, len(data))), labels=False)
    with torch.no_grad():
        attentions = model(**batch).attentions
    heads = torch.stack([shares(layer, batch["attention_mask"]) for layer in attentions])
    largest = heads.max(dim=1).values
    lengths = batch["attention_mask"].sum(1).double()
    return {"share": float(largest.mean()), "least": float(largest.min()), "even": float((2 / lengths).mean())}


def shares(attention: Tensor, mask: Tensor) -> Tensor:
    """Return the share of each head's attention that goes to the first and the last token of a text.

    Args:
        attention: ``[batch, heads, tokens, tokens]``; a row is that of the token that attends.
        mask: int64 ``[batch, tokens]``, 1 for tokens, padded on the right.

    Returns:
        float64 ``[heads]``, the mean over the texts of the means over their tokens.
    """
    attention, real = attention.double(), mask.double()
    special = torch.zeros_like(real)
    special[:, 0] = 1
    special.scatter_(1, mask.sum(1, keepdim=True) - 1, 1.0)
    to_special = (attention * special[:, None, None, :]).sum(-1)
    return ((to_special * real[:, None, :]).sum(-1) / real.sum(1)[:, None]).mean(0)
