"""The anchor: base graphs compared with the model itself."""

from __future__ import annotations

import random
import warnings
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graftc
from graftc.compiler.capture.anchor import anchor
from graftc.compiler.capture.capture import capture
from graftc.compiler.capture.request import CaptureRequest
from graftc.runtime.compiled import Compiled
from graftc.specs.errors.diagnostics import GraftError, GraftWarning
from graftc.testing.compare import flat, same_bits
from graftc.testing.families import FAMILIES, tiny
from graftc.testing.perturbing import perturb
from tests.compiler.differing import DIFFERING, Base
from tests.kit.specs import lora

aten = torch.ops.aten
SPEC = {"adapt": [{"method": "lora", "rank": 2, "target": {"modules": ["inner", "fc"]}}]}


def _differing(name: str) -> tuple[Base, Compiled, Tensor]:
    torch.manual_seed(3)
    model, x = DIFFERING[name](), torch.randn(4, 8)
    return model, graftc.compile(SPEC, model, example_inputs=(x,), cache=False), torch.randn(6, 8)


@pytest.mark.slow
@pytest.mark.sample(
    "Softmax", "TrainOnlyOutput", "OtherType", "EmaBuffer", "SkippedLayer", "Temperature", "SubmoduleFlag"
)
@pytest.mark.parametrize("name", DIFFERING)
def test_eval_mode_that_differs_is_captured_by_itself(name: str) -> None:
    """Eval outputs, also under `disabled()`, are the model's in eval mode, and merging preserves the adapted ones."""
    model, compiled, x = _differing(name)
    model.eval().requires_grad_(False)
    compiled.eval()
    assert same_bits(flat(compiled(x)), flat(model(x)))
    assert type(compiled(x)) is type(model(x))
    perturb(compiled)
    adapted = flat(compiled(x))
    assert name == "OtherShape" or not same_bits(adapted, flat(model(x)))
    with compiled.disabled():
        assert same_bits(flat(compiled(x)), flat(model(x)))
    merged = compiled.merge()
    assert merged.certificate.passed and merged.certificate.structure == merged.certificate.base_structure
    for a, b in zip(flat(merged(x)), adapted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    anchors = compiled.compilation.main.anchors
    assert {a.mode for a in anchors} == {"train", "eval"} and all(a.exact for a in anchors)
    assert merged.certificate.anchors == tuple(anchor.record for anchor in anchors)


@pytest.mark.slow
def test_layer_of_train_mode_alone_is_adapted_there_alone() -> None:
    """An auxiliary layer that eval mode skips is trained, and eval mode equals the model's."""
    torch.manual_seed(3)
    model, x = DIFFERING["SkippedLayer"](), torch.randn(4, 8)
    spec = {"adapt": [{"method": "lora", "name": n, "rank": 2, "target": {"modules": n}} for n in ("auxiliary", "fc")]}
    compiled = graftc.compile({**spec, "train": ["inner"]}, model, example_inputs=(x,), cache=False)
    perturb(compiled)
    compiled.train()
    compiled(x).sum().backward()
    assert compiled.get_parameter("auxiliary.graftc.auxiliary.A").grad is not None
    compiled.eval()
    with compiled.disabled():
        assert torch.equal(compiled(x), model.eval().requires_grad_(False)(x))


@pytest.mark.full
@pytest.mark.parametrize("family_name", FAMILIES)
def test_contract_families_are_equal_to_the_bit_and_quiet(family_name: str) -> None:
    """Both modes are exact, with the tables and counters that layers store, and there are no warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", GraftWarning)
        report = graftc.check({"adapt": [lora("attn.{q,v}")]}, tiny(family_name))
    assert {a.mode for a in report.anchors} == {"train", "eval"}
    assert all(a.exact and not a.skipped for a in report.anchors)
    assert not report.notes


class Broken(Base):
    """A model that reads something that no graph contains."""

    def __init__(self) -> None:
        self.calls = 0
        super().__init__()


class ByValue(Broken):
    def body(self, h: Tensor) -> Tensor:
        return h if torch.compiler.is_exporting() else h * 2


class Global(Broken):
    def body(self, h: Tensor) -> Tensor:
        _GLOBAL["calls"] += 1
        return h * _GLOBAL["calls"]


class NumpyRoundTrip(Broken):
    def body(self, h: Tensor) -> Tensor:
        return h + (0.0 if torch.compiler.is_exporting() else float(h.detach().numpy().mean()))


_GLOBAL = {"calls": 0}


@pytest.mark.parametrize("cls", Broken.__subclasses__())
def test_a_graph_that_is_not_the_model_is_refused(cls: type[Broken]) -> None:
    """If the tracer sees something else than a caller, compiling raises GC041 with the output and the difference."""
    with pytest.raises(GraftError, match=r"output output differs by") as caught:
        graftc.compile({**SPEC, "capture": "graph"}, cls(), example_inputs=(torch.randn(4, 8),), cache=False)
    assert caught.value.code == "GC041" and caught.value.hint


class Assigning(Base):
    """A model with attributes for its forward to count, append and assign."""

    def build(self) -> None:
        self.calls, self.history, self.recent = 0, [1], deque([1], maxlen=3)
        self.table, self.seen, self.state = {"a": 1}, {1}, SimpleNamespace(calls=0)
        self.nested, self.paired, self.votes = {"inner": [1]}, ([1], 2), Counter("a")
        self.kept = torch.zeros(3)
        self.last: Any = None


def _counts(m: Any) -> None:
    m.calls += 1


def _appends(m: Any) -> None:
    m.history.append(2)


def _remembers(m: Any) -> None:
    m.table["b"] = 2


def _joins(m: Any) -> None:
    m.seen.add(2)


def _queues(m: Any) -> None:
    m.recent.append(2)


def _counts_outside(m: Any) -> None:
    m.state.calls += 1


def _appends_deeper(m: Any) -> None:
    m.nested["inner"].append(2)


def _appends_in_a_pair(m: Any) -> None:
    m.paired[0].append(2)


def _counts_votes(m: Any) -> None:
    m.votes["a"] += 1


def _makes(m: Any) -> None:
    m.fresh = "new"


def _deletes(m: Any) -> None:
    if hasattr(m, "last"):
        del m.last


_ASSIGNMENTS: dict[str, Callable[[Any], None]] = {
    "calls": _counts,
    "history": _appends,
    "table": _remembers,
    "seen": _joins,
    "recent": _queues,
    "state": _counts_outside,
    "nested": _appends_deeper,
    "paired": _appends_in_a_pair,
    "votes": _counts_votes,
    "fresh": _makes,
    "last": _deletes,
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "where"),
    [*((name, "forward") for name in _ASSIGNMENTS), *(("calls", w) for w in ("submodule", "hook", "instance"))],
)
def test_forward_that_assigns_is_warned_of_and_undone(name: str, where: str) -> None:
    """GC042 has the attribute's path, wherever it is assigned, and the model itself stays unchanged."""
    model, owner, path = _assigning(where, _ASSIGNMENTS[name])
    before = {key: repr(value) for key, value in vars(owner).items()}
    with pytest.warns(GraftWarning, match=rf"GC042.* assigns to {path}{name},") as caught:
        report = graftc.check(SPEC, model, example_inputs=(torch.randn(4, 8),), cache=False)
    assert sum(str(w.message).startswith("GC042") for w in caught) == 1
    assert f"forward assigns to {path}{name}" in report.notes
    assert {key: repr(value) for key, value in vars(owner).items()} == before


Pair = namedtuple("Pair", "a b")
_HELD: dict[str, Any] = {
    "tuple": (1, 2),
    "pairs": ((1,), [2, (3, {"a": (4, [[(5,)]])})]),
    "named": Pair(1, Pair(2, 3)),
    "ordered": OrderedDict(a=(1,)),
    "by default": defaultdict(list, {"a": [1]}),
    "queue": deque([(1,)]),
    "size": torch.Size([2, 3]),
    "tensors": (torch.ones(2), [torch.ones(2)]),
    "modules": (nn.Linear(2, 2),),
    "object": SimpleNamespace(a=(1, 2)),
    "not a number": float("nan"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", _HELD)
def test_what_a_module_holds_is_no_assignment(name: str, recwarn: pytest.WarningsRecorder) -> None:
    """The tracer temporarily replaces containers by copies, which is not an assignment."""
    model = Base()
    model.held = _HELD[name]
    graftc.check(SPEC, model, example_inputs=(torch.randn(4, 8),), cache=False)
    assert not [w for w in recwarn if str(w.message).startswith("GC042")] and model.held is _HELD[name]


def _assigning(where: str, act: Callable[[Any], None]) -> tuple[nn.Module, nn.Module, str]:
    model = Assigning()
    if where == "forward":
        model.body = lambda h: (act(model), h)[1]  # type: ignore[method-assign]
        return model, model, ""
    owner = Assigning()
    if where == "hook":
        model.inner.register_forward_hook(lambda *_: act(model))
        return model, model, ""
    if where == "instance":
        forward = model.inner.forward

        def patched(x: Tensor) -> Tensor:
            act(model)
            return forward(x)

        model.inner.forward = patched  # type: ignore[method-assign]
        return model, model, ""
    owner.forward = lambda x: (act(owner), x)[1]  # type: ignore[method-assign]
    model.part = owner
    model.body = lambda h: model.part(h)  # type: ignore[method-assign]
    return model, owner, "part."


@pytest.mark.full
def test_what_is_drawn_outside_of_tensors_is_warned_of() -> None:
    """Layerdrop and SpecAugment that capturing switches off give GC047, also from the cache and on the meta device."""
    from transformers import BartConfig, BartForConditionalGeneration

    sizes = {"d_model": 16, "vocab_size": 50, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16}
    heads = {"decoder_ffn_dim": 16, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    config = BartConfig(**sizes, **heads, encoder_layerdrop=0.2, max_position_embeddings=32)
    with torch.device("meta"):
        empty = BartForConditionalGeneration(config)
    for model, skipped in ((BartForConditionalGeneration(config), False),) * 2 + ((empty, True),):
        with pytest.warns(GraftWarning, match=r"GC047.*layerdrop of .* is 0.2 and was captured as 0"):
            report = graftc.check({"adapt": [lora("attn.{q,v}")]}, model)
        assert config.encoder_layerdrop == 0.2
        assert all(bool(a.skipped) is skipped and (a.exact or skipped) for a in report.anchors)
        assert any("meta device" in note for note in report.notes) is skipped


class Tracking(Base):
    """A model that draws random numbers, keeps statistics and counts calls."""

    def build(self) -> None:
        self.norm, self.drop = nn.BatchNorm1d(12), nn.Dropout(0.3)
        self.rows: list[int] = []

    def body(self, h: Tensor) -> Tensor:
        dropped: Tensor = self.drop(self.norm(h))
        return dropped


def test_nothing_is_left_behind() -> None:
    """Buffers, attributes, hooks, modes, ``requires_grad`` flags and random states stay unchanged."""
    numpy = pytest.importorskip("numpy")
    model, x = Tracking(), torch.randn(4, 8)
    model.train()
    model.norm.eval()
    model.inner.weight.requires_grad_(False)
    handle = model.fc.register_forward_hook(lambda *_: None)
    buffers = {name: (tensor, tensor.clone(), tensor._version) for name, tensor in model.named_buffers()}
    parameters = {name: (p, p.requires_grad) for name, p in model.named_parameters()}
    modes = [module.training for module in model.modules()]
    states = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].copy()
    compiled = graftc.compile(SPEC, model, example_inputs=(x,), cache=False)
    assert all(a.exact for a in compiled.report.anchors)
    for name, tensor in model.named_buffers():
        original, value, version = buffers[name]
        assert tensor is original and torch.equal(tensor, value) and tensor._version == version
    assert all(p is parameters[n][0] and p.requires_grad == parameters[n][1] for n, p in model.named_parameters())
    assert [module.training for module in model.modules()] == modes
    assert list(model.fc._forward_hooks) == [handle.id]
    assert "forward" not in vars(model)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1] and (numpy.random.get_state()[1] == states[2]).all()


def test_update_of_a_buffer_that_the_graph_lacks_is_seen() -> None:
    """A graph with the right outputs that does not count the batch does not pass as the model."""
    model = Tracking()
    request = CaptureRequest(model, (graftc.compiler.capture.signature.Axis("x", torch.float32, ("batch", 8)),))
    traced = capture(request)
    (node,) = traced.program.graph.find_nodes(op="call_function", target=aten.add_.Tensor)
    assert anchor(request, traced.program, traced.constants).exact
    traced.program.graph.erase_node(node)
    result = anchor(request, traced.program, traced.constants)
    assert not result.passed and result.differing[0].startswith("the update of norm.num_batches_tracked")


def test_draws_that_the_graph_has_not_do_not_matter() -> None:
    """Train mode is compared even if the model draws more than its graph, which has all draws that outputs need."""

    class Drawing(Base):
        def body(self, h: Tensor) -> Tensor:
            torch.rand(3)
            nn.functional.dropout(h, 0.4, self.training)
            return nn.functional.dropout(h, 0.3, self.training)

    report = graftc.check(SPEC, Drawing(), example_inputs=(torch.randn(4, 8),), cache=False)
    assert all(a.exact for a in report.anchors)


@pytest.mark.slow
def test_what_eval_mode_draws_stays() -> None:
    """Dropout that is never switched off applies in eval mode as in the model; that of adaptations does not."""

    class Always(Base):
        def body(self, h: Tensor) -> Tensor:
            return nn.functional.dropout(h, 0.3)

    torch.manual_seed(3)
    model, x = Always(), torch.randn(4, 8)
    spec = {"adapt": [{"method": "lora", "rank": 2, "dropout": 0.5, "target": {"modules": ["inner", "fc"]}}]}
    compiled = graftc.compile(spec, model, example_inputs=(x,), cache=False).eval()
    torch.manual_seed(5)
    expected = model.eval().requires_grad_(False)(x)
    torch.manual_seed(5)
    assert torch.equal(compiled(x), expected)


@pytest.mark.full
def test_a_short_table_of_positions_is_no_reason_to_look_less_closely(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Samples are no longer than the model allows, so a cached graph is checked against them and reused."""
    monkeypatch.setenv("GRAFTC_CACHE", str(tmp_path))
    reports = [
        graftc.check({"adapt": [lora("attn.{q,v}")]}, tiny("roberta", max_position_embeddings=12)) for _ in range(2)
    ]
    assert [report.cached for report in reports] == [False, True]
    assert all(a.exact and not a.plain for report in reports for a in report.anchors)
