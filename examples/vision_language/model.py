"""A vision-language model assembled from a small vision tower, a projector and SmolLM2-135M-Instruct."""

from __future__ import annotations

from typing import Any

import torch
from pictures import COLOURS, SHAPES, SIZE, Picture
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from graftc.applications.demo.decoder import find_decoder, load_decoder

PATCH = 16
IMAGE_TOKENS = (SIZE // PATCH) ** 2
IMAGE_TOKEN = "<file_sep>"
"""A token of SmolLM2's code files, which chats do not use; here it represents a patch of a picture."""


def pretrain_tower(pictures: list[Picture], steps: int, batch: int = 64) -> SiglipVisionModel:
    """Train a SigLIP tower (4 layers, 128 wide) whose patches tell the shape and colour on their side of a picture."""
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4}
    tower = SiglipVisionModel(SiglipVisionConfig(image_size=SIZE, patch_size=PATCH, vision_use_head=False, **sizes))
    counts, across = [len(SHAPES), len(COLOURS)], SIZE // PATCH
    head = nn.Linear(128, sum(counts))
    pixels = torch.stack([picture.pixels for picture in pictures])
    sides = [[(thing.shape, thing.colour) for thing in (picture.left, picture.right)] for picture in pictures]
    labels = torch.tensor(sides)[:, torch.arange(IMAGE_TOKENS) % across // (across // 2)]
    optimiser = torch.optim.AdamW([*tower.parameters(), *head.parameters()], lr=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=1e-3, total_steps=steps)
    for step in range(steps):
        rows = torch.randint(0, len(pictures), (batch,))
        logits = head(tower(pixels[rows]).last_hidden_state).split(counts, dim=-1)
        pairs = [(part.flatten(0, 1), labels[rows, :, kind].flatten()) for kind, part in enumerate(logits)]
        loss = sum(nn.functional.cross_entropy(part, wanted) for part, wanted in pairs)
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        schedule.step()
        if step % 50 == 0 or step == steps - 1:
            print(f"  tower, step {step}: loss {loss.item():.3f}", flush=True)
    return tower.eval()


def assemble(tower: SiglipVisionModel, layers: int | None = None) -> tuple[LlavaForConditionalGeneration, Any]:
    """Return a LLaVA of the tower, a new projector and SmolLM2 (all 30 layers by default), and its tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(find_decoder())
    tokenizer.add_tokens([IMAGE_TOKEN], special_tokens=True)  # it has an id already, but the tokenizer would split it
    text = load_decoder(layers)
    config = LlavaConfig(
        vision_config=tower.config,
        text_config=text.config,
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        image_seq_length=IMAGE_TOKENS,
        tie_word_embeddings=True,
    )
    model = LlavaForConditionalGeneration(config)
    model.model.vision_tower.load_state_dict(tower.state_dict())
    model.model.language_model.load_state_dict(text.model.state_dict())
    model.tie_weights()
    return model.eval(), tokenizer


def prompt(question: str) -> str:
    return f"<|im_start|>user\n{IMAGE_TOKEN * IMAGE_TOKENS}{question}<|im_end|>\n<|im_start|>assistant\n"


class Collator:
    """A collator that turns pictures, questions and answers into a batch; only the answers have labels."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        asked = [self.tokenizer(prompt(row["question"]))["input_ids"] for row in rows]
        answered = [self.tokenizer(row["answer"] + "<|im_end|>")["input_ids"] for row in rows]
        longest = max(len(a) + len(b) for a, b in zip(asked, answered, strict=True))
        tokens = torch.full((len(rows), longest), self.tokenizer.pad_token_id)
        labels, mask = torch.full_like(tokens, -100), torch.zeros_like(tokens)
        for row, (start, end) in enumerate(zip(asked, answered, strict=True)):
            tokens[row, : len(start) + len(end)] = torch.tensor(start + end)
            labels[row, len(start) : len(start) + len(end)] = torch.tensor(end)
            mask[row, : len(start) + len(end)] = 1
        pixels = torch.stack([row["picture"].pixels for row in rows])
        return {"input_ids": tokens, "attention_mask": mask, "pixel_values": pixels, "labels": labels}


@torch.no_grad()
def ask(model: Any, tokenizer: Any, picture: Picture, question: str) -> str:
    """Generate the model's answer to one question about one picture."""
    inputs = tokenizer(prompt(question), return_tensors="pt")
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    tokens = model.generate(
        **inputs, pixel_values=picture.pixels[None], max_new_tokens=12, do_sample=False, eos_token_id=end,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return str(tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)).strip()
