"""Settings of TRL that a compiled model cannot honour; each is refused by name before anything is loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

from graftc.applications.trl.settings import TrlSettings, package
from graftc.specs.errors.diagnostics import GraftError
from graftc.specs.foreign.config import CONFIG

_PACKED = "load the base in full precision, or give a spec with quantize: nf4 (--spec)"
_GENERATE = "leave it out: the compiled model generates with its own cache"


class Refused(NamedTuple):
    """A setting that is refused.

    Attributes:
        key: its name in TRL.
        instead: the alternative.
        when: returns whether a value is refused.
    """

    key: str
    instead: str
    when: Callable[[Any], bool] = bool


_REMOTE = Refused("trust_remote_code", "a model whose class transformers has: code from a folder is never run")
_LOADING = (
    Refused("quantization_config", _PACKED, lambda _: True),
    _REMOTE,
    Refused("use_safetensors", "a model with safetensors: graftc reads no pickles", lambda value: value is False),
)
"""Options for loading the base, which are keys of ``model_init_kwargs``."""

_OF_MODELS = (
    _REMOTE,
    Refused("load_in_4bit", _PACKED),
    Refused("load_in_8bit", "load the base in full precision, or give a spec with quantize: int8 (--spec)"),
)
_OF_TRAINING = (
    _REMOTE,
    Refused("use_vllm", _GENERATE),
    Refused("use_transformers_paged", _GENERATE),
    Refused("use_transformers_continuous_batching", _GENERATE),
    Refused("use_liger_kernel", "leave it out: the loss is computed in chunks as it is"),
    Refused("activation_offloading", "gradient_checkpointing_kwargs: {offload: true}"),
    Refused("sync_ref_model", "leave it out: the reference is the base, which does not change"),
    Refused("deepspeed", "train in one process, or wrap the compiled model in FSDP2 in a script of your own"),
    Refused("bf16_full_eval", "dtype: bfloat16, with which the base is loaded and compiled"),
    Refused("fp16_full_eval", "dtype: float16, with which the base is loaded and compiled"),
    Refused(
        "gradient_checkpointing_kwargs",
        "gradient_checkpointing_kwargs: {use_reentrant: false}",
        lambda options: isinstance(options, dict) and bool(options.get("use_reentrant")),
    ),
    Refused(
        "chat_template_path",
        "a file that ends in .jinja; tokens that the template needs are added by a spec with tokens",
        lambda path: bool(path) and not (str(path).endswith((".jinja", ".j2")) and Path(path).is_file()),
    ),
    Refused(
        "resume_from_checkpoint",
        "a checkpoint that graftc trl wrote, or graftc import-peft for the adapter",
        lambda path: isinstance(path, str) and (Path(path) / CONFIG).is_file(),
    ),
)
_LORA = ("use_rslora", "use_dora")


def unsupported(setting: str, instead: str) -> GraftError:
    """Return the error for a setting that a compiled model cannot honour, with the alternative."""
    return GraftError("GC072", f"a compiled model does not support {setting}", hint=f"instead: {instead}")


def check_settings(settings: TrlSettings) -> None:
    """Check that a compiled model can honour every setting.

    Raises:
        GraftError: GC061 without PEFT if its settings are used, GC072 for a setting that cannot be honoured, GC130 for
            several processes or devices, GC200 for settings that contradict each other.
    """
    for config, table in ((settings.model, _OF_MODELS), (settings.training, _OF_TRAINING)):
        for each in table:
            value = getattr(config, each.key, None)
            if each.when(value):
                raise unsupported(f"{each.key}: {_shown(value)}", each.instead)
    options = getattr(settings.training, "model_init_kwargs", None) or {}
    for each in _LOADING:
        if each.key in options and each.when(options[each.key]):
            raise unsupported(f"model_init_kwargs: {each.key}: {_shown(options[each.key])}", each.instead)
    resumed = settings.training.resume_from_checkpoint
    if isinstance(resumed, str) and not Path(resumed).is_dir():
        message = f"resume_from_checkpoint is not a directory: {resumed}"
        raise GraftError("GC200", message, hint="give the folder of a checkpoint, such as output/checkpoint-500")
    if settings.model.model_name_or_path is None:
        raise GraftError("GC200", "model_name_or_path is missing", hint="give a transformers folder or a hub id")
    if settings.spec is None:
        if not settings.model.use_peft:
            message = "neither use_peft nor a spec: TRL would train every weight, and there is nothing to compile"
            raise GraftError("GC200", message, hint="set use_peft: true, or give a spec with --spec SPEC.yaml")
        package("peft")
    elif settings.model.use_peft:
        message = "use_peft and a spec both say what to train"
        raise GraftError("GC200", message, hint="leave out use_peft and the lora_ keys, or the spec")
    elif unused := next(_changed(settings.model), None):
        raise GraftError("GC200", f"{unused} has no effect beside a spec", hint="leave it out; the spec says it")
    if settings.training.world_size > 1 or settings.training.n_gpu > 1:
        message = f"{settings.training.world_size} processes with {settings.training.n_gpu} devices each"
        hint = "start one process, and choose its device with CUDA_VISIBLE_DEVICES"
        raise GraftError("GC130", message, hint=hint)


def _changed(model: Any) -> Iterator[str]:
    """Yield the names of PEFT's settings that differ from TRL's defaults."""
    for field in fields(model):
        own = field.name.startswith("lora_") or field.name in _LORA
        if own and getattr(model, field.name) != field.default:
            yield field.name


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else repr(value) if not isinstance(value, str) else value
