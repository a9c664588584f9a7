"""The record in a state dict: the spec, the base and the inputs to which its tensors belong, as bytes in a tensor.

Trainers write state dicts to their own files. With the record, such a file suffices to rebuild the model.
"""

from __future__ import annotations

import json
from typing import Annotated, Literal, Self

import torch
from pydantic import Field, ValidationError, model_validator
from torch import Tensor

from graftc.compiler.capture.identity.fingerprint import Identity
from graftc.compiler.capture.signature import Axis
from graftc.compiler.compilation import Compilation
from graftc.files.tensors import file_names
from graftc.passes.core.ir.shapes import DTYPE_NAMES, DTYPES
from graftc.runtime.artifact.built import built_of
from graftc.runtime.artifact.fields import ClassName, Digest, ElementType, Flag, Labels, ManifestEntry, Settings
from graftc.runtime.artifact.manifest import Input, axes_of, first_error
from graftc.runtime.sources.reference import Built, Kind, Reference
from graftc.specs.errors.diagnostics import GraftError
from graftc.specs.io import dump_spec

RECORD = file_names.STATE_RECORD
MOST = 16 * 2**20
"""The maximum size of a record, in bytes."""


class BaseRecord(ManifestEntry):
    """The model that was adapted."""

    kind: Kind | None
    """The kind of `reference`; null if the model came from Python."""

    reference: str | None
    """A folder, a hub id, or `package.module:callable`."""

    revision: str | None
    """The commit in the hub repository."""

    model: ClassName
    """The model's class."""

    labels: Labels | None
    """The names of the classes that its config distinguishes; null if it has none."""

    settings: Settings
    """The plain values in its config."""

    dtype: ElementType
    """The dtype for which the graphs were captured."""

    packed: dict[str, str] = Field(default_factory=dict)
    """The packing of each packed weight, by name."""

    replaced: tuple[str, ...]
    """The tensors whose values do not matter, because the state dict has its own."""

    fingerprint: Digest
    """The digest of its config and all tensors."""

    weights: Digest | None
    """The digest of its tensors; null if they had no values."""

    @property
    def built(self) -> Built:
        """The settings with which the model was built."""
        return Built(self.model, self.labels, self.dtype, self.settings)

    @property
    def place(self) -> Reference:
        """The source from which the model was loaded."""
        return Reference(self.kind, self.reference, self.revision, built=self.built)


class StateRecord(ManifestEntry):
    """The spec, base and inputs to which a state dict's tensors belong."""

    artifact: Literal["graftc.state"]
    """The marker of this format."""

    schema_version: Annotated[int, Field(ge=1, le=1)]
    """The version of this format."""

    spec: str
    """The spec, as YAML."""

    seed: int
    """The seed for initial values."""

    base: BaseRecord
    """The model that was adapted."""

    inputs: tuple[Input, ...]
    """The tensors of the first captured call."""

    flags: tuple[tuple[str, Flag], ...]
    """The other keyword arguments of that call."""

    @model_validator(mode="after")
    def _once_each(self) -> Self:
        names = [*(i.name for i in self.inputs), *(name for name, _ in self.flags)]
        if len(set(names)) < len(names):
            raise ValueError("an input occurs twice")
        return self

    @property
    def axes(self) -> list[Axis]:
        """The inputs for which graphs are captured."""
        return axes_of(self.inputs, self.flags)


def record_of(compilation: Compilation, identity: Identity, *, values: bool) -> StateRecord:
    """Return a Compilation's record.

    Args:
        compilation: the Compilation.
        identity: the identity of its base.
        values: whether the base's tensors have values.
    """
    reference, built = Reference.of(compilation.source), built_of(compilation.source)
    main = compilation.main
    return StateRecord(
        artifact="graftc.state",
        schema_version=1,
        spec=dump_spec(compilation.spec),
        seed=compilation.seed,
        base=BaseRecord(
            kind=reference.kind,
            reference=reference.text,
            revision=reference.revision,
            model=built.architecture,
            labels=built.labels,
            settings=dict(built.settings),
            dtype=built.dtype,
            packed=identity.packings,
            replaced=tuple(sorted(compilation.replaced)),
            fingerprint=identity.fingerprint,
            weights=weights_of(identity) if values else None,
        ),
        inputs=tuple(Input(name=a.name, dtype=DTYPE_NAMES[a.dtype], axes=a.axes) for a in main.axes),
        flags=tuple(compilation.program("train", "base").flags),
    )


def weights_of(identity: Identity) -> str:
    """Return a digest of a base's tensors that does not depend on its config."""
    return Identity("", identity.tensors, identity.full).fingerprint


def as_tensor(record: StateRecord) -> Tensor:
    """Return a record as ``uint8[bytes]``."""
    return torch.frombuffer(bytearray(record.model_dump_json().encode()), dtype=torch.uint8)


def from_tensor(tensor: Tensor, where: str) -> StateRecord:
    """Read a record from a tensor; ``where`` is the place named in errors.

    Raises:
        GraftError: GC081 for a newer format, GC082 if the tensor does not contain a valid record.
    """
    try:
        if tensor.numel() > MOST:
            raise ValueError("it is too large")
        text = bytes(tensor.detach().to("cpu", torch.uint8).reshape(-1).numpy())
        record = StateRecord.model_validate_json(text)
        if unknown := [i.dtype for i in record.inputs if i.dtype not in DTYPES]:
            raise ValueError(f"there is no dtype {unknown[0]!r}")
        return record
    except (ValueError, RuntimeError) as error:
        if _version(error, tensor) > 1:
            message = f"{where} has a newer format than this release reads"
            raise GraftError("GC081", message, hint="update graftc") from None
        reason = first_error(error) if isinstance(error, ValidationError) else str(error).splitlines()[0]
        message = f"the record in {where} is damaged: {reason}"
        raise GraftError("GC082", message, hint="copy the file again from its source") from error


def _version(error: Exception, tensor: Tensor) -> int:
    if not isinstance(error, ValidationError):
        return 0
    try:
        version = json.loads(bytes(tensor.detach().to("cpu", torch.uint8).reshape(-1).numpy()))["schema_version"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return 0
    return version if isinstance(version, int) else 0
