"""Write artifacts, whose contents `graftc.runtime.artifact.manifest` describes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from graftc.compiler.capture.identity.fingerprint import Identity
from graftc.compiler.compilation import Compilation
from graftc.compiler.inspect.snapshot import adapter_tensors, adapter_tensors_now
from graftc.compiler.stored_signatures import compile_stored
from graftc.files.tensors.writing import save_tensors
from graftc.files.writing import staged
from graftc.records.certificate import Certificate
from graftc.runtime.artifact import entries
from graftc.runtime.artifact.allowed_names import require_allowed_names
from graftc.runtime.artifact.manifest import (
    ADAPTERS,
    CERTIFICATE,
    CONSTANTS,
    MANIFEST,
    SCHEMA_VERSION,
    SPEC,
    Manifest,
    canonical_json,
    read_manifest,
    sealed,
)
from graftc.runtime.artifact.origin import origin
from graftc.runtime.artifact.places import is_ours
from graftc.runtime.model.adapted import AdaptedRunner
from graftc.runtime.model.runner import ModelRoot, runner_of
from graftc.runtime.sources.models import local_folder
from graftc.runtime.sources.reference import Reference
from graftc.specs.errors.arguments import absolute_path
from graftc.specs.errors.diagnostics import GraftError
from graftc.specs.io import dump_spec

BUNDLED = "base"
"""The folder of a base that is stored inside its artifact."""


@dataclass(frozen=True)
class ArtifactEvidence:
    """Evidence that an artifact records about its fold and its base.

    Attributes:
        certificate: the certificate for the adaptations that fold.
        kept: the adaptations that do not fold, with the reasons.
        base: the MODEL argument from which the base was loaded; by default the reference that transformers recorded.
        full: whether to include every value of the base in its digests.
    """

    certificate: Certificate | None = None
    kept: Mapping[str, str] = field(default_factory=dict)
    base: str | None = None
    full: bool = False


def save(
    compiled: ModelRoot | AdaptedRunner,
    path: str | Path,
    evidence: ArtifactEvidence = ArtifactEvidence(),
    *,
    force: bool = False,
    bundle: Callable[[Path], object] | None = None,
) -> Manifest:
    """Write an artifact, with or without a certificate of its fold. See `Compiled.save`.

    Args:
        compiled: the model to save.
        path: the folder to create.
        evidence: the evidence to record about the fold and the base.
        force: whether to replace an existing artifact.
        bundle: a function that writes the base itself into a folder within the artifact.
    """
    runner: AdaptedRunner = runner_of(compiled)
    require_values(runner)
    if bundle is None:
        _require_own_codes(runner.compilation)
    require_allowed_names(name for name, _ in adapter_tensors(runner.compilation.store))
    path = absolute_path(path)
    with staged(path, force=force, replaceable=is_ours, sources=[local_folder(runner.compilation.source)]) as folder:
        folder.mkdir()
        if bundle is not None:
            bundle(folder / BUNDLED)
        source = runner.compilation.source
        reference = Reference.of(source, evidence.base) if bundle is None else Reference("inside", BUNDLED)
        identity = runner.compilation.identity(full=evidence.full)
        text = _write(runner, folder, reference.seen_from(path), identity, evidence)
        return read_manifest(text.encode(), str(path))


def require_values(compiled: AdaptedRunner) -> None:
    """Refuse a model without weights.

    Raises:
        GraftError: GC053 if the model is on the meta device.
    """
    if compiled.device.type == "meta":
        message = "a model on the meta device has no values to save"
        raise GraftError("GC053", message, hint="compile a model with weights")


def _require_own_codes(compilation: Compilation) -> None:
    """Refuse a base whose codes were chosen by an adaptation that is gone, since no one could quantise it again.

    Raises:
        GraftError: GC168 for such a base.
    """
    if left := sorted(compilation.requantised - compilation.tensor_edits.requantised()):
        message = f"the codes of {left[0]} were chosen by an adaptation that the model no longer has"
        raise GraftError("GC168", message, hint='merge it with base="full" (--base full), which writes a plain model')


def _write(
    compiled: AdaptedRunner,
    folder: Path,
    reference: Reference,
    identity: Identity,
    evidence: ArtifactEvidence,
) -> str:
    """Write all files, and return the text of the manifest."""
    compilation, certificate = compiled.compilation, evidence.certificate
    compile_stored(compiled.compilation)
    signatures, graphs = entries.signatures(compiled)
    adapters = dict(adapter_tensors_now(compilation.store, torch.device("cpu")))
    constants = entries.constants(compiled)
    texts = {SPEC: dump_spec(compilation.spec), **graphs}
    if certificate is not None:
        texts[CERTIFICATE] = canonical_json(certificate.to_json())
    for name, text in texts.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8", newline="\n")
    save_tensors(adapters, folder / ADAPTERS)
    if constants:
        save_tensors(constants, folder / CONSTANTS)
    data = {
        "artifact": "graftc",
        "schema_version": SCHEMA_VERSION,
        "versions": origin(),
        "seed": compilation.seed,
        "base": entries.base(compiled, reference, identity),
        "signatures": signatures,
        **entries.places(compiled),
        "adapters": entries.tensors(adapters),
        "constants": entries.tensors(constants),
        "certificate": CERTIFICATE if certificate is not None else None,
        "kept": [{"name": name, "reason": reason} for name, reason in evidence.kept.items()],
        **({"passes": [each.to_json() for each in passes]} if (passes := compilation.main.passes) else {}),
        **({"requantised": sorted(codes)} if (codes := compilation.chosen_codes) else {}),
        "files": dict(listed(folder)),
    }
    text = sealed(data)
    (folder / MANIFEST).write_text(text, encoding="utf-8", newline="\n")
    return text


def listed(folder: Path, skip: Container[str] = ()) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield every file under a folder with its size and digest, except for the manifest and the files to skip."""
    for file in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = file.relative_to(folder).as_posix()
        if name != MANIFEST and name not in skip:
            yield name, {"bytes": file.stat().st_size, "sha256": file_digest(file)}


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
