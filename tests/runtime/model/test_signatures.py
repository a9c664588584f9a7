"""Other inputs and flags have other graphs over the same tensors: outputs are the source's, adaptations remain."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

import graftc
from graftc.testing import families, perturb, randomise
from tests.kit.comparing import gradients_of

LORA = {"method": "lora", "target": {"role": ["attn.q", "attn.v"]}, "rank": 4}
HIDDEN = 48
CAUSAL = torch.tril(torch.ones(6, 6, dtype=torch.bool))[None, None]


def text(batch: int = 3, length: int = 6) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(batch * 31 + length)
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[-1, -2:] = 0
    return {"input_ids": torch.randint(3, 100, (batch, length), generator=generator), "attention_mask": mask}


def images() -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))}


def frozen(model: nn.Module) -> nn.Module:
    """Return the model in eval mode, with weights frozen as in the compiled model.

    If a weight requires a gradient, ATen picks another kernel for a slice of a sequence, and the last bit differs.
    """
    return model.eval().requires_grad_(False)


def leaves(outputs: Any) -> dict[str, Any]:
    """Return flat outputs by path, without the caches that only a source model returns."""
    from transformers.cache_utils import Cache

    if isinstance(outputs, Mapping):
        outputs = {name: value for name, value in outputs.items() if not isinstance(value, Cache)}
    elif isinstance(outputs, tuple):
        outputs = tuple(value for value in outputs if not isinstance(value, Cache))
    return {pytree.keystr(path): leaf for path, leaf in pytree.tree_leaves_with_path(outputs)}


def assert_same(actual: Any, expected: Any) -> None:
    a, b = leaves(actual), leaves(expected)
    assert type(actual) is type(expected)
    assert list(a) == list(b)
    for path, value in a.items():
        assert torch.equal(value, b[path]) if isinstance(value, Tensor) else value == b[path], path


TEXT_CALLS: dict[str, dict[str, Any]] = {
    "no mask": {"attention_mask": None},
    "float mask": {"attention_mask": text()["attention_mask"].float()},
    "bool mask": {"attention_mask": text()["attention_mask"].bool()},
    "mask of rank 4": {"attention_mask": CAUSAL.expand(3, 1, 6, 6).contiguous()},
    "additive mask for all rows": {"attention_mask": torch.where(CAUSAL, 0.0, torch.finfo(torch.float32).min)},
    "positions": {"position_ids": torch.arange(6).expand(3, 6).contiguous()},
    "positions for all rows": {"position_ids": torch.arange(6)[None]},
    "embeddings": {"input_ids": None, "inputs_embeds": torch.randn(3, 6, HIDDEN)},
    "hidden states": {"output_hidden_states": True},
    "attentions": {"output_attentions": True},
    "a tuple of all": {"output_hidden_states": True, "output_attentions": True, "return_dict": False},
    "usual values": {"output_hidden_states": False, "return_dict": True, "use_cache": False},
}
CALLS: dict[str, tuple[dict[str, Any], dict[str, dict[str, Any]]]] = {
    "bert": (
        text(),
        {
            **TEXT_CALLS,
            "segments": {"token_type_ids": torch.ones(3, 6, dtype=torch.long)},
            "labels": {"labels": torch.tensor([0, 2, 1])},
            "float labels": {"labels": torch.rand(3, 3)},
        },
    ),
    "llama": (
        text(),
        {
            **TEXT_CALLS,
            "labels": {"labels": text()["input_ids"]},
            "last logits": {"logits_to_keep": 2},
            "some logits": {"logits_to_keep": torch.tensor([1, 3])},
            "items": {"labels": text()["input_ids"], "num_items_in_batch": torch.tensor(9)},
            "shifted labels": {"labels": text()["input_ids"], "shift_labels": text()["input_ids"]},
        },
    ),
    "gpt2": (
        text(),
        {
            "labels": {"labels": text()["input_ids"]},
            "last logits": {"logits_to_keep": 1},
            "no mask": {"attention_mask": None},
        },
    ),
    "vit": (
        images(),
        {
            "labels": {"labels": torch.tensor([0, 2, 1])},
            "hidden states": {"output_hidden_states": True},
            "other size": {"interpolate_pos_encoding": True, "pixel_values": torch.randn(2, 3, 48, 40)},
            "same size": {"interpolate_pos_encoding": True},
        },
    ),
    "t5": (
        {**text(), "decoder_input_ids": text(3, 4)["input_ids"]},
        {
            "labels": {"decoder_input_ids": None, "labels": text(3, 5)["input_ids"]},
            "decoder mask": {"decoder_attention_mask": text(3, 4)["attention_mask"]},
            "decoder embeddings": {"decoder_input_ids": None, "decoder_inputs_embeds": torch.randn(3, 4, HIDDEN)},
            "hidden states": {"output_hidden_states": True},
        },
    ),
}


@pytest.mark.full
@pytest.mark.parametrize("family", CALLS)
def test_every_signature_gives_the_source_models_outputs(family: str) -> None:
    model = frozen(families.tiny(family))
    adapted = graftc.compile({"adapt": [LORA]}, model).eval()
    perturb(adapted)
    usual, calls = CALLS[family]
    for changes in ({}, *calls.values()):
        inputs = {name: value for name, value in {**usual, **changes}.items() if value is not None}
        with torch.no_grad():
            with adapted.disabled():
                outputs = adapted(**inputs)
            assert_same(outputs, copy.deepcopy(model)(**inputs))


def head(name: str, **config: Any) -> Callable[[], nn.Module]:
    """Return a function that makes a tiny BERT with one of its heads."""
    import transformers as tf

    tiny = {"hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 80}
    return lambda: getattr(tf, f"BertFor{name}")(tf.BertConfig(**tiny, vocab_size=101, **config))


IDS = text()["input_ids"]
MARKED = IDS.masked_fill(torch.rand(IDS.shape, generator=torch.Generator().manual_seed(2)) < 0.5, -100)
HEADS: dict[str, tuple[Callable[[], nn.Module], dict[str, Tensor]]] = {
    "classes": (head("SequenceClassification", num_labels=3), {"labels": torch.arange(3)}),
    "regression": (head("SequenceClassification", num_labels=1), {"labels": torch.tensor([0.1, 0.5, 0.8])}),
    "tokens": (head("TokenClassification", num_labels=4), {"labels": IDS % 4}),
    "masked": (head("MaskedLM"), {"labels": MARKED}),
    "spans": (
        head("QuestionAnswering"),
        {"start_positions": torch.tensor([0, 2, 1]), "end_positions": torch.tensor([3, 4, 5])},
    ),
    "causal": (lambda: families.tiny("llama"), {"labels": MARKED}),
    "experts": (lambda: families.tiny("mixtral"), {"labels": MARKED}),
    "sequences": (lambda: families.tiny("t5"), {"labels": text(3, 5)["input_ids"]}),
    "images": (lambda: families.tiny("vit"), {"labels": torch.tensor([0, 2, 1]), **images()}),
}


@pytest.mark.full
@pytest.mark.parametrize("name", list(HEADS))
def test_labels_give_the_models_own_loss_to_the_bit(name: str) -> None:
    make, labels = HEADS[name]
    model = make()
    model = frozen(randomise(model))
    adapted = graftc.compile({"adapt": [LORA]}, model).eval()
    perturb(adapted)
    inputs = labels if name == "images" else {**text(), **labels}
    with torch.no_grad():
        expected = copy.deepcopy(model)(**inputs)
        with adapted.disabled():
            assert torch.equal(adapted(**inputs).loss, expected.loss)
        assert not torch.equal(adapted(**inputs).loss, expected.loss)


def switching(family: str) -> tuple[nn.Module, Any, dict[str, dict[str, Any]]]:
    """A model without dropout, adapted and perturbed, and five signatures of one input."""
    changes = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0} if family == "bert" else {}
    model = frozen(families.tiny(family, **changes))
    adapted = graftc.compile({"adapt": [LORA]}, model)
    perturb(adapted)
    usual = text()
    with torch.no_grad():
        embedded = model.get_input_embeddings()(usual["input_ids"])  # type: ignore[operator]
    labels = torch.tensor([0, 2, 1]) if family == "bert" else usual["input_ids"]
    return (
        model,
        adapted,
        {
            "usual": usual,
            "labels": {**usual, "labels": labels},
            "positions": {**usual, "position_ids": torch.arange(6)[None]},
            "embeddings": {"inputs_embeds": embedded, "attention_mask": usual["attention_mask"]},
            "flags": {**usual, "output_hidden_states": True},
        },
    )


@pytest.mark.full
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_no_signature_forgets_an_adaptation(family: str) -> None:
    model, adapted, calls = switching(family)
    folded = adapted.merge().to_transformers()
    for mode in (True, False, True):
        adapted.train(mode)
        folded.train(mode)
        outputs = {}
        for name, inputs in calls.items():
            with torch.no_grad():
                outputs[name] = adapted(**inputs).logits
                torch.testing.assert_close(outputs[name], folded(**inputs).logits, atol=2e-5, rtol=0)
        with torch.no_grad():
            assert float((outputs["usual"] - model(**calls["usual"]).logits).abs().max()) > 1e-2
        for name in calls:
            torch.testing.assert_close(outputs[name], outputs["usual"], atol=1e-6, rtol=0, msg=name)


@pytest.mark.full
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_gradients_reach_the_same_tensors_in_every_signature(family: str) -> None:
    _, adapted, calls = switching(family)
    adapted.train()
    gradients = {}
    for name, inputs in calls.items():
        adapted.zero_grad()
        adapted(**inputs).logits.pow(2).mean().backward()
        gradients[name] = gradients_of(adapted)
    assert gradients["usual"].keys() == {n for n, p in adapted.named_parameters() if p.requires_grad}
    for grads in gradients.values():
        assert grads.keys() == gradients["usual"].keys()
        for tensor, gradient in grads.items():
            torch.testing.assert_close(gradient, gradients["usual"][tensor], atol=1e-6, rtol=1e-4)


def resident() -> int:
    """Return the resident memory of this process, in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.full
def test_switching_never_copies_a_tensor() -> None:
    import gc

    model = families.tiny("llama", vocab_size=30000, hidden_size=480, num_attention_heads=4)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    adapted = graftc.compile({"adapt": [LORA]}, model).eval()
    with torch.no_grad():
        adapted(**text())
    tensors = {name: (t.data_ptr(), t.nbytes) for name, t in [*adapted.named_parameters(), *adapted.named_buffers()]}
    gc.collect()
    before = resident()
    with torch.no_grad():
        for changes in (
            {"labels": text()["input_ids"]},
            {"position_ids": torch.arange(6)[None]},
            {"logits_to_keep": 1},
        ):
            adapted(**text(), **changes)
    gc.collect()
    now = {name: (t.data_ptr(), t.nbytes) for name, t in [*adapted.named_parameters(), *adapted.named_buffers()]}
    assert now == tensors
    assert len(adapted.compilation.signatures) == 4
    own = {name: t.data_ptr() for name, t in model.named_parameters()}
    assert {name: address for name, (address, _) in now.items() if name in own} == own
    assert size > 100e6
    assert resident() - before < size / 2


@pytest.mark.full
def test_an_adapted_place_that_a_signature_does_not_read_is_an_error() -> None:
    spec = {"adapt": [{"name": "words", "method": "lora", "target": {"role": "embed"}, "rank": 2}, LORA]}
    adapted = graftc.compile(spec, families.tiny("llama")).eval()
    inputs = {"inputs_embeds": torch.randn(2, 4, HIDDEN), "attention_mask": torch.ones(2, 4).long()}
    with pytest.raises(graftc.GraftError, match="GC031") as caught:
        adapted(**inputs)
    assert "words" in str(caught.value)
    assert "embed_tokens" in str(caught.value)
    with torch.no_grad():
        adapted(**text())


@pytest.mark.full
def test_packed_sequences_are_those_run_apart() -> None:
    model = frozen(families.tiny("llama"))
    adapted = graftc.compile({"adapt": [LORA]}, model).eval()
    perturb(adapted)
    first, second = text(1, 5)["input_ids"], text(1, 9)["input_ids"]
    positions = torch.cat([torch.arange(5), torch.arange(9)])[None]
    with torch.no_grad():
        packed = adapted(input_ids=torch.cat([first, second], 1), position_ids=positions).logits
        apart = [
            adapted(input_ids=ids, position_ids=torch.arange(ids.shape[1])[None]).logits for ids in (first, second)
        ]
        joined = adapted(input_ids=torch.cat([first, second], 1), position_ids=torch.arange(14)[None]).logits
    torch.testing.assert_close(packed, torch.cat(apart, 1), atol=1e-5, rtol=0)
    assert float((joined - packed).abs().max()) > 1e-3


@pytest.mark.full
def test_a_graph_is_made_once_per_signature() -> None:
    adapted = graftc.compile({"adapt": [LORA]}, families.tiny("bert")).eval()
    families_of = adapted.compilation.signatures
    calls: list[dict[str, Any]] = [
        {},
        {"output_hidden_states": False},
        {"return_dict": False},
        {"token_type_ids": torch.zeros(3, 6).long()},
        {"output_hidden_states": True},
        {"output_hidden_states": True, "return_dict": False},
    ]
    with torch.no_grad():
        for _ in range(2):
            for changes in calls:
                adapted(**text(), **changes)
            adapted(**text(2, 9))
    assert len(families_of) == 3
    assert [key for key in families_of if "output_hidden_states=True" in key.inputs]


@pytest.mark.full
def test_a_flag_belongs_to_the_capture_cache(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("GRAFTC_CACHE", str(tmp_path))
    model = families.tiny("llama").eval()
    with torch.no_grad():
        expected = model(**text(), output_hidden_states=True)
        for cached in (False, True):
            adapted = graftc.compile({"adapt": [LORA]}, model).eval()
            outputs = adapted(**text(), output_hidden_states=True)
            assert adapted.compilation.find({**text(), "output_hidden_states": True}) is not None
            assert [f.cached for f in adapted.compilation.signatures.values()] == [cached, cached]
            assert_same(outputs, expected)


@pytest.mark.full
def test_flags_may_be_there_from_the_start() -> None:
    model = frozen(families.tiny("llama"))
    adapted = graftc.compile({"adapt": [LORA]}, model, {**text(), "output_hidden_states": True}).eval()
    assert adapted.program().flags == (("output_hidden_states", True),)
    with torch.no_grad():
        assert_same(adapted(**text(), output_hidden_states=True), model(**text(), output_hidden_states=True))
    assert len(adapted.compilation.signatures) == 1
    assert adapted.merge(allow_unchanged=True).certificate.passed


@pytest.mark.full
@pytest.mark.parametrize(
    "changes, message",
    [
        ({"cache": object()}, r"GC140: the cache is of type object(.|\n)*pass a transformers DynamicCache"),
        ({"labels": [1, 2, 3]}, "GC031: input 'labels' is a list, not a tensor"),
        ({"output_hiden_states": True}, r"GC031: .*no input 'output_hiden_states'(.|\n)*'output_hidden_states'"),
        pytest.param(
            {"labels": torch.zeros(2, 3, 4)},
            r"GC031: no graph can be made: .*labels(.|\n)*hint: leave out labels",
        ),
        ({"output_hidden_states": "yes", "labels": torch.zeros(5, 5)}, r"output_hidden_states='yes'(.|\n)*leave out"),
    ],
)
def test_what_has_no_graph_is_a_coded_error_that_names_it(changes: dict[str, Any], message: str) -> None:
    adapted = graftc.compile({"adapt": [LORA]}, families.tiny("llama")).eval()
    with pytest.raises(graftc.GraftError, match=message):
        adapted(**text(), **changes)
    with torch.no_grad():
        adapted(**text())


@pytest.mark.full
def test_capturing_leaves_no_trace_on_the_source_model() -> None:
    model = families.tiny("llama")
    before = [(dict(vars(m)), dict(m._forward_hooks), dict(m._buffers)) for m in model.modules()]
    config = dict(vars(model.config))
    adapted = graftc.compile({"adapt": [LORA]}, model)
    adapted(**text(), output_hidden_states=True, output_attentions=True)
    for module, (attributes, hooks, buffers) in zip(model.modules(), before, strict=True):
        assert vars(module).keys() == attributes.keys()
        assert all(vars(module)[name] is value for name, value in attributes.items())
        assert dict(module._forward_hooks) == hooks
        assert all(module._buffers[name] is value for name, value in buffers.items())
    assert vars(model.config) == config


@pytest.mark.full
def test_a_longer_sequence_than_the_model_takes_is_a_coded_error() -> None:
    adapted = graftc.compile({"adapt": [LORA]}, families.tiny("bert", max_position_embeddings=16)).eval()
    with torch.no_grad():
        adapted(**text(2, 16))
        with pytest.raises(
            graftc.GraftError, match=r"GC031: no graph can be made(.|\n)*size of the tensor \(17\) must match .*\(16\)"
        ):
            adapted(**text(2, 17))


@pytest.mark.full
def test_a_flag_under_torch_compile() -> None:
    import torch._dynamo as dynamo

    adapted = graftc.compile({"adapt": [LORA]}, families.tiny("bert")).eval()
    dynamo.reset()
    try:
        with torch.no_grad():
            expected = [adapted(**text(*sizes), output_hidden_states=True) for sizes in ((3, 6), (2, 9))]
            whole: Any = torch.compile(adapted, fullgraph=True, dynamic=True, backend="eager")
            assert_same(whole(**text(3, 6), output_hidden_states=True), expected[0])
            with dynamo.config.patch(error_on_recompile=True):
                assert_same(whole(**text(2, 9), output_hidden_states=True), expected[1])
    finally:
        dynamo.reset()


class Sizes(nn.Module):
    """A model that computes something else for some numbers of rows or tokens."""

    def __init__(self, branch: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.branch = branch
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        taken = {
            "rows over 3": x.shape[0] > 3,
            "rows over 5": x.shape[0] > 5,
            "6 rows": x.shape[0] == 6,
            "tokens over 3": x.shape[1] > 3,
            "another layer": x.shape[0] > 3,
            "every fourth": x.shape[0] % 4 == 3,
            "many": x.shape[0] * x.shape[1] > 30,
        }[self.branch]
        if not taken:
            return y
        return torch.tanh(self.b(y)) if self.branch == "another layer" else y + 5


BRANCHES = ["rows over 3", "rows over 5", "6 rows", "tokens over 3", "another layer", "every fourth", "many"]


@pytest.mark.full
@pytest.mark.parametrize("branch", BRANCHES)
def test_other_sizes_get_the_graph_of_their_own_range(branch: str, tmp_path: Path) -> None:
    """Other sizes do not run the first graph: in eval and train mode, in copies, merged, and read from an artifact."""
    model = Sizes(branch).eval()
    lora = {"method": "lora", "rank": 2, "target": {"modules": "a"}}
    compiled = graftc.compile({"adapt": [lora]}, model, {"x": torch.randn(2, 3, 8)}).eval()
    inputs = [torch.randn(rows, tokens, 8) for rows, tokens in ((2, 3), (6, 3), (6, 7), (2, 7), (4, 3), (7, 7))]

    def check(other: Any) -> None:
        for x in inputs:
            torch.testing.assert_close(other(x), model(x), rtol=0, atol=1e-6)

    check(compiled)
    check(compiled)
    check(compiled.train())
    compiled.eval().save(tmp_path / "kept")
    for variant in (
        copy.deepcopy(compiled),
        compiled.merge(allow_unchanged=True),
        graftc.load(tmp_path / "kept", model).eval(),
    ):
        check(variant)
