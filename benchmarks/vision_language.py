"""The cost of a LoRA step in vision-language models that are taken apart into layers: graftc beside peft.

    python -m benchmarks.vision_language [--rounds 5] [--only gemma3] [--quick] [--threads N] [--out benchmarks/results]

Writes vision_language.json and vision_language.md. The models have the widths and vocabularies of Qwen2-VL 2B, Gemma 3
1B and a LLaVA on Llama 3.2 1B, in bfloat16 with random values, and fewer layers. A batch is two rows of 512 tokens, a
part of which is an image. All seven projections of the text's layers have LoRA of rank 8, with the same values.

What is kept for the backward pass is measured *below the head*: the loss is made of the last token's logits there, so
that the head keeps nothing that counts.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.command import command_line, parse, parser, write
from benchmarks.hardware import Stopwatch, device
from benchmarks.train.contestants import PROJECTIONS
from benchmarks.train.measure import peak_bytes, saved_bytes
from benchmarks.train.models import fill, shared_copy
from benchmarks.train.report import machine
from benchmarks.turns import in_turns

TOKENS, ROWS, RANK = 512, 2, 8
LAYERS = 4
VISION_LAYERS = 2
LOSS_TOLERANCE = 2e-3  # relative, for a mean in bfloat16


@dataclass(frozen=True)
class Base:
    """A frozen model in train mode and a batch with labels."""

    model: nn.Module
    batch: dict[str, Any]


def _tokens(image: int, count: int, vocabulary: int) -> Tensor:
    """Return rows that begin with an image of `count` tokens."""
    words = torch.randint(10, min(vocabulary, 100_000), (ROWS, TOKENS))
    words[:, 1 : 1 + count] = image
    return words


def qwen2_vl() -> Base:
    """Build Qwen2-VL 2B, with its widths, heads and vocabulary; images are 224 x 224."""
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    config = Qwen2VLConfig(
        text_config={
            "hidden_size": 1536,
            "intermediate_size": 8960,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 12,
            "num_key_value_heads": 2,
            "vocab_size": 151_936,
            "rope_parameters": {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6},
        },
        vision_config={"depth": VISION_LAYERS, "embed_dim": 1280, "hidden_size": 1536, "num_heads": 16},
        image_token_id=151_655,
        tie_word_embeddings=True,
    )
    ids = _tokens(151_655, 64, 151_000)
    batch = {
        "pixel_values": torch.randn(ROWS * 256, 3 * 2 * 14 * 14, dtype=torch.bfloat16),
        "image_grid_thw": torch.tensor([[1, 16, 16]] * ROWS),
        "mm_token_type_ids": (ids == 151_655).long(),
    }
    return _base(Qwen2VLForConditionalGeneration, config, ids, batch)


def gemma3() -> Base:
    """Build Gemma 3 1B with the vision tower of the 4B; images are 896 x 896 and take 256 tokens."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    config = Gemma3Config(
        text_config={
            "hidden_size": 1152,
            "intermediate_size": 6912,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "head_dim": 256,
            "vocab_size": 262_208,
            "sliding_window": 512,
        },
        vision_config={
            "model_type": "siglip_vision_model",
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "num_hidden_layers": VISION_LAYERS,
            "num_attention_heads": 16,
            "image_size": 896,
            "patch_size": 14,
            "vision_use_head": False,
        },
        mm_tokens_per_image=256,
    )
    image = config.image_token_id
    ids = _tokens(image, 256, 262_000)
    pixels = torch.randn(ROWS, 3, 896, 896, dtype=torch.bfloat16)
    batch = {"pixel_values": pixels, "token_type_ids": (ids == image).long()}
    return _base(Gemma3ForConditionalGeneration, config, ids, batch)


def llava() -> Base:
    """Build LLaVA on Llama 3.2 1B with CLIP's ViT-L/14 at 224 x 224; an image takes 256 tokens."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    config = LlavaConfig(
        text_config={
            "model_type": "llama",
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "vocab_size": 128_256,
        },
        vision_config={
            "model_type": "clip_vision_model",
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": VISION_LAYERS + 1,
            "num_attention_heads": 16,
            "image_size": 224,
            "patch_size": 14,
        },
        image_token_index=128_000,
        image_seq_length=256,
    )
    ids = _tokens(128_000, 256, 128_000)
    batch = {"pixel_values": torch.randn(ROWS, 3, 224, 224, dtype=torch.bfloat16)}
    return _base(LlavaForConditionalGeneration, config, ids, batch)


MODELS: Mapping[str, Callable[[], Base]] = {"qwen2_vl": qwen2_vl, "gemma3": gemma3, "llava": llava}


def _base(kind: Any, config: Any, ids: Tensor, images: Mapping[str, Any]) -> Base:
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        model: nn.Module = kind(config)
    finally:
        torch.set_default_dtype(before)
    labels = ids.clone()
    labels[:, : TOKENS // 2] = -100
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels, "use_cache": False}
    moved = {
        name: value.to(device()) if isinstance(value, Tensor) else value for name, value in (batch | images).items()
    }
    return Base(model.to(device()).requires_grad_(False).train(), moved)


@dataclass
class Contestant:
    """A contestant that is ready to run.

    Attributes:
        name: the unique name of the contestant.
        model: the model that trains.
        call: takes a batch by name.
        setup: the seconds until it was ready.
        wall, processor: the seconds of every step, in order.
        loss: the loss of the first step.
        saved: the bytes kept for the backward pass below the head.
        peak: the bytes allocated at the peak of a step, over those before it.
    """

    name: str
    model: nn.Module
    call: Callable[..., Any]
    setup: float
    wall: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)
    loss: float = 0.0
    saved: int = 0
    peak: int = 0

    def prepare(self, base: Base) -> None:
        """Run a first step, and measure the bytes that a step saves and its peak."""
        self._clear(torch.autograd.backward, base)
        below = {name: value for name, value in base.batch.items() if name != "labels"}
        self.saved = saved_bytes(lambda: self.call(**below, logits_to_keep=1).logits.float().sum(), base.model)
        self.peak = peak_bytes(lambda: self._clear(torch.autograd.backward, base))

    def step(self, base: Base) -> None:
        """Run and time a step."""
        watch, processor = Stopwatch(), time.process_time()
        self._clear(torch.autograd.backward, base)
        watch.mark()
        self.wall += watch.seconds()
        self.processor.append(time.process_time() - processor)

    def _clear(self, backward: Callable[[Tensor], None], base: Base) -> None:
        loss = self.call(**base.batch).loss
        self.loss = self.loss or float(loss.detach())
        backward(loss)
        self.model.zero_grad(set_to_none=True)


def theirs(base: Base) -> tuple[nn.Module, Callable[..., Any]]:
    """Adapt a copy of the model with peft's LoRA."""
    import peft

    places = r".*language_model.*\.(" + "|".join(PROJECTIONS) + ")"
    config = peft.LoraConfig(r=RANK, lora_alpha=16, target_modules=places)
    model = peft.get_peft_model(shared_copy(base.model), config).train()
    return model, model.base_model


def ours(base: Base, document: Mapping[str, Any]) -> tuple[nn.Module, Callable[..., Any]]:
    """Adapt a copy of the model with graftc's LoRA, and with the other entries of `document` in the spec.

    The model is taken apart even if it could be one graph.
    """
    import graftc
    from graftc.compiler.pipeline import StartingPoint, compile_model
    from graftc.runtime.api import request
    from graftc.runtime.compiled import make_compiled

    target = {"modules": "**.language_model.**.{" + ",".join(PROJECTIONS) + "}"}
    adapt = [{"method": "lora", "target": target, "rank": RANK, "alpha": 16}]
    spec = graftc.load_spec({"adapt": adapt, **document})
    model = shared_copy(base.model)
    axes, flags = request(model, base.batch)
    start = StartingPoint(0, use_cache=False, level="layers")
    compiled = make_compiled(compile_model(spec, model, axes, flags=flags, start=start)).train()
    return compiled, compiled


MAKERS: Mapping[str, Callable[[Base], tuple[nn.Module, Callable[..., Any]]]] = {
    "peft": theirs,
    "graftc": lambda base: ours(base, {}),
    "graftc, chunked loss": lambda base: ours(base, {"memory": {"loss": "chunked"}}),
}


def measure(name: str, rounds: int) -> dict[str, Any]:
    """Measure every contestant on a model, and return medians over alternated rounds."""
    base, ready = MODELS[name](), list[Contestant]()
    for who, make in MAKERS.items():
        start = time.perf_counter()
        model, call = make(base)
        fill(model)
        ready.append(Contestant(who, model, call, time.perf_counter() - start))
        ready[-1].prepare(base)
        _tell(f"{name}: {who} is ready")
    in_turns(ready, rounds, lambda one, _: one.step(base), _tell)
    keys = ("setup", "saved", "peak", "loss")
    return {
        one.name: {
            "step": median(one.wall),
            "processor": median(one.processor),
            "rounds": {"step": one.wall, "processor": one.processor},
            **{key: getattr(one, key) for key in keys},
        }
        for one in ready
    }


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def lines(data: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines of the report in Markdown."""
    yield from (
        "# Vision-language models",
        "",
        f"`{data['command']}`, {data['date']}.",
        "",
        __doc__.split("\n\n", 2)[2],
    )
    yield f"Medians of {data['rounds']} alternated rounds; in brackets, over peft's."
    yield from ("", "| model | | step s | processor s | kept below the head MB | peak MB | set-up s |")
    yield "| --- | --- | ---: | ---: | ---: | ---: | ---: |"
    for name, contestants in data["models"].items():
        for who, figures in contestants.items():
            peer = contestants["peft"]
            cells = [f"{figures[key]:.2f} ({figures[key] / peer[key]:.2f})" for key in ("step", "processor")]
            cells += [f"{figures[key] / 1e6:.0f} ({figures[key] / peer[key]:.2f})" for key in ("saved", "peak")]
            yield f"| {name} | {who} | {' | '.join(cells)} | {figures['setup']:.1f} |"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark and write the results; return 1 if a loss differs from peft's."""
    prog = "python -m benchmarks.vision_language"
    options = parser(prog, __doc__, rounds=5)
    options.add_argument("--only", choices=list(MODELS), action="append", help="a model (default: all)")
    chosen = parse(options, arguments)
    if chosen.threads is not None:
        torch.set_num_threads(chosen.threads)
    names, rounds = chosen.only or list(MODELS), 1 if chosen.quick else chosen.rounds
    data: dict[str, Any] = {
        "command": command_line(prog, arguments),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": machine(),
        "rounds": rounds,
    }
    data["models"] = {name: measure(name, rounds) for name in names}
    write(chosen.out, "vision_language", data, "\n".join(lines(data)) + "\n")
    losses = [
        (contestants["peft"]["loss"], one["loss"])
        for contestants in data["models"].values()
        for one in contestants.values()
    ]
    return int(any(abs(own - peer) > LOSS_TOLERANCE * abs(peer) for peer, own in losses))


if __name__ == "__main__":
    sys.exit(main())
