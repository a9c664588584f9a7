"""Verify files that graftc wrote: hashes, base, sites, graphs and certificate are all recomputed."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from graftc.passes.core.ir.printer import structural_hash, value_numbers
from graftc.passes.core.ir.program import Program
from graftc.records.certificate import Certificate
from graftc.records.verification import Check
from graftc.runtime.artifact.manifest import MANIFEST
from graftc.runtime.artifact.origin import are_installed, code_digest
from graftc.runtime.artifact.places import RECORD
from graftc.runtime.artifact.read import Artifact, open_artifact, open_merged
from graftc.runtime.artifact.records import merged_spec, read_merged_record
from graftc.runtime.artifact.write import BUNDLED
from graftc.runtime.compiled import Compiled
from graftc.runtime.deploy.merged import certificate_of
from graftc.runtime.loading.load import base_of, different_graph, load_artifact
from graftc.runtime.loading.stated import differing, has_roles, misplaced, misstated
from graftc.specs.errors.arguments import absolute_path
from graftc.specs.errors.diagnostics import GraftError
from graftc.specs.errors.text import counted


@dataclass
class Verification:
    """The results of a verification, in order."""

    checks: list[Check] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether no check failed."""
        return all(check.passed is not False for check in self.checks)

    def add(self, name: str, look: Callable[[], tuple[bool | None, str]]) -> bool:
        """Run a check, unless an earlier one failed; a `GraftError` counts as a failure.

        Returns:
            False if the check failed or did not run.
        """
        if not self.passed:
            self.checks.append(Check(name, None, "skipped: an earlier check failed"))
            return False
        try:
            passed, detail = look()
        except GraftError as error:
            passed, detail = False, "; ".join([f"{error.code}: {error.message}", *map(str, error.details)])
        self.checks.append(Check(name, passed, detail))
        return passed is not False


def verify(
    path: str | os.PathLike[str],
    model: nn.Module | str | None = None,
    *,
    files_only: bool = False,
    step: Callable[[str], object] = lambda _: None,
) -> Verification:
    """Recompute and check the statements that an artifact, or a merged model's folder, makes about itself.

    Args:
        path: the folder.
        model: the base, or a MODEL argument that names it; by default the base that the artifact names.
        files_only: whether to check only the files, without the base.
        step: a function that is called with the name of each step.

    Raises:
        GraftError: GC080 if the folder is neither, GC081 for a newer format.
    """
    folder = absolute_path(path)
    if os.path.isfile(folder / RECORD) and not os.path.isfile(folder / MANIFEST):
        return _verify_merged(folder, str(path))
    verification = Verification()
    state: dict[str, Any] = {}
    step("hashing files")
    opened = _opened(path)

    def files() -> tuple[bool, str]:
        if isinstance(opened, GraftError):
            raise opened
        state["artifact"] = opened
        return True, f"{counted(len(opened.manifest.files), 'file')}, as written"

    verification.add("files", files)
    verification.add("tensors", lambda: (True, f"{counted(len(state['artifact'].tensors()), 'tensor')}, as listed"))
    verification.add("graph files", lambda: _graph_files(state["artifact"]))
    verification.add("statements", lambda: _statements(state["artifact"]))
    if isinstance(opened, Artifact) and f"{BUNDLED}/{RECORD}" in opened.manifest.files:
        bundled = opened.path / BUNDLED
        verification.add("files of the base", lambda: _merged_files(bundled, str(bundled)))
        verification.add("certificate of the base", lambda: _merged_certificate(bundled, str(bundled)))
    if files_only:
        return verification
    step("loading the base")

    def base() -> tuple[bool, str]:
        artifact: Artifact = state["artifact"]
        state["base"] = base_of(artifact, model)
        count, how = counted(len(artifact.manifest.base.tensors), "tensor"), artifact.manifest.base.full
        return True, f"{type(state['base']).__name__}, {count}, {'all' if how else 'sampled'} values compared"

    verification.add("base", base)
    step("capturing")

    def places() -> tuple[bool | None, str]:
        artifact: Artifact = state["artifact"]
        state["compiled"] = load_artifact(artifact, state["base"], cache=False, recapture=True)
        other = next(differing(artifact, state["compiled"]._graftc.snapshot), None)
        if other is not None:
            return _unless_other_versions(artifact, other)
        return True, f"the spec adapts the same {counted(len(artifact.manifest.sites), 'place')}"

    verification.add("places", places)
    verification.add("graphs", lambda: _graphs(state["artifact"], state["compiled"]))
    step("certifying")
    verification.add("certificate", lambda: _certificate(state["artifact"], state["compiled"]))
    return verification


def _opened(path: str | os.PathLike[str]) -> Artifact | GraftError:
    """Return the artifact, or the error that was raised when it was opened.

    Raises:
        GraftError: GC080 or GC081, after which there is nothing to verify.
    """
    try:
        return open_artifact(path)
    except GraftError as error:
        if error.code in ("GC080", "GC081"):
            raise
        return error


def _graph_files(artifact: Artifact) -> tuple[bool | None, str]:
    """Check that the graphs in files match their digests in the manifest."""
    canonical = artifact.manifest.base.aliases
    count = 0
    for number, signature in enumerate(artifact.manifest.signatures):
        for kind, graph in signature.graphs.items():
            program = artifact.graph(kind, number)
            if structural_hash(program, lambda name: canonical.get(name, name)) != graph.structure:
                return False, f"{graph.file} contains a graph other than the one listed"
            count += 1
    return (True, f"{counted(count, 'graph')}, as listed") if count else (None, "the artifact has no graphs")


def _statements(artifact: Artifact) -> tuple[bool | None, str]:
    """Check what the manifest states about places against the spec and the graphs in files."""
    wrong = next(misstated(artifact), None)
    if wrong is not None:
        return False, wrong
    places = counted(len(artifact.manifest.sites), "place")
    if not has_roles(artifact):
        return True, f"the methods of {places}, as in the spec"
    wrong = next(misplaced(artifact), None)
    if wrong is not None:
        return _unless_other_versions(artifact, wrong)
    return True, f"methods, kinds and roles of {places}, as in the spec and the graphs"


def _unless_other_versions(artifact: Artifact, wrong: str) -> tuple[bool | None, str]:
    """Return the result for a description that other versions of the libraries may also explain."""
    if are_installed(artifact.manifest.versions):
        return False, wrong
    return None, f"with different versions of the libraries, {wrong}"


def _graphs(artifact: Artifact, compiled: Compiled) -> tuple[bool | None, str]:
    """Check that capturing and rewriting the model again results in the artifact's graphs."""
    compilation = compiled.compilation
    current_signatures = compilation.signatures.values()
    for number, (signature, current) in enumerate(zip(artifact.manifest.signatures, current_signatures, strict=True)):
        programs = compilation.graphs(current.signature)
        other = different_graph(signature, compilation, current.signature) or _changed(artifact, number, programs)
        if other is not None:
            same = [c.key for c in current.captures] == [c.key for c in signature.captures] and current.captures[0].key
            if not same and not are_installed(artifact.manifest.versions):
                return None, "with different versions of the libraries, the same places have different graphs"
            return False, f"the {other} graph of signature {number} differs when it is captured again"
    return True, f"the same, captured and rewritten again for {counted(len(current_signatures), 'signature')}"


def _changed(artifact: Artifact, number: int, programs: Mapping[str, Program]) -> str | None:
    """Return the name of the first stored graph that differs from the new one in a node or in its interface."""
    canonical = artifact.manifest.base.aliases
    for kind, program in programs.items():
        graph = artifact.manifest.signatures[number].graphs.get(kind)  # type: ignore[call-overload]
        if graph is None:
            continue
        kept = artifact.graph(kind, number)
        for other in (kept, program):
            interface = (other.inputs, other.outputs, other.mode, other.entry, other.flags)
            nodes = Counter(value_numbers(other, lambda name: canonical.get(name, name)).values())
            if other is kept:
                expected = interface, nodes
            elif (interface, nodes) != expected:
                return str(kind)
    return None


def _certificate(artifact: Artifact, compiled: Compiled) -> tuple[bool | None, str]:
    """Check that another fold passes certification and agrees with the stored certificate."""
    kept = artifact.certificate
    stays = {each.name: each.reason for each in artifact.manifest.kept}
    if kept is None and not stays:
        return None, "the artifact has no certificate"
    certificate, unfolded = certificate_of(compiled)
    if stays.keys() != unfolded.keys():
        return (
            False,
            f"stated not to fold: {', '.join(stays) or 'none'}; not folding now: {', '.join(unfolded) or 'none'}",
        )
    reworded = next((name for name in stays if stays[name] != unfolded[name]), None)
    writer = artifact.manifest.versions
    if reworded is not None and are_installed(writer) and writer.code == code_digest():
        return False, f"{reworded} is stated not to fold because {stays[reworded]}: {unfolded[reworded]}"
    # Another graftc may say the same in other words: both are shown, and nothing rests on the stated reason.
    note = f"; {reworded}: {unfolded[reworded]} (stated: {stays[reworded]})" if reworded is not None else ""
    if kept is None:
        if certificate is not None:
            return False, "the certificate is missing"
        return None, f"nothing folds, as stated{note}"
    if certificate is None:
        return False, "nothing folds now"
    other = _disagreement(artifact, kept, certificate)
    if other is not None:
        return False, other
    if not certificate.passed:
        return False, "; ".join(certificate.failures()[:3])
    for key in ("base_structure", "structure"):
        stored, now = getattr(kept, key), getattr(certificate, key)
        if stored != now:
            other = f"the stored certificate has a different {key}: {stored}, not {now}"
            return _unless_other_versions(artifact, other)
    worst = max((site.algebra for site in certificate.sites), default=0.0)
    return True, (
        f"{counted(len(certificate.sites))} within {worst:.1e} in float64, outputs within "
        f"{certificate.largest_difference:.1e} (budget {certificate.budget:.1e}){note}"
    )


def _disagreement(artifact: Artifact, kept: Certificate, certificate: Certificate) -> str | None:
    """Return the first difference from the stored certificate that neither the machine nor the libraries explain.

    Measured values vary by machine, and the structures of graphs by the versions of the libraries.
    """
    before, now = kept.to_json(), certificate.to_json()
    for key in ("passed", "additions", "dtype", "fingerprint"):
        if before[key] != now[key]:
            return f"the stored certificate has a different {key}: {before[key]}, not {now[key]}"
    stored, sites = [s.site for s in kept.sites], [s.site for s in certificate.sites]
    if stored != sites and (artifact.manifest.versions.code or stored != _by_weight(sites, artifact)):
        return "the stored certificate covers different sites"
    return None


def _by_weight(sites: Sequence[str], artifact: Artifact) -> list[str]:
    """Name each bias that folds with its weight by that weight, as certificates did before manifests named the code."""
    places = {(place.module, place.name) for place in artifact.manifest.sites}
    biases = {f"{module}.bias": f"{module}.weight" for module, name in places if name == "weight"}
    return [site if tuple(site.rsplit(".", 1)) in places else biases.get(site, site) for site in sites]


def _verify_merged(folder: Path, where: str) -> Verification:
    """Check a merged model's files against its record."""
    verification = Verification()
    verification.add("files", lambda: _merged_files(folder, where))
    verification.add("spec", lambda: _merged_spec(folder, where))
    verification.add("certificate", lambda: _merged_certificate(folder, where))
    return verification


def _merged_files(folder: Path, where: str) -> tuple[bool, str]:
    return True, f"{counted(len(open_merged(folder, where).files), 'file')}, as written"


def _merged_spec(folder: Path, where: str) -> tuple[bool, str]:
    record = read_merged_record(folder, where)
    spec = merged_spec(record, where)
    what = "a config of PEFT" if spec is None else f"a spec with {', '.join(record.certificate.folded)}"
    return True, f"{what}, in the certificate as well" if spec is not None else what


def _merged_certificate(folder: Path, where: str) -> tuple[bool, str]:
    kept = read_merged_record(folder, where).certificate
    outputs = ", ".join(f"{name} {value:.1e}" for name, value in kept.outputs.items())
    detail = f"outputs differ by at most {outputs}" if outputs else f"{counted(len(kept.sites))} probed"
    return kept.passed, f"stored by the merge: {detail}"
