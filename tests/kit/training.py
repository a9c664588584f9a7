"""Short trainings: optimisers, plain loops, and a Trainer whose batches come in order."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from graftc.testing.compare import inputs_for
from tests.kit.comparing import floats
from tests.kit.models import fresh


def adamw(model: nn.Module, lr: float = 1e-3, **settings: Any) -> torch.optim.AdamW:
    """Return AdamW for the parameters of a model that train."""
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, **settings)


def train(
    compiled: Any, optimiser: Any, steps: Iterable[int], *, extra: bool = True, after: bool = True, log: Any = None
) -> list[float]:
    """Train a classifier with three labels, and return the losses.

    Args:
        compiled: the model, which is put in train mode.
        optimiser: the optimiser of its parameters.
        steps: the numbers of the steps; each has a batch and a seed of its own.
        extra: whether the terms of objectives are added to the loss.
        after: whether `after_step` is called.
        log: a log of the training, which is told every loss.
    """
    compiled.train()
    losses = []
    for number in steps:
        torch.manual_seed(number)
        loss = compiled(**inputs_for(compiled, seed=number), labels=torch.arange(5) % 3).loss
        (loss + compiled.extra_loss() if extra else loss).backward()
        optimiser.step()
        if after:
            compiled.after_step()
        optimiser.zero_grad()
        if log is not None:
            log.step(loss=loss)
        losses.append(loss.item())
    return losses


def labelled_texts(count: int) -> list[dict[str, Tensor]]:
    """Return texts of one length, each with a label that its first token determines."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 100, (count, 8), generator=generator)
    return [{"input_ids": row, "attention_mask": torch.ones(8).long(), "labels": row[0] % 3} for row in ids]


def trainer_in_order(
    folder: Path, compiled: Any, data: Sequence[Any], *, callback: bool = True, **settings: Any
) -> Any:
    """Return a Trainer that takes the data in order and has a constant learning rate.

    Args:
        folder: the folder that it writes to.
        compiled: the model.
        data: the examples.
        callback: whether it has the model's callback.
        settings: further `TrainingArguments`.
    """
    from transformers import Trainer, TrainingArguments

    class InOrder(Trainer):
        loss_is_scaled_for_ga = False  # the class computes a mean by itself, but the Trainer takes it for scaled

        def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

    common = {"lr_scheduler_type": "constant", "save_strategy": "no", "use_cpu": True, "seed": 7}
    quiet = {"report_to": [], "disable_tqdm": True}
    args = TrainingArguments(str(folder), **{**common, **quiet, **settings})
    return InOrder(model=compiled, args=args, train_dataset=data, callbacks=[compiled.callback()] if callback else [])


def after_decay(model: nn.Module, *adapt: Mapping[str, Any]) -> tuple[Any, dict[str, nn.Parameter]]:
    """Return an adapted model after three steps of AdamW with weight decay, and its parameters as folded."""
    compiled = fresh(model, *adapt).train()
    optimiser = adamw(compiled, lr=1e-2, weight_decay=0.5)
    inputs = inputs_for(compiled)
    for _ in range(3):
        optimiser.zero_grad()
        torch.stack([leaf.square().sum() for leaf in floats(compiled(**inputs))]).sum().backward()
        optimiser.step()
    return compiled, dict(compiled.eval().merge().to_transformers().named_parameters())
