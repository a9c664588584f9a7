"""Packed batches: texts in one row, which their positions tell apart."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

import graftc
from graftc.specs.errors.diagnostics import GraftWarning
from graftc.testing.families import tiny
from graftc.testing.perturbing import perturb
from tests.kit.models import adapted
from tests.kit.specs import lora

LENGTHS = (5, 3, 6)
ROW = torch.randint(3, 90, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(0))
POSITIONS = torch.cat([torch.arange(n) for n in LENGTHS])[None]
TEXTS = torch.split(ROW[0], LENGTHS)


@pytest.fixture(scope="module")
def llama() -> Any:
    return adapted("llama", lora(["attn.q", "ffn.up"]), noise=0.1)


def logits(compiled: Any, row: Tensor, **inputs: Any) -> Tensor:
    with torch.no_grad():
        output: Tensor = compiled(input_ids=row, position_ids=POSITIONS, **inputs).logits
    return output[0]


def leaks(compiled: Any, **inputs: Any) -> bool:
    """Return whether a token of the first text makes a difference to the others."""
    other = ROW.clone()
    other[0, 1] = (ROW[0, 1] + 1) % 90
    one, two = logits(compiled, ROW, **inputs), logits(compiled, other, **inputs)
    assert not torch.allclose(one[1:5], two[1:5]), "it makes none within its own text"
    return not torch.equal(one[5:], two[5:])


@pytest.mark.full
def test_no_token_attends_across_texts(llama: Any) -> None:
    assert llama.config._attn_implementation == "sdpa"
    assert not leaks(llama)


@pytest.mark.full
def test_packed_texts_give_what_each_gives_alone(llama: Any) -> None:
    """Logits, loss and gradients of packed texts are those of each text alone."""
    packed = torch.split(logits(llama, ROW), LENGTHS)
    with torch.no_grad():
        alone = [llama(input_ids=text[None]).logits[0] for text in TEXTS]
    assert all(torch.allclose(one, two, atol=1e-5) for one, two in zip(packed, alone, strict=True))
    labels = torch.where(POSITIONS == 0, -100, ROW)  # no text predicts the first token of the next
    ids = torch.nn.utils.rnn.pad_sequence(list(TEXTS), batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(text) for text in TEXTS], batch_first=True)
    padded = torch.where(mask == 1, ids, -100)
    results = []
    for inputs in (
        {"input_ids": ROW, "position_ids": POSITIONS, "labels": labels},
        {"input_ids": ids, "attention_mask": mask, "labels": padded},
    ):
        llama.zero_grad()
        loss = llama(**inputs).loss
        loss.backward()
        results.append((loss.detach(), [p.grad.clone() for p in llama.parameters() if p.grad is not None]))
    (one, mine), (two, theirs) = results
    assert torch.allclose(one, two, rtol=1e-5) and len(mine) == len(theirs) > 0
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(mine, theirs, strict=True))


@pytest.mark.full
def test_with_a_mask_they_attend_across_texts_and_a_warning_says_so(llama: Any) -> None:
    """The source model does the same."""
    source = llama.compilation.model.eval()
    ones = torch.ones_like(ROW)
    with pytest.warns(GraftWarning, match="GC120"):
        assert leaks(llama, attention_mask=ones)
    assert leaks(source, attention_mask=ones)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert leaks(llama, attention_mask=ones), "once is enough"


def test_positions_of_padding_are_not_taken_for_packed_texts() -> None:
    from graftc.runtime.packed_batches import warn_of_packed

    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for fill in (0, 1):
            positions = (mask.cumsum(1) - 1).masked_fill(mask == 0, fill)
            warn_of_packed({"attention_mask": mask, "position_ids": positions}, ["prompt"], list)


@pytest.mark.full
@pytest.mark.parametrize("method", ["prefix", "prompt"])
def test_every_text_sees_a_prefix_and_a_warning_says_where_only_the_first_one_does(method: str) -> None:
    compiled: Any = graftc.compile({"adapt": [{"method": method, "length": 3}]}, tiny("llama"))
    perturb(compiled, 0.3)
    compiled.eval()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        packed = torch.split(logits(compiled, ROW), LENGTHS)
    with torch.no_grad():
        alone = [compiled(input_ids=text[None]).logits[0] for text in TEXTS]
    same = [torch.allclose(one, two, atol=1e-5) for one, two in zip(packed, alone, strict=True)]
    told = [w.message.code for w in caught if isinstance(w.message, GraftWarning)]
    assert (same, told) == (([True] * 3, []) if method == "prefix" else ([True, False, False], ["GC121"]))


@pytest.mark.full
def test_numbers_for_flash_attention_have_no_graphs_of_their_own(llama: Any) -> None:
    sizes = torch.tensor([0, 5, 8, 14], dtype=torch.int32)
    plain = logits(llama, ROW)
    for longest in (6, 7):
        more = {"cu_seq_lens_q": sizes, "cu_seq_lens_k": sizes, "max_length_q": longest, "max_length_k": longest}
        assert torch.equal(logits(llama, ROW, **more), plain)
    given = [s for s in llama.compilation.signatures if any("cu_seq_lens" in name for name in s.inputs)]
    assert len(given) == 1


@pytest.mark.full
def test_gates_are_of_the_row_and_a_warning_says_so() -> None:
    compiled = graftc.compile({"adapt": [{"method": "unipelt"}]}, tiny("llama"))
    perturb(compiled, 0.1)
    with pytest.warns(GraftWarning, match="GC122: the gates of 'unipelt'"):
        assert leaks(compiled.eval())


@pytest.mark.full
def test_a_mask_of_pairs_keeps_texts_apart_without_a_warning() -> None:
    compiled = graftc.compile(
        {"adapt": [{"method": "lora", "rank": 2, "target": {"role": "attn.q"}}]},
        tiny("llama"),
        example_inputs={
            "input_ids": ROW,
            "position_ids": POSITIONS,
            "attention_mask": torch.ones(1, 1, ROW.shape[1], ROW.shape[1], dtype=torch.bool),
        },
    ).eval()
    texts = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    mask = (texts[:, None] == texts[None]).tril()[None, None]
    with warnings.catch_warnings():
        warnings.simplefilter("error", GraftWarning)
        assert not leaks(compiled, attention_mask=mask)
