"""The contestants: a table of named entries, in which a method is one line, or two with its peer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

from torch import Tensor, nn

from benchmarks.train.models import Base, fill, shared_copy

__all__ = ["ENTRIES", "Aims", "Entry", "Live", "UnavailableError"]

Library = Literal["torch", "peft", "graftc"]
ROLES = ["attn.q", "attn.k", "attn.v", "attn.o", "ffn.gate", "ffn.up", "ffn.down"]
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
DROPOUT = 0.05


class UnavailableError(Exception):
    """Raised when an entry cannot run with what is installed; the message is the reason."""


@dataclass(frozen=True)
class Aims:
    """The figures that an entry should reach; None for those without an aim.

    Attributes:
        over_floor: the largest time over the floor's.
        over_peer: the largest time over the peer's.
        saved_of_peer: the most bytes saved for backward, over the peer's.
        peak_of_peer: the most bytes at the peak, over the peer's.
    """

    over_floor: float | None = None
    over_peer: float | None = None
    saved_of_peer: float | None = None
    peak_of_peer: float | None = None


@dataclass(frozen=True)
class Live:
    """A contestant that is ready to run.

    Attributes:
        model: the model that runs.
        loss: runs a forward pass and returns its loss.
        trained: the number of parameters that train.
    """

    model: nn.Module
    loss: Callable[[], Tensor]
    trained: int


@dataclass(frozen=True)
class Entry:
    """A line of the table.

    Attributes:
        name: the unique name of the entry.
        library: the library that it belongs to.
        make: adapts a base.
        peer: the name of the entry that it is compared with.
        aims: the figures that it should reach.
        exact: whether the loss must equal the peer's; false if random numbers are drawn.
    """

    name: str
    library: Library
    make: Callable[[Base], Live]
    peer: str | None = None
    aims: Aims = field(default_factory=Aims)
    exact: bool = False


def floor() -> Entry:
    """Build the entry of the frozen base: a forward pass, and the gradient of its input."""

    def make(base: Base) -> Live:
        model = shared_copy(base.model)
        return Live(model, lambda: model(**base.batch).loss, 0)

    return Entry("floor", "torch", make)


def peer(
    name: str,
    config: str,
    *,
    ranked: str | None = "r",
    checkpointed: bool = False,
    against: str | None = None,
    **options: Any,
) -> Entry:
    """Build an entry with a method of peft on all projections.

    Args:
        name: the name of the entry.
        config: the class of its config.
        ranked: the option that takes the rank; None if there is none.
        checkpointed: whether to recompute each layer's activations.
        against: the name of the entry that it is compared with.
        options: other options of the config.
    """

    def make(base: Base) -> Live:
        import peft

        rank = {} if ranked is None else {ranked: base.shape.rank}
        peft_config = getattr(peft, config)(target_modules=PROJECTIONS, task_type="CAUSAL_LM", **rank, **options)
        model = peft.get_peft_model(shared_copy(base.model), peft_config).train()
        # The forward of peft's wrapper only maps the task's inputs; that of AdaLoRA also adds its term to the loss.
        inner = model.base_model
        if checkpointed:
            inner.gradient_checkpointing_enable({"use_reentrant": False})
        return Live(model, lambda: inner(**base.batch).loss, fill(model))

    return Entry(name, "peft", make, against)


def ours(
    name: str,
    method: str,
    peer: str,
    aims: Aims,
    *,
    ranked: bool = True,
    exact: bool = True,
    document: Mapping[str, Any] = MappingProxyType({}),
    **options: Any,
) -> Entry:
    """Build an entry with a method of graftc on all projections.

    Args:
        name: the name of the entry.
        method: the tag of the method.
        peer: the name of the entry of peft that does the same.
        aims: the figures that it should reach.
        ranked: whether the method has a rank.
        exact: whether its tensors have the values of the peer's, so that the losses must be equal.
        document: the entries of the spec beside the adaptation.
        options: other fields of the adaptation.
    """

    def make(base: Base) -> Live:
        import graftc
        from graftc.specs.registry import method_specs

        if method not in method_specs():
            raise UnavailableError(f"graftc has no method {method!r}")
        rank = {"rank": base.shape.rank} if ranked else {}
        try:
            adapt = [{"method": method, "target": {"role": ROLES}, **rank, **options}]
            spec = graftc.load_spec({"adapt": adapt, **document})
        except graftc.GraftError as error:
            raise UnavailableError(str(error).splitlines()[0]) from error
        model = graftc.compile(spec, shared_copy(base.model), base.batch).train()
        objective = model.extra_loss().requires_grad

        def loss() -> Tensor:
            value: Tensor = model(**base.batch).loss
            return value + model.extra_loss() if objective else value

        return Live(model, loss, fill(model))

    return Entry(name, "graftc", make, peer, aims, exact=exact and not options.get("dropout"))


ENTRIES: tuple[Entry, ...] = (
    floor(),
    peer("peft LoRA", "LoraConfig", lora_alpha=16),
    ours(
        "graftc LoRA",
        "lora",
        "peft LoRA",
        Aims(over_floor=1.10, over_peer=1.05, saved_of_peer=0.73, peak_of_peer=0.85),
        alpha=16,
    ),
    peer("peft LoRA, dropout", "LoraConfig", lora_alpha=16, lora_dropout=DROPOUT),
    ours("graftc LoRA, dropout", "lora", "peft LoRA, dropout", Aims(over_floor=1.15), alpha=16, dropout=DROPOUT),
    peer("peft DoRA", "LoraConfig", lora_alpha=16, use_dora=True),
    ours("graftc DoRA", "dora", "peft DoRA", Aims(over_floor=1.15, saved_of_peer=0.45), alpha=16),
    peer("peft DoRA, dropout", "LoraConfig", lora_alpha=16, use_dora=True, lora_dropout=DROPOUT),
    ours(
        "graftc DoRA, dropout",
        "dora",
        "peft DoRA, dropout",
        Aims(over_peer=0.92, saved_of_peer=0.62),
        alpha=16,
        dropout=DROPOUT,
    ),
    ours(
        "graftc DoRA, dropout on the branch",
        "dora",
        "peft DoRA, dropout",
        Aims(over_floor=1.25),
        alpha=16,
        dropout=DROPOUT,
        dropout_on="branch",
    ),
    peer("peft IA3", "IA3Config", ranked=None, feedforward_modules=["down_proj"]),
    ours("graftc IA3", "ia3", "peft IA3", Aims(over_peer=0.95, saved_of_peer=0.75), ranked=False),
    peer("peft AdaLoRA", "AdaLoraConfig", ranked="init_r", lora_alpha=16, total_step=100, orth_reg_weight=0.5),
    ours(
        "graftc AdaLoRA",
        "adalora",
        "peft AdaLoRA",
        Aims(over_peer=0.95, saved_of_peer=0.75),
        alpha=16,
        orthogonality=0.5,
        target_rank=1,
    ),
    peer("peft VeRA", "VeraConfig"),
    ours("graftc VeRA", "vera", "peft VeRA", Aims(over_peer=1.05, saved_of_peer=1.05), exact=False),
    peer("peft LoHa", "LoHaConfig", alpha=16),
    ours("graftc LoHa", "loha", "peft LoHa", Aims(over_peer=1.05, saved_of_peer=1.05), exact=False, alpha=16),
    peer("peft LoKr", "LoKrConfig", alpha=16),
    ours("graftc LoKr", "lokr", "peft LoKr", Aims(over_peer=1.05, saved_of_peer=1.05), exact=False, alpha=16),
)
"""All entries, each next to its peer, since neighbours in a round run under the same load of the machine."""
