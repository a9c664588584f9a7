"""PASTA: its contract, and equality with plain torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import graftc
from graftc.specs.errors.diagnostics import GraftError
from graftc.testing import (
    FAMILIES,
    DeploymentContract,
    MethodContract,
    largest_difference,
    outputs_of,
    perturb,
    same_bits,
)
from graftc.testing.compare import flat, inputs_for
from graftc.testing.families import tiny
from tests.kit.models import adapted
from tests.kit.specs import varied

CLS, SEP, PAD = 5, 7, 0
PASTA: dict[str, Any] = {"method": "pasta", "special_tokens": [CLS, SEP]}
MANY: dict[str, Any] = {"method": "pasta", "special_tokens": list(range(40))}
WITH_TOKENS = tuple(family for family in FAMILIES if family != "vit")


class TestPasta(MethodContract):
    """PASTA as defined by its authors, on every family that reads tokens."""

    cacheable = False
    adaptation: ClassVar[dict[str, Any]] = {**MANY, "slots": 3, "dropout": 0.0}
    families = WITH_TOKENS


class TestShared(MethodContract):
    """PASTA with one vector for all slots, starting from zeros, with dropout."""

    variant = True
    cacheable = False
    adaptation: ClassVar[dict[str, Any]] = {**MANY, "shared": True, "init": "zeros"}
    families = WITH_TOKENS


class TestDeployed(DeploymentContract):
    """Export and compilation of PASTA."""

    adaptation: ClassVar[dict[str, Any]] = {**MANY, "slots": 3}
    families = ("bert", "gpt2", "t5")


def texts() -> dict[str, Tensor]:
    """A padded batch: a pair, a single text, one without a separator, and one with more special tokens than slots."""
    rows = [
        [CLS, 11, 12, SEP, 13, 14, 15, SEP],
        [CLS, 11, 12, 13, SEP, PAD, PAD, PAD],
        [CLS, 21, PAD, PAD, PAD, PAD, PAD, PAD],
        [CLS, SEP, 31, SEP, 32, SEP, 33, SEP],
    ]
    ids = torch.tensor(rows)
    return {"input_ids": ids, "attention_mask": (ids != PAD).long(), "token_type_ids": (ids == 13).long()}


def slots_of(ids: Tensor, special: tuple[int, ...], count: int) -> list[tuple[int, int, int]]:
    """Return row, position and slot of every special token, one at a time."""
    slots = []
    for row, tokens in enumerate(ids.tolist()):
        number = 0
        for position, token in enumerate(tokens):
            if token in special:
                slots.append((row, position, min(number, count - 1)))
                number += 1
    return slots


@pytest.mark.full
@pytest.mark.parametrize("slots", [1, 2, 3])
@pytest.mark.parametrize("shared", [False, True])
def test_the_authors_function(slots: int, shared: bool) -> None:
    """Hooks before every layer of the base give the same outputs, for rows with different numbers of separators."""
    model: Any = tiny("bert")
    compiled, inputs = adapted(model, varied(PASTA, slots=slots, shared=shared), noise=0.3), texts()
    tensors = compiled.adapter_state_dict()

    def hook(layer: int) -> Any:
        vectors = tensors[f"bert.encoder.layer.{layer}.graftc.pasta.layer_in.vectors"]
        assert vectors.shape == (1 if shared else slots, 48)

        def add(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            hidden = args[0].clone()
            for row, position, slot in slots_of(inputs["input_ids"], (CLS, SEP), slots):
                hidden[row, position] += vectors[0 if shared else slot]
            return (hidden, *args[1:])

        return add

    actual = outputs_of(compiled, inputs)
    for number, layer in enumerate(model.bert.encoder.layer):
        layer.register_forward_pre_hook(hook(number))
    expected = outputs_of(model, inputs)
    assert largest_difference(actual, expected) <= 1e-6
    assert largest_difference(actual, outputs_of(tiny("bert"), inputs)) > 1e-2


@pytest.mark.slow
@pytest.mark.sample("bert")
@pytest.mark.parametrize("family", WITH_TOKENS)
def test_zeros_are_the_base(family: str) -> None:
    """The start `zeros` gives the base to the bit."""
    model = tiny(family)
    compiled = graftc.compile({"adapt": [{**MANY, "init": "zeros"}]}, model).eval()
    inputs = inputs_for(compiled)
    assert same_bits(outputs_of(compiled, inputs), outputs_of(model, inputs))
    perturb(compiled, 0.1)
    assert largest_difference(outputs_of(compiled, inputs), outputs_of(model, inputs)) > 1e-3


@pytest.mark.full
def test_only_special_tokens_change_before_the_first_layer() -> None:
    """The first layer's input differs at all special positions and nowhere else; lengths are unchanged."""
    model, inputs = tiny("bert"), texts()
    compiled = adapted(model, PASTA, noise=0.3)
    with torch.no_grad():
        actual = compiled(**inputs, output_hidden_states=True).hidden_states
        base = model(**inputs, output_hidden_states=True).hidden_states
    changed = (actual[0] != base[0]).any(-1)
    assert torch.equal(changed, (inputs["input_ids"] == CLS) | (inputs["input_ids"] == SEP))
    assert [h.shape for h in actual] == [h.shape for h in base]
    assert (actual[1] != base[1]).any(-1)[:, 0].all()


@pytest.mark.full
@pytest.mark.parametrize("family", WITH_TOKENS)
def test_counts(family: str) -> None:
    """The count is ``L k d``, or ``L d`` if the slots share a vector."""
    layers = 4 if family == "t5" else 2
    for shared, vectors in ((False, 3), (True, 1)):
        report = graftc.check({"adapt": [{**PASTA, "slots": 3, "shared": shared}]}, tiny(family))
        assert report.trainable_parameters == report.deployed_parameters == layers * vectors * 48


@pytest.mark.full
def test_padding_changes_nothing() -> None:
    """Longer padding gives the same outputs for the text."""
    compiled, inputs = adapted("bert", PASTA, noise=0.3), texts()
    padded = {name: nn.functional.pad(tensor, (0, 3)) for name, tensor in inputs.items()}
    assert largest_difference(outputs_of(compiled, inputs), outputs_of(compiled, padded)) <= 1e-6


@pytest.mark.full
def test_encoder_and_decoder_read_their_own_tokens() -> None:
    """Special tokens in the encoder's text change its layers, those in the decoder's text only the decoder's."""
    compiled = adapted("t5", PASTA, noise=0.3)
    plain = {"input_ids": torch.full((2, 6), 11), "decoder_input_ids": torch.full((2, 4), 12)}
    plain["attention_mask"] = torch.ones_like(plain["input_ids"])
    marked = {
        **plain,
        "decoder_input_ids": plain["decoder_input_ids"].index_fill(1, torch.tensor([2]), SEP),
    }
    with torch.no_grad():
        base, actual = (tiny("t5")(**marked), compiled(**marked))
        unmarked = compiled(**plain).logits, tiny("t5")(**plain).logits
    assert torch.equal(*unmarked)
    assert torch.equal(actual.encoder_last_hidden_state, base.encoder_last_hidden_state)
    changed = (actual.logits != base.logits).any(-1)
    assert changed[:, 2:].all() and not changed[:, :2].any()
    first = {**plain, "input_ids": plain["input_ids"].index_fill(1, torch.tensor([0]), CLS)}
    with torch.no_grad():
        states = compiled(**first).encoder_last_hidden_state, tiny("t5")(**first).encoder_last_hidden_state
    assert (states[0] != states[1]).any()


@pytest.mark.full
def test_tokens_that_follow_from_labels() -> None:
    """T5 shifts its labels into the decoder's input, in which special tokens are found as well."""
    compiled, labels = adapted("t5", PASTA, noise=0.3), torch.tensor([[11, SEP, 12], [11, 12, 13]])
    ids = torch.full((2, 4), 11)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    shifted = nn.functional.pad(labels, (1, 0))[:, :-1]
    with torch.no_grad():
        actual = compiled(**inputs, labels=labels).logits
        expected = compiled(**inputs, decoder_input_ids=shifted).logits
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.full
def test_dropout_is_of_the_vectors() -> None:
    """Training drops entries of the added vectors and scales the rest; the base's own values are never dropped."""
    model: Any = tiny("bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    compiled = graftc.compile({"adapt": [{**PASTA, "dropout": 0.5, "target": {"layers": 0}}]}, model).train()
    inputs = texts()
    compiled.load_adapter_state_dict({n: torch.ones_like(t) for n, t in compiled.adapter_state_dict().items()})
    with torch.no_grad():
        actual = compiled(**inputs, output_hidden_states=True).hidden_states[0]
        base = model(**inputs, output_hidden_states=True).hidden_states[0]
    special = (inputs["input_ids"] == CLS) | (inputs["input_ids"] == SEP)
    added = (actual - base)[special]
    assert 0.3 < float((added.abs() < 1e-6).float().mean()) < 0.7
    assert bool(((added.abs() < 1e-6) | ((added - 2).abs() < 1e-5)).all())
    assert torch.equal(actual[~special], base[~special])


@pytest.mark.full
def test_beside_other_adaptations() -> None:
    """After an adapter of the previous layer, which applies its norm again, the vectors are added to the result."""
    pfeiffer = {"method": "pfeiffer", "reduction": 4}
    model, inputs = tiny("bert"), texts()
    compiled = graftc.compile({"adapt": [pfeiffer, PASTA]}, model).eval()
    perturb(compiled, 0.3)
    alone = graftc.compile({"adapt": [pfeiffer, {**PASTA, "target": {"layers": 0}}]}, model).eval()
    tensors = compiled.adapter_state_dict()
    alone.load_adapter_state_dict({name: tensors[name] for name in alone.adapter_state_dict()})
    with torch.no_grad():
        actual = compiled(**inputs, output_hidden_states=True).hidden_states[1]
        before = alone(**inputs, output_hidden_states=True).hidden_states[1]
    expected = before.clone()
    vectors = tensors["bert.encoder.layer.1.graftc.pasta.layer_in.vectors"]
    for row, position, slot in slots_of(inputs["input_ids"], (CLS, SEP), 2):
        expected[row, position] += vectors[slot]
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.full
def test_checkpointing() -> None:
    """A layer with vectors that is recomputed in the backward pass gives the same gradients to the bit."""
    grads = []
    for checkpoint in ({}, {"checkpoint": "layers"}):
        compiled = graftc.compile({"adapt": [{**MANY, "dropout": 0.3}], **checkpoint}, tiny("bert"), seed=0).train()
        torch.manual_seed(5)
        flat(compiled(**inputs_for(compiled)))[0].square().mean().backward()
        grads.append([p.grad for p in compiled.parameters() if p.grad is not None])
    assert grads[0] and same_bits(*grads)


@pytest.mark.full
@pytest.mark.parametrize("family", WITH_TOKENS)
def test_a_bank(family: str) -> None:
    """Every row of a batch uses the vectors of the adapter that it chooses."""
    names, ids = ("a", "b", "c"), torch.tensor([2, 0, 1, 1, 0])
    adapt = [{**MANY, "name": name, "slots": 3} for name in names]
    compiled = graftc.compile({"adapt": adapt, "compose": {"bank": list(names)}}, tiny(family)).eval()
    perturb(compiled, 0.3)
    inputs = inputs_for(compiled)
    mixed = outputs_of(compiled, {**inputs, "adapter_ids": ids})
    for number, name in enumerate(names):
        one = graftc.compile({"adapt": [adapt[number]]}, tiny(family)).eval()
        tensors = compiled.adapter_state_dict()
        one.load_adapter_state_dict({n: tensors[n] for n in one.adapter_state_dict()})
        own = outputs_of(one, inputs)
        rows = ids == number
        batched = [(a[rows], b[rows]) for a, b in zip(mixed, own, strict=True) if a.shape[:1] == rows.shape]
        assert batched and max(float((a - b).abs().max()) for a, b in batched) <= 1e-6
        compiled.activate(name)
        assert largest_difference(outputs_of(compiled, inputs), own) <= 1e-6


class Tokens(nn.Module):
    """A model of one layer that reads features instead of tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.TransformerEncoderLayer(12, 2, 20, batch_first=True)])

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[batch, sequence, 12]`` to the same shape."""
        result: Tensor = self.layers[0](x)
        return result


@pytest.mark.full
def test_what_cannot_have_it() -> None:
    """Each case has its code: no ids, ids outside of the table, images, and embeddings instead of tokens."""
    cases: list[tuple[nn.Module, Mapping[str, Any], Any, str]] = [
        (tiny("bert"), {"special_tokens": []}, None, "GC002"),
        (tiny("bert"), {"special_tokens": [3, 3]}, None, "GC002"),
        (tiny("bert"), {"special_tokens": [CLS, 101]}, None, "GC039"),
        (tiny("vit"), {}, None, "GC017"),
        (Tokens(), {}, {"x": torch.randn(2, 4, 12)}, "GC017"),
    ]
    for model, fields, example, code in cases:
        with pytest.raises(GraftError) as caught:
            graftc.compile({"adapt": [{**PASTA, **fields}]}, model, example)
        assert caught.value.code == code
    with pytest.raises(GraftError) as caught:
        graftc.load_spec({"adapt": [{"method": "pasta"}]})
    assert caught.value.code == "GC002" and "special_tokens" in str(caught.value)
    compiled = adapted("bert", PASTA, noise=0.3)
    with pytest.raises(GraftError) as caught:
        compiled(inputs_embeds=torch.randn(2, 4, 48))
    assert caught.value.code == "GC017"
