"""Models that generate text from graphs in ONNX Runtime, through transformers' own loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from transformers.generation.utils import GenerationMixin
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutputWithPast, Seq2SeqLMOutput

from graftc.compat.transformers import GROWING, LOOP_ARGUMENTS, loop_steps, takes_tokens_back
from graftc.runtime.onnx_generation import caches
from graftc.runtime.onnx_generation.adapter_files import tensors_for
from graftc.runtime.onnx_generation.graphs import OnnxGraph
from graftc.specs.errors.diagnostics import GraftError

_CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
"""The name of the cache in calls and outputs in this release of transformers."""

_IMPLEMENTATIONS = (*GROWING, "hybrid")


def table_of(config: Any) -> int | None:
    """Return the size of the model's position table; None if positions are computed or relative."""
    config = config.get_text_config(decoder=True)
    if getattr(config, "rope_parameters", None) is not None or getattr(config, "alibi", False):
        return None
    size = getattr(config, "max_position_embeddings", None) or getattr(config, "max_target_positions", None)
    return size if isinstance(size, int) and size > 0 else None


def _growing(model: OnnxModel, prepare: Callable[..., Any], generation_config: Any, *args: Any, **kwargs: Any) -> Any:
    """Prepare a cache, and refuse kinds that the graphs do not support."""
    kind = generation_config.cache_implementation
    if kind not in _IMPLEMENTATIONS:
        hint = "leave out cache_implementation: the graphs take a dynamic cache"
        raise GraftError("GC140", f"graphs in ONNX Runtime do not support a {kind} cache", hint=hint)
    return prepare(generation_config, *args, **kwargs)


@takes_tokens_back
@loop_steps(cache=_growing)
class OnnxModel(GenerationMixin):
    """The base class of both kinds of model.

    `generate` is `transformers.GenerationMixin.generate`, with everything that it supports: greedy search, sampling,
    beam search, assisted generation, left padding, streamers and stopping criteria.

    Attributes:
        config: the source model's config.
        generation_config: the source model's generation defaults.
        decoder_graph: the graph that runs a step.
    """

    main_input_name = "input_ids"
    base_model_prefix = "model"
    input_modalities = ("text",)
    _seq2seq = False

    def __init__(self, config: Any, generation_config: Any, graph: OnnxGraph) -> None:
        self.config, self.generation_config, self.decoder_graph = config, generation_config, graph
        self._table = table_of(config)
        self._require(graph, "logits", past=True)

    def _require(self, graph: OnnxGraph, output: str, *, past: bool) -> None:
        """Check that a graph has an output and, with ``past``, that it returns the whole cache that it takes.

        Raises:
            GraftError: GC144 if the output is missing or the cache is incomplete.
        """
        name = graph.path.name
        if output not in graph.outputs:
            raise GraftError("GC144", f"{name} has no output {output}; it has {', '.join(graph.outputs)}")
        if not past:
            return
        own = [slot for slot in graph.past if slot.attention == "self"]
        if not own:
            hint = "export the graphs for generation; an encoder, or a graph without a cache, has no decode step"
            raise GraftError("GC144", f"{name} does not take the keys and values of earlier tokens", hint=hint)
        lost = [graph.past[slot] for slot in own if slot not in graph.present]
        layers = {slot.layer for slot in own}
        if lost or layers != set(range(len(layers))) or len(own) != 2 * len(layers):
            shown = f"it does not return {lost[0]}" if lost else "layers are missing"
            raise GraftError("GC144", f"the cache of {name} is incomplete: {shown}")

    @property
    def device(self) -> torch.device:
        """The device on which the graphs run."""
        return self.decoder_graph.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of keys and values."""
        return self.decoder_graph.dtype(next(iter(self.decoder_graph.past)))

    @property
    def graphs(self) -> tuple[OnnxGraph, ...]:
        """Every graph of the model."""
        return (self.decoder_graph,)

    def use(self, *files: str | Path) -> Self:
        """Use the adapters in some files in all later calls, instead of those used so far.

        Args:
            *files: files for this model's graphs: ``.onnx_adapter`` or safetensors. Adaptations that are in none of
                them have the graphs' defaults; without files, the model is the exported base.

        Returns:
            The model itself.

        Raises:
            GraftError: GC144 for a file that cannot be read, GC192 for one that was written for another base, and for
                tensors that do not fit the graphs, are missing, or have values that are not finite; the adapters used
                so far then remain.
        """
        tensors = tensors_for(self.graphs, files)
        for graph in self.graphs:
            graph.adapter = {name: tensor for name, tensor in tensors.items() if name in graph.adapted}
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.forward(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run one call; implemented by subclasses."""
        raise NotImplementedError

    def can_generate(self) -> bool:
        """Return True, for pipelines."""
        return True

    def is_remote_code(self) -> bool:
        """Return False, since the files contain no code."""
        return False

    def get_experts_implementation(self) -> dict[str, str]:
        """Return an empty dictionary, since no implementation can be chosen."""
        return {}

    def eval(self) -> Self:
        """Return the model, which has only this mode."""
        return self

    def to(self, device: Any = None) -> Self:
        """Return the model if it is already on the device.

        Raises:
            GraftError: GC073 for another device, or a dtype.
        """
        if isinstance(device, torch.dtype):
            hint = "cast the model before it is exported"
            raise GraftError(
                "GC073", f"graphs keep the dtype of their files, and cannot be cast to {device}", hint=hint
            )
        wanted = torch.device(device) if device is not None else self.device
        if wanted.type != self.device.type or (wanted.index or 0) != (self.device.index or 0):
            hint = (
                "choose it when loading: load(folder, providers=['CUDAExecutionProvider']); pipelines take device='cpu'"
            )
            raise GraftError("GC073", f"the graphs run on {self.device}, not on {wanted}", hint=hint)
        return self

    def _cache(self, given: Mapping[str, Any]) -> Any:
        """Return the cache to read and write."""
        cache = next((given[name] for name in ("cache", "past_key_values") if given.get(name) is not None), None)
        return caches.empty(seq2seq=self._seq2seq) if cache is None else cache

    def _refuse(self, given: Mapping[str, Any]) -> None:
        """Check that arguments that the graphs do not support are None or False."""
        taken = ("cache", "past_key_values", "return_dict", *LOOP_ARGUMENTS)
        unread = [n for n, value in given.items() if n not in taken and value is not None and value is not False]
        if given.get("return_dict") is False:
            unread.append("return_dict=False")
        if unread:
            raise GraftError("GC145", f"the graphs do not support {', '.join(sorted(unread))}")

    def _within(self, total: int, mask: Tensor | None, positions: Tensor | None) -> None:
        """Check positions against the model's table; tensors are read only if there are more tokens than positions.

        Raises:
            GraftError: GC143 for a position beyond the table.
        """
        if self._table is None or total <= self._table:
            return
        if positions is not None:
            total = int(positions.max()) + 1
        elif mask is not None:
            total = int(mask.sum(-1).max())
        if total > self._table:
            raise GraftError(
                "GC143", f"token {total} of a row has no position: the model has positions for {self._table} tokens"
            )

    def _run(
        self, graph: OnnxGraph, given: dict[str, Tensor], cache: Any, use_cache: bool | None, logits_to_keep: int
    ) -> dict[str, Any]:
        """Run a step, and return the logits of the last tokens and the cache, by output name.

        Tokens are checked first, since ONNX counts negative ids from the end of the table.

        Raises:
            GraftError: GC145 for a token that is not in the vocabulary, or if the graph does not compute the logits.
        """
        if not isinstance(logits_to_keep, int):
            raise GraftError("GC145", "logits_to_keep is not a number of last tokens", hint="index the logits instead")
        size, tokens = getattr(self.config.get_text_config(), "vocab_size", None), given["input_ids"]
        if isinstance(size, int) and tokens.numel() and not tokens.is_floating_point():
            low, high = int(tokens.min()), int(tokens.max())
            if low < 0 or high >= size:
                message = f"token {low if low < 0 else high} is not in the vocabulary of {size}"
                raise GraftError("GC145", message, hint="use ids from the model's own tokenizer")
        if logits_to_keep != 1 and tokens.shape[1] > 1 and graph.last_logits:
            message = f"{graph.path.name} computes the logits of each row's last token only, and the call reads others"
            raise GraftError("GC145", message, hint="pass logits_to_keep=1, or export with the option logits='all'")
        outputs = graph(given)
        logits = outputs["logits"]
        fields = {"logits": logits[:, -logits_to_keep:] if logits_to_keep else logits}
        if use_cache is False:
            return fields
        caches.write(graph, cache, outputs, seq2seq=self._seq2seq)
        return {**fields, _CACHE: cache}


def _require_tokens(tokens: Tensor | None, name: str) -> Tensor:
    if tokens is None or tokens.dim() != 2 or not tokens.numel():
        shown = "missing" if tokens is None else f"{list(tokens.shape)}"
        raise GraftError("GC145", f"{name} is {shown}", hint="pass [batch, tokens], with at least one token")
    return tokens


def _mask(mask: Tensor | None, batch: int, length: int, like: Tensor, name: str) -> Tensor:
    """Check and return the mask over all tokens; by default, it is all ones."""
    if mask is None:
        return torch.ones((batch, length), dtype=torch.int64, device=like.device)
    if tuple(mask.shape) != (batch, length):
        hint = f"pass one value for each token, including those in the cache: [{batch}, {length}]"
        raise GraftError("GC145", f"{name} is {list(mask.shape)}", hint=hint)
    return mask


class OnnxCausalLM(OnnxModel):
    """A decoder with a single graph for both the prompt and all later tokens."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Compute the logits for new tokens.

        Args:
            input_ids: int64 ``[batch, tokens]``, the tokens that are not yet in the cache.
            attention_mask: ``[batch, cached + tokens]``, 0 at padding; by default all ones.
            position_ids: int64 ``[batch, tokens]``; by default they continue from the cache.
            token_type_ids: token types, for graphs that take them.
            use_cache: if False, no cache is returned.
            logits_to_keep: the number of last tokens whose logits are returned; 0 for all.
            **kwargs: ``cache`` (formerly ``past_key_values``): a `DynamicCache`, which is written in place.

        Returns:
            ``logits`` ``[batch, tokens, vocabulary]``, and the cache.

        Raises:
            GraftError: GC140 for another model's cache, GC145 for invalid inputs, GC143 for positions beyond the
                model's table.
        """
        self._refuse(kwargs)
        input_ids = _require_tokens(input_ids, "input_ids")
        graph, (batch, tokens) = self.decoder_graph, input_ids.shape
        cache = self._cache(kwargs)
        past = caches.read(graph, cache, batch, seq2seq=False)
        start = caches.length_of(cache, seq2seq=False)
        self._within(start + tokens, attention_mask, position_ids)
        given = {**past, "input_ids": input_ids}
        if "attention_mask" in graph.inputs:
            given["attention_mask"] = _mask(attention_mask, batch, start + tokens, input_ids, "attention_mask")
        elif attention_mask is not None and not bool(attention_mask.all()):
            raise GraftError("GC145", f"{graph.path.name} takes no attention_mask", hint="pass rows without padding")
        if "position_ids" in graph.inputs:
            if position_ids is None:
                position_ids = torch.arange(start, start + tokens, device=input_ids.device).unsqueeze(0)
            elif tuple(position_ids.shape) not in ((batch, tokens), (1, tokens)):
                raise GraftError(
                    "GC145", f"position_ids is {list(position_ids.shape)}", hint=f"pass [{batch}, {tokens}]"
                )
            given["position_ids"] = position_ids.expand(batch, -1)
        if token_type_ids is not None:
            given["token_type_ids"] = token_type_ids
        return CausalLMOutputWithPast(**self._run(graph, given, cache, use_cache, logits_to_keep))


class Encoder:
    """The encoder, in the form in which transformers' loop calls it."""

    def __init__(self, graph: OnnxGraph) -> None:
        self.graph = graph
        inputs = [name for name in graph.inputs if not name.endswith("attention_mask")]
        self.main_input_name = inputs[0] if inputs else "input_ids"

    def __call__(self, *args: Any, **kwargs: Any) -> BaseModelOutput:
        return self.forward(*args, **kwargs)

    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> BaseModelOutput:
        """Compute the encoder's last states ``[batch, tokens, width]``."""
        tokens = input_ids if input_ids is not None else kwargs.get(self.main_input_name)
        if tokens is None:
            raise GraftError("GC145", f"{self.main_input_name} is missing")
        batch, length = tokens.shape[0], tokens.shape[-1]
        given = {self.main_input_name: tokens}
        if "attention_mask" in self.graph.inputs:
            given["attention_mask"] = _mask(attention_mask, batch, length, tokens, "attention_mask")
        return BaseModelOutput(last_hidden_state=self.graph(given)["last_hidden_state"])


class OnnxSeq2SeqLM(OnnxModel):
    """An encoder and a decoder.

    The first decoder call computes the keys and values of the encoder's states; later calls take them from the cache.
    """

    _seq2seq = True

    def __init__(
        self, config: Any, generation_config: Any, encoder: OnnxGraph, first: OnnxGraph, later: OnnxGraph
    ) -> None:
        super().__init__(config, generation_config, later)
        self._require(encoder, "last_hidden_state", past=False)
        self._require(first, "logits", past=False)
        lost = sorted(later.past[slot] for slot in later.past if slot not in first.present)
        if lost:
            raise GraftError("GC144", f"{first.path.name} does not return what {later.path.name} takes as {lost[0]}")
        self.encoder, self.first_graph = Encoder(encoder), first
        self.main_input_name = self.encoder.main_input_name

    @property
    def graphs(self) -> tuple[OnnxGraph, ...]:
        """Every graph of the model."""
        return (self.encoder.graph, self.first_graph, self.decoder_graph)

    def get_encoder(self, modality: str | None = None) -> Encoder:
        """Return the encoder."""
        return self.encoder

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        encoder_outputs: Any = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        **kwargs: Any,
    ) -> Seq2SeqLMOutput:
        """Compute the logits for new decoder tokens.

        Args:
            input_ids: the encoder's tokens, int64 ``[batch, tokens]``; not needed with ``encoder_outputs``.
            attention_mask: the encoder's mask, ``[batch, tokens]``, 0 at padding; by default all ones.
            decoder_input_ids: int64 ``[batch, new]``, the tokens that are not yet in the cache.
            decoder_attention_mask: ``[batch, cached + new]``, for graphs that take it; other graphs accept only a mask
                of all ones.
            encoder_outputs: the encoder's outputs.
            use_cache: if False, no cache is returned.
            logits_to_keep: the number of last tokens whose logits are returned; 0 for all.
            **kwargs: ``cache`` (formerly ``past_key_values``): an `EncoderDecoderCache`, which is written in place.

        Returns:
            ``logits`` ``[batch, new, vocabulary]``, the cache, and the encoder's states.

        Raises:
            GraftError: as for `OnnxCausalLM.forward`.
        """
        own = {name: kwargs.pop(name) for name in (self.main_input_name,) if name in kwargs}
        self._refuse(kwargs)
        decoder_input_ids = _require_tokens(decoder_input_ids, "decoder_input_ids")
        if encoder_outputs is None:
            encoder_outputs = self.encoder(input_ids, attention_mask, **own)
        states, (batch, new) = encoder_outputs[0], decoder_input_ids.shape
        cache = self._cache(kwargs)
        graph = self.decoder_graph if caches.cross_is_there(cache) else self.first_graph
        past = caches.read(graph, cache, batch, seq2seq=True)
        start = caches.length_of(cache, seq2seq=True)
        if start and graph is self.first_graph:
            raise GraftError("GC140", "the cache contains decoder tokens, but nothing from the encoder")
        self._within(start + new, decoder_attention_mask, None)
        given = {**past, "input_ids": decoder_input_ids, "encoder_hidden_states": states}
        if "encoder_attention_mask" in graph.inputs:
            given["encoder_attention_mask"] = _mask(attention_mask, batch, states.shape[1], states, "attention_mask")
        if "decoder_attention_mask" in graph.inputs:
            given["decoder_attention_mask"] = _mask(
                decoder_attention_mask, batch, start + new, decoder_input_ids, "decoder_attention_mask"
            )
        elif decoder_attention_mask is not None and not bool(decoder_attention_mask.all()):
            raise GraftError("GC145", f"{graph.path.name} takes no decoder_attention_mask")
        outputs = self._run(graph, given, cache, use_cache, logits_to_keep)
        return Seq2SeqLMOutput(encoder_last_hidden_state=states, **outputs)
