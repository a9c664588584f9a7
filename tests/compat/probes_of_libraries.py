"""Probes: transformers, peft and TRL."""

from __future__ import annotations

import copy
import inspect
import tempfile
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from tests.compat.table import covers


def _gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"vocab_size": 8, "n_positions": 8, "n_embd": 4, "n_layer": 1, "n_head": 1}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=1, eos_token_id=None, pad_token_id=0)).eval()


@covers("transformers.PreTrainedConfig._name_or_path")
def configs_say_where_they_are_from() -> None:
    from transformers import AutoConfig

    from graftc.compat.transformers import ABOUT_ORIGIN, path_of

    with tempfile.TemporaryDirectory() as folder:
        _gpt2().config.save_pretrained(folder)
        config = AutoConfig.from_pretrained(folder)
        assert path_of(config) == folder
    assert path_of(object()) is None and "_name_or_path" in vars(config).keys() & ABOUT_ORIGIN


@covers("transformers.PreTrainedConfig._remove_keys_not_serialized('_commit_hash')")
def commits_are_recorded_and_not_saved() -> None:
    from graftc.compat.transformers import ABOUT_ORIGIN, commit_of, set_commit

    config = _gpt2().config
    before, text = {*vars(config)}, config.to_json_string()
    assert commit_of(config) is None
    set_commit(config, "0123")
    assert commit_of(config) == "0123" and config.to_json_string() == text and config.to_dict().keys() < {*dir(config)}
    assert vars(config).keys() - before <= ABOUT_ORIGIN


@covers("transformers.GenerationConfig._original_object_hash")
def generation_configs_keep_a_hash() -> None:
    from transformers import GenerationConfig

    from graftc.compat.transformers import ABOUT_ORIGIN

    with tempfile.TemporaryDirectory() as folder:
        GenerationConfig(max_length=4).save_pretrained(folder)
        read = vars(GenerationConfig.from_pretrained(folder))
    assert read.keys() - vars(GenerationConfig()).keys() <= ABOUT_ORIGIN
    assert "_original_object_hash" in read.keys() & ABOUT_ORIGIN


@covers("transformers.PreTrainedModel._output_capturing_hooks_installed")
def models_remember_that_they_have_run() -> None:
    from graftc.compat.transformers import ABOUT_ORIGIN

    model = _gpt2()
    parts = [*model.modules()]
    before = [{*vars(part)} for part in parts]
    model(torch.ones(1, 2, dtype=torch.long), output_hidden_states=True)
    new = {name for part, names in zip(parts, before, strict=True) for name in vars(part).keys() - names}
    assert "_output_capturing_hooks_installed" in new and new <= ABOUT_ORIGIN


@covers("transformers.utils.output_capturing._CAN_RECORD_REGISTRY")
def classes_are_registered_with_their_outputs() -> None:
    from graftc.compat.transformers import recorded_outputs

    model = _gpt2()
    assert str(type(model.transformer)) in recorded_outputs()


@covers("transformers.PreTrainedConfig._attn_implementation")
def configs_choose_an_attention() -> None:
    from transformers import GPT2Config

    from graftc.compat.transformers import attention_of

    assert attention_of(GPT2Config(attn_implementation="eager")) == "eager"
    assert "flash" in attention_of(GPT2Config(attn_implementation="flash_attention_2"))


@covers("transformers.quantizers.base._assign_is_quantized('_is_quantized')")
def quantised_models_are_marked() -> None:
    from transformers.quantizers.base import HfQuantizer

    from graftc.compat.transformers import not_quantised

    class Plain(HfQuantizer):
        requires_calibration = False

        def is_serializable(self) -> bool:
            return False

        @property
        def is_trainable(self) -> bool:
            return False

        def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
            return model

    model = _gpt2()
    before = {*vars(model.config)}
    Plain.__new__(Plain)
    quantizer = Plain.__new__(Plain)
    quantizer.quantization_config, quantizer.pre_quantized = None, False
    quantizer.postprocess_model(model)
    del model.config.quantization_config
    assert {*vars(model.config)} > before
    not_quantised(model.config)
    assert {*vars(model.config)} == before


@covers("transformers.PreTrainedModel._initialize_weights('_is_hf_initialized')")
def modules_may_be_left_as_they_are() -> None:
    from graftc.compat.transformers import leave_as_it_is

    model = _gpt2()
    for part in model.modules():
        vars(part).pop("_is_hf_initialized", None)
    model.transformer.h[0].mlp.c_fc.weight.data.fill_(3)
    model.transformer.h[0].mlp.c_proj.weight.data.fill_(3)
    leave_as_it_is(model.transformer.h[0].mlp.c_fc)
    model.init_weights()
    assert bool((model.transformer.h[0].mlp.c_fc.weight == 3).all())
    assert not bool((model.transformer.h[0].mlp.c_proj.weight == 3).any())


@covers("transformers.exporters.utils._PATCHES", since=("transformers", "5.22"))
def patches_of_exports_are_listed() -> None:
    from transformers.exporters import exporter_dynamo, utils

    from graftc.compat.transformers import export_patches

    patches = export_patches()
    assert patches is not None and exporter_dynamo is not None
    before, applied = patches["dynamo"], []
    assert len(before) > 10 and all(isinstance(patch[0], str) for patch in before)
    patches["dynamo"] = [("torch.nn.functional", "relu", lambda original: applied.append(original) or original)]
    try:
        with utils.apply_patches("dynamo"):
            assert applied == [nn.functional.relu]
    finally:
        patches["dynamo"] = before


@covers("transformers.models.auto.auto_factory._BaseAutoModelClass", "transformers.AutoModel._model_mapping")
def auto_classes_have_classes_for_configs() -> None:
    from transformers import AutoModel, AutoModelForCausalLM, GPT2LMHeadModel, GPT2Model

    from graftc.compat.transformers import auto_classes, loaded_by

    assert {AutoModel, AutoModelForCausalLM} <= {*auto_classes()}
    model = _gpt2()
    assert loaded_by(AutoModel, model.config) == (GPT2Model,)
    assert loaded_by(AutoModelForCausalLM, model.config) == (GPT2LMHeadModel,)
    assert loaded_by(AutoModel, None) == (None,)


@covers("transformers.models.auto.auto_factory._BaseAutoModelClass.from_pretrained('_from_auto')")
def auto_classes_add_options() -> None:
    from transformers import AutoModel
    from transformers.models.auto import auto_factory

    from graftc.compat.transformers import LOADING_OPTIONS, loaded_by

    model, given = _gpt2(), dict[str, Any]()
    (cls,) = loaded_by(AutoModel, model.config)

    class Loader(cls):  # type: ignore[misc, valid-type]
        @classmethod
        def from_pretrained(cls, *args: Any, **options: Any) -> None:
            given.update(options)

    class Auto(auto_factory._BaseAutoModelClass):
        _model_mapping = {type(model.config): Loader}  # noqa: RUF012

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        Auto.from_pretrained(folder, config=model.config)
    own = {name for name in given if name.startswith("_")}
    assert "_from_auto" in own and own <= {*LOADING_OPTIONS}


@covers(
    "transformers.GenerationMixin._prepare_cache_for_generation('_is_user_defined')", since=("transformers", "5.17")
)
def a_cache_of_the_caller_is_marked() -> None:
    from transformers import DynamicCache

    from graftc.compat.transformers import given_by_caller

    caches = DynamicCache(), DynamicCache()
    model = _gpt2()
    name = next(name for name in inspect.signature(model.forward).parameters if name in ("cache", "past_key_values"))
    model.generate(torch.ones(1, 2, dtype=torch.long), **{name: caches[0]}, max_new_tokens=1)
    given_by_caller(caches[1])
    assert vars(caches[0]).keys() == vars(caches[1]).keys() > vars(DynamicCache()).keys()


@covers(
    *(f"transformers.GenerationMixin._{name}" for name in ("expand_inputs_for_generation", "get_stopping_criteria")),
    *(
        f"transformers.GenerationMixin._{name}"
        for name in ("valid_auto_compile_criteria", "prepare_cache_for_generation", "get_candidate_generator")
    ),
)
def the_loop_has_steps() -> None:
    from graftc.compat.transformers import loop_steps

    taken: dict[str, Any] = {}

    def rows(model: Any, expand: Any, expand_size: int, is_encoder_decoder: bool, input_ids: Any, **given: Any) -> Any:
        taken["rows"] = expand_size, tuple(input_ids.shape)
        return expand(expand_size, is_encoder_decoder, input_ids, **given)

    def criteria(model: Any, ending: Any, generation_config: Any, *args: Any, **kwargs: Any) -> Any:
        taken["criteria"] = generation_config.max_length
        return ending(generation_config, *args, **kwargs)

    def compiles(model: Any, compiling: Any, *args: Any) -> bool:
        taken["compiles"] = compiling(*args)
        return False

    def cache(
        model: Any, prepare: Any, generation_config: Any, model_kwargs: Any, mode: Any, rows: int, *_: Any
    ) -> None:
        taken["cache"] = rows, generation_config.cache_implementation
        prepare(generation_config, model_kwargs, mode, rows, *_)

    def candidates(model: Any, propose: Any, **given: Any) -> Any:
        taken["candidates"] = given["assistant_model"] is assistant, sorted(given["model_kwargs"])[:1]
        return propose(**given)

    model, assistant = _gpt2(), _gpt2()
    steps: dict[str, Any] = {"rows": rows, "criteria": criteria, "compiles": compiles, "cache": cache}
    front = loop_steps(**steps, candidates=candidates)(type("Front", (), {}))
    model.__class__ = type("GPT2", (front, type(model)), {})
    ids = torch.ones(1, 2, dtype=torch.long)
    both = model.generate(ids, max_new_tokens=2, num_return_sequences=2, do_sample=True)
    assert both.shape == (2, 4) and bool((both[:, :2] == 1).all())
    assert taken == {"rows": (2, (1, 2)), "criteria": 4, "compiles": False, "cache": (1, None)}
    assert model.generate(ids, max_new_tokens=2, assistant_model=assistant, do_sample=False).shape == (1, 4)
    assert taken["candidates"] == (True, ["attention_mask"])


@covers("transformers.Trainer._issue_warnings_after_load('_keys_to_ignore_on_save')")
def a_checkpoint_may_have_fewer_tensors() -> None:
    from transformers import Trainer

    from graftc.compat.transformers import saves_all_keys

    trainer: Any = SimpleNamespace(model=saves_all_keys(type("Front", (), {}))())
    result = SimpleNamespace(missing_keys=["weight"], unexpected_keys=[])
    Trainer._issue_warnings_after_load(trainer, result)


@covers("transformers.GenerationMixin._validate_generation_mode('_is_stateful')", until=("transformers", "5.25"))
def assisted_generation_takes_tokens_back() -> None:
    from transformers import GenerationConfig, GenerationMixin
    from transformers.generation.configuration_utils import GenerationMode

    from graftc.compat.transformers import takes_tokens_back

    model: Any = takes_tokens_back(type("Front", (), {}))()
    mode = GenerationMode.ASSISTED_GENERATION
    GenerationMixin._validate_generation_mode(model, mode, GenerationConfig(num_return_sequences=1), {})


@covers("peft.utils.transformers_weight_conversion._MOE_TARGET_MODULE_MAPPING", since=("peft", "0.19"))
def peft_knows_merged_projections() -> None:
    from graftc.compat.peft import merged_projections

    experts = {"w1": "gate_up_proj", "w2": "down_proj", "w3": "gate_up_proj"}
    assert any(experts.items() <= table.items() for table in merged_projections())


_ADD = "trl.trainer.utils.add_fused_lm_head"


@covers(
    f"{_ADD}('outputs')",
    f"{_ADD}('temperature')",
    f"{_ADD}('cast_lm_head_to_fp32')",
    f"{_ADD}('fused_lm_head')",
    "trl.trainer.utils.FusedCausalLMOutput",
)
def trl_sets_a_forward() -> None:
    from trl.trainer import utils

    from graftc.compat.trl import fused_forward

    model = _gpt2()
    assert fused_forward(model.forward) is None
    for temperature in (1.0, 0.5):
        other = copy.deepcopy(model)
        utils.add_fused_lm_head(other, temperature, False, ("log_probs", "entropy"))
        fused = fused_forward(other.forward)
        assert fused is not None and fused.fields == ("log_probs", "entropy") and fused.plain == (temperature == 1)
        assert fused.output(loss=1).loss == 1
    utils.add_fused_lm_head(model, cast_lm_head_to_fp32=True)
    fused = fused_forward(model.forward)
    assert fused is not None and not fused.plain
