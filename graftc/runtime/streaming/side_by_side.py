"""Fold several sites at the same time, each in a thread of its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch

from graftc.runtime.streaming.merge_plan import MergePlan
from graftc.runtime.streaming.site_fold import Folds, RowTarget, SiteFold
from graftc.runtime.streaming.sites import BLOCK, FileSite


@contextmanager
def folding(plan: MergePlan, sites: Sequence[FileSite], target: RowTarget) -> Iterator[Iterator[Folds]]:
    """Yield what is measured at each site, in the order of the sites.

    As many sites are folded at once as torch has threads: blocks are too small for operators to use several threads.
    Sites that do not fold row by row may be large, and are folded one at a time.

    Args:
        plan: the merge.
        sites: the sites.
        target: the destination of folded rows; different sites have different rows.

    Raises:
        GraftError: as for `SiteFold.fold`, in the site's turn; sites that have not begun by then are not folded.
    """
    folds = [SiteFold(plan, site, target) for site in sites]
    count = torch.get_num_threads()
    with _threads(min(count, len(sites))) as pool:
        pending = [pool.submit(fold.fold) if count > 1 and _is_small(fold.site) else None for fold in folds]
        yield (fold.fold() if own is None else own.result() for fold, own in zip(folds, pending, strict=True))


def _is_small(site: FileSite) -> bool:
    return min(site.rows_per_block, site.weight.count) * site.weight.in_features <= 2 * BLOCK


@contextmanager
def _threads(count: int) -> Iterator[ThreadPoolExecutor]:
    """Yield a pool of threads, in each of which torch computes without others."""
    every = torch.get_num_threads()
    pool = ThreadPoolExecutor(max(1, count), "graftc-fold", initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(every)  # what a thread sets is also what new threads begin with
