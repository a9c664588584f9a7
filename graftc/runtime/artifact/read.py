"""Read artifacts. All contents are checked before they are used."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graftc.compiler.capture.capture import Capture
from graftc.compiler.capture.identity.fingerprint import Identity, TensorIdentity, replaced_tensors, tensor_digest
from graftc.compiler.capture.signature import Axis
from graftc.compiler.inspect.snapshot import Snapshot, TensorRecord
from graftc.files.destinations import CARD
from graftc.files.tensors.folder import Refusal, TensorFolder
from graftc.files.writing import recover
from graftc.passes.core.ir.effects import updated
from graftc.passes.core.ir.program import Program
from graftc.passes.core.ir.program_key import Mode
from graftc.passes.core.ir.shapes import DTYPES
from graftc.passes.core.ir.stored.serialise import program_from_json
from graftc.records.certificate import Certificate
from graftc.records.passes import PassRecord
from graftc.runtime.artifact.fields import GRAPH_BYTES, MANIFEST_BYTES, TEXT_BYTES, File
from graftc.runtime.artifact.manifest import (
    ADAPTERS,
    CONSTANTS,
    MANIFEST,
    SPEC,
    AdapterTensor,
    Captured,
    Manifest,
    SignatureRecord,
    axes_of,
    damaged,
    read_manifest,
    unsafe,
)
from graftc.runtime.artifact.places import RECORD
from graftc.runtime.artifact.records import MergedRecord, content, read_merged_record, read_record
from graftc.runtime.artifact.write import file_digest
from graftc.runtime.sources.folder_kinds import missing, reader_of
from graftc.specs.document import Spec
from graftc.specs.errors.arguments import absolute_path
from graftc.specs.errors.diagnostics import GraftError
from graftc.specs.io import parse_spec
from graftc.specs.strict_json import read_json


class Artifact:
    """A compiled model on disk.

    Attributes:
        path: the artifact's folder.
        manifest: the artifact's manifest.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path, self.manifest = path, manifest

    @cached_property
    def spec(self) -> Spec:
        """The spec from which the model was compiled."""
        file = self.path / SPEC
        try:
            text = content(file, TEXT_BYTES).decode("utf-8")
        except (OSError, ValueError) as error:
            raise damaged(str(self.path), SPEC, f"cannot be read: {error}") from error
        return parse_spec(text, file=str(file))

    @property
    def certificate(self) -> Certificate | None:
        """The certificate of the fold; None if nothing was certified.

        Raises:
            GraftError: GC082 if it is damaged.
        """
        file = self.manifest.certificate
        return None if file is None else read_record(Certificate, self.path / file, str(self.path), file)

    @property
    def identity(self) -> Identity:
        """The identity of the base."""
        base = self.manifest.base
        tensors = {name: TensorIdentity(t.dtype, t.shape, t.sha256, t.parameter) for name, t in base.tensors.items()}
        return Identity(base.config, tensors, base.full, base.settings)

    @property
    def updated(self) -> frozenset[str]:
        """The names of base tensors to which graphs write, and for which the artifact therefore has its own values."""
        return frozenset(self.manifest.base.tensors.keys() & self.manifest.adapters.keys())

    @property
    def replaced(self) -> frozenset[str]:
        """The names of base tensors whose values do not matter, because the artifact has its own."""
        trained = (record.base for record in self.manifest.trained if record.rows is None)
        return replaced_tensors(self.updated, trained, self.manifest.base.aliases) | set(self.manifest.requantised)

    @cached_property
    def snapshot(self) -> Snapshot:
        """Sites, tensors and Programs as data; no base is needed. Each graph is read once, on first use."""
        manifest = self.manifest
        return Snapshot(
            manifest.base.model.rpartition(".")[2],
            self.spec,
            manifest.sites,
            manifest.trained,
            {name: TensorRecord(t.dtype, t.shape, parameter=t.parameter) for name, t in manifest.base.tensors.items()},
            manifest.base.aliases,
            {
                name: TensorRecord(t.dtype, t.shape, t.trainable)
                for name, t in manifest.adapters.items()
                if name not in self.updated
            },
            self.passes,
            cache(lambda mode, base: self.program(mode, base=base)),
        )

    @cached_property
    def depths(self) -> dict[str, int]:
        """The number of layers in each stack that has adapted sites, derived from the names of the base's tensors."""
        stacks, names = {place.stack for place in self.manifest.sites if place.stack}, self.manifest.base.tensors
        layers = {
            stack: [n[len(stack) + 1 :].partition(".")[0] for n in names if n.startswith(f"{stack}.")]
            for stack in stacks
        }
        return {stack: max((int(n) + 1 for n in own if n.isdigit()), default=0) for stack, own in layers.items()}

    @property
    def passes(self) -> tuple[PassRecord, ...]:
        """The plugins' passes that were applied to the graphs."""
        return self.manifest.passes

    def program(self, mode: Mode = "eval", *, base: bool = False, signature: int = 0) -> Program:
        """Return a graph: the adapted one, or the base's own.

        Raises:
            GraftError: GC082 if its file does not contain the graph, GC091 if the artifact has no graphs.
        """
        return self.graph(f"{'base.' if base else ''}{mode}", signature)

    def graph(self, kind: str, signature: int = 0) -> Program:
        """Return a graph by its name in the manifest.

        Raises:
            GraftError: as for `program`.
        """
        entry = self.manifest.signatures[signature]
        graph = {str(name): graph for name, graph in entry.graphs.items()}.get(kind)
        if graph is None:
            hint = "use graftc.load(path), which captures the model again"
            raise GraftError("GC091", f"{self.path} has no graphs", hint=hint)
        return self._read(graph.file, kind, entry, torch.device("cpu"))

    def _read(self, file: str, kind: str, signature: SignatureRecord, device: torch.device) -> Program:
        """Read the graph in a file, and check that it fits its signature.

        Raises:
            GraftError: GC082 if it does not fit, or if the file contains no graph.
        """
        try:
            program = program_from_json(read_json(content(self.path / file, GRAPH_BYTES), GRAPH_BYTES), device)
        except (OSError, ValueError) as error:
            raise damaged(str(self.path), file, f"contains no valid graph: {error}") from error
        flaw = self._flaw(program, kind, signature)
        if flaw is not None:
            raise damaged(str(self.path), file, f"contains a different graph: {flaw}")
        return program

    def _flaw(self, program: Program, kind: str, signature: SignatureRecord) -> str | None:
        if program.mode != kind.rpartition(".")[2]:
            return f"one of {program.mode} mode"
        if not kind.startswith("embeds.") and dict(program.flags) != dict(signature.flags):
            return "one for other flags"
        asked = {i.name: (DTYPES[i.dtype], len(i.axes)) for i in signature.inputs}
        if any(asked.get(s.name, (s.dtype, len(s.shape))) != (s.dtype, len(s.shape)) for s in program.inputs):
            return "one for other inputs"
        base, aliases = self.manifest.base.tensors, self.manifest.base.aliases
        for name in updated(program.graph):
            tensor = base.get(aliases.get(name, name))
            if tensor is None or tensor.parameter:
                return f"one that writes to {name}"
        return None

    def tensors(self) -> dict[str, Tensor]:
        """Return the adapter tensors, by name, after checking each of them.

        Raises:
            GraftError: GC084 for a tensor that does not match the manifest.
        """
        return self._checked(ADAPTERS, self.manifest.adapters)

    def constants(self) -> dict[str, Tensor]:
        """Return the tensors that graphs mention beside the model's and graftc's own, after checking each of them.

        Raises:
            GraftError: as for `tensors`.
        """
        return self._checked(CONSTANTS, self.manifest.constants) if self.manifest.constants else {}

    def axes(self, signature: int = 0) -> list[Axis]:
        """Return the inputs for which a signature's graphs were captured."""
        entry = self.manifest.signatures[signature]
        return axes_of(entry.inputs, entry.flags)

    def captures(self, device: torch.device) -> dict[str, Any]:
        """Return functions that read the base's captured graphs, by the graphs' keys.

        A function returns None, instead of raising an error, if its file is missing or has changed since the artifact
        was opened.
        """
        constants = self.constants()
        readers: dict[str, Any] = {}
        for entry in self.manifest.signatures:
            for captured in entry.captures:
                graph = entry.graphs.get(captured.graph)
                if captured.key is not None and graph is not None:
                    readers[captured.key] = lambda c=captured, f=graph.file, s=entry: self._capture(
                        c, f, s, constants, device
                    )
        return readers

    def _capture(
        self,
        captured: Captured,
        file: str,
        signature: SignatureRecord,
        constants: Mapping[str, Tensor],
        device: torch.device,
    ) -> Capture | None:
        if not self._as_opened(file):
            return None
        program = self._read(file, captured.graph, signature, device)
        # The steps after the capture record their own history.
        program.history = [entry for entry in program.history if entry.step == "canonicalise"]
        own = {name: constants[name].to(device) for name in captured.constants}
        return Capture(program, own, 0.0, cached=True, notes=captured.notes)

    def _as_opened(self, file: str) -> bool:
        try:
            return file_digest(self.path / file) == self.manifest.files[file].sha256
        except OSError:
            return False

    def _checked(self, file: str, table: Mapping[str, AdapterTensor]) -> dict[str, Tensor]:
        where, opened = str(self.path), TensorFolder(self.path / file, Refusal("GC082", hint="copy it again"))
        if other := sorted(opened.entries.keys() ^ table.keys()):
            raise _foreign(where, file, f"its tensors differ from the listed ones: {', '.join(other[:3])}")
        tensors = dict(opened)
        for name, tensor in tensors.items():
            listed, record = table[name], TensorRecord.of(tensor)
            if (record.dtype, record.shape) != (listed.dtype, listed.shape):
                raise _foreign(where, file, f"{name} has a dtype or shape other than the one listed")
            if tensor_digest(tensor) != listed.sha256:
                raise _foreign(where, file, f"{name} has values that do not match the listed digest")
        return tensors


def _foreign(where: str, file: str, what: str) -> GraftError:
    return GraftError("GC084", f"{where} has changed since it was written: {file}: {what}", hint="copy it again")


def open_artifact(path: str | os.PathLike[str]) -> Artifact:
    """Open an artifact and check all of its files, except for tensor values, which are checked when they are read.

    Raises:
        GraftError: GC080 if the folder is not an artifact, GC081 for a newer format, GC082 for changed contents, GC083
            for a missing file, GC085 for links, unlisted files and names that lead out of the folder.
    """
    folder = absolute_path(path)
    recover(folder.parent)
    if not os.path.isfile(folder / MANIFEST):
        hint = reader_of(Path(path)) or "graftc compile SPEC --model MODEL --out DIR writes artifacts"
        raise GraftError("GC080", f"{path} {missing(folder, MANIFEST)}", hint=hint)
    present = set(files_of(folder, str(path))) - {MANIFEST}
    try:
        raw = content(folder / MANIFEST, MANIFEST_BYTES)
    except (OSError, ValueError) as error:
        raise damaged(str(path), MANIFEST, f"cannot be read: {error}") from error
    manifest = read_manifest(raw, str(path))
    _check_files(folder, present, manifest.files, str(path))
    if Artifact(folder, manifest).identity.fingerprint != manifest.base.fingerprint:
        raise damaged(str(path), MANIFEST, "has a fingerprint that does not match the tensors of its base")
    for required in (SPEC, ADAPTERS, *([CONSTANTS] if manifest.constants else [])):
        if required not in manifest.files:
            raise _missing(str(path), required)
    return Artifact(folder, manifest)


def files_of(folder: Path, where: str) -> Iterator[str]:
    """Yield the paths of all files under a folder.

    Raises:
        GraftError: GC085 for anything that is neither a plain file nor a folder.
    """
    for entry in sorted(os.scandir(folder), key=lambda e: e.name):
        path = Path(entry.path)
        if entry.is_dir(follow_symlinks=False):
            yield from (f"{entry.name}/{name}" for name in files_of(path, where))
        elif entry.is_file(follow_symlinks=False):
            yield entry.name
        else:
            raise unsafe(where, f"{path} is a {'link' if entry.is_symlink() else 'special file'}")


def open_merged(folder: Path, where: str) -> MergedRecord:
    """Return the record of a merged model, after checking all files of its folder.

    A ``README.md`` that the record does not list is not checked.

    Args:
        folder: the folder of the merged model.
        where: the folder named in errors.

    Raises:
        GraftError: as in `read_merged_record`; GC082 for changed contents, GC083 for a missing file, GC085 for links
            and unlisted files.
    """
    record = read_merged_record(folder, where)
    unlisted = {RECORD, *({CARD} - record.files.keys())}
    _check_files(folder, set(files_of(folder, where)) - unlisted, record.files, where)
    return record


def _check_files(folder: Path, present: set[str], listed: Mapping[str, File], where: str) -> None:
    """Check the files of a folder against those that are listed.

    Raises:
        GraftError: GC082 for a changed file, GC083 for a missing file, GC085 for an unlisted file.
    """
    for name in listed:
        if name not in present:
            raise _missing(where, name)
    for name in sorted(present - listed.keys()):
        raise unsafe(where, f"the file {name!r} is not listed")
    for name, file in listed.items():
        actual = (folder / name).stat().st_size
        if actual != file.bytes:
            raise damaged(where, name, f"has {actual} bytes, not {file.bytes}")
        if actual > GRAPH_BYTES and not name.endswith(".safetensors"):
            raise damaged(where, name, f"has {actual} bytes; a file without tensors has at most {GRAPH_BYTES}")
        if file_digest(folder / name) != file.sha256:
            raise damaged(where, name, "has changed since it was written")


def _missing(where: str, name: str) -> GraftError:
    return GraftError("GC083", f"{where} lacks {name}", hint="copy it again from its source")
