"""Move the contents of a staging folder to their destination, all or nothing; the next run finishes a partial move."""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from graftc.files.held_folder import HeldFolder

NEW, JOURNAL = "new", "commit.json"
_OLD = "old"
_JOURNAL_BYTES = 2**20


@dataclass(frozen=True)
class _Journal:
    """The entries to be put in place.

    Attributes:
        folder: the inode of the staging folder, so that a copy of the folder has no effect.
        place: inodes of the new entries, by name, in the order in which they are put in place.
        companions: names of files that belong to the last entry.
        replace: whether existing entries are replaced.
    """

    folder: int
    place: dict[str, int]
    companions: tuple[str, ...]
    replace: bool

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, raw: bytes) -> _Journal:
        """Read a journal.

        Raises:
            ValueError: if it is not a journal.
        """
        try:  # names need not be Unicode text, which strict JSON requires
            data: Any = json.loads(raw)
        except RecursionError:
            raise ValueError("not a journal") from None
        values: dict[str, Any] = data if isinstance(data, dict) else {}
        fields: list[Any] = [values.get(key) for key in ("folder", "place", "companions", "replace")]
        folder, place, companions, replace = fields
        good = (
            type(folder) is int
            and isinstance(place, dict)
            and len(place) > 0
            and all(_is_name(name) and type(inode) is int for name, inode in place.items())
            and isinstance(companions, list)
            and all(map(_is_name, companions))
            and isinstance(replace, bool)
        )
        if not good:
            raise ValueError("not a journal")
        return cls(folder, place, tuple(companions), replace)


def _is_name(name: object) -> bool:
    return isinstance(name, str) and name == os.path.basename(name) and name not in ("", ".", "..") and "\0" not in name


def commit(
    staging: HeldFolder,
    parent: HeldFolder,
    name: str,
    companions: Sequence[str],
    force: bool,
    mode_of_files: int | None,
) -> None:
    """Flush everything to disk, write the journal, and put everything in place.

    Args:
        staging: the staging folder, which contains the new entries.
        parent: the folder to put them in.
        name: the name of the main entry; other entries beside it are put in place as well.
        companions: names of files that belong to the main entry.
        force: whether to replace existing entries.
        mode_of_files: permissions that files get in addition to their own.

    Raises:
        OSError: if an operation fails, or something is in the way. In that case, nothing has changed.
    """
    if not staging.is_at_its_path():
        raise FileNotFoundError(errno.ENOENT, "it has been replaced by something else", str(staging.path))
    with staging.inner(NEW) as new:
        names = new.names()
        if name not in names:
            raise FileNotFoundError(errno.ENOENT, "nothing was written", str(parent.path / name))
        for each in names:
            new.flush(each, mode_of_files)
        new.sync()
        # The entry that names the others appears last and disappears first, so that it never refers to missing entries.
        names.remove(name)
        place = {each: new.stat(each).st_ino for each in [*names, name]}
    journal = _Journal(staging.stat().st_ino, place, tuple(companions), force)
    draft = f"{JOURNAL}.draft"
    if staging.exists(draft):  # left by a run that was killed here
        staging.remove(draft)
    staging.write(draft, journal.to_json())
    staging.rename(draft, staging, JOURNAL)
    staging.sync()
    finish(staging, parent)


def finish(staging: HeldFolder, parent: HeldFolder) -> None:
    """Put in place the entries that the journal lists, if any; if the process is killed, another call continues.

    Raises:
        OSError: if something is in the way.
        ValueError: if the journal does not belong to this folder.
    """
    try:
        journal = _Journal.from_json(staging.read(JOURNAL, _JOURNAL_BYTES))
    except FileNotFoundError:
        return
    place = list(journal.place)
    if journal.folder != staging.stat().st_ino or not staging.path.name.startswith(f".{place[-1]}.graftc-"):
        raise ValueError("the journal belongs to another folder")
    with staging.inner(NEW) as new:
        # After an exchange, the old entry is there, under the name of the new one.
        pending = [n for n in place if new.exists(n) and new.stat(n).st_ino == journal.place[n]]
        try:
            _put(staging, parent, new, journal, pending)
        except OSError:
            _take_back(staging, parent, new, pending)
            raise
        finally:
            with contextlib.suppress(OSError):
                parent.sync()


def _put(staging: HeldFolder, parent: HeldFolder, new: HeldFolder, journal: _Journal, pending: Sequence[str]) -> None:
    """Put the pending entries in place."""
    place, companions = list(journal.place), journal.companions
    last = place[-1]
    if journal.replace and last in pending:
        alone = len(place) == 1 and not any(map(parent.exists, companions))
        if alone and _exchanged(new, parent, last):
            return
        if not staging.is_folder(_OLD):
            staging.make(_OLD)
        with staging.inner(_OLD) as old:
            for name in (last, *companions):
                # A companion that is already in place is a new one.
                if parent.exists(name) and (name not in place or name in pending):
                    if old.exists(name):
                        old.remove(name)
                    parent.rename(name, old, name)
    for name in pending:
        new.rename_new(name, parent, name)


def _exchanged(new: HeldFolder, parent: HeldFolder, name: str) -> bool:
    """Put a new entry in place in one step, with a swap if needed; return False if the system cannot swap."""
    if not parent.exists(name) or not (new.is_folder(name) or parent.is_folder(name)):
        new.rename(name, parent, name)
        return True
    return new.exchange(name, parent, name)


def _take_back(staging: HeldFolder, parent: HeldFolder, new: HeldFolder, placed: Sequence[str]) -> None:
    """Restore the state before the first entry was put in place."""
    for name in reversed(placed):
        if not new.exists(name):
            parent.rename(name, new, name)
    if not staging.is_folder(_OLD):
        return
    with staging.inner(_OLD) as old:
        for name in old.names():
            if not parent.exists(name):
                old.rename(name, parent, name)
