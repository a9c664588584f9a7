"""Models whose caches contain more than one growing pair for each layer.

They have states of convolutions and recurrences, or those of decoders that read an encoder.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import graftc
from graftc.passes.core.elements.calls import calls_in
from graftc.passes.core.ir.layers import layer_path
from graftc.testing import perturb
from tests.kit.language_models import CACHE
from tests.runtime.live.models import forced_apart


def recurrent() -> Any:
    from transformers import Mamba2Config, Mamba2ForCausalLM

    torch.manual_seed(0)
    sizes = {"state_size": 8, "head_dim": 8, "num_heads": 8, "n_groups": 1, "chunk_size": 8}
    return Mamba2ForCausalLM(Mamba2Config(vocab_size=50, hidden_size=32, num_hidden_layers=1, **sizes)).eval()


@pytest.mark.full
def test_it_generates_as_its_merged_class_and_an_adapted_convolution_is_refused() -> None:
    model, ids = recurrent(), torch.randint(3, 50, (2, 6))
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    for target, refused in (("**.in_proj", False), ("**.conv1d", True)):
        spec = {"adapt": [{"method": "lora", "rank": 2, "target": {"modules": target}}]}
        compiled = graftc.compile(spec, model, {"input_ids": ids}, cache=False).eval()
        perturb(compiled, 0.3)
        if refused:  # steps read its weight between graphs, where it would be the base's
            with pytest.raises(graftc.GraftError, match=r"GC031|GC140"):
                compiled.generate(input_ids=ids, **options)
            continue
        wanted = compiled.merge().to_transformers().eval().generate(input_ids=ids, **options)
        assert torch.equal(compiled.generate(input_ids=ids, **options), wanted)
        assert not torch.equal(model.generate(input_ids=ids, **options), wanted)


TOKENS = {"vocab_size": 60, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
BLOCKS = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}


def convolving() -> Any:
    from transformers import Lfm2Config, Lfm2ForCausalLM

    torch.manual_seed(0)
    kinds = ["conv", "full_attention", "conv"]
    return Lfm2ForCausalLM(Lfm2Config(**TOKENS, **BLOCKS, num_hidden_layers=3, layer_types=kinds)).eval()


def selective() -> Any:
    from transformers import JambaConfig, JambaForCausalLM

    torch.manual_seed(0)
    periods = {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1}
    config = JambaConfig(**TOKENS, **BLOCKS, **periods, num_hidden_layers=3, num_experts=2, mamba_d_state=4)
    return JambaForCausalLM(config).eval()


@pytest.mark.full
@pytest.mark.sample("convolving")
@pytest.mark.parametrize("build", [convolving, selective])
def test_layers_with_states_are_graphs_in_every_step(build: Any) -> None:
    """Steps of one token write to the states in place, and those of several do not.

    Products of weights that require gradients may be computed in another order (`torch.matmul`), so the source requires
    none either.
    """
    model, ids = build().requires_grad_(False), torch.randint(3, 60, (2, 6))
    spec = graftc.load_spec({"adapt": [{"method": "lora", "rank": 2, "target": {"modules": "**.o*_proj"}}]})
    compiled = forced_apart(spec, model, {"input_ids": ids}).eval()
    layers = {path for path in calls_in(compiled.compilation.flags) if layer_path(path) == path}
    assert len(layers) == 3
    told = []
    for each in (model, compiled):
        with torch.no_grad():
            outputs = [each(input_ids=ids, use_cache=True)]
            for step in (ids[:, :1], ids[:, 1:2], ids[:, :3]):
                outputs.append(each(input_ids=step, use_cache=True, **{CACHE: outputs[-1][CACHE]}))
        told.append([output.logits for output in outputs])
    assert all(torch.equal(own, wanted) for own, wanted in zip(told[1], told[0], strict=True))
    perturb(compiled, 0.3)
    merged = compiled.merge().to_transformers().eval()
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    # Without a cache, a model that unrolls over time is captured again for each length.
    shorter = {"max_new_tokens": 2, "min_new_tokens": 2}
    for more in ({}, {"num_beams": 2}, {"use_cache": False, **shorter}):
        wanted = merged.generate(input_ids=ids, **{**options, **more})
        assert torch.equal(compiled.generate(input_ids=ids, **{**options, **more}), wanted)
    assert not torch.equal(model.generate(input_ids=ids, **options), merged.generate(input_ids=ids, **options))


def listener() -> Any:
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    torch.manual_seed(0)
    sides = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in SIDE.items()}
    config = WhisperConfig(
        **sides,
        d_model=32,
        vocab_size=60,
        num_mel_bins=8,
        max_source_positions=20,
        max_target_positions=24,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=3,
    )
    return WhisperForConditionalGeneration(config).eval()


SIDE = {"layers": 2, "attention_heads": 4, "ffn_dim": 48}


@pytest.mark.full
def test_a_decoder_that_reads_an_encoder_keeps_both_caches() -> None:
    """Split although it is one graph, its layers read the encoder's keys and values once, and then the cache."""
    model = listener()
    sound = torch.randn(2, 8, 40)
    inputs = {"input_features": sound, "decoder_input_ids": torch.randint(3, 60, (2, 5))}
    target = {"modules": "**.{q_proj,k_proj,v_proj}"}
    spec = graftc.load_spec({"adapt": [{"method": "lora", "rank": 2, "target": target}]})
    compiled = forced_apart(spec, model, inputs).eval()
    perturb(compiled, 0.3)
    merged = compiled.merge().to_transformers().eval()
    with torch.no_grad():
        for calls in range(2):
            caches = {}
            for name, each in (("own", compiled), ("merged", merged)):
                first = each(**inputs, use_cache=True)
                step = torch.tensor([[5], [6]])
                again = each(
                    encoder_outputs=(first.encoder_last_hidden_state,),
                    decoder_input_ids=step,
                    use_cache=True,
                    **{CACHE: first[CACHE]},
                )
                caches[name] = again.logits, first.logits, again[CACHE]
            for own, wanted in zip(caches["own"][:2], caches["merged"][:2], strict=True):
                assert torch.allclose(own, wanted, rtol=1e-4, atol=1e-5)
            own, wanted = caches["own"][2], caches["merged"][2]
            assert own.is_updated == wanted.is_updated and own.get_seq_length() == wanted.get_seq_length() == 6
            for part in ("self_attention_cache", "cross_attention_cache"):
                for a, b in zip(getattr(own, part).layers, getattr(wanted, part).layers, strict=True):
                    assert (a.values - b.values).abs().max() <= 1e-5 * b.values.abs().max()
            assert len(compiled.compilation.signatures) <= 5 + calls
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    assert torch.equal(compiled.generate(sound, **options), merged.generate(sound, **options))
