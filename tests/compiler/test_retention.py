"""The share of an update that a merge keeps, by site and in total, and what is refused if nothing changes."""

from __future__ import annotations

import json
from typing import Any
from warnings import catch_warnings, simplefilter

import pytest
import torch
from torch import Tensor, nn

import graftc
from graftc.compiler.folding import rounding
from graftc.compiler.folding.certificate import HALF
from graftc.compiler.folding.steps import lazy_tensors
from graftc.specs.errors.diagnostics import GraftError, GraftWarning
from graftc.testing import perturb, tiny
from tests.kit.folders import saved_base
from tests.kit.models import adapted

LORA = {"method": "lora", "rank": 2, "target": {"role": ["attn.q", "attn.v", "ffn.down"]}}
TOLERANCE = 1e-12
"""Of sums of some thousand float64 numbers in another order."""


def scaled(family: str, scale: float = 1.0, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> Any:
    """Return a perturbed model whose updates are scaled."""
    compiled = adapted(tiny(family, dtype=dtype), {**LORA, **changes})
    with torch.no_grad():
        for name, tensor in compiled.adapter_state_dict().items():
            if name.endswith(".B"):
                tensor.mul_(scale)
    return compiled


@pytest.fixture(scope="module")
def gpt2() -> Any:
    """Queries and values as rows of one weight, stored as columns, with updates near the spacing of bfloat16."""
    return scaled("gpt2", 0.01)


def by_hand(base: Tensor, exact: Tensor, merged: Tensor) -> dict[str, float]:
    """Compute retention by its definition, in float64."""
    update, applied = exact - base.double(), merged.double() - base.double()
    wanted = update != 0
    return {
        "norm": float((update * applied).sum() / update.square().sum()),
        "error": float((applied - update).norm() / update.norm()),
        "entries": float((applied[wanted] != 0).double().mean()),
    }


@pytest.mark.full
def test_by_site_and_in_all(gpt2: Any) -> None:
    """Each site of a fused weight has its own rows; the total is what the definition gives for all tensors."""
    merged, store, lazy = gpt2.merge(), gpt2.compilation.store, lazy_tensors(gpt2.compilation)
    folded, certificate = merged.folded_state_dict(), merged.certificate
    assert 0.2 < certificate.retention.entries < 0.8
    retained = {site.site: site.to_json()["retention"] for site in certificate.sites}
    assert len(retained) == 6
    for layer in range(2):
        name = f"transformer.h.{layer}.attn.c_attn.weight"
        for part, columns in (("q", slice(0, 48)), ("v", slice(96, 144))):
            views = [t[:, columns] for t in (store.full(name), lazy.exact(name), folded[name])]
            assert views[0].shape[1] == 48
            assert retained[f"{name}[{part}]"] == pytest.approx(by_hand(*views), rel=TOLERANCE)
        name = f"transformer.h.{layer}.mlp.c_proj.weight"
        views = [store.full(name), lazy.exact(name), folded[name]]
        assert retained[name] == pytest.approx(by_hand(*views), rel=TOLERANCE)
    every = [
        torch.cat([get(name).double().reshape(-1) for name in lazy.names])
        for get in (store.full, lazy.exact, folded.__getitem__)
    ]
    assert certificate.to_json()["retention"] == pytest.approx(by_hand(*every), rel=TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("piece", [7, 64, 1000])
def test_pieces_have_no_say(gpt2: Any, piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = gpt2.merge().certificate
    monkeypatch.setattr(rounding, "PIECE", piece)
    actual = gpt2.merge().certificate
    assert actual.retention.changed == expected.retention.changed
    assert [s.rounding for s in actual.sites] == [s.rounding for s in expected.sites]
    assert actual.to_json()["retention"] == pytest.approx(expected.to_json()["retention"], rel=TOLERANCE)


@pytest.mark.full
def test_wider_types_keep_more(gpt2: Any) -> None:
    """float32 keeps all but some 1e-4 of the update, and the whole base, to the bit."""
    narrow, wide = gpt2.merge(), gpt2.merge(dtype=torch.float32)
    kept = wide.certificate.retention
    assert kept.entries > 0.999 and kept.error < 1e-4 and abs(kept.norm - 1) < 1e-5
    assert narrow.certificate.retention.error > 0.1
    assert wide.certificate.dtype == "float32" and wide.certificate.fingerprint == narrow.certificate.fingerprint
    assert wide.certificate.notes == ("the base is in bfloat16",)
    base, folded = gpt2.compilation.source.state_dict(), wide.folded_state_dict()
    assert all(tensor.dtype == torch.float32 for tensor in folded.values() if tensor.is_floating_point())
    lazy = lazy_tensors(gpt2.compilation)
    for name, tensor in base.items():
        expected = lazy.exact(name).float() if name in lazy.names else tensor.float()
        assert torch.equal(folded[name].float(), expected), name
    assert gpt2.dtype == torch.bfloat16 and all(t.dtype == torch.bfloat16 for t in base.values())


@pytest.mark.slow
def test_a_folder_in_float32(gpt2: Any, tmp_path: Any) -> None:
    from transformers import AutoModelForCausalLM

    gpt2.merge(dtype=torch.float32).save(tmp_path / "wide")
    assert json.loads((tmp_path / "wide" / "config.json").read_text())["dtype"] == "float32"
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "wide")
    assert loaded.dtype == torch.float32
    record = json.loads((tmp_path / "wide" / "graftc.json").read_text())
    assert record["certificate"]["dtype"] == "float32" and record["certificate"]["retention"]["entries"] > 0.999


@pytest.mark.full
def test_a_trained_copy_in_a_wider_type() -> None:
    """A trained copy of the base is kept in float32, and a merge in float32 has all of it."""
    spec = {"adapt": [LORA], "train": ["classifier"]}
    compiled = graftc.compile(spec, tiny("bert").bfloat16()).eval()
    perturb(compiled)
    narrow, wide = compiled.merge().folded_state_dict(), compiled.merge(dtype=torch.float32).folded_state_dict()
    trained = compiled.adapter_state_dict()["classifier.graftc.trained.weight"]
    assert torch.equal(wide["classifier.weight"], trained)
    assert torch.equal(narrow["classifier.weight"], trained.bfloat16())
    assert not torch.equal(narrow["classifier.weight"], compiled.compilation.source.state_dict()["classifier.weight"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.int8])
def test_other_types_are_refused(gpt2: Any, dtype: torch.dtype) -> None:
    """Casting would round tensors that no adaptation changes."""
    with pytest.raises(GraftError, match="bfloat16") as caught:
        gpt2.merge(dtype=dtype)
    assert caught.value.code == "GC073"


def test_the_own_type_changes_nothing(gpt2: Any) -> None:
    assert gpt2.merge(dtype=torch.bfloat16).certificate.to_json() == gpt2.merge().certificate.to_json()


def untrained(dtype: torch.dtype = torch.float32) -> Any:
    """Return a model with a LoRA whose B is zero."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)).to(dtype).eval()
    spec = {"adapt": [{"name": n, "method": "lora", "rank": 2, "target": {"modules": [m]}} for n, m in ("a0", "b2")]}
    return graftc.compile(spec, model, {"input": torch.randn(2, 6, dtype=dtype)}).eval()


def trained(compiled: Any, name: str, value: float) -> None:
    with torch.no_grad():
        compiled.adapter_state_dict()[name].fill_(value)


def test_an_update_of_zero_is_refused_unless_it_is_allowed() -> None:
    compiled = untrained()
    for work in (compiled.merge, compiled.merge_partially):
        with pytest.raises(GraftError, match="the update is zero at all 2 sites") as caught:
            work()
        assert caught.value.code == "GC104"
    certificate = compiled.merge(allow_unchanged=True).certificate
    assert certificate.passed and len(certificate.unchanged) == 2
    assert certificate.to_json()["retention"] is None
    assert all(site["retention"] is None for site in certificate.to_json()["sites"])


@pytest.mark.sample("dtype0")
@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_an_untrained_dora_is_refused(dtype: torch.dtype, tmp_path: Any) -> None:
    """Its norms are stored in a type that rounds them, so that the update is rounding noise instead of zero."""
    saved_base(tmp_path / "base", "llama", dtype=dtype, layers=1)
    dora = {"method": "dora", "rank": 2, "dtype": "base", "target": {"role": "attn.{q,v}"}}
    compiled = graftc.compile({"adapt": [dora]}, graftc.load_base(tmp_path / "base")).eval()
    compiled.save(tmp_path / "adapter", certify=False)
    for work in (
        compiled.merge,
        compiled.merge_partially,
        *([lambda: compiled.merge(dtype=torch.float32)] if dtype is torch.bfloat16 else []),
        lambda: graftc.merge_checkpoint(tmp_path / "adapter", tmp_path / "base", tmp_path / "out"),
    ):
        with pytest.raises(GraftError, match=r"lost in rounding|no larger than rounding to|is zero") as caught:
            work()
        assert caught.value.code == "GC104"
        assert ("--dtype" in str(caught.value.hint)) == ("to bfloat16" in caught.value.message)
    assert not (tmp_path / "out").exists()
    assert compiled.merge(allow_unchanged=True).certificate.passed
    with torch.no_grad():
        for name, tensor in compiled.adapter_state_dict().items():
            if name.endswith(".m"):
                tensor[0].mul_(1 + 8 * torch.finfo(dtype).eps)
    assert compiled.merge().certificate.retention.entries > 0


@pytest.mark.slow
def test_an_update_that_rounding_loses_is_refused_with_the_way_out() -> None:
    compiled = untrained(torch.bfloat16)
    trained(compiled, "0.graftc.a.B", 1e-9)
    with pytest.raises(GraftError, match="lost in rounding to bfloat16") as caught:
        compiled.merge()
    assert caught.value.code == "GC104" and "float32" in str(caught.value.hint)
    retention = compiled.merge(allow_unchanged=True).certificate.retention
    assert (retention.norm, retention.error, retention.entries) == (0, 1, 0)
    assert compiled.merge(dtype=torch.float32).certificate.retention.entries > 0


def test_an_update_that_is_mostly_lost_warns() -> None:
    compiled = untrained(torch.bfloat16)
    trained(compiled, "0.graftc.a.B", 2e-5)
    with pytest.warns(GraftWarning, match="rounding to bfloat16 leaves") as warnings:
        retention = compiled.merge().certificate.retention
    assert [w.message.code for w in warnings if isinstance(w.message, GraftWarning)] == ["GC105"]
    assert 0 < retention.norm < HALF
    with catch_warnings():
        simplefilter("error", GraftWarning)
        compiled.merge(dtype=torch.float32)


def test_some_sites_may_be_unchanged() -> None:
    """The certificate names the unchanged sites."""
    compiled = untrained()
    trained(compiled, "0.graftc.a.B", 0.1)
    certificate = compiled.merge().certificate
    assert certificate.unchanged == ("2.weight",) and certificate.to_json()["unchanged"] == ["2.weight"]
    assert certificate.to_json()["retention"]["entries"] == 1


def test_saving_an_untrained_artifact_is_no_merge(tmp_path: Any) -> None:
    untrained().save(tmp_path / "artifact")
