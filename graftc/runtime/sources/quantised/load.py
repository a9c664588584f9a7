"""Load a transformers model from a quantised folder: transformers loads plain tensors, and codes stay as stored.

transformers builds the model without weights, renames and converts plain tensors, and ties and fills the rest. graftc's
own quantizer first removes the quantised weights from the model and afterwards inserts packed ones, so that no
quantised weight ever exists in full and no quantisation library is needed.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, cast

from torch import nn

from graftc.compat.transformers import not_quantised
from graftc.compiler.quiet import tell
from graftc.files.tensors.folder import TensorFolder
from graftc.passes.core.packing.modules import Packed, hold_packed
from graftc.runtime.sources.folder_checks import ModelFolder, check_stored_types
from graftc.runtime.sources.quantised.folder_tensors import REFUSAL, FolderTensors, damaged
from graftc.runtime.sources.quantised.formats import awq, bitsandbytes, compressed_tensors, fp8, gptq, hqq, mxfp4
from graftc.runtime.sources.quantised.weight_places import PackedPlace, places_of
from graftc.runtime.sources.quantised.weights import Format, StoredWeight, unread
from graftc.specs.errors.diagnostics import GraftError, warn
from graftc.specs.errors.text import shown

FORMATS: Mapping[str, Format] = {
    "awq": awq.weights,
    "bitsandbytes": bitsandbytes.weights,
    "compressed-tensors": compressed_tensors.weights,
    "fp8": fp8.weights,
    "gptq": gptq.weights,
    "hqq": hqq.weights,
    "mxfp4": mxfp4.weights,
    "mxfp8": fp8.weights,
}
"""The readers of the formats, by ``quant_method`` in a config."""

BY_TRANSFORMERS = ("torchao",)
"""Methods whose folders transformers loads on any machine that has their package."""

_PLAN = "graftc"
_OURS = ("hf_quantizer", "is_quantized", "quantization_method")


def quantization_of(config: Any) -> dict[str, Any] | None:
    """Return a config's settings for quantised weights; None if the weights are not quantised.

    Args:
        config: a transformers config.
    """
    settings = getattr(config, "quantization_config", None)
    if settings is None and hasattr(config, "get_text_config"):
        settings = getattr(config.get_text_config(decoder=True), "quantization_config", None)
    if settings is None:
        return None
    settings = settings if isinstance(settings, dict) else settings.to_dict()
    if settings.get("load_in_4bit") or settings.get("load_in_8bit"):
        return {**settings, "quant_method": "bitsandbytes"}
    return settings


def require_read(config: Any, where: str) -> None:
    """Refuse a config whose quantisation cannot be read, before transformers looks for a package for it.

    Raises:
        GraftError: GC161.
    """
    options = quantization_of(config)
    if options is None:
        return
    method = str(getattr(options.get("quant_method"), "value", options.get("quant_method")))
    if method in BY_TRANSFORMERS:
        _require_package(method, where)
    elif method not in FORMATS:
        known = ", ".join(sorted([*FORMATS, *BY_TRANSFORMERS]))
        hint = "use the checkpoint that is not quantised, and let the spec quantise it: base: {quantize: nf4}; or use "
        unread(
            f"the weights of {where} are quantised by {shown(method)}, which is not supported", f"{hint}one of {known}"
        )


def _require_package(name: str, where: str) -> None:
    from importlib.util import find_spec

    if find_spec(name) is None:
        message = f"the weights of {where} are quantised by {name}, which is not installed"
        raise GraftError("GC161", message, hint=f"pip install {name}")
    tell(name)


def load_quantised(cls: Any, folder: ModelFolder, where: str, options: Mapping[str, Any], **kwargs: Any) -> Any:
    """Load a model with a quantised folder's weights, and return it with transformers' loading info.

    Args:
        cls: the transformers class.
        folder: the checked folder.
        where: the folder's name in errors.
        options: the ``quantization_config`` in its config.
        kwargs: arguments of ``from_pretrained``, including the config.

    Raises:
        GraftError: GC161 for a method or an option that is not supported, GC163 for tensors that do not fit.
    """
    tensors = FolderTensors(folder.stored or TensorFolder(folder.path, REFUSAL))
    weights = list(FORMATS[str(options["quant_method"])](tensors, options))
    if not weights:
        damaged(f"the config of {where} declares {options['quant_method']}, but none of its weights are quantised")
    _warn_of_activations(where, options)
    config = copy.deepcopy(kwargs.pop("config"))
    for own in {id(c): c for c in (config, config.get_text_config(decoder=True))}.values():
        own.__dict__.pop("quantization_config", None)
    model, info = cls.from_pretrained(
        folder.path,
        config=config,
        quantization_config=_plan()(weights),
        trust_remote_code=False,
        output_loading_info=True,
        **kwargs,
    )
    check_stored_types(model, tensors.stored, "GC163", where, tensors.read)
    for module in model.modules():
        for name in _OURS:
            module.__dict__.pop(name, None)
        if (inner := getattr(module, "config", None)) is not None:
            not_quantised(inner)
    model.config.quantization_config = dict(options)
    return model, info


def _put(places: list[PackedPlace]) -> None:
    for place in places:
        packed: dict[str, Packed] = {place.parameter: place.read()}
        del place.module.__dict__[place.parameter]
        hold_packed(place.module, packed)


def _warn_of_activations(where: str, options: Mapping[str, Any]) -> None:
    groups = (options.get("config_groups") or {}).values()
    inputs = any(isinstance(group, Mapping) and group.get("input_activations") for group in groups)
    if inputs or options.get("activation_scheme") or options.get("load_in_8bit"):
        message = f"the library that wrote {where} also rounds the inputs of its linear maps; here they are not rounded"
        warn("GC164", message)


@cache
def _plan() -> Any:
    """Return a class that transformers accepts as a quantisation config; it selects the quantizer defined below."""
    from transformers.quantizers.auto import register_quantizer
    from transformers.quantizers.base import HfQuantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin

    class Plan(QuantizationConfigMixin):
        """The weights to insert into a model."""

        def __init__(self, weights: Sequence[StoredWeight]) -> None:
            self.quant_method, self.weights = _PLAN, weights  # type: ignore[assignment]

        def to_dict(self) -> dict[str, Any]:
            return {"quant_method": _PLAN}

    @register_quantizer(_PLAN)
    class Quantizer(HfQuantizer):
        """Removes quantised weights from a model before loading, and inserts packed ones afterwards."""

        def _process_model_before_weight_loading(self, model: nn.Module, **_: Any) -> None:
            self.places = places_of(model, cast(Plan, self.quantization_config).weights)

        def _process_model_after_weight_loading(self, model: nn.Module, **_: Any) -> nn.Module:
            _put(self.places)
            return model

        def is_serializable(self) -> bool:
            return False

        @property
        def is_trainable(self) -> bool:
            return True

    return Plan
