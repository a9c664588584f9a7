"""The training of PET's models: members of the ensemble, generations, and the final classifier."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from graftc.specs.base_model import SpecModel
from graftc.specs.document import Spec
from graftc.specs.limits import SIZE


def everything() -> Spec:
    """Return the document that trains every weight, like Schick & Schütze."""
    return Spec.model_validate({"adapt": [{"method": "full"}]})


class StepOptions(SpecModel):
    """Steps of AdamW, and what they read."""

    steps: int = Field(default=250, ge=1, le=10_000_000)
    """Steps of the optimiser."""

    batch_size: int = Field(default=4, ge=1, le=SIZE)
    """Rows of a step."""

    learning_rate: float = Field(default=1e-5, gt=0, le=1)
    """Learning rate after warm-up; from there it falls linearly to 0."""

    weight_decay: float = Field(default=0.01, ge=0, le=1)
    """Decoupled weight decay of matrices."""

    max_grad_norm: float = Field(default=1.0, ge=0)
    """The norm that gradients are scaled down to; 0 leaves them as they are."""

    warmup: float = Field(default=0.0, ge=0, lt=1)
    """Share of the steps in which the learning rate rises."""

    max_length: int = Field(default=256, ge=8, le=1_000_000)
    """Tokens of a text at most, its pattern and special tokens included. Fields of rows are cut, the longest first."""


class TrainingOptions(StepOptions):
    """How a member of the ensemble trains; the defaults are those of Schick & Schütze 2021."""

    auxiliary: float = Field(default=1e-4, ge=0, lt=1)
    """Weight of the language model's own loss on unlabelled rows, `loss = (1 - auxiliary) * cloze + auxiliary * lm`,
    which keeps it a language model. 0 turns it off."""

    unlabelled_ratio: int = Field(default=1, ge=1, le=100)
    """Batches of unlabelled rows for each batch of labelled ones, where `auxiliary` is on."""


class DistillationOptions(StepOptions):
    """How the final classifier trains."""

    steps: int = Field(default=5_000, ge=1, le=10_000_000)
    """Steps of the optimiser."""


class IpetOptions(SpecModel):
    """iPET: generations of members, each trained on what others of the generation before it labelled (Schick & Schütze
    2021).
    """

    generations: int = Field(default=3, ge=1, le=20)
    """Generations after the first one."""

    growth: float = Field(default=5.0, gt=1, le=1_000)
    """How much larger the training set of each generation is than that of the one before."""

    share: float = Field(default=0.25, gt=0, le=1)
    """Share of the other members that label the next training set of a member."""

    start_size: int = Field(default=10, ge=1, le=1_000_000)
    """Size of the first training set where no row is labelled."""


class ClassifierSpec(SpecModel):
    """The final model, which learns the ensemble's probabilities on unlabelled rows."""

    kind: Literal["sequence", "cloze"] = "sequence"
    """`sequence`: a classification head of transformers, as in the paper. `cloze`: the first pattern."""

    spec: Spec = Field(default_factory=everything)
    """A document of graftc that says what trains in it. Default: everything, by `adapt: [{method: full}]`."""

    temperature: float = Field(default=2.0, ge=0.01, le=100)
    """The divisor of logits on both sides of the distillation."""

    training: DistillationOptions = DistillationOptions()
    """How it trains."""
