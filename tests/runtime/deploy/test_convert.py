"""Converting adaptations to LoRA: exact at full rank, otherwise the nearest update, within a bound if one is given."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import graftc
from graftc.runtime.deploy import convert as module
from graftc.runtime.model.runner import runner_of
from graftc.specs.errors.diagnostics import GraftError
from graftc.testing import largest_difference, outputs_of
from graftc.testing.compare import inputs_for
from tests.kit.models import adapted

TARGET = {"role": ["attn.q", "ffn.down"]}


def convert(compiled: Any, *args: Any, **options: Any) -> module.Converted:
    converted: module.Converted = runner_of(compiled).convert(*args, **options)
    return converted


def folded(compiled: Any) -> dict[str, Tensor]:
    return {name: tensor.double() for name, tensor in compiled.merge().folded_state_dict().items()}


def apart(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Return the largest distance between two models' tensors, each relative to its norm."""
    return max(float((one[n] - other[n]).norm() / one[n].norm().clamp_min(1e-30)) for n in one)


@pytest.fixture(scope="module")
def stacked() -> Any:
    """A model with DoRA below vectors that scale its effective weight."""
    return adapted("llama", {"method": "dora", "rank": 3, "target": TARGET}, {"method": "ia3"})


@pytest.mark.full
def test_full_rank_is_the_fold(stacked: Any) -> None:
    """Adaptations on top of each other each become a LoRA of their own, in their places."""
    before = stacked.adapter_state_dict()
    converted = convert(stacked)
    assert converted.largest_error < 1e-6 and [a.method for a in converted.compiled.spec.adapt] == ["lora", "lora"]
    assert [a.name for a in converted.compiled.spec.adapt] == ["dora", "ia3"]
    assert apart(folded(stacked), folded(converted.compiled)) < 1e-6
    inputs = inputs_for(stacked, (2, 5))
    difference = largest_difference(outputs_of(converted.compiled.eval(), inputs), outputs_of(stacked, inputs))
    assert difference < 1e-5 and converted.largest_difference < 1e-5 < converted.largest_output
    assert all(torch.equal(t, before[n]) for n, t in stacked.adapter_state_dict().items())


@pytest.mark.slow
def test_one_of_several(stacked: Any) -> None:
    """The adaptation on top is unchanged, and so is what the model computes."""
    converted = convert(stacked, ["dora"])
    assert [a.method for a in converted.compiled.spec.adapt] == ["lora", "ia3"]
    assert apart(folded(stacked), folded(converted.compiled)) < 1e-6


@pytest.mark.slow
def test_the_error_of_a_rank(stacked: Any) -> None:
    """The error at every site follows from the singular values left out; probes of the compiled LoRA agree."""
    converted = convert(stacked, ["dora"], rank=4)
    plain = adapted("llama", {"method": "dora", "rank": 3, "target": TARGET})
    plain.load_adapter_state_dict({n: t for n, t in stacked.adapter_state_dict().items() if ".dora." in n})
    after, base = folded(plain), {n: t.double() for n, t in plain._graftc.compilation.source.state_dict().items()}
    for site in converted.sites:
        s = torch.linalg.svdvals(after[site.site] - base[site.site])
        assert site.rank == 4 and site.error == pytest.approx(float(s[4:].norm() / s.norm()), rel=1e-3)
        assert site.probed == pytest.approx(site.error, rel=0.7)
    assert converted.compiled.spec.adapt[0].rank == 4 and not converted.compiled.spec.adapt[0].overrides


@pytest.mark.full
def test_the_smallest_rank_within_a_bound(stacked: Any) -> None:
    """Each site has its own rank, which meets the bound, and one rank less would not."""
    converted = convert(stacked, ["dora"], error=0.15)
    assert converted.largest_error <= 0.15 and len({site.rank for site in converted.sites}) > 1
    lower = min(site.rank for site in converted.sites) - 1
    less = {site.site: site.error for site in convert(stacked, ["dora"], rank=lower).sites}
    assert all(less[site.site] > 0.15 for site in converted.sites if site.rank == lower + 1)
    ranks = {str(s.key): spec.rank for s, spec in converted.compiled._graftc.compilation.main.resolved[0].places}
    assert ranks == {site.site: site.rank for site in converted.sites}
    with pytest.raises(GraftError, match="is not met at") as caught:
        convert(stacked, ["dora"], error=0.15, rank=2)
    assert caught.value.code == "GC067" and len(caught.value.details) > 2


@pytest.mark.full
def test_experts_and_stand_ins() -> None:
    """Each expert gets a pair of factors, and trained copies become updates."""
    compiled = adapted(
        "mixtral",
        {"method": "loha", "rank": 2, "target": {"role": "experts"}},
        {"method": "full", "target": {"role": "attn.o"}},
    )
    converted = convert(compiled)
    assert apart(folded(compiled), folded(converted.compiled)) < 1e-6
    assert {site.full_rank for site in converted.sites if site.adaptation == "loha"} == {4}
    assert [a.name for a in converted.compiled.spec.adapt] == ["full", "loha"], "copies are below what stands at sites"


@pytest.mark.slow
def test_rows_of_a_fused_weight() -> None:
    """Sites that are rows of one weight keep their rows."""
    compiled = adapted("gpt2", {"method": "lokr", "rank": 2, "target": {"role": ["attn.q", "attn.v"]}})
    converted = convert(compiled, error=0.4)
    assert apart(folded(compiled), folded(converted.compiled)) < 0.4 and len(converted.sites) == 4
    assert converted.compiled.merge().certificate.passed


@pytest.mark.full
def test_a_trained_head_goes_into_the_base(tmp_path: Any) -> None:
    """The LoRA stays outside; the folder contains the base with the head, and loads from there."""
    compiled = adapted("bert", {"method": "lora", "rank": 3, "target": TARGET}, train=["classifier"])
    converted = convert(compiled, into_base=["trained"])
    assert (
        converted.partial is not None and converted.partial.folded == ("trained",) and not converted.compiled.spec.train
    )
    converted.save(tmp_path / "made")
    loaded = graftc.load(tmp_path / "made").eval()
    inputs = inputs_for(compiled, (2, 5))
    assert largest_difference(outputs_of(loaded, inputs), outputs_of(compiled, inputs)) < 1e-5
    assert {n.split(".graftc.")[1] for n in loaded.adapter_state_dict()} == {"lora.A", "lora.B"}


@pytest.mark.full
@pytest.mark.parametrize(
    ("adapt", "options", "code", "words"),
    [
        ({"method": "prefix", "length": 3}, {}, "GC050", "prefix"),
        ({"method": "norms"}, {}, "GC066", "not the weight of a linear map"),
        ({"method": "lora", "target": TARGET, "rank": 2, "bias": "lora_only"}, {}, "GC066", "bias"),
        ({"method": "lora", "target": TARGET, "rank": 2}, {"names": ["lara"]}, "GC091", "lara"),
        ({"method": "lora", "target": TARGET, "rank": 2}, {"names": "lora"}, "GC073", "list of strings"),
        ({"method": "lora", "target": TARGET, "rank": 2}, {"rank": 0}, "GC002", "rank of at least 1"),
        ({"method": "lora", "target": TARGET, "rank": 2}, {"error": 1.0}, "GC002", "error in"),
        ({"method": "lora", "target": TARGET, "rank": 2}, {"error": 1e-12}, "GC067", "is not met"),
        ({"method": "lora", "target": TARGET, "rank": 2}, {"into_base": ["head"]}, "GC091", "head"),
    ],
)
def test_what_is_refused(adapt: dict[str, Any], options: dict[str, Any], code: str, words: str) -> None:
    compiled = adapted("bert", adapt)
    before = compiled.adapter_state_dict()
    with pytest.raises(GraftError, match=words) as caught:
        convert(compiled, **options)
    assert caught.value.code == code
    assert all(torch.equal(t, before[n]) for n, t in compiled.adapter_state_dict().items())


@pytest.mark.slow
def test_members_of_a_composition_are_refused() -> None:
    entries = [{"name": n, "method": "lora", "rank": 2, "target": TARGET} for n in ("one", "two")]
    compiled = adapted("bert", *entries, compose={"average": ["one", "two"]})
    with pytest.raises(GraftError, match="part of the composition") as caught:
        convert(compiled)
    assert caught.value.code == "GC066"


@pytest.mark.full
def test_a_wrong_factor_is_caught(stacked: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Probes run through the compiled LoRA, so factors of another site or of another sign are detected."""
    right = module.values_of

    def swapped(*args: Any) -> dict[str, Tensor]:
        values = right(*args)
        names = [name for name in values if name.endswith("q_proj.graftc.dora.B")]
        values[names[0]], values[names[1]] = values[names[1]], values[names[0]]
        return values

    for wrong in (swapped, lambda *args: {n: -t if n.endswith(".B") else t for n, t in right(*args).items()}):
        monkeypatch.setattr(module, "values_of", wrong)
        with pytest.raises(GraftError, match="differs by") as caught:
            convert(stacked, ["dora"])
        assert caught.value.code == "GC067"
