"""The benchmark of whole training steps runs, and its accounting of memory is exact if the peak is known."""

from __future__ import annotations

import gc
import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from benchmarks.command import chosen
from benchmarks.sparse.__main__ import main
from benchmarks.sparse.entries import CYCLE, ENTRIES, LORA, TINY_SHAPE, WINDOW, Entry, Training, base_in
from benchmarks.sparse.memory import accounted, measure
from benchmarks.sparse.times import Timed, contest, cycle_mean, mismatches, ordinary_median
from benchmarks.train.contestants import UnavailableError
from benchmarks.train.models import Base
from graftc.compiler.capture.anchoring import runs
from graftc.compiler.capture.anchoring.products import Products

FLOAT = 4
NAMES = (LORA, "graftc LoRA")


def entry(name: str) -> Entry:
    return next(entry for entry in ENTRIES if entry.name == name)


def chain(batch: int, sizes: tuple[int, ...]) -> Training:
    """Return the training of a chain of linear layers without biases."""
    layers = [nn.Linear(a, b, bias=False) for a, b in pairwise(sizes)]
    model = nn.Sequential(*layers)
    x = torch.ones(batch, sizes[0])
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return Training(model, lambda: model(x).square().sum(), optimiser)


def test_the_peak_of_a_chain_is_exact() -> None:
    """The peak consists of the input, weights, momenta, the second layer's gradients and the wide activation.

    The input, weights and momenta are there throughout. At the peak the second layer has its gradients, and the wide
    activation is not freed yet; scalars are the loss and its gradient.
    """
    batch, narrow, wide, last = 16, 8, 1024, 4
    gc.collect()  # otherwise objects of other tests would be freed during the measurement
    account = accounted(lambda: chain(batch, (narrow, wide, last)), steps=3)
    weights = narrow * wide + wide * last
    resident = batch * narrow + 2 * weights
    of_second = batch * last + wide * last + batch * wide
    assert account.peaks == [FLOAT * (resident + batch * wide + of_second + 2)] * 3
    assert account.between == FLOAT * (resident + weights)
    assert account.gradients == 0


def test_gradients_that_are_complete_at_the_peak_are_told_apart() -> None:
    """With a wide first layer, the peak is after its gradient is computed, which follows the second layer's."""
    batch, wide, narrow = 2, 4096, 64
    account = accounted(lambda: chain(batch, (wide, narrow, narrow)), steps=2)
    weights = wide * narrow + narrow * narrow
    resident = batch * wide + 2 * weights
    # The loss, its gradient, and the gradient of the first layer's result.
    assert account.peak == FLOAT * (resident + weights + batch * narrow + 2)
    assert account.gradients == FLOAT * narrow * narrow


class Doubled(torch.autograd.Function):
    """A function that doubles its input; both passes briefly need a large tensor."""

    SIZE = 50_000

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x + x

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        large = torch.empty(Doubled.SIZE)
        del large
        return gradient * 2


@torch.library.custom_op("graftc_bench_test::thrice", mutates_args=())
def thrice(x: Tensor) -> Tensor:
    """Return three times the input, allocating a large tensor briefly."""
    large = torch.empty(2 * Doubled.SIZE)
    del large
    return x * 3


thrice.register_autograd(lambda ctx, gradient: gradient * 3)


@pytest.mark.parametrize(("function", "size"), [(Doubled.apply, Doubled.SIZE), (thrice, 2 * Doubled.SIZE)])
def test_what_operators_and_backward_passes_have_for_a_moment_counts(function: object, size: int) -> None:
    def training() -> Training:
        model = nn.Linear(4, 4, bias=False)
        return Training(model, lambda: function(model(torch.ones(1, 4))).sum())  # type: ignore[operator]

    account = accounted(training, steps=1)
    assert FLOAT * size < account.peak < FLOAT * (size + 500)


def test_what_is_replaced_between_steps_counts_once() -> None:
    """State created before the steps and replaced in one of them counts once."""

    def training() -> Training:
        kept = [torch.zeros(100_000)]

        def replace() -> None:
            kept.clear()
            kept.append(torch.zeros(100_000))

        model = nn.Linear(4, 4, bias=False)
        return Training(model, lambda: model(torch.ones(1, 4)).sum(), after=replace)

    account = accounted(training, steps=3)
    assert FLOAT * 100_000 < account.between <= account.peak < FLOAT * 101_000


@pytest.mark.full
@pytest.mark.parametrize("checkpointing", [pytest.param(False, marks=pytest.mark.full), True])
def test_lora_of_both_libraries(checkpointing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both libraries train as many values with the same loss, and the parts of memory are those of the model.

    The products that graftc keeps of the model for the next signature are left out.
    """
    monkeypatch.setattr(runs, "products_of", Products)
    entries = [entry(name) for name in NAMES]
    results, skipped = contest(entries, base_in(TINY_SHAPE, "float32"), checkpointing, 2, tell=lambda line: None)
    assert not skipped and not [*mismatches(results)]
    assert all(len(timed.seconds) == len(timed.processor) == 2 and min(timed.seconds) > 0 for timed in results)
    assert [timed.numbers for timed in results] == [[3, 4]] * 2
    memory = [measure(each, TINY_SHAPE, "float32", checkpointing) for each in entries]
    weights = FLOAT * sum(parameter.numel() for parameter in base_in(TINY_SHAPE, "float32").model.parameters())
    for figures in memory:
        values = figures["trained_parameters"]
        assert values == memory[0]["trained_parameters"] > 0
        assert figures["trained_bytes"] - FLOAT * values in range(200)  # a method may have a buffer
        assert figures["base_bytes"] - weights in range(200)  # and the buffers of rotary positions
        assert 0 <= figures["state_bytes"] - 2 * FLOAT * values < 1000  # and counters
        assert figures["peak_bytes"] == sum(
            figures[f"{part}_bytes"] for part in ("base", "trained", "state", "gradient", "rest")
        )
        assert 0 <= figures["held_elsewhere_bytes"] < 4000


def test_an_entry_that_cannot_run_is_skipped_with_the_reason() -> None:
    def unavailable(base: Base, checkpointing: bool) -> Training:
        raise UnavailableError("not yet")

    told: list[str] = []
    new = Entry("new", "graftc", unavailable)
    assert contest([new], base_in(TINY_SHAPE, "float32"), False, 1, tell=told.append) == ([], {"new": "not yet"})
    assert told[0] == "new: skipped: not yet"
    with pytest.raises(UnavailableError):
        measure(new, TINY_SHAPE, "float32", False)


def test_ordinary_steps_and_the_mean_of_a_cycle() -> None:
    """Entries are replaced in every 20th step, which takes 22 times as long."""
    numbers = [*range(3, 3 + 2 * CYCLE)]
    values = [22.0 if number % CYCLE == WINDOW else 1.0 for number in numbers]
    assert ordinary_median(values, numbers) == 1
    assert cycle_mean(values, numbers) == pytest.approx((22 + 19) / 20)
    assert cycle_mean(values[: CYCLE - 1], numbers[: CYCLE - 1]) is None


def test_another_loss_than_that_of_peft_is_noticed() -> None:
    results = [Timed(entry(LORA), 2.0), Timed(entry("graftc LoRA"), 2.01), Timed(entry("full"), 3.0)]
    assert [line.partition(":")[0] for line in mismatches(results)] == ["graftc LoRA"]


def test_some_entries_bring_the_floor_and_lora() -> None:
    assert [each.name for each in chosen(ENTRIES, "full")] == ["floor", "full", LORA]


@pytest.mark.full
def test_the_command_writes_all_figures(tmp_path: Path) -> None:
    chosen_options = ["--only", "SpIEL-MA", "--dtype", "float32", "--checkpointing", "off"]
    assert main(["--quick", "--out", str(tmp_path), *chosen_options]) == 0
    data = json.loads((tmp_path / "sparse.json").read_text())
    (group,) = data["groups"]
    assert {*group["entries"], *group["skipped"]} == {"floor", LORA, "graftc SpIEL-MA"}
    for name, figures in group["entries"].items():
        memory = figures["memory"]
        assert memory["peak_bytes"] > 0 and figures["over_floor"]["ordinary"] > 0, name
        assert (figures["over_peer"] is None) == (name == LORA) == (figures["memory_of_peer"] is None), name
    text = (tmp_path / "sparse.md").read_text()
    assert all(text.count(f"| {name} | ") == 2 for name in group["entries"])
    assert all(f"Skipped: {name} (" in text for name in group["skipped"])
    assert "| graftc SpIEL-MA, with activation checkpointing | 0.94 | " in text
