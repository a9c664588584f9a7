"""Convert a merged model back to transformers: an instance of the source's class that holds the folded weights."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from graftc.compat.modules import buffers_of, parameters_of
from graftc.compiler.capture.interface import config_of
from graftc.compiler.compilation import Compilation
from graftc.passes.core.weights.store import Store
from graftc.specs.errors.diagnostics import GraftError


class FoldedModel(Protocol):
    """A model whose adaptations were folded into its weights."""

    @property
    def compilation(self) -> Compilation:
        """The compilation that was folded."""

    @property
    def store(self) -> Store:
        """The tensors of the folded model."""

    @property
    def additions(self) -> Sequence[str]:
        """The names of the biases that folding added."""

    @property
    def kept(self) -> Mapping[str, str]:
        """The adaptations that were not folded, each with the reason."""

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


def _require_as_built(compilation: Compilation, built: nn.Module) -> None:
    """Raise if the model that was captured computes something else in a module than a new instance of its class does.

    Code and numbers are compared, such as a norm's epsilon, and which parameters there are. Forward hooks, and modules
    with packed weights, which the libraries that packed them have replaced, are not.

    Raises:
        GraftError: GC052.
    """
    packed = {name.rpartition(".")[0] for name in compilation.store.packed}
    # The root of the model that is captured may be graftc's own, around the modules of the source.
    live = {**dict(compilation.model.named_modules(remove_duplicate=False)), "": compilation.source}
    for path, module in built.named_modules(remove_duplicate=False):
        if path not in live:
            difference = f"{path} is missing"
        elif path not in packed and _code_of(live[path]) is not _code_of(module):
            difference = f"{path or 'the model'} is a {type(live[path]).__name__} that runs other code"
        elif path not in packed and (other := _other_setting(live[path], module)):
            difference = f"{other} of {path or 'the model'} was changed"
        else:
            continue
        message = f"{difference}; {type(built).__name__} builds a {type(module).__name__} there"
        hint = "export to ONNX or .pt2 instead, which contain the graph of the model as it is"
        raise GraftError("GC052", message, hint=hint)


_STATE = frozenset({"training", "gradient_checkpointing", "max_seq_len_cached"})
"""Numbers of modules that change in use, without changing what an evaluation computes."""


def _other_setting(live: nn.Module, built: nn.Module) -> str:
    """Return the name of a number or a parameter in which two modules differ; empty if there is none."""
    for name, own in vars(built).items():
        if isinstance(own, int | float) and not name.startswith("_") and name not in _STATE:
            other = vars(live).get(name)
            if isinstance(other, int | float) and other != own:
                return name
    names = [{name for name, _ in own.named_parameters("", False, False)} for own in (live, built)]
    return min(names[0] - names[1], default="")


def _code_of(module: nn.Module) -> Any:
    """Return the function that a module's forward pass runs, below wrappers such as Accelerate's."""
    forward = inspect.unwrap(module.forward)
    return getattr(forward, "__func__", forward)


def to_transformers(merged: FoldedModel) -> Any:
    """Implement `Merged.to_transformers`: build the model on the meta device, then insert the folded tensors.

    Raises:
        GraftError: GC052, GC032 and GC166 as in `Merged.to_transformers`.
    """
    source = merged.compilation.model
    require_plain(merged.store)
    if config_of(source) is None:
        raise GraftError("GC032", f"{type(source).__name__} has no config to build it from")
    with torch.device("meta"):
        model: Any = type(merged.compilation.source)(_plain_config(source.config))
    _require_as_built(merged.compilation, model)
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
