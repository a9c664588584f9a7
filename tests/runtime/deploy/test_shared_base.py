"""Several models over one base: what they train in full goes into it to the bit, and PEFT adds each one's LoRA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification

from graftc.runtime.deploy.shared_base import share_base
from graftc.runtime.model.runner import runner_of
from graftc.specs.errors.diagnostics import GraftError
from graftc.testing import largest_difference, outputs_of, perturb, tiny
from graftc.testing.compare import inputs_for
from tests.cli.support import run_here
from tests.kit.models import adapted

LORA = {"method": "lora", "rank": 3, "target": {"role": ["attn.q", "ffn.down"]}}
DORA = {"method": "dora", "rank": 2, "target": {"role": "attn.v"}}


def pair() -> tuple[Any, Any]:
    """A LoRA and a DoRA with the same trained head and norms."""
    one = adapted("bert", LORA, train=["classifier", "**.LayerNorm"])
    other = adapted("bert", DORA, train=["classifier", "**.LayerNorm"], noise_seed=1)
    shared = {n: t for n, t in one.adapter_state_dict().items() if ".lora." not in n}
    assert len(shared) > 4
    other.load_adapter_state_dict({**other.adapter_state_dict(), **shared})
    return one, other


@pytest.mark.full
def test_a_head_and_norms_that_two_share(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models = dict(zip(("first", "second"), pair(), strict=True))
    share_base(models).save(tmp_path / "out")
    inputs = inputs_for(models["first"], (2, 5))
    for name, compiled in models.items():
        base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out/base")
        with torch.no_grad():
            found = PeftModel.from_pretrained(base, tmp_path / "out" / name).eval()(**inputs).logits
        assert largest_difference([found], outputs_of(compiled, inputs)[:1]) < 1e-5
    head = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out/base").classifier.weight
    trained = next(
        t for n, t in models["first"].adapter_state_dict().items() if n.endswith("classifier.graftc.trained.weight")
    )
    assert torch.equal(head, trained)

    tiny("bert").save_pretrained(tmp_path / "bert")
    for name, compiled in models.items():
        compiled.save(tmp_path / name, certify=False)
    words = [
        "convert",
        str(tmp_path / "first"),
        "--beside",
        str(tmp_path / "second"),
        "--model",
        str(tmp_path / "bert"),
    ]
    found = run_here(capsys, *words, "--out", str(tmp_path / "out2"), "--json").data
    assert found["into_base"] == ["trained"] and max(found["beside"]["second"].values()) < 1e-5
    files = (p.name for p in (tmp_path / "out2").iterdir())
    assert sorted(files) == ["base", "first", "second"]
    again = run_here(capsys, *words, "--out", str(tmp_path / "out2"), "--force", "--json")
    assert again.status == 0
    assert (
        run_here(capsys, *words, "--beside", str(tmp_path / "first"), "--dry-run", "--json").data["error"]["code"]
        == "GC005"
    )


@pytest.mark.full
def test_what_they_do_not_share(tmp_path: Path) -> None:
    """The tensors that differ are named, trained ones before all others."""
    one, other = pair()
    perturb(other, 0.001, 3)
    with pytest.raises(GraftError, match=r"train different values: bert\.embeddings\.LayerNorm") as caught:
        share_base({"one": one, "other": other})
    assert caught.value.code == "GC066" and "classifier.weight" in caught.value.details
    elsewhere = adapted(tiny("bert", seed=1), LORA, train=["classifier"])
    with pytest.raises(GraftError, match="cannot share a base"):
        share_base({"one": adapted("bert", LORA, train=["classifier"]), "other": elsewhere})
    for models, code in (({"one": one}, "GC073"), ({"one": one, "base": other}, "GC005")):
        with pytest.raises(GraftError) as caught:
            share_base(models)
        assert caught.value.code == code
    assert runner_of(one).compilation.spec.train


PATHS = ["../x", "/x", "a/b", "a/", "./base", "", ".", "..", " ", "a\n", "x" * 256, 3]


@pytest.mark.slow
def test_names_and_models_are_checked_before_anything_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    one = adapted("bert", LORA, train=["classifier"])
    bare = adapted("bert", LORA)
    monkeypatch.setattr("graftc.runtime.deploy.shared_base.Merging", None)
    for names, code in ((PATHS, "GC002"), (["base", "Base"], "GC005")):
        for name in names:
            with pytest.raises(GraftError) as caught:
                share_base({"one": one, name: one})
            assert caught.value.code == code, name
    with pytest.raises(GraftError, match="'bare' trains nothing in full") as caught:
        share_base({"one": one, "bare": bare})
    assert caught.value.code == "GC050"
    with pytest.raises(GraftError, match="'bare' trains nothing in full and adds no tokens"):
        share_base({"one": one, "bare": bare}, into_base=["trained", "tokens"])
    with pytest.raises(GraftError, match="the model trains nothing in full") as caught:
        bare.merge_partially(only=["trained"])
    assert caught.value.code == "GC050"
