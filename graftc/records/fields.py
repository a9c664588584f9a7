"""Fields that several records have, each with its type and its documentation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal, TypeAlias

from annotated_types import Ge, Le
from pydantic import Field

from graftc.records.diagnostics import Diagnostic
from graftc.records.passes import PassRecord

Name: TypeAlias = Annotated[str, Field(description="Its name.")]
AdaptationName: TypeAlias = Annotated[str, Field(description="Name of the adaptation.")]
MethodTag: TypeAlias = Annotated[str, Field(description="Its method's tag.")]
SiteName: TypeAlias = Annotated[str, Field(description="The site.")]
Trainable: TypeAlias = Annotated[bool, Field(description="Whether it trains.")]
Seconds: TypeAlias = Annotated[float, Ge(0), Field(description="How long it took.")]
WRITTEN = Field(description="The files that were written.")
ArtifactFolder: TypeAlias = Annotated[str, Field(description="The artifact's folder.")]
DescribedFolder: TypeAlias = Annotated[str, Field(description="The folder that the card is about.")]
GivenModel: TypeAlias = Annotated[str, Field(description="The MODEL argument.")]
Recomputed: TypeAlias = Annotated[bool, Field(description="Whether layers are computed again in the backward pass.")]

NeededOption: TypeAlias = Annotated[
    str | None, Field(description="The option with which the engine has to be started; null if it needs none.")
]

KIND = Field(description="What kind of site it is.")
Layer: TypeAlias = Annotated[int | None, Ge(0), Field(description="Index of the layer; null outside the layers.")]
Stack: TypeAlias = Annotated[str, Field(description="Path of the list of layers; empty outside the layers.")]
OwningModule: TypeAlias = Annotated[str, Field(description="Path of the module that owns it.")]

GraphMode: TypeAlias = Annotated[Literal["train", "eval"], Field(description="Which graph.")]
PrintedName: TypeAlias = Annotated[str, Field(description="As printed.")]
PrintedLine: TypeAlias = Annotated[str, Field(description="Its printed line.")]
Module: TypeAlias = Annotated[str, Field(description="Path of the module that it belongs to.")]
InsertedFor: TypeAlias = Annotated[str, Field(description="The adaptation that inserted it; empty for the base's own.")]
INSERTED_BY = Field(description="That one's method.")
INSERTED_AS = Field(description="As what it was inserted.")

BaseParameters: TypeAlias = Annotated[
    int, Ge(0), Field(description="Elements of the base's parameters, tied ones once.")
]
TrainableParameters: TypeAlias = Annotated[
    int, Ge(0), Field(description="Elements that train in all adaptations, without the `train:` list.")
]
Percent: TypeAlias = Annotated[
    float,
    Ge(0),
    Le(100),
    Field(description="`trainable_parameters` as a percentage of base plus trainable parameters."),
]
Passes: TypeAlias = Annotated[
    tuple[PassRecord, ...],
    Field(description="Passes of plugins that the graphs went through, with the figures that they report."),
]
Warnings: TypeAlias = Annotated[tuple[Diagnostic, ...], Field(description="Warnings.")]

ModelClass: TypeAlias = Annotated[str, Field(description="Name of the model's class.")]
GivenSpec: TypeAlias = Annotated[str, Field(description="The SPEC argument.")]
BaseFingerprint: TypeAlias = Annotated[str, Field(description="Fingerprint of the base.")]
OwnerMethod: TypeAlias = Annotated[
    str, Field(description="Its method's tag; `full` for the `train:` list, `tokens` for new tokens.")
]
NothingWritten: TypeAlias = Annotated[bool, Field(description="Whether nothing was written.")]
WrittenArtifact: TypeAlias = Annotated[str | None, Field(description="The artifact's folder; null with `--dry-run`.")]
Unfolded: TypeAlias = Annotated[Mapping[str, str], Field(description="Adaptations that do not fold, with the reason.")]
FOLDS = Field(description="Evidence that the adaptations fold; null where that was not asked for or they do not.")
