"""An artifact's manifest: the contents of the folder, and their origin.

It is canonical JSON (every value has only one form) that ends with a digest of itself, so that any change is detected.
Digests detect damage, not intent: anyone who can rewrite the folder can rewrite the manifest as well.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator
from typing import Annotated, Any, Literal, Self, TypeAlias

from pydantic import Field, ValidationError, model_validator

from graftc.compiler.capture.signature import Axis
from graftc.files.tensors import file_names
from graftc.passes.core.elements.calls import elements_in
from graftc.passes.core.ir.shapes import DTYPES
from graftc.passes.core.packing.packing import weight_name
from graftc.records.passes import PassRecord
from graftc.records.places import AdaptedPlace, TrainedCopy
from graftc.runtime.artifact.allowed_names import FILE, TENSOR, is_allowed
from graftc.runtime.artifact.fields import (
    MANIFEST_BYTES,
    ClassName,
    Digest,
    DType,
    ElementType,
    File,
    Flag,
    Labels,
    ManifestEntry,
    Name,
    Settings,
    Shape,
    Size,
)
from graftc.runtime.sources.reference import Built, Kind, Reference
from graftc.specs.errors.diagnostics import GraftError
from graftc.specs.errors.text import reason_in
from graftc.specs.strict_json import read_json

SCHEMA_VERSION = 1
MANIFEST = file_names.MANIFEST
SPEC, ADAPTERS, CONSTANTS = "spec.yaml", "adapters.safetensors", "constants.safetensors"
CERTIFICATE = "certificates/fold.json"


class Versions(ManifestEntry):
    """The versions that wrote the artifact."""

    graftc: str
    """Of graftc."""

    python: str
    """Of Python."""

    torch: str
    """Of torch."""

    transformers: str
    """Of transformers."""

    code: Digest | None = None
    """Of graftc's own code, as `graftc.runtime.artifact.origin.code_digest` computes it; null in older artifacts."""


class BaseTensor(ManifestEntry):
    """One tensor of the base."""

    dtype: str
    """Its element type, as `f32`."""

    shape: Shape
    """Its sizes."""

    sha256: Digest
    """Of its values, or of evenly spaced ones."""

    parameter: bool
    """A parameter, or else a buffer."""


class Base(ManifestEntry):
    """The model that the artifact adapts: where it was, and how to tell it."""

    kind: Kind | None
    """The kind of `reference`; null where the model came from Python."""

    reference: str | None
    """A folder, a hub id, `package.module:callable`, or a folder inside of the artifact."""

    relative: str | None
    """The folder as seen from the artifact."""

    revision: str | None
    """Commit of the hub's repository."""

    model: ClassName
    """The class, with its module."""

    labels: Labels | None
    """Names of the classes that its config tells apart; null where it has none."""

    settings: Settings
    """Plain values of its config."""

    dtype: ElementType
    """The element type that the graphs are for."""

    config: str
    """SHA-256 of the config; empty where there is none."""

    fingerprint: Digest
    """Of the config and all tensors."""

    full: bool
    """Whether digests are of every value."""

    tensors: dict[str, BaseTensor]
    """Every tensor by the name that owns it."""

    aliases: dict[str, str]
    """Tied names to the name that owns the tensor."""

    @property
    def place(self) -> Reference:
        """The source from which the model was loaded."""
        return Reference(self.kind, self.reference, self.revision, self.relative, self.built)

    @property
    def built(self) -> Built:
        """The settings with which the model was built."""
        return Built(self.model.rpartition(".")[2], self.labels, self.dtype, self.settings)


class AdapterTensor(ManifestEntry):
    """One tensor that graftc added."""

    dtype: DType
    """Its element type, as `f32`."""

    shape: Shape
    """Its sizes."""

    trainable: bool
    """Whether it trains."""

    sha256: Digest
    """Of its values."""


class Input(ManifestEntry):
    """One input that the graphs were asked for."""

    name: Name
    """Its name."""

    dtype: DType
    """Its element type."""

    axes: Annotated[tuple[Size, ...], Field(max_length=16)]
    """Its axes; a name is a size that varies, the same wherever the name stands."""


def axes_of(inputs: Iterable[Input], flags: Iterable[tuple[str, Flag]]) -> list[Axis]:
    """Return the inputs for which graphs are captured; in a union of elements, each input has its own axis names."""
    named = bool(elements_in(flags))
    return [Axis(own.name, DTYPES[own.dtype], own.axes, as_shown=named) for own in inputs]


GraphName: TypeAlias = Literal[
    "base.train", "base.eval", "train", "eval", "tokens.train", "tokens.eval", "embeds.train", "embeds.eval"
]
"""The name of one of a signature's graphs."""


class Captured(ManifestEntry):
    """One captured graph of the base."""

    graph: GraphName
    """Its name among the signature's graphs."""

    key: str | None
    """Identifies model, code and versions; null where nothing does. The graph is used again for the same key only."""

    notes: tuple[str, ...]
    """The changes that capturing had to make."""

    constants: tuple[str, ...]
    """Tensors that it mentions beside the model's own."""


class Graph(ManifestEntry):
    """One graph of a signature."""

    file: str
    """Its file."""

    structure: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
    """Digest of everything its outputs depend on."""


class SignatureRecord(ManifestEntry):
    """One set of inputs with its graphs."""

    inputs: tuple[Input, ...]
    """The tensors of a call."""

    flags: tuple[tuple[Name, Flag], ...]
    """Other keyword arguments, which are constants of the graphs."""

    choices: tuple[Name, ...]
    """Inputs by which a call chooses among adaptations."""

    captures: tuple[Captured, ...]
    """The captured graphs: train mode, and eval mode where it could not be derived; with token ids, and with token
    embeddings where there are virtual tokens."""

    graphs: dict[GraphName, Graph]
    """Adapted graphs, those of the base, and what that is composed of where there are virtual tokens; none where one
    holds an operator that no file can name."""


class Kept(ManifestEntry):
    """An adaptation that does not fold."""

    name: str
    """The adaptation."""

    reason: str
    """Why."""


class Manifest(ManifestEntry):
    """Everything that an artifact says of itself."""

    artifact: Literal["graftc"] = "graftc"
    """The kind of file."""

    schema_version: Literal[1] = 1
    """Version of this format."""

    versions: Versions
    """The versions that wrote it."""

    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)]
    """The seed of the initial values."""

    base: Base
    """The model that it adapts."""

    signatures: Annotated[tuple[SignatureRecord, ...], Field(min_length=1)]
    """Sets of inputs; the first is the one that the spec was resolved on."""

    sites: tuple[AdaptedPlace, ...]
    """Every adapted place."""

    trained: tuple[TrainedCopy, ...]
    """Base tensors that train."""

    adapters: dict[str, AdapterTensor]
    """The tensors that graftc added."""

    constants: dict[str, AdapterTensor]
    """Tensors that graphs mention beside the model's and graftc's own."""

    certificate: str | None
    """File of the fold's certificate; null where none was made."""

    kept: tuple[Kept, ...]
    """Adaptations that do not fold."""

    passes: tuple[PassRecord, ...] = ()
    """Passes of plugins that the graphs went through; left out where there are none."""

    requantised: tuple[str, ...] = ()
    """Packed tensors of the base that follow from an adaptation's tensors; left out where there are none."""

    files: dict[str, File]
    """Every other file of the folder."""

    digest: Digest
    """SHA-256 of this manifest without its digest."""

    @model_validator(mode="after")
    def _whole(self) -> Self:
        """Check that the parts of the manifest agree with each other."""
        base, owners = self.base, self.base.tensors.keys()
        if not owners >= set(self.requantised):
            raise ValueError("packed tensors that the base does not have")
        for alias, owner in base.aliases.items():
            if alias in owners or owner not in owners:
                raise ValueError(f"{alias} is not an alias of {owner}")
        for signature in self.signatures:
            names = [entry.name for entry in signature.inputs]
            if len(set(names)) != len(names) or not names:
                raise ValueError("inputs with the same name, or no inputs")
            sizes = ([size for size in entry.axes if isinstance(size, int)] for entry in signature.inputs)
            if sum(map(math.prod, sizes)) > 2**32:
                raise ValueError("inputs that are too large")
            for captured in signature.captures:
                if not set(captured.constants) <= self.constants.keys():
                    raise ValueError("a constant that is not listed")
                if signature.graphs and captured.graph not in signature.graphs:
                    raise ValueError(f"the graph {captured.graph} is missing")
            if signature.graphs and not {"base.train", "base.eval", "train", "eval"} <= signature.graphs.keys():
                raise ValueError("graphs are missing")
        for place in self.sites:
            if not set(place.tensors.values()) <= self.adapters.keys():
                raise ValueError(f"tensors of {place.module} that are not listed")
        stored = {*owners, *map(weight_name, owners)}
        for trained in self.trained:
            if trained.tensor not in self.adapters or base.aliases.get(trained.base, trained.base) not in stored:
                raise ValueError(f"{trained.tensor} is not a copy of {trained.base}")
        return self

    def named_files(self) -> Iterator[str]:
        """Yield every file named by a field."""
        if self.certificate is not None:
            yield self.certificate
        for signature in self.signatures:
            yield from (graph.file for graph in signature.graphs.values())


def canonical_json(data: Any) -> str:
    """Return the canonical text of JSON data; keys keep their order, which follows the model."""
    return json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def sealed(data: dict[str, Any]) -> str:
    """Return the text of a manifest: canonical JSON with its digest."""
    digest = hashlib.sha256(canonical_json(data).encode()).hexdigest()
    return canonical_json({**data, "digest": digest})


def read_manifest(text: bytes, where: str) -> Manifest:
    """Return the manifest in a text.

    Raises:
        GraftError: GC080 if it belongs to no artifact, GC081 if a newer release wrote it, GC082 if it is damaged, GC085
            if it contains unsafe names.
    """
    data = unsealed(text, where, "artifact", SCHEMA_VERSION)
    _check_names(data, where)
    try:
        manifest = Manifest.model_validate_json(text)
    except ValidationError as error:
        raise damaged(where, MANIFEST, first_error(error)) from error
    flaw = manifest.base.place.flaw()
    if flaw is not None:
        raise unsafe(where, f"it names {flaw}")
    for file in manifest.named_files():
        if file not in manifest.files:
            raise unsafe(where, f"it uses the file {file!r}, which is not listed")
    return manifest


def first_error(error: ValidationError) -> str:
    """Return the location and the message of the first validation error."""
    first = error.errors(include_url=False)[0]
    place = ".".join(str(step) for step in first["loc"])
    return f"{place}: {reason_in(first['msg'])}".removeprefix(": ")


def unsealed(text: bytes, where: str, kind: str, version: int, file: str = MANIFEST) -> dict[str, Any]:
    """Return the data in a canonical text that ends with its digest.

    Args:
        text: the text that was read.
        where: the folder named in errors.
        kind: the key whose value must be ``"graftc"``.
        version: the newest supported version of the format.
        file: the file named in errors.

    Raises:
        GraftError: GC080 if the key has another value, GC081 for a newer version, GC082 if the text was changed.
    """
    try:
        data = read_json(text, MANIFEST_BYTES)
        canonical = canonical_json(data).encode()
    except (ValueError, RecursionError) as error:
        raise damaged(where, file, f"is not plain JSON: {error}") from error
    if not isinstance(data, dict) or data.get(kind) != "graftc":
        raise GraftError("GC080", f"{where} was not written by graftc", hint="graftc compile writes artifacts")
    format_version = data.get("schema_version")
    if isinstance(format_version, int) and format_version > version:
        message = f"{where} has format {format_version}, but this release reads only up to {version}"
        raise GraftError("GC081", message, hint="upgrade graftc: pip install -U graftc")
    digest = data.pop("digest", None)
    if canonical != text or hashlib.sha256(canonical_json(data).encode()).hexdigest() != digest:
        raise damaged(where, file, "has changed since it was written")
    return data


def damaged(where: str, file: str, what: str) -> GraftError:
    """Return the error for a file whose contents are not what was written."""
    return GraftError("GC082", f"{where} is damaged: {file} {what}", hint="copy it again from its source")


def _check_names(data: dict[str, Any], where: str) -> None:
    for table, pattern in (("files", FILE), ("adapters", TENSOR), ("constants", TENSOR)):
        entries = data.get(table)
        for name in entries if isinstance(entries, dict) else ():
            if not is_allowed(name, pattern):
                raise unsafe(where, f"the {'file' if table == 'files' else 'tensor'} name {name!r}")


def unsafe(where: str, what: str) -> GraftError:
    """Return the error for contents that graftc would never have written."""
    hint = "do not use this artifact: graftc did not write it in this form"
    return GraftError("GC085", f"{where} is not safe to read: {what}", hint=hint)
