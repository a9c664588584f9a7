"""Training of rows: named ones, n of every m, and blocks, in maps, fused parts, tables and experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import graftc
from graftc.passes.core.sites.uses import Lookup
from graftc.runtime.compiled import Compiled
from graftc.specs.errors.diagnostics import GraftError
from graftc.testing import DeploymentContract, MethodContract, outputs_of, perturb
from graftc.testing.compare import inputs_for, largest_difference
from graftc.testing.families import FAMILIES, tiny
from tests.kit.copies import fold_other_copies
from tests.kit.specs import varied
from tests.kit.training import after_decay

ROWS: dict[str, Any] = {"method": "rows", "target": {"role": "attn.q"}}

MAPS = {"role": ["attn.q", "attn.v", "ffn.down"]}
TABLES = {"bert": "bert.embeddings.word_embeddings", "gpt2": "transformer.wte", "llama": "model.embed_tokens"}


class TestNamedTokens(MethodContract):
    """Most rows of the table of words, to which the heads of GPT-2 and T5 are tied."""

    variant = True
    adaptation: ClassVar[Mapping[str, Any]] = {"method": "rows", "rows": [0, 3, "5:90", "-2:"]} | {
        "target": {"role": "embed"}
    }
    families = tuple(family for family in FAMILIES if family != "vit")


class TestTwoOfFour(MethodContract):
    """Half of the rows of maps, including parts of fused weights in GPT-2 and GPT-NeoX, without Mixtral's experts."""

    adaptation: ClassVar[Mapping[str, Any]] = {"method": "rows", "n_of_m": [2, 4], "target": MAPS}
    families = tuple(family for family in FAMILIES if family != "mixtral")


class TestTwoOfFourInExperts(MethodContract):
    """Half of the rows of attention queries and of experts, in every expert the same."""

    variant = True
    adaptation: ClassVar[Mapping[str, Any]] = {"method": "rows", "n_of_m": [2, 4]} | {
        "target": {"role": ["attn.q", "experts"]}
    }
    families = ("mixtral",)


class TestBlocks(MethodContract):
    """Blocks of rows with their biases, in every module that has any: convolutions, tables, heads. In T5 one module is
    another's table.
    """

    variant = True
    adaptation: ClassVar[Mapping[str, Any]] = {"method": "rows", "density": 0.3, "block": 5, "bias": True} | {
        "target": {"modules": "**"}
    }
    families = tuple(family for family in FAMILIES if family != "t5")


class TestRandomBlocks(MethodContract):
    """Randomly drawn blocks. Models of other seeds have other blocks and refuse each other's tensors."""

    variant = True
    adaptation: ClassVar[Mapping[str, Any]] = {
        "method": "rows",
        "density": 0.5,
        "block": 4,
        "selection": "random",
        "target": {"role": ["attn.q", "ffn.down"]},
    }
    families = ("bert", "gpt2")

    def compiled(self, family: str, model: nn.Module, seed: int = 0) -> Compiled:
        """Compile ``model`` with the same seed always."""
        return super().compiled(family, model, seed=0)


class TestDeployed(DeploymentContract):
    """Export and compilation, with rows along both axes."""

    adaptation: ClassVar[Mapping[str, Any]] = TestTwoOfFour.adaptation
    families = ("gpt2",)


def moved(model: nn.Module, after: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return which entries have changed, for every parameter that has changed at all."""
    changed = {name: after[name] != before for name, before in model.named_parameters()}
    return {name: where for name, where in changed.items() if bool(where.any())}


def two_of_four(weight: Tensor) -> Tensor:
    """Return whether each row of ``[rows, in]`` has one of the two largest norms of its four, counted independently."""
    norms = weight.detach().double().norm(dim=-1).tolist()
    return torch.tensor(
        [sorted(range(i - i % 4, i - i % 4 + 4), key=lambda k: -norms[k]).index(i) < 2 for i in range(len(norms))]
    )


@pytest.mark.full
@pytest.mark.parametrize("family", TABLES)
def test_exactly_the_named_tokens_change(family: str) -> None:
    """Only the named rows of the table change, whether or not a head is tied to it."""
    model = tiny(family).eval()
    compiled, after = after_decay(model, varied(ROWS, rows=[1, "7:9", -1], target={"role": "embed"}))
    where = moved(model, after)
    name = f"{TABLES[family]}.weight"
    assert set(where) == {name}
    assert where[name].any(1).nonzero().flatten().tolist() == [1, 7, 8, 100]
    assert compiled.report.trainable_parameters == 4 * 48


@pytest.mark.full
@pytest.mark.parametrize("family", ["bert", "gpt2", "gpt_neox", "llama"])
def test_exactly_the_chosen_rows_of_queries_change(family: str) -> None:
    """All entries of these rows change, since all have gradients, but no bias and nothing of keys and values."""
    model = tiny(family).eval()
    _, after = after_decay(model, varied(ROWS, n_of_m=[2, 4], target={"role": "attn.q", "layers": 1}))
    ((name, where),) = moved(model, after).items()
    weight = dict(model.named_parameters())[name]
    if family == "gpt2":
        where, weight = where.t(), weight.t()
    own = {"gpt_neox": torch.arange(144).view(4, 3, 12)[:, 0].flatten()}.get(family, torch.arange(48))
    assert torch.equal(where[own], two_of_four(weight[own])[:, None].expand(-1, 48))
    assert int(where.sum()) == 24 * 48


@pytest.mark.full
def test_biases_go_with_their_rows() -> None:
    """The biases of the same output features train as well."""
    model = tiny("gpt2").eval()
    _, after = after_decay(model, varied(ROWS, rows=["::3"], bias=True, target={"role": "attn.v", "layers": 0}))
    where = moved(model, after)
    expected = torch.arange(96, 144, 3)
    assert set(where) == {f"transformer.h.0.attn.c_attn.{part}" for part in ("weight", "bias")}
    for changed in where.values():
        columns = changed.reshape(-1, 144).all(0)
        assert torch.equal(columns, changed.reshape(-1, 144).any(0))
        assert columns.nonzero().flatten().tolist() == expected.tolist()


@pytest.mark.full
def test_experts_train_the_same_rows() -> None:
    """All experts train the rows with the largest norms over all experts."""
    model = tiny("mixtral").eval()
    _, after = after_decay(model, varied(ROWS, density=0.25, block=2, target={"role": "experts", "layers": 0}))
    where = moved(model, after)
    assert len(where) == 2
    for name, changed in where.items():
        weight = dict(model.named_parameters())[name]
        blocks = weight.detach().double().square().sum((0, 2)).view(-1, 2).sum(1)
        best = set(blocks.argsort(descending=True)[: len(blocks) // 4].tolist())
        assert {int(row) // 2 for row in changed.any(2).any(0).nonzero()} == best
        assert int(changed.any(2).any(0).sum()) == 2 * len(best)


@pytest.mark.full
def test_every_layer_has_its_own_choice_and_one_code() -> None:
    """Row numbers are in a tensor, so layers with different rows share one function."""
    compiled = graftc.compile({"adapt": [varied(ROWS, n_of_m=[1, 4])]}, tiny("llama")).eval()
    compiled(**inputs_for(compiled))
    chosen = [t for n, t in compiled.named_buffers() if n.endswith("graftc.rows.chosen")]
    assert len(chosen) == 2 and not torch.equal(*chosen)
    first, second = (block._graftc.functions for block in compiled.blocks.values())
    assert [id(one) for one in first.values()] == [id(other) for other in second.values()] != []


@pytest.mark.full
def test_a_tied_table_counts_once() -> None:
    """T5 reads its table three times and GPT-2 twice; all readers share one copy, which folds."""
    for family, target in (("t5", {"role": ["embed", "head"]}), ("gpt2", {"modules": "**"})):
        compiled = graftc.compile({"adapt": [varied(ROWS, n_of_m=[1, 4], target=target)]}, tiny(family)).eval()
        names = [n for n, p in compiled.named_parameters() if p.requires_grad]
        assert len(set(names)) == len(names)
        tables = [p for n, p in compiled.named_parameters() if p.requires_grad and p.shape == (26, 48)]
        assert len(tables) == 1  # 25 groups of 4, and one of a single row


@pytest.mark.full
def test_two_stand_in_for_rows_of_one_weight() -> None:
    """Two adaptations may train rows of one weight as long as no row is in both."""
    model = tiny("gpt2").eval()
    first, second = varied(ROWS, name="a", rows=["0:4"]), varied(ROWS, name="b", rows=[8, 20, 30, 35, 40, 44])
    compiled, after = after_decay(model, first, second)
    where = moved(model, after)
    assert compiled.report.trainable_parameters == 2 * 10 * 48
    for changed in where.values():
        assert changed.any(0).nonzero().flatten().tolist() == [0, 1, 2, 3, 8, 20, 30, 35, 40, 44]
    with pytest.raises(GraftError, match="'b' and 'a' would both train rows 3:5") as error:
        graftc.compile({"adapt": [first, {**second, "rows": [3, 4]}]}, model)
    assert error.value.code == "GC021"


@pytest.mark.full
@pytest.mark.parametrize("last", [False, True])
def test_rows_under_lora(last: bool) -> None:
    """In either order, LoRA adds to the trained rows."""
    lora = {"method": "lora", "rank": 2, "target": {"role": "attn.q"}}
    compiled = graftc.compile({"adapt": [lora, varied(ROWS, n_of_m=[1, 2])][:: -1 if last else 1]}, tiny("gpt2")).eval()
    perturb(compiled, 0.1)
    inputs = inputs_for(compiled)
    assert largest_difference(outputs_of(compiled.merge(), inputs), outputs_of(compiled, inputs)) < 2e-5


@pytest.mark.full
@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("bert", {"rows": [0, 7, "90:"], "target": {"role": "embed"}}),
        ("gpt2", {"n_of_m": [1, 4]}),
        ("mixtral", {"n_of_m": [1, 4], "target": {"role": "experts"}}),
    ],
)
def test_rows_that_fold_to_wrong_places_are_found(
    family: str, fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The certificate does not rely on the rows that the fold uses."""
    compiled = graftc.compile({"adapt": [varied(ROWS, **fields)]}, tiny(family)).eval()
    perturb(compiled, 0.1)
    fold_other_copies(monkeypatch, lambda copy: copy.flip(-2))
    with pytest.raises(GraftError) as error:
        compiled.merge()
    assert error.value.code == "GC051"


@pytest.mark.slow
@pytest.mark.parametrize("target", ["embed", "ffn.down"])
def test_a_wrong_copy_fails_at_its_own_site(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether or not the rows have an effect on the outputs that are compared: the entry of a table may be rare."""
    compiled = graftc.compile({"adapt": [varied(ROWS, rows=[7], target={"role": target})]}, tiny("bert")).eval()
    perturb(compiled, 0.1)
    sites = [site.site for site in compiled.merge().certificate.sites]
    fold_other_copies(monkeypatch, lambda copy: copy + 1e-3)
    with pytest.raises(GraftError) as error:
        compiled.merge()
    assert error.value.code == "GC051"
    assert all(any(site in detail for detail in error.value.details) for site in sites)


@pytest.mark.full
def test_trained_entries_of_a_large_table_are_probed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trained rows are probed even if the table is too large to look up all of it."""
    compiled = graftc.compile({"adapt": [varied(ROWS, rows=[77], target={"role": "embed"})]}, tiny("bert")).eval()
    perturb(compiled, 0.1)
    monkeypatch.setattr(Lookup, "probe", lambda self, generator: {self.input: torch.tensor([[1, 2, 3]])})
    (site,) = compiled.merge().certificate.sites
    assert site.change > 0
    fold_other_copies(monkeypatch, lambda copy: copy + 1e-3)
    with pytest.raises(GraftError) as error:
        compiled.merge()
    assert any(site.site in detail for detail in error.value.details)
