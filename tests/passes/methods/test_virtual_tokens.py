"""Virtual tokens (prompt tuning, PreEmbed and PreLayer): their contracts, and equality with plain torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import transformers
from torch import Tensor, nn

import graftc
from graftc.passes.core.build.base_activations import computed
from graftc.runtime.compiled import Compiled
from graftc.runtime.export import job
from graftc.runtime.model.runner import runner_of
from graftc.specs.errors.diagnostics import GraftError
from graftc.testing import DeploymentContract, MethodContract, largest_difference, outputs_of, perturb, same_bits
from graftc.testing.compare import inputs_for
from graftc.testing.families import tiny
from graftc.testing.perturbing import randomise

TEXT = ("bert", "roberta", "gpt2", "gpt_neox", "llama", "mixtral", "t5")


def deployed(compiled: Any) -> Any:
    """Return the same model with simpler adaptations, or the model itself."""
    return job.deployed(runner_of(compiled)).module


class TestPrompt(MethodContract):
    """A prompt in front of the text."""

    cacheable = False
    families = TEXT
    adaptation: ClassVar[dict[str, Any]] = {"method": "prompt", "length": 3}


class TestSuffix(MethodContract):
    """A prompt after the last real token of each row, starting from the vectors of some tokens."""

    cacheable = False
    variant = True
    families = TEXT
    adaptation: ClassVar[dict[str, Any]] = {
        "method": "prompt",
        "length": 3,
        "placement": "suffix",
        "init": "tokens",
        "init_tokens": [[5, 6], 7],
    }


class TestPreEmbed(MethodContract):
    """PreEmbed in front of the text and within it."""

    cacheable = False
    variant = True
    families = TEXT
    adaptation: ClassVar[dict[str, Any]] = {"method": "pre_embed", "length": 2, "infix": 3, "infix_after": 7}


class TestPreLayer(MethodContract):
    """PreLayer, before every layer."""

    cacheable = False
    families = TEXT
    adaptation: ClassVar[dict[str, Any]] = {"method": "pre_layer", "length": 3}


class TestInfixPreLayer(MethodContract):
    """PreLayer before every layer, in front of the text and within it."""

    cacheable = False
    variant = True
    families = TEXT
    adaptation: ClassVar[dict[str, Any]] = {"method": "pre_layer", "length": 3, "infix": 2}


class TestPromptDeployed(DeploymentContract):
    """Export and compilation of a prompt after the first token."""

    adaptation: ClassVar[dict[str, Any]] = {"method": "prompt", "length": 3, "placement": "after_bos"}
    families = ("gpt2", "bert", "t5")


class TestPreLayerDeployed(DeploymentContract):
    """Export and compilation of PreLayer."""

    adaptation: ClassVar[dict[str, Any]] = {"method": "pre_layer", "length": 3, "infix": 2}
    families = ("llama", "t5")


IDS = torch.tensor([[5, 17, 33, 8, 61, 90, 22, 7, 41], [70, 12, 9, 55, 3, 28, 66, 14, 81]])
OWN = [9, 44, 73]


def prompted(model: nn.Module, **fields: Any) -> Compiled:
    """A model with a prompt that starts from the words of `OWN`."""
    entry = {"method": "prompt", "length": len(OWN), "init": "tokens", "init_tokens": OWN, **fields}
    return graftc.compile({"adapt": [entry]}, model).eval()


def gemma() -> nn.Module:
    """A Gemma 2, which scales word vectors on the way into its layers."""
    torch.manual_seed(3)
    config = transformers.Gemma2Config(
        vocab_size=101,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=12,
        sliding_window=4,
        attn_implementation="eager",
    )
    return randomised(transformers.Gemma2ForCausalLM(config))


def bart() -> nn.Module:
    """A BART, with two stacks whose token embeddings are scaled when they are looked up."""
    torch.manual_seed(3)
    config = transformers.BartConfig(
        vocab_size=101,
        d_model=48,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=80,
        decoder_ffn_dim=80,
        max_position_embeddings=64,
        scale_embedding=True,
    )
    return randomised(transformers.BartForConditionalGeneration(config))


def randomised(model: nn.Module) -> nn.Module:
    """Give a model weights that are large enough for attention not to be uniform."""
    randomise(model)
    return model.eval()


@pytest.mark.full
@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "llama", "mixtral", "gemma"])
def test_a_prompt_of_real_words_is_a_longer_text(family: str) -> None:
    """A decoder's outputs for the text are those that it gives for the text after these words."""
    model = gemma() if family == "gemma" else tiny(family).eval()
    compiled = prompted(model)
    longer = torch.cat([torch.tensor(OWN).expand(2, -1), IDS], 1)
    with torch.no_grad():
        expected = model(input_ids=longer, attention_mask=torch.ones_like(longer)).logits[:, len(OWN) :]
        actual = compiled(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


def padded(where: str, pad: int = 1) -> tuple[Tensor, Tensor]:
    """`IDS` with RoBERTa's padding token, and a mask; in the middle that token is like any other."""
    ids, mask = IDS.clone(), torch.ones_like(IDS)
    places = {"in front": slice(0, 3), "behind": slice(-2, None), "inside": slice(4, 6)}
    ids[0, places[where]] = pad
    if where != "inside":
        mask[0, places[where]] = 0
    return ids, mask


@pytest.mark.full
@pytest.mark.parametrize("where", ["in front", "behind", "inside"])
def test_positions_that_are_counted_by_tokens(where: str) -> None:
    """RoBERTa counts tokens that are not padding, which embeddings do not show: a prompt of real words still acts like
    a longer text, and PreLayer like a prefix.
    """
    config = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 80}
    torch.manual_seed(5)
    words = transformers.RobertaForMaskedLM(
        transformers.RobertaConfig(**config, vocab_size=101, max_position_embeddings=64)
    )
    model = randomised(words)
    ids, mask = padded(where)
    own = torch.tensor(OWN).expand(2, -1)
    with torch.no_grad():
        expected = model(torch.cat([own, ids], 1), attention_mask=torch.cat([torch.ones_like(own), mask], 1)).logits
        actual = prompted(model)(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(actual[mask == 1], expected[:, len(OWN) :][mask == 1], rtol=0, atol=1e-5)
    compiled = graftc.compile({"adapt": [{"method": "pre_layer", "length": 3}]}, model).eval()
    perturb(compiled, 0.3)
    simpler = deployed(compiled).eval()
    assert [entry.method for entry in simpler.compilation.spec.adapt] == ["prefix"]
    with torch.no_grad():
        ours, theirs = (m(input_ids=ids, attention_mask=mask).logits[mask == 1] for m in (compiled, simpler))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.full
@pytest.mark.parametrize("family", ["t5", "bart"])
def test_words_in_front_of_an_encoder(family: str) -> None:
    """With two stacks the decoder's outputs are those for the longer text, and the encoder's are the text's part."""
    model = bart() if family == "bart" else tiny(family).eval()
    compiled = prompted(model)
    longer = torch.cat([torch.tensor(OWN).expand(2, -1), IDS], 1)
    target = {"decoder_input_ids": IDS[:, :4]}
    with torch.no_grad():
        expected = model(input_ids=longer, attention_mask=torch.ones_like(longer), **target)
        actual = compiled(input_ids=IDS, attention_mask=torch.ones_like(IDS), **target)
    torch.testing.assert_close(actual.logits, expected.logits, rtol=0, atol=1e-5)
    own = expected.encoder_last_hidden_state[:, len(OWN) :]
    torch.testing.assert_close(actual.encoder_last_hidden_state, own, rtol=0, atol=1e-5)


@pytest.mark.full
@pytest.mark.parametrize("target", ["decoder.embed.token", ["encoder.embed.token", "decoder.embed.token"]])
def test_either_stack_may_have_its_own(target: Any) -> None:
    """A decoder's virtual tokens are left out of the logits; an encoder's are visible to cross-attention."""
    model = bart()
    compiled = prompted(model, target={"role": target})
    own, both = torch.tensor(OWN).expand(2, -1), isinstance(target, list)
    longer = torch.cat([own, IDS], 1) if both else IDS
    with torch.no_grad():
        expected = model(
            input_ids=longer,
            attention_mask=torch.ones_like(longer),
            decoder_input_ids=torch.cat([own, IDS[:, :4]], 1),
        ).logits[:, len(OWN) :]
        inputs = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "decoder_input_ids": IDS[:, :4]}
        actual = compiled(**inputs).logits
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
    assert compiled.report.trainable_parameters == len(OWN) * 48 * (2 if both else 1)


@pytest.mark.full
def test_every_output_is_that_of_real_tokens() -> None:
    """Hidden states of all layers and attentions both ways are those of real tokens, with segments and positions."""
    model = transformers.BertModel(tiny("bert").config, add_pooling_layer=True)
    model = randomised(model)
    model.set_attn_implementation("eager")
    flags = {"output_hidden_states": True, "output_attentions": True}
    segments = (torch.arange(9) > 4).long().expand(2, -1)
    places = torch.arange(9).expand(2, -1)
    compiled = prompted(model)
    n = len(OWN)
    with torch.no_grad():
        actual = compiled(
            input_ids=IDS,
            attention_mask=torch.ones_like(IDS),
            token_type_ids=segments,
            position_ids=places,
            **flags,
        )
        longer = torch.cat([torch.tensor(OWN).expand(2, -1), IDS], 1)
        expected = model(
            input_ids=longer,
            attention_mask=torch.ones_like(longer),
            token_type_ids=torch.cat([torch.zeros_like(longer[:, :n]), segments], 1),
            **flags,
        )
        pooled = model.pooler(expected.last_hidden_state[:, n:])
    torch.testing.assert_close(actual.last_hidden_state, expected.last_hidden_state[:, n:], rtol=0, atol=1e-6)
    torch.testing.assert_close(actual.pooler_output, pooled, rtol=0, atol=1e-6)
    assert len(actual.hidden_states) == len(expected.hidden_states) == 3
    for own, other in zip(actual.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(own, other[:, n:], rtol=0, atol=1e-6)
    for own, other in zip(actual.attentions, expected.attentions, strict=True):
        torch.testing.assert_close(own, other[:, :, n:, n:], rtol=0, atol=1e-6)


@pytest.mark.full
def test_a_head_that_looks_for_the_last_token_finds_that_of_the_text() -> None:
    """A classifier on a decoder reads the last real token of each row, and its loss the labels unchanged."""
    torch.manual_seed(3)
    config = transformers.GPT2Config(**{**tiny("gpt2").config.to_dict(), "num_labels": 3, "pad_token_id": 1})
    model = randomised(transformers.GPT2ForSequenceClassification(config))
    compiled = prompted(model)
    ids, mask = IDS.clone(), torch.ones_like(IDS)
    ids[1, 6:], mask[1, 6:] = 1, 0
    labels = torch.tensor([2, 0])
    longer, seen = (
        torch.cat([front, own], 1)
        for front, own in ((torch.tensor(OWN).expand(2, -1), ids), (torch.ones(2, len(OWN), dtype=torch.int64), mask))
    )
    with torch.no_grad():
        expected = model(input_ids=longer, attention_mask=seen, labels=labels)
        actual = compiled(input_ids=ids, attention_mask=mask, labels=labels)
    torch.testing.assert_close(actual.logits, expected.logits, rtol=0, atol=1e-6)
    torch.testing.assert_close(actual.loss, expected.loss, rtol=0, atol=1e-6)


@pytest.mark.full
def test_labels_are_those_of_the_text() -> None:
    """A language model's loss leaves virtual tokens out, and the first word of the text is not one of its targets."""
    model = tiny("gpt2").eval()
    compiled = prompted(model)
    mask = torch.ones_like(IDS)
    with torch.no_grad():
        actual = compiled(input_ids=IDS, attention_mask=mask, labels=IDS)
        expected = nn.functional.cross_entropy(actual.logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
    torch.testing.assert_close(actual.loss, expected, rtol=0, atol=1e-6)


@pytest.mark.full
@pytest.mark.parametrize("place", ["front", "after_bos", "suffix"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_places_in_padded_rows(place: str, side: str) -> None:
    """Each row has its virtual tokens in the right place, every real token keeps its results, and given positions
    continue after them.
    """
    model = tiny("llama").eval()
    compiled = prompted(model, placement=place)
    mask = torch.ones_like(IDS)
    mask[1, 6:] = 0
    mask = mask.flip(1) if side == "left" else mask
    places = (mask.cumsum(1) - 1).clamp_min(0)
    vectors = model.get_input_embeddings()
    n = len(OWN)
    with torch.no_grad():
        actual = compiled(input_ids=IDS, attention_mask=mask, position_ids=places).logits
        for row in range(2):
            last = int((mask[row] * torch.arange(1, 10)).max())
            at = {"front": 0, "after_bos": 1, "suffix": last}[place]
            start = int(places[row, at - 1]) + 1 if at else 0
            words = torch.cat([IDS[row, :at], torch.tensor(OWN), IDS[row, at:]])
            seen = torch.cat([mask[row, :at], torch.ones(n, dtype=torch.int64), mask[row, at:]])
            numbers = torch.cat([places[row, :at], start + torch.arange(n), places[row, at:] + n])
            whole = model(
                inputs_embeds=vectors(words)[None], attention_mask=seen[None], position_ids=numbers[None]
            ).logits[0]
            expected = torch.cat([whole[:at], whole[at + n :]])
            real = mask[row].bool()
            torch.testing.assert_close(actual[row, real], expected[real], rtol=0, atol=1e-5)


@pytest.mark.full
def test_infix_tokens_stand_behind_a_word() -> None:
    """Infix tokens follow the word's first occurrence, or the end of a row that does not contain it."""
    model = tiny("llama").eval()
    entry = {"method": "pre_embed", "length": 1, "infix": 2, "infix_after": 33, "init": "tokens", "init_tokens": OWN}
    compiled = graftc.compile({"adapt": [entry]}, model).eval()
    first, second = (IDS[0].tolist(), IDS[1].tolist())
    rows = [OWN[:1] + first[:3] + OWN[1:] + first[3:], OWN[:1] + second + OWN[1:]]
    kept = [[*range(1, 4), *range(6, 12)], list(range(1, 10))]
    with torch.no_grad():
        actual = compiled(input_ids=IDS).logits
        whole = model(input_ids=torch.tensor(rows)).logits
    for row in range(2):
        torch.testing.assert_close(actual[row], whole[row, kept[row]], rtol=0, atol=1e-5)


@pytest.mark.full
@pytest.mark.parametrize("family", ["bert", "roberta", "gpt2", "gpt_neox", "llama", "mixtral", "gemma"])
def test_pre_layer_is_a_prefix(family: str) -> None:
    """Deployed, virtual tokens in front become keys and values of every attention, rotated if the model rotates."""
    model = gemma() if family == "gemma" else tiny(family).eval()
    compiled = graftc.compile({"adapt": [{"method": "pre_layer", "length": 3}]}, model).eval()
    perturb(compiled, 0.3)
    simpler = deployed(compiled).eval()
    assert [entry.method for entry in simpler.compilation.spec.adapt] == ["prefix"]
    kept = simpler.adapter_state_dict()
    assert compiled.report.deployed_parameters == sum(tensor.numel() for tensor in kept.values())
    for sizes in ((2, 9), (1, 2), (3, 5)):
        inputs = inputs_for(compiled, sizes)
        difference = largest_difference(outputs_of(simpler, inputs), outputs_of(compiled, inputs))
        assert difference <= 1e-5
        with compiled.disabled():
            assert largest_difference(outputs_of(compiled, inputs), outputs_of(simpler, inputs)) > 1e-3


@pytest.mark.full
@pytest.mark.parametrize("fields", [{"infix": 2}, {"target": {"role": "layer.in", "layers": [1]}}])
def test_what_pre_layer_cannot_be_deployed_as(fields: dict[str, Any]) -> None:
    """Tokens within a text, and tokens that a layer computes itself, are not replaced."""
    compiled = graftc.compile({"adapt": [{"method": "pre_layer", "length": 3, **fields}]}, tiny("gpt2"))
    assert deployed(compiled) is compiled


@pytest.mark.full
def test_keys_that_depend_on_the_row_stay() -> None:
    """Gated and chosen updates of keys give virtual tokens other keys in each row, which no constants can replace."""
    slots, update = {"method": "pre_layer", "length": 3}, {"target": {"role": "attn.{k,v}"}, "rank": 2}
    pair = [{"method": "lora", "name": name, **update} for name in ("a", "b")]
    gated = {"method": "unipelt", "parts": ["lora"], "target": {"role": ["attn.k"]}}
    specs: list[dict[str, Any]] = [
        {"adapt": [slots, *pair], "compose": {"gate": ["a", "b"]}},
        {"adapt": [slots, *pair], "compose": {"bank": ["a", "b"]}},
        {"adapt": [slots, gated]},
    ]
    for spec in specs:
        compiled = graftc.compile(spec, tiny("llama"))
        assert deployed(compiled) is compiled
    compiled = graftc.compile({"adapt": [slots, pair[0]]}, tiny("llama")).eval()
    perturb(compiled, 0.3)
    inputs = inputs_for(compiled)
    assert largest_difference(outputs_of(deployed(compiled), inputs), outputs_of(compiled, inputs)) <= 1e-5


@pytest.mark.full
def test_layers_read_the_trained_vectors_whatever_the_text() -> None:
    """At every layer's input, virtual tokens have the trained vectors, even within a text."""
    model = tiny("gpt2").eval()
    compiled = graftc.compile({"adapt": [{"method": "pre_layer", "length": 2, "infix": 1}]}, model).eval()
    perturb(compiled, 0.3)
    tensors = compiled.adapter_state_dict()
    program = compiled.program("eval")
    ends = {
        e.site: e.after for e in program.edits if e.adaptation == "pre_layer" and "layer.in" in e.site and not e.narrow
    }
    inputs = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    store = compiled.compilation.store
    values = computed(list(ends.values()), lambda node: inputs[str(node.target)], store.get)
    for layer, value in enumerate(values):
        vectors = tensors[f"transformer.h.{layer}.graftc.pre_layer.layer_in.tokens"]
        for row in range(2):
            assert torch.equal(value[row, :2], vectors[:2])
            assert torch.equal(value[row, -1], vectors[2])
    assert sum(t.numel() for t in tensors.values()) == 2 * 48 * 3


@pytest.mark.full
def test_initial_vectors() -> None:
    """Vectors start uniform as in the paper, or as words of the vocabulary; a word of several pieces is their mean."""
    model = tiny("gpt2").eval()
    table = model.get_input_embeddings().weight.detach()
    name = "transformer.wte.graftc.prompt.embed_token.tokens"

    def start(**fields: Any) -> Tensor:
        compiled = graftc.compile({"adapt": [{"method": "prompt", "length": 40, **fields}]}, model)
        return compiled.adapter_state_dict()[name]

    uniform = start()
    assert float(uniform.min()) < -0.45 and float(uniform.max()) > 0.45 and float(uniform.abs().max()) <= 0.5
    words = start(init="vocabulary", init_vocabulary=50)
    matches = (words[:, None] == table[None]).all(-1)
    assert bool((matches.sum(1) == 1).all()) and int(matches.nonzero()[:, 1].max()) < 50
    assert len(set(matches.nonzero()[:, 1].tolist())) == 40, "drawn without repetition"
    mixed = start(init="tokens", init_tokens=[[5, 6, 7], 8])
    torch.testing.assert_close(mixed[0], table[5:8].mean(0))
    assert torch.equal(mixed[1], table[8])
    assert bool((mixed[2:, None] == table[None]).all(-1).any(1).all())


@pytest.mark.full
def test_adaptations_beside_and_among_virtual_tokens() -> None:
    """Two prompts follow each other; low-rank adaptations see all tokens, and folding them keeps the prompts."""
    model = tiny("llama").eval()
    spec = {
        "adapt": [
            {"method": "prompt", "name": "first", "length": 1, "init": "tokens", "init_tokens": OWN[:1]},
            {"method": "prompt", "name": "second", "length": 2, "init": "tokens", "init_tokens": OWN[1:]},
            {"method": "lora", "target": {"role": "attn.{q,v}"}, "rank": 2},
        ]
    }
    compiled = graftc.compile(spec, model).eval()
    inputs = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    assert same_bits(outputs_of(compiled, inputs), outputs_of(prompted(model), inputs))
    perturb(compiled, 0.1)
    before = outputs_of(compiled, inputs)
    partial = compiled.merge_partially()
    assert [a.method for a in partial.compiled.compilation.spec.adapt] == ["prompt", "prompt"]
    assert largest_difference(outputs_of(partial.compiled, inputs), before) <= 2e-5


@pytest.mark.full
def test_an_artifact_with_virtual_tokens(tmp_path: Path) -> None:
    """Both captures are saved, and the loaded model gives the same outputs from its saved graphs."""
    model = tiny("gpt2").eval()
    compiled = prompted(model)
    perturb(compiled, 0.1)
    inputs = inputs_for(compiled)
    compiled.save(tmp_path / "artifact")
    files = {path.name for path in (tmp_path / "artifact" / "programs").iterdir()}
    assert {"0.tokens.train.json", "0.embeds.train.json", "0.base.train.json"} <= files
    loaded = graftc.load(tmp_path / "artifact", model=model).eval()
    assert all(capture.cached for capture in loaded.compilation.main.captures)
    assert same_bits(outputs_of(loaded, inputs), outputs_of(compiled, inputs))


@pytest.mark.full
def test_layers_are_recomputed_with_virtual_tokens() -> None:
    """Gradients with and without activation checkpointing are equal to the bit."""
    gradients = []
    for extra in ({}, {"checkpoint": "layers"}):
        spec = {"adapt": [{"method": "prompt", "length": 3}, {"method": "pre_layer", "length": 2, "infix": 1}], **extra}
        compiled = graftc.compile(spec, tiny("gpt2")).train()
        torch.manual_seed(0)
        compiled(input_ids=IDS, labels=IDS).loss.backward()
        gradients.append({n: p.grad for n, p in compiled.named_parameters() if p.requires_grad})
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(gradients[0][n], gradients[1][n]) for n in gradients[0])


class TestErrors:
    """Models, calls and specs that cannot have virtual tokens, each with its code."""

    def test_no_word_vectors(self) -> None:
        """A model of images has no words, which raises GC019."""
        with pytest.raises(GraftError, match="inputs_embeds") as error:
            graftc.compile({"adapt": [{"method": "prompt"}]}, tiny("vit"))
        assert error.value.code == "GC019"
        assert error.value.place is not None and error.value.place.path == "adapt[0].method"

    @pytest.mark.full
    def test_word_vectors_that_are_given(self) -> None:
        """A call with word vectors looks up no words, which raises GC019."""
        compiled = graftc.compile({"adapt": [{"method": "prompt", "length": 3}]}, tiny("gpt2"))
        with pytest.raises(GraftError, match="call the model with input_ids") as error:
            compiled(inputs_embeds=torch.zeros(2, 5, 48))
        assert error.value.code == "GC019"

    @pytest.mark.full
    def test_more_than_the_model_reads(self) -> None:
        """A prompt that fills the table of positions raises GC020."""
        with pytest.raises(GraftError, match="leave no room") as error:
            graftc.compile({"adapt": [{"method": "prompt", "length": 512}]}, tiny("bert"))
        assert error.value.code == "GC020"

    @pytest.mark.full
    @pytest.mark.parametrize("family", ["bert", "gpt2"])
    def test_a_text_that_leaves_no_room(self, family: str) -> None:
        """The call raises GC020 before anything is looked up outside of the table of positions."""
        model = tiny(family, max_position_embeddings=32) if family == "bert" else tiny(family, n_positions=32)
        compiled = graftc.compile({"adapt": [{"method": "prompt", "length": 20}]}, model).eval()
        ids = torch.ones(2, 13, dtype=torch.int64)
        compiled(input_ids=ids[:, :12], attention_mask=ids[:, :12])
        with pytest.raises(
            GraftError, match="13 tokens; besides those of its adaptations, the model can read 12"
        ) as error:
            compiled(input_ids=ids, attention_mask=ids)
        assert error.value.code == "GC020"

    @pytest.mark.full
    def test_a_token_that_is_none(self) -> None:
        """An id outside of the vocabulary raises GC039."""
        with pytest.raises(GraftError, match="101 is not in the vocabulary") as error:
            prompted(tiny("gpt2"), init_tokens=[5, [6, 101]])
        assert error.value.code == "GC039"
        assert error.value.place is not None and error.value.place.path == "adapt[0].init_tokens[1]"

    @pytest.mark.slow
    def test_compositions_of_additions(self) -> None:
        """Virtual tokens are not an addition, so averaging them raises GC036."""
        adapt = [{"method": "prompt", "name": name, "length": 2} for name in ("a", "b")]
        with pytest.raises(GraftError) as error:
            graftc.compile({"adapt": adapt, "compose": {"average": ["a", "b"]}}, tiny("gpt2"))
        assert error.value.code == "GC036"
