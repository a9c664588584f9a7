"""Results of the commands that compile, deploy and compare."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from graftc.cli.results.base import CertificateData, DiagnosticData, FileData, ReportData, Result, TotalsData
from graftc.cli.results.planning import MemoryData
from graftc.specs.base_model import Items

__all__ = [
    "CheckData",
    "CheckResult",
    "CompileResult",
    "DiffResult",
    "DifferenceData",
    "ExportResult",
    "KeptData",
    "MergeResult",
    "SiteChanges",
    "StreamedData",
    "TensorChange",
    "VerifyResult",
    "WeightChange",
    "WeightsDiff",
]


class CheckedData(ReportData):
    """What `check` and `compile` say of a spec and a model."""

    spec: str
    """The SPEC argument."""

    model: str
    """The `--model` option."""

    class_name: str = Field(alias="class")
    """Name of the model's class."""

    totals: TotalsData
    """Sums over all adaptations, the `train:` list included."""

    load_seconds: float = Field(ge=0)
    """How long loading the model took."""

    warnings: Items[DiagnosticData]
    """Warnings."""


class CheckResult(CheckedData):
    """`graftc check SPEC --model MODEL --json`."""

    memory: MemoryData | None
    """With `--memory`, what training takes; null otherwise."""


class CompileResult(CheckedData):
    """`graftc compile SPEC --model MODEL --out DIR --json`."""

    out: str | None
    """The artifact's folder; null with `--dry-run`."""

    dry_run: bool
    """Whether nothing was written."""

    files: Items[FileData]
    """The artifact's files; with `--dry-run`, none."""

    fingerprint: str
    """Fingerprint of the base."""

    certificate: CertificateData | None
    """Evidence that the adaptations fold; null where that was not asked for or they do not."""


class KeptData(Result):
    """An adaptation that stays beside the base."""

    name: str
    """Its name."""

    reason: str
    """Why it does not fold."""


class StreamedData(Result):
    """A merge that was done file by file."""

    untouched_tensors: int = Field(ge=0)
    """How many tensors are the base's, bit for bit."""

    resumed_files: int = Field(ge=0)
    """How many files a run that was killed had done already."""


class MergeResult(Result):
    """`graftc merge DIR --out DIR2 --json`."""

    artifact: str
    """The artifact's folder."""

    out: str | None
    """What was written: a transformers folder, or an artifact where it is partial; null with `--dry-run`."""

    dry_run: bool
    """Whether nothing was written."""

    partial: bool
    """Whether some adaptations stay beside the base."""

    folded: Items[str]
    """Names of the adaptations that were folded into the base."""

    kept: Items[KeptData]
    """The adaptations that stay, with the reason."""

    certificate: CertificateData | None
    """The evidence for the fold; null where nothing folds."""

    streamed: StreamedData | None
    """What else there is to say of a merge file by file; null of one in memory."""

    files: Items[FileData]
    """The files that were written."""

    warnings: Items[DiagnosticData]
    """Warnings."""


class PeftTensorData(Result):
    """A tensor of a PEFT checkpoint and the one that it is here."""

    key: str
    """Its key in `adapter_model.safetensors`."""

    site: str
    """The adapted site; empty for a tensor of the adaptation as a whole."""

    part: str
    """What it is there, such as `A`."""

    tensor: str
    """Full name of the tensor in the compiled model."""


class ImportPeftResult(Result):
    """`graftc import-peft DIR... --model MODEL --out DIR2 --json`."""

    adapters: Items[str]
    """The checkpoints' folders."""

    peft_types: Items[str]
    """PEFT's name of the method of each."""

    methods: Items[str]
    """The method that says the same here, of each."""

    model: str
    """The base, as given."""

    out: str | None
    """The artifact's folder; null with `--dry-run`."""

    dry_run: bool
    """Whether nothing was written."""

    tensors: Items[PeftTensorData]
    """Every tensor of the checkpoints that was taken over, and what it is here."""

    files: Items[FileData]
    """The artifact's files."""

    certificate: CertificateData | None
    """Evidence that the adaptations fold; null where that was not asked for or they do not."""

    warnings: Items[DiagnosticData]
    """Warnings."""


class ExportResult(Result):
    """`graftc export DIR --format FORMAT --out PATH --json`."""

    artifact: str
    """The artifact's folder."""

    format: str
    """The format."""

    out: str | None
    """The file that was written; null with `--dry-run`."""

    dry_run: bool
    """Whether nothing was written."""

    merged: bool
    """Whether the adaptations were folded first."""

    files: Items[FileData]
    """The files that were written."""

    certificate: CertificateData | None
    """The evidence for the fold; null where nothing was folded."""

    tensors: Items[PeftTensorData]
    """With `--format peft`, every tensor that was written, and what it is here; empty otherwise."""

    max_rank: int | None = Field(ge=1)
    """With `--for`, the largest rank with which the server has to be started, its `--max-lora-rank`; null otherwise."""

    warnings: Items[DiagnosticData]
    """Warnings."""


class CheckData(Result):
    """One check of an artifact."""

    name: str
    """What was checked."""

    passed: bool | None
    """Whether it holds; null where it was not done."""

    detail: str
    """What was found, or why it was not done, for people."""


class VerifyResult(Result):
    """`graftc verify DIR --json`. The exit status is 1 where it did not pass."""

    artifact: str
    """The artifact's folder."""

    passed: bool
    """Whether every check that was done holds."""

    checks: Items[CheckData]
    """The checks, in the order they were done."""

    warnings: Items[DiagnosticData]
    """Warnings."""


class SiteChanges(Result):
    """Adapted places that differ, as text."""

    added: Items[str]
    """Those that only the second artifact has."""

    removed: Items[str]
    """Those that only the first artifact has."""

    changed: Items[str]
    """Those that both have and adapt differently."""


class TensorChange(Result):
    """A tensor that differs."""

    name: str
    """Its name."""

    status: Literal["added", "removed", "changed", "moved"]
    """How it differs; `moved`: the same values under another name."""

    largest_difference: float | None = Field(ge=0)
    """Largest absolute difference of its elements; null where they cannot be compared."""


class DifferenceData(Result):
    """What a tensor of a model differs by."""

    largest: float | None = Field(ge=0)
    """The largest absolute difference of an element; null where it is no finite number."""

    norm: float | None = Field(ge=0)
    """Norm of the difference over the base's; null where it is no finite number."""

    entries: float = Field(ge=0, le=1)
    """Share of the elements that differ."""

    rows: int | None = Field(ge=0)
    """Of a matrix, how many rows differ anywhere."""

    columns: int | None = Field(ge=0)
    """Of a matrix, how many columns differ anywhere."""

    rank: int | None = Field(ge=0)
    """Of a matrix, how many directions of the difference are above what rounding makes; null where that is more than
    are looked for, or a scaling is found."""

    explained: float | None
    """Share of the difference's squared norm in those directions, or in the scaling."""

    cause: Literal["low rank", "row scaling", "column scaling", "rows", "entries", "vector", "full", "rounding"]
    """What could have made it."""


class WeightChange(Result):
    """A tensor that is not the same in two models."""

    name: str
    """Its name."""

    status: Literal["added", "removed", "reshaped", "retyped", "changed"]
    """Only the second has it, only the first has it, its sizes differ, only its element type differs, or its values
    do."""

    base: str
    """Element type and sizes in the first, as `BF16[4, 48]`; empty where it is missing."""

    other: str
    """The same in the second."""

    difference: DifferenceData | None
    """The numbers, where values differ and can be compared."""


class WeightsDiff(Result):
    """What differs between the weights of two model folders."""

    equal: int = Field(ge=0)
    """How many tensors are the same."""

    tensors: Items[WeightChange]
    """Those that are not."""


class DiffResult(Result):
    """`graftc diff A B --json`. The exit status is 1 where they differ."""

    a: str
    """The first folder: an artifact's, or a model's."""

    b: str
    """The second folder."""

    base: Items[str]
    """In which ways they adapt other models."""

    same: bool
    """Whether nothing differs."""

    spec: str
    """The specs as a unified diff; empty where they are equal."""

    sites: SiteChanges
    """Adapted places that differ."""

    tensors: Items[TensorChange]
    """Tensors that differ."""

    graph: str
    """The adapted graphs as a diff; empty where they are equal."""

    weights: WeightsDiff | None
    """What differs between two models, of which the fields above are empty; null of artifacts."""

    warnings: Items[DiagnosticData]
    """Warnings."""
