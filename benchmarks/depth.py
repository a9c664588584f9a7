"""The time of starting at real depth, beside peft: compiling, the first and later steps, the first and later tokens.

    python -m benchmarks.depth [--rounds 3] [--only qwen2_vl] [--out benchmarks/results]

The models have the depth of those that people tune and tiny widths, so that nearly all time is per layer. Each run
is a process of its own with one thread, and its imports are not counted. Contestants take turns; graftc runs with an
empty cache folder, and again with the cache of that run. Figures are processor seconds, medians over the rounds.
Writes depth.json and depth.md.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks.command import command_line, parse, parser, write

IMAGE, VOCABULARY, ROWS, TOKENS = 250, 300, 2, 24
CONTESTANTS = ("peft", "graftc", "graftc, from the cache")
COLUMNS = {
    "first": "loaded model to end of first step",
    "step": "step",
    "tokens": "first 4 tokens",
    "again": "4 tokens",
}
TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VISION: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "image_size": 56,
    "patch_size": 14,
}
LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
STATES = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 16}


def _ids(images: int = 0) -> Any:
    """Return texts that begin with an image of so many tokens, ``int64[rows, tokens]``."""
    import torch

    ids = torch.randint(10, 200, (ROWS, TOKENS))
    ids[:, :images] = IMAGE
    return ids


def qwen2_vl(layers: int, vision: int) -> tuple[Any, dict[str, Any]]:
    """Build a Qwen2-VL; an image has 4 x 4 patches and takes 4 tokens."""
    import torch
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4}
    tower = {"depth": vision, "embed_dim": 64, "hidden_size": 64, "num_heads": 4, "mlp_ratio": 2, "patch_size": 14}
    text = {**TEXT, "num_hidden_layers": layers, "rope_parameters": rope}
    config = Qwen2VLConfig(text_config=text, vision_config=tower, image_token_id=IMAGE)
    ids = _ids(4)
    grid = torch.tensor([[1, 4, 4]] * ROWS)
    pixels = torch.randn(ROWS * 16, 3 * 2 * 14 * 14)
    more = {"pixel_values": pixels, "image_grid_thw": grid, "mm_token_type_ids": (ids == IMAGE).long()}
    return Qwen2VLForConditionalGeneration(config), {"input_ids": ids, **more}


def gemma3(layers: int, vision: int) -> tuple[Any, dict[str, Any]]:
    """Build a Gemma 3 with images of 4 tokens."""
    import torch
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    text = {**TEXT, "num_hidden_layers": layers, "sliding_window": 32, "query_pre_attn_scalar": 16}
    tower = {**VISION, "model_type": "siglip_vision_model", "num_hidden_layers": vision, "vision_use_head": False}
    config = Gemma3Config(text_config=text, vision_config=tower, mm_tokens_per_image=4, image_token_index=IMAGE)
    ids = _ids(4)
    more = {"pixel_values": torch.randn(ROWS, 3, 56, 56), "token_type_ids": (ids == IMAGE).long()}
    return Gemma3ForConditionalGeneration(config), {"input_ids": ids, **more}


def llava_next(layers: int, vision: int) -> tuple[Any, dict[str, Any]]:
    """Build a LLaVA-Next; an image of 56 x 56 is seen twice, and takes as many tokens as its features."""
    import torch
    from transformers import LlavaNextConfig, LlavaNextForConditionalGeneration

    text = {**TEXT, "model_type": "llama", "num_hidden_layers": layers}
    tower = {**VISION, "model_type": "clip_vision_model", "num_hidden_layers": vision, "projection_dim": 64}
    config = LlavaNextConfig(
        text_config=text, vision_config=tower, image_token_index=IMAGE, image_grid_pinpoints=[[56, 112], [112, 56]]
    )
    model = LlavaNextForConditionalGeneration(config).eval()
    pixels, sizes = torch.randn(ROWS, 3, 3, 56, 56), torch.tensor([[56, 112]] * ROWS)
    with torch.no_grad():
        features: Any = model.model.get_image_features(pixels, sizes)
    count = len(getattr(features, "pooler_output", features)[0])
    ids = torch.cat([torch.full((ROWS, count), IMAGE), _ids()], dim=1)
    return model, {"input_ids": ids, "pixel_values": pixels, "image_sizes": sizes}


def smolvlm(layers: int, vision: int) -> tuple[Any, dict[str, Any]]:
    """Build a SmolVLM with images of 4 tokens."""
    import torch
    from transformers import SmolVLMConfig, SmolVLMForConditionalGeneration

    text = {**TEXT, "model_type": "llama", "num_hidden_layers": layers}
    tower = {**VISION, "num_hidden_layers": vision}
    config = SmolVLMConfig(text_config=text, vision_config=tower, image_token_id=IMAGE, scale_factor=2, pad_token_id=0)
    return SmolVLMForConditionalGeneration(config), {
        "input_ids": _ids(4),
        "pixel_values": torch.randn(ROWS, 1, 3, 56, 56),
    }


def _text(name: str, **more: Any) -> Callable[..., tuple[Any, dict[str, Any]]]:
    """Return a function that builds a model of a class by the name of its config, without ``Config``."""

    def build(layers: int) -> tuple[Any, dict[str, Any]]:
        import transformers

        kinds = more.get("layer_types")
        own = {**more, "layer_types": [*kinds] * (layers // len(kinds))} if kinds else more
        config = getattr(transformers, f"{name}Config")(**{**TEXT, "num_hidden_layers": layers, **own})
        model = getattr(transformers, f"{name.removesuffix('Text')}ForCausalLM")(config)
        return model, {"input_ids": _ids()}

    return build


MODELS: Mapping[str, tuple[Callable[..., tuple[Any, dict[str, Any]]], tuple[int, ...]]] = {
    "qwen2_vl": (qwen2_vl, (28, 32)),
    "gemma3": (gemma3, (34, 27)),
    "llava_next": (llava_next, (32, 24)),
    "smolvlm": (smolvlm, (30, 12)),
    "qwen3_5": (_text("Qwen3_5Text", layer_types=["linear_attention"] * 3 + ["full_attention"], **LINEAR), (24,)),
    "falcon_h1": (_text("FalconH1", mamba_d_ssm=128, **STATES), (24,)),
    "granitemoehybrid": (
        _text("GraniteMoeHybrid", layer_types=["mamba"] * 3 + ["attention"], shared_intermediate_size=32, **STATES),
        (24,),
    ),
    "mamba2": (_text("Mamba2", num_heads=8, head_dim=16, state_size=8, n_groups=1, chunk_size=16), (24,)),
    "llama": (_text("Llama"), (32,)),
}
"""The models, each with its number of layers, and of those of its vision tower."""


def run(contestant: str, name: str, quick: bool) -> dict[str, float]:
    """Return the processor seconds of one run in this process."""
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)
    build, depths = MODELS[name]
    model, batch = build(*(max(depth // 8, 4) if quick else depth for depth in depths))
    model.eval().requires_grad_(False)
    labels, targets = batch["input_ids"].clone(), ["out_proj"] if name == "mamba2" else ["q_proj", "v_proj"]
    if contestant == "peft":
        import peft

        begin = time.process_time()
        tuned: Any = peft.get_peft_model(model, peft.LoraConfig(r=8, target_modules=targets))
    else:
        import graftc
        import graftc.runtime.api
        import graftc.runtime.compiled

        adapt = {"method": "lora", "rank": 8, "target": {"modules": [f"**.{target}" for target in targets]}}
        begin = time.process_time()
        tuned = graftc.compile({"adapt": [adapt]}, model, example_inputs=batch)
    figures: dict[str, float] = {}

    def clock(figure: str, call: Callable[[], Any], since: float | None = None) -> None:
        started = time.process_time() if since is None else since
        call()
        figures[figure] = time.process_time() - started

    tuned.train()
    clock("first", lambda: tuned(**batch, labels=labels).loss.backward(), begin)
    clock("step", lambda: tuned(**batch, labels=labels).loss.backward())
    tuned.eval()
    clock("tokens", lambda: tuned.generate(**batch, max_new_tokens=4, do_sample=False))
    clock("again", lambda: tuned.generate(**batch, max_new_tokens=4, do_sample=False))
    return figures


def _in_a_process(contestant: str, name: str, quick: bool, cache: str) -> dict[str, float]:
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.depth", "--run", contestant, "--only", name]
    environment = {**os.environ, "GRAFTC_CACHE": cache, "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        [*command, *(["--quick"] if quick else [])], env=environment, capture_output=True, text=True, check=False
    )
    if result.returncode:
        raise SystemExit(f"{name} with {contestant}: {result.stderr.strip().splitlines()[-1]}")
    found: dict[str, float] = json.loads(result.stdout.splitlines()[-1])
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command."""
    options_of = parser("python -m benchmarks.depth", "Time starting at real depth, beside peft.", 3)
    options_of.add_argument("--only", choices=MODELS, help="one of the models")
    options_of.add_argument("--run", choices=CONTESTANTS, help="run one contestant in this process")
    options = parse(options_of, arguments)
    if options.run:
        print(json.dumps(run(options.run, options.only, options.quick)))
        return 0
    found: dict[str, dict[str, list[dict[str, float]]]] = {}
    for name in [options.only] if options.only else MODELS:
        runs = found[name] = {contestant: [] for contestant in CONTESTANTS}
        for number in range(options.rounds):
            with tempfile.TemporaryDirectory() as cache:
                for contestant in CONTESTANTS:
                    runs[contestant].append(_in_a_process(contestant, name, options.quick, cache))
            print(f"{name}: round {number + 1} of {options.rounds}", file=sys.stderr, flush=True)
    lines = ["# Starting at real depth", "", f"`{command_line('python -m benchmarks.depth', arguments)}`", ""]
    lines += [f"Processor seconds, one thread, medians of {options.rounds} rounds.", ""]
    lines += [f"| model | {' | '.join(COLUMNS.values())} |", f"| --- |{' ---: |' * len(COLUMNS)}"]
    for name, runs in found.items():
        for contestant, figures in runs.items():
            medians = [f"{statistics.median(each[column] for each in figures):.2f}" for column in COLUMNS]
            depths = " + ".join(map(str, MODELS[name][1]))
            lines.append(f"| {name} {depths}, {contestant} | {' | '.join(medians)} |")
    write(options.out, "depth", {"command": sys.argv, "runs": found}, "\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
