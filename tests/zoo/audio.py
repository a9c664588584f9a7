"""Models of sound: among the words of a text, or alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from tests.zoo.model import IMAGE, LANGUAGE, LAYERS, VOCABULARY, Small, built, noise, reaching, texts, tokens

SOUND = IMAGE


def qwen2_audio() -> Small:
    """Sounds of different lengths, padded at the end, four frames a token: lengths are sums of the values of a mask."""
    from transformers import Qwen2AudioConfig, Qwen2AudioForConditionalGeneration

    frames = 100
    audio = {
        "d_model": 64,
        "encoder_layers": 2,
        "encoder_attention_heads": 4,
        "encoder_ffn_dim": 96,
        "num_mel_bins": 16,
        "max_source_positions": frames // 2,
    }
    config = Qwen2AudioConfig(
        text_config={**LANGUAGE, "model_type": "qwen2"},
        audio_config=audio,
        audio_token_index=SOUND,
    )

    def batch(rows: Sequence[tuple[int, int]], seed: int) -> dict[str, Any]:
        return {
            **texts([([length // 4], words) for length, words in rows], seed),
            "input_features": noise(seed, len(rows), 16, frames),
            "feature_attention_mask": reaching([length for length, _ in rows], frames),
        }

    model = built(Qwen2AudioForConditionalGeneration, config)
    return Small(model, batch([(60, 7), (100, 9)], 0), batch([(40, 5), (80, 9), (100, 4)], 1), generates=True)


def voxtral() -> Small:
    """Sounds of one length, eight frames a token: all tokens of a batch form one list and are inserted with a mask."""
    from transformers import VoxtralConfig, VoxtralForConditionalGeneration

    frames = 96
    audio = {
        **LAYERS,
        "intermediate_size": 256,
        "num_mel_bins": 16,
        "max_source_positions": frames // 2,
        "head_dim": 16,
    }
    config = VoxtralConfig(text_config={**LANGUAGE, "model_type": "llama"}, audio_config=audio, audio_token_id=SOUND)

    def batch(words: Sequence[int], seed: int) -> dict[str, Any]:
        return {
            **texts([([frames // 8], count) for count in words], seed),
            "input_features": noise(seed, len(words), 16, frames),
        }

    model = built(VoxtralForConditionalGeneration, config)
    return Small(model, batch((7, 9), 0), batch((5, 9, 4), 1), generates=True)


def granite_speech() -> Small:
    """Sounds whose length differs between batches, in windows of 15 frames that become three tokens each."""
    from transformers import GraniteSpeechConfig, GraniteSpeechForConditionalGeneration

    encoder = {
        "input_dim": 16,
        "num_layers": 2,
        "hidden_dim": 64,
        "feedforward_mult": 2,
        "num_heads": 4,
        "dim_head": 16,
        "output_dim": 8,
        "context_size": 20,
        "max_pos_emb": 32,
        "conv_kernel_size": 3,
    }
    projector = {
        **LAYERS,
        "model_type": "blip_2_qformer",
        "encoder_hidden_size": 64,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    config = GraniteSpeechConfig(
        text_config={**LANGUAGE, "model_type": "granite"},
        encoder_config=encoder,
        projector_config=projector,
        audio_token_index=SOUND,
        has_lora_adapter=False,
        window_size=15,
        downsample_rate=5,
    )

    def batch(length: int, words: Sequence[int], seed: int) -> dict[str, Any]:
        each = length // 15 * 3
        return {
            **texts([([each], count) for count in words], seed),
            "input_features": noise(seed, len(words), length, 16),
            "input_features_mask": torch.ones(len(words), each, dtype=torch.bool),
        }

    model = built(GraniteSpeechForConditionalGeneration, config)
    return Small(model, batch(60, (7, 9), 0), batch(45, (5, 9, 4), 1), generates=True)


def whisper() -> Small:
    """An encoder of sounds of one length and a decoder that gets labels only, of different lengths."""
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    config = WhisperConfig(
        vocab_size=VOCABULARY,
        d_model=64,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=96,
        decoder_ffn_dim=96,
        num_mel_bins=16,
        max_source_positions=50,
        max_target_positions=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=3,
        dropout=0.0,
        suppress_tokens=None,
        begin_suppress_tokens=None,
        use_cache=False,
    )

    def batch(rows: int, words: int, seed: int) -> dict[str, Any]:
        return {"input_features": noise(seed, rows, 16, 100), "labels": tokens(seed, rows, words)}

    return Small(built(WhisperForConditionalGeneration, config), batch(2, 7, 0), batch(3, 11, 1), generates=True)


def wav2vec2() -> Small:
    """Waves of different lengths, padded at the end: the mask of frames is computed from the mask of samples."""
    from transformers import Wav2Vec2Config, Wav2Vec2ForCTC

    config = Wav2Vec2Config(
        vocab_size=32,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=96,
        conv_dim=[32] * 7,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4,
        apply_spec_augment=False,
        layerdrop=0.0,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        activation_dropout=0.0,
        feat_proj_dropout=0.0,
        final_dropout=0.0,
        ctc_zero_infinity=True,
    )

    def batch(lengths: Sequence[int], seed: int) -> dict[str, Any]:
        mask = reaching(lengths, max(lengths))
        return {
            "input_values": noise(seed, *mask.shape) * mask,
            "attention_mask": mask,
            "labels": tokens(seed, len(lengths), 5, low=1, high=30),
        }

    return Small(built(Wav2Vec2ForCTC, config), batch((6000, 8000), 0), batch((5000, 7000, 9000), 1))
