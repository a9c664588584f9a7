"""Text-only models whose layers are more than attention and feed-forward: experts, recurrent states."""

from __future__ import annotations

from typing import Any

from tests.zoo.model import LANGUAGE, VOCABULARY, Small, built, texts


def _batches() -> tuple[dict[str, Any], dict[str, Any]]:
    """Return texts of different lengths, padded in front, with labels."""
    return texts([([], 11), ([], 8), ([], 5)], 0), texts([([], 17), ([], 4)], 1)


def mixtral() -> Small:
    """Experts: values decide which tokens go to which expert."""
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(**LANGUAGE, num_local_experts=4, num_experts_per_tok=2)
    first, second = _batches()
    return Small(built(MixtralForCausalLM, config), first, second, generates=True)


def mamba2() -> Small:
    """No attention: states are passed between chunks of 16 tokens, one chunk in one batch and two in the other."""
    from transformers import Mamba2Config, Mamba2ForCausalLM

    config = Mamba2Config(
        vocab_size=VOCABULARY,
        hidden_size=64,
        num_hidden_layers=2,
        state_size=16,
        head_dim=16,
        num_heads=8,
        n_groups=1,
        chunk_size=16,
        pad_token_id=0,
        use_cache=False,
    )
    first, second = _batches()
    return Small(
        built(Mamba2ForCausalLM, config),
        first,
        second,
        generates=True,
        target={"role": "mixer"},
        fallback="**.{in_proj,out_proj}",
    )


def jamba() -> Small:
    """Layers that alternate between a recurrent state and attention with experts."""
    from transformers import JambaConfig, JambaForCausalLM

    shared = {name: value for name, value in LANGUAGE.items() if name not in ("head_dim", "num_hidden_layers")}
    config = JambaConfig(
        **shared,
        num_hidden_layers=4,
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=2,
        expert_layer_offset=1,
        num_experts=4,
        num_experts_per_tok=2,
        mamba_d_state=8,
        mamba_dt_rank=4,
    )
    first, second = _batches()
    target = {"modules": "**.{q_proj,v_proj,in_proj}"}
    return Small(built(JambaForCausalLM, config), first, second, generates=True, target=target)


def falcon_h1() -> Small:
    """Attention and a recurrent state side by side in each layer."""
    from transformers import FalconH1Config, FalconH1ForCausalLM

    config = FalconH1Config(
        **LANGUAGE,
        mamba_d_ssm=64,
        mamba_n_heads=4,
        mamba_d_head=16,
        mamba_d_state=16,
        mamba_n_groups=1,
        mamba_chunk_size=16,
    )
    first, second = _batches()
    return Small(built(FalconH1ForCausalLM, config), first, second, generates=True)
