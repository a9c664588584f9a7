"""Tensor edits: a table of what each adaptation does with rows of stored tensors.

`EXCLUSIONS` alone determines which edits cannot be combined.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum

from graftc.passes.core.weights.weight_slice import WeightSlice
from graftc.records.site_key import SiteKey
from graftc.specs.errors.diagnostics import GraftError


class EditMode(StrEnum):
    """The ways in which an adaptation uses or changes rows of a stored tensor."""

    CONSTANT = "constant"
    """Reads the rows once, to compute constants from their values."""
    TRAINED = "trained"
    """Trains a copy that is used instead of the rows (an overlay)."""
    ADDED = "added"
    """Adds to the rows' entries, on top of what other adaptations add."""
    REPLACED = "replaced"
    """Replaces the rows with values that do not depend on the base's."""
    REQUANTISED = "requantised"
    """Chooses the codes of the packed weight, for all that read it."""


CHANGING = (EditMode.TRAINED, EditMode.ADDED, EditMode.REPLACED)
"""Modes that change the values seen by the tensor's readers."""


@dataclass(frozen=True)
class TensorEdit:
    """One adaptation's use or change of rows of a stored tensor.

    Attributes:
        owner: name of the adaptation.
        own: the slice of the rows; it also contains the tensor's name.
        mode: the kind of edit.
        site: key of the site where the edit was inserted; None for an edit that belongs to the whole adaptation.
        trained: the trained copy's name in the Store; empty in all modes except `EditMode.TRAINED`.
    """

    owner: str
    own: WeightSlice
    mode: EditMode
    site: SiteKey | None = None
    trained: str = ""


@dataclass(frozen=True)
class Exclusion:
    """A rule that excludes two edits of overlapping rows, based on their modes.

    Attributes:
        existing: modes of the existing edit.
        new: modes of the later edit.
        message: template of the error message; ``{new}`` and ``{existing}`` are the owners, ``{rows}`` and ``{tensor}``
            those of the later edit.
        hint: template of the hint.
        same_owner: whether the rule also applies within one adaptation.
        any_rows: whether the rule also applies to different rows, because rows of a packed weight may share scales.
    """

    existing: frozenset[EditMode]
    new: frozenset[EditMode]
    message: str
    hint: str
    same_owner: bool = True
    any_rows: bool = False


_TWICE = "{new!r} and {existing!r} would both train {rows} of {tensor}"
_LEAVE_OUT = "leave the tensor out of one of them"
_FIXED = "{new!r} would train {rows} of {tensor}, whose values {existing!r} treats as constant"
_BEFORE = "put {new!r} before {existing!r} in the spec, or leave the site out of one of them"

EXCLUSIONS: tuple[Exclusion, ...] = (
    Exclusion(
        existing=frozenset({EditMode.TRAINED, EditMode.REPLACED}),
        new=frozenset({EditMode.TRAINED, EditMode.ADDED, EditMode.REPLACED}),
        message=_TWICE,
        hint=_LEAVE_OUT,
    ),
    Exclusion(
        existing=frozenset({EditMode.ADDED}),
        new=frozenset({EditMode.TRAINED, EditMode.REPLACED}),
        message=_TWICE,
        hint=_LEAVE_OUT,
    ),
    Exclusion(
        existing=frozenset({EditMode.CONSTANT}),
        new=frozenset({EditMode.TRAINED, EditMode.ADDED, EditMode.REPLACED}),
        message=_FIXED,
        hint=_BEFORE,
        same_owner=False,
    ),
    Exclusion(
        existing=frozenset({EditMode.REQUANTISED}),
        new=frozenset({EditMode.REQUANTISED}),
        message="{new!r} and {existing!r} would both choose the codes of {rows} of {tensor}",
        hint=_LEAVE_OUT,
    ),
    Exclusion(
        existing=frozenset({EditMode.CONSTANT, EditMode.TRAINED, EditMode.REPLACED}),
        new=frozenset({EditMode.REQUANTISED}),
        message="{new!r} would change the codes of {rows} of {tensor}, whose values {existing!r} has already read",
        hint=_BEFORE,
        any_rows=True,
    ),
)
"""The edits that cannot be combined; if several rules apply, the first one is reported. Several adaptations may add to
the same rows, and rows may be changed before they are read as constants, since their current values are read."""


class TensorEdits(Collection[TensorEdit]):
    """The tensor edits of one Program, in the order in which they were made.

    A lookup takes time proportional to the number of edits of the given tensor or owner.

    Args:
        edits: edits to record without checking them against one another.
    """

    def __init__(self, edits: Iterable[TensorEdit] = ()) -> None:
        self._edits: list[TensorEdit] = []
        self._at: dict[str, list[TensorEdit]] = {}
        self._of: dict[str, list[TensorEdit]] = {}
        for edit in edits:
            self._record(edit)

    def __len__(self) -> int:
        return len(self._edits)

    def __iter__(self) -> Iterator[TensorEdit]:
        return iter(self._edits)

    def __contains__(self, edit: object) -> bool:
        return isinstance(edit, TensorEdit) and edit in self._of.get(edit.owner, ())

    def check(self, edit: TensorEdit) -> None:
        """Check an edit against the recorded ones.

        Raises:
            GraftError: GC021 if one of `EXCLUSIONS` applies to overlapping rows.
        """
        own, owner = edit.own, edit.owner
        for rule in EXCLUSIONS:
            if edit.mode not in rule.new:
                continue
            for existing in self.at(own.tensor, rule.existing):
                if (rule.same_owner or existing.owner != owner) and (rule.any_rows or existing.own.overlaps(own)):
                    words = {"new": owner, "existing": existing.owner, "rows": own, "tensor": own.tensor}
                    raise GraftError("GC021", rule.message.format(**words), hint=rule.hint.format(**words))

    def add(self, edit: TensorEdit) -> None:
        """Record an edit.

        Raises:
            GraftError: see `check`.
        """
        self.check(edit)
        self._record(edit)

    def at(self, tensor: str, modes: Collection[EditMode] = tuple(EditMode)) -> list[TensorEdit]:
        """Return the edits of the tensor with this Store name in the given modes; in any mode by default."""
        return [edit for edit in self._at.get(tensor, ()) if edit.mode in modes]

    def of(self, owner: str) -> tuple[TensorEdit, ...]:
        """Return an adaptation's edits."""
        return tuple(self._of.get(owner, ()))

    def copies(self, owner: str | None = None) -> tuple[TensorEdit, ...]:
        """Return the edits that train a copy, of one adaptation or, by default, of all."""
        every = self._edits if owner is None else self._of.get(owner, ())
        return tuple(edit for edit in every if edit.trained)

    def trained_in_full(self) -> list[str]:
        """Return the names of tensors that have a trained copy of all rows, so that the base's values are not used."""
        return [edit.own.tensor for edit in self.copies() if edit.own.whole]

    def requantised(self, owner: str | None = None) -> frozenset[str]:
        """Return the names of packed weights whose codes were chosen by one adaptation or, by default, by any."""
        every = self._edits if owner is None else self._of.get(owner, ())
        return frozenset(edit.own.tensor for edit in every if edit.mode is EditMode.REQUANTISED)

    def copy_of(self, own: WeightSlice, owner: str) -> str | None:
        """Return the Store name of the copy of exactly these rows that an adaptation trains; None if there is none."""
        copies = self.at(own.tensor, (EditMode.TRAINED,))
        return next((edit.trained for edit in copies if edit.owner == owner and edit.own == own), None)

    def without(self, owners: Collection[str]) -> TensorEdits:
        """Return a copy of the table without the edits of some adaptations."""
        return TensorEdits(edit for edit in self._edits if edit.owner not in owners)

    def _record(self, edit: TensorEdit) -> None:
        self._at.setdefault(edit.own.tensor, []).append(edit)
        self._edits.append(edit)
        self._of.setdefault(edit.owner, []).append(edit)
