"""Write files and folders so that a destination is either absent or complete, whatever happens on the way.

Everything is written to a *staging folder* beside the destination, ``.NAME.graftc-RANDOM``: first ``new/NAME`` (and
files that belong to it), then, once all of it is on disk, a journal ``commit.json``. From then on, the write counts as
done: only renaming remains, which the next run finishes if this one is killed. A staging folder without a journal is
discarded by the next run. The process that owns a staging folder holds a lock on it, which ends with the process.

Long-running work can be *resumed*: its staging folder is named after the work, and contains a note ``resume.json``. If
the process is killed, the folder stays until the same work is resumed in it, or until other work is to be written to
the same destination.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from graftc.files.commit import NEW, commit
from graftc.files.destinations import (
    cannot_write,
    check_apart,
    check_destination,
    check_folder,
    holds,
    overlap,
)
from graftc.files.held_folder import HeldFolder
from graftc.files.staging import discard_others, recover, recover_in, staging_folder
from graftc.specs.errors.arguments import absolute_path
from graftc.specs.errors.diagnostics import GraftError

__all__ = [
    "alone_in",
    "check_apart",
    "check_destination",
    "check_folder",
    "recover",
    "staged",
    "staged_or_dropped",
    "write_text",
]


@contextlib.contextmanager
def staged(
    path: Path,
    *,
    force: bool = False,
    companions: Sequence[str] = (),
    replaceable: Callable[[Path], bool] = Path.is_file,
    sources: Iterable[str | Path | None] = (),
    resume: str | None = None,
    keep_modes: bool = False,
) -> Iterator[Path]:
    """Yield a path with the destination's name for a file or folder, which is put in place if the block succeeds.

    Args:
        path: the destination. Missing folders above it are created.
        force: whether to replace an existing destination. A link itself is replaced, never its target.
        companions: names of files that may be written beside the destination and belong to it.
        replaceable: a function that returns whether ``force`` may replace an existing path; by default, only files.
        sources: paths that are still read during the write: replacing them or a folder above them is refused.
        resume: SHA-256 of everything that determines the result. Files left by a killed run of the same work are
            available again; notes about it can be stored in the staging folder, two levels above the yielded path.
        keep_modes: whether files keep the permissions that they are given; by default they also get those of new files.

    Raises:
        GraftError: GC063 if the destination exists and may not be replaced, or another process is doing the same work;
            GC064 if writing fails. In both cases, the destination is unchanged.
    """
    path = absolute_path(path)
    check_destination(path, force=force, companions=companions, replaceable=replaceable)
    for source in sources:
        if source is not None and holds(path, Path(source)):
            raise overlap(path, source)
    created: list[Path] = []
    mode_of_files = None if keep_modes else 0o666 & ~_umask()
    try:
        created = _make_parents(path.parent)
        with HeldFolder.open(path.parent, follow=True) as parent:
            recover_in(parent)
            check_destination(path, force=force, companions=companions, replaceable=replaceable)
            discard_others(parent, path.name, resume)
            with staging_folder(parent, path.name, resume) as staging:
                yield staging.path / NEW / path.name
                commit(staging, parent, path.name, companions, force, mode_of_files)
        created = []
    except OSError as error:
        raise cannot_write(path, error) from error
    finally:
        for folder in created:
            with contextlib.suppress(OSError):
                folder.rmdir()


@contextlib.contextmanager
def staged_or_dropped(
    path: Path | None,
    name: str,
    *,
    force: bool = False,
    replaceable: Callable[[Path], bool] = Path.is_file,
    sources: Iterable[str | Path | None] = (),
) -> Iterator[Path]:
    """Yield a path as `staged` does; if ``path`` is None, yield one named ``name`` that is deleted after the block.

    The latter is for output that is only checked.

    Raises:
        GraftError: under the same conditions as `staged`.
    """
    if path is None:
        with tempfile.TemporaryDirectory() as place:
            yield Path(place) / name
        return
    with staged(path, force=force, replaceable=replaceable, sources=sources) as staging:
        yield staging


def write_text(path: Path, text: str, *, force: bool = False) -> Path:
    """Write a UTF-8 text file, completely or not at all.

    Raises:
        GraftError: under the same conditions as `staged`.
    """
    with staged(path, force=force) as file:
        file.write_text(text, encoding="utf-8")
    return path


def _make_parents(folder: Path) -> list[Path]:
    """Create a folder and its parents if they are missing, and return the new folders, the innermost first."""
    missing = [step for step in (folder, *folder.parents) if not step.exists()]
    for step in reversed(missing):
        step.mkdir(exist_ok=True)
    return missing


@contextlib.contextmanager
def alone_in(folder: Path | None) -> Iterator[None]:
    """Lock a folder while the block runs, keeping out every other process, thread or call that locks it.

    Nothing is locked if there is no folder, it cannot be opened, or the system does not support such locks.

    Raises:
        GraftError: GC063 if it is already locked.
    """
    opened: HeldFolder | None = None
    if folder is not None:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError, PermissionError):
            opened = HeldFolder.open(folder, follow=True)
    if opened is None:
        yield
        return
    with opened:
        try:
            opened.lock()
        except BlockingIOError as error:
            hint = "wait until it has finished, or use another folder"
            raise GraftError("GC063", f"another run is using {folder}", hint=hint) from error
        yield


def _umask() -> int:
    current = os.umask(0o077)
    os.umask(current)
    return current
