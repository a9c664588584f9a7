"""Convert a merged model back to transformers: an instance of the source's class that holds the folded weights."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from graftc.compat.modules import buffers_of, parameters_of
from graftc.compiler.capture.interface import config_of
from graftc.passes.core.weights.store import Store
from graftc.runtime.interop.rebuilt import FoldedPrograms, require_same_modules, require_same_outputs
from graftc.specs.errors.diagnostics import GraftError


class FoldedModel(FoldedPrograms, Protocol):
    """A model whose adaptations were folded into its weights."""

    @property
    def additions(self) -> Sequence[str]:
        """The names of the biases that folding added."""

    def folded_state_dict(self) -> dict[str, Tensor]:
        """Return the tensors, keyed by their names in the source model."""


def no_place(missing: Sequence[str], source: nn.Module) -> GraftError:
    """Return the error for biases that folding added but the source's class cannot hold."""
    return GraftError(
        "GC052",
        f"folding had to add {', '.join(missing[:3])}, which {type(source).__name__} has no place for",
        hint="export to ONNX or .pt2 instead, which hold the added bias",
    )


def require_plain(store: Store) -> None:
    """Raise if a merged model's weights are packed; called for outputs that can only store plain values.

    Raises:
        GraftError: GC166.
    """
    if store.packed:
        raise packed_again()


def packed_again() -> GraftError:
    """Return the error for folded weights that are packed again where only plain values can be stored."""
    message = "the merged model's weights are packed again, which no transformers class supports"
    hint = 'merge with base="full" (--base full), or export to ONNX or .pt2, which support packed weights'
    return GraftError("GC166", message, hint=hint)


def _plain_config(config: Any) -> Any:
    """Return a copy of a config without quantisation settings, because the weights are stored as plain values."""
    plain = copy.deepcopy(config)
    for part in (plain, *vars(plain).values()):
        if getattr(part, "quantization_config", None) is not None:
            del part.quantization_config
    return plain


def to_transformers(merged: FoldedModel) -> Any:
    """Implement `Merged.to_transformers`: build the model, and check that it computes what the merged model does.

    Raises:
        GraftError: GC052, GC032 and GC166 as in `Merged.to_transformers`.
    """
    model = rebuild(merged)
    require_same_outputs(merged, model, f"the {type(model).__name__} that the config describes")
    return model


def rebuild(merged: FoldedModel) -> Any:
    """Build the source's class on the meta device, then insert the folded tensors.

    Raises:
        GraftError: GC052, GC032 and GC166 as in `Merged.to_transformers`.
    """
    source = merged.compilation.model
    require_plain(merged.store)
    if config_of(source) is None:
        raise GraftError("GC032", f"{type(source).__name__} has no config to build it from")
    with torch.device("meta"):
        model: Any = type(merged.compilation.source)(_plain_config(source.config))
    require_same_modules(merged.compilation, model)
    tensors = merged.folded_state_dict()
    known = {name for name, _ in [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]}
    missing = [name for name in merged.additions if name not in known]
    if missing:
        raise no_place(missing, source)
    # What the class itself ties is one parameter. Saving would drop all but one of other parameters that share storage.
    model.tie_weights()
    empty = dict(model.named_parameters(remove_duplicate=False))
    placed: dict[int, nn.Parameter] = {}
    for path, module in model.named_modules():
        for name, _ in list(module.named_parameters(path, recurse=False, remove_duplicate=False)):
            parameter = placed.setdefault(id(empty[name]), nn.Parameter(tensors[name].clone()))
            parameters_of(module)[name.rpartition(".")[2]] = parameter
        for name, _ in list(module.named_buffers(path, recurse=False, remove_duplicate=False)):
            buffers_of(module)[name.rpartition(".")[2]] = tensors[name].clone()
    model.tie_weights()
    if getattr(source, "generation_config", None) is not None:
        model.generation_config = copy.deepcopy(source.generation_config)
    return model.eval()
