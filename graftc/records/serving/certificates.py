"""The statements of `graftc serve-check` about a folder and an engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge

from graftc.records.fields import NeededOption
from graftc.specs.records.record import Record, stated

ServedForm = Literal["peft", "gguf-adapter", "model", "gguf-model", "onnx-generate"]


@dataclass(frozen=True)
class ServingProblem(Record):
    """One reason why an engine does not compute what a folder means."""

    kind: Literal["refused", "ignored", "wrong", "unverified"]
    """The engine's behaviour: it raises an error, leaves something out, computes something else, or is not known to
    compute what PEFT does."""

    place: str
    """A field of a config, a tensor, a module of the base, or a file."""

    reason: str
    """The problem, for people."""

    remedy: str
    """The remedy, for people; empty if none is known."""

    def __str__(self) -> str:
        return f"{self.reason}: {self.remedy}" if self.remedy else self.reason


@dataclass(frozen=True)
class ServedTensor(Record):
    """An engine's treatment of one tensor of an adapter."""

    name: str
    """Its name in the file, or the name that it would have there."""

    base: str | None
    """The tensor of the base that the engine adds it to; null if it adds it to none."""

    applied: bool
    """Whether the engine applies it as PEFT defines it."""

    reason: str
    """Why it does not, for people; empty if it does."""


@dataclass(frozen=True)
class ServedSite(Record):
    """One map of the base to which an engine adds ``scale * B A``."""

    site: str
    """The module's path in the base, or the tensor's name in a GGUF file."""

    rank: Annotated[int, Ge(1)]
    """The rank of the factors."""

    scale: float
    """The factor by which the engine multiplies the product."""

    defined: float
    """The factor that the adapter's config defines."""


@dataclass(frozen=True)
class ServingRun(Record):
    """The tokens of an engine, compared with those that graftc computes for the same base and adapter in float32."""

    version: str
    """The version of the engine that ran."""

    prompts: Annotated[int, Ge(1)]
    """The number of prompts."""

    tokens: Annotated[int, Ge(1)]
    """The number of tokens that were generated for each prompt, by greedy search."""

    equal: Annotated[int, Ge(0)]
    """The number of prompts whose tokens are all equal, up to the token with which graftc would end the text: asked for
    a number of tokens, engines continue it in different ways."""

    changed: Annotated[int, Ge(0)]
    """The number of prompts for which the adapter changes the compared tokens; without any, the run proves nothing. For
    a folder that is a whole model, those for which any token was compared."""

    first_difference: Annotated[int, Ge(0)] | None
    """The smallest position at which tokens differ; null if all are equal."""


@dataclass(frozen=True)
class ServingCertificate(Record):
    """An engine's treatment of a folder: the tensors that it applies, the scale of each site, and every problem."""

    engine: str
    """The engine's name."""

    read: str
    """The engine with the version, or the commit, whose source the statements follow."""

    read_on: str
    """The day on which that source was read."""

    form: ServedForm
    """The form of the folder."""

    base: str | None
    """The base that names, shapes and architecture were compared with; null if there is none, or none is needed."""

    tensors: tuple[ServedTensor, ...]
    """Every tensor of the adapter, and those that its config requires but its file lacks; empty for a whole model."""

    sites: tuple[ServedSite, ...]
    """Every map that the engine adapts; empty for a whole model."""

    problems: tuple[ServingProblem, ...]
    """Every reason against serving the folder with this engine."""

    needs: NeededOption

    run: ServingRun | None
    """The comparison with the engine itself; null if it was not run."""

    @stated
    def applied(self) -> int:
        """The number of tensors that the engine applies."""
        return sum(tensor.applied for tensor in self.tensors)

    @stated
    def total(self) -> int:
        """The number of tensors of the adapter, with those that its file lacks."""
        return len(self.tensors)

    @stated
    def passed(self) -> bool:
        """Whether there is no problem, and the run, if there was one, equals graftc's."""
        ran = self.run is None or (self.run.equal == self.run.prompts and self.run.changed > 0)
        return not self.problems and ran
