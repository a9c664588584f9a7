"""Artifacts: their contents, that loading restores the same model, and how the base is located."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import graftc
from graftc.compiler.resolve.tokens import TOKENS
from graftc.runtime.artifact import open_artifact
from graftc.runtime.sources.models import load_model
from graftc.specs.errors.diagnostics import GraftError, GraftWarning
from graftc.testing import FAMILIES, outputs_of, perturb, same_bits
from graftc.testing.compare import inputs_for
from graftc.testing.families import tiny
from tests.kit.folders import SPEC, adapted_folder, saved_base, tree_bytes
from tests.kit.refusals import refused
from tests.runtime.artifact.support import edit_manifest, own


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_base(tmp_path_factory.mktemp("model") / "bert")


@pytest.fixture(scope="module")
def kept(base: Path) -> Path:
    """An artifact beside its base; tests that change it copy it."""
    return Path(adapted_folder(base).save(base.parent / "artifact"))


# --- the same model again --------------------------------------------------------------------------------------


@pytest.mark.full
@pytest.mark.parametrize("family", list(FAMILIES))
def test_round_trip(family: str, tmp_path: Path) -> None:
    """Outputs in both modes and a second artifact are bitwise equal, and the base's folder is found."""
    spec = {"adapt": [SPEC["adapt"][0], {**SPEC["adapt"][1], "target": {"role": "experts"}}]}
    compiled = adapted_folder(saved_base(tmp_path / "base", family), spec if family == "mixtral" else SPEC)
    compiled.save(tmp_path / "one")
    loaded = graftc.load(tmp_path / "one")
    inputs = inputs_for(compiled, (2, 5))
    for mode in (False, True):
        compiled.train(mode), loaded.train(mode)
        torch.manual_seed(3)
        expected = outputs_of(compiled, inputs)
        torch.manual_seed(3)
        assert same_bits(outputs_of(loaded, inputs), expected)
    loaded.save(tmp_path / "two")
    assert tree_bytes(tmp_path / "one") == tree_bytes(tmp_path / "two")
    assert {n for n, p in loaded.named_parameters() if p.requires_grad} == {
        n for n, p in compiled.named_parameters() if p.requires_grad
    }


@pytest.mark.full
@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("bert", {"train": ["classifier"]}),
        ("llama", {"tokens": {"add": ["<a>", "<b>"]}}),
        ("gpt2", {"adapt": [{**SPEC["adapt"][0], "init": "pissa", "dropout": 0.0}]}),
        ("bert", {"adapt": [{**SPEC["adapt"][0], "bias": "all"}]}),
    ],
    ids=["train", "tokens", "pissa", "bias"],
)
def test_everything_that_trains_is_kept(family: str, changes: dict[str, Any], tmp_path: Path) -> None:
    compiled = adapted_folder(saved_base(tmp_path / "base", family), {**SPEC, **changes}).eval()
    compiled.save(tmp_path / "it")
    loaded = graftc.load(tmp_path / "it").eval()
    inputs = inputs_for(compiled, (2, 5))
    assert same_bits(outputs_of(loaded, inputs), outputs_of(compiled, inputs))
    assert loaded.spec == compiled.spec
    one, two = compiled.merge(), loaded.merge()
    assert one.certificate == two.certificate
    for (name, a), (other, b) in zip(one.state_dict().items(), two.state_dict().items(), strict=True):
        assert name == other and torch.equal(a, b)


@pytest.mark.full
def test_signatures_come_along(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every captured graph is available after loading, and none is captured again."""
    compiled = adapted_folder(base).eval()
    inputs = {**inputs_for(compiled, (2, 5)), "labels": torch.tensor([0, 2])}
    expected = compiled(**inputs)
    compiled.save(tmp_path / "it")
    monkeypatch.setenv("GRAFTC_CACHE", "off")
    monkeypatch.setattr("graftc.compiler.capture.capture_cache.capture", _never)
    loaded = graftc.load(tmp_path / "it").eval()
    outputs = loaded(**inputs)
    assert torch.equal(outputs.loss, expected.loss) and torch.equal(outputs.logits, expected.logits)
    assert len(loaded.compilation.signatures) == 2 and loaded.report.cached


@pytest.mark.slow
def test_initial_values_are_not_worked_out_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = {"adapt": [{"method": "lora", "target": {"role": "attn.q"}, "rank": 2, "init": "pissa"}]}
    adapted_folder(saved_base(tmp_path / "base"), spec).save(tmp_path / "it", certify=False)
    monkeypatch.setattr(torch.linalg, "svd", _never)
    graftc.load(tmp_path / "it")


def _never(*_: object, **__: object) -> Any:
    raise AssertionError("this must not be called")


@pytest.mark.slow
def test_what_is_in_it(kept: Path, base: Path) -> None:
    """An artifact consists of text and safetensors, has no weights of the base, and lists every file."""
    manifest = open_artifact(kept).manifest
    assert set(manifest.files) | {"manifest.json"} == set(tree_bytes(kept))
    assert {Path(name).suffix for name in tree_bytes(kept)} == {".json", ".yaml", ".safetensors"}
    assert set(load_file(kept / "adapters.safetensors")) == set(manifest.adapters)
    assert all(".graftc." in name for name in manifest.adapters)
    assert manifest.base.reference == str(base) and manifest.base.relative == "../bert"
    assert {place.module.rpartition(".")[2] for place in manifest.sites} == {"query", "value", "dense"}
    assert json.loads((kept / "certificates/fold.json").read_text())["passed"] is True
    assert graftc.load_spec(kept / "spec.yaml") == open_artifact(kept).spec


@pytest.mark.full
def test_no_base_is_needed_to_look_at_it(tmp_path: Path) -> None:
    compiled = adapted_folder(saved_base(tmp_path / "base"))
    compiled.save(tmp_path / "it")
    shutil.rmtree(tmp_path / "base")
    snapshot, live = open_artifact(tmp_path / "it").snapshot, compiled.snapshot
    for field in ("model", "spec", "sites", "trained", "base", "aliases", "adapters"):
        assert getattr(snapshot, field) == getattr(live, field), field
    from graftc.passes.core.ir.printer import format_program, structural_hash

    for mode in ("train", "eval"):
        for is_base in (True, False):
            one, two = snapshot.program(mode, base=is_base), live.program(mode, base=is_base)
            assert format_program(one) == format_program(two) and structural_hash(one) == structural_hash(two)
            assert [(h.step, h.added, h.removed) for h in one.history] == [
                (h.step, h.added, h.removed) for h in two.history
            ]


# --- where the base is -----------------------------------------------------------------------------------------


@pytest.mark.full
def test_a_folder_that_moved_along(kept: Path, base: Path, tmp_path: Path) -> None:
    shutil.copytree(kept, tmp_path / "elsewhere" / "artifact")
    edit_manifest(tmp_path / "elsewhere" / "artifact", base=lambda b: {**b, "reference": "/not/here"})
    missing = refused(graftc.load, tmp_path / "elsewhere" / "artifact", code="GC086")
    assert "/not/here" in missing.message and "--model" in (missing.hint or "")
    shutil.copytree(base, tmp_path / "elsewhere" / "bert")
    graftc.load(tmp_path / "elsewhere" / "artifact")


@pytest.mark.full
@pytest.mark.parametrize("as_text", [True, False])
def test_a_base_that_is_named(kept: Path, base: Path, tmp_path: Path, as_text: bool) -> None:
    shutil.copytree(kept, tmp_path / "it")
    edit_manifest(tmp_path / "it", base=lambda b: {**b, "reference": "/not/here", "relative": None})
    shutil.copytree(base, tmp_path / "moved")
    where = str(tmp_path / "moved")
    loaded = graftc.load(tmp_path / "it", where if as_text else load_model(where)).eval()
    original = graftc.load(kept).eval()
    inputs = inputs_for(loaded, (2, 5))
    assert same_bits(outputs_of(loaded, inputs), outputs_of(original, inputs))


@pytest.mark.full
def test_a_base_from_python_has_to_be_named(tmp_path: Path) -> None:
    compiled = graftc.compile(SPEC, tiny("bert"))
    compiled.save(tmp_path / "it")
    assert "compiled from Python" in refused(graftc.load, tmp_path / "it", code="GC086").message
    graftc.load(tmp_path / "it", tiny("bert"))


@pytest.mark.full
def test_no_code_runs_because_an_artifact_names_it(kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(kept, tmp_path / "it")
    (tmp_path / "evil.py").write_text("from pathlib import Path\nPath('ran').touch()\ndef model(): pass\n")
    monkeypatch.chdir(tmp_path)
    edit_manifest(tmp_path / "it", base=lambda b: {**b, "kind": "callable", "reference": "evil:model"})
    error = refused(graftc.load, tmp_path / "it", code="GC086")
    assert error.hint == "name it yourself: --model evil:model" and not (tmp_path / "ran").exists()


@pytest.mark.slow
def test_a_model_of_ones_own(tmp_path: Path) -> None:
    model, inputs = own()
    spec = {"adapt": [{"method": "lora", "target": {"modules": "{inner,outer}"}, "rank": 2}]}
    compiled = graftc.compile(spec, model, inputs)
    perturb(compiled)
    compiled.save(tmp_path / "it", base="tests.runtime.artifact.support:own")
    refused(graftc.load, tmp_path / "it", code="GC086")
    loaded = graftc.load(tmp_path / "it", "tests.runtime.artifact.support:own").eval()
    x = torch.randn(5, 6)
    assert torch.equal(loaded(x), compiled.eval()(x))
    loaded.merge().save(tmp_path / "folded")
    again, _ = own()
    again.load_state_dict(load_file(tmp_path / "folded" / "model.safetensors"))
    assert torch.allclose(again(x), compiled(x), atol=1e-5) and not torch.allclose(again(x), model(x), atol=1e-2)


@pytest.mark.full
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seed": 1}, "has different values"),
        ({"num_labels": 5}, "its config differs"),
        ({"hidden_act": "relu"}, "its config has hidden_act 'relu', not 'gelu'"),
    ],
)
def test_another_base(kept: Path, tmp_path: Path, change: dict[str, Any], words: str) -> None:
    error = refused(graftc.load, kept, str(saved_base(tmp_path / "other", **change)), code="GC087")
    assert words in error.message and "--model" in (error.hint or "")


def test_another_base_of_the_same_names(kept: Path, base: Path) -> None:
    """One changed value that is sampled, another dtype, or another size makes it a different base."""
    model: Any = load_model(str(base))
    model.classifier.weight.data[0, 0] += 1
    assert "classifier.weight has different values" in refused(graftc.load, kept, model, code="GC087").message
    assert "is bf16[" in refused(graftc.load, kept, load_model(str(base)).to(torch.bfloat16), code="GC087").message
    with torch.device("meta"):
        refused(graftc.load, kept, tiny("bert").to("meta"), code="GC087")


@pytest.mark.full
def test_every_value_counts_if_asked_for(base: Path, tmp_path: Path) -> None:
    """A change between the sampled values is detected only with ``full``, as documented."""
    compiled = adapted_folder(base)
    model: Any = load_model(str(base))
    model.bert.encoder.layer[0].intermediate.dense.weight.data[0, 1] += 1
    compiled.save(tmp_path / "sampled")
    graftc.load(tmp_path / "sampled", model)
    compiled.save(tmp_path / "full", full=True)
    refused(graftc.load, tmp_path / "full", model, code="GC087")


@pytest.mark.full
@pytest.mark.parametrize("family", FAMILIES)
def test_a_base_is_the_same_in_memory_and_on_disk(family: str, tmp_path: Path) -> None:
    """Config fields that saving and loading adds or drops do not make it a different base."""
    model = tiny(family)
    graftc.compile({"adapt": [SPEC["adapt"][0]]}, model).save(tmp_path / "it", certify=False)
    saved_base(tmp_path / "base", family)
    graftc.load(tmp_path / "it", str(tmp_path / "base"))


# --- other versions --------------------------------------------------------------------------------------------


def _other_versions(signatures: list[Any]) -> list[Any]:
    return [{**s, "captures": [{**c, "key": "0" * 64} for c in s["captures"]]} for s in signatures]


@pytest.mark.full
def test_other_versions_compile_again(kept: Path, tmp_path: Path) -> None:
    """With another key none of the kept graphs is used; the places have to be the same."""
    shutil.copytree(kept, tmp_path / "it")
    edit_manifest(tmp_path / "it", signatures=_other_versions)
    loaded = graftc.load(tmp_path / "it", str(kept.parent / "bert")).eval()
    inputs = inputs_for(loaded, (2, 5))
    assert same_bits(outputs_of(loaded, inputs), outputs_of(graftc.load(kept).eval(), inputs))
    edit_manifest(tmp_path / "it", sites=lambda sites: sites[:-1])
    error = refused(graftc.load, tmp_path / "it", str(kept.parent / "bert"), code="GC088")
    assert "new: inner: bert.encoder.layer.1.output.dense.weight" in error.details
    assert "torch" in (error.hint or "")


@pytest.mark.slow
def test_another_graph_under_the_same_key(kept: Path, tmp_path: Path) -> None:
    shutil.copytree(kept, tmp_path / "it")

    def swapped(signatures: list[Any]) -> list[Any]:
        graphs = signatures[0]["graphs"]
        return [{**signatures[0], "graphs": {**graphs, "eval": {**graphs["eval"], "structure": "0" * 32}}}]

    edit_manifest(tmp_path / "it", signatures=swapped)
    assert (
        "different eval graph" in refused(graftc.load, tmp_path / "it", str(kept.parent / "bert"), code="GC088").message
    )


@pytest.mark.slow
def test_operators_that_no_file_can_name(tmp_path: Path) -> None:
    """The artifact works but contains no graphs to inspect, and a warning says so."""

    @torch.library.custom_op("graftc_tests::twice", mutates_args=())
    def twice(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    twice.register_fake(lambda x: torch.empty_like(x))

    class Custom(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = torch.nn.Linear(6, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return twice(self.inner(x))

    torch.manual_seed(0)
    model = Custom().eval()
    spec = {"adapt": [{"method": "lora", "target": {"modules": "inner"}, "rank": 2}]}
    compiled = graftc.compile(spec, model, {"x": torch.zeros(2, 6)}).eval()
    with pytest.warns(GraftWarning, match="GC092.*twice"):
        compiled.save(tmp_path / "it")
    with pytest.raises(GraftError) as caught:
        open_artifact(tmp_path / "it").program()
    assert caught.value.code == "GC091"
    x = torch.randn(3, 6)
    assert torch.equal(graftc.load(tmp_path / "it", model).eval()(x), compiled(x))


# --- saving ----------------------------------------------------------------------------------------------------


@pytest.mark.full
def test_saving_over_something(kept: Path, base: Path, tmp_path: Path) -> None:
    shutil.copytree(kept, tmp_path / "it")
    compiled = adapted_folder(base, {"adapt": [SPEC["adapt"][1]]})
    with pytest.raises(GraftError, match="exists") as caught:
        compiled.save(tmp_path / "it")
    assert caught.value.code == "GC063" and tree_bytes(tmp_path / "it") == tree_bytes(kept)
    compiled.save(tmp_path / "it", force=True)
    assert {p.adaptation for p in open_artifact(tmp_path / "it").manifest.sites} == {"inner"}
    shutil.copytree(base, tmp_path / "precious")
    with pytest.raises(GraftError, match="not replaced"):
        compiled.save(tmp_path / "precious", force=True)
    assert tree_bytes(tmp_path / "precious") == tree_bytes(base)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["it", "precious"]


@pytest.mark.full
def test_nothing_to_save_on_meta(tmp_path: Path) -> None:
    compiled = graftc.compile(SPEC, tiny("bert").to("meta"))
    with pytest.raises(GraftError) as caught:
        compiled.save(tmp_path / "it")
    assert caught.value.code == "GC053" and not any(tmp_path.iterdir())


@pytest.mark.full
def test_what_does_not_fold_is_listed(tmp_path: Path) -> None:
    spec = {"adapt": [{"name": "head", "method": "lora", "target": {"modules": "lm_head"}, "rank": 2}]}
    with pytest.warns(GraftWarning, match="GC024"):
        compiled = adapted_folder(saved_base(tmp_path / "base", "gpt2"), spec)
    compiled.save(tmp_path / "it")
    manifest = open_artifact(tmp_path / "it").manifest
    assert manifest.certificate is None
    assert [k.name for k in manifest.kept] == ["head"] and "tied to" in manifest.kept[0].reason
    assert TOKENS not in {k.name for k in manifest.kept}
