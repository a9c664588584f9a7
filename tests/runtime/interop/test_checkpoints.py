"""Some of the checkpoints of `tests.gates.test_peft`, and further requirements on imports and exports."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import graftc
from graftc.runtime.interop.peft.folder import read_peft
from graftc.specs.errors.diagnostics import GraftError, GraftWarning
from graftc.testing.families import tiny
from tests.kit.comparing import same_tensors
from tests.kit.refusals import refused
from tests.runtime.interop.checkpoints import Checkpoint, base, check, difference, loaded, peft_model, saved

peft = pytest.importorskip("peft")


@pytest.mark.full
@pytest.mark.parametrize("kind", ["patterns", "tables", "dora", "ia3", "rows", "prefix"])
def test_in_and_out_of_gpt2(kind: str, tmp_path: Path) -> None:
    """The family with transposed, fused weights and a tied head is imported and exported."""
    check(Checkpoint(kind, "gpt2"), tmp_path)


@pytest.mark.full
@pytest.mark.parametrize(
    ("kind", "family"), [("experts", "mixtral"), ("dora-conv", "vit"), ("lokr", "t5"), ("alora", "llama")]
)
def test_in_and_out(kind: str, family: str, tmp_path: Path) -> None:
    check(Checkpoint(kind, family), tmp_path)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA of rank 3 on q and v."""
    folder = tmp_path_factory.mktemp("llama") / "adapter"
    saved(peft.LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "v_proj"]), "llama", folder)
    return folder


@pytest.fixture
def copied(llama: Path, tmp_path: Path) -> Path:
    """A copy of the LoRA to damage."""
    return Path(shutil.copytree(llama, tmp_path / "adapter"))


def unimported(folder: Path, family: str = "llama", **arguments: Any) -> GraftError:
    """Return the error of an import, and check that its message has no traceback and that the model is unchanged."""
    before = {name: tensor.clone() for name, tensor in base(family).state_dict().items()}
    error = refused(graftc.import_peft, folder, base(family), **arguments)
    assert same_tensors(before, base(family).state_dict())
    assert "Traceback" not in str(error)
    return error


def changed(folder: Path, **fields: Any) -> Path:
    """Change fields of the folder's config and return the folder."""
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}), encoding="utf-8")
    return folder


@pytest.mark.slow
def test_the_target_is_exactly_what_was_adapted(llama: Path) -> None:
    compiled = graftc.import_peft(llama, base("llama"))
    (entry,) = compiled.spec.adapt
    assert list(entry.target.modules or ()) == ["**.q_proj", "**.v_proj"] and entry.target.expect == 4
    assert not compiled.training
    tensors = load_file(llama / "adapter_model.safetensors")
    assert len(tensors) == len(compiled.adapter_state_dict()) == 8
    for name, value in compiled.adapter_state_dict().items():
        module, _, part = name.partition(".graftc.lora.")
        assert torch.equal(value, tensors[f"base_model.model.{module}.lora_{part}.weight"])


@pytest.mark.full
def test_an_artifact_of_an_import_loads(llama: Path, tmp_path: Path) -> None:
    compiled = graftc.import_peft(llama, base("llama"))
    compiled.save(tmp_path / "artifact", certify=False)
    again = graftc.load(tmp_path / "artifact", base("llama"))
    for name, value in compiled.adapter_state_dict().items():
        assert torch.equal(again.adapter_state_dict()[name], value)


@pytest.mark.slow
def test_keys_and_sites_are_a_bijection(llama: Path, tmp_path: Path) -> None:
    """Every key and every tensor occurs once, and the export equals the import bit for bit."""
    compiled = graftc.import_peft(llama, base("llama"))
    compiled.export(tmp_path / "out", format="peft")
    sites = json.loads((tmp_path / "out/graftc_sites.json").read_text())["sites"]
    theirs, ours = load_file(llama / "adapter_model.safetensors"), load_file(tmp_path / "out/adapter_model.safetensors")
    assert sorted(own["key"] for own in sites) == sorted(theirs) == sorted(ours)
    assert {own["tensor"] for own in sites} == set(compiled.adapter_state_dict()) and len(sites) == 8
    assert all(torch.equal(theirs[key], ours[key]) for key in theirs)
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (3, 5, ["q_proj", "v_proj"])


def test_a_folder_is_read_without_a_model(llama: Path) -> None:
    """Paths, specs and tensors are available by graftc's part names, as streaming needs them."""
    adapter = read_peft(llama)
    assert [m.name for m in adapter.modules] == [
        f"model.layers.{i}.self_attn.{n}.weight" for i in range(2) for n in ("q_proj", "v_proj")
    ]
    first = adapter.modules[0]
    assert (first.spec.method, first.spec.rank, first.spec.alpha) == ("lora", 3, 5.0)  # type: ignore[attr-defined]
    assert {part: tuple(t.shape) for part, t in adapter.tensors(first).items()} == {"A": (3, 48), "B": (48, 3)}


@pytest.mark.slow
def test_named_adapters(tmp_path: Path) -> None:
    model = peft_model(peft.LoraConfig(r=2, target_modules=["q_proj"]), "llama")
    model.add_adapter("other", peft.LoraConfig(r=3, target_modules=["v_proj"], init_lora_weights=False))
    model.save_pretrained(tmp_path)
    model.set_adapter("other")
    ours = graftc.import_peft(tmp_path, base("llama"), name="other")
    assert difference(ours, model) <= 1e-5
    assert list(ours.spec.adapt[0].target.modules or ()) == ["**.v_proj"]
    shutil.move(tmp_path / "adapter_config.json", tmp_path / "hidden.json")
    error = unimported(tmp_path)
    assert error.code == "GC110" and "other" in error.hint


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*invalid shape")
def test_adalora_that_lost_ranks(tmp_path: Path) -> None:
    """Pruned triplets, in one layer all of them, are restored as zeros: the scaling is that of the initial rank."""
    config = peft.AdaLoraConfig(init_r=5, target_r=2, target_modules=["q_proj"], total_step=10)
    theirs = peft_model(config, "llama")
    kept = {
        f"model.layers.{layer}.self_attn.q_proj.lora_E.default": own
        for layer, own in enumerate([[True, False, True, False, True], [False] * 5])
    }
    with torch.no_grad():
        for name, own in kept.items():
            theirs.get_parameter(f"base_model.model.{name}")[~torch.tensor(own)] = 0
    theirs.peft_config["default"].rank_pattern = kept
    theirs.save_pretrained(tmp_path / "theirs")
    assert load_file(tmp_path / "theirs/adapter_model.safetensors")[
        "base_model.model.model.layers.0.self_attn.q_proj.lora_A"
    ].shape == (3, 48)
    ours = graftc.import_peft(tmp_path / "theirs", base("llama"))
    assert difference(ours, theirs) <= 1e-5
    ours.export(tmp_path / "ours", format="peft")
    assert difference(ours, loaded(tmp_path / "ours", "llama")) <= 1e-5


@pytest.mark.full
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_converted_adapters(init: str, tmp_path: Path) -> None:
    """PEFT converts these to a plain LoRA of twice the rank, as it does for LoftQ: the base is the original one."""
    config = peft.LoraConfig(r=2, target_modules=["query"], init_lora_weights=init)
    start = peft.get_peft_model(tiny("bert"), config)
    start.peft_config["default"].init_lora_weights = True
    start.save_pretrained(tmp_path / "start")
    start.peft_config["default"].init_lora_weights = init
    with torch.no_grad():
        for name, parameter in start.named_parameters():
            if "lora_" in name:
                parameter.add_(0.02)
    start.save_pretrained(tmp_path / "theirs", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    ours = graftc.import_peft(tmp_path / "theirs", base("bert"))
    assert ours.spec.adapt[0].rank == 4 and ours.spec.adapt[0].init == "kaiming"  # type: ignore[attr-defined]
    assert difference(ours, start.eval()) <= 1e-5


@pytest.mark.full
def test_prompts_of_a_classifier_pool_the_text(tmp_path: Path) -> None:
    """peft pools a virtual token of BERT; the layers agree, and the export is refused."""
    config = peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3)
    theirs = saved(config, "bert", tmp_path / "theirs")
    ours = graftc.import_peft(tmp_path / "theirs", base("bert"))
    assert list(ours.spec.train) == ["classifier"]
    ids = torch.randint(5, 90, (2, 7), generator=torch.Generator().manual_seed(0))
    call = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "output_hidden_states": True}
    with torch.no_grad():
        pairs = zip(ours(**call).hidden_states, theirs(**call).hidden_states, strict=True)
        assert max(float((a - b[:, 3:]).abs().max()) for a, b in pairs) <= 1e-5
    with pytest.raises(GraftError) as caught:
        ours.export(tmp_path / "ours", format="peft")
    assert caught.value.code == "GC115" and not (tmp_path / "ours").exists()


@pytest.mark.full
def test_sixteen_bit_bases(tmp_path: Path) -> None:
    """Float32 and bfloat16 factors on a bfloat16 base are imported unchanged; wider ones are rounded with a warning."""
    folder = tmp_path / "theirs"
    saved(peft.LoraConfig(r=3, target_modules=["q_proj"]), "llama", folder, dtype=torch.bfloat16)
    model = peft_model(peft.LoraConfig(r=3, target_modules=["q_proj"]), "llama", dtype=torch.bfloat16).unload()
    stored = load_file(folder / "adapter_model.safetensors")
    for kept in (torch.float32, torch.bfloat16):
        save_file({key: value.to(kept) for key, value in stored.items()}, folder / "adapter_model.safetensors")
        ours = graftc.import_peft(folder, model)
        for name, value in ours.adapter_state_dict().items():
            module, _, part = name.partition(".graftc.lora.")
            assert value.dtype == torch.float32
            assert torch.equal(value, stored[f"base_model.model.{module}.lora_{part}.weight"].to(kept).float())
    wide = {key: value.double() + 1e-12 for key, value in stored.items()}
    save_file(wide, folder / "adapter_model.safetensors")
    with pytest.warns(GraftWarning, match="4 adapter tensors were rounded"):
        graftc.import_peft(folder, model)


# --- bad checkpoints -------------------------------------------------------------------------------------------------


def rewritten(folder: Path, change: Any) -> Path:
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file({key: value.contiguous() for key, value in tensors.items()}, file)
    return folder


def pruned(tensors: Any) -> None:
    for key in [key for key in tensors if "layers.1" in key and "v_proj" in key]:
        del tensors[key]


Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
TENSORS: dict[str, tuple[Any, str, str]] = {
    "unknown": (lambda t: t.update({"base_model.model.x.weight": torch.ones(2)}), "GC113", "x.weight"),
    "no prefix": (lambda t: t.update({"x": torch.ones(2)}), "GC113", "tensors that LORA does not have: x"),
    "half a pair": (lambda t: t.pop(Q.format("A")), "GC113", "not in the file"),
    "a module less": (pruned, "GC113", "different modules"),
    "other modules": (
        lambda t: t.update({Q.format("A").replace("q_proj", "z_proj"): torch.ones(3, 48)}),
        "GC114",
        "z_proj",
    ),
    "not finite": (lambda t: t[Q.format("A")].fill_(float("nan")), "GC113", "not finite"),
    "rank": (lambda t: t.update({Q.format("A"): torch.ones(4, 48)}), "GC114", "the model needs [3, 48]"),
}


@pytest.mark.full
@pytest.mark.parametrize("name", TENSORS)
def test_tensors_that_do_not_fit(name: str, copied: Path) -> None:
    change, code, said = TENSORS[name]
    error = unimported(rewritten(copied, change))
    assert error.code == code and said in str(error)


@pytest.mark.slow
def test_all_wrong_tensors_are_listed_at_once(copied: Path) -> None:
    def change(tensors: Any) -> None:
        tensors[Q.format("A")] = torch.ones(3, 47)
        tensors[Q.format("B")][0, 0] = float("inf")
        tensors[Q.format("B").replace("layers.0", "layers.1")] = torch.ones(47, 3)

    error = unimported(rewritten(copied, change))
    assert len(error.details) == 3 and "3 tensors" in error.message
    assert error.code == "GC113"  # one is damaged, so the others need not be of another base


@pytest.mark.full
def test_another_base(llama: Path) -> None:
    assert unimported(llama, "bert").code == "GC114"
    with pytest.raises(GraftError, match=r"v_proj.lora_B.weight is \[24, 3\], but the model needs \[48, 3\]") as caught:
        graftc.import_peft(llama, tiny("llama", num_key_value_heads=4))
    assert caught.value.code == "GC114" and len(caught.value.details) == 2


CONFIGS: dict[str, tuple[dict[str, Any], str, str]] = {
    "unknown field": ({"ranks": 3}, "GC111", "ranks"),
    "megatron": ({"megatron_core": "evil.core"}, "GC112", "megatron_core"),
    "type": ({"peft_type": "POLY"}, "GC112", "POLY"),
    "bias of B": ({"lora_bias": True}, "GC112", "lora_bias"),
    "start": ({"init_lora_weights": "pissa_niter_16"}, "GC112", "pissa_niter_16"),
    "wrong type": ({"target_modules": 3}, "GC111", "target_modules"),
    "rank": ({"r": "3"}, "GC112", "rank"),
    "alpha": ({"lora_alpha": -1}, "GC112", "alpha"),
    "slow": ({"rank_pattern": {"(?:(.)|(.)|(.)|(.))*[XYZ]": 2}}, "GC008", "exceeds the time limit"),
    "other targets": ({"target_modules": ["q_proj"]}, "GC113", "v_proj: in the file"),
    "more targets": ({"target_modules": ["q_proj", "v_proj", "k_proj"]}, "GC113", "k_proj: selected by the config"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_configs_that_are_refused(name: str, copied: Path) -> None:
    fields, code, said = CONFIGS[name]
    error = unimported(changed(copied, **fields))
    assert error.code == code and said in str(error)


MAPPINGS: tuple[dict[str, Any] | None, ...] = (
    None,
    {},
    {"base_model_class": "LlamaForCausalLM", "parent_library": "transformers.models.llama.modeling_llama"},
    {"base_model_class": "X", "parent_library": "os"},
    {"base_model_class": "__import__('os')", "parent_library": "my_package.models", "other": 1},
)


@pytest.mark.parametrize("mapping", MAPPINGS)
def test_a_class_that_a_config_names_is_passed_over(
    mapping: dict[str, Any] | None, copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The class is not needed, so nothing is imported."""
    asked: list[str] = []
    monkeypatch.setattr("importlib.import_module", lambda name, *_: asked.append(name))
    read_peft(changed(copied, auto_mapping=mapping))
    assert not asked


@pytest.mark.parametrize(
    "name", ["rank_pattern", "alpha_pattern", "use_dora", "fan_in_fan_out", "megatron_core", "bias"]
)
def test_a_field_that_is_null_is_not_set(name: str, copied: Path) -> None:
    config = read_peft(changed(copied, **{name: None}))
    assert config.config.format[0].tag() == "lora" and len(config.modules) == 4


@pytest.mark.parametrize("value", ["yes", 2, [True]])
def test_a_value_that_decides_on_the_method_is_named(value: Any, copied: Path) -> None:
    error = unimported(changed(copied, use_dora=value))
    assert error.code == "GC112" and error.place is not None and error.place.path == "use_dora"


def test_missing_files_and_pickles(copied: Path, tmp_path: Path) -> None:
    assert unimported(tmp_path / "nothing").code == "GC110"
    shutil.move(copied / "adapter_model.safetensors", copied / "adapter_model.bin")
    error = unimported(copied)
    assert error.code == "GC110" and "pickled" in error.message
    (copied / "adapter_model.safetensors").write_bytes(b"no header")
    assert unimported(copied).code == "GC113"
    (copied / "adapter_config.json").write_text("{", encoding="utf-8")
    assert unimported(copied).code == "GC111"


# --- what peft cannot express ----------------------------------------------------------------------------------------

LORA = {"method": "lora", "target": {"modules": "**.q_proj"}, "rank": 2}
SPECS: dict[str, tuple[dict[str, Any], str]] = {
    "two": ({"adapt": [LORA, {**LORA, "method": "ia3", "rank": None}]}, "several adaptations"),
    "bank": (
        {"adapt": [{**LORA, "name": "a"}, {**LORA, "name": "b"}], "compose": {"bank": ["a", "b"]}},
        "several adaptations",
    ),
    "method": ({"adapt": [{"method": "pfeiffer"}]}, "pfeiffer"),
    "direction": ({"adapt": [{**LORA, "method": "dora", "direction": False}]}, "direction"),
    "positions": ({"adapt": [{"method": "prefix", "length": 2}]}, "positions"),
    "tokens": ({"adapt": [LORA], "tokens": {"add": ["<x>"]}}, "tokens"),
    "modules only": ({"adapt": [], "train": ["lm_head"]}, "trained modules only"),
}


@pytest.mark.full
@pytest.mark.parametrize("name", SPECS)
def test_what_peft_cannot_express_is_named(name: str, tmp_path: Path) -> None:
    spec, said = SPECS[name]
    adapt = [{key: value for key, value in entry.items() if value is not None} for entry in spec["adapt"]]
    compiled = graftc.compile({**spec, "adapt": adapt}, base("llama"))
    with pytest.raises(GraftError) as caught:
        compiled.export(tmp_path / "out", format="peft")
    assert caught.value.code == "GC115" and said in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_parts_of_a_fused_weight_are_named(tmp_path: Path) -> None:
    compiled = graftc.compile({"adapt": [{"method": "lora", "target": {"role": "attn.q"}}]}, base("gpt2"))
    with pytest.raises(GraftError, match="rows of a fused weight") as caught:
        compiled.export(tmp_path / "out", format="peft")
    assert caught.value.code == "GC115"
    with pytest.raises(GraftError, match="no adaptation"):
        graftc.compile({"adapt": [LORA]}, base("llama")).merge(allow_unchanged=True).export(
            tmp_path / "out", format="peft"
        )


# --- configs as specs ------------------------------------------------------------------------------------------------


@pytest.mark.full
def test_a_config_is_a_spec(tmp_path: Path) -> None:
    """A config as an object, a mapping or a file trains as many parameters as in peft."""
    names = ["q_proj", "v_proj"]
    config = peft.LoraConfig(r=4, target_modules=names, rank_pattern={"q_proj": 2}, layers_to_transform=[1])
    config.save_pretrained(tmp_path)
    count = peft_model(config, "llama").get_nb_trainable_parameters()[0]
    for spec in (config, config.to_dict(), tmp_path / "adapter_config.json"):
        compiled = graftc.compile(spec, base("llama"))
        assert compiled.get_nb_trainable_parameters()[0] == count  # type: ignore[attr-defined]


def test_a_config_that_leaves_modules_to_the_model_is_no_spec_by_itself() -> None:
    for config in (peft.LoraConfig(), peft.LoraConfig(target_modules="all-linear"), peft.OFTConfig()):
        with pytest.raises(GraftError) as caught:
            graftc.load_spec(config)
        assert caught.value.code == "GC112"
