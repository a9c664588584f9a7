"""Sites of a Program: kinds, places, uses, and the same places in another Program."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import graftc
from graftc.compiler.capture.capture import capture
from graftc.compiler.capture.capture_cache import captured
from graftc.compiler.capture.defaults import default_axes
from graftc.compiler.capture.request import CaptureRequest
from graftc.compiler.resolve.sitetable import SiteTable
from graftc.compiler.roles.structure import find_structure
from graftc.passes.core.sites.sites import (
    AttentionSite,
    EmbeddingSite,
    ExpertsSite,
    LinearSite,
    NormSite,
    Site,
    SublayerSite,
)
from graftc.passes.core.weights.store import Store
from graftc.specs.errors.diagnostics import GraftError
from graftc.testing.families import tiny
from tests.kit.wide import FAMILIES


def table(model: torch.nn.Module) -> SiteTable:
    """Return the sites of a model's usual signature."""
    store = Store.mirror(model)
    result = captured(CaptureRequest.of(model, default_axes(model), aliases=store.aliases))
    structure = find_structure(result.program.graph, result.constants)
    return SiteTable(result.program, store, structure, dict(model.named_modules()))


def of_kind(table: SiteTable, kind: type[Site]) -> list[Any]:
    """Return the first site of every candidate of one type."""
    return [sites[0] for sites in table.entries if type(sites[0]) is kind]


def test_llama() -> None:
    """Every kind of site that Llama has, by place."""
    site_table = table(tiny("llama"))
    linear = {str(site.key): site for site in of_kind(site_table, LinearSite)}
    assert len(linear) == 2 * 7 + 1
    assert linear["model.layers.1.self_attn.k_proj.weight"].roles == ("attn.k",)
    (embed,) = of_kind(site_table, EmbeddingSite)
    assert (str(embed.key), embed.in_features, embed.out_features) == ("model.embed_tokens.weight", 101, 48)
    norms = {site.weight: site.bias for site in of_kind(site_table, NormSite)}
    assert norms == {
        **{f"model.layers.{i}.{n}_layernorm.weight": None for i in (0, 1) for n in ("input", "post_attention")},
        "model.norm.weight": None,
    }
    assert len(of_kind(site_table, AttentionSite)) == 2


def test_norms_with_shifts() -> None:
    """A norm's scale and shift are one site."""
    norms = {site.weight: site.bias for site in of_kind(table(tiny("bert")), NormSite)}
    assert len(norms) == 1 + 2 * 2
    assert all(bias == weight.replace("weight", "bias") for weight, bias in norms.items())


def test_sublayers() -> None:
    """Each layer of a pre-norm model has two, whose nodes are computed in order."""
    sublayers = of_kind(table(tiny("gpt2")), SublayerSite)
    assert [(site.layer, site.roles) for site in sublayers] == [
        (layer, (role,)) for layer in (0, 1) for role in ("attn.sublayer", "ffn.sublayer")
    ]
    for site in sublayers:
        assert set(site.sum.args[:2]) == {site.stream, site.branch}
        assert site.stream < site.normed < site.projection < site.sum
        assert site.post_norm is None and site.output is site.sum
    assert len({site.key for site in sublayers}) == 4


def test_a_shared_layer() -> None:
    """ALBERT's one layer has a place for each weight, with a use for each run, and an attention site for each run."""
    site_table = table(FAMILIES["albert"].model())
    query = next(sites for sites in site_table.entries if "attn.q" in sites[0].roles)
    assert [site.key.use for site in query] == [0, 1]
    assert len({site.key.place for site in query}) == 1
    assert [site.key.use for site in of_kind(site_table, AttentionSite)] == [0, 1]


@pytest.mark.full
def test_experts() -> None:
    """Two 3-D parameters of one module are two places."""
    experts = of_kind(table(FAMILIES["mixtral"].model()), ExpertsSite)
    assert [(site.key.name, site.experts, site.out_features, site.in_features) for site in experts[:2]] == [
        ("gate_up_proj", 4, 160, 48),
        ("down_proj", 4, 48, 80),
    ]


@pytest.mark.slow
@pytest.mark.sample("gpt2")
@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_same_places_in_eval_mode(family: str) -> None:
    """Every place of the train graph is found in the eval graph, by the same keys."""
    model = tiny(family)
    train, store = table(model), Store.mirror(model)
    result = capture(CaptureRequest.of(model, mode="eval", aliases=store.aliases))
    structure = find_structure(result.program.graph, result.constants)
    other = SiteTable(result.program, store, structure, dict(model.named_modules()))
    for sites in train.entries:
        assert [site.key for site in other.same(sites[0])][: len(sites)] == [site.key for site in sites]


@pytest.mark.full
def test_a_place_that_another_signature_does_not_read() -> None:
    """With LoRA on the table, a call with embeddings is refused; the error names the adaptation and the place."""
    model = tiny("llama")
    spec = {"adapt": [{"name": "table", "method": "lora", "target": {"role": "embed"}, "rank": 2}]}
    compiled = graftc.compile(spec, model)
    with pytest.raises(GraftError) as caught:
        compiled(inputs_embeds=torch.randn(2, 5, 48))
    assert caught.value.code == "GC031"
    assert "'table'" in caught.value.message and "model.embed_tokens.weight" in caught.value.message
    compiled(input_ids=torch.ones(2, 5, dtype=torch.long))


@pytest.mark.full
def test_near_misses_are_explained() -> None:
    """If some layers lack a role, the error says which, and what is left there without a role."""
    model: Any = FAMILIES["mistral"].model()
    layer = model.model.layers[1]
    layer.mlp.down_proj = torch.nn.Sequential(
        *(torch.nn.Linear(a, b, bias=False) for a, b in ((80, 20), (20, 20), (20, 48)))
    )
    spec = {"adapt": [{"method": "lora", "target": {"role": "ffn.up"}, "rank": 2}]}
    with pytest.raises(GraftError) as caught:
        graftc.compile(spec, model)
    assert caught.value.code == "GC015"
    assert "matched 1 of 2 layers; this one has none: 1" in caught.value.message
    assert any(reason.startswith("model.layers.1.mlp.down_proj") for reason in caught.value.details)


@pytest.mark.full
def test_a_trained_module_that_another_signature_does_not_read() -> None:
    """With ``train:`` on the table, a call with embeddings instead of tokens is refused as well."""
    lora = {"method": "lora", "target": {"role": "attn.q"}, "rank": 2}
    compiled = graftc.compile({"adapt": [lora], "train": ["model.embed_tokens"]}, tiny("llama"))
    with pytest.raises(GraftError) as caught:
        compiled(inputs_embeds=torch.randn(2, 5, 48))
    assert caught.value.code == "GC031"
    assert "model.embed_tokens.weight" in caught.value.message
