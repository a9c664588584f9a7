"""Reference bottleneck adapters: each wiring in plain torch, as forward hooks on the modules of transformers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

Tensors = Mapping[str, Tensor]
Function = Callable[[Tensor], Tensor]
Hooks = Callable[[nn.Module, Function, Function], None]
"""A function that hooks the adapters of a layer's attention and feed-forward part into the layer."""

ACTIVATIONS: Mapping[str, Function] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "tanh": F.tanh,
    "leaky_relu": F.leaky_relu,
    "identity": lambda x: x,
}


def adapter(tensors: Tensors, prefix: str, activation: str, scale: float = 1.0) -> Function:
    """Return ``x -> s (U f(D n(x) + b) + c)``, where the norm ``n`` applies only if its tensors exist.

    Args:
        tensors: tensors by name.
        prefix: the prefix of the names of the adapter's tensors.
        activation: a key of `ACTIVATIONS`.
        scale: the scale to use if no tensor holds one.
    """

    def run(x: Tensor) -> Tensor:
        part = {n.removeprefix(prefix): t.to(x) for n, t in tensors.items() if n.startswith(prefix)}
        if "norm_weight" in part:
            x = F.layer_norm(x, x.shape[-1:], part["norm_weight"], part["norm_bias"], 1e-5)
        hidden = ACTIVATIONS[activation](F.linear(x, part["down"], part.get("down_bias")))
        return F.linear(hidden, part["up"], part.get("up_bias")) * part.get("scale", scale)

    return run


def replace_output(module: nn.Module, change: Function) -> None:
    """Pass the output of a module, or the first item of a tuple of outputs, through ``change``."""

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)

    module.register_forward_hook(hook)


def replace_input(module: nn.Module, change: Function) -> None:
    """Pass the first argument of a module through ``change``."""
    module.register_forward_pre_hook(lambda module, args: (change(args[0]), *args[1:]))


def seen(module: nn.Module, index: int = 0) -> list[Tensor]:
    """Return a list whose one item is the latest input of the module at that position."""
    inputs: list[Tensor] = []

    def note(module: nn.Module, args: Any, kwargs: Any) -> None:
        inputs[:] = [args[index] if len(args) > index else kwargs["hidden_states"]]

    module.register_forward_pre_hook(note, with_kwargs=True)
    return inputs


# --- BERT: norms after the sums -------------------------------------------------------------------------------


def _bert_houlsby(layer: Any, attention: Function, feed_forward: Function) -> None:
    replace_output(layer.attention.output.dropout, lambda a: a + attention(a))
    replace_output(layer.output.dropout, lambda g: g + feed_forward(g))


def _bert_pfeiffer(layer: Any, attention: Function, feed_forward: Function) -> None:
    def hook(module: Any, args: tuple[Tensor, Tensor], u: Tensor) -> Tensor:
        inner, h = args
        z = module.dense(inner) + feed_forward(u)
        twice: Tensor = module.LayerNorm(z + h)
        return twice

    layer.output.register_forward_hook(hook)


def _bert_wrong_residual(layer: Any, attention: Function, feed_forward: Function) -> None:
    """Apply Pfeiffer's adapter with ``u`` as its residual instead of ``g``."""

    def hook(module: Any, args: tuple[Tensor, Tensor], u: Tensor) -> Tensor:
        twice: Tensor = module.LayerNorm(u + feed_forward(u) + args[1])
        return twice

    layer.output.register_forward_hook(hook)


def _bert_behind(layer: Any, attention: Function, feed_forward: Function) -> None:
    replace_output(layer.output, lambda y: y + feed_forward(y))


def _bert_parallel(layer: Any, attention: Function, feed_forward: Function) -> None:
    h = seen(layer.output, 1)
    replace_output(layer.output.dropout, lambda g: g + feed_forward(h[0]))


def _bert_parallel_attention(layer: Any, attention: Function, feed_forward: Function) -> None:
    x = seen(layer.attention.output, 1)
    replace_input(layer.attention.output.dense, lambda heads: heads + attention(x[0]))


# --- GPT-2 and Llama: norms before the branches ---------------------------------------------------------------

_PARTS = {
    "gpt2": ("ln_1", "attn", "attn.c_proj", "ln_2", "mlp"),
    "llama": ("input_layernorm", "self_attn", "self_attn.o_proj", "post_attention_layernorm", "mlp"),
}


def _parts(layer: nn.Module) -> list[nn.Module]:
    names = _PARTS["gpt2" if hasattr(layer, "ln_1") else "llama"]
    return [layer.get_submodule(name) for name in names]


def _pre_houlsby(layer: nn.Module, attention: Function, feed_forward: Function) -> None:
    _, self_attention, _, _, mlp = _parts(layer)
    replace_output(self_attention, lambda a: a + attention(a))
    replace_output(mlp, lambda g: g + feed_forward(g))


def _pre_pfeiffer(layer: nn.Module, attention: Function, feed_forward: Function) -> None:
    _, _, _, norm, mlp = _parts(layer)
    h = seen(norm)
    replace_output(mlp, lambda g: g + feed_forward(g + h[0]))


def _pre_behind(layer: nn.Module, attention: Function, feed_forward: Function) -> None:
    replace_output(layer, lambda y: y + feed_forward(y))


def _pre_parallel(layer: nn.Module, attention: Function, feed_forward: Function) -> None:
    _, _, _, norm, mlp = _parts(layer)
    h = seen(norm)
    replace_output(mlp, lambda g: g + feed_forward(h[0]))


def _pre_parallel_attention(layer: nn.Module, attention: Function, feed_forward: Function) -> None:
    norm, _, last, _, _ = _parts(layer)
    x = seen(norm)
    replace_input(last, lambda heads: heads + attention(x[0]))


POST: Mapping[str, Hooks] = {
    "houlsby": _bert_houlsby,
    "he_sequential": _bert_houlsby,
    "pfeiffer": _bert_pfeiffer,
    "bapna_firat": _bert_behind,
    "adapter_l": _bert_behind,
    "he_parallel": _bert_parallel,
    "he_parallel of attention": _bert_parallel_attention,
    "wrong residual": _bert_wrong_residual,
}
PRE: Mapping[str, Hooks] = {
    "houlsby": _pre_houlsby,
    "he_sequential": _pre_houlsby,
    "pfeiffer": _pre_pfeiffer,
    "bapna_firat": _pre_behind,
    "adapter_l": _pre_behind,
    "he_parallel": _pre_parallel,
    "he_parallel of attention": _pre_parallel_attention,
}
LAYERS = {"bert": "bert.encoder.layer", "gpt2": "transformer.h", "llama": "model.layers"}


def hook(
    model: nn.Module, family: str, wiring: str, tensors: Tensors, name: str, activation: str, scale: float
) -> None:
    """Add hooks to a plain model, so that it computes the same function as an adaptation.

    Args:
        model: a model of ``family``.
        family: a key of `LAYERS`.
        wiring: a key of `POST` or `PRE`.
        tensors: the adapters' tensors.
        name: the name of the adaptation.
        activation, scale: the values in its spec.
    """
    hooks = (POST if family == "bert" else PRE)[wiring]
    for index, layer in enumerate(model.get_submodule(LAYERS[family])):  # type: ignore[arg-type]
        prefix = f"{LAYERS[family]}.{index}.graftc.{name}."
        both = [adapter(tensors, f"{prefix}{part}.", activation, scale) for part in ("attn", "ffn")]
        hooks(layer, *both)
