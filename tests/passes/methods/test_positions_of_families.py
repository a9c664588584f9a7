"""Virtual tokens and shifted prefixes in families with position schemes of their own: offset tables, indexed tables of
sines, distances in scores, and positions counted by masks or ids.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import graftc
from graftc.specs.errors.diagnostics import GraftError
from graftc.testing import perturb, randomise

LENGTH = 5
TOKENS = {"vocab_size": 100, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
WIDE = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, **TOKENS}
USUAL = {**WIDE, "intermediate_size": 96, "max_position_embeddings": 64}
SHORT = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, **TOKENS}
OPT = {**WIDE, "ffn_dim": 96, "word_embed_proj_dim": 64, "max_position_embeddings": 64}
XGLM = {"d_model": 64, "ffn_dim": 96, "num_layers": 2, "attention_heads": 4, "max_position_embeddings": 64, **TOKENS}
NEO = {"hidden_size": 64, "num_layers": 2, "attention_types": [[["global", "local"], 1]], "num_heads": 4}
IDS = {**USUAL, "pad_token_id": 1, "bos_token_id": 0}
EXPERTS = {**USUAL, "num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 2}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "OPT": ("ForCausalLM", OPT),
    "OPT, small tokens": ("ForCausalLM", {**OPT, "word_embed_proj_dim": 32, "do_layer_norm_before": False}),
    "GPTJ": ("ForCausalLM", {**SHORT, "rotary_dim": 8}),
    "CodeGen": ("ForCausalLM", {**SHORT, "rotary_dim": 8}),
    "Llama": ("ForCausalLM", {**USUAL, "num_key_value_heads": 2}),
    "Bloom": ("ForCausalLM", {"hidden_size": 64, "n_layer": 2, "n_head": 4, **TOKENS}),
    "Mpt": ("ForCausalLM", {"d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 64, **TOKENS}),
    "CTRL": ("LMHeadModel", {**SHORT, "dff": 96}),
    "Falcon": ("ForCausalLM", {**WIDE, "alibi": False}),
    "Falcon, distances": ("ForCausalLM", {**WIDE, "alibi": True, "new_decoder_architecture": False}),
    "BioGpt": ("ForCausalLM", USUAL),
    "GPTNeo": ("ForCausalLM", {**NEO, "max_position_embeddings": 64, **TOKENS}),
    "GPTBigCode": ("ForCausalLM", SHORT),
    "XGLM": ("ForCausalLM", XGLM),
    "Roberta": ("ForMaskedLM", IDS),
    "Esm": ("ForMaskedLM", {**IDS, "mask_token_id": 3, "position_embedding_type": "absolute"}),
    "MPNet": ("ForMaskedLM", IDS),
    "Mixtral": ("ForCausalLM", {**USUAL, "num_key_value_heads": 2, "num_local_experts": 4}),
    "Qwen3Moe": ("ForCausalLM", {**EXPERTS, "moe_intermediate_size": 32, "head_dim": 16}),
    "Olmoe": ("ForCausalLM", EXPERTS),
}
FIRST = ("OPT", "Roberta")


def model_of(family: str) -> nn.Module:
    name = family.partition(",")[0]
    head, settings = FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**settings)
    return randomise(getattr(transformers, f"{name}{head}")(config)).eval()


def some(*names: str) -> Callable[[Any], Any]:
    """Parametrize a test with families by name, of which those in `FIRST` run in `make test`."""
    return pytest.mark.parametrize(
        "family", [pytest.param(name, marks=() if name in FIRST else pytest.mark.full) for name in names]
    )


def texts(pad: int, front: bool) -> tuple[Tensor, Tensor]:
    """Three texts, one of them padded, and their mask."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(4, 90, (3, 9), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, slice(0, 3) if front else slice(6, 9)] = 0
    return torch.where(mask == 1, ids, pad), mask


@pytest.mark.sample("Roberta")
@pytest.mark.slow
@some(*(name for name in FAMILIES if name != "CTRL"))
def test_virtual_tokens(family: str) -> None:
    """The outputs equal those of the model itself, called with the embeddings of the longer text."""
    model = model_of(family)
    compiled = graftc.compile({"adapt": [{"method": "prompt", "length": LENGTH}]}, model).eval()
    perturb(compiled)
    pad, counted = model.config.pad_token_id, FAMILIES[family][1] is IDS or family == "Esm"
    ids, mask = texts(pad, front=not counted)
    (vectors,) = compiled.adapter_state_dict().values()
    with torch.no_grad():
        actual = compiled(input_ids=ids, attention_mask=mask).logits
        embeds = torch.cat([vectors.reshape(1, LENGTH, -1).expand(3, -1, -1), model.get_input_embeddings()(ids)], 1)
        given: dict[str, Tensor] = {}
        if counted:
            real = torch.cat([torch.ones(3, LENGTH, dtype=torch.long), mask], 1)
            given["position_ids"] = real.cumsum(1) * real + pad
        longer = torch.cat([torch.ones(3, LENGTH, dtype=torch.long), mask], 1)
        expected = model(inputs_embeds=embeds, attention_mask=longer, **given).logits[:, LENGTH:]
    torch.testing.assert_close(actual[mask == 1], expected[mask == 1], atol=1e-4, rtol=1e-4)


def with_prefix(model: nn.Module, positions: str) -> Any:
    entry = {"method": "prefix", "length": LENGTH, "positions": positions, "target": {"role": "attn"}}
    compiled = graftc.compile({"adapt": [entry]}, model).eval()
    perturb(compiled)
    return compiled


def behind_a_cache(model: nn.Module, compiled: Any, ids: Tensor) -> Tensor:
    """Return the model's logits after a cache that contains the prefix, so that the text's positions begin after it."""
    tensors = sorted(compiled.adapter_state_dict().items())
    keys, values = ([t for name, t in tensors if name.endswith(part)] for part in ("keys", "values"))
    width = model.config.hidden_size // model.config.num_attention_heads
    cache = transformers.DynamicCache()
    for layer, pair in enumerate(zip(keys, values, strict=True)):
        heads = [t.view(1, LENGTH, -1, width).transpose(1, 2).expand(len(ids), -1, -1, -1) for t in pair]
        cache.update(*heads, layer)
    name = "cache" if "cache" in inspect.signature(type(model).forward).parameters else "past_key_values"
    mask = torch.ones(len(ids), ids.shape[1] + LENGTH, dtype=torch.long)
    logits: Tensor = model(input_ids=ids, attention_mask=mask, **{name: cache}).logits
    return logits


DISTANCES = ("Bloom", "Falcon, distances", "Mpt")
ROTATED = ("Llama", "Falcon", "Mixtral", "Qwen3Moe", "Olmoe")
SHIFTED = ("GPTJ", "CodeGen", "OPT", "CTRL", "BioGpt", "GPTNeo", "GPTBigCode", *ROTATED, *DISTANCES)


@pytest.mark.sample("Mixtral")
@pytest.mark.parametrize(
    "family",
    [pytest.param(name, marks=() if name in ("GPTJ", "Mpt") else pytest.mark.full) for name in SHIFTED],
)
def test_a_shifted_prefix(family: str) -> None:
    """A shifted prefix equals a cache in front; an unshifted one does so only if the model uses distances alone."""
    model = model_of(family)
    ids, _ = texts(0, front=True)
    ids = ids.clamp(min=3)
    with torch.no_grad():
        compiled = with_prefix(model, "shifted")
        expected = behind_a_cache(model, compiled, ids)
        torch.testing.assert_close(compiled(input_ids=ids).logits, expected, atol=1e-4, rtol=1e-4)
        other = with_prefix(model, "unshifted")(input_ids=ids).logits
    if family in DISTANCES:
        torch.testing.assert_close(other, expected, atol=1e-4, rtol=1e-4)
    else:
        assert (other - expected).abs().max() > 1e-2 * expected.abs().max()


class Placed(nn.Module):
    """An attention whose tokens get values by position in ways that no offset can be added to."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.table = way, nn.Embedding(50, 32)
        self.q, self.k, self.v, self.o = (nn.Linear(32, 32) for _ in range(4))
        self.register_buffer("places", torch.randn(1, 64, 32))

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.table(input_ids)
        length = input_ids.shape[1]
        if self.way == "slice":
            x = x + self.places[:, :length]
        if self.way == "count":
            x = x * torch.arange(length, device=x.device, dtype=x.dtype)[:, None].add(1).log()
        if self.way == "rotated":
            x = x * self.places[:, :length].sigmoid()
        q, k, v = (m(x).unflatten(-1, (4, 8)).transpose(1, 2) for m in (self.q, self.k, self.v))
        attended = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        outputs: Tensor = x + self.o(attended.transpose(1, 2).flatten(2))
        return outputs


@pytest.mark.slow
@pytest.mark.parametrize("way", ["slice", "count", "rotated"])
def test_positions_that_cannot_be_shifted(way: str) -> None:
    entry = {"method": "prefix", "length": LENGTH, "positions": "shifted", "target": {"role": "attn"}}
    given = {"input_ids": torch.randint(0, 50, (2, 9))}
    with pytest.raises(GraftError) as caught:
        graftc.compile({"adapt": [entry]}, Placed(way), given)
    assert caught.value.code == "GC017" and "unshifted" in str(caught.value)
    graftc.compile({"adapt": [entry]}, Placed("none"), given)
    graftc.compile({"adapt": [{**entry, "positions": "unshifted"}]}, Placed(way), given)


@pytest.mark.full
def test_a_prefix_takes_places_of_biases() -> None:
    """MPT has biases for as many keys as its longest text, so the text has to be shorter by the prefix."""
    model = model_of("Mpt")
    compiled = with_prefix(model, "unshifted")
    ids = torch.randint(3, 90, (2, 64 - LENGTH), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = behind_a_cache(model, compiled, ids)
        torch.testing.assert_close(compiled(input_ids=ids).logits, expected, atol=1e-4, rtol=1e-4)
        with pytest.raises(GraftError) as caught:
            compiled(input_ids=torch.cat([ids, ids[:, :1]], 1))
    assert caught.value.code == "GC020" and "5 of the 64 positions" in str(caught.value)


class Indexed(nn.Module):
    """An attention with rotations from a table, cut to the text or computed in the call, and indexed by positions."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.table = way, nn.Embedding(50, 32)
        self.q, self.k, self.v, self.o = (nn.Linear(32, 32) for _ in range(4))
        self.register_buffer("angles", torch.outer(torch.arange(64.0), torch.arange(8.0) / 8))

    def forward(self, input_ids: Tensor | None = None, inputs_embeds: Tensor | None = None) -> Tensor:
        x = self.table(input_ids) if inputs_embeds is None else inputs_embeds
        length = x.shape[1]
        positions = torch.arange(length, device=x.device)[None]
        if self.way == "cut":
            angles = self.angles[:length][positions]
        else:
            angles = torch.outer(torch.arange(64, device=x.device).to(x.dtype), self.angles[1])[positions]
        q, k, v = (m(x).unflatten(-1, (4, 8)).transpose(1, 2) for m in (self.q, self.k, self.v))
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        q, k = (t * cos + torch.cat([-t[..., 4:], t[..., :4]], -1) * sin for t in (q, k))
        attended = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        outputs: Tensor = x + self.o(attended.transpose(1, 2).flatten(2))
        return outputs

    def get_input_embeddings(self) -> nn.Module:
        return self.table


@pytest.mark.slow
@pytest.mark.parametrize("way", ["cut", "made"])
def test_a_table_that_positions_are_looked_up_in(way: str) -> None:
    """A table that is cut to the text sets no bound, and one that is computed from positions is shifted once."""
    torch.manual_seed(0)
    model, ids = Indexed(way).eval(), torch.randint(0, 50, (2, 9))
    compiled = graftc.compile({"adapt": [{"method": "prompt", "length": 3}]}, model, {"input_ids": ids}).eval()
    (prompt,) = compiled.adapter_state_dict().values()
    with torch.no_grad():
        whole = torch.cat([prompt.expand(2, -1, -1), model.table(ids)], 1)
        torch.testing.assert_close(compiled(input_ids=ids), model(inputs_embeds=whole)[:, 3:])
