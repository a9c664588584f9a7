"""Small models that cannot be one graph, with batches of different structure: image sizes, padding, text alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from graftc.compiler.capture.signature import request
from graftc.compiler.pipeline import StartingPoint, compile_model
from graftc.runtime.compiled import make_compiled
from graftc.specs.document import Spec


def forced_apart(spec: Spec, model: nn.Module, batch: dict[str, Any]) -> Any:
    """Compile a model layer by layer, even where it could be one graph."""
    axes, flags = request(model, batch)
    start = StartingPoint(0, use_cache=False, level="layers")
    return make_compiled(compile_model(spec, model, axes, flags=flags, start=start))


IMAGE, START, END = 90, 91, 92
VOCABULARY = 100
TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 56,
    "patch_size": 14,
}


def texts(rows: Sequence[tuple[Sequence[int], int]], seed: int) -> dict[str, Tensor]:
    """Return token ids, padded in front, with labels.

    Each of `rows` has the number of image tokens of every image, and the number of words.
    """
    generator = torch.Generator().manual_seed(seed)
    written: list[list[int]] = []
    for images, words in rows:
        shown = [token for count in images for token in (START, *([IMAGE] * count), END)]
        written.append([1, *shown, *torch.randint(10, 80, (words,), generator=generator).tolist()])
    longest = max(map(len, written))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in written])
    mask = (ids != 0).long()
    labels = ids.masked_fill((mask == 0) | (ids >= IMAGE), -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@dataclass(frozen=True)
class Case:
    """A model and two batches."""

    model: nn.Module
    first: dict[str, Any]
    second: dict[str, Any]


def qwen2_vl(width: int = 32) -> Case:
    """A model with images of any size: lengths of windows are values of a tensor, so vision layers are not graphs."""
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    vision = {"depth": 2, "embed_dim": width, "hidden_size": width, "num_heads": 4, "mlp_ratio": 2, "patch_size": 14}
    sections = [width // 32, width // 32, width // 16]
    rope = {"rope_type": "default", "type": "default", "mrope_section": sections, "rope_theta": 10000.0}
    sizes = {"hidden_size": width, "intermediate_size": width * 3 // 2, "head_dim": width // 4}
    config = Qwen2VLConfig(
        text_config={**TEXT, **sizes, "rope_parameters": rope},
        vision_config=vision,
        image_token_id=IMAGE,
        video_token_id=93,
        vision_start_token_id=START,
        vision_end_token_id=END,
    )

    def batch(rows: Sequence[tuple[Sequence[tuple[int, int]], int]], seed: int) -> dict[str, Any]:
        inputs: dict[str, Any] = texts([([h * w // 4 for h, w in sizes], words) for sizes, words in rows], seed)
        sizes = [size for row, _ in rows for size in row]
        generator = torch.Generator().manual_seed(seed)
        inputs["pixel_values"] = torch.randn(sum(h * w for h, w in sizes), 3 * 2 * 14 * 14, generator=generator)
        inputs["image_grid_thw"] = torch.tensor([[1, h, w] for h, w in sizes])
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == IMAGE).long()
        return inputs

    torch.manual_seed(0)
    model = Qwen2VLForConditionalGeneration(config).eval()
    return Case(model, batch([([(4, 4), (4, 8)], 5), ([(6, 4)], 7)], 0), batch([([(8, 4)], 4), ([(4, 4)], 6)], 1))


def gemma3() -> Case:
    """A model with images of one size, located by a mask that is computed from values."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    config = Gemma3Config(
        text_config={**TEXT, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
        vision_config=VISION,
        mm_tokens_per_image=4,
        image_token_index=IMAGE,
        boi_token_index=START,
        eoi_token_index=END,
    )

    def batch(rows: Sequence[int], seed: int) -> dict[str, Any]:
        inputs: dict[str, Any] = texts([([4], words) for words in rows], seed)
        generator = torch.Generator().manual_seed(seed)
        inputs["pixel_values"] = torch.randn(len(rows), 3, 56, 56, generator=generator)
        inputs["token_type_ids"] = (inputs["input_ids"] == IMAGE).long()
        return inputs

    torch.manual_seed(0)
    return Case(Gemma3ForConditionalGeneration(config).eval(), batch([6, 9], 0), batch([12, 4, 7], 1))


def llava() -> Case:
    """A model that is one graph, except in calls with a cache: images come with the first tokens only."""
    from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = {**VISION, "model_type": "clip_vision_model", "projection_dim": 32}
    text = LlamaConfig(**TEXT)
    config = LlavaConfig(text_config=text, vision_config=vision, image_token_index=IMAGE, image_seq_length=16)

    def batch(rows: Sequence[int], seed: int) -> dict[str, Any]:
        inputs: dict[str, Any] = texts([([16], words) for words in rows], seed)
        generator = torch.Generator().manual_seed(seed)
        return {**inputs, "pixel_values": torch.randn(len(rows), 3, 56, 56, generator=generator)}

    torch.manual_seed(0)
    return Case(LlavaForConditionalGeneration(config).eval(), batch([6, 9], 0), batch([12, 4, 7], 1))


class Block(nn.Module):
    """A layer of `Looping`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 24), nn.Linear(24, width)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x)))) * scale


class Looping(nn.Module):
    """A model with as many rounds as a value in its input says, so it cannot be a graph."""

    def __init__(self, width: int = 16, layers: int = 3) -> None:
        super().__init__()
        self.first = nn.Linear(width, width)
        self.layers = nn.ModuleList(Block(width) for _ in range(layers))

    def forward(self, x: Tensor, rounds: Tensor) -> Tensor:
        x = self.first(x)
        for number in range(int(rounds.max().item())):
            for layer in self.layers:
                x = layer(x, scale=1.0 / (number + 1))
        return x


def looping() -> Case:
    torch.manual_seed(0)
    rows = torch.Generator().manual_seed(1)
    first = {"x": torch.randn(2, 5, 16, generator=rows), "rounds": torch.tensor([1, 2])}
    second = {"x": torch.randn(3, 4, 16, generator=rows), "rounds": torch.tensor([3])}
    return Case(Looping().eval(), first, second)


CASES: dict[str, Callable[[], Case]] = {"qwen2_vl": qwen2_vl, "gemma3": gemma3, "looping": looping}
