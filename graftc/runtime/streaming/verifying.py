"""Verify a merged folder against its base and its adapter: everything is folded again and compared."""

from __future__ import annotations

import os

from graftc.files.tensors.folder import TensorFolder
from graftc.files.tensors.writing import FLOATING
from graftc.runtime.artifact.places import RECORD
from graftc.runtime.artifact.records import MergedRecord, merged_spec, read_merged_record
from graftc.runtime.loading.verify import Verification, verify
from graftc.runtime.streaming.adapters import read_updates
from graftc.runtime.streaming.merge_plan import MergePlan, make_plan
from graftc.runtime.streaming.site_fold import Folds, RowTarget
from graftc.runtime.streaming.update import AdapterUpdates
from graftc.runtime.streaming.work import Progress, fold_shard, shards, untouched
from graftc.specs.errors.arguments import as_path
from graftc.specs.errors.text import counted
from graftc.specs.io import parse_spec


def verify_checkpoint(
    path: str | os.PathLike[str],
    adapter: str | os.PathLike[str],
    model: str | os.PathLike[str] | None = None,
    *,
    progress: Progress = lambda done, size: None,
) -> Verification:
    """Check a merged folder, whatever program wrote it, against the base and the adapter that it was made from.

    Every site is folded again and probed against the unfolded map, and each stored entry must be its exact value
    rounded to nearest. Every other tensor must equal the base's, bit for bit. The tensors may be distributed over files
    differently than in the base.

    Args:
        path: the merged folder.
        adapter: a graftc artifact, or a folder that peft wrote.
        model: the base's folder; by default the one that the adapter names.
        progress: called with the number of bytes of the base's files processed so far, and their total.

    Raises:
        GraftError: as in `merge_checkpoint`, if the base or the adapter cannot be read, or if they do not fit.
    """
    folder = as_path(path)
    base, updates_of = read_updates(as_path(adapter), None if model is None else as_path(model))
    checkpoint = TensorFolder(base)
    plan = make_plan(checkpoint, updates_of(checkpoint))
    verification = Verification()
    if (folder / RECORD).is_file():
        verification = verify(folder)
        verification.add(
            "sources", lambda: _sources(read_merged_record(folder, str(folder)), plan.updates, str(folder))
        )
    state: dict[str, TensorFolder] = {}

    def names() -> tuple[bool, str]:
        merged = state["merged"] = TensorFolder(folder)
        return _same_names(checkpoint, merged, plan)

    if not verification.add("tensors", names):
        return verification
    folds = Folds()
    others: list[tuple[str, bool]] = []
    written = state["merged"]
    for shard, advance in shards(checkpoint, progress):
        folded = fold_shard(plan, shard, RowTarget(shard.tensors, written), advance)
        folds.add(folded)
        others += untouched(plan, shard, written, folded.changed)
        written.release()
    verification.add("folded", lambda: _folded(folds))
    verification.add("untouched", lambda: _untouched(others))
    return verification


def _sources(record: MergedRecord, updates: AdapterUpdates, where: str) -> tuple[bool | None, str]:
    """Check that a record names this adapter and its base."""
    if record.adapter is None:
        return None, "a merge in memory records only the spec and the base"
    if (record.adapter.kind, record.adapter.sha256) != (updates.kind, updates.digest):
        return False, f"merged from {record.adapter.kind} {record.adapter.sha256[:12]}, not from this adapter"
    spec = merged_spec(record, where)
    same = record.spec == updates.spec if spec is None else spec == parse_spec(updates.spec)
    if (record.base, same) != (updates.base, True):
        return False, f"its {'base' if same else 'spec'} is not the adapter's"
    return True, f"{updates.kind} {updates.digest[:12]}, with the same spec and base"


def _same_names(base: TensorFolder, merged: TensorFolder, plan: MergePlan) -> tuple[bool, str]:
    ours, theirs = base.entries, merged.entries
    if other := sorted(ours.keys() ^ theirs.keys()):
        has = "lacks" if other[0] in ours else "has"
        return False, f"it {has} {other[0]}" + (f", and {len(other) - 1} more differ" if other[1:] else "")
    for name, tensor in ours.items():
        entry = theirs[name]
        if entry.shape != tensor.shape or (entry.dtype != tensor.dtype and entry.dtype not in FLOATING):
            return False, f"{name} is {entry}, but {tensor} in the base"
    return True, f"{counted(len(ours), 'tensor')} with the names and sizes of the base's"


def _folded(folds: Folds) -> tuple[bool, str]:
    sites, kept = folds.evidence, folds.retention
    failed = [site for site in sites if not site.passed]
    if failed:
        shown = "; ".join(
            f"{site.site}: off by {site.rounding:.3g} units in the last place, {site.retention.error:.1e} of the update"
            for site in failed[:3]
        )
        what = "differ from the base with the adapter, rounded to nearest"
        return False, f"{len(failed)} of {counted(len(sites))} {what}: {shown}"
    worst = max((site.algebra for site in sites), default=0.0)
    return True, (
        f"{counted(len(sites))} within {worst:.1e} in float64, every entry rounded to nearest; "
        f"{100 * kept.norm:.1f} % of the update is there"
    )


def _untouched(others: list[tuple[str, bool]]) -> tuple[bool, str]:
    wrong = [name for name, same in others if not same]
    if wrong:
        return False, f"{counted(len(wrong), 'tensor')} different from the base's: {', '.join(wrong[:3])}"
    return True, f"{counted(len(others), 'tensor')} equal to the base's, bit for bit"
