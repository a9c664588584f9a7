"""Small models with random weights, and inputs that they accept."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from graftc.testing.compare import outputs_of
from tools.coverage.catalogue import Entry
from tools.coverage.inputs import running
from tools.coverage.libraries import other_model
from tools.coverage.shrink import PLANS, Plan, shrink

PARAMETERS = 60_000_000
"""Larger models are not built."""


_READ_BY_SOME = {"vision_start_token_id": 100, "vision_end_token_id": 101, "audio_start_token_id": 102}
"""Fields that some models read, but that their default configs lack."""


@dataclass(frozen=True)
class Built:
    """A model that runs eagerly, in eval mode, with its inputs."""

    entry: Entry
    model: nn.Module
    inputs: dict[str, Any]
    plan: int = 0


class NotBuiltError(Exception):
    """Raised when no plan gives a model that runs."""


def build(entry: Entry) -> Built:
    """Build the model of an entry, trying the plans in turn.

    Raises:
        NotBuiltError: no plan worked; the message is that of the first one, which is the likeliest to say what is
            wrong.
    """
    if entry.library != "transformers":
        try:
            other, known = other_model(entry.library, entry.name)
            outputs_of(randomise(other), known)
        except Exception as error:
            raise NotBuiltError(f"{type(error).__name__}: {error}") from error
        return Built(entry, other.eval(), known)
    reasons: list[str] = []
    for index, plan in enumerate(PLANS):
        try:
            model = _model(entry, plan)
        except Exception as error:
            reasons.append(f"{type(error).__name__}: {error}")
            continue
        inputs, reason = running(model)
        if inputs is not None:
            return Built(entry, model, inputs, index)
        reasons.append(reason)
    raise NotBuiltError(reasons[0])


def full_size(entry: Entry, paths: Sequence[str]) -> dict[str, int]:
    """Return the number of parameters below each path in the model of the default config; empty if it is not built."""
    try:
        cls, config = _class_and_config(entry)
        with torch.device("meta"):
            model = cls(config)
        return {path: sum(p.numel() for p in model.get_submodule(path).parameters()) for path in paths}
    except Exception:
        return {}


def _class_and_config(entry: Entry) -> tuple[Any, Any]:
    auto: Any = importlib.import_module("transformers.models.auto.configuration_auto")
    transformers: Any = importlib.import_module("transformers")
    cls = getattr(transformers, entry.name)
    return cls, (getattr(cls, "config_class", None) or auto.CONFIG_MAPPING[entry.model_type])()


def _model(entry: Entry, plan: Plan) -> nn.Module:
    cls, config = _class_and_config(entry)
    config = shrink(config, plan)
    if entry.tables == ("causal LM",) and getattr(config, "is_decoder", None) is False:
        config.is_decoder = not config.is_encoder_decoder
    _set(config, "use_cache", False)
    if getattr(config, "default_language", "") is None:
        config.default_language = config.languages[0]
    for name, value in _READ_BY_SOME.items():
        if not hasattr(config, name):
            setattr(config, name, value)
    if getattr(config, "is_encoder_decoder", False) and not hasattr(config, "decoder_start_token_id"):
        config.decoder_start_token_id = 0
    with torch.device("meta"):
        count = sum(p.numel() for p in cls(config).parameters())
    if count > PARAMETERS:
        raise ValueError(f"{count / 1e6:.0f} million parameters even when shrunken")
    torch.manual_seed(0)
    model: nn.Module = cls(config)
    return randomise(model).eval()


def _set(config: Any, name: str, value: Any) -> None:
    """Set an attribute if it exists, in the config and in its sub-configs."""
    if name in vars(config):
        setattr(config, name, value)
    for part in vars(config).values():
        if hasattr(part, "model_type") and hasattr(part, "to_dict"):
            _set(part, name, value)


@torch.no_grad()
def randomise(model: nn.Module, scale: float = 0.05) -> nn.Module:
    """Add seeded noise to every parameter in place, so that no bias is zero and no norm's gain is one."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter) * scale)
    return model
