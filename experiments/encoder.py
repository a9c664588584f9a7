"""The encoder of the experiments with a head on the mean of its last hidden states, as MiniLM's own embeddings are."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertModel, BertPreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from graftc.applications.demo.data import find_model
from graftc.runtime.sources.models import quiet_transformers
from graftc.testing.families import tiny


class MeanClassifier(BertPreTrainedModel):  # type: ignore[no-untyped-call]
    """BERT with a linear head on the mean of the real tokens' last hidden states.

    With one label, the loss is the mean squared error, otherwise the cross-entropy.
    """

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.bert = BertModel(config, add_pooling_layer=False)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()  # type: ignore[no-untyped-call]

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> SequenceClassifierOutput:
        """Return logits ``[batch, labels]`` and, with labels (int64 ``[batch]`` or float ``[batch, 1]``), a loss."""
        outputs = self.bert(input_ids=input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds)
        hidden: Tensor = outputs.last_hidden_state
        assert attention_mask is not None
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
        logits = self.classifier((hidden * mask).sum(1) / mask.sum(1))
        loss = None
        if labels is not None:
            regression = self.config.num_labels == 1
            loss = nn.functional.mse_loss(logits, labels) if regression else nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


def encoder_of(name: str, outputs: int, seed: int) -> MeanClassifier:
    """Return ``minilm`` or ``tiny-bert`` with a head that is drawn from the seed."""
    torch.manual_seed(seed)
    if name == "tiny-bert":
        config: Any = tiny("bert").config
        config.num_labels = outputs
        return MeanClassifier(config)
    with quiet_transformers():
        model: MeanClassifier = MeanClassifier.from_pretrained(find_model(), num_labels=outputs)
        return model
