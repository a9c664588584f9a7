"""The base class of the results of commands, and the parts that several of them share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from graftc.specs.base_model import Items
from graftc.specs.errors.text import encodable

__all__ = [
    "AdaptationData",
    "CertificateData",
    "CollapseEvidenceData",
    "CostData",
    "DiagnosticData",
    "ErrorResult",
    "FileData",
    "ReportData",
    "Result",
    "RetentionData",
    "Runs",
    "SiteEvidenceData",
    "TotalsData",
]

Runs = Sequence[Annotated[Sequence[int], Field(min_length=2, max_length=2), AfterValidator(tuple)]]
"""Half-open runs of rows, each given by its first row and the row after its last one."""


class Result(BaseModel):
    """Base of what commands print with ``--json``: closed and strict, so that the output keeps to its schema.

    Raises:
        ValidationError: a value is not what the schema promises, which is a bug of the command.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        populate_by_name=True,
    )

    @classmethod
    def model_validate(cls, obj: Any, **kwargs: Any) -> Self:
        """Validate like pydantic; file names that are not UTF-8 are escaped."""
        return super().model_validate(encodable(obj), **kwargs)

    def to_json(self) -> dict[str, Any]:
        """Return plain data, in the order of the fields."""
        return self.model_dump(mode="json", by_alias=True)


class DiagnosticData(Result):
    """A failure, or a warning: what works but deserves a look."""

    code: str = Field(pattern="^GC[0-9]{3}$")
    """The stable code."""

    title: str
    """What the code stands for."""

    message: str
    """What is wrong, in one sentence."""

    file: str | None
    """The file that is wrong; null where none is."""

    line: int | None = Field(ge=1)
    """Its line, from 1."""

    column: int | None = Field(ge=1)
    """The column in it, from 1."""

    path: str
    """The place in the spec, such as `adapt[0].target.role`; empty where there is none."""

    hint: str | None
    """What to try."""

    corrected: str | None
    """The whole line, corrected, where that can be guessed."""

    details: Items[str | DiagnosticData]
    """Further facts as text, and further failures found in the same go."""

    exit_code: int = Field(ge=0, le=3)
    """The exit status: 1 the answer is no, 2 a usage or spec error, 3 the files or the model failed; 0 for warnings."""


class ErrorResult(Result):
    """What every command prints when it fails."""

    error: DiagnosticData
    """The failure."""


class FileData(Result):
    """A file that was written, or would be."""

    path: str
    """Where it is, `out` included."""

    bytes: int = Field(ge=0)
    """Its size."""


class CostData(Result):
    """What an adaptation adds."""

    sites: int = Field(ge=0)
    """How many sites are adapted."""

    trainable_parameters: int = Field(ge=0)
    """Elements that train."""

    frozen_parameters: int = Field(ge=0)
    """Elements that are added and do not train."""

    bytes: int = Field(ge=0)
    """Size of all tensors that are added."""

    flops_per_token: float = Field(ge=0)
    """What a forward pass in eval mode costs more for one token, two per multiply-add."""


class AdaptationData(CostData):
    """One adaptation's cost; the `train:` list and new tokens are entries too."""

    name: str
    """Its name."""

    method: str
    """Its method's tag; `full` for the `train:` list, `tokens` for new tokens."""


class TotalsData(CostData):
    """Sums over all adaptations, the `train:` list included."""


class AnchorData(Result):
    """How a base graph compares with the source model itself, run on the same inputs."""

    inputs: str
    """What both were called with: names of tensors, and flags."""

    mode: Literal["train", "eval"]
    """The mode of both."""

    difference: float | None = Field(ge=0)
    """The largest difference of any output or updated buffer, over its largest element; null where it was not looked
    at."""

    bound: float = Field(ge=0)
    """What `difference` may be where kernels are others."""

    exact: bool
    """Whether all are equal to the bit."""

    skipped: str
    """Why it was not looked at; empty where it was."""


class TimedAnchorData(AnchorData):
    """The same, with its cost."""

    seconds: float = Field(ge=0)
    """How long it took."""


class CompileStepData(Result):
    """A step of compiling."""

    name: str
    """Its name, as in the history of a graph."""

    seconds: float = Field(ge=0)
    """How long all its runs took."""


class PassFigureData(Result):
    """A figure that a pass of a plugin reports."""

    name: str
    """What it is."""

    site: str
    """The place that it is of; empty where it is of the whole model."""

    layer: int | None = Field(ge=0)
    """Index of the place's layer; null outside of the layers."""

    stack: str
    """Path of the list of layers; empty outside of them."""

    value: float
    """The number."""


class StackData(Result):
    """A stack of repeated layers."""

    stack: str
    """Path of the list that holds them."""

    layers: int = Field(ge=1)
    """How many."""

    parameters: int = Field(ge=0)
    """Elements of what they hold, tied tensors once."""

    level: Literal["graph", "layers", "modules", "none"]
    """How much of them is a graph: a part of the model's one graph, each layer, single maps, nothing."""

    reason: str
    """What is in the way of the next level, with the line of code where that is known; empty where nothing is."""


class PassData(Result):
    """A pass of a plugin that the graphs went through."""

    pipeline: str
    """The pipeline that it was added to: `adapt` or `eval`."""

    name: str
    """Its name, as in the history of a graph."""

    distribution: str
    """The package that brings it."""

    version: str
    """The package's version."""

    rewrites: bool
    """Whether it may change graphs."""

    figures: Items[PassFigureData]
    """What it reports of the graphs of the first signature."""


class ReportData(Result):
    """What a spec adds to a model."""

    adaptations: Items[AdaptationData]
    """One entry for each adaptation, the `train:` list last."""

    base_parameters: int = Field(ge=0)
    """Elements of the base's parameters, tied ones once."""

    trainable_parameters: int = Field(ge=0)
    """Elements that train in all adaptations, without the `train:` list."""

    trained_in_full: int = Field(ge=0)
    """Elements of the modules in the `train:` list."""

    deployed_parameters: int = Field(ge=0)
    """What has to ship beside the base if nothing is folded; of experts that are averaged, one."""

    percent: float = Field(ge=0, le=100)
    """`trainable_parameters` as a percentage of base plus trainable parameters."""

    flops_per_token: float = Field(ge=0)
    """What a forward pass of the base costs for one token, two per multiply-add."""

    capture_seconds: float = Field(ge=0)
    """How long capturing the model took."""

    rewrite_seconds: float = Field(ge=0)
    """How long rewriting its graphs took."""

    cached: bool
    """Whether the captured graphs came from the cache."""

    notes: Items[str]
    """What was done to the model so that it could be captured, and what could not be looked at, for people."""

    anchors: Items[TimedAnchorData]
    """The source model's graphs held against the model itself, in each mode."""

    steps: Items[CompileStepData]
    """How long each step of compiling took, in the order in which they began."""

    passes: Items[PassData]
    """Passes of plugins that the graphs went through, with the figures that they report."""

    stacks: Items[StackData]
    """How much of each stack of layers is a graph."""


class RetentionData(Result):
    """What rounding to the deployed type left of an update: `u` is the exact one, `v` the one that was applied."""

    norm: float
    """`<u, v> / <u, u>`: 1 where all of it is there, 0 where nothing is."""

    error: float = Field(ge=0)
    """`|v - u| / |u|`: how far what was applied is from the update."""

    entries: float = Field(ge=0, le=1)
    """Share of the entries that the update changes in which a change is left."""


class SiteEvidenceData(Result):
    """What probing showed at one site."""

    site: str
    """The site, or the tensor's name."""

    adaptations: Items[str]
    """Names of the adaptations that fold there."""

    change: float = Field(ge=0)
    """Largest change of the site's output by the adaptations: 0 would make the comparison vacuous."""

    algebra: float = Field(ge=0)
    """Largest difference of unfolded and folded output in float64, over the largest output."""

    rounding: float = Field(ge=0)
    """Largest distance of a folded element from its float64 value, in units in the last place."""

    retention: RetentionData | None
    """What rounding left of the update there; null where the update is zero."""


class CollapseEvidenceData(Result):
    """How far an adaptation's deployed form is from what it was in training, at one site."""

    adaptation: str
    """Name of the adaptation."""

    site: str
    """The site."""

    routings: int = Field(ge=1)
    """How many ways there are to draw its routes; all were run."""

    error: float = Field(ge=0)
    """Largest difference in float64 between the mean of all of them and the deployed form, over the largest change that
    this makes."""


class PackingEvidenceData(Result):
    """What packing a folded weight again does to it, at one site."""

    site: str
    """The site."""

    tensor: str
    """The weight."""

    packing: str
    """Its packing, such as `nf4 group=64`."""

    error: float = Field(ge=0)
    """Root of the mean square of the error over that of the folded values, of the site's rows."""

    largest: float = Field(ge=0)
    """The largest error over the largest absolute folded value, of the site's rows."""

    rows: int = Field(ge=0)
    """How many rows of the whole weight the fold does not change."""

    disturbed: int = Field(ge=0)
    """In how many of these packing changes a value."""


class RouteEvidenceData(Result):
    """How often a folded model would have chosen differently at one place, such as a router."""

    choice: str
    """The node of the base's graph that chooses."""

    module: str
    """The module that it is in."""

    choices: int = Field(ge=0)
    """How many choices were compared: one for each token, for example."""

    flips: int = Field(ge=0)
    """How many of them differed."""

    gap: float | None = Field(ge=0)
    """The largest difference between scores that were swapped; null where their numbers differ."""

    noise: float = Field(ge=0)
    """How far scores move by rounding."""

    bound: float = Field(ge=0)
    """What `gap` may be."""

    passed: bool
    """Whether rounding explains the choices that were others."""


class CertificateData(Result):
    """The evidence for a fold."""

    passed: bool
    """Whether all of it holds."""

    sites: Items[SiteEvidenceData]
    """Evidence for each site."""

    outputs: Mapping[str, float]
    """Largest absolute difference of each output, folded against unfolded, in the model's dtype; none where the whole
    model was not run."""

    budget: float | None = Field(ge=0)
    """What outputs may differ by; null where none were compared."""

    structure: str
    """Hash of the folded graph."""

    base_structure: str
    """Hash of the base's graph; the two are equal where folding left nothing behind."""

    additions: Items[str]
    """Biases that folding had to add."""

    fingerprint: str
    """Fingerprint of the base."""

    dtype: str
    """The model's dtype, such as `float32`."""

    notes: Items[str]
    """What else there is to know, for people."""

    collapses: Items[CollapseEvidenceData]
    """What was drawn while training and is deployed as its mean, folded or not; nothing is held against it."""

    anchors: Items[AnchorData]
    """The base's graphs held against the source model itself, in each mode."""

    requantised: Items[PackingEvidenceData]
    """What packing folded weights again did to them; nothing where none was."""

    routes: Items[RouteEvidenceData]
    """How often the folded model would have chosen differently, at each place where it chooses among its own values.
    Outputs are compared with the unfolded model's choices imposed on both."""

    retention: RetentionData | None
    """What rounding left of the updates of all sites; null where all are zero. Nothing is held against it."""

    unchanged: Items[str]
    """Sites at which every folded element is the base's."""

    largest_difference: float | None = Field(ge=0)
    """The largest of `outputs`; null where none were compared."""
