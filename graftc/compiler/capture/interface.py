"""Read the arguments of a model's ``forward``: tensors and flags by name, without values that make no difference.

A flag is a keyword argument whose value is not a tensor; it becomes a constant of the captured graph. A flag whose
value the model would use anyway needs no separate graph.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from graftc.compat.caches import CACHES, cache_name
from graftc.compat.transformers import attention_of
from graftc.compiler.capture.past import CACHE, ENCODED, USE_CACHE
from graftc.passes.core.packing.modules import packed_types
from graftc.specs.errors.arguments import as_mapping, kind_of
from graftc.specs.errors.diagnostics import GraftError, nearest

Flag = bool | int | float | str | None
Flags = tuple[tuple[str, Flag], ...]
ExampleInputs = Mapping[str, Any] | Sequence[Any] | Tensor
"""Inputs by name, or in the order of ``forward``'s parameters."""
_NAMED = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
COUNT = "num_items_in_batch"
"""The number of labels over which a loss is averaged if a batch is split into several calls. It changes from step to
step, so a Python number is converted to a tensor: as a flag, each value would need its own graph."""


def parameters(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the parameters of the model's ``forward``, in order."""
    return tuple(n for n, p in declared(model).items() if p.kind in _NAMED)


def declared(model: nn.Module) -> Mapping[str, inspect.Parameter]:
    """Return the parameters of the class's ``forward`` by name, without ``self``."""
    function = inspect.getattr_static(type(model), "forward").__get__(model, type(model))
    try:
        return inspect.signature(function, eval_str=True).parameters
    except (NameError, SyntaxError, TypeError):  # an annotation refers to an import for type checkers only
        return inspect.signature(function).parameters


def device_of(model: nn.Module) -> torch.device:
    """Return the device of the model's first parameter or buffer; the CPU if it has none."""
    first = next(chain(model.parameters(), model.buffers()), None)
    return torch.device("cpu") if first is None else first.device


def has_values(model: nn.Module) -> bool:
    """Return whether a model can be run: none of its tensors is on the meta device."""
    return not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))


def dtype_of(model: nn.Module) -> torch.dtype:
    """Return the dtype of the model's first floating-point parameter, or else of its first packed weight.

    Return float32 if the model has neither.
    """
    packed = (own.dtype for module in model.modules() for own in packed_types(module).values())
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), next(packed, torch.float32))


def is_transformers(model: nn.Module) -> bool:
    """Return whether a transformers class is among the model's bases, so that transformers' conventions apply."""
    return any(cls.__module__.startswith("transformers.") for cls in type(model).__mro__)


def config_of(model: nn.Module) -> Any:
    """Return the model's config; None if it has none, or if ``config`` is a submodule or an unrelated value."""
    config = getattr(model, "config", None)
    return config if hasattr(config, "to_dict") else None


class Interface:
    """Reads the arguments of a model's calls and interprets them as the model would.

    Args:
        model: the model, with its current ``forward`` and config.

    Attributes:
        parameters: the names of the parameters that ``forward`` declares, in order.
        cache: the name of the parameter for a cache; None if there is none.
    """

    def __init__(self, model: nn.Module) -> None:
        by_name = declared(model)
        self.model = type(model).__name__
        self.parameters = parameters(model)
        self._positional = tuple(n for n in self.parameters if by_name[n].kind is not inspect.Parameter.KEYWORD_ONLY)
        self._defaults = {n: p.default for n, p in by_name.items() if p.default is not inspect.Parameter.empty}
        self._conventional = is_transformers(model)
        self.cache = cache_name(self.parameters) if self._conventional else None
        config = getattr(model, "config", None) if self._conventional else None
        self._ignored = _sizes_of_kernels(config) if self._conventional else frozenset()
        self._plain = getattr(config, "return_dict", None) is False
        takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in by_name.values())
        self._accepted = None if takes_any else frozenset(self.parameters)
        if self._conventional:
            self._accepted = frozenset([*self.parameters, *_more_keywords(model, by_name)])
        self._usual = {
            name: bool(getattr(config, name, False))
            for name in self._accepted or ()
            if config is not None and name.startswith("output_")
        }

    def optional(self, name: str) -> bool:
        """Return whether ``forward`` can be called without this input."""
        return name not in self.parameters or name in self._defaults

    def examples(self, given: ExampleInputs) -> Mapping[str, Any]:
        """Return example inputs by name, from inputs given by name, in order, or as a single tensor.

        Raises:
            GraftError: GC031 for too many inputs, GC073 for a value of any other type.
        """
        if isinstance(given, Mapping):
            return as_mapping(given, "example inputs", object)
        inputs = (given,) if isinstance(given, Tensor) else given
        if not isinstance(inputs, list | tuple):
            message = f"the example inputs are {kind_of(inputs)}"
            raise GraftError("GC073", message, hint="pass tensors by name, or a tuple of them in order")
        return self.named(tuple(inputs), {})

    def named(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Return the arguments of a call by name.

        Raises:
            GraftError: GC031 for too many positional arguments, or for an input that is given twice.
        """
        if len(args) > len(self._positional):
            raise GraftError("GC031", f"{len(args)} positional inputs; the model takes {len(self._positional)}")
        named = dict(zip(self._positional, args, strict=False))
        twice = named.keys() & kwargs.keys()
        if twice:
            raise GraftError("GC031", f"input {min(twice)!r} is given twice")
        return {**named, **kwargs}

    def read(self, named: Mapping[str, Any], *, structures: bool = False) -> tuple[dict[str, Any], bool]:
        """Return the tensors and flags that make a difference, by name, and whether outputs should be a plain tuple.

        Default values and None count as absent. ``return_dict`` needs no separate graph, since only the container
        differs. Its default is the one in the source model's config.

        A cache is returned unchanged under the name ``cache``, and ``use_cache`` is a flag only if it is True.

        Args:
            named: the arguments by name.
            structures: whether to accept lists, tuples and dicts, unchanged.

        Raises:
            GraftError: GC031 for a name that ``forward`` does not accept, or for a value that is neither a tensor nor a
                flag; GC140 for ``use_cache=True`` if ``forward`` accepts no cache.
        """
        present: dict[str, Any] = {}
        for name, value in named.items():
            if value is None and self._defaults.get(name) is None:
                continue
            if name in CACHES and self.cache is not None and not isinstance(value, Tensor):
                present[CACHE] = value
                continue
            if self._accepted is not None and name not in self._accepted:
                close = nearest(name, sorted(self._accepted))
                hint = f"did you mean {close[0]!r}?" if close else None
                raise GraftError("GC031", f"{self.model} takes no input {name!r}", hint=hint)
            if name == COUNT and isinstance(value, int | float) and not isinstance(value, bool):
                value = torch.tensor(value)
            if name == ENCODED and self._conventional and not isinstance(value, Tensor):
                value = _encoded(value)
            if isinstance(value, Tensor):
                present[name] = value
            elif value is None or isinstance(value, bool | int | float | str):
                if not self._says_nothing(name, value):
                    present[name] = value
            elif structures and isinstance(value, list | tuple | dict):
                present[name] = value
            else:
                message = f"input {name!r} is a {type(value).__name__}, not a tensor"
                hint = "a graph takes tensors, and flags that are bool, int, float or str"
                raise GraftError("GC031", message, hint=hint)
        if CACHE in present:
            present[USE_CACHE] = True
        if not self._conventional:
            return present, False
        wanted = named.get("return_dict")
        return present, self._plain if wanted is None else not wanted

    def _says_nothing(self, name: str, value: Any) -> bool:
        if name in self._ignored or (self._conventional and name == "return_dict"):
            return True
        if self._conventional and name == USE_CACHE:
            if value and self.cache is None:
                message = f"{self.model} keeps no cache: its forward takes none"
                raise GraftError("GC140", message, hint="leave use_cache out")
            return not value
        usual = self._defaults.get(name)
        usual = self._usual.get(name) if usual is None else usual
        return type(value) is type(usual) and bool(value == usual)


def _encoded(value: Any) -> Any:
    """Return the hidden state in an encoder's output or in a tuple; return any other value unchanged."""
    first = value[0] if isinstance(value, tuple | list) and value else getattr(value, "last_hidden_state", value)
    return first if isinstance(first, Tensor) else value


def _sizes_of_kernels(config: Any) -> frozenset[str]:
    """Return the keywords that only flash-attention kernels read; none if the model uses flash attention.

    They include the length of the longest text in a packed batch, which differs from batch to batch; each length
    would need its own graph.
    """
    from transformers.modeling_flash_attention_utils import FlashAttentionKwargs

    return frozenset() if "flash" in attention_of(config) else frozenset(FlashAttentionKwargs.__annotations__)


def _more_keywords(model: nn.Module, by_name: Mapping[str, inspect.Parameter]) -> set[str]:
    """Return the keywords that a transformers model accepts in addition to those that its ``forward`` declares.

    If ``forward`` declares ``**kwargs``, these are the keys of its typed dictionary, transformers' own keywords, and
    the optional parameters of the loss function, which also receives the keywords.
    """
    names = {"use_cache"}  # so that every model gives the same error, with a cache or without
    rest = next((p for p in by_name.values() if p.kind is inspect.Parameter.VAR_KEYWORD), None)
    if rest is None:
        return names
    from transformers.utils.generic import TransformersKwargs

    names |= {"return_dict", *TransformersKwargs.__annotations__}
    for described in typing.get_args(rest.annotation):
        names.update(getattr(described, "__annotations__", {}))
    loss = getattr(model, "loss_function", None) if "labels" in by_name else None
    if loss is not None:
        known = inspect.signature(loss).parameters.values()
        names.update(p.name for p in known if p.kind in _NAMED and p.default is not inspect.Parameter.empty)
    return names
