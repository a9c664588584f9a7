"""The check that a model can be adapted: it has to be plain, without an adaptation in it."""

from __future__ import annotations

from typing import Any

from torch import nn

from graftc.passes.core.weights.containers import Tree
from graftc.passes.core.weights.sharding import is_sharded
from graftc.specs.errors.diagnostics import GraftError

_PARALLEL = ("torch.nn.parallel", "torch.distributed")
"""Where the classes of wrappers come from."""
_PLAIN = "it has the adaptation in its weights"


def require_plain(model: Any) -> None:
    """Raise unless ``model`` is a model without adaptations of graftc or peft that is not spread over processes.

    Raises:
        GraftError: GC073 for a value that is not a module, or a module that holds a compiled or merged one; GC032 for
            layers of peft; GC130 for a model that is sharded or replicated over processes.
    """
    if not isinstance(model, nn.Module):
        raise _no_module(model)
    _require_undivided(model)
    for path, module in model.named_modules():
        where = f"{type(model).__name__} holds {{}} at {path!r}" if path else "{} is not a base"
        if isinstance(module, Tree):
            what = f"a {type(module).__name__}"
            hint = (
                "name both adaptations in one spec, and compile the model that this one was made from; or compile "
                f"compiled.merge().to_transformers(): {_PLAIN}"
            )
            raise GraftError("GC073", where.format(what), hint=hint)
        if any(cls.__module__.partition(".")[0] == "peft" for cls in type(module).__mro__):
            what = f"{type(module).__name__} of peft"
            hint = (
                f"compile what merge_and_unload() gives: {_PLAIN}; or a model that was loaded anew. Virtual tokens do "
                "not merge: train them here, by prefix or prompt"
            )
            raise GraftError("GC032", where.format(what), hint=hint)


def _require_undivided(model: nn.Module) -> None:
    kind = type(model).__name__
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_sharded(tensor):
            placed = ", ".join(map(str, tensor.placements))  # type: ignore[attr-defined]
            message = f"{name} of {kind} is sharded over processes already: {placed}"
            hint = (
                "load the model whole, compile it, and shard the compiled one: fully_shard(block) for each of "
                "compiled.blocks.values(), then fully_shard(compiled); tensor parallelism (tp_plan) is for models "
                "without adaptations"
            )
            raise GraftError("GC130", message, hint=hint)
    if type(model).__module__.startswith(_PARALLEL):
        hint = "compile the model in it, and wrap the compiled one"
        raise GraftError("GC130", f"the model is in {kind} already", hint=hint)


def _no_module(model: Any) -> GraftError:
    if isinstance(model, type):
        return GraftError(
            "GC073", f"the model is a class, {model.__name__}, not a module", hint="make an instance of it"
        )
    if isinstance(model, str):
        hint = f"load it first, as AutoModel.from_pretrained({model!r}); on the command line, --model takes names"
        return GraftError("GC073", f"the model is the name {model!r}, not a module", hint=hint)
    hint = "give an nn.Module, as from_pretrained of transformers returns one"
    return GraftError("GC073", f"the model is a {type(model).__name__}, not a module", hint=hint)
