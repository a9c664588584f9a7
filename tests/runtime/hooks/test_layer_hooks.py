"""Hooks on layers see and change the same as in the source model, also in calls with a cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

import graftc
from graftc.testing.families import tiny
from graftc.testing.perturbing import perturb
from tests.kit.language_models import language_model, prompt
from tests.runtime.onnx_generation.onnx_toy import fails

LORA = {"method": "lora", "rank": 2, "target": {"role": ["attn.q", "attn.v"]}}
LAYERS = {
    "llama": "model.layers.0",
    "gpt2": "transformer.h.0",
    "mistral": "model.layers.0",
    "t5": "decoder.block.0",
    "gpt_neox": "gpt_neox.layers.0",
    "bart": "model.decoder.layers.0",
    "mixtral": "model.layers.0",
    "gemma3": "model.layers.0",
    "falcon": "transformer.h.0",
    "opt": "model.decoder.layers.0",
}
pytestmark = pytest.mark.slow

SOME: dict[str, Any] = {"max_new_tokens": 5, "min_new_tokens": 5}
SOME |= {"return_dict_in_generate": True, "output_logits": True}


@pytest.fixture(scope="module", params=LAYERS)
def trio(request: pytest.FixtureRequest) -> tuple[Any, Any, str]:
    """A source model, its compiled model with LoRA at its initial values, and the path of one layer."""
    source = language_model(request.param)
    return source, graftc.compile({"adapt": [LORA]}, source).eval(), LAYERS[request.param]


def calls_of(model: Any) -> list[dict[str, Any]]:
    """Return inputs of calls: a whole text and one with padding, or one call of an encoder and a decoder."""
    given = prompt(model, 3, padded=True)
    if model.config.is_encoder_decoder:
        return [{**given, "decoder_input_ids": given["input_ids"][:, :4].flip(0)}]
    return [{"input_ids": given["input_ids"], "use_cache": False}, {**given, "use_cache": False}]


def steering(module: Any, inputs: Any, output: Any) -> Any:
    """Scale hidden states as usual hooks do: all of the output, or the first item of a tuple."""
    return (output[0] * 1.5, *output[1:]) if isinstance(output, tuple) else output * 1.5


def in_place(module: Any, inputs: Any, output: Any) -> None:
    (output[0] if isinstance(output, tuple) else output).mul_(0.5)


def tilting(module: Any, inputs: tuple[Any, ...]) -> Any:
    return (inputs[0] * 0.7, *inputs[1:])


def with_kwargs(module: Any, inputs: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    return steering(module, inputs, output)


def before_with_kwargs(module: Any, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return tilting(module, inputs), kwargs


HOOKS: dict[str, Callable[[nn.Module], Any]] = {
    "steering": lambda layer: layer.register_forward_hook(steering),
    "in place": lambda layer: layer.register_forward_hook(in_place),
    "always": lambda layer: layer.register_forward_hook(steering, always_call=True),
    "kwargs": lambda layer: layer.register_forward_hook(with_kwargs, with_kwargs=True),
    "before": lambda layer: layer.register_forward_pre_hook(tilting),
    "before, kwargs": lambda layer: layer.register_forward_pre_hook(before_with_kwargs, with_kwargs=True),
}


def outputs_of(model: Any, path: str, hook: str, run: Callable[[Any], Any]) -> Any:
    handle = HOOKS[hook](model.get_submodule(path))
    try:
        with torch.no_grad():
            return run(model)
    finally:
        handle.remove()


@pytest.mark.sample("llama-before, kwargs")
@pytest.mark.parametrize("hook", HOOKS)
def test_hooks_change_what_they_do_in_the_source(trio: tuple[Any, Any, str], hook: str) -> None:
    source, compiled, path = trio
    for given in calls_of(source):
        plain = compiled(**given).logits
        theirs, ours = (outputs_of(m, path, hook, lambda m: m(**given).logits) for m in (source, compiled))  # noqa: B023
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
        assert float((ours - plain).abs().max()) > 1e-3 * float(plain.abs().max())
        torch.testing.assert_close(compiled(**given).logits, plain)


@pytest.mark.full
@pytest.mark.parametrize("hook", HOOKS)
def test_and_in_the_steps_of_generate(trio: tuple[Any, Any, str], hook: str) -> None:
    source, compiled, path = trio
    given = prompt(source, 2, padded=True)
    theirs, ours = (outputs_of(m, path, hook, lambda m: m.generate(**given, **SOME)) for m in (source, compiled))
    assert torch.equal(ours.sequences, theirs.sequences)
    torch.testing.assert_close(torch.stack(ours.logits), torch.stack(theirs.logits), rtol=1e-4, atol=1e-4)
    plain = compiled.generate(**given, **SOME).logits[0]
    assert float((ours.logits[0] - plain).abs().max()) > 1e-3 * float(plain.abs().max())


@pytest.mark.sample("llama-generate")
@pytest.mark.parametrize("way", ["call", "generate", "default"])
def test_what_hooks_see(trio: tuple[Any, Any, str], way: str) -> None:
    """Hooks see the structure of arguments and outputs, every tensor that is a value of the graph, and the cache."""
    source, compiled, path = trio
    runs: dict[str, Callable[[Any], Any]] = {
        "call": lambda model: model(**calls_of(model)[-1]),
        "generate": lambda model: model.generate(**prompt(model, 2, padded=True), **SOME),
        "default": lambda model: model(**{**calls_of(model)[-1], "use_cache": None}),
    }
    seen: list[list[Any]] = []
    for model in (source, compiled):
        own: list[Any] = []
        seen.append(own)

        def see(module: Any, args: Any, kwargs: Any, output: Any, own: list[Any] = own) -> None:
            own.append((args, kwargs, output))

        handle = model.get_submodule(path).register_forward_hook(see, with_kwargs=True)
        with torch.no_grad():
            runs[way](model)
        handle.remove()
    assert len(seen[0]) == len(seen[1]) > 0
    for theirs, ours in zip(*seen, strict=True):
        compare(ours[0][0], theirs[0][0])
        compare(ours[2], theirs[2])
        assert len(ours[0]) == len(theirs[0]) and ours[1].keys() == theirs[1].keys()
        for name in ours[1]:
            if isinstance(theirs[1][name], Cache):
                assert isinstance(ours[1][name], Cache)
                assert ours[1][name].get_seq_length() > 0 or way == "call"


def compare(ours: Any, theirs: Any) -> None:
    """Check that two values are the same, as far as the graph has them: of a tuple, only the first item."""
    if isinstance(theirs, Tensor):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    elif isinstance(theirs, tuple):
        assert type(ours) is tuple and len(ours) == len(theirs)
        compare(ours[0], theirs[0])
    else:
        assert type(ours) is type(theirs)


def test_gradients_that_backward_hooks_see() -> None:
    source = language_model("llama")
    compiled = graftc.compile({"adapt": [LORA]}, source).eval()
    ids, seen = prompt(source, 2)["input_ids"], list[Any]()
    for model in (source, compiled):
        layer = model.get_submodule("model.layers.1")
        handle = layer.register_full_backward_hook(lambda module, into, out: seen.append((into, out)))
        model(input_ids=ids, use_cache=False).logits.square().sum().backward()
        handle.remove()
    (theirs_in, theirs_out), (ours_in, ours_out) = seen
    assert len(theirs_in) == len(ours_in) and len(theirs_out) == len(ours_out) == 1
    torch.testing.assert_close(ours_out[0], theirs_out[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours_in[0], theirs_in[0], rtol=1e-4, atol=1e-4)


ADAPTED: dict[str, dict[str, Any]] = {
    "bottleneck": {"method": "bottleneck"},
    "prefix": {"method": "prefix", "length": 3, "positions": "shifted"},
    "prompt": {"method": "prompt", "length": 3},
    "lora": LORA,
}


@pytest.mark.sample("True-bottleneck")
@pytest.mark.parametrize("kind", ADAPTED)
@pytest.mark.parametrize("cached", [False, True])
def test_outputs_are_those_of_the_adapted_layer(kind: str, cached: bool) -> None:
    """A hook sees what the next layer gets, including adaptations at the end of the layer."""
    compiled = graftc.compile({"adapt": [ADAPTED[kind]]}, language_model("gpt2")).eval()
    perturb(compiled, 0.3)
    ids, seen = prompt(compiled, 2)["input_ids"], list[Tensor]()
    options = {**SOME, "use_cache": cached}
    plain = compiled.generate(ids, attention_mask=torch.ones_like(ids), **options)
    handle = compiled.transformer.h[0].register_forward_hook(
        lambda module, args, output: seen.append(output[0] if isinstance(output, tuple) else output)
    )
    second = compiled.transformer.h[1].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    outputs = compiled.generate(ids, attention_mask=torch.ones_like(ids), **options)
    handle.remove(), second.remove()
    assert torch.equal(outputs.sequences, plain.sequences) and len(seen) == 10
    for before, after in zip(seen[::2], seen[1::2], strict=True):
        assert torch.equal(before, after) and before.shape[-1] == 32 and before.dim() == 3


def test_what_the_graph_has_not_is_refused_when_it_is_used() -> None:
    compiled = graftc.compile({"adapt": [LORA]}, language_model("llama")).eval()
    ids = prompt(compiled, 2)["input_ids"]
    layer = compiled.model.layers[0]

    def positions(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        assert "position_ids" in repr(kwargs["position_ids"])
        return args, {**kwargs, "position_ids": kwargs["position_ids"] + 1}

    def structure(module: Any, args: Any, output: Tensor) -> Any:
        return output, output

    def shape(module: Any, args: Any, output: Tensor) -> Any:
        return output[:, :2]

    cases = [
        (lambda: layer.register_forward_pre_hook(positions, with_kwargs=True), "position_ids"),
        (lambda: layer.register_forward_hook(structure), "a tuple"),
        (lambda: layer.register_forward_hook(shape), r"float32\[2, 2, 32\]"),
    ]
    for register, message in cases:
        handle = register()
        with fails("GC043", message):
            compiled(input_ids=ids, use_cache=False)
        handle.remove()
    with fails("GC043", ""):
        compiled.model.layers[0].mlp.register_full_backward_hook(steering)


@pytest.mark.full
def test_hooks_on_every_module_are_no_other() -> None:
    source = language_model("llama")
    compiled = graftc.compile({"adapt": [LORA]}, source).eval()
    given, kind = prompt(source, 2), type(source.model.layers[0])

    def scaled(module: nn.Module, args: Any, output: Any) -> Any:
        return steering(module, args, output) if isinstance(module, kind) else None

    plain = source.generate(**given, **SOME)
    handle = torch.nn.modules.module.register_module_forward_hook(scaled)
    try:
        theirs, ours = (torch.stack(model.generate(**given, **SOME).logits) for model in (source, compiled))
    finally:
        handle.remove()
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert float((ours[0] - plain.logits[0]).abs().max()) > 1e-3 * float(plain.logits[0].abs().max())


@pytest.mark.full
def test_layers_of_other_models() -> None:
    """Hooks also work on encoders, whose layers have other arguments, and in training."""
    source = tiny("bert").eval()
    compiled = graftc.compile({"adapt": [LORA]}, source).eval()
    ids = torch.randint(5, 50, (3, 7))
    results = []
    for model in (source, compiled):
        handle = model.bert.encoder.layer[0].register_forward_hook(steering)
        results.append(model(ids).logits)
        handle.remove()
    torch.testing.assert_close(*results)
    compiled.train()
    seen: list[Any] = []
    compiled.bert.encoder.layer[1].register_forward_hook(lambda module, args, output: seen.append((args, output)))
    compiled(ids, labels=torch.zeros(3, dtype=torch.long)).loss.backward()
    assert seen[0][0][0].shape == (3, 7, 48)


@pytest.mark.full
def test_a_decoder_that_makes_its_tokens_itself() -> None:
    """BART makes its decoder's tokens from the encoder's, in a call that a cache could not continue."""
    import transformers

    config = transformers.BartConfig(
        **{"vocab_size": 99, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "max_position_embeddings": 64},
        **{f"{stack}_{name}": size for stack in ("encoder", "decoder") for name, size in _SIZES.items()},
    )
    torch.manual_seed(0)
    source = transformers.BartForConditionalGeneration(config).eval()
    compiled = graftc.compile({"adapt": [{"method": "lora", "target": {"role": "attn.q"}}]}, source).eval()
    ids, outputs = torch.randint(5, 90, (2, 7)), []
    for model in (source, compiled):
        layer = model.model.encoder.layers[1]
        handle = layer.register_forward_hook(lambda module, args, output: output * 2)
        with torch.no_grad():
            outputs.append(model(input_ids=ids).logits)
        handle.remove()
    torch.testing.assert_close(*outputs)


_SIZES = {"attention_heads": 4, "ffn_dim": 48}


def test_activations_once_a_layer_had_a_hook() -> None:
    model = tiny("llama")
    compiled = graftc.compile({"adapt": [{"method": "lora", "target": {"role": "attn.q"}}]}, model)
    ids = torch.randint(3, 90, (2, 7))
    expected = compiled.activations(input_ids=ids, labels=ids)
    compiled.model.layers[0].register_forward_hook(lambda module, args, output: None).remove()
    assert compiled.activations(input_ids=ids, labels=ids).kept == expected.kept
