"""The contestants: each entry adapts a base model and can take whole training steps."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.train.contestants import PROJECTIONS, ROLES, Library
from benchmarks.train.models import TINY, Base, Shape, base, fill, shared_copy

__all__ = ["CYCLE", "ENTRIES", "FULL_SHAPE", "LORA", "TINY_SHAPE", "WINDOW", "Entry", "Training", "base_in"]

FULL_SHAPE = Shape(width=768, intermediate=2048, layers=8, heads=12, vocabulary=4096, batch=4, length=128, rank=64)
"""The sizes for the figures. The vocabulary is small, so that the head does not dominate."""

TINY_SHAPE = replace(TINY, layers=2)
"""Tiny sizes to try the harness."""

CYCLE = 20
"""The number of steps from one replacement of entries of a sparse delta to the next (S)."""

WINDOW = 5
"""The number of steps at the start of a cycle that gather gradients; entries are replaced after the last of them."""

LORA = "peft LoRA"
"""The name of the entry that others are compared with."""

RATE = 1e-4


@dataclass(frozen=True)
class Training:
    """An entry that is ready to train.

    Attributes:
        model: the model that runs, in train mode.
        loss: runs a forward pass and returns its loss.
        optimiser: the optimiser of the trained parameters; None if nothing trains.
        after: called after each step of the optimiser; None if the method needs no such call.
    """

    model: nn.Module
    loss: Callable[[], Tensor]
    optimiser: torch.optim.Optimizer | None = None
    after: Callable[[], None] | None = None

    @property
    def trained(self) -> list[nn.Parameter]:
        """The parameters that train."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def clear(self) -> None:
        """Free the gradients."""
        if self.optimiser is not None:
            self.optimiser.zero_grad(set_to_none=True)

    def step(self) -> None:
        """Run a whole training step, which starts by freeing the gradients of the last one."""
        self.clear()
        self.advance()

    def advance(self) -> None:
        """Run the rest of a training step after `clear`."""
        loss = self.loss()
        torch.autograd.backward(loss)
        del loss
        if self.optimiser is not None:
            self.optimiser.step()
        if self.after is not None:
            self.after()


@dataclass(frozen=True)
class Entry:
    """A line of the tables.

    Attributes:
        name: the unique name of the entry.
        library: the library that it belongs to.
        make: adapts a base, with or without activation checkpointing.
        dtypes: the dtypes of the bases that it runs on; None for all.
        exact: whether its first loss must equal that of peft's LoRA in float32.
    """

    name: str
    library: Library
    make: Callable[[Base, bool], Training]
    dtypes: tuple[str, ...] | None = None
    exact: bool = False

    @property
    def peer(self) -> str | None:
        """The name of the entry that it is compared with."""
        return None if self.name == LORA else LORA


def base_in(shape: Shape, dtype: str, device: str = "cpu") -> Base:
    """Return the base model with its parameters in a dtype; the buffers of rotary positions stay in float32."""
    original = base(shape)
    wanted: torch.dtype = getattr(torch, dtype)
    for parameter in original.model.parameters():
        parameter.data = parameter.data.to(wanted)
    embeddings = original.embeddings.detach().to(device, wanted).requires_grad_()
    return Base(shape, original.model.to(device), embeddings, original.labels.to(device))


def _texts(base: Base) -> dict[str, Tensor]:
    return {"input_ids": base.labels, "labels": base.labels}


def _checkpointed(model: Any, checkpointing: bool) -> Any:
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def _floor(base: Base, checkpointing: bool) -> Training:
    """Run the frozen base: a forward pass, and a backward pass to the embeddings."""
    model = _checkpointed(shared_copy(base.model), checkpointing)
    inputs = base.batch

    def loss() -> Tensor:
        inputs["inputs_embeds"].grad = None
        value: Tensor = model(**inputs).loss
        return value

    return Training(model, loss)


def _full(base: Base, checkpointing: bool) -> Training:
    """Train all parameters of a copy, since others share the base."""
    model = _checkpointed(copy.deepcopy(base.model), checkpointing).requires_grad_(True)
    inputs = _texts(base)
    return Training(model, lambda: model(**inputs).loss, torch.optim.AdamW(model.parameters(), lr=RATE))


def _peft(**options: Any) -> Callable[[Base, bool], Training]:
    def make(base: Base, checkpointing: bool) -> Training:
        import peft

        rank = base.shape.rank
        config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=PROJECTIONS, task_type="CAUSAL_LM")
        model = peft.get_peft_model(_checkpointed(shared_copy(base.model), checkpointing), config, **options).train()
        fill(model)
        inputs = _texts(base)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        # The forward of peft's wrapper only maps the task's inputs.
        inner = model.base_model
        return Training(model, lambda: inner(**inputs).loss, torch.optim.AdamW(trained, lr=RATE))

    return make


def _compiled(base: Base, checkpointing: bool, **adaptation: Any) -> Any:
    """Compile a method of graftc on all projections."""
    import graftc

    spec: dict[str, Any] = {"adapt": [{"target": {"role": ROLES}, **adaptation}]}
    if checkpointing:
        spec["checkpoint"] = "layers"
    return graftc.compile(spec, shared_copy(base.model), _texts(base)).train()


def _lora(base: Base, checkpointing: bool) -> Training:
    rank = base.shape.rank
    model = _compiled(base, checkpointing, method="lora", rank=rank, alpha=rank)
    fill(model)
    inputs = _texts(base)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return Training(model, lambda: model(**inputs).loss, torch.optim.AdamW(trained, lr=RATE))


def _sparse(variant: str, optimiser: str) -> Callable[[Base, bool], Training]:
    def make(base: Base, checkpointing: bool) -> Training:
        import graftc

        rank, steps = base.shape.rank, 50 * CYCLE
        model = _compiled(base, checkpointing, method="spiel", variant=variant, equivalent_rank=rank, total_steps=steps)

        inputs = _texts(base)
        instance = getattr(graftc.optim, optimiser)(model, lr=RATE)
        return Training(model, lambda: model(**inputs).loss, instance, model.after_step)

    return make


ENTRIES: tuple[Entry, ...] = (
    Entry("floor", "torch", _floor),
    Entry("full", "torch", _full),
    Entry(LORA, "peft", _peft()),
    Entry("graftc LoRA", "graftc", _lora, exact=True),
    Entry(f"{LORA}, bfloat16", "peft", _peft(autocast_adapter_dtype=False), dtypes=("bfloat16",)),
    Entry("graftc SpIEL-AG", "graftc", _sparse("AG", "AgedAdamW")),
    Entry("graftc SpIEL-MA", "graftc", _sparse("MA", "SM3")),
)
"""All entries, in the order of their turns in a round."""

PAPER: Mapping[str, Mapping[bool, tuple[float, float]]] = {
    "graftc SpIEL-MA": {False: (0.75, 1.0), True: (0.94, 0.98)},
    "graftc SpIEL-AG": {False: (0.85, 1.1), True: (1.11, 1.05)},
}
"""Memory and time of a step over LoRA's in Ansell et al. 2024 (7B, on an A100), without and with checkpointing."""
