"""The object on which transformers' generation loop runs: it is of the source model's class and calls a Runner."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from operator import attrgetter
from typing import Any, cast

from torch import Tensor, nn

from graftc.compat.caches import cache_name
from graftc.compat.hooks import without_hooks
from graftc.compat.transformers import GROWING, LOOP_ARGUMENTS, given_by_caller, loop_steps
from graftc.compiler.capture.fixed_cache import capacity_of
from graftc.compiler.capture.interface import Interface
from graftc.compiler.capture.past import (
    ENCODER,
    MASK,
    POSITIONS,
    has_encoder,
    new_cache,
)
from graftc.compiler.capture.signature import SEQUENCE, TARGET
from graftc.compiler.positions import require_positions
from graftc.runtime.invocations import starts_in_prompt
from graftc.runtime.model.choices import rows_for, with_choices
from graftc.runtime.model.initial_cache import is_fronted, taken_away
from graftc.runtime.model.model_runner import ModelRunner
from graftc.runtime.model.past import filled_up
from graftc.specs.errors.diagnostics import GraftError

KEPT = "logits_to_keep"
_FIXED = "static"
_LONGEST = "longest fixed cache"
_PADDING = "_graftc_padding"
"""The attribute of a loop's own generation config that stores the amount of padding in the least padded row."""


def _called(runner: ModelRunner, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return the outputs of a call from the loop.

    The call goes through the module, so that its hooks run, unless the module has another Runner.
    """
    own: Any = runner.module._graftc
    if own is runner:
        return runner.module(*args, **kwargs)
    return runner.within(lambda: runner.call(args, kwargs))


def encode(runner: ModelRunner, kwargs: dict[str, Any]) -> Any:
    """Return the outputs of the model's encoder for a call, in the encoder's own output class.

    Arguments for other parts of the model are ignored, as they are by the encoder's own ``**kwargs``.
    """
    encoder, shown = encoder_of(runner), runner.shown.compilation
    taken = (*encoder.parameters, "return_dict")
    chosen = {name: kwargs[name] for name in shown.controls if name in kwargs}
    usual = {name: value for name, value in kwargs.items() if name in taken or name.startswith("output_")}
    present, plain = encoder.read(usual)
    every = with_choices(shown, {**present, ENCODER: True}, chosen)
    return runner.within(lambda: runner.run_part(every, plain))


def encoder_of(runner: ModelRunner) -> Interface:
    return runner.once("encoder", lambda: Interface(cast(Any, runner.compilation.model).get_encoder()))


def most_tokens(runner: ModelRunner) -> int | None:
    """Return the maximum number of tokens for which a model has positions; None if it is unlimited."""
    text = TARGET if has_encoder(runner.compilation.model) else SEQUENCE
    tables = runner.position_tables(runner.shown.compilation.key("eval"))
    return min((table.most for table in tables if table.axis == text), default=None)


def stand_in_of(runner: ModelRunner) -> Any:
    """Return the stand-in for a Runner.

    The stand-in for the module's own Runner is cached; other Runners of the module get a new one, since each of them
    leaves out different adaptations.
    """
    known = runner.derived.get("stand-in")
    if known is None or known._graftc_runner is not runner:
        known = stand_in(runner, runner.compilation.model)
        if runner.module._graftc is runner:
            runner.derived["stand-in"] = known
    return known


def stand_in(runner: ModelRunner, source: nn.Module) -> Any:
    """Return an object of a model's class that generates by calling a Runner.

    Args:
        runner: the Runner to call.
        source: the model; the stand-in has its modules and all its other attributes.
    """
    own = {
        "__doc__": type(source).__doc__,
        "__module__": type(source).__module__,
        "forward": _forward(runner, source),
        "generation_config": property(attrgetter("_graftc_runner.module.generation_config")),
    }
    of_runner = ("config", "device", "dtype", "training")
    own |= {name: property(attrgetter(f"_graftc_runner.{name}")) for name in of_runner}
    cls: Any = type(type(source).__name__, (_StandIn, type(source)), own)
    instance = cls.__new__(cls)
    attributes = {
        name: value for name, value in vars(source).items() if name not in ("forward", "config", "generation_config")
    }
    vars(instance).update(attributes)
    vars(instance).update(without_hooks(attributes))
    vars(instance)["_graftc_runner"] = runner
    return instance


def _forward(runner: ModelRunner, source: nn.Module) -> Callable[..., Any]:
    """Return a ``forward`` that calls a Runner and has the source's parameters plus the bank inputs."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        runner = self._graftc_runner
        kwargs = {name: value for name, value in kwargs.items() if name not in LOOP_ARGUMENTS}
        if self._graftc_initial is not None:
            if any(map(is_fronted, kwargs.values())):
                kwargs = self._graftc_initial.call(kwargs)
            else:  # a call outside the loop, such as one for guidance: no cache has the initial contents
                runner = self._graftc_whole or runner
        capacity = next((size for value in kwargs.values() if (size := capacity_of(value)) is not None), None)
        name = f"decoder_{MASK}" if has_encoder(source) else MASK
        if capacity is not None and isinstance(mask := kwargs.get(name), Tensor) and mask.dim() == 2:
            kwargs[name] = filled_up(mask, capacity)  # of the same size in every step
        positions, ids = kwargs.get(POSITIONS), kwargs.get("input_ids")
        if isinstance(positions, Tensor) and isinstance(ids, Tensor) and positions.shape[:1] == (1,) != ids.shape[:1]:
            kwargs[POSITIONS] = positions.expand(ids.shape[0], -1)  # so that all batches share a graph
        count = kwargs.get(KEPT)
        if isinstance(count, int) and count > 1:  # each value would need its own graph
            outputs = _called(runner, args, {**kwargs, KEPT: 0})
            outputs["logits"] = outputs.logits[:, -count:]
            return outputs
        return _called(runner, args, kwargs)

    own = inspect.signature(type(source).forward)
    chosen = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None)
        for name in runner.shown.compilation.controls
        if name not in own.parameters
    ]
    listed = [*own.parameters.values()]
    rest = [p for p in listed if p.kind is inspect.Parameter.VAR_KEYWORD]
    forward.__signature__ = own.replace(parameters=[*(p for p in listed if p not in rest), *chosen, *rest])  # type: ignore[attr-defined]
    return forward


def _expanded(
    instance: _StandIn,
    expand: Callable[..., Any],
    expand_size: int = 1,
    is_encoder_decoder: bool = False,
    input_ids: Any = None,
    **model_kwargs: Any,
) -> Any:
    """Expand the inputs, the choices among adaptations and where they act: each row may become several rows."""
    compilation = instance._graftc_runner.shown.compilation
    choices = {name: model_kwargs.pop(name) for name in compilation.controls if name in model_kwargs}
    prompt = input_ids if input_ids is not None else model_kwargs.get("inputs_embeds")
    if prompt is not None:
        choices = rows_for(compilation, choices, int(prompt.shape[0]), prompt.device)
        choices = {**starts_in_prompt(compilation, prompt), **choices}
    return expand(expand_size, is_encoder_decoder, input_ids, **model_kwargs, **choices)


def _ending(
    instance: _StandIn, criteria_of: Callable[..., Any], generation_config: Any, *args: Any, **kwargs: Any
) -> Any:
    """Return the model's own stopping criteria, after checking that there are enough positions."""
    criteria = criteria_of(generation_config, *args, **kwargs)
    longest = generation_config.max_length if len(criteria) == 1 else generation_config.min_length
    most = most_tokens(instance._graftc_runner)
    if most is not None and longest is not None:  # the last token is never an input
        initial = (
            instance._graftc_initial.length
            if instance._graftc_initial is not None and instance._graftc_initial.shifted
            else 0
        )
        require_positions(int(longest) - 1 - getattr(generation_config, _PADDING, 0), most - initial)
    return criteria


def _cached(
    instance: Any,
    prepare: Callable[..., Any],
    generation_config: Any,
    model_kwargs: dict[str, Any],
    generation_mode: Any,
    batch_size: int,
    max_cache_length: Any = None,
) -> None:
    """Create a cache whose layers store all tokens, unless the caller passed one, and prepend the initial contents."""
    kind = generation_config.cache_implementation
    if kind not in (*GROWING, _FIXED):
        message = f"a compiled model's graphs do not support the cache implementation {kind!r}"
        raise GraftError("GC140", message, hint="use 'static', or leave cache_implementation out: the cache grows then")
    name = cache_name(inspect.signature(instance.forward).parameters)
    callers_cache = model_kwargs.get(name) if name is not None else None
    mask = model_kwargs.get(MASK)
    if mask is not None and not has_encoder(instance):
        setattr(generation_config, _PADDING, int((mask == 0).sum(-1).min()))
    if callers_cache is not None:
        given_by_caller(callers_cache)
    elif generation_config.use_cache is not False and name is not None:
        model_kwargs[name] = _new_cache(instance, generation_config, max_cache_length)
    cache = model_kwargs.get(name) if name is not None else None
    if cache is None:
        vars(instance).update(_graftc_initial=None, _graftc_runner=instance._graftc_whole or instance._graftc_runner)
    elif instance._graftc_initial is not None:
        rows = batch_size * max(generation_config.num_beams, generation_config.num_return_sequences)
        instance._graftc_initial.put_in_front(cache, rows)
        vars(instance)["_graftc_cache"] = cache


def _new_cache(instance: Any, generation_config: Any, length: Any) -> Any:
    """Return the empty cache that a generation config requests.

    Args:
        instance: the stand-in.
        generation_config: the config.
        length: the number of tokens for which a cache of fixed length has room. One that an earlier call used is not
            undercut, so that code compiled for it is used again.
    """
    if generation_config.cache_implementation != _FIXED:
        return new_cache(has_encoder(instance))
    runner = instance._graftc_runner
    length = int(length) + (generation_config.prompt_lookup_num_tokens or 0)  # candidates may go beyond the last token
    length = max(length, generation_config.max_cache_len or 0, runner.derived.get(_LONGEST, 0))
    runner.derived[_LONGEST] = length
    front = 0 if instance._graftc_initial is None else instance._graftc_initial.length
    return new_cache(has_encoder(instance), runner.shown.compilation.cache_layout, length + front)


def _candidates(
    instance: _StandIn,
    propose: Callable[..., Any],
    *,
    model_kwargs: dict[str, Any],
    assistant_model: Any = None,
    **kwargs: Any,
) -> Any:
    """Return what proposes tokens; an assistant gets only those choices among adaptations that it has as well."""
    if assistant_model is not None:
        taken = inspect.signature(assistant_model.forward).parameters
        missing = instance._graftc_runner.shown.compilation.controls.keys() - taken.keys()
        model_kwargs = {name: value for name, value in model_kwargs.items() if name not in missing}
    return propose(model_kwargs=model_kwargs, assistant_model=assistant_model, **kwargs)


@loop_steps(rows=_expanded, criteria=_ending, compiles=lambda *_, **__: False, cache=_cached, candidates=_candidates)
class _StandIn:
    """The base class through which a stand-in delegates generation to a Runner."""

    _graftc_runner: Any
    _graftc_whole: Any = None
    """The Runner whose graphs themselves compute the adaptations that the initial contents represent."""
    _graftc_initial: Any = None
    _graftc_cache: Any = None

    def create_masks_for_generate(self, attention_mask: Any = None, **kwargs: Any) -> Any:
        """Return the mask of the tokens: graphs compute masks of pairs for caches of fixed length themselves."""
        return attention_mask

    def get_encoder(self, *args: Any, **kwargs: Any) -> Any:
        """Return the encoder, whose calls run the Runner's graphs."""
        return _Encoder(self._graftc_runner, super().get_encoder(*args, **kwargs))  # type: ignore[misc]

    def let_go(self) -> None:
        """Remove the initial contents from the cache after the loop, so that it contains only the text."""
        if self._graftc_cache is not None:
            taken_away(self._graftc_cache)


class _Encoder(nn.Module):
    """A model's encoder with the interface that the loop expects."""

    def __init__(self, runner: Any, encoder: nn.Module) -> None:
        super().__init__()
        self._runner = runner
        self.main_input_name = getattr(encoder, "main_input_name", None)
        self.config = getattr(encoder, "config", None)
        signature = inspect.signature(type(encoder).forward)
        own = [p for p in signature.parameters.values() if p.name != "self"]

        def forward(**kwargs: Any) -> Any:
            return encode(runner, kwargs)

        forward.__signature__ = signature.replace(parameters=own)  # type: ignore[attr-defined]
        self.forward = forward


def encoder_module(runner: ModelRunner, encoder: nn.Module) -> nn.Module:
    """Return a module whose calls run a Runner's graphs of an encoder.

    Args:
        runner: the Runner.
        encoder: the source model's encoder, with whose parameters the module is called.
    """
    return _Encoder(runner, encoder)
