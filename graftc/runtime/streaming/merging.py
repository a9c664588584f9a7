"""Merge an adapter into a checkpoint file by file, without building a model and with little in memory at a time."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from graftc.compiler.folding.certificate import require_changed
from graftc.compiler.folding.certify import Advance
from graftc.files.held_folder import HeldFolder
from graftc.files.tensors.folder import TensorFolder
from graftc.files.tensors.foreign_folders import require_regular_files
from graftc.files.tensors.headers import Shard
from graftc.files.tensors.mapped import DTYPES
from graftc.files.tensors.weights import leads_inside
from graftc.files.writing import check_apart, check_destination, staged
from graftc.records.certificate import Certificate, SiteEvidence
from graftc.runtime.artifact.places import is_merged
from graftc.runtime.artifact.records import write_merged_record
from graftc.runtime.artifact.write import file_digest, listed
from graftc.runtime.sources.companions import COMPANIONS
from graftc.runtime.streaming.adapters import read_updates
from graftc.runtime.streaming.journal import Journal, ShardDone
from graftc.runtime.streaming.merge_plan import MergePlan, make_plan, stored_config
from graftc.runtime.streaming.new_file import create_file
from graftc.runtime.streaming.resuming import States, accepted_file, merge_identity
from graftc.runtime.streaming.site_fold import Folds, RowTarget
from graftc.runtime.streaming.work import Progress, fold_shard, shards, untouched
from graftc.runtime.swapped_arguments import check_adapter_and_base
from graftc.specs.errors.arguments import absolute_path, as_path
from graftc.specs.errors.calls import public
from graftc.specs.errors.diagnostics import GraftError
from graftc.specs.errors.text import counted
from graftc.specs.records.record import Record

BESIDE = ("config.json", "generation_config.json", *COMPANIONS, "*.py")
"""Patterns for the base's files that its users need and that folding does not change."""


@dataclass(frozen=True)
class StreamedMerge(Record):
    """The result of a merge."""

    path: Path | None
    """The written folder; None if the merge was only measured."""

    certificate: Certificate
    """The evidence for every site, and how much of the update is left after rounding."""

    folded: tuple[str, ...]
    """Names of the adaptations."""

    untouched: int
    """The number of tensors that equal the base's, bit for bit."""

    resumed: int
    """The number of files that a killed run had already finished."""

    dtype: str
    """The dtype in which the changed weights are stored."""


@public("graftc.merge_checkpoint")
def merge_checkpoint(
    adapter: str | os.PathLike[str],
    model: str | os.PathLike[str] | None = None,
    out: str | os.PathLike[str] | None = None,
    *,
    dtype: torch.dtype | None = None,
    allow_unchanged: bool = False,
    force: bool = False,
    progress: Progress = lambda done, size: None,
) -> StreamedMerge:
    """Merge an adapter into a folder of safetensors files, without capturing or loading the model.

    Every file is copied, and folded weights are written into the copy, some rows at a time, computed in float64 and
    rounded once. At every site, random inputs are run through the unfolded map, which does not use the fold, and
    through the folded rows. Everything else is compared with the base after writing. The folder appears only once it is
    complete; if the process is killed, the same call resumes the merge, after comparing the existing files with the
    base and the adapter.

    Args:
        adapter: a graftc artifact, or a folder that peft wrote.
        model: the base's folder; by default the one that the adapter names.
        out: the folder to create; None to measure without writing.
        dtype: ``torch.float32`` to store 16-bit weights in float32, which preserves the whole update.
        allow_unchanged: whether to write the folder even if no entry differs from the base's.
        force: whether to replace an existing merged model.
        progress: called with the number of bytes of the base's files processed so far, and their total.

    Raises:
        GraftError: GC050 for an adaptation that does not fold, GC051 if the evidence fails, GC063 and GC064 for the
            destination, GC086 and GC087 for the base of an artifact, GC100 and GC101 for the base's files, GC102 if the
            adapter does not fit, GC103 if the model itself is needed, GC104 if nothing would change. After an error, no
            folder is created.
    """
    check_adapter_and_base("graftc.merge_checkpoint", adapter, model)
    source = as_path(adapter)
    wide = _as_written(dtype)
    base, updates_of = read_updates(source, None if model is None else as_path(model))
    checkpoint = TensorFolder(base)
    before = _states(checkpoint)
    try:
        plan = make_plan(checkpoint, updates_of(checkpoint), wide)
        return _merge(plan, before, source, None if out is None else as_path(out), progress, allow_unchanged, force)
    except Exception:
        _require_unchanged(checkpoint, before)  # a base that has changed is reported before any other error
        raise


def _states(checkpoint: TensorFolder) -> States:
    states: dict[Path, tuple[int, int] | None] = {}
    for path in (shard.path for shard in checkpoint.shards):
        try:
            stat = path.stat()
            states[path] = stat.st_size, stat.st_mtime_ns
        except OSError:
            states[path] = None
    return states


def _require_unchanged(checkpoint: TensorFolder, before: States) -> None:
    """Raise GC100, which names every file that has changed since the start."""
    now = _states(checkpoint)
    if wrong := [str(path) for path, state in before.items() if now[path] != state]:
        hint = "merge again once nothing writes to the base"
        raise GraftError("GC100", f"{wrong[0]} changed while it was merged", hint=hint, details=wrong[1:])


def _merge(
    plan: MergePlan,
    states: States,
    source: Path,
    out: Path | None,
    progress: Progress,
    allow_unchanged: bool,
    force: bool,
) -> StreamedMerge:
    checkpoint, base = plan.checkpoint, plan.checkpoint.path
    done: dict[str, ShardDone] = {}
    if out is None:
        for shard, advance in shards(checkpoint, progress):
            done[shard.name] = _measured(plan, shard, advance)
        _require_unchanged(checkpoint, states)
        return _result(plan, None, done, 0, allow_unchanged=allow_unchanged)
    path = absolute_path(out)
    check_apart(path, source, base)
    check_destination(path, force=force, replaceable=is_merged)
    require_regular_files(base, "GC100")
    resume = merge_identity(plan, states)
    with staged(path, force=force, replaceable=is_merged, sources=[base], resume=resume, keep_modes=True) as folder:
        folder.mkdir(exist_ok=True)
        journal, resumed = Journal(folder.parent.parent, folder), 0
        before = journal.done()
        with HeldFolder.open(folder) as opened:
            for left in [name for name in opened.names() if name not in before]:
                opened.remove(left)  # files that a killed run had not finished
        with ThreadPoolExecutor(1, "graftc-finish") as pool:  # finishes a file while the next one is folded
            pending: dict[str, Future[ShardDone]] = {}
            for shard, advance in shards(checkpoint, progress):
                file, digest = folder / shard.name, before.get(shard.name)
                shard_done = None if digest is None else accepted_file(plan, shard, file, advance, digest)
                resumed += shard_done is not None
                if shard_done is None:
                    file.unlink(missing_ok=True)
                    written, folds = _folded(plan, shard, file, advance)
                    done |= {name: future.result() for name, future in pending.items()}
                    pending = {shard.name: pool.submit(_finished, plan, shard, written, folds, journal)}
                else:
                    done[shard.name] = shard_done
                advance(1.0)
            done |= {name: future.result() for name, future in pending.items()}
        done = {shard.name: done[shard.name] for shard in checkpoint.shards}
        result = _result(plan, path, done, resumed, allow_unchanged=allow_unchanged)
        _copy_beside(plan, folder)
        _write_record(plan, folder, result, done)
        _require_unchanged(checkpoint, states)
    return result


def _as_written(dtype: torch.dtype | None) -> str | None:
    if dtype not in (None, torch.float32):
        hint = "leave it out for the base's own dtype; a narrower one would round values that folding did not change"
        raise GraftError("GC073", f"merged weights can be stored in float32, not in {dtype}", hint=hint)
    return None if dtype is None else "F32"


def _measured(plan: MergePlan, shard: Shard, advance: Advance) -> ShardDone:
    """Fold a file and measure the result, without writing it."""
    dtypes = {name: plan.written(stored) for name, stored in shard.tensors.items()}
    folds = fold_shard(plan, shard, RowTarget(shard.tensors, None, dtypes=dtypes), advance)
    _require_passed(folds.evidence)
    kept = shard.tensors.keys() - {own.tensor for own in folds.changed} - plan.replacements.keys()
    return ShardDone("", len(kept), folds)


def _folded(plan: MergePlan, shard: Shard, path: Path, advance: Advance) -> tuple[TensorFolder, Folds]:
    """Create one file and fold into it; return its tensors, which are not on the disk yet, and what was measured."""
    create_file(plan, shard, path)
    written = TensorFolder(path, writable=True)
    folds = fold_shard(plan, shard, RowTarget(shard.tensors, written, writes=True), advance)
    _require_passed(folds.evidence)
    return written, folds


def _finished(plan: MergePlan, shard: Shard, written: TensorFolder, folds: Folds, journal: Journal) -> ShardDone:
    """Flush one file to disk, check what nothing folds into, and list the file in the journal."""
    path = written.path
    written.release()
    with TensorFolder(path) as stored:
        compared = dict(untouched(plan, shard, stored, folds.changed))
    if wrong := [name for name, same in compared.items() if not same]:
        message = f"{counted(len(wrong), 'tensor')} changed although nothing folds into them: {wrong[0]}"
        raise GraftError("GC051", message, details=wrong[1:10])
    digest = file_digest(path)
    shutil.copymode(shard.path, path)
    with path.open("rb") as file:
        os.fsync(file.fileno())
    done = ShardDone(digest, len(compared), folds)
    journal.add(shard.name, done)
    return done


def _require_passed(sites: Iterable[SiteEvidence]) -> None:
    """Refuse a fold whose evidence fails.

    Raises:
        GraftError: GC051, or GC102 if values are not finite.
    """
    failed = Certificate(tuple(s for s in sites if not s.passed), {}, 0.0, "", "")
    if not failed.sites:
        return
    failures = failed.failures()
    if any(not site.finite for site in failed.sites):
        hint = "look for NaN and infinities in the base and in the adapter"
        raise GraftError("GC102", failures[0], hint=hint, details=failures[1:10])
    raise GraftError("GC051", f"the fold is not the adaptation: {failures[0]}", details=failures[1:10])


def _result(
    plan: MergePlan, path: Path | None, done: Mapping[str, ShardDone], resumed: int, *, allow_unchanged: bool
) -> StreamedMerge:
    """Combine the reports of all files into the result of the merge.

    Raises:
        GraftError: GC104 if nothing changed, unless that is allowed.
    """
    folds, updates = Folds(), plan.updates
    for each in done.values():
        folds.add(each.folds)
    # As in memory: in the order in which the model reads the tensors, and in the order of the folds for equal tensors.
    read_at = {name: place for place, name in enumerate(updates.order)}
    listed_sites = [copy.site for copy in updates.replacements] + [site.name for site in plan.sites]
    listed_sites.sort(key=lambda site: read_at.get(site.partition("[")[0], len(read_at)))
    sites = {evidence.site: evidence for evidence in folds.evidence}
    changed = {site.weight.tensor for site in plan.sites} | plan.replacements.keys()
    dtypes = {plan.written(plan.checkpoint.entries[name]) for name in changed}
    dtype = str(DTYPES[sorted(dtypes)[0]]).removeprefix("torch.")
    note = "made from files: every site was probed, but the outputs of the whole model were not compared"
    certificate = Certificate(
        tuple(sites[site] for site in dict.fromkeys(listed_sites) if site in sites),
        *({}, 0.0, "", ""),
        fingerprint=updates.base,
        dtype=dtype,
        notes=(note,),
        retention=folds.retention,
    )
    require_changed(certificate, allow_unchanged)
    untouched = sum(each.untouched for each in done.values())
    return StreamedMerge(path, certificate, updates.names, untouched, resumed, dtype)


def _copy_beside(plan: MergePlan, folder: Path) -> None:
    """Copy the index and the files beside the weights, and set the dtype in the config if it changes."""
    base = plan.checkpoint.path
    for file in dict.fromkeys(file for pattern in BESIDE for file in sorted(base.glob(pattern))):
        if file.is_symlink() and not leads_inside(file):
            raise GraftError("GC101", f"{file} is a link to a file outside the folder")
        if file.is_file():
            shutil.copyfile(file, folder / file.name)
            shutil.copymode(file, folder / file.name)
    if plan.checkpoint.index is not None:
        _write_index(plan, folder)
    if plan.dtype is not None and (config := stored_config(base)):
        key = "torch_dtype" if "torch_dtype" in config and "dtype" not in config else "dtype"
        config[key] = str(DTYPES[plan.dtype]).removeprefix("torch.")
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _write_index(plan: MergePlan, folder: Path) -> None:
    index, name = plan.checkpoint.index, plan.checkpoint.index_name
    assert index is not None and name is not None
    source = plan.checkpoint.path / name
    shutil.copyfile(source, folder / name)
    metadata = index.get("metadata")
    if plan.dtype is not None and isinstance(metadata, dict) and "total_size" in metadata:
        tensors = TensorFolder(folder).entries.values()
        size = sum(tensor.end - tensor.start for tensor in tensors)
        changed = {**index, "metadata": {**metadata, "total_size": size}}
        (folder / name).write_text(json.dumps(changed, indent=2) + "\n", encoding="utf-8")
    shutil.copymode(source, folder / name)


def _write_record(plan: MergePlan, folder: Path, result: StreamedMerge, done: Mapping[str, ShardDone]) -> None:
    """Write the record of the weights' origin next to the weights; see `graftc.runtime.deploy.merged_folder`."""
    known = {name: {"bytes": (folder / name).stat().st_size, "sha256": each.sha256} for name, each in done.items()}
    others = {name: entry for name, entry in listed(folder, skip=known)}
    files, updates = dict(sorted({**known, **others}.items())), plan.updates
    write_merged_record(folder, updates.spec, result.certificate, files, kind=updates.kind, sha256=updates.digest)
