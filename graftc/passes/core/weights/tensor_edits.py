"""Tensor edits: what each adaptation does with which rows of a stored tensor, in one table with an index by name.

`EXCLUSIONS` is the only rule for which of them cannot be combined.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum

from graftc.passes.core.weights.weight_slice import WeightSlice
from graftc.records.site_key import SiteKey
from graftc.specs.errors.diagnostics import GraftError


class EditMode(StrEnum):
    """The kinds of changes that an adaptation makes to rows of a stored tensor."""

    CONSTANT = "constant"
    """It reads them once: something that is never trained again follows from their values."""
    TRAINED = "trained"
    """A copy trains in their place (an overlay)."""
    ADDED = "added"
    """It adds to their entries, on top of what others add."""
    REPLACED = "replaced"
    """Something else is in their place, of which nothing of the base remains."""


CHANGING = (EditMode.TRAINED, EditMode.ADDED, EditMode.REPLACED)
"""Modes in which whatever reads the tensor reads something else."""


@dataclass(frozen=True)
class TensorEdit:
    """A change that one adaptation makes to rows of a stored tensor.

    Attributes:
        owner: name of the adaptation.
        own: slice of the rows, which names the tensor.
        mode: the kind of change.
        site: key of the site where it was inserted; None for an edit that belongs to the whole adaptation.
        trained: name in the Store of the copy that is trained; empty in all modes except `EditMode.TRAINED`.
    """

    owner: str
    own: WeightSlice
    mode: EditMode
    site: SiteKey | None = None
    trained: str = ""


@dataclass(frozen=True)
class Exclusion:
    """The modes of two edits of overlapping rows that exclude one another.

    Attributes:
        existing: modes of the existing edit.
        new: modes of the later edit.
        message: template of the error message; ``{new}`` and ``{existing}`` are the owners, ``{rows}`` and ``{tensor}``
            those of the later edit.
        hint: template of the hint about what to do.
        same_owner: whether the rule applies within one adaptation as well.
    """

    existing: frozenset[EditMode]
    new: frozenset[EditMode]
    message: str
    hint: str
    same_owner: bool = True


_TWICE = "{new!r} and {existing!r} would both train {rows} of {tensor}"
_LEAVE_OUT = "leave the tensor out of one of them"
_FIXED = "{new!r} would train {rows} of {tensor}, whose values are constants to {existing!r}"
_BEFORE = "put {new!r} before {existing!r} in the spec, or leave the place out of one of them"

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
)
"""Which edits cannot be combined; of several that hold, the first one is reported. Sums are added up, so that many may
add to the same rows, and what is read as a constant may have been changed before, since it is read as it is then."""


class TensorEdits(Collection[TensorEdit]):
    """The tensor edits of one Program, in the order in which they were made.

    A lookup takes time in proportion to the number of edits of the tensor, or of the owner.

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
                if (rule.same_owner or existing.owner != owner) and existing.own.overlaps(own):
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
        """Return the edits of a tensor, by its Store name, in the given modes, by default in any."""
        return [edit for edit in self._at.get(tensor, ()) if edit.mode in modes]

    def of(self, owner: str) -> tuple[TensorEdit, ...]:
        """Return the edits of an adaptation."""
        return tuple(self._of.get(owner, ()))

    def copies(self, owner: str | None = None) -> tuple[TensorEdit, ...]:
        """Return the edits that train a copy: those of one adaptation, or by default of all."""
        every = self._edits if owner is None else self._of.get(owner, ())
        return tuple(edit for edit in every if edit.trained)

    def trained_in_full(self) -> list[str]:
        """Return the tensors that are trained in full as a copy: nothing depends on the base's own values."""
        return [edit.own.tensor for edit in self.copies() if edit.own.whole]

    def copy_of(self, own: WeightSlice, owner: str) -> str | None:
        """Return the Store name of the copy of exactly these rows that an adaptation trains; None if it trains none."""
        copies = self.at(own.tensor, (EditMode.TRAINED,))
        return next((edit.trained for edit in copies if edit.owner == owner and edit.own == own), None)

    def without(self, owners: Collection[str]) -> TensorEdits:
        """Return a table without the edits of some adaptations."""
        return TensorEdits(edit for edit in self._edits if edit.owner not in owners)

    def _record(self, edit: TensorEdit) -> None:
        self._at.setdefault(edit.own.tensor, []).append(edit)
        self._edits.append(edit)
        self._of.setdefault(edit.owner, []).append(edit)
