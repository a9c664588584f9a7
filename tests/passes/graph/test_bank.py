"""Banks: adaptations of one shape, from which every row, every call or the whole deployment chooses."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import graftc
from graftc.passes.core.weights.store import Store
from graftc.runtime.compiled import Compiled
from graftc.runtime.loading.verify import verify
from graftc.specs.errors.diagnostics import GraftError
from graftc.specs.registry import method_specs
from graftc.testing import largest_difference, outputs_of, perturb, same_bits
from graftc.testing.compare import inputs_for
from graftc.testing.families import FAMILIES, tiny
from tests.kit.comparing import relative_difference
from tests.kit.models import adapted, fresh, with_tensors
from tests.kit.training import adamw

SLOTS = ("de", "fr", "it", "es")
IDS = torch.tensor([0, 3, 2, 1, 1, 0, 3, 2])
METHODS: Mapping[str, Mapping[str, Any]] = {
    "lora": {"target": {"role": "attn.{q,v}"}, "rank": 3},
    "dora": {"target": {"role": "attn.{q,v}"}, "rank": 3},
    "ia3": {"target": {"role": ["attn.k", "attn.v", "attn.o"]}, "side": "auto"},
    "oft": {"target": {"role": "attn.{q,v}"}, "block_size": 8},
    "boft": {"target": {"role": "attn.{q,v}"}, "factors": 2},
    "hira": {"target": {"role": "attn.{q,v}"}, "rank": 3},
    "miss": {"target": {"role": "attn.{q,v}"}, "rank": 8},
    "gralora": {"target": {"role": "attn.{q,v}"}, "rank": 4},
    "c3a": {"target": {"role": "attn.{q,v}"}, "block_size": 8},
    "loreft": {"rank": 3},
    "houlsby": {"bottleneck": 6},
    "pfeiffer": {"reduction": 4},
    "bapna_firat": {"bottleneck": 6},
    "he_parallel": {"bottleneck": 6, "target": {"role": "attn.sublayer"}},
    "llm_adapters": {"bottleneck": 6, "target": {"role": "attn.{q,o}"}},
    "prefix": {"length": 3},
    "prompt": {"length": 3},
    "pre_layer": {"length": 2, "infix": 1},
}
WITHOUT_WORDS = {("vit", "prompt"), ("vit", "pre_layer")}
TOLERANCE = 1e-6


def spec_of(method: str, slots: tuple[str, ...] = SLOTS, **bank: Any) -> dict[str, Any]:
    """Return the spec of a bank of a method's adaptations."""
    adapt = [{"method": method, "name": name, **METHODS[method]} for name in slots]
    return {"adapt": adapt, "compose": {"bank": list(slots), "name": "languages", **bank}}


def banked(family: str, method: str = "lora", **bank: Any) -> Compiled:
    """Compile a bank on a family's model, perturbed, in eval mode."""
    return adapted(family, **spec_of(method, **bank))


def alone(family: str, method: str, slot: str, tensors: Mapping[str, Tensor]) -> Compiled:
    """Compile one adaptation without a bank, with the tensors that it has in the bank."""
    return with_tensors(fresh(family, *spec_of(method, (slot,))["adapt"]), tensors)


def test_every_method_that_claims_a_bank_is_here() -> None:
    """Named adapters wired like another one are left out; PASTA and aLoRA need tokens, and have tests of their own."""
    alike = {"bottleneck", "he_sequential", "adapter_l", "p_tuning_v2", "pre_embed"}
    claimed = {tag for tag, entry in method_specs().items() if entry.claims.bankable}
    assert claimed == METHODS.keys() | alike | {"alora", "pasta"}


def rows(outputs: list[Tensor], mask: Tensor) -> list[Tensor]:
    """Return the rows of outputs that belong to a part of the batch."""
    return [tensor[mask] for tensor in outputs if tensor.shape[0] == mask.shape[0]]


@pytest.mark.full
@pytest.mark.parametrize(
    ("family", "method"), [(f, m) for f in FAMILIES for m in METHODS if (f, m) not in WITHOUT_WORDS]
)
def test_a_mixed_batch_is_every_adapter_on_its_rows(family: str, method: str) -> None:
    """Eight rows over four adapters equal each adapter's own run, and all adapters differ."""
    compiled = banked(family, method)
    inputs = inputs_for(compiled, (8, 6))
    mixed = outputs_of(compiled, {**inputs, "adapter_ids": IDS})
    tensors = compiled.adapter_state_dict()
    one = alone(family, method, SLOTS[0], tensors)
    for number, slot in enumerate(SLOTS):
        names = (name.replace(f".graftc.{SLOTS[0]}.", f".graftc.{slot}.") for name in one.adapter_state_dict())
        one.load_adapter_state_dict({n: tensors[h] for n, h in zip(one.adapter_state_dict(), names, strict=True)})
        own = outputs_of(one, inputs)
        mask = number == IDS
        for expected, actual in zip(rows(own, mask), rows(mixed, mask), strict=True):
            assert relative_difference([actual], [expected]) <= TOLERANCE
        assert all(
            largest_difference([a], [b]) > 1e-3 for a, b in zip(rows(own, ~mask), rows(mixed, ~mask), strict=True)
        )
        compiled.activate(slot)
        assert relative_difference(outputs_of(compiled, inputs), own) <= TOLERANCE


@pytest.mark.full
@pytest.mark.parametrize("method", ["lora", "houlsby", "dora"])
def test_weights(method: str) -> None:
    """One-hot weights select a slot; a mixture for each row equals the adapter of the mixed tensors."""
    compiled = banked("gpt2", method)
    inputs = inputs_for(compiled, (8, 6))
    one_hot = torch.nn.functional.one_hot(IDS, len(SLOTS)).float()
    ids = outputs_of(compiled, {**inputs, "adapter_ids": IDS})
    assert relative_difference(outputs_of(compiled, {**inputs, "adapter_weights": one_hot}), ids) <= TOLERANCE
    factors = {"de": 0.25, "it": 0.75}
    weights = torch.zeros(8, 4)
    weights[:, 0], weights[:, 2] = 0.25, 0.75
    weights[3] = one_hot[3]
    mixed = outputs_of(compiled, {**inputs, "adapter_weights": weights})
    fixed = outputs_of(compiled.fix(factors).eval(), inputs)
    others = torch.arange(8) != 3
    assert largest_difference(rows(mixed, others), rows(fixed, others)) <= 1e-5
    assert relative_difference(rows(mixed, ~others), rows(ids, ~others)) <= TOLERANCE


@pytest.mark.full
@pytest.mark.parametrize(
    "family", [pytest.param(f, marks=() if f in ("bert", "t5") else pytest.mark.full) for f in FAMILIES]
)
def test_in_onnx_runtime(family: str, tmp_path: Path) -> None:
    """The exported graph takes the ids as an input, and there as well a mixed batch is every adapter on its rows."""
    ort = pytest.importorskip("onnxruntime")
    compiled = banked(family)
    inputs = inputs_for(compiled, (8, 6), front=False)
    path = compiled.export(tmp_path / "bank.onnx", example_inputs={**inputs, "adapter_ids": IDS})
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    assert "adapter_ids" in [value.name for value in session.get_inputs()]

    def run(ids: Tensor) -> list[Tensor]:
        feed = {name: tensor.numpy() for name, tensor in {**inputs, "adapter_ids": ids}.items()}
        return [torch.from_numpy(output) for output in session.run(None, feed)]

    mixed = run(IDS)
    for number in range(len(SLOTS)):
        own, mask = run(torch.full((8,), number)), number == IDS
        assert relative_difference(rows(mixed, mask), rows(own, mask)) <= TOLERANCE
        assert largest_difference(rows(mixed, ~mask), rows(own, ~mask)) > 1e-3


@pytest.mark.full
@pytest.mark.parametrize("family", ["bert", "gpt2", "t5"])
def test_other_ids_compile_nothing(family: str) -> None:
    """Neither ids for each row nor the active slot are part of the compiled code."""
    import torch._dynamo

    torch._dynamo.reset()
    compiled = banked(family)
    inputs = inputs_for(compiled, (8, 6))
    compiled(**inputs, adapter_ids=IDS)
    run = torch.compile(compiled, backend="eager", fullgraph=True, dynamic=True)
    with torch.no_grad():
        run(**inputs)
        first = run(**inputs, adapter_ids=IDS)
        with torch._dynamo.config.patch(error_on_recompile=True):
            second = run(**inputs, adapter_ids=IDS.flip(0))
            compiled.activate("es")
            active = run(**inputs)
        last = compiled(**inputs, adapter_ids=torch.full((8,), 3))
    assert largest_difference([first[0]], [second[0]]) > 1e-3
    assert relative_difference([active[0]], [last[0]]) <= TOLERANCE


@pytest.mark.full
@pytest.mark.parametrize("method", ["bapna_firat", "lora"])
def test_training_one_leaves_the_others_to_the_bit(method: str) -> None:
    """This holds with weight decay and momentum as well: the others require no gradient."""
    compiled = banked("t5", method)
    inputs = inputs_for(compiled, (4, 6))
    before = {slot: outputs_of(compiled, {**inputs, "adapter_ids": [slot]}) for slot in SLOTS}
    compiled.train_only("fr")
    optimiser = adamw(compiled, lr=1e-2, weight_decay=0.5)
    compiled.train()
    for _ in range(3):
        optimiser.zero_grad()
        outputs = compiled(**inputs, adapter_ids=["fr"])
        outputs[0].float().square().mean().backward()
        optimiser.step()
    compiled.eval()
    for slot in SLOTS:
        after = outputs_of(compiled, {**inputs, "adapter_ids": [slot]})
        assert same_bits(after, before[slot]) == (slot != "fr")
    compiled.train_only()
    assert all(p.requires_grad for n, p in compiled.named_parameters() if Store.is_adapter(n))


@pytest.mark.full
def test_gradients_of_a_mixed_batch_are_each_adapters_own() -> None:
    compiled = banked("bert", "houlsby")
    inputs = inputs_for(compiled, (8, 6))
    compiled(**inputs, adapter_ids=IDS)[0].square().sum().backward()
    tensors = compiled.adapter_state_dict()
    for number, slot in enumerate(SLOTS):
        own = alone("bert", "houlsby", slot, tensors)
        mask = number == IDS
        own(**{name: tensor[mask] for name, tensor in inputs.items()})[0].square().sum().backward()
        for name, parameter in own.named_parameters():
            if parameter.grad is not None:
                actual = dict(compiled.named_parameters())[name].grad
                torch.testing.assert_close(actual, parameter.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.sample("dora")
@pytest.mark.parametrize("method", ["lora", "dora", "ia3"])
def test_one_for_good_folds(method: str) -> None:
    """`fix` leaves no axis of slots and no inputs of the bank, and the result folds as the adaptation alone does."""
    compiled = banked("gpt2", method)
    inputs = inputs_for(compiled, (5, 6))
    expected = outputs_of(compiled, {**inputs, "adapter_ids": ["it"]})
    fixed = compiled.fix("it").eval()
    assert relative_difference(outputs_of(fixed, inputs), expected) <= TOLERANCE
    assert not fixed.compilation.controls and fixed.compilation.spec.compose == ()
    assert {n.split(".graftc.")[1].split(".")[0] for n in fixed.adapter_state_dict()} == {"it"}
    merged = fixed.merge()
    assert merged.certificate.passed
    assert largest_difference(outputs_of(merged, inputs), expected) <= 2e-5
    with pytest.raises(GraftError) as caught:
        compiled.merge()
    assert caught.value.code == "GC050"


@pytest.mark.full
def test_shared_parts() -> None:
    """Pairs that share a layer norm have it once, and all of them have what it learns."""
    own = banked("bert", "bapna_firat").report
    compiled = banked("bert", "bapna_firat", share=["norm_weight", "norm_bias"])
    width, layers = compiled.config.hidden_size, 2
    assert own.trainable_parameters - compiled.report.trainable_parameters == 3 * layers * 2 * width
    names = [n for n in compiled.adapter_state_dict() if n.endswith("norm_weight")]
    assert names and all(".graftc.languages." in name for name in names)
    inputs = inputs_for(compiled, (4, 6))
    before = outputs_of(compiled, {**inputs, "adapter_ids": ["fr"]})
    fixed = outputs_of(compiled.fix("fr").eval(), inputs)
    assert relative_difference(fixed, before) <= TOLERANCE


@pytest.mark.full
@pytest.mark.parametrize("method", ["prompt", "pre_layer", "prefix"])
def test_a_part_that_all_share_is_read_by_every_row(method: str) -> None:
    """If all share one tensor of each kind, every choice of the rows gives the same result."""
    share = ["keys", "values"] if method == "prefix" else ["tokens"]
    compiled = banked("bert", method, share=share)
    inputs = inputs_for(compiled, (8, 6))
    mixed = outputs_of(compiled, {**inputs, "adapter_ids": IDS})
    assert relative_difference(mixed, outputs_of(compiled, inputs)) <= TOLERANCE
    with compiled.disabled():
        assert largest_difference(mixed, outputs_of(compiled, inputs)) > 1e-3


@pytest.mark.full
def test_adding_a_pair_adds_what_one_has() -> None:
    """A pair adds ``layers * (2 d r + r + d + 2 d)``, for encoder and decoder."""
    model, inner = tiny("t5"), 6
    width = model.config.d_model
    counts = [graftc.compile(spec_of("bapna_firat", SLOTS[:n]), model).report.trainable_parameters for n in (1, 2, 3)]
    each = counts[1] - counts[0]
    assert counts[2] - counts[1] == each == 4 * (2 * width * inner + inner + width + 2 * width)


@pytest.mark.full
def test_a_saved_bank_keeps_its_slot(tmp_path: Path) -> None:
    model = tiny("bert")
    compiled = graftc.compile(spec_of("lora"), model).eval()
    perturb(compiled, 0.05)
    compiled.activate("it")
    inputs = inputs_for(compiled, (8, 6))
    compiled.save(tmp_path / "artifact")
    loaded = graftc.load(tmp_path / "artifact", model=model).eval()
    assert loaded.active() == "it"
    assert same_bits(outputs_of(loaded, inputs), outputs_of(compiled, inputs))
    mixed = {**inputs, "adapter_ids": IDS}
    assert same_bits(outputs_of(loaded, mixed), outputs_of(compiled, mixed))


@pytest.mark.full
@pytest.mark.parametrize("family", ["bert", "gpt2"])
@pytest.mark.parametrize("chosen", ["adapter_ids", "adapter_weights"])
@pytest.mark.parametrize("method", ["lora", "prefix"])
def test_a_bank_that_rows_chose_from_is_loaded(family: str, chosen: str, method: str, tmp_path: Path) -> None:
    """The graphs with and without choices are loaded unchanged."""
    model = tiny(family)
    compiled = graftc.compile(spec_of(method), model).eval()
    perturb(compiled, 0.05)
    inputs = inputs_for(compiled, (8, 6))
    mixed = {**inputs, chosen: IDS if chosen == "adapter_ids" else torch.rand(8, 4)}
    expected = [outputs_of(compiled, given) for given in (inputs, mixed)]
    loaded = graftc.load(compiled.save(tmp_path / "artifact"), model=model).eval()
    for given, outputs in zip((inputs, mixed), expected, strict=True):
        assert same_bits(outputs_of(loaded, given), outputs)
    assert all(check.passed is not False for check in verify(tmp_path / "artifact", model).checks)


@pytest.mark.full
def test_two_banks_and_an_adaptation_between() -> None:
    """Each bank has its own inputs, and an adaptation outside of banks applies to every row."""
    spec = {
        "adapt": [
            *({"method": "lora", "name": n, "rank": 2, "target": {"role": "attn.q"}} for n in ("a", "b")),
            {"method": "ia3"},
            *({"method": "pfeiffer", "name": n, "reduction": 4} for n in ("x", "y")),
        ],
        "compose": [{"bank": ["a", "b"], "inputs": "language"}, {"bank": ["x", "y"], "inputs": "task"}],
    }
    compiled = graftc.compile(spec, tiny("bert")).eval()
    perturb(compiled, 0.05)
    inputs = inputs_for(compiled, (4, 6))
    both = outputs_of(compiled, {**inputs, "language_ids": [0, 0, 1, 1], "task_ids": ["x", "y", "x", "y"]})
    for row, (language, task) in enumerate((("a", "x"), ("a", "y"), ("b", "x"), ("b", "y"))):
        compiled.activate(language, "bank")
        compiled.activate(task, "bank_2")
        assert relative_difference([outputs_of(compiled, inputs)[0][row]], [both[0][row]]) <= TOLERANCE
    fixed = compiled.fix("b", "bank").fix("x").eval()
    assert relative_difference([outputs_of(fixed, inputs)[0][2]], [both[0][2]]) <= TOLERANCE


REFUSED: Mapping[str, tuple[dict[str, Any], str]] = {
    "beyond": ({"adapter_ids": torch.tensor([0, 1, 2, 4])}, "contains 4, but 'languages' has slots 0 to 3"),
    "negative": ({"adapter_ids": torch.tensor([0, -1, 2, 3])}, "has -1"),
    "too few": ({"adapter_ids": torch.tensor([0, 1, 2])}, r"adapter_ids is int64\[3\]"),
    "floats": ({"adapter_ids": torch.zeros(4)}, r"adapter_ids is float32\[4\]"),
    "a name": ({"adapter_ids": ["de", "fr", "tl", "de"]}, "has no slot 'tl'"),
    "columns": ({"adapter_weights": torch.ones(4, 3)}, r"adapter_weights is float32\[4, 3\]"),
    "both": ({"adapter_ids": torch.zeros(4).long(), "adapter_weights": torch.ones(4, 4)}, "both choose from"),
}


@pytest.mark.full
@pytest.mark.parametrize(("chosen", "message"), REFUSED.values(), ids=REFUSED)
def test_choices_that_do_not_fit(chosen: dict[str, Any], message: str) -> None:
    """They raise GC038 before anything is computed."""
    compiled = banked("bert")
    with pytest.raises(GraftError, match=message) as caught:
        compiled(**inputs_for(compiled, (4, 6)), **chosen)
    assert caught.value.code == "GC038"


@pytest.mark.slow
def test_names_that_are_none() -> None:
    compiled = banked("bert")
    for call, code in (
        (lambda: compiled.activate("fi"), "GC038"),
        (lambda: compiled.activate(7), "GC038"),
        (lambda: compiled.fix({"de": 1.0, "xx": 1.0}), "GC038"),
        (lambda: compiled.activate("de", "other"), "GC091"),
        (lambda: compiled.train_only("xx"), "GC091"),
    ):
        with pytest.raises(GraftError) as caught:
            call()
        assert caught.value.code == code


@pytest.mark.slow
def test_rows_that_cannot_be_told_apart() -> None:
    """A convolution's patches and experts have no rows, so a call may choose, but a row may not."""
    adapt = [{"method": "lora", "name": n, "rank": 2, "target": {"modules": "**.patch_embeddings.**"}} for n in "ab"]
    compiled = graftc.compile({"adapt": adapt, "compose": {"bank": ["a", "b"]}}, tiny("vit")).eval()
    perturb(compiled, 0.05)
    inputs = inputs_for(compiled, (4, 6))
    first = outputs_of(compiled, inputs)
    compiled.activate("b")
    assert largest_difference(outputs_of(compiled, inputs), first) > 1e-3
    with pytest.raises(GraftError) as caught:
        compiled(**inputs, adapter_ids=[0, 1, 0, 1])
    assert caught.value.code == "GC037"


@pytest.mark.full
def test_every_row_through_every_adapter() -> None:
    """`parallel` returns a batch of n B rows, one adaptation after the other."""
    spec = spec_of("pfeiffer", SLOTS[:3])
    compiled = graftc.compile({**spec, "compose": {"parallel": list(SLOTS[:3])}}, tiny("bert")).eval()
    perturb(compiled, 0.05)
    inputs = inputs_for(compiled, (2, 6))
    actual = outputs_of(compiled, inputs)
    assert actual[0].shape[0] == 6
    tensors = compiled.adapter_state_dict()
    for number, slot in enumerate(SLOTS[:3]):
        own = outputs_of(alone("bert", "pfeiffer", slot, tensors), inputs)
        assert relative_difference([actual[0][2 * number : 2 * number + 2]], own) <= TOLERANCE


@pytest.mark.slow
def test_sequence_first_models_choose_too() -> None:
    """In a plain torch transformer, the batch is the second axis."""

    class Plain(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = torch.nn.Linear(6, 10), torch.nn.Linear(10, 4)

        def forward(self, x: Tensor) -> Tensor:
            """Map ``[batch, sequence, 6]`` to ``[batch, 4]``."""
            turned = x.transpose(0, 1)
            return self.second(torch.relu(self.first(turned))).mean(0)

    adapt = [{"method": "lora", "name": n, "rank": 2, "target": {"modules": ["first", "second"]}} for n in "ab"]
    x = torch.randn(4, 5, 6)
    compiled = graftc.compile({"adapt": adapt, "compose": {"bank": ["a", "b"]}}, Plain(), {"x": x}).eval()
    perturb(compiled, 0.05)
    mixed = compiled(x, adapter_ids=[0, 1, 1, 0])
    compiled.activate("b")
    assert relative_difference([compiled(x)[1:3]], [mixed[1:3]]) <= TOLERANCE
    assert largest_difference([compiled(x)[:1]], [mixed[:1]]) > 1e-3
