"""A peft config used as a spec adapts what `peft.get_peft_model` adapts in the same model."""

from __future__ import annotations

import copy
import re
import sys
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import graftc
from graftc.specs.errors.diagnostics import GraftError, GraftWarning
from graftc.testing.families import FAMILIES
from tests.kit.releases import needs, peft_config
from tests.runtime.interop.checkpoints import base

peft = pytest.importorskip("peft")

CASES: dict[str, dict[str, Any]] = {
    "default": {},
    "all-linear": {"target_modules": "all-linear", "r": 3},
    "rslora": {"target_modules": "all-linear", "r": 3, "use_rslora": True, "lora_alpha": 5},
    "patterns": {
        "target_modules": "all-linear",
        "r": 3,
        "rank_pattern": {r".*\.1\..*(q|v|query|c_attn|q_proj)": 2, "k_proj": 3},
        "alpha_pattern": {r".*(\.0\.).*": 12},
    },
    "exclude": {"target_modules": "all-linear", "r": 2, "exclude_modules": r".*\.0\..*"},
    "exclude names": {"target_modules": "all-linear", "r": 2, "exclude_modules": ["q_proj", "query", "q", "c_fc"]},
    "layers": {"layers_to_transform": [1]},
    "regex": {"target_modules": r".*\.1\..*(q|v|query|value|q_proj|v_proj|c_attn|fc1)"},
}
"""Fields of a config; targets that peft has no default for are named by `NAMED`."""

NAMED = {"mixtral": ["q_proj", "v_proj"], "vit": ["q_proj", "v_proj"]}
TASKS = {
    **{"bert": "SEQ_CLS", "roberta": "SEQ_CLS", "gpt2": "CAUSAL_LM", "gpt_neox": "CAUSAL_LM", "llama": "CAUSAL_LM"},
    **{"mixtral": "CAUSAL_LM", "t5": "SEQ_2_SEQ_LM", "vit": None},
}


def lora(family: str, **fields: Any) -> Any:
    """Return a config for a family."""
    if "target_modules" not in fields and "target_parameters" not in fields and family in NAMED:
        fields["target_modules"] = NAMED[family]
    return peft.LoraConfig(**{"task_type": TASKS[family], **fields})


def theirs(config: Any, model: nn.Module) -> Any:
    """Return a copy of a model with peft's adapters."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(copy.deepcopy(model), copy.deepcopy(config))


def ours(config: Any, model: nn.Module, **more: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return graftc.compile(config, model, **more)


def ranks_and_scales(model: Any) -> dict[str, tuple[int, float]]:
    """Return the rank and scale of every tensor that peft's model adapts, by the base's name."""
    sites = {}
    for path, layer in model.base_model.model.named_modules():
        if isinstance(layer, peft.tuners.lora.LoraLayer):
            name = re.sub(r"\.base_layer", "", path)
            parameter = getattr(layer, "parameter_name", "weight")
            sites[f"{name}.{parameter}"] = layer.r["default"], layer.scaling["default"]
    return sites


def resolved(compiled: Any) -> dict[str, tuple[int, float]]:
    """Return the rank and scale of every tensor that the compiled model adapts."""
    main = compiled.compilation.main.resolved[0]
    return {f"{site.key.module}.{site.key.name}": (spec.rank, spec.scaling) for site, spec in main.places}


def heads(model: Any) -> set[str]:
    """Return the names of the base's tensors that peft trains in full."""
    names = (name for name, p in model.named_parameters() if p.requires_grad and "lora_" not in name)
    return {name.removeprefix("base_model.model.").replace(".modules_to_save.default", "") for name in names}


def full(compiled: Any) -> set[str]:
    """Return the names of the base's tensors that the compiled model trains in full."""
    names = (name for name, p in compiled.named_parameters() if p.requires_grad)
    return {".".join(name.split(".graftc.trained.")) for name in names if ".graftc.trained." in name}


def cases() -> list[Any]:
    parameters = []
    for family in FAMILIES:
        for name, fields in CASES.items():
            more = "patterns" in name and family in ("gpt2", "t5", "bert", "roberta", "gpt_neox", "vit")
            fields = {**fields, "rank_pattern": {r".*\.1\..*": 2}} if more else fields
            parameters.append(pytest.param(family, fields, id=f"{family}-{name}"))
    return parameters


@pytest.mark.sample("llama-default", "llama-patterns", "gpt2-all-linear", "t5-all-linear", "vit-all-linear")
@pytest.mark.parametrize(("family", "fields"), cases())
def test_modules_ranks_scales_and_heads_are_those_of_peft(family: str, fields: dict[str, Any]) -> None:
    config = lora(family, **fields)
    expected = theirs(config, base(family))
    compiled = ours(config, base(family))
    assert resolved(compiled) == ranks_and_scales(expected)
    assert full(compiled) == heads(expected)


HEADS = {
    "SEQ_CLS": ("BertForSequenceClassification", {"num_labels": 3}),
    "TOKEN_CLS": ("BertForTokenClassification", {"num_labels": 3}),
    "QUESTION_ANS": ("BertForQuestionAnswering", {"num_labels": 2}),
}


@cache
def tasked(task: str) -> nn.Module:
    """Return a tiny BERT for a task, or a tiny Llama that classifies."""
    import transformers

    if task == "score":
        config = copy.deepcopy(base("llama").config)
        config.num_labels, config.pad_token_id = 2, 0
        return transformers.LlamaForSequenceClassification(config).eval()
    name, more = HEADS[task]
    config = copy.deepcopy(base("bert").config)
    for field, value in more.items():
        setattr(config, field, value)
    return getattr(transformers, name)(config).eval()


@pytest.mark.slow
@pytest.mark.sample("SEQ_CLS-lora")
@pytest.mark.parametrize("kind", ["lora", "ia3", "prompt"])
@pytest.mark.parametrize("task", [*HEADS, "score"])
def test_a_task_trains_its_head_and_says_so(task: str, kind: str) -> None:
    task_type = "SEQ_CLS" if task == "score" else task
    configs = {
        "lora": lambda: peft.LoraConfig(task_type=task_type),
        "ia3": lambda: peft.IA3Config(task_type=task_type),
        "prompt": lambda: peft.PromptTuningConfig(task_type=task_type, num_virtual_tokens=2),
    }
    expected = theirs(configs[kind](), tasked(task))
    trained = {name for name, p in expected.named_parameters() if p.requires_grad and "modules_to_save" in name}
    names = {
        re.sub(r"^base_model\.(model\.)?(?=[a-z_]+\.modules)", "", n).replace(".modules_to_save.default", "")
        for n in trained
    }
    with pytest.warns(GraftWarning, match=task_type) as caught:
        compiled = graftc.compile(configs[kind](), tasked(task))
    assert names and full(compiled) == names
    (line,) = [str(w.message) for w in caught if "GC117" in str(w.message)]
    assert all(name.partition(".")[0] in line for name in names)
    assert compiled.report.trained_in_full == sum(tasked(task).get_parameter(name).numel() for name in names)


def test_a_head_that_the_config_names_itself_is_no_news() -> None:
    config = peft.LoraConfig(task_type="SEQ_CLS", modules_to_save=["classifier"])
    with warnings.catch_warnings():
        warnings.simplefilter("error", GraftWarning)
        assert full(graftc.compile(config, tasked("SEQ_CLS"))) == {"classifier.weight", "classifier.bias"}


# --- how training starts ---------------------------------------------------------------------------------------------


def factors(model: Any) -> dict[str, torch.Tensor]:
    """Return the factors of peft's model, by graftc's names."""
    tensors = {}
    for name, tensor in model.base_model.model.named_parameters():
        if match := re.fullmatch(r"(.*)\.lora_(?:embedding_)?([AB])\.default(\.weight)?", name):
            tensors[f"{match[1]}.graftc.lora.{match[2]}"] = tensor.detach()
    return tensors


TARGETS = {
    "llama": ["q_proj", "v_proj", "down_proj", "embed_tokens"],
    "bert": ["query", "output.dense", "word_embeddings"],
    "t5": ["q", "wo"],
}


@pytest.mark.sample("False-llama", "orthogonal-bert", "True-bert")
@pytest.mark.parametrize("family", TARGETS)
@pytest.mark.parametrize("start", [True, False, "gaussian", "Gaussian", "orthogonal"])
def test_drawn_factors_have_the_distribution_of_pefts(start: bool | str, family: str) -> None:
    """Uniform bounds, normal deviations and zeros agree, over all sites of one shape together."""
    config = peft.LoraConfig(r=8, target_modules=TARGETS[family], init_lora_weights=start)
    torch.manual_seed(1)
    expected, parameters = factors(theirs(config, base(family))), dict(ours(config, base(family)).named_parameters())
    groups: dict[tuple[str, torch.Size], tuple[list[Any], list[Any]]] = {}
    for name, tensor in expected.items():
        mine, other = groups.setdefault((name[-1], tensor.shape), ([], []))
        mine.append(parameters[name].detach())
        other.append(tensor)
    for one, two in groups.values():
        a, b = torch.stack(one), torch.stack(two)
        assert bool(a.any()) == bool(b.any())
        if b.any():
            assert float(a.std() / b.std()) == pytest.approx(1, abs=0.2)
            spread = [float(t.abs().max() / t.std()) for t in (a, b)]
            assert (spread[0] < 2) == (spread[1] < 2), "one is uniform, the other normal"


@pytest.mark.sample("bert")
@pytest.mark.parametrize("family", TARGETS)
def test_orthogonal_factors_leave_the_model_as_it_is(family: str) -> None:
    targets = TARGETS[family][:2]
    config = peft.LoraConfig(r=6, target_modules=targets, init_lora_weights="orthogonal")
    for model in (factors(theirs(config, base(family))), dict(ours(config, base(family)).named_parameters())):
        pairs = [(model[name], model[name[:-1] + "B"]) for name in model if name.endswith("graftc.lora.A")]
        assert pairs and all(bool(a.any()) and bool(b.any()) for a, b in pairs)
        assert max(float((b @ a).abs().max()) for a, b in pairs) < 1e-6


@pytest.mark.sample("pissa-gpt2", "olora-llama")
@pytest.mark.parametrize(
    ("start", "family"),
    # PEFT's olora decomposes a transposed weight in its stored orientation, and fails on GPT-2's.
    [*(("pissa", family) for family in (*TARGETS, "gpt2")), *(("olora", family) for family in TARGETS)],
)
def test_decomposed_factors_are_pefts(start: str, family: str) -> None:
    targets = {**TARGETS, "gpt2": ["c_attn"]}[family][:1]
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=targets, init_lora_weights=start)
    expected, parameters = factors(theirs(config, base(family))), dict(ours(config, base(family)).named_parameters())
    assert expected.keys() <= parameters.keys()
    for name in [name for name in expected if name.endswith("A")]:
        one, two = (m[name[:-1] + "B"].detach() @ m[name].detach() for m in (parameters, expected))
        assert float((one - two).norm() / two.norm()) < 1e-5
        a, b = (m[name].detach() for m in (parameters, expected))
        signs = torch.sign((a * b).sum(1, keepdim=True))
        assert float((a * signs - b).norm() / b.norm()) < 1e-4


def starting(start: str) -> Callable[[], Any]:
    def make() -> Any:
        config = peft.LoraConfig(target_modules=["q_proj"])
        config.init_lora_weights = start  # some of them require a further config, which is set later
        return config

    return make


STARTS = ("eva", "corda", "mica", "pissa_niter_4", "lora_ga", "pissa_niter_16", "anything")
REFUSED: dict[str, tuple[Any, str]] = {
    **{start: (starting(start), "init_lora_weights") for start in STARTS},
    "loftq": (
        lambda: peft.LoraConfig(
            target_modules=["q_proj"], init_lora_weights="loftq", loftq_config=peft.LoftQConfig(loftq_bits=4)
        ),
        "init_lora_weights",
    ),
    "dora": (
        lambda: peft.LoraConfig(target_modules=["q_proj"], use_dora=True, init_lora_weights=False),
        "init_lora_weights",
    ),
    "loha": (lambda: peft.LoHaConfig(target_modules=["q_proj"], init_weights=False), "init_weights"),
    "loha dropout": (lambda: peft.LoHaConfig(target_modules=["q_proj"], rank_dropout=0.1), "rank_dropout"),
    "lokr": (lambda: peft.LoKrConfig(target_modules=["q_proj"], init_weights="lycoris"), "init_weights"),
    "oft": (lambda: peft.OFTConfig(target_modules=["q_proj"], init_weights=False), "init_weights"),
    "oft dropout": (lambda: peft.OFTConfig(target_modules=["q_proj"], module_dropout=0.1), "module_dropout"),
    "oft bias": (lambda: peft.OFTConfig(target_modules=["q_proj"], bias="oft_only"), "bias"),
    "boft": (lambda: peft.BOFTConfig(target_modules=["q_proj"], init_weights=False), "init_weights"),
    "boft dropout": (lambda: peft.BOFTConfig(target_modules=["q_proj"], boft_dropout=0.1), "boft_dropout"),
    "oft powers": (lambda: peft.OFTConfig(target_modules=["q_proj"], num_cayley_neumann_terms=1), "terms"),
    "c3a": (lambda: peft.C3AConfig(target_modules=["q_proj"], block_size=8, bias="c3a_only"), "bias"),
    "gralora": (lambda: peft_config("GraloraConfig", target_modules=["q_proj"], bias="all"), "bias"),
    "hira": (lambda: peft_config("HiraConfig", target_modules=["q_proj"], rank_pattern={"q_proj": 2}), "rank_pattern"),
    "ia3": (lambda: peft.IA3Config(init_ia3_weights=False), "init_ia3_weights"),
    "vera": (lambda: peft.VeraConfig(target_modules=["q_proj"], init_weights=False), "init_weights"),
    "lily": (lambda: peft_config("LilyConfig", target_modules=["q_proj"], init_weights=False), "init_weights"),
    "lily pattern": (lambda: peft_config("LilyConfig", target_modules=r".*\.(q_proj|o_proj)"), "target_modules"),
    "lily names": (
        lambda: peft_config("LilyConfig", target_modules=["q_proj", "0.self_attn.q_proj"]),
        "target_modules",
    ),
    "shira": (lambda: peft.ShiraConfig(target_modules=["q_proj"], init_weights=False), "init_weights"),
    "shira mask": (lambda: peft.ShiraConfig(target_modules=["q_proj"], mask_type="mine"), "mask_type"),
    "miss": (lambda: peft.MissConfig(target_modules=["q_proj"], init_weights=False), "init_weights"),
    "miss bias": (lambda: peft.MissConfig(target_modules=["q_proj"], bias="all"), "bias"),
    "adalora": (lambda: peft.AdaLoraConfig(total_step=5, init_lora_weights=False), "init_lora_weights"),
    "p-tuning": (
        lambda: peft.PromptEncoderConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"),
        "encoder_reparameterization_type",
    ),
    "prefix": (
        lambda: peft.PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM", prefix_projection=True),
        "prefix_projection",
    ),
    "prompt": (
        lambda: peft.PromptTuningConfig(
            num_virtual_tokens=2,
            task_type="CAUSAL_LM",
            prompt_tuning_init="TEXT",
            prompt_tuning_init_text="a",
            tokenizer_name_or_path="x",
        ),
        "prompt_tuning_init",
    ),
    "bias": (lambda: peft.LoraConfig(target_modules=["q_proj"], lora_bias=True), "lora_bias"),
    "kind": (lambda: peft.PolyConfig(target_modules=["q_proj"]), "POLY"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_equivalent_is_refused_by_its_field(name: str) -> None:
    make, field = REFUSED[name]
    model = base("llama")
    before = {n: t.clone() for n, t in model.state_dict().items()}
    config = make()
    with pytest.raises(GraftError) as caught:
        graftc.compile(config, model)
    assert caught.value.code == "GC112" and field in str(caught.value)
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("config", "code", "says"),
    [
        (lambda: peft.LoraConfig(target_modules=["q_porj", "v_proj"]), "GC011", "'q_proj'|q_proj"),
        (lambda: peft.LoraConfig(target_modules=["nothing"]), "GC011", "nothing"),
        (lambda: peft.LoraConfig(target_modules=r".*\.nothing"), "GC112", "not found"),
        (lambda: peft.LoraConfig(target_modules=["q_proj"], exclude_modules=["q_proj"]), "GC112", "excluded|targeted"),
    ],
)
def test_targets_that_a_model_does_not_have(config: Any, code: str, says: str) -> None:
    with pytest.raises(GraftError, match=says) as caught:
        graftc.compile(config(), base("llama"))
    assert caught.value.code == code


def test_a_kind_without_defaults_says_what_peft_says() -> None:
    with pytest.raises(GraftError, match="all-linear") as caught:
        graftc.compile(peft.LoraConfig(), base("vit"))
    assert caught.value.code == "GC112"


@pytest.mark.slow
@pytest.mark.parametrize("source", ["object", "mapping", "file", "by name"])
def test_a_config_may_be_an_object_or_data(source: str, tmp_path: Path) -> None:
    config = peft.LoraConfig(r=3, target_modules="all-linear", task_type="CAUSAL_LM")
    config.save_pretrained(tmp_path)
    given: Any = {
        "object": config,
        "mapping": config.to_dict(),
        "file": tmp_path / "adapter_config.json",
        "by name": {"default": config},
    }[source]
    before = copy.deepcopy(vars(config))
    compiled = ours(given, base("llama"))
    assert resolved(compiled) == ranks_and_scales(theirs(config, base("llama")))
    assert vars(config) == before, "the user's config stays as it is"


def test_without_peft_a_file_that_names_modules_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    plain = peft.LoraConfig(target_modules=["q_proj", "v_proj"]).to_dict()
    assert len(resolved(ours(plain, base("llama")))) == 4
    with pytest.raises(GraftError, match="all-linear") as caught:
        graftc.compile({**plain, "target_modules": "all-linear"}, base("llama"))
    assert caught.value.code == "GC112"


def test_a_pattern_that_takes_forever_is_cut_off() -> None:
    config = {**peft.LoraConfig().to_dict(), "target_modules": r"(.*.*.*)*x(.*.*)*y"}
    with pytest.raises(GraftError):
        graftc.compile(config, base("llama"))


@pytest.mark.slow
def test_values_and_random_numbers_stay() -> None:
    model = copy.deepcopy(base("bert"))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    ours(peft.LoraConfig(target_modules="all-linear", task_type="SEQ_CLS", r=2), model)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not any(type(module).__module__.startswith("peft") for module in model.modules())


def tied_llama() -> nn.Module:
    import transformers

    config = copy.deepcopy(base("llama").config)
    config.tie_word_embeddings = True
    return transformers.LlamaForCausalLM(config).eval()


@pytest.mark.full
@pytest.mark.sample("saved2-True")
@pytest.mark.slow
@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("saved", [["lm_head"], ["embed_tokens"], ["embed_tokens", "lm_head"]])
def test_tied_modules_train_as_in_peft(saved: list[str], together: bool) -> None:
    """Tied modules train separately unless the config asks for one tensor."""
    fields = {"ensure_weight_tying": True} if together else {}
    config, model = lora("llama", target_modules=["q_proj"], modules_to_save=saved, **fields), tied_llama()
    expected, compiled = theirs(config, model), ours(config, model)
    ids, trained = torch.randint(3, 90, (2, 6)), []
    for each in (expected, compiled):
        each.eval()
        parameters = {id(p): p for n, p in each.named_parameters() if p.requires_grad and "lora" not in n}
        each(input_ids=ids).logits.square().mean().backward()
        trained.append(sorted(float(p.grad.norm()) for p in parameters.values() if p.grad is not None))
    assert trained[0] == pytest.approx(trained[1], rel=1e-4)


def test_one_pair_of_factors_for_tied_modules_is_refused() -> None:
    needs("peft", "0.19", "earlier ones ignore ensure_weight_tying of targets")
    config = lora("llama", target_modules=["embed_tokens"], ensure_weight_tying=True)
    with pytest.raises(GraftError, match="one pair of factors") as caught:
        ours(config, tied_llama())
    assert caught.value.code == "GC112"


class Attending(nn.Module):
    """An attention layer of torch."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.out = nn.MultiheadAttention(16, 2, batch_first=True), nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the attention's projected outputs."""
        outputs: torch.Tensor = self.out(self.attention(x, x, x, need_weights=False)[0])
        return outputs


@pytest.mark.slow
def test_an_attention_of_torch_as_a_whole() -> None:
    torch.manual_seed(0)
    model, x = Attending().eval(), torch.randn(2, 5, 16)
    config = peft.LoraConfig(r=2, target_modules=["attention"])
    expected = theirs(config, model)
    compiled = ours(config, model, example_inputs={"x": x})
    scales = {path: scale for path, (_, scale) in resolved(compiled).items()}
    assert scales == {"attention.in_proj_weight": 4.0, "attention.out_proj.weight": 8.0}
    assert sum(p.numel() for p in expected.parameters() if p.requires_grad) == compiled.report.trainable_parameters


@pytest.mark.slow
@pytest.mark.parametrize("pattern", [r".*\.(q_proj|w1|w2|w3)", r".*\.1\..*q_proj", r".*experts\.(w1|w3|w2)"])
def test_patterns_where_peft_goes_by_older_names(pattern: str) -> None:
    """Patterns may name experts as the modules of transformers 4; peft then matches the last segments in all layers."""
    if pattern.startswith(r".*experts"):  # matches nothing else
        needs("peft", "0.19", "earlier ones do not know modules by their names in transformers 4")
    config = lora("mixtral", target_modules=pattern, r=2)
    assert resolved(ours(config, base("mixtral"))) == ranks_and_scales(theirs(config, base("mixtral")))


class Named(nn.Module):
    """A module whose path is the end of another module's path."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.block = nn.Linear(8, 8), nn.Sequential()
        self.block.add_module("fc", nn.Linear(8, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply both modules in turn."""
        outputs: torch.Tensor = self.block(self.fc(x))
        return outputs


def test_a_pattern_that_matches_the_end_of_another_path() -> None:
    config = peft.LoraConfig(r=2, target_modules=r"fc")
    compiled = ours(config, Named(), example_inputs={"x": torch.randn(2, 8)})
    assert resolved(compiled) == ranks_and_scales(theirs(config, Named())) and len(resolved(compiled)) == 1


def test_an_alpha_that_is_not_said_is_pefts() -> None:
    config = {"peft_type": "LORA", "r": 4, "target_modules": ["q_proj"]}
    assert graftc.load_spec(config).adapt[0].alpha == peft.LoraConfig().lora_alpha == 8
