"""The choice of rows by the method `rows`: scores, ties, draws, files, and invalid choices."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graftc
from graftc.compiler.pipeline import recompile
from graftc.passes.methods.rows import chosen_rows, named_rows, row_squares
from graftc.specs.errors.diagnostics import GraftError
from graftc.specs.methods.rows import RowSelection
from graftc.specs.target import Target
from graftc.testing import outputs_of, perturb, same_bits
from graftc.testing.compare import inputs_for, largest_difference
from graftc.testing.families import tiny
from tests.kit.models import fresh
from tests.kit.specs import varied

ROWS: dict[str, Any] = {"method": "rows", "target": {"role": "attn.q"}}


def spec(**fields: Any) -> RowSelection:
    """The spec of an adaptation that trains rows of the queries."""
    return RowSelection(target=Target(role="attn.q"), **fields)


def chosen(scores: list[float], **fields: Any) -> list[int]:
    """Return the rows that are chosen for these scores."""
    own, values = spec(**fields), torch.tensor(scores, dtype=torch.float64)
    means = [sum(part) / len(part) for size in [own.block] for part in (
        scores[i : i + size] for i in range(0, len(scores), size)
    )]  # fmt: skip
    by_size = {1: values, own.block: torch.tensor(means, dtype=torch.float64)}
    return chosen_rows(own, len(scores), by_size.__getitem__).tolist()


@pytest.mark.parametrize(
    ("scores", "fields", "expected"),
    [
        ([1, 2, 3, 4, 4, 3, 2, 1], {"n_of_m": (2, 4)}, [2, 3, 4, 5]),
        ([5, 5, 5, 5, 5, 5], {"n_of_m": (2, 4)}, [0, 1, 4, 5]),  # ties: earlier first; the last group has two
        ([0, 1, 0, 1, 0, 0, 9], {"n_of_m": (3, 6)}, [0, 1, 3, 6]),
        ([0, 1, 0, 1], {"n_of_m": (4, 4)}, [0, 1, 2, 3]),
        ([1, 2], {"n_of_m": (1, 8)}, [1]),
        ([3, 1, 2, 2], {"density": 0.5}, [0, 2]),
        ([1, 1, 1, 1, 1], {"density": 0.5}, [0, 1]),
        ([1, 2, 3], {"density": 0.01}, [2]),
        ([0, 0, 4, 4, 3, 3, 9], {"density": 0.5, "block": 2}, [2, 3, 6]),
        ([0, 0, 4, 4, 3], {"density": 1.0, "block": 2}, [0, 1, 2, 3, 4]),
        ([1, 2, 3], {"density": 0.2, "block": 9}, [0, 1, 2]),
    ],
    ids=str,
)
def test_rows_with_the_greatest_scores(scores: list[float], fields: dict[str, Any], expected: list[int]) -> None:
    assert chosen(scores, **fields) == expected


def test_a_density_is_what_is_written() -> None:
    """The count follows the written number, although 0.29 times 100 is 28.999999999999996 in float64."""
    assert all(len(chosen([1.0] * 100, density=part / 100)) == part for part in range(1, 101))


@pytest.mark.parametrize(("count", "block"), [(9, 4), (10, 4), (12, 4), (7, 1), (5, 8)])
def test_short_blocks_go_by_their_mean(count: int, block: int) -> None:
    """The rows chosen for a weight are those that plain Python chooses."""
    torch.manual_seed(1)
    weight = torch.randn(count, 6)
    model = nn.Sequential(nn.Linear(6, count))
    model[0].weight.data = weight
    compiled = fresh(
        model, varied(ROWS, density=0.5, block=block, target={"modules": "**"}), inputs=(torch.randn(3, 6),)
    )
    squares = weight.double().square().sum(1).tolist()
    parts = [squares[i : i + block] for i in range(0, count, block)]
    order = sorted(range(len(parts)), key=lambda i: -sum(parts[i]) / len(parts[i]))
    best = sorted(order[: max(1, math.floor(0.5 * len(parts)))])
    expected = [row for i in best for row in range(i * block, min(count, (i + 1) * block))]
    assert compiled.get_buffer("0.graftc.rows.chosen").tolist() == expected


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("width", [5, 8, 33, 257])
def test_equal_rows_have_equal_norms(width: int, transposed: bool) -> None:
    """The norms are equal to the bit, however the rows are stored, so that ties remain ties."""
    weight = torch.randn(1, width).expand(37, -1)
    stored = weight.t().contiguous().t() if transposed else weight.contiguous()
    squares = row_squares(stored)
    assert bool((squares == squares[0]).all())
    torch.testing.assert_close(squares[0], weight[0].double().square().sum())


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        ([0, -1], [0, 9]),
        (["2:4", 3, 2], [2, 3]),
        (["-3:", "::5"], [0, 5, 7, 8, 9]),
        (["8:99"], [8, 9]),
        ([" 1 "], [1]),
    ],
)
def test_named_rows(entries: list[int | str], expected: list[int]) -> None:
    assert named_rows(entries, 10, "place").tolist() == expected


@pytest.mark.slow
def test_drawn_rows_follow_the_seed() -> None:
    """Layers, and parts of one weight, have independent draws."""
    drawn = varied(ROWS, n_of_m=[2, 8], selection="random", target={"role": ["attn.q", "attn.k"]})

    def numbers(seed: int) -> list[Tensor]:
        buffers = graftc.compile({"adapt": [drawn]}, tiny("gpt2"), seed=seed).named_buffers()
        return [t % 48 for n, t in buffers if n.endswith(".chosen")]

    first, again, other = numbers(0), numbers(0), numbers(1)
    assert len(first) == 4 and same_bits(first, again)
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    assert len({tuple(t.tolist()) for t in first}) == 4
    assert all(int(((t >= 8 * i) & (t < 8 * i + 8)).sum()) == 2 for t in first for i in range(6))


@pytest.mark.slow
def test_tensors_of_other_rows_are_refused() -> None:
    """Tensors of other rows would end up in the wrong places, so loading them raises GC053 and copies nothing."""
    drawn = varied(ROWS, n_of_m=[1, 4], selection="random")
    one, other = (graftc.compile({"adapt": [drawn]}, tiny("bert"), seed=seed) for seed in (0, 1))
    before = {name: tensor.clone() for name, tensor in other.adapter_state_dict().items()}
    with pytest.raises(GraftError, match=r"depend on other values of .*chosen") as error:
        other.load_adapter_state_dict(one.adapter_state_dict())
    assert error.value.code == "GC053"
    assert all(torch.equal(tensor, before[name]) for name, tensor in other.adapter_state_dict().items())


@pytest.mark.full
@pytest.mark.parametrize("selection", ["magnitude", "random"])
def test_an_artifact_has_the_same_rows(tmp_path: Path, selection: str) -> None:
    """A loaded artifact gives outputs equal to the bit, even with flags that were not captured, and the same fold."""
    model = tiny("gpt2").eval()
    compiled = graftc.compile({"adapt": [varied(ROWS, n_of_m=[2, 8], selection=selection)]}, model, seed=3).eval()
    perturb(compiled, 0.1)
    inputs = inputs_for(compiled)
    inputs_with_flag = {**inputs, "output_hidden_states": True}
    expected = outputs_of(compiled, inputs_with_flag)
    compiled.save(tmp_path / "a")
    loaded = graftc.load(tmp_path / "a", model=tiny("gpt2").eval()).eval()
    assert same_bits(outputs_of(loaded, inputs_with_flag), expected)
    assert largest_difference(outputs_of(loaded.merge(), inputs), outputs_of(compiled, inputs)) < 2e-5


@pytest.mark.slow
def test_rows_stay_where_the_base_changes_below_them() -> None:
    """A compilation from tensors uses their rows, whatever the base's norms are now."""
    compiled = graftc.compile({"adapt": [varied(ROWS, n_of_m=[1, 4])]}, tiny("bert")).eval()
    perturb(compiled, 0.1)
    other = tiny("bert").eval()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.copy_(parameter.flip(0))
    again = recompile(compiled.compilation, compiled.compilation.spec, compiled.adapter_state_dict(), other)
    kept = dict(again.store.adapters())
    names = [name for name in kept if name.endswith(".chosen")]
    assert names and all(torch.equal(kept[name], compiled.get_buffer(name)) for name in names)
    for edit in again.tensor_edits.copies():
        assert torch.equal(edit.own.index(), kept[edit.trained.removesuffix("weight") + "chosen"])


@pytest.mark.full
def test_without_values_counts_hold() -> None:
    """On the meta device the counts are the same, unless a shorter block may be among the chosen ones."""
    with torch.device("meta"):
        empty = tiny("gpt2")
    for fields in ({"n_of_m": [2, 7], "bias": True}, {"density": 0.4, "block": 4}, {"density": 0.3}):
        spec = {"adapt": [varied(ROWS, **fields, target={"modules": "**", "exclude": "**.wte"})]}
        counted = [graftc.check(spec, model).trainable_parameters for model in (tiny("gpt2"), empty)]
        assert counted[0] == counted[1] > 0


# --- invalid choices -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "path", "text"),
    [
        ({}, "adapt[0]", "needs one of density, rows and n_of_m"),
        ({"rows": [1], "density": 0.5}, "adapt[0].rows", "density and rows exclude each other"),
        ({"rows": []}, "adapt[0].rows", "an empty list names no row"),
        ({"rows": [0, "a"]}, "adapt[0].rows[1]", "'a' is neither a row nor a slice of rows"),
        ({"rows": ["0:4:0"]}, "adapt[0].rows[0]", "has step 0"),
        ({"rows": [True]}, "adapt[0].rows[0]", "an integer or a string, not true"),
        ({"n_of_m": [4, 2]}, "adapt[0].n_of_m", "n_of_m cannot select 4 rows of every 2"),
        ({"n_of_m": [2]}, "adapt[0].n_of_m", "n_of_m must have 2 numbers, not 1"),
        ({"n_of_m": [0, 4]}, "adapt[0].n_of_m[0]", "must be at least 1"),
        ({"density": 0.0}, "adapt[0].density", "must be greater than 0"),
        ({"density": 1.5}, "adapt[0].density", "must be at most 1"),
        ({"density": 0.5, "block": 0}, "adapt[0].block", "must be at least 1"),
        ({"n_of_m": [1, 2], "block": 2}, "adapt[0].block", "block needs density, but here n_of_m"),
        ({"rows": [0], "selection": "random"}, "adapt[0].selection", "selection needs n_of_m or density"),
        ({"density": 0.5, "selection": "norm"}, "adapt[0].selection", "'magnitude' or 'random'"),
    ],
    ids=str,
)
def test_what_a_spec_cannot_say(fields: dict[str, Any], path: str, text: str) -> None:
    with pytest.raises(GraftError) as error:
        graftc.load_spec({"adapt": [varied(ROWS, **fields)]})
    refusal = error.value
    assert (
        refusal.code == "GC002" and text in refusal.message and refusal.place is not None and refusal.place.path == path
    )


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        (
            {"rows": [0, 48]},
            "48 is not a row of bert.encoder.layer.0.attention.self.query.weight, which has rows 0 to 47",
        ),
        ({"rows": [0, -49]}, "-49 is not a row of"),
        ({"rows": [0, "48:"]}, "'48:' is not a row of"),
        ({"rows": [0, "9:3"]}, "'9:3' is not a row of"),
        ({"rows": [0, 101], "target": {"role": "embed"}}, "which has rows 0 to 100"),
    ],
    ids=str,
)
def test_rows_that_are_not_there(fields: dict[str, Any], text: str) -> None:
    with pytest.raises(GraftError) as error:
        graftc.compile({"adapt": [varied(ROWS, **fields)]}, tiny("bert"))
    refusal = error.value
    assert refusal.code == "GC020" and text in refusal.message and refusal.place is not None
    assert refusal.place.path == "adapt[0].rows[1]"


@pytest.mark.slow
def test_rows_that_train_already() -> None:
    """Rows that train already, by `train:` or by another adaptation, raise GC021."""
    for other in ({"train": ["classifier"]}, {}):
        first = [] if other else [{"method": "full", "target": {"modules": "classifier"}}]
        with pytest.raises(GraftError, match=r"would both train rows 0:1 of classifier.weight") as error:
            own = varied(ROWS, rows=[0], target={"modules": "classifier"})
            graftc.compile({**other, "adapt": [*first, own]}, tiny("bert"))
        assert error.value.code == "GC021"
