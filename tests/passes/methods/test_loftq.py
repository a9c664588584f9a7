"""LoftQ with several iterations: the factors and the codes of the base are chosen together."""

from __future__ import annotations

import hashlib
import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graftc
from graftc.passes.core.packing.packed_tensor import dense
from graftc.runtime.artifact.manifest import sealed
from graftc.runtime.compiled import Compiled
from graftc.specs.errors.diagnostics import GraftError
from graftc.testing import families, perturb
from graftc.testing.compare import inputs_for
from tests.reference.loftq import loftq

ROLES = {"llama": ["attn.q", "ffn.down"], "gpt2": ["attn.q", "attn.v"], "mixtral": ["attn.q", "experts"]}
"""Whole weights, rows of a fused and transposed weight, and experts."""


def compiled(model: nn.Module, family: str, iterations: int = 3, *others: Any, **base: Any) -> Compiled:
    """Return a model on a quantised base, whose first adaptation is a LoRA that starts by LoftQ."""
    lora = {"method": "lora", "rank": 4, "init": "loftq", "loftq_iterations": iterations}
    adapt = [*(other for other in others if other.get("before")), {**lora, "target": {"role": ROLES[family]}}]
    adapt += [other for other in others if not other.get("before")]
    adapt = [{key: value for key, value in entry.items() if key != "before"} for entry in adapt]
    return graftc.compile({"version": 1, "base": {"quantize": "nf4", **base}, "adapt": adapt}, model, seed=0).eval()


def starts(own: Compiled, model: nn.Module) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Return the original rows, the packed ones and the update of each site, by key."""
    store, before = own.compilation.store, dict(model.named_parameters())
    result = {}
    for site, spec in own.compilation.main.resolved[0].places:
        name, parts = site.own.tensor, own.compilation.parts["lora"][site.key]
        a, b = (store.get(parts[part]).detach() for part in "AB")
        original, packed = (site.own.operand(t.detach()) for t in (before[name], dense(store.get(name))))
        result[str(site.key)] = original, packed, spec.scaling * b @ a
    return result


def outputs(own: Compiled, seed: int = 3) -> Tensor:
    with torch.no_grad():
        output: Tensor = own(**inputs_for(own, seed=seed))[0]
    return output


@pytest.mark.parametrize("iterations", [2, 5])
def test_equals_the_paper(iterations: int) -> None:
    """The codes are those of the paper's algorithm, and so is the update, within rounding."""
    model = families.llama(hidden_size=64, intermediate_size=128).eval()
    for original, packed, update in starts(compiled(model, "llama", iterations), model).values():
        quantised, wanted = loftq(original, 4, iterations)
        torch.testing.assert_close(packed, quantised, rtol=0, atol=1e-7)
        torch.testing.assert_close(update, wanted, rtol=0, atol=1e-6)


def test_equals_peft() -> None:
    """PEFT's own function, moved from CUDA to the CPU, returns the same values and the same update."""
    from peft.utils import loftq_utils

    code = inspect.getsource(loftq_utils.loftq_init).replace('"cuda"', '"cpu"')
    space = dict(vars(loftq_utils))
    exec(code, space)
    model = families.llama(hidden_size=64, intermediate_size=128).eval()
    for original, packed, update in starts(compiled(model, "llama", 4), model).values():
        quantised, a, b = space["loftq_init"](original, 4, 4, num_iter=4)
        torch.testing.assert_close(packed, quantised, rtol=0, atol=1e-7)
        torch.testing.assert_close(update, b @ a, rtol=0, atol=1e-6)


@pytest.mark.sample("llama-{'quantize': 'int4'}", "gpt2-{'double': True}", "mixtral-{}")
@pytest.mark.parametrize("base", [{}, {"quantize": "int4"}, {"double": True}, {"quantize": "int8"}], ids=str)
@pytest.mark.parametrize("family", ROLES)
def test_each_iteration_comes_nearer(family: str, base: dict[str, Any]) -> None:
    """The distance of codes plus update from the original weight falls, for all that a site can be."""
    model = getattr(families, family)().eval()

    def distance(iterations: int) -> float:
        own = starts(compiled(model, family, iterations, **base), model).values()
        return float(sum((original - packed - update).square().sum() for original, packed, update in own))

    assert distance(5) < distance(2) < distance(1)


@pytest.mark.full
@pytest.mark.parametrize("family", ROLES)
def test_loads_by_the_original_weights(family: str, tmp_path: Path) -> None:
    """An artifact holds the factors that were subtracted; its codes follow from them and from the source, exactly."""
    model = getattr(families, family)().eval()
    own = compiled(model, family)
    perturb(own)
    own.save(tmp_path / "artifact")
    loaded = graftc.load(tmp_path / "artifact", model).eval()
    assert torch.equal(outputs(own), outputs(loaded))
    store, other = own.compilation.store, loaded.compilation.store
    assert all(torch.equal(store.get(part), other.get(part)) for part in own.compilation.chosen_codes)
    loaded.save(tmp_path / "again")
    assert torch.equal(outputs(own), outputs(graftc.load(tmp_path / "again", model).eval()))


def test_loads_from_a_state_dict(tmp_path: Path) -> None:
    """A fresh model takes the state; one that started elsewhere refuses it, since its codes differ."""
    model = families.llama().eval()
    own = compiled(model, "llama")
    perturb(own)
    fresh = compiled(model, "llama")
    fresh.load_state_dict(own.state_dict())
    assert torch.equal(outputs(own), outputs(fresh))
    with pytest.raises(GraftError, match="other values of") as caught:
        compiled(model, "llama", 2).load_state_dict(own.state_dict())
    assert caught.value.code == "GC053"


@pytest.mark.full
def test_loads_from_a_checkpoint(tmp_path: Path) -> None:
    """A trainer's checkpoint is a state dict with a record of the base, which is packed as it was."""
    from safetensors.torch import save_file

    model = families.llama().eval()
    model.save_pretrained(tmp_path / "base")
    model = graftc.load_base(str(tmp_path / "base")).eval()
    own = compiled(model, "llama")
    perturb(own)
    (tmp_path / "checkpoint").mkdir()
    save_file(own.state_dict(), tmp_path / "checkpoint" / "model.safetensors")
    loaded = graftc.load(tmp_path / "checkpoint", model).eval()
    assert torch.equal(outputs(own), outputs(loaded))


def test_another_base_is_refused(tmp_path: Path) -> None:
    """A weight that is not the one that was packed raises GC087, even in a place that samples of the base miss."""
    model = families.llama().eval()
    compiled(model, "llama").save(tmp_path / "artifact")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 5] += 1e-3
    with pytest.raises(GraftError) as caught:
        graftc.load(tmp_path / "artifact", model)
    assert caught.value.code == "GC087"


@pytest.mark.parametrize("change", ["quantize: nf4", "requantised"])
def test_another_packing_is_refused(change: str, tmp_path: Path) -> None:
    """Specs and manifests that pack the base in another way than it was raise GC088, even if digests are renewed."""
    model, path = families.llama().eval(), tmp_path / "artifact"
    compiled(model, "llama").save(path)
    data = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
    if change == "requantised":
        data[change] = data[change][:2]
    else:
        spec = (path / "spec.yaml").read_text(encoding="utf-8").replace(change, "quantize: fp4").encode()
        (path / "spec.yaml").write_bytes(spec)
        data["files"]["spec.yaml"] = {"bytes": len(spec), "sha256": hashlib.sha256(spec).hexdigest()}
    del data["digest"]
    (path / "manifest.json").write_text(sealed(data), encoding="utf-8")
    with pytest.raises(GraftError) as caught:
        graftc.load(path, model)
    assert caught.value.code in ("GC087", "GC088")


def test_changes_in_the_process_keep_the_codes() -> None:
    """Adding, renaming, disabling and removing compile again on the codes that were chosen."""
    model = families.llama().eval()
    own = compiled(model, "llama")
    perturb(own)
    before = outputs(own)
    own.add({"method": "ia3", "target": {"role": "attn.v"}})
    assert torch.equal(outputs(own), before)
    own.rename("lora", "start")
    own.disable("start")
    assert not torch.equal(outputs(own), before)
    own.enable()
    assert torch.equal(outputs(own), before)


def test_codes_without_their_adaptation_are_not_saved(tmp_path: Path) -> None:
    """Without the factors no one could pack the base again: GC168; in full precision it is a plain model."""
    model = families.llama().eval()
    own = compiled(model, "llama", 3, {"method": "lora", "rank": 2, "name": "other", "target": {"role": "attn.v"}})
    own.remove("lora")
    with pytest.raises(GraftError) as caught:
        own.save(tmp_path / "artifact")
    assert caught.value.code == "GC168" and not (tmp_path / "artifact").exists()
    plain = own.merge(base="full", allow_unchanged=True).to_transformers()
    name = "model.layers.0.mlp.down_proj.weight"
    assert torch.equal(plain.get_parameter(name), dense(own.compilation.store.get(name)))


@pytest.mark.parametrize("form", ["full", "requantized"])
def test_merges(form: Any) -> None:
    """A merge folds into the values of the chosen codes."""
    own = compiled(families.llama().eval(), "llama")
    perturb(own)
    merged = own.merge(base=form)
    assert merged.certificate.passed
    if form == "full":
        torch.testing.assert_close(merged(**inputs_for(own, seed=3))[0], outputs(own), rtol=0, atol=1e-5)


@pytest.mark.full
def test_partial_merge_keeps_the_start(tmp_path: Path) -> None:
    """An adaptation that stays is compiled on the merged base, which has the values of the codes."""
    model = families.llama().eval()
    own = compiled(model, "llama", 3, {"method": "lora", "rank": 2, "name": "other", "target": {"role": "attn.v"}})
    perturb(own)
    partial = own.merge_partially(only=["other"], base="full")
    partial.save(tmp_path / "partial")
    loaded = graftc.load(tmp_path / "partial").eval()
    torch.testing.assert_close(outputs(loaded), outputs(own), rtol=0, atol=1e-5)


@pytest.mark.parametrize("format", ["peft", "gguf"])
def test_adapters_do_not_go_without_their_base(format: str, tmp_path: Path) -> None:
    """Other software would apply the adapter to codes of the original weights."""
    with pytest.raises(GraftError, match="chosen together with") as caught:
        compiled(families.llama().eval(), "llama").export(tmp_path / f"out.{format}", format)
    assert caught.value.code in ("GC115", "GC066")


def test_one_adaptation_chooses() -> None:
    """Two that would choose the codes of the same rows, or one after constants were computed from them: GC021."""
    model = families.llama().eval()
    second = {"method": "lora", "init": "loftq", "loftq_iterations": 2, "name": "b", "target": {"role": "attn.q"}}
    first = {"method": "dora", "target": {"role": "attn.q"}, "before": True}
    for other, words in ((second, "both choose the codes"), (first, "has already read")):
        with pytest.raises(GraftError, match=words) as caught:
            compiled(model, "llama", 3, other)
        assert caught.value.code == "GC021"
    compiled(model, "llama", 3, {**first, "before": False})


@pytest.mark.parametrize("iterations", [1, 3])
def test_a_second_one_starts_from_what_the_first_leaves(iterations: int) -> None:
    """Two adaptations at one site do not add the same correction twice; the one that chooses the codes comes first."""
    model = families.llama().eval()
    second = {"method": "lora", "init": "loftq", "rank": 4, "name": "b", "target": {"role": ROLES["llama"]}}

    def distance(own: Compiled) -> float:
        merged, before = dict(own.merged_state_dict()), dict(model.named_parameters())
        names = {site.own.tensor for site, _ in own.compilation.main.resolved[0].places}
        return sum(float((merged[name] - before[name]).square().sum()) for name in names)

    alone = distance(compiled(model, "llama", iterations))
    assert distance(compiled(model, "llama", iterations, second)) < 0.95 * alone
    if iterations > 1:
        with pytest.raises(GraftError, match="already started") as caught:
            compiled(model, "llama", iterations, {**second, "before": True})
        assert caught.value.code == "GC021" and "before 'b'" in str(caught.value)


@pytest.mark.full
def test_rows_that_share_scales_are_not_read_before(tmp_path: Path) -> None:
    """With ``double``, new codes of some rows change the values of all, so others may read them only afterwards."""
    start = {"method": "lora", "rank": 4, "init": "loftq", "loftq_iterations": 2, "target": {"role": "attn.q"}}
    copy = {"method": "full", "name": "copy", "target": {"role": "attn.v"}}
    base, model = {"quantize": "nf4", "double": True}, families.gpt2().eval()
    with pytest.raises(GraftError, match="has already read") as caught:
        graftc.compile({"base": base, "adapt": [copy, start]}, model)
    assert caught.value.code == "GC021"
    own = graftc.compile({"base": base, "adapt": [start, copy]}, model).eval()
    before = outputs(own)
    own.disable("copy")
    assert torch.equal(outputs(own), before), "the copy starts with the rows as they are now"
    own.enable()
    own.save(tmp_path / "artifact")
    assert torch.equal(outputs(graftc.load(tmp_path / "artifact", model).eval()), before)


@pytest.mark.full
def test_layers_that_are_called_again_choose_once(tmp_path: Path) -> None:
    """ALBERT calls one layer several times, which has one pair of factors and one set of codes."""
    from transformers import AlbertConfig, AlbertModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 48, "num_hidden_layers": 3}
    model = AlbertModel(AlbertConfig(vocab_size=60, embedding_size=16, **sizes)).eval()
    start = {"method": "lora", "rank": 4, "init": "loftq", "loftq_iterations": 3, "target": {"role": "attn.q"}}
    own = graftc.compile({"base": {"quantize": "nf4"}, "adapt": [start]}, model).eval()
    own.save(tmp_path / "artifact")
    assert torch.equal(outputs(own), outputs(graftc.load(tmp_path / "artifact", model).eval()))


def test_converting_is_refused_before_the_work() -> None:
    """A converted adaptation would not have the factors that the codes follow from."""
    own = compiled(families.llama().eval(), "llama")
    with pytest.raises(GraftError, match="converting would drop") as caught:
        own.convert()
    assert caught.value.code == "GC168"


@pytest.mark.parametrize("kind", ["average", "bank"])
def test_compositions_are_refused(kind: str) -> None:
    """Members that are built at once share one base."""
    member = {"method": "lora", "init": "loftq", "loftq_iterations": 2, "target": {"role": "attn.q"}}
    adapt = [{**member, "name": name} for name in "ab"]
    with pytest.raises(GraftError, match="one base") as caught:
        graftc.compile({"base": {"quantize": "nf4"}, "adapt": adapt, "compose": {kind: ["a", "b"]}}, families.llama())
    assert caught.value.code == "GC017" and "loftq_iterations: 1" in str(caught.value)


def test_sixteen_bits(tmp_path: Path) -> None:
    """On a base in bfloat16, weights are subtracted from in float32."""
    model = families.llama().eval().to(torch.bfloat16)
    own = compiled(model, "llama")
    own.save(tmp_path / "artifact")
    assert torch.equal(outputs(own), outputs(graftc.load(tmp_path / "artifact", model).eval()))


def test_needs_the_original_weights() -> None:
    """A plain base, and one that was quantised before, raise GC167."""
    model = families.llama().eval()
    spec = {"method": "lora", "init": "loftq", "loftq_iterations": 2, "target": {"role": "attn.q"}}
    quantised = graftc.compile({"version": 1, "base": {"quantize": "nf4"}, "adapt": []}, model)
    for call in (lambda: graftc.compile({"version": 1, "adapt": [spec]}, model), lambda: quantised.add(spec)):
        with pytest.raises(GraftError) as caught:
            call()
        assert caught.value.code == "GC167"
