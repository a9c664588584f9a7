"""The contestants of `benchmarks.generate`: models, and ways to run them."""

from __future__ import annotations

import atexit
import copy
import shutil
import tempfile
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.train.contestants import UnavailableError
from benchmarks.train.models import shared_copy

FLOOR, EAGER, BASE, MERGED = "floor", "transformers", "graftc base", "graftc merged"
ADAPTED, INT4 = "graftc LoRA", "graftc int4"
STATIC, STATIC_MERGED = "transformers, torch.compile", "graftc merged, torch.compile"
LORA: dict[str, Any] = {"method": "lora", "rank": 8, "target": {"role": ["attn.{q,k,v,o}", "ffn.{gate,up,down}"]}}
PREFIX: dict[str, Any] = {"method": "prefix", "length": 32}


@dataclass(frozen=True)
class Case:
    """A model and its inputs.

    Attributes:
        name: the name of the case.
        model: a model of transformers, in eval mode.
        ids: the tokens of the context and those after it, ``[1, context + steps]``.
        context: the number of tokens in the prompt.
        compiled: the compiled models by their method, and the merged one; each is made when it is first requested.
    """

    name: str
    model: Any
    ids: Tensor
    context: int
    compiled: dict[str, Any] = field(default_factory=dict)

    def quantised(self) -> Any:
        """Return the model with the linear maps of its layers in 4 bits; its head stays in float32."""
        import graftc

        if "int4" not in self.compiled:
            spec = {"base": {"quantize": "int4"}, "adapt": []}
            self.compiled["int4"] = graftc.compile(spec, shared_copy(self.model)).eval()
        return self.compiled["int4"]

    def adapted(self, **entry: Any) -> Any:
        """Return the model with one adaptation, whose values are those of a model after some training."""
        import graftc
        from graftc.testing import perturb

        if (key := entry["method"]) not in self.compiled:
            compiled = graftc.compile({"adapt": [entry]}, shared_copy(self.model)).eval()
            perturb(compiled, scale=0.01)
            self.compiled[key] = compiled
        return self.compiled[key]

    @property
    def weights(self) -> int:
        """The bytes that a token reads: all parameters, a tied head once, the table of words only if it is tied."""
        parameters = {id(p): p for p in self.model.parameters()}
        table = self.model.get_input_embeddings().weight
        if table is not self.model.get_output_embeddings().weight:
            parameters.pop(id(table))
        return sum(p.numel() * p.element_size() for p in parameters.values())


@dataclass(frozen=True)
class Live:
    """A contestant that is ready to take turns.

    Attributes:
        prefill: runs the prompt.
        begin: returns a function that decodes from the end of the prompt; each of its calls is a step and returns the
            logits, which are compared.
    """

    prefill: Callable[[], Any]
    begin: Callable[[], Callable[[int], Any]]


@dataclass(frozen=True)
class Entry:
    """A line of the table.

    Attributes:
        name: the unique name of the entry.
        make: makes the contestant for a case.
        peer: the name of the entry whose time it is compared with.
        aims: the ratios to the peer that it aims at, by case and part.
        equals: the name of the entry whose logits its own have to equal.
    """

    name: str
    make: Callable[[Case], Live]
    peer: str | None = None
    aims: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    equals: str | None = None


def called(
    case: Case,
    model: Callable[..., Any],
    within: Callable[[], Any] | None = None,
    new: Callable[[], Any] | None = None,
) -> Live:
    """Return a contestant that is called as the loop of transformers calls a model if no row is padded: without a mask.

    Args:
        case: the model and its inputs.
        model: called with inputs by name.
        within: makes the context of every call.
        new: makes the cache that a prompt starts with.
    """
    from transformers.cache_utils import DynamicCache

    around, empty = within or nullcontext, new or DynamicCache

    def call(first: int, last: int, cache: Any) -> Any:
        given = {
            "input_ids": case.ids[:, first:last],
            "position_ids": torch.arange(first, last, device=case.ids.device)[None],
            **{"cache": cache, "use_cache": True, "logits_to_keep": 1},
        }
        with torch.no_grad(), around():
            return model(**given)

    kept = call(0, case.context, empty()).cache

    def begin() -> Callable[[int], Any]:
        cache = copy.copy(kept)
        cache.layers = [copy.copy(layer) for layer in kept.layers]
        return lambda step: call(case.context + step, case.context + step + 1, cache).logits

    return Live(lambda: call(0, case.context, empty()).logits, begin)


def floor(case: Case) -> Live:
    """Return a contestant that reads as many bytes as the weights have."""
    memory = torch.ones(case.weights // 4, device=case.ids.device)

    def read(*_: int) -> None:
        memory.sum()

    return Live(read, lambda: read)


def lora(case: Case) -> Live:
    """Return a contestant with LoRA on all projections, beside the weights."""
    return called(case, case.adapted(**LORA))


def base(case: Case) -> Live:
    """Return a contestant that runs the same compiled model with its adaptations disabled."""
    compiled = case.adapted(**LORA)
    return called(case, compiled, compiled.disabled)


def merged(case: Case) -> Live:
    """Return a contestant with LoRA folded into the weights."""
    return called(case, merged_model(case))


def merged_model(case: Case) -> Any:
    """Return the folded model."""
    if "merged" not in case.compiled:
        case.compiled["merged"] = case.adapted(**LORA).merge()
    return case.compiled["merged"]


def prefix(case: Case) -> Live:
    """Return a contestant with a prefix of 32 keys and values that the cache starts with, as in `generate`."""
    from graftc.runtime.model.initial_cache import initial_cache
    from graftc.runtime.model.runner import runner_of

    runner = runner_of(case.adapted(**PREFIX))
    initial = initial_cache(runner)
    if initial is None:
        raise UnavailableError("the cache of this model cannot begin with a prefix")
    beside = runner.beside(initial.names)
    return called(case, lambda **given: beside.call((), given), new=lambda: initial.cache(1))


def static(case: Case) -> Live:
    """Return a contestant that runs transformers with its static cache, compiled by `torch.compile`."""
    return _static(case, shared_copy(case.model))


def static_merged(case: Case) -> Live:
    """Return a contestant with LoRA folded into the weights, a static cache, and code compiled by `torch.compile`."""
    return _static(case, merged_model(case))


def static_lora(case: Case) -> Live:
    """Return a contestant with LoRA beside the weights, a static cache, and code compiled by `torch.compile`."""
    return _static(case, case.adapted(**LORA))


def _static(case: Case, model: Any) -> Live:
    from transformers.cache_utils import StaticCache

    run = torch.compile(model, dynamic=False)
    cache = StaticCache(config=model.config, max_cache_len=case.ids.shape[1])

    def call(first: int, last: int) -> Any:
        positions = torch.arange(first, last, device=case.ids.device)[None]
        inputs = {"input_ids": case.ids[:, first:last], "position_ids": positions}
        with torch.no_grad():
            return run(**inputs, cache=cache, use_cache=True, logits_to_keep=1).logits

    def prefill() -> Any:
        cache.reset()
        return call(0, case.context)

    def begin() -> Callable[[int], Any]:
        prefill()
        return lambda step: call(case.context + step, case.context + step + 1)

    return Live(prefill, begin)


def quantised(case: Case) -> Live:
    """Return a contestant with weights of 4 bits, whose values are computed when a layer reads them."""
    return called(case, case.quantised())


def onnx(case: Case) -> Live:
    """Return a contestant that runs the ONNX export of the merged model in ONNX Runtime."""
    return _onnx(case, merged_model(case))


def onnx_quantised(case: Case) -> Live:
    """Return a contestant that runs the ONNX export of the model with weights of 4 bits in ONNX Runtime."""
    return _onnx(case, case.quantised())


def _onnx(case: Case, model: Any) -> Live:
    """Return a contestant that runs a model's ONNX export with a cache, whose keys and values are never copied."""
    if case.ids.device.type != "cpu":
        raise UnavailableError("ONNX Runtime runs on the processor here, and the other entries on a GPU")
    try:
        import onnxruntime as ort
    except ImportError as error:
        raise UnavailableError("onnxruntime is not installed") from error
    folder = model.export(Path(tempfile.mkdtemp()) / "onnx", "onnx-generate")
    atexit.register(shutil.rmtree, folder.parent, ignore_errors=True)
    file = folder / "model.onnx"
    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.force_spinning_stop", "1")  # or its threads slow down the next entry
    session = ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    takes = [each.name for each in session.get_inputs()]
    gives = [each.name for each in session.get_outputs()]
    config = case.model.config
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    nothing = ort.OrtValue.ortvalue_from_numpy(torch.empty(1, config.num_key_value_heads, 0, width).numpy())
    empty = {name: nothing for name in takes if name.startswith("past_key_values.")}

    def call(first: int, last: int, past: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
        inputs = {
            "input_ids": case.ids[:, first:last],
            "attention_mask": torch.ones(1, last, dtype=torch.int64),
            "position_ids": torch.arange(first, last)[None],
        }
        binding = session.io_binding()
        for name in takes:
            if name in past:
                binding.bind_ortvalue_input(name, past[name])
            else:
                binding.bind_cpu_input(name, inputs[name].contiguous().numpy())
        for name in gives:
            binding.bind_output(name)
        session.run_with_iobinding(binding)
        outputs = dict(zip(gives, binding.get_outputs(), strict=True))
        present = {f"past_key_values.{name.removeprefix('present.')}": v for name, v in outputs.items() if "." in name}
        return torch.from_numpy(outputs["logits"].numpy())[:, -1:], present

    kept = call(0, case.context, empty)[1]

    def begin() -> Callable[[int], Any]:
        past = kept

        def step(number: int) -> Any:
            nonlocal past
            logits, past = call(case.context + number, case.context + number + 1, past)
            return logits

        return step

    return Live(lambda: call(0, case.context, empty)[0], begin)


def entries(inductor: bool) -> list[Entry]:
    """Return all entries, in the order of their turns."""

    def decode(smollm2: float, llama: float) -> dict[str, dict[str, float]]:
        return {"smollm2": {"decode": smollm2}, "llama": {"decode": llama}}

    both = {"prefill": 0.9, "decode": 0.9}
    lines = [
        Entry(FLOOR, floor),
        Entry(EAGER, lambda case: called(case, case.model)),
        Entry(BASE, base, EAGER, {"smollm2": both, "llama": both}, equals=EAGER),
        Entry(MERGED, merged, EAGER, {"smollm2": both, "llama": both}),
        Entry(ADAPTED, lora, MERGED, decode(1.08, 1.10), equals=MERGED),
        Entry("graftc prefix", prefix, BASE, decode(1.02, 1.02)),
        Entry(
            "graftc in ONNX Runtime",
            onnx,
            EAGER,
            {"smollm2": {"prefill": 0.6, "decode": 0.80}, "llama": {"prefill": 0.6, "decode": 0.55}},
            equals=MERGED,
        ),
        Entry(INT4, quantised, EAGER),
        Entry("graftc int4 in ONNX Runtime", onnx_quantised, EAGER, {"smollm2": {"decode": 0.40}}, equals=INT4),
    ]
    if inductor:
        lines += [
            Entry(STATIC, static, EAGER, equals=EAGER),
            Entry(STATIC_MERGED, static_merged, STATIC, decode(1.0, 1.0), equals=MERGED),
            Entry("graftc LoRA, torch.compile", static_lora, STATIC_MERGED, decode(1.08, 1.10), equals=ADAPTED),
        ]
    return lines
