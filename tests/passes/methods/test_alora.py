"""aLoRA: where it acts, what calls with a cache know of it, and that the base's cache can be continued."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graftc
from graftc.compiler.capture.past import tensors_of
from graftc.passes.core.ir.functions import calls
from graftc.specs.errors.diagnostics import GraftWarning
from graftc.testing import largest_difference, outputs_of, same_bits
from graftc.testing.families import tiny
from tests.kit.language_models import CACHE
from tests.kit.models import adapted, fresh
from tests.kit.refusals import no_warning, refused
from tests.kit.specs import varied

FIRST, SECOND = 7, 9
ALORA: dict[str, Any] = {
    "method": "alora",
    "invocation": [FIRST, SECOND],
    "rank": 4,
    "target": {"role": ["attn.q", "attn.k", "attn.v", "ffn.down"]},
}
IDS = torch.tensor(
    [
        [3, 4, FIRST, SECOND, 5, 6, 8, 11],
        [3, FIRST, SECOND, 4, FIRST, SECOND, 5, 6],
        [3, 4, 5, 6, SECOND, FIRST, 8, 10],
        [FIRST, SECOND, 3, 4, 5, 6, FIRST, 10],
    ]
)
STARTS = [2, 4, -1, 0]
GREEDY: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@pytest.fixture(scope="module")
def compiled() -> Any:
    """A tiny Llama with an aLoRA, for tests that only read it."""
    return adapted("llama", ALORA)


def logits_of(model: Any, **inputs: Any) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(**inputs).logits
    return logits


@pytest.mark.sample("llama")
@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_keys_and_values_before_the_invocation(family: str) -> None:
    """They are the bits that transformers computes with the base; those after it are not."""
    model: Any = tiny(family)
    adapter = adapted(model, varied(ALORA, ["attn.k", "attn.v", "ffn.down"]))
    with torch.no_grad():
        theirs = tensors_of(model(input_ids=IDS, use_cache=True).past_key_values)
        ours = tensors_of(adapter(input_ids=IDS, use_cache=True).past_key_values)
    assert theirs.keys() == ours.keys() and len(ours) == 4
    for name, tensor in ours.items():
        same = (tensor.view(torch.int32) == theirs[name].view(torch.int32)).all(3).all(1)
        for row, start in enumerate(STARTS):
            begin = start if start >= 0 else IDS.shape[1]
            assert same[row, :begin].all() and not same[row, begin:].any()


@pytest.mark.full
def test_layers_that_are_alike() -> None:
    """Hooks that add each update from a row's start on give the same outputs; layers in the middle call functions."""
    model: Any = tiny("llama", num_hidden_layers=5)
    adapter = adapted(model, ALORA)
    assert calls(adapter.compilation.program_as_run("eval").graph)
    tensors, hooked = adapter.adapter_state_dict(), copy.deepcopy(model)

    def beside(path: str) -> Any:
        a, b = (tensors[f"{path}.graftc.alora.{part}"] for part in "AB")

        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            result = output.clone()
            for row, start in enumerate(STARTS):
                if start >= 0:
                    result[row, start:] += 16 / 4 * (args[0][row, start:] @ a.T @ b.T)
            return result

        return hook

    paths = dict.fromkeys(name.partition(".graftc.")[0] for name in tensors)
    assert len(paths) == 20
    for path in paths:
        hooked.get_submodule(path).register_forward_hook(beside(path))
    assert largest_difference([logits_of(adapter, input_ids=IDS)], [logits_of(hooked, input_ids=IDS)]) <= 1e-5
    gradients = []
    for options in ({}, {"checkpoint": "layers"}):
        trained = fresh(model, ALORA, **options).train()
        trained.load_adapter_state_dict(tensors)
        trained(input_ids=IDS, labels=IDS).loss.backward()
        own = [parameter.grad for parameter in trained.parameters() if parameter.requires_grad]
        assert all(gradient is not None and bool(gradient.any()) for gradient in own)
        gradients.append(own)
    assert largest_difference(*gradients) <= 1e-6


@pytest.mark.full
def test_adding_minus_zero_keeps_every_bit() -> None:
    """A result of -0 before the invocation stays -0, which a sum with 0 would not."""
    model: Any = tiny("llama")
    for layer in model.model.layers:
        layer.self_attn.v_proj.weight.data.zero_()
        layer.self_attn.v_proj.bias = torch.nn.Parameter(torch.full((24,), -0.0))
    compiled = adapted(model, varied(ALORA, "attn.v"))
    with torch.no_grad():
        value = tensors_of(compiled(input_ids=IDS, use_cache=True)[CACHE])["past_0_value"][0, :, :2]
        base = tensors_of(model(input_ids=IDS, use_cache=True)[CACHE])["past_0_value"][0, :, :2]
    assert torch.equal(value.view(torch.int32), base.view(torch.int32))


@pytest.mark.full
def test_certificate(compiled: Any) -> None:
    """It holds for starts in the text and for given ones, and says how many tokens are equal."""
    reuse = compiled.certify_reuse({"input_ids": IDS})
    assert [row.start for row in reuse.rows] == STARTS
    assert [row.equal for row in reuse.rows] == [2, 4, 8, 0]
    assert (reuse.tokens, reuse.tensors, reuse.continued, reuse.passed) == (8, 4, None, True)
    later = compiled.certify_reuse({"input_ids": IDS[:3], "attention_mask": torch.ones_like(IDS[:3])})
    assert later.continued is True and later.passed
    given = compiled.certify_reuse({"input_ids": IDS[:2], "alora_start": [5, 6]})
    assert [row.equal for row in given.rows] == [5, 6] and given.passed and given.continued
    for wrong in ({"attention_mask": IDS}, {"input_ids": IDS[:1, :0]}, {"input_ids": IDS[:0]}):
        assert refused(compiled.certify_reuse, wrong).code == "GC073"


@pytest.mark.full
def test_certificate_of_what_reaches_earlier() -> None:
    lora = {"method": "lora", "rank": 2, "target": {"role": "attn.k"}}
    both = adapted("llama", ALORA, lora).certify_reuse({"input_ids": IDS[:2]})
    assert not both.passed and both.continued is False and [row.equal for row in both.rows] == [0, 0]
    error = refused(adapted("llama", lora).certify_reuse, {"input_ids": IDS})
    assert (error.code, "no aLoRA" in error.message) == ("GC073", True)


@pytest.mark.slow
def test_a_cache_that_the_base_has_filled(compiled: Any) -> None:
    """The adapted model continues it, and then its own, with the logits of the whole text."""
    ids, model = IDS[:2], tiny("llama").eval()
    whole = logits_of(compiled, input_ids=ids)
    with torch.no_grad():
        cache = model(input_ids=ids[:, :2], use_cache=True)[CACHE]
        parts = [compiled(input_ids=ids[:, a:b], cache=cache).logits for a, b in ((2, 6), (6, 7), (7, 8))]
    # The first row is invoked by the first call and the second by the second of its two invocations.
    assert largest_difference([torch.cat(parts, 1)], [whole[:, 2:]]) <= 2e-6 * float(whole.abs().max())


@pytest.mark.slow
def test_what_a_cache_does_not_tell(compiled: Any) -> None:
    """A cache that has been changed, or filled by another model, says nothing about the tokens in it."""
    ids = IDS[:2]
    with torch.no_grad():
        cache = compiled(input_ids=ids[:, :6], use_cache=True)[CACHE]
        copied = copy.deepcopy(cache)
        expected = compiled(input_ids=ids[:, 6:], cache=copied).logits
        for change in (lambda: cache.crop(-1), lambda: cache.reorder_cache(torch.tensor([1, 0]))):
            change()
        error = refused(compiled, input_ids=ids[:, 5:6], cache=cache)
        assert error.code == "GC140" and "rows 0, 1" in error.message and "alora_start" in str(error.hint)
        cache.reorder_cache(torch.tensor([1, 0]))
        compiled(input_ids=ids[:, 5:6], cache=cache, alora_start=[2, 4])
        again = compiled(input_ids=ids[:, 6:], cache=cache).logits
        with compiled.disabled():
            cache = compiled(input_ids=ids[:, :6], use_cache=True)[CACHE]
        assert refused(compiled, input_ids=ids[:, 6:], cache=cache).code == "GC140"
        assert not torch.equal(compiled(input_ids=ids[:, 6:], cache=cache, alora_start=[2, -1]).logits, expected)
    assert largest_difference([again], [expected]) <= 1e-5


@pytest.mark.full
def test_positions_that_the_caller_gives(compiled: Any) -> None:
    """They replace those in the text, in every form, and are needed where there are no token ids."""
    found = logits_of(compiled, input_ids=IDS)
    vectors = tiny("llama").get_input_embeddings()(IDS).detach()  # type: ignore[operator]
    for given in (STARTS, torch.tensor(STARTS), torch.tensor(STARTS, dtype=torch.int32)):
        assert torch.equal(logits_of(compiled, input_ids=IDS, alora_start=given), found)
    assert largest_difference([logits_of(compiled, inputs_embeds=vectors, alora_start=STARTS)], [found]) <= 1e-5
    with compiled.disabled():
        base = logits_of(compiled, input_ids=IDS)
    assert torch.equal(logits_of(compiled, input_ids=IDS, alora_start=-1), base)
    assert torch.equal(logits_of(compiled, input_ids=IDS, alora_start=[100]), base)
    for wrong in (
        [1, 2],
        [1.0] * 4,
        torch.zeros(4),
        torch.zeros(4, 1, dtype=torch.int64),
        ["first"] * 4,
        -2,
        torch.tensor([0, 1, 2, -2]),
    ):
        assert refused(compiled, input_ids=IDS, alora_start=wrong).code == "GC038"
    error = refused(compiled, inputs_embeds=vectors)
    assert error.code == "GC031" and "alora_start" in str(error.hint)


@pytest.mark.full
def test_generation(compiled: Any) -> None:
    """All ways of generating agree with whole texts, in which the prompt's own invocation counts."""
    expected = compiled.generate(IDS, **GREEDY, use_cache=False)
    assert torch.equal(compiled.generate(IDS, **GREEDY), expected)
    assert torch.equal(compiled.generate(IDS, **GREEDY, alora_start=STARTS), expected)
    assert torch.equal(compiled.generate(IDS, **GREEDY, prefill_chunk_size=3), expected)
    again = compiled.generate(IDS, **GREEDY, num_beams=2, num_return_sequences=2)
    assert torch.equal(again, compiled.generate(IDS, **GREEDY, num_beams=2, num_return_sequences=2, use_cache=False))
    row = IDS[:1]
    assert torch.equal(compiled.generate(row, **GREEDY, prompt_lookup_num_tokens=2), expected[:1])
    for assistant in (tiny("llama").eval(), compiled):
        assert torch.equal(compiled.generate(row, **GREEDY, assistant_model=assistant), expected[:1])
    with compiled.disabled():
        assert torch.equal(compiled.generate(IDS, **GREEDY), tiny("llama").eval().generate(IDS, **GREEDY))  # type: ignore[operator]


@pytest.mark.slow
def test_an_answer_after_the_bases(compiled: Any) -> None:
    """A conversation: the base answers, and its cache continues with the invocation."""
    model: Any = tiny("llama").eval()
    base = model.generate(IDS[2:3], **GREEDY, return_dict_in_generate=True)
    text = torch.cat([base.sequences, torch.tensor([[FIRST, SECOND]])], 1)
    expected = compiled.generate(text, **GREEDY)
    assert torch.equal(compiled.generate(text, **GREEDY, cache=base.past_key_values), expected)
    assert not torch.equal(model.generate(text, **GREEDY), expected)


@pytest.mark.slow
def test_an_answer_that_contains_the_padding_token(compiled: Any) -> None:
    """The base's cache is continued as the text is read, with earlier invocations, if the call says what is masked."""
    model: Any = tiny("llama").eval()
    base = model.generate(IDS, **GREEDY, return_dict_in_generate=True)
    text = torch.cat([base.sequences, torch.tensor([[FIRST, SECOND]] * 4)], 1)
    options = {**GREEDY, "pad_token_id": int(base.sequences[1, -4]), "attention_mask": torch.ones_like(text)}
    expected = compiled.generate(text, **options)
    assert torch.equal(compiled.generate(text, **options, cache=copy.deepcopy(base.past_key_values)), expected)
    whole = text
    for _ in range(GREEDY["max_new_tokens"]):
        tokens = logits_of(compiled, input_ids=whole, alora_start=[12] * 4)[:, -1].argmax(-1, keepdim=True)
        whole = torch.cat([whole, tokens], 1)
    assert torch.equal(whole, expected)


@pytest.mark.slow
def test_padding_counts_as_text(compiled: Any) -> None:
    """An invocation among masked tokens is the last one of its row, as in PEFT."""
    mask = torch.ones_like(IDS)
    mask[1, 4:] = 0
    masked = logits_of(compiled, input_ids=IDS, attention_mask=mask)
    assert torch.equal(masked, logits_of(compiled, input_ids=IDS, attention_mask=mask, alora_start=STARTS))


@pytest.mark.full
def test_two_invocations() -> None:
    """Each adaptation acts from its own invocation on, and both together are neither alone."""
    other = {**ALORA, "name": "other", "invocation": [5]}
    both = adapted("llama", ALORA, other)
    outputs = logits_of(both, input_ids=IDS)
    with both.disabled("other"):
        first = logits_of(both, input_ids=IDS)
        with torch.no_grad():
            cache = both(input_ids=IDS, use_cache=True)[CACHE]
            assert both(input_ids=IDS[:, :1], cache=cache).logits.shape == (4, 1, 101)
    with both.disabled("alora"):
        second = logits_of(both, input_ids=IDS)
    with both.disabled():
        base = logits_of(both, input_ids=IDS)
    assert torch.equal(first[0, :2], base[0, :2]) and not torch.equal(first[0, 2:], base[0, 2:])
    assert torch.equal(second[0, :4], base[0, :4]) and not torch.equal(second[0, 4:], base[0, 4:])
    assert torch.equal(outputs[0, :4], first[0, :4]) and not torch.equal(outputs[0, 4:], first[0, 4:])
    assert both.certify_reuse({"input_ids": IDS}).passed
    assert torch.equal(both.generate(IDS, **GREEDY), both.generate(IDS, **GREEDY, use_cache=False))


@pytest.mark.full
def test_a_bank_with_one_invocation() -> None:
    """Rows choose a slot, and the bank has one start for each row; members with other invocations are refused."""
    members = [{**ALORA, "name": name, "target": {"role": ["attn.q", "attn.v"]}} for name in ("first", "second")]
    bank = adapted("llama", *members, compose={"bank": ["first", "second"]})
    mixed = logits_of(bank, input_ids=IDS, adapter_ids=[0, 1, 0, 1])
    for slot, rows in ((0, [0, 2]), (1, [1, 3])):
        alone = logits_of(bank, input_ids=IDS, adapter_ids=[slot] * 4)
        assert largest_difference([mixed[rows]], [alone[rows]]) <= 1e-5
    generated = bank.generate(IDS, **GREEDY, adapter_ids=[0, 1, 0, 1])
    whole = bank.generate(IDS, **GREEDY, adapter_ids=[0, 1, 0, 1], use_cache=False)
    given = bank.generate(IDS, **GREEDY, adapter_ids=[0, 1, 0, 1], bank_start=STARTS)
    assert torch.equal(generated, whole) and torch.equal(generated, given)
    members[1]["invocation"] = [8]
    assert refused(fresh, "llama", *members, compose={"bank": ["first", "second"]}).code == "GC036"


@pytest.mark.full
def test_compositions_of_additions() -> None:
    """A mean of outputs adds half of each, from the invocation on; so does a mean of parameters."""
    members = [{**ALORA, "name": name, "target": {"role": "attn.q"}} for name in ("first", "second")]
    for of in ("outputs", "parameters"):
        mean = adapted("llama", *members, compose={"average": ["first", "second"], "of": of})
        outputs = logits_of(mean, input_ids=IDS)
        with mean.disabled():
            base = logits_of(mean, input_ids=IDS)
        for row, start in enumerate(STARTS):
            begin = start if start >= 0 else IDS.shape[1]
            assert torch.equal(outputs[row, :begin], base[row, :begin])
            assert begin == IDS.shape[1] or not torch.equal(outputs[row, begin:], base[row, begin:])
        assert mean.certify_reuse({"input_ids": IDS}).passed


@pytest.mark.full
def test_an_artifact(compiled: Any, tmp_path: Path) -> None:
    """It contains the graphs with a cache, and generates as before."""
    expected = compiled.generate(IDS, **GREEDY)
    with no_warning():  # such as GC092, for graphs that cannot be stored
        compiled.save(tmp_path / "artifact")
    loaded = graftc.load(tmp_path / "artifact", tiny("llama")).eval()
    assert same_bits(outputs_of(loaded, {"input_ids": IDS}), outputs_of(compiled, {"input_ids": IDS}))
    assert torch.equal(loaded.generate(IDS, **GREEDY), expected)


@pytest.mark.full
def test_beside_what_folds(tmp_path: Path) -> None:
    """A LoRA folds and the aLoRA stays, on a base that then has the LoRA."""
    lora = {"method": "lora", "rank": 2, "target": {"role": ["attn.o", "ffn.up"]}}
    both = adapted("llama", ALORA, lora)
    partial = both.merge_partially().compiled
    assert [adaptation.method for adaptation in partial.spec.adapt] == ["alora"]
    inputs = {"input_ids": IDS}
    assert largest_difference(outputs_of(partial, inputs), outputs_of(both, inputs)) <= 2e-5
    assert partial.certify_reuse(inputs).passed


@pytest.mark.full
def test_positions_as_an_input_of_an_exported_graph(compiled: Any, tmp_path: Path) -> None:
    """ONNX Runtime finds the invocation itself, or is told where to begin; generating programs are not served."""
    onnxruntime = pytest.importorskip("onnxruntime")
    text = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    wanted = logits_of(compiled, **text)
    for name, more in (("found", {}), ("told", {"alora_start": torch.tensor(STARTS)})):
        path = tmp_path / f"{name}.onnx"
        compiled.export(path, example_inputs={**text, **more})
        session = onnxruntime.InferenceSession(path)
        given = {key: value.numpy() for key, value in {**text, **more}.items()}
        assert {value.name for value in session.get_inputs()} == given.keys()
        assert largest_difference([torch.from_numpy(session.run(["logits"], given)[0])], [wanted]) <= 1e-4
    error = refused(compiled.export, tmp_path / "folder", format="onnx-generate")
    assert error.code == "GC141" and not (tmp_path / "folder").exists()


@pytest.mark.slow
def test_refusals() -> None:
    """Sites that it cannot adapt, and invocations that cannot be found, are errors of the spec."""
    prompt = {"method": "prompt", "length": 3}
    cases: list[tuple[str, str, tuple[dict[str, Any], ...]]] = [
        ("GC002", "llama", ({**ALORA, "invocation": []},)),
        ("GC002", "llama", ({**ALORA, "invocation": [-1]},)),
        ("GC002", "llama", ({**ALORA, "invocation": "text"},)),
        ("GC039", "llama", ({**ALORA, "invocation": [FIRST, 101]},)),
        ("GC017", "t5", (varied(ALORA, "attn.q"),)),
        ("GC017", "vit", (varied(ALORA, "attn.q"),)),
        ("GC017", "llama", (ALORA, prompt)),
        ("GC020", "llama", ({**ALORA, "rank": 30},)),
        ("GC016", "llama", (varied(ALORA, "embed"),)),
        ("GC016", "mixtral", (varied(ALORA, "experts"),)),
    ]
    for code, family, adapt in cases:
        assert refused(fresh, family, *adapt).code == code, adapt


@pytest.mark.full
@pytest.mark.slow
def test_calls_without_an_invocation() -> None:
    """The first call of each kind says so once: nothing would train. So it does of a single token that is ambiguous."""
    compiled = fresh("llama", varied(ALORA, "attn.q"))
    with no_warning():
        compiled(IDS)
    other = fresh("llama", varied(ALORA, "attn.q"))
    with pytest.warns(GraftWarning, match="none of the 1 row") as caught:
        other(IDS[2:3])
    assert [warning.message.code for warning in caught if isinstance(warning.message, GraftWarning)] == ["GC125"]
    short = fresh("llama", varied({**ALORA, "invocation": [FIRST]}, "attn.q"))
    with pytest.warns(GraftWarning, match="2 rows of the call contain several times"):
        short(IDS)
