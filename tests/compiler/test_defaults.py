"""Default inputs: derived from the parameters of ``forward`` and sizes in the config; the model runs on them."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn

import graftc
from graftc.compiler.capture.attempts import first_capture
from graftc.compiler.capture.capture import capture
from graftc.compiler.capture.defaults import default_axes, default_signatures
from graftc.compiler.capture.request import CaptureRequest

TINY: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
}
TEXT = {**TINY, "vocab_size": 51}
IMAGES = {**TINY, "image_size": 16, "patch_size": 8}
PAIR: dict[str, Any] = {
    **{f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in (("layers", 1), ("attention_heads", 2))},
    **{"encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "d_model": 16, "vocab_size": 51, "max_target_positions": 20},
    **{
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "decoder_start_token_id": 1,
        "max_source_positions": 30,
    },
}
RAW = {**TEXT, "conv_dim": [8] * 3, "conv_stride": [5, 2, 2], "conv_kernel": [10, 3, 2], "num_feat_extract_layers": 3}
# 250 samples become 49, then 24, then 12 frames.
RAW |= {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}


def dual() -> nn.Module:
    text, images = {**TEXT, "projection_dim": 8}, {**IMAGES, "projection_dim": 8}
    return tf.CLIPModel(tf.CLIPConfig(text_config=text, vision_config=images, projection_dim=8))


MODELS: dict[str, tuple[Callable[[], nn.Module], dict[str, tuple[int | str, ...]]]] = {
    "text": (
        lambda: tf.BertModel(tf.BertConfig(**TEXT)),
        {"input_ids": ("batch", "sequence"), "attention_mask": ("batch", "sequence")},
    ),
    "text to text": (
        lambda: tf.BartForConditionalGeneration(tf.BartConfig(**PAIR)),
        {
            "input_ids": ("batch", "sequence"),
            "attention_mask": ("batch", "sequence"),
            "decoder_input_ids": ("batch", "target_sequence"),
        },
    ),
    "a decoder that wants the same text": (
        lambda: tf.BartForSequenceClassification(tf.BartConfig(**PAIR)),
        {"input_ids": ("batch", "sequence"), "attention_mask": ("batch", "sequence")},
    ),
    "spectrograms of fixed length": (
        lambda: tf.WhisperForConditionalGeneration(tf.WhisperConfig(**PAIR, num_mel_bins=12)),
        {"input_features": ("batch", 12, 60), "decoder_input_ids": ("batch", "target_sequence")},
    ),
    "frames of features": (
        lambda: tf.Speech2TextForConditionalGeneration(
            tf.Speech2TextConfig(**PAIR, input_feat_per_channel=12, conv_channels=16)
        ),
        {"input_features": ("batch", "sequence", 12), "decoder_input_ids": ("batch", "target_sequence")},
    ),
    "raw audio": (
        lambda: tf.Wav2Vec2ForCTC(tf.Wav2Vec2Config(**RAW)),
        {"input_values": ("batch", 250)},
    ),
    "spectrograms as images": (
        lambda: tf.ASTForAudioClassification(tf.ASTConfig(**TINY, max_length=40, num_mel_bins=20)),
        {"input_values": ("batch", 40, 20)},
    ),
    "images": (
        lambda: tf.ViTForImageClassification(tf.ViTConfig(**{**IMAGES, "image_size": [16, 24]})),
        {"pixel_values": ("batch", 3, 16, 24)},
    ),
    "images of a size that no one says": (
        lambda: tf.ResNetForImageClassification(
            tf.ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], num_channels=1)
        ),
        {"pixel_values": ("batch", 1, 224, 224)},
    ),
    "videos": (
        lambda: tf.VideoMAEForVideoClassification(tf.VideoMAEConfig(**IMAGES, num_frames=4)),
        {"pixel_values": ("batch", 4, 3, 16, 16)},
    ),
    "images to text": (
        lambda: tf.VisionEncoderDecoderModel(
            encoder=tf.ViTModel(tf.ViTConfig(**IMAGES)),
            decoder=tf.GPT2LMHeadModel(
                tf.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=51, add_cross_attention=True)
            ),
        ),
        {"pixel_values": ("batch", 3, 16, 16), "decoder_input_ids": ("batch", "target_sequence")},
    ),
    "text and images": (
        dual,
        {
            "input_ids": ("batch", "sequence"),
            "pixel_values": ("batch", 3, 16, 16),
            "attention_mask": ("batch", "sequence"),
        },
    ),
}


@pytest.mark.full
@pytest.mark.parametrize("name", list(MODELS))
def test_default_inputs_are_captured(name: str) -> None:
    make, expected = MODELS[name]
    model = make().eval()
    program = first_capture(model, None, lambda axes: capture(CaptureRequest.of(model, axes))).program
    assert {spec.name: spec.shape for spec in program.inputs} == expected


class Stub(nn.Module):
    """A model that declares its main input and has a config."""

    def __init__(self, main: str, **config: Any) -> None:
        super().__init__()
        self.main_input_name = main
        self.config = SimpleNamespace(**config)

    def forward(self, pixel_values: Tensor | None = None, inputs_embeds: Tensor | None = None) -> None: ...


@pytest.mark.parametrize(
    "size, expected",
    [(16, (16, 16)), ((16, 24), (16, 24)), ({"height": 8, "width": 12}, (8, 12)), ({"shortest_edge": 20}, (20, 20))],
)
def test_image_sizes(size: Any, expected: tuple[int, int]) -> None:
    (axis,) = default_axes(Stub("pixel_values", image_size=size, num_channels=1))
    assert axis.axes == ("batch", 1, *expected)
    (axis,) = default_axes(Stub("pixel_values", vision_config=SimpleNamespace(image_size=size, in_chans=2)))
    assert axis.axes == ("batch", 2, *expected)


class Needs(nn.Module):
    """A model without a main input that requires two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, input_ids: Tensor, position_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.head(self.table(input_ids) + self.table(position_ids))


@pytest.mark.slow
def test_required_inputs_of_known_names_are_found() -> None:
    model = Needs().eval()
    adapted = graftc.compile({"adapt": [{"method": "lora", "target": {"modules": "head"}, "rank": 2}]}, model).eval()
    assert adapted.program().signature == ("input_ids", "position_ids", "attention_mask")
    ids = torch.randint(0, 9, (2, 5))
    with torch.no_grad():
        assert torch.equal(adapted(ids, ids), model(ids, ids))


class Unknown(Needs):
    def forward(self, input_ids: Tensor, temperature: Tensor) -> Tensor:  # type: ignore[override]
        return self.head(self.table(input_ids)) * temperature


def test_an_input_of_unknown_name_is_named_in_the_error() -> None:
    with pytest.raises(graftc.GraftError, match=r"GC030: the input 'temperature' of Unknown(.|\n)*example_inputs"):
        list(default_signatures(Unknown()))
