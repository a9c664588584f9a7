"""Edits of stored tensors by adaptations: which of them exclude each other, and look-ups by an index."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest

from graftc.passes.core.weights.tensor_edits import EXCLUSIONS, EditMode, TensorEdit, TensorEdits
from graftc.passes.core.weights.weight_slice import Layout, WeightSlice
from graftc.specs.errors.diagnostics import GraftError
from tests.kit.counting import calls

CONSTANT, TRAINED, ADDED, REPLACED, REQUANTISED = EditMode
BOTH, FIXED, READ = "both train", "treats as constant", "has already read"


def rows(first: int, end: int, tensor: str = "layer.weight") -> WeightSlice:
    """Return a slice of rows of a matrix that has 12."""
    return WeightSlice(tensor, (12, 4), Layout.ROWS, ((first, end),))


def error_of(first: TensorEdit, new: TensorEdit) -> GraftError | None:
    """Return the error that the second edit raises after the first, or None."""
    edits = TensorEdits()
    edits.add(first)
    try:
        edits.add(new)
    except GraftError as error:
        assert list(edits) == [first]
        return error
    assert list(edits) == [first, new]
    return None


EXCLUDED = {
    (TRAINED, TRAINED): BOTH,
    (TRAINED, ADDED): BOTH,
    (TRAINED, REPLACED): BOTH,
    (REPLACED, TRAINED): BOTH,
    (REPLACED, ADDED): BOTH,
    (REPLACED, REPLACED): BOTH,
    (ADDED, TRAINED): BOTH,
    (ADDED, REPLACED): BOTH,
    (CONSTANT, TRAINED): FIXED,
    (CONSTANT, ADDED): FIXED,
    (CONSTANT, REPLACED): FIXED,
    (CONSTANT, REQUANTISED): READ,
    (TRAINED, REQUANTISED): READ,
    (REPLACED, REQUANTISED): READ,
    (REQUANTISED, REQUANTISED): "both choose the codes",
}
"""The modes of an edit that is there and of a later one that cannot be combined, with what the message says."""


@pytest.mark.parametrize(("old", "new"), list(itertools.product(EditMode, EditMode)))
def test_which_modes_exclude_one_another(old: EditMode, new: EditMode) -> None:
    """Every pair of modes is tried, with two owners and with one, on rows that overlap and on rows that do not."""
    first = TensorEdit("a", rows(0, 6), old)
    error = error_of(first, TensorEdit("b", rows(5, 8), new))
    wanted = EXCLUDED.get((old, new))
    assert (error is not None) == (wanted is not None)
    if error is not None and wanted is not None:
        assert error.code == "GC021" and wanted in error.message
        assert (
            error.message.startswith("'b'") and "'a'" in error.message and "rows 5:8 of layer.weight" in error.message
        )
    own = error_of(first, TensorEdit("a", rows(5, 8), new))
    assert (own is not None) == (wanted not in (None, FIXED))
    assert (error_of(first, TensorEdit("b", rows(6, 8), new)) is None) == (wanted != READ), "rows may share scales"
    assert error_of(first, TensorEdit("b", rows(5, 8, "layer.other"), new)) is None


def test_texts() -> None:
    """Messages name both adaptations and the tensor, and hints say what to change."""
    twice = error_of(TensorEdit("a", rows(0, 12), ADDED), TensorEdit("b", rows(0, 12), TRAINED))
    fixed = error_of(TensorEdit("a", rows(0, 12), CONSTANT), TensorEdit("b", rows(0, 12), TRAINED))
    assert twice is not None and fixed is not None
    assert twice.message == "'b' and 'a' would both train all of layer.weight"
    assert twice.hint == "leave the tensor out of one of them"
    assert fixed.message == "'b' would train all of layer.weight, whose values 'a' treats as constant"
    assert fixed.hint == "put 'b' before 'a' in the spec, or leave the site out of one of them"


def test_what_is_reported_of_several() -> None:
    """Another copy is reported before sums, and either before constants, in whichever order they were added."""
    edits = TensorEdits()
    for owner, first, mode in (("c", 0, CONSTANT), ("s", 2, ADDED), ("r", 4, REPLACED), ("t", 6, TRAINED)):
        edits.add(TensorEdit(owner, rows(first, first + 2), mode))
    with pytest.raises(GraftError, match="'n' and 'r' would both train"):
        edits.check(TensorEdit("n", rows(0, 12), TRAINED))
    with pytest.raises(GraftError, match="'n' and 's' would both train"):
        edits.check(TensorEdit("n", rows(0, 4), TRAINED))
    with pytest.raises(GraftError, match="'c' treats as constant"):
        edits.check(TensorEdit("n", rows(0, 4), ADDED))


def test_every_pair_has_one_rule() -> None:
    """No pair of modes is in two exclusions, so messages do not depend on the order of the rules."""
    pairs = [pair for rule in EXCLUSIONS for pair in itertools.product(rule.existing, rule.new)]
    assert len(pairs) == len(set(pairs)) and set(pairs) == set(EXCLUDED)


def test_look_ups() -> None:
    """Edits are found by tensor and modes, by owner, and by the rows that a copy replaces."""
    part, rest = rows(0, 3), rows(3, 12)
    trained = TensorEdit("a", part, TRAINED, trained="layer.graftc.a.weight")
    other, every = TensorEdit("b", rest, ADDED), TensorEdit("a", WeightSlice("bias", (12,)), TRAINED, trained="copy")
    edits = TensorEdits()
    for edit in (trained, other, every):
        edits.add(edit)
    assert edits.at("layer.weight") == [trained, other] and edits.at("layer.weight", [ADDED]) == [other]
    assert edits.at("none") == [] and edits.of("none") == ()
    assert edits.of("a") == (trained, every) == edits.copies() == edits.copies("a") and edits.copies("b") == ()
    assert edits.copy_of(part, "a") == trained.trained
    assert edits.copy_of(part, "b") is None is edits.copy_of(rest, "a")
    assert edits.trained_in_full() == ["bias"]
    assert list(edits.without(["a"])) == [other] and trained in edits and len(edits) == 3


def inserted(count: int, edit: Callable[[int], TensorEdit]) -> Callable[[], None]:
    """Return a function that adds and checks so many adaptations with an edit each, and then looks up each of them."""
    edited = [edit(number) for number in range(count)]

    def work() -> None:
        edits = TensorEdits()
        for each in edited:
            edits.add(each)
        for each in edited:
            edits.copies(each.owner)
            edits.copy_of(each.own, each.owner)

    return work


@pytest.mark.parametrize(
    "edit",
    [
        lambda n: TensorEdit(f"a{n}", rows(0, 12, f"layer.{n}.weight"), TRAINED, trained=f"copy{n}"),
        lambda n: TensorEdit(f"a{n}", rows(0, 12), ADDED),
        lambda n: TensorEdit(f"a{n}", rows(0, 12), CONSTANT),
    ],
    ids=["copies of tensors", "sums at one tensor", "constants of one tensor"],
)
def test_many_adaptations_are_linear(edit: Callable[[int], TensorEdit]) -> None:
    """Four times as many adaptations of one model cost four times as much, within 5%."""
    few, many = (calls(inserted(count, edit)) for count in (125, 500))
    assert many <= 1.05 * 4 * few
