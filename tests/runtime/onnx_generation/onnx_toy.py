"""A hand-written decoder of a dozen ONNX operators, and the same computation in torch without a cache.

A token adds its vector to the sum of the vectors before it that are not padding; the logits are a map of that sum and
of the position's vector.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from graftc.specs.errors.diagnostics import GraftError

VOCABULARY, WIDTH, POSITIONS = 23, 6, 24
_F, _I = TensorProto.FLOAT, TensorProto.INT64

PROMPTS = torch.tensor([[0, 0, 5, 6], [3, 4, 5, 6], [0, 9, 9, 3]])
MASK = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [0, 1, 1, 1]])
TOKENS = 12


def tables() -> tuple[Tensor, Tensor, Tensor]:
    """Return the vectors of tokens and of positions, and the head."""
    generator = torch.Generator().manual_seed(5)
    sizes = ((VOCABULARY, WIDTH), (POSITIONS, WIDTH), (WIDTH, VOCABULARY))
    tokens, positions, head = (torch.randn(size, generator=generator) for size in sizes)
    return tokens, positions, head


def logits(ids: Tensor, mask: Tensor) -> Tensor:
    """Compute the logits of every token of whole rows, ``[batch, tokens, vocabulary]``."""
    tokens, positions, head = tables()
    sums = (tokens[ids] * mask[..., None]).cumsum(1)
    places = (mask.cumsum(-1) - 1).clamp(min=0)
    return torch.tanh(sums + positions[places]) @ head


def greedy(ids: Tensor, mask: Tensor, new: int) -> Tensor:
    """Extend the prompts by `new` tokens, each computed from whole rows."""
    for _ in range(new):
        ids = torch.cat([ids, logits(ids, mask)[:, -1:].argmax(-1)], 1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
    return ids


def model(*, cached: bool = True) -> onnx.ModelProto:
    """Build the graph with Optimum's names: one layer with one head, whose values are half of its keys."""
    node = helper.make_node
    nodes = [
        node("Gather", ["tokens", "input_ids"], ["embedded"]),
        node("Unsqueeze", ["embedded", "one"], ["key"]),
        node("Mul", ["key", "half"], ["value"]),
        node("Concat", ["past_key_values.0.key", "key"], ["present.0.key"], axis=2),
        node("Concat", ["past_key_values.0.value", "value"], ["present.0.value"], axis=2),
        node("Cast", ["attention_mask"], ["mask"], to=_F),
        node("Unsqueeze", ["mask", "ends"], ["mask4"]),
        node("Add", ["present.0.value", "present.0.value"], ["whole"]),
        node("Mul", ["whole", "mask4"], ["read"]),
        node("CumSum", ["read", "two"], ["sums"]),
        node("Shape", ["input_ids"], ["new"], start=1, end=2),
        node("Neg", ["new"], ["from"]),
        node("Slice", ["sums", "from", "far", "two"], ["last"]),
        node("Squeeze", ["last", "one"], ["state"]),
        node("Gather", ["positions", "position_ids"], ["place"]),
        node("Add", ["state", "place"], ["both"]),
        node("Tanh", ["both"], ["bounded"]),
        node("MatMul", ["bounded", "head"], ["logits"]),
    ]
    constants: dict[str, Any] = dict(zip(("tokens", "positions", "head"), (t.numpy() for t in tables()), strict=True))
    constants |= {"one": [1], "ends": [1, 3], "two": [2], "far": [2**40]}
    stored = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    stored.append(numpy_helper.from_array(np.float32([0.5]), "half"))
    value = helper.make_tensor_value_info
    inputs = [
        value("input_ids", _I, ["batch", "tokens"]),
        value("attention_mask", _I, ["batch", "total"]),
        value("position_ids", _I, ["batch", "tokens"]),
        value("past_key_values.0.key", _F, ["batch", 1, "past", WIDTH]),
        value("past_key_values.0.value", _F, ["batch", 1, "past", WIDTH]),
    ]
    outputs = [value("logits", _F, ["batch", "tokens", VOCABULARY])]
    presents = [value(f"present.0.{part}", _F, ["batch", 1, "total", WIDTH]) for part in ("key", "value")]
    graph = helper.make_graph(nodes, "toy", inputs, [*outputs, *presents] if cached else outputs, stored)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def seq2seq_logits(ids: Tensor, mask: Tensor, given: Tensor) -> Tensor:
    """Compute the logits of every token of a decoder, which adds the sums of its tokens to the encoder's sum."""
    tokens, _, head = tables()
    read = (tokens[ids] * mask[..., None]).sum(1, keepdim=True)
    return torch.tanh(tokens[given].cumsum(1) + read) @ head


def seq2seq_greedy(ids: Tensor, mask: Tensor, given: Tensor, new: int) -> Tensor:
    """Extend the decoder's tokens by `new` tokens, each computed from whole rows."""
    for _ in range(new):
        given = torch.cat([given, seq2seq_logits(ids, mask, given)[:, -1:].argmax(-1)], 1)
    return given


def seq2seq() -> dict[str, onnx.ModelProto]:
    """Build the three graphs of an encoder and a decoder, by file name."""
    node, value = helper.make_node, helper.make_tensor_value_info
    tokens, _, head = tables()
    constants = {"tokens": tokens.numpy(), "head": head.numpy(), "one": np.asarray([1]), "ends": np.asarray([2])}
    constants |= {"far": np.asarray([2**40]), "half": np.float32([0.5])}
    stored = [numpy_helper.from_array(array, name) for name, array in constants.items()]

    def built(nodes: list[Any], inputs: list[Any], outputs: list[Any]) -> onnx.ModelProto:
        graph = helper.make_graph(nodes, "toy", inputs, outputs, stored)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)

    def kept(side: str, attention: str) -> list[Any]:
        return [
            value(f"{side}.0.{attention}.{part}", _F, ["batch", 1, f"{side}_{attention}", WIDTH])
            for part in ("key", "value")
        ]

    ids, states = value("input_ids", _I, ["batch", "new"]), value("encoder_hidden_states", _F, ["batch", "read", WIDTH])
    embedded = node("Gather", ["tokens", "input_ids"], ["embedded"])
    mask, masked = (
        value("attention_mask", _I, ["batch", "read"]),
        value("encoder_attention_mask", _I, ["batch", "read"]),
    )
    encoder = [
        embedded,
        node("Cast", ["attention_mask"], ["mask"], to=_F),
        node("Unsqueeze", ["mask", "ends"], ["mask3"]),
        node("Mul", ["embedded", "mask3"], ["last_hidden_state"]),
    ]
    new = [embedded, node("Unsqueeze", ["embedded", "one"], ["key"]), node("Mul", ["key", "half"], ["value"])]

    def step(own: str, cross: str) -> list[Any]:
        return [
            node("Div", [own, "half"], ["whole"]),
            node("CumSum", ["whole", "ends"], ["sums"]),
            node("Shape", ["input_ids"], ["count"], start=1, end=2),
            node("Neg", ["count"], ["from"]),
            node("Slice", ["sums", "from", "far", "ends"], ["last"]),
            node("Div", [cross, "half"], ["states"]),
            node("ReduceSum", ["states", "ends"], ["read"]),
            node("Add", ["last", "read"], ["both"]),
            node("Squeeze", ["both", "one"], ["state"]),
            node("Tanh", ["state"], ["bounded"]),
            node("MatMul", ["bounded", "head"], ["logits"]),
        ]

    first = [
        *new,
        node("Identity", ["key"], ["present.0.decoder.key"]),
        node("Identity", ["value"], ["present.0.decoder.value"]),
        node("Unsqueeze", ["encoder_hidden_states", "one"], ["present.0.encoder.key"]),
        node("Mul", ["present.0.encoder.key", "half"], ["present.0.encoder.value"]),
        *step("present.0.decoder.value", "present.0.encoder.value"),
    ]
    later = [
        *new,
        node("Concat", ["past_key_values.0.decoder.key", "key"], ["present.0.decoder.key"], axis=2),
        node("Concat", ["past_key_values.0.decoder.value", "value"], ["present.0.decoder.value"], axis=2),
        *step("present.0.decoder.value", "past_key_values.0.encoder.value"),
    ]
    logits = value("logits", _F, ["batch", "new", VOCABULARY])
    own, cross = kept("present", "decoder"), kept("present", "encoder")
    past = [*kept("past_key_values", "decoder"), *kept("past_key_values", "encoder")]
    return {
        "encoder_model.onnx": built(encoder, [ids, mask], [value("last_hidden_state", _F, ["batch", "new", WIDTH])]),
        "decoder_model.onnx": built(first, [masked, ids, states], [logits, *own, *cross]),
        "decoder_with_past_model.onnx": built(later, [masked, ids, *past], [logits, *own]),
    }


def write_seq2seq(folder: Path, graphs: dict[str, onnx.ModelProto] | None = None) -> Path:
    """Write a folder for generation with an encoder and a decoder; its config is T5's."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, graph in (graphs or seq2seq()).items():
        onnx.save(graph, folder / name)
    sizes = {"d_model": WIDTH, "num_layers": 1, "num_heads": 1, "vocab_size": VOCABULARY, "decoder_start_token_id": 1}
    own = {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"], "is_encoder_decoder": True}
    (folder / "config.json").write_text(json.dumps({**own, **sizes, "pad_token_id": 0, "eos_token_id": 22}))
    return folder


def write(folder: Path, graph: onnx.ModelProto | None = None, **config: Any) -> Path:
    """Write a folder for generation with the toy or another graph; its config is GPT-2's."""
    folder.mkdir(parents=True, exist_ok=True)
    onnx.save(model() if graph is None else graph, folder / "model.onnx")
    own = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "vocab_size": VOCABULARY}
    sizes = {"n_positions": POSITIONS, "n_embd": WIDTH, "n_layer": 1, "n_head": 1, "eos_token_id": 2, "pad_token_id": 0}
    (folder / "config.json").write_text(json.dumps({**own, **sizes, **config}))
    defaults = {"bos_token_id": 1, "eos_token_id": 22, "pad_token_id": 0}
    (folder / "generation_config.json").write_text(json.dumps(defaults))
    return folder


def fails(code: str, words: str) -> Any:
    """Expect that the block raises this coded error."""
    return pytest.raises(GraftError, match=f"{code}: .*{words}")


def generated(model: Any, ids: Tensor, mask: Tensor | None = None, **options: Any) -> Tensor:
    """Generate `TOKENS` tokens, unless the options say otherwise."""
    options = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "eos_token_id": None, **options}
    return model.generate(input_ids=ids, attention_mask=mask, **options)
