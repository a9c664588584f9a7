"""Check that a model built from its class and config computes what the merged model does.

A class builds modules from its config alone. Whatever was changed on the live model afterwards, such as code, numbers,
hooks, ties and buffers that are not stored, is in the graphs but not in a model that the class builds.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from graftc.compat.hooks import CALL_HOOKS
from graftc.compiler.capture.anchor import anchor
from graftc.compiler.capture.request import CaptureRequest
from graftc.compiler.compilation import Compilation
from graftc.compiler.live.elements import is_live, union_of
from graftc.passes.core.elements.calls import CALLS, read_calls
from graftc.passes.core.ir.program import Program
from graftc.passes.core.ir.program_key import ProgramKey
from graftc.passes.core.weights.store import Store
from graftc.passes.graph.remove_folded import take_out
from graftc.specs.errors.diagnostics import GraftError

_STATE = frozenset({"training", "gradient_checkpointing", "max_seq_len_cached", "vocab_size", "tie_word_embeddings"})
"""Numbers of modules that change in use, without changing what an evaluation computes, or that only repeat what the
tensors show; transformers' own resizing of tables changes such a number at the root alone."""

_LIBRARIES = ("accelerate.", "transformers.", "torch.")
"""Packages whose hooks move and record tensors, without changing what a model computes."""


class FoldedPrograms(Protocol):
    """A folded model's graphs and tensors."""

    @property
    def compilation(self) -> Compilation:
        """The compilation that was folded."""

    @property
    def store(self) -> Store:
        """The tensors of the folded model."""

    @property
    def kept(self) -> dict[str, str]:
        """The adaptations that were not folded, each with the reason."""

    def program_of(self, key: ProgramKey) -> Program:
        """Return the Program for a key."""


def require_same_modules(compilation: Compilation, built: nn.Module) -> None:
    """Raise if modules of the model that was captured differ from those that its class builds.

    Compared are code, numbers such as a norm's epsilon, and the names of parameters; of live models also hooks. Modules
    with packed weights are left out, because the libraries that packed them have replaced them.

    Args:
        compilation: the compilation of the model that was captured.
        built: a new instance of its class, which may be on the meta device.

    Raises:
        GraftError: GC052.
    """
    difference = _difference(compilation, built)
    if difference and _difference(compilation, _called(compilation, built)):
        raise _not_as_built(difference)
    if is_live(compilation.model):  # its Python code calls the graphs, and the hooks around them
        for path, module in compilation.source.named_modules():
            if (hook := next(_hooks_of(module), "")) and not any(True for _ in _hooks_of(built.get_submodule(path))):
                raise _not_as_built(
                    f"{path or 'the model'} has the hook {hook}, which {type(built).__name__} does not have"
                )


def _difference(compilation: Compilation, built: nn.Module) -> str:
    """Return how a module of the model that was captured differs from that of a built one; empty if none does."""
    packed = {name.rpartition(".")[0] for name in compilation.store.packed}
    live = dict(compilation.model.named_modules(remove_duplicate=False))
    # The root of the model that is captured may be graftc's own, around the modules of the source.
    running = {**live, "": compilation.source}
    for path, module in built.named_modules(remove_duplicate=False):
        if path not in live:
            difference = f"{path} is missing"
        elif path not in packed and _code_of(running[path]) != _code_of(module):
            difference = f"{path or 'the model'} is a {type(running[path]).__name__} that runs other code"
        elif path not in packed and (other := _other_setting(live[path], module)):
            difference = f"{other} of {path or 'the model'} was changed"
        else:
            continue
        return f"{difference}; {type(built).__name__} builds a {type(module).__name__} there"
    return ""


def _called(compilation: Compilation, built: nn.Module) -> nn.Module:
    """Return a copy of a model after a call, in which a class may change its modules: BigBird's do for short inputs."""
    called = copy.deepcopy(built).to("meta").eval()
    inputs = {axis.name: axis.example(torch.device("meta")) for axis in compilation.main.axes}
    with suppress(Exception), torch.no_grad():
        called(**inputs)
    return called


def require_same_outputs(merged: FoldedPrograms, model: Any, named: str) -> None:
    """Raise unless a model, run on sample inputs, computes what the merged model's graph does.

    The model runs with its own tensors and the graph with those of the merged model, so that both code and values are
    compared. The elements of a live model are compared one by one. Not compared are models without values, and those
    that do not run on samples.

    Args:
        merged: the merged model.
        model: an instance of the source's class.
        named: a description of the model, for the message.

    Raises:
        GraftError: GC052.
    """
    compilation = merged.compilation
    key = compilation.key("eval")
    program = take_out(merged.program_of(key), merged.kept)
    run: nn.Module = model
    if is_live(compilation.model):
        run = union_of(model, read_calls(dict(program.flags)[CALLS]))
    request = CaptureRequest.served_by(program, run, compilation.main.axes, Store.mirror(model).aliases)
    buffers = dict(model.named_buffers())
    tensors = {
        name: tensor.detach()
        for name, tensor in merged.store.tensors()
        if name not in buffers or not _is_rounded(tensor, buffers[name])
    }
    if differing := anchor(request, program, tensors).differing:
        message = f"{named} does not compute what the merged model does: {differing[0]}"
        raise _not_as_built(message, differing[1:5])


def _is_rounded(live: Tensor, built: Tensor) -> bool:
    """Return whether a buffer has 16-bit values, as after ``model.to(torch.bfloat16)``, of one that the class builds.

    What is computed from it, such as rotary positions, differs by more than rounding if the merged model is wider.
    """
    if not (live.is_floating_point() and live.shape == built.shape):
        return False
    rounded = (built.to(live.device, dtype) for dtype in (torch.bfloat16, torch.float16))
    return any(torch.equal(live.double(), each.double()) for each in rounded)


def _not_as_built(message: str, details: Sequence[str] = ()) -> GraftError:
    hint = "export to ONNX or .pt2 instead, which contain the graph of the model as it is"
    return GraftError("GC052", message, hint=hint, details=details)


def _other_setting(live: nn.Module, built: nn.Module) -> str:
    """Return the name of a number or a parameter in which two modules differ; empty if there is none."""
    for name, own in vars(built).items():
        if isinstance(own, int | float) and not name.startswith("_") and name not in _STATE:
            other = vars(live).get(name)
            if isinstance(other, int | float) and other != own:
                return name
    names = [{name for name, _ in own.named_parameters("", False, False)} for own in (live, built)]
    return min(names[0] ^ names[1], default="")


def _code_of(module: nn.Module) -> tuple[Any, Any]:
    """Return the functions that a call of a module runs, below wrappers such as Accelerate's."""
    forward = inspect.unwrap(module.forward)
    return getattr(forward, "__func__", forward), type(module).__call__


def _hooks_of(module: nn.Module) -> Iterator[str]:
    """Yield the names of the functions that a module calls around its forward pass, except those of libraries."""
    for table in CALL_HOOKS:
        for hook in vars(module)[table].values():
            if not str(getattr(hook, "__module__", "")).startswith(_LIBRARIES):
                yield getattr(hook, "__qualname__", type(hook).__name__)
