"""The mathematics of PET and iPET: each invariant of the method, in a test of its name."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import kl_div

from graftc.applications.pet.distillation import distillation_loss
from graftc.applications.pet.ensemble import accuracy, member_weights, mixed_logits
from graftc.applications.pet.generations import new_examples, new_examples_in, shares_of_labels, teachers_of


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _logits(members: int = 5, rows: int = 40, labels: int = 3, seed: int = 0) -> Tensor:
    return torch.randn(members, rows, labels, generator=_generator(seed)) * 2


# --- ensembles ---------------------------------------------------------------------------------------------------


def test_one_pattern_with_uniform_weight_is_its_model() -> None:
    logits = _logits(members=1)
    assert torch.equal(mixed_logits(logits, member_weights(None, 1)), logits[0])


def test_members_that_agree_are_each_of_them() -> None:
    logits = _logits(members=1).expand(4, -1, -1)
    torch.testing.assert_close(mixed_logits(logits, member_weights([0.1, 0.9, 0.3, 0.0], 4)), logits[0])


def test_weights_are_the_accuracies_of_untrained_patterns() -> None:
    weights = member_weights([0.5, 0.25, 0.25], 3)
    assert weights.tolist() == [0.5, 0.25, 0.25] and weights.dtype is torch.float64
    logits = _logits(members=3)
    mean = (logits * torch.tensor([2.0, 1.0, 1.0])[:, None, None]).sum(0) / 4
    torch.testing.assert_close(mixed_logits(logits, weights), mean)


def test_a_member_of_no_accuracy_says_nothing() -> None:
    logits = _logits(members=2)
    assert torch.equal(mixed_logits(logits, member_weights([0.0, 0.4], 2)), logits[1])


@pytest.mark.parametrize("accuracies", [None, [0.0, 0.0, 0.0]])
def test_weights_are_uniform_where_nothing_tells_members_apart(accuracies: list[float] | None) -> None:
    torch.testing.assert_close(member_weights(accuracies, 3), torch.full((3,), 1 / 3, dtype=torch.float64))


@given(st.lists(st.floats(0, 1), min_size=1, max_size=9))
def test_weights_sum_to_one(accuracies: list[float]) -> None:
    weights = member_weights(accuracies, len(accuracies))
    assert float(weights.sum()) == pytest.approx(1) and bool((weights >= 0).all())


@pytest.mark.parametrize("accuracies", [[0.5], [0.5, -0.1], [0.5, float("nan")]])
def test_accuracies_that_are_none_are_refused(accuracies: list[float]) -> None:
    with pytest.raises(ValueError, match="accuracies"):
        member_weights(accuracies, 2)


def test_weights_of_other_members_are_refused() -> None:
    with pytest.raises(ValueError, match="weights"):
        mixed_logits(_logits(members=3), torch.ones(2))


def test_permuting_labels_permutes_the_ensemble() -> None:
    logits, order = _logits(), torch.tensor([2, 0, 1])
    weights = member_weights([0.1, 0.2, 0.3, 0.4, 0.5], 5)
    assert torch.equal(mixed_logits(logits[..., order], weights), mixed_logits(logits, weights)[..., order])


def test_accuracy_counts_the_largest_logit() -> None:
    logits = torch.tensor([[1.0, 2.0], [3.0, 0.0], [0.0, 5.0], [1.0, 1.0]])
    assert accuracy(logits, torch.tensor([1, 0, 0, 0])) == 0.75
    assert accuracy(logits[:0], torch.tensor([], dtype=torch.int64)) == 0


# --- distillation ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 7.0])
def test_equal_logits_have_no_divergence_and_no_gradient(temperature: float) -> None:
    teacher = _logits(members=1)[0].double()
    student = teacher.clone().requires_grad_()
    loss = distillation_loss(student, teacher, temperature)
    loss.backward()  # type: ignore[no-untyped-call]
    assert loss.item() == 0
    assert student.grad is not None and student.grad.abs().max() < 1e-15


def test_logits_that_differ_by_a_constant_are_equal() -> None:
    teacher = _logits(members=1)[0].double()
    assert abs(distillation_loss(teacher + 3, teacher).item()) < 1e-14


@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0])
def test_divergence_is_that_of_torch(temperature: float) -> None:
    student, teacher = _logits(members=2)
    expected = kl_div(
        torch.log_softmax(student / temperature, 1), torch.softmax(teacher / temperature, 1), reduction="batchmean"
    )
    torch.testing.assert_close(distillation_loss(student, teacher, temperature), expected * temperature**2)


@given(st.integers(0, 2**32), st.floats(0.2, 10))
def test_divergence_is_not_negative(seed: int, temperature: float) -> None:
    student, teacher = _logits(members=2, seed=seed).double()
    assert distillation_loss(student, teacher, temperature).item() > -1e-12


def test_gradients_stay_as_large_at_high_temperatures() -> None:
    student, teacher = _logits(members=2).double()
    norms = []
    for temperature in (20.0, 200.0):
        leaf = student.clone().requires_grad_()
        distillation_loss(leaf, teacher, temperature).backward()  # type: ignore[no-untyped-call]
        assert leaf.grad is not None
        norms.append(leaf.grad.norm().item())
    assert norms[1] == pytest.approx(norms[0], rel=0.05)


def test_a_teacher_gets_no_gradient() -> None:
    student, teacher = (part.clone().requires_grad_() for part in _logits(members=2))
    distillation_loss(student, teacher).backward()  # type: ignore[no-untyped-call]
    assert teacher.grad is None and student.grad is not None


@pytest.mark.parametrize(("rows", "temperature"), [(3, 2.0), (4, 0.0), (4, -1.0)])
def test_what_cannot_be_distilled_is_refused(rows: int, temperature: float) -> None:
    with pytest.raises(ValueError):
        distillation_loss(torch.zeros(4, 2), torch.zeros(rows, 2), temperature)


# --- sizes of generations ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("generation", "labelled", "growth", "new"),
    [(0, 10, 5, 40), (1, 10, 5, 240), (2, 10, 5, 1240), (0, 7, 1.5, 3), (1, 7, 1.5, 8), (0, 10, 1.1, 1), (0, 4, 1, 0)],
)
def test_sizes_of_generations(generation: int, labelled: int, growth: float, new: int) -> None:
    assert new_examples_in(generation, labelled, growth) == new


@pytest.mark.parametrize(("generation", "new"), [(0, 10), (1, 50), (2, 250)])
def test_sizes_without_labels_start_at_ten(generation: int, new: int) -> None:
    assert new_examples_in(generation, 0, 5) == new
    assert new_examples_in(generation, 0, 5, start_size=20) == 2 * new


@given(st.integers(0, 10_000), st.lists(st.integers(0, 100), min_size=1, max_size=12))
def test_shares_of_labels_keep_their_ratio_and_sum_up(total: int, counts: list[int]) -> None:
    shares = shares_of_labels(total, counts)
    parts = counts if any(counts) else [1] * len(counts)
    assert sum(shares) == total
    assert all(abs(share - total * part / sum(parts)) < 1 for share, part in zip(shares, parts, strict=True))
    assert all(share == 0 for share, part in zip(shares, parts, strict=True) if part == 0)


@pytest.mark.parametrize("counts", [[3, 3], [1, 4, 5], [7], [2, 0, 8]])
def test_multiples_of_what_is_labelled_keep_the_ratio_exactly(counts: list[int]) -> None:
    new = new_examples_in(0, sum(counts), 5)
    assert shares_of_labels(new, counts) == tuple(4 * count for count in counts)


# --- examples of generations -------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32), st.integers(2, 12), st.floats(0.01, 1), st.data())
def test_a_member_never_labels_for_itself(seed: int, members: int, share: float, data: st.DataObject) -> None:
    member = data.draw(st.integers(0, members - 1))
    teachers = teachers_of(member, members, share, _generator(seed))
    assert member not in teachers and len(teachers) == len(set(teachers)) == max(1, round((members - 1) * share))


def test_a_members_own_logits_change_nothing_for_it() -> None:
    logits = _logits()
    other = logits.clone()
    other[2] = torch.randn_like(other[2]) * 100
    weights = member_weights(None, 5)
    examples = [
        new_examples(2, given, weights, [3, 3, 3], share=1.0, generator=_generator()) for given in (logits, other)
    ]
    assert examples[0] == examples[1] and examples[0].teachers == (0, 1, 3, 4)


def test_only_teachers_count() -> None:
    logits = _logits()
    examples = new_examples(0, logits, member_weights(None, 5), [3, 3, 3], generator=_generator())
    (teacher,) = examples.teachers
    predicted = logits[teacher].argmax(1)
    assert all(int(predicted[row]) == label for row, label in zip(examples.rows, examples.labels, strict=True))


def test_labels_are_those_of_the_weighted_mean() -> None:
    logits, weights = _logits(), member_weights([0.0, 0.9, 0.1, 0.0, 0.0], 5)
    examples = new_examples(0, logits, weights, [2, 2, 2], share=1.0, generator=_generator())
    predicted = mixed_logits(logits, weights).argmax(1)
    assert all(int(predicted[row]) == label for row, label in zip(examples.rows, examples.labels, strict=True))


def test_teachers_of_no_weight_are_equal() -> None:
    logits = _logits(members=3)
    examples = new_examples(0, logits, torch.tensor([1.0, 0.0, 0.0]), [2, 2, 2], share=1.0, generator=_generator())
    predicted = logits[1:].mean(0).argmax(1)
    assert all(int(predicted[row]) == label for row, label in zip(examples.rows, examples.labels, strict=True))


@pytest.mark.parametrize("most_likely", [False, True])
@given(seed=st.integers(0, 2**32))
@settings(max_examples=40, deadline=None)
def test_no_row_comes_twice_and_sizes_are_as_wanted(most_likely: bool, seed: int) -> None:
    logits, wanted = _logits(rows=30, seed=seed), [4, 7, 2]
    examples = new_examples(
        1, logits, member_weights(None, 5), wanted, share=0.5, most_likely=most_likely, generator=_generator(seed)
    )
    assert len(examples.rows) == len(set(examples.rows)) == len(examples.labels)
    counts = Counter(examples.labels)
    assert [counts[label] + examples.missing[label] for label in range(3)] == wanted
    assert min(examples.missing) >= 0 and (not most_likely or examples.missing == (0, 0, 0))


def test_a_label_with_too_few_rows_gets_all_and_says_how_many_are_missing() -> None:
    logits = torch.zeros(2, 6, 2)
    logits[:, :4, 0] = 3.0
    logits[:, 4:, 1] = 3.0
    examples = new_examples(0, logits, member_weights(None, 2), [3, 5], generator=_generator())
    assert examples.missing == (0, 3) and set(examples.rows) >= {4, 5} and Counter(examples.labels) == {0: 3, 1: 2}


@pytest.mark.slow
def test_rows_are_drawn_in_proportion_to_their_score() -> None:
    scores = torch.tensor([0.95, 0.8, 0.55])
    row_logits = torch.stack([scores.log(), (1 - scores).log()], dim=1)
    logits = row_logits.expand(2, -1, -1)
    weights, counts, draws = member_weights(None, 2), Counter[int](), 3000
    generator = _generator()
    for _ in range(draws):
        counts.update(new_examples(0, logits, weights, [1, 0], generator=generator).rows)
    for row, score in enumerate(scores.tolist()):
        part = score / scores.sum().item()
        assert abs(counts[row] / draws - part) < 4 * math.sqrt(part * (1 - part) / draws)


def test_without_labels_the_most_likely_rows_of_every_label_are_taken() -> None:
    probable = torch.tensor([[0.99, 0.01], [0.98, 0.02], [0.6, 0.4], [0.7, 0.3], [0.9, 0.1]])
    logits = probable.log().expand(3, -1, -1)  # no row is predicted as the second label, which still gets examples
    examples = new_examples(0, logits, member_weights(None, 3), [2, 2], most_likely=True, generator=_generator())
    assert (examples.rows, examples.labels, examples.missing) == ((0, 1, 2, 3), (0, 0, 1, 1), (0, 0))


@pytest.mark.parametrize("most_likely", [False, True])
def test_the_same_seed_makes_the_same_set(most_likely: bool) -> None:
    logits, weights = _logits(rows=200), member_weights(None, 5)

    def drawn(seed: int) -> object:
        return new_examples(3, logits, weights, [9, 9, 9], most_likely=most_likely, generator=_generator(seed))

    assert drawn(7) == drawn(7)
    assert len({repr(drawn(seed)) for seed in range(5)}) > 1


def test_a_single_member_has_no_next_generation() -> None:
    with pytest.raises(ValueError, match="no others"):
        new_examples(0, _logits(members=1), torch.ones(1), [1, 1, 1], generator=_generator())


def test_one_size_for_each_label() -> None:
    with pytest.raises(ValueError, match="wanted has 2 entries for 3 labels"):
        new_examples(0, _logits(), torch.ones(5), [1, 1], generator=_generator())
    with pytest.raises(ValueError, match="no labels"):
        shares_of_labels(3, [])
