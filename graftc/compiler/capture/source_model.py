"""Check that a model can be adapted: it must be plain, with no adaptation in it."""

from __future__ import annotations

from typing import Any

from torch import nn

from graftc.passes.core.weights.containers import Tree
from graftc.passes.core.weights.sharding import is_sharded
from graftc.specs.errors.diagnostics import GraftError

_PARALLEL = ("torch.nn.parallel", "torch.distributed")
"""The packages that define parallel wrapper classes."""
_PLAIN = "its weights include the adaptation"


def require_plain(model: Any) -> None:
    """Raise unless ``model`` is a module without graftc or peft adaptations that is not distributed over processes.

    Raises:
        GraftError: GC073 for a value that is not a module, or for a module that is or contains a compiled or merged
            one; GC032 for peft layers; GC130 for a model that is sharded or replicated over processes.
    """
    if not isinstance(model, nn.Module):
        raise _no_module(model)
    _require_undivided(model)
    for path, module in model.named_modules():
        where = f"{type(model).__name__} contains {{}} at {path!r}" if path else "{} is not a base"
        if isinstance(module, Tree):
            what = f"a {type(module).__name__}"
            hint = (
                "specify both adaptations in one spec, and compile the source of this model; or compile "
                f"compiled.merge().to_transformers(): {_PLAIN}"
            )
            raise GraftError("GC073", where.format(what), hint=hint)
        if any(cls.__module__.partition(".")[0] == "peft" for cls in type(module).__mro__):
            what = f"{type(module).__name__} of peft"
            hint = (
                f"compile the result of merge_and_unload() ({_PLAIN}), or reload the model and compile that; virtual "
                "tokens cannot be merged: train them here, with the methods prefix or prompt"
            )
            raise GraftError("GC032", where.format(what), hint=hint)


def _require_undivided(model: nn.Module) -> None:
    kind = type(model).__name__
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_sharded(tensor):
            placed = ", ".join(map(str, tensor.placements))  # type: ignore[attr-defined]
            message = f"{name} of {kind} is already sharded over processes: {placed}"
            hint = (
                "load the model whole, compile it, and shard the compiled one: fully_shard(block) for each of "
                "compiled.blocks.values(), then fully_shard(compiled); tensor parallelism (tp_plan) is for models "
                "without adaptations"
            )
            raise GraftError("GC130", message, hint=hint)
    if type(model).__module__.startswith(_PARALLEL):
        hint = "compile the model inside it, and wrap the compiled one"
        raise GraftError("GC130", f"the model is already wrapped in {kind}", hint=hint)


def _no_module(model: Any) -> GraftError:
    if isinstance(model, type):
        return GraftError(
            "GC073", f"the model is a class, {model.__name__}, not a module", hint="create an instance of it"
        )
    if isinstance(model, str):
        hint = f"load it first, as AutoModel.from_pretrained({model!r}); on the command line, --model takes names"
        return GraftError("GC073", f"the model is the name {model!r}, not a module", hint=hint)
    hint = "pass an nn.Module, such as the result of from_pretrained in transformers"
    return GraftError("GC073", f"the model is a {type(model).__name__}, not a module", hint=hint)
