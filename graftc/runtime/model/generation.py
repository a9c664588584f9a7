"""Text generation with a compiled model: transformers' own loop, which runs graphs with a cache.

The loop runs on a *stand-in*: an object of the source model's class whose calls run the compiled model. Everything that
the class defines for generation therefore applies: input preparation, initial tokens, Whisper's segments.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from graftc.compat.caches import CACHES, under_own_name
from graftc.compiler.capture.interface import is_transformers
from graftc.compiler.capture.past import USE_CACHE, has_encoder
from graftc.compiler.partial_graphs import cannot_be_cached, require_rows_of_one
from graftc.compiler.resolve.train import TRAIN
from graftc.runtime.model.adapted import AdaptedRunner
from graftc.runtime.model.choices import held
from graftc.runtime.model.initial_cache import initial_cache
from graftc.runtime.model.live_view import live_view
from graftc.runtime.model.model_runner import ModelRunner
from graftc.runtime.model.root import Root
from graftc.runtime.model.stand_in import encoder_module, encoder_of, most_tokens, stand_in, stand_in_of
from graftc.specs.errors.diagnostics import GraftError

GENERATING = ("can_generate", "encoder_parameters", "generate", "get_encoder", "most_tokens", "require_generating")
"""The members of `Generating` that a model publishes."""

LOOKUP = "prompt_lookup_num_tokens"
_SHOWN = 3
"""The number of tokens generated to observe how a model calls its maps: with a prompt, then with a cache."""


class Generating:
    """Generation with a compiled or merged model.

    Args:
        runner: the Runner of the model.
    """

    def __init__(self, runner: ModelRunner) -> None:
        self.runner = runner

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate as transformers' ``generate`` does, with the same arguments and results.

        Greedy, sampled, beam, assisted and streamed generation are supported. The first call captures graphs with a
        cache, which are used for the prompt and every step.

        The ``assistant_model`` may also be a compiled model. Bank inputs (``adapter_ids``) choose one slot per row.

        Raises:
            GraftError: GC140 if the model has no cache of keys and values, or the call requests one that does not
                grow; GC141 for an adaptation that a cache cannot represent; GC142 for a model that cannot generate.
        """
        self.require_generating()
        compilation = self.runner.shown.compilation
        with held(compilation, {name: kwargs.pop(name) for name in compilation.controls if name in kwargs}) as chosen:
            return self._either_way(args, {**under_own_name(kwargs, self.runner.interface.cache), **chosen})

    def _either_way(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Generate by graphs of entire calls, or by the class's own loop if they cannot be used."""
        runner = self.runner if self.runner.live is not None or self._by_graphs() else self._live()
        if runner.live is not None:
            return self._by_layers(runner, args, kwargs)
        try:
            return self._generate(*args, **kwargs)
        except GraftError as error:
            chosen = any(kwargs.get(name) is not None for name in (*CACHES, "cache_implementation"))
            if error.code not in ("GC031", "GC140") or (error.code == "GC140" and chosen):
                raise
            try:  # the loop passes arguments or a cache that no graph accepts
                runner = live_view(self.runner)
            except GraftError:
                raise error from None
        return self._by_layers(runner, args, kwargs)

    def _by_layers(self, runner: ModelRunner, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Generate with the class's own loop, whose calls run layer graphs.

        If a layer is called with a cache that no graph accepts, such as a cache of states, graphs of single maps are
        used instead.
        """
        assert runner.live is not None
        random = torch.get_rng_state()
        try:
            return runner.live.generate(runner, *args, **kwargs)
        except GraftError as error:
            if error.code != "GC031" or self.runner.live is not None:
                raise
            tensors = {name: value for name, value in kwargs.items() if isinstance(value, Tensor)}
            few = {"min_new_tokens": _SHOWN, "max_new_tokens": _SHOWN, "do_sample": False}
            try:
                runner = live_view(self.runner, lambda model: cast(Any, model).generate(*args, **tensors, **few))
            except GraftError:
                raise error from None
        torch.set_rng_state(random)
        assert runner.live is not None
        return runner.live.generate(runner, *args, **kwargs)

    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate by running graphs that have a cache."""
        assistant, others = kwargs.get("assistant_model"), []
        if isinstance(assistant, Root) and isinstance(assistant._graftc, ModelRunner):
            assisting = Generating(assistant._graftc)
            others = [assisting._running({})]
            kwargs = {**kwargs, "assistant_model": others[0]}
        running = self._running(kwargs)
        try:
            return running.generate(*args, **kwargs)
        finally:
            for each in (running, *others):
                each.let_go()

    def _running(self, kwargs: Mapping[str, Any]) -> Any:
        """Return the object that runs the loop.

        Prefixes and virtual tokens become the cache's initial contents if possible.
        """
        runner = self.runner
        if not isinstance(runner, AdaptedRunner):
            return stand_in_of(runner)
        if runner.base_only:
            shown = runner.shown.compilation
            if not cannot_be_cached(shown):
                return stand_in_of(runner)
            every = (*shown.spec.owners, *([TRAIN] if shown.spec.train else []))
            return stand_in(runner.beside(every), runner.compilation.model)
        config = kwargs.get("generation_config")
        # Assisted generation computes the sizes of its masks from the text's tokens alone.
        ruled_out = any(kwargs.get(name) is not None for name in ("assistant_model", LOOKUP))
        ruled_out = ruled_out or getattr(config, LOOKUP, None) is not None
        ruled_out = ruled_out or False in (kwargs.get(USE_CACHE), getattr(config, USE_CACHE, None))
        if ruled_out or (initial := initial_cache(runner)) is None:
            return stand_in_of(runner)
        instance = stand_in(runner.beside(initial.names), runner.compilation.model)
        vars(instance).update(_graftc_initial=initial, _graftc_whole=runner)
        return instance

    def _by_graphs(self) -> bool:
        """Return whether the model can generate with graphs of entire calls that use a cache."""
        return self.runner.interface.cache is not None and self.runner.keeps_cache()

    def _live(self) -> ModelRunner:
        """Return the Runner that generates if graphs of entire calls cannot.

        Raises:
            GraftError: GC140 if that Runner cannot be created either.
        """
        compilation = self.runner.shown.compilation
        try:
            return live_view(self.runner)
        except GraftError as error:
            if self.runner.interface.cache is not None:
                _ = compilation.cache_layout  # raises an error that gives the reason
            message = f"{type(compilation.source).__name__} has no cache of keys and values: its forward accepts none"
            raise GraftError("GC140", message, hint="call it without a cache: use_cache=False") from error

    def require_generating(self) -> None:
        """Check that the model can generate.

        Raises:
            GraftError: GC142 if it cannot, GC141 for adaptations that return each row several times.
        """
        if not self.can_generate():
            name = type(self.runner.compilation.model).__name__
            raise GraftError("GC142", f"{name} does not generate", hint="compile a model with a language model head")
        require_rows_of_one(self.runner.shown.compilation)

    def get_encoder(self) -> nn.Module:
        """Return the encoder of an encoder-decoder model; calling it returns the adapted model's ``encoder_outputs``.

        Raises:
            GraftError: GC142 if the model has no encoder.
        """
        model: Any = self.runner.compilation.model
        if not has_encoder(model):
            raise GraftError("GC142", f"{type(model).__name__} is not an encoder-decoder model", hint="call the model")
        return encoder_module(self.runner, model.get_encoder())

    @property
    def encoder_parameters(self) -> tuple[str, ...]:
        """The parameter names of the encoder's ``forward``."""
        return encoder_of(self.runner).parameters

    def can_generate(self) -> bool:
        """Return whether the source model's class can generate text."""
        model: Any = self.runner.compilation.model
        can = is_transformers(model) and callable(getattr(model, "can_generate", None)) and model.can_generate()
        return bool(can)

    @property
    def most_tokens(self) -> int | None:
        """The maximum number of tokens for which the model has positions; None if it is unlimited."""
        return most_tokens(self.runner)


def loop_attribute(runner: ModelRunner, name: str) -> Any:
    """Return an attribute that transformers' loop reads from an assistant model, as the source's class defines it.

    Raises:
        AttributeError: for an attribute that the loop does not read.
    """
    loop = getattr(sys.modules.get("transformers.generation.utils"), "GenerationMixin", None)
    if not name.startswith("__") and hasattr(loop, name) and Generating(runner).can_generate():
        return getattr(stand_in_of(runner), name)
    raise AttributeError(f"{type(runner).__name__!r} object has no attribute {name!r}", name=name, obj=runner)
