"""Resume a merge that was killed: decide which of the files that it left behind are accepted."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from graftc.compiler.folding.certify import Advance
from graftc.files.tensors.folder import TensorFolder
from graftc.files.tensors.headers import Shard
from graftc.runtime.streaming.journal import ShardDone
from graftc.runtime.streaming.merge_plan import MergePlan
from graftc.runtime.streaming.site_fold import RowTarget
from graftc.runtime.streaming.work import fold_shard, untouched
from graftc.specs.errors.diagnostics import GraftError
from graftc.version import __version__

States = Mapping[Path, tuple[int, int] | None]
"""The size and the modification time of each file; None for a missing one."""


def merge_identity(plan: MergePlan, states: States) -> str:
    """Return the SHA-256 of the inputs that determine the result: base files, adapter, dtype, graftc's version."""
    files = [
        (shard.name, states[shard.path], sorted(map(str, shard.tensors.items()))) for shard in plan.checkpoint.shards
    ]
    data = [os.path.realpath(plan.checkpoint.path), files, plan.updates.digest, plan.dtype, __version__]
    return hashlib.sha256(json.dumps(data).encode()).hexdigest()


def accepted_file(plan: MergePlan, shard: Shard, path: Path, advance: Advance, digest: str) -> ShardDone | None:
    """Return the report for a file left by a killed run; None unless it is exactly the file that this merge creates.

    Everything is folded again and compared bit for bit, because anybody may have written the file.
    """
    try:
        written = TensorFolder(path)
    except GraftError:
        return None
    (stored_shard,) = written.shards
    wanted = {name: (plan.written(stored), stored.shape) for name, stored in shard.tensors.items()}
    actual = {name: (stored.dtype, stored.shape) for name, stored in stored_shard.tensors.items()}
    if actual != wanted or stored_shard.metadata != shard.metadata:
        return None
    with written:
        folds = fold_shard(plan, shard, RowTarget(shard.tensors, written), advance)
        compared = dict(untouched(plan, shard, written, folds.changed))
    if not all(site.passed for site in folds.evidence) or not all(compared.values()):
        return None
    shutil.copymode(shard.path, path)
    return ShardDone(digest, len(compared), folds)
