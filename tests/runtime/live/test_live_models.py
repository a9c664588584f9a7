"""Models that cannot be one graph: their own Python calls graphs of their layers, or of single maps."""

from __future__ import annotations

import copy
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graftc
from graftc.passes.core.elements.calls import elements_in
from graftc.specs.errors.diagnostics import GraftError
from graftc.testing import perturb
from tests.kit.comparing import gradients_of
from tests.kit.models import fresh
from tests.runtime.live.models import CASES, Block, Case, Looping, llava, looping, qwen2_vl

LORA: dict[str, Any] = {"method": "lora", "rank": 2}
TARGETS: dict[str, Any] = {
    "qwen2_vl": {"modules": "**.{q_proj,v_proj,qkv,fc1}"},
    "gemma3": {"modules": "**.{q_proj,v_proj,fc1}"},
    "looping": {"modules": "**.{up,down,first}"},
}


def case_compiled(name: str, case: Case, **options: Any) -> Any:
    entry = {**LORA, "target": TARGETS[name]}
    return fresh(case.model, entry, inputs=case.first, seed=0, cache=False, **options)


SHORT = [name if name != "gemma3" else pytest.param(name, marks=pytest.mark.full) for name in CASES]


@pytest.fixture(scope="module", params=SHORT)
def named(request: pytest.FixtureRequest) -> tuple[str, Case, Any]:
    case = CASES[request.param]()
    return request.param, case, case_compiled(request.param, case)


def with_noise(compiled: Any) -> Any:
    """Return the model in eval mode, with adapters that change its outputs."""
    perturb(compiled.eval(), 0.05)
    return compiled


def tensors_of(outputs: Any) -> list[Tensor]:
    """Return the floating-point tensors of outputs."""
    if isinstance(outputs, Tensor):
        return [outputs]
    return [value for value in outputs.values() if isinstance(value, Tensor) and value.is_floating_point()]


def loss_of(outputs: Any) -> Tensor:
    return outputs.loss if hasattr(outputs, "loss") else outputs.square().mean()  # type: ignore[no-any-return]


@pytest.mark.full
@pytest.mark.sample("looping")
@pytest.mark.slow
def test_before_training_it_is_the_source_to_the_bit(named: tuple[str, Case, Any]) -> None:
    _, case, compiled = named
    copied = copy.deepcopy(compiled)
    for mode in (True, False):
        case.model.train(mode)
        copied.train(mode)
        for batch in (case.first, case.second):
            with torch.no_grad():
                ours, theirs = tensors_of(copied(**batch)), tensors_of(case.model(**batch))
            assert len(ours) == len(theirs) > 0
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.sample("looping")
@pytest.mark.slow
def test_gradients_are_those_of_the_source_with_the_folded_update(named: tuple[str, Case, Any]) -> None:
    """Gradients for ``W + s B A`` follow by the chain rule from those of the whole weight in the source's own class."""
    _, case, compiled = named
    trained = with_noise(copy.deepcopy(compiled))
    plain = copy.deepcopy(case.model).eval()
    plain.load_state_dict(trained.merge().folded_state_dict(), strict=False)
    plain.requires_grad_(True).zero_grad(set_to_none=True)
    loss_of(plain(**case.first)).backward()
    loss_of(trained(**case.first)).backward()
    (lora,) = trained.compilation.spec.adapt
    scale = lora.alpha / lora.rank
    adapters = {name: p for name, p in trained.named_parameters() if p.grad is not None}
    assert adapters
    for name, a in adapters.items():
        if not name.endswith(".A"):
            continue
        b = adapters[f"{name.removesuffix('A')}B"]
        whole = plain.get_parameter(f"{name.partition('.graftc.')[0]}.weight").grad
        assert whole is not None
        for ours, wanted in ((a.grad, scale * b.T @ whole), (b.grad, scale * whole @ a.T)):
            assert ours is not None
            assert torch.allclose(ours, wanted, atol=1e-4 * float(wanted.abs().max()) + 1e-7)


@pytest.mark.slow
@pytest.mark.sample("looping")
def test_merged_it_gives_the_same_and_is_of_the_sources_class(named: tuple[str, Case, Any], tmp_path: Path) -> None:
    name, case, compiled = named
    trained = with_noise(copy.deepcopy(compiled))
    merged = trained.merge()
    assert merged.certificate.passed
    plain = merged.to_transformers() if name != "looping" else None
    for batch in (case.first, case.second):
        with torch.no_grad():
            wanted = tensors_of(trained(**batch))[-1]
            assert float((tensors_of(case.model(**batch))[-1] - wanted).abs().max()) > 1e-3
            for model in [merged, *([plain.eval()] if plain is not None else [])]:
                assert torch.allclose(tensors_of(model(**batch))[-1], wanted, atol=1e-4)


@pytest.mark.sample("looping")
@pytest.mark.slow
def test_saved_and_loaded_it_is_the_same(named: tuple[str, Case, Any], tmp_path: Path) -> None:
    _, case, compiled = named
    trained = with_noise(copy.deepcopy(compiled))
    trained.save(tmp_path / "artifact")
    loaded = graftc.load(tmp_path / "artifact", case.model).eval()
    for batch in (case.first, case.second):
        with torch.no_grad():
            assert torch.equal(tensors_of(loaded(**batch))[-1], tensors_of(trained(**batch))[-1])


@pytest.mark.sample("looping")
@pytest.mark.slow
def test_left_out_it_is_the_source(named: tuple[str, Case, Any]) -> None:
    _, case, compiled = named
    trained = with_noise(copy.deepcopy(compiled))
    with torch.no_grad(), trained.disabled():
        ours = tensors_of(trained(**case.second))
        assert all(torch.equal(a, b) for a, b in zip(ours, tensors_of(case.model.eval()(**case.second)), strict=True))


@pytest.mark.slow
def test_threads_get_their_own_results(named: tuple[str, Case, Any]) -> None:
    _, case, compiled = named
    trained = with_noise(copy.deepcopy(compiled))
    with torch.no_grad():
        wanted = [tensors_of(trained(**batch))[-1] for batch in (case.first, case.second)]
    equal: dict[int, bool] = {}

    def run(number: int) -> None:
        with torch.no_grad():
            batch = (case.first, case.second)[number % 2]
            equal[number] = torch.equal(tensors_of(trained(**batch))[-1], wanted[number % 2])

    threads = [threading.Thread(target=run, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert equal == dict.fromkeys(range(4), True)


@pytest.mark.parametrize("path", ["model.language_model.layers.0", "model.visual", ""])
def test_hooks_of_a_live_model_are_not_lost(path: str) -> None:
    """The live model's Python calls them, and an instance of its class would not."""
    case = CASES["qwen2_vl"]()
    case.model.get_submodule(path).register_forward_hook(lambda module, args, output: output)
    merged = with_noise(case_compiled("qwen2_vl", case)).merge()
    with pytest.raises(GraftError, match=r"GC052: .* has the hook test_hooks_of_a_live_model_are_not_lost"):
        merged.to_transformers()


def generates_as_its_merged_class(trained: Any, case: Case, length: int) -> tuple[dict[str, Any], Any]:
    """Compare greedy tokens of all three; return the arguments and the model of the source's class."""
    merged = trained.merge()
    plain = merged.to_transformers().eval()
    asked = {key: value for key, value in case.first.items() if key != "labels"}
    wanted = plain.generate(**asked, max_new_tokens=length, do_sample=False)
    assert torch.equal(trained.generate(**asked, max_new_tokens=length, do_sample=False), wanted)
    assert torch.equal(merged.generate(**asked, max_new_tokens=length, do_sample=False), wanted)
    return asked, plain


@pytest.mark.full
def test_a_graph_generates_by_its_layers_where_calls_with_a_cache_are_no_graph() -> None:
    case = llava()
    spec = {"adapt": [{**LORA, "target": {"modules": "**.{q_proj,v_proj}"}}]}
    trained = with_noise(graftc.compile(spec, case.model, case.first, seed=0, cache=False))
    assert not elements_in(trained.compilation.flags)
    asked, _ = generates_as_its_merged_class(trained, case, 6)
    with trained.disabled():
        alone = case.model.eval().generate(**asked, max_new_tokens=6, do_sample=False)
        assert torch.equal(trained.generate(**asked, max_new_tokens=6, do_sample=False), alone)


@pytest.mark.full
@pytest.mark.parametrize("named", ["qwen2_vl", pytest.param("gemma3", marks=pytest.mark.full)], indirect=True)
def test_it_generates_as_its_merged_class_does(named: tuple[str, Case, Any]) -> None:
    _, case, compiled = named
    trained = with_noise(copy.deepcopy(compiled))
    asked, plain = generates_as_its_merged_class(trained, case, 8)
    beams = {"max_new_tokens": 4, "do_sample": False, "num_beams": 2}
    assert torch.equal(trained.generate(**asked, **beams), plain.generate(**asked, **beams))


@pytest.mark.parametrize("named", ["qwen2_vl"], indirect=True)
def test_of_vision_layers_parts_and_maps_are_graphs_and_of_the_others_layers(named: tuple[str, Case, Any]) -> None:
    """The attention of a vision layer reads lengths; its feed-forward part does not."""
    elements = set(elements_in(named[2].compilation.flags))
    assert "model.language_model.layers.0" in elements and "model.visual.blocks.0" not in elements
    assert {"model.visual.blocks.0.attn.qkv", "model.visual.blocks.1.mlp"} <= elements
    assert not any(path.startswith("model.visual.blocks.1.mlp.") for path in elements)
    assert not any(path.startswith("model.language_model.layers.0.") for path in elements)


@pytest.mark.full
@pytest.mark.parametrize("named", ["qwen2_vl", pytest.param("gemma3", marks=pytest.mark.full)], indirect=True)
def test_steps_of_one_kind_add_one_signature(named: tuple[str, Case, Any]) -> None:
    """This holds for any number of generated tokens: the length of the past varies within one graph."""
    _, case, compiled = named
    compiled = copy.deepcopy(compiled).eval()
    asked = {key: value for key, value in case.first.items() if key != "labels"}
    counts = []
    for tokens in (3, 6, 12):
        compiled.generate(**asked, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
        counts.append(len(compiled.compilation.signatures))
    assert counts[0] == counts[1] == counts[2]


@pytest.mark.full
@pytest.mark.slow
def test_hooks_hear_what_they_hear_of_the_source() -> None:
    case = looping()
    compiled = case_compiled("looping", case).eval()
    heard: dict[str, list[Any]] = {"ours": [], "theirs": []}

    def noting(name: str) -> Any:
        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Tensor) -> None:
            heard[name].append((args[0].clone(), kwargs, result.clone()))

        return note

    hooks = [
        model.get_submodule("layers.1").register_forward_hook(noting(name), with_kwargs=True)
        for name, model in (("ours", compiled), ("theirs", case.model))
    ]
    with torch.no_grad():
        compiled(**case.second), case.model(**case.second)
    assert len(heard["ours"]) == len(heard["theirs"]) == 3
    for (a, options, b), (c, same, d) in zip(heard["ours"], heard["theirs"], strict=True):
        assert torch.equal(a, c) and options == same and torch.equal(b, d)
    for hook in hooks:
        hook.remove()
    with torch.no_grad():
        compiled(**case.second)
    assert len(heard["ours"]) == 3


@pytest.mark.slow
def test_a_call_of_another_kind_is_captured_when_it_comes() -> None:
    case = looping()
    compiled = case_compiled("looping", case).eval()
    before = len(compiled.compilation.signatures)
    wide = {"x": torch.randn(2, 3, 4, 16), "rounds": torch.tensor([2])}
    with torch.no_grad():
        assert torch.equal(compiled(**wide), case.model(**wide))
    assert len(compiled.compilation.signatures) > before


@pytest.mark.full
def test_gradient_checkpointing_changes_no_gradient() -> None:
    case = looping()
    grads = []
    for options in ({}, {"checkpoint": "layers"}):
        compiled = with_noise(case_compiled("looping", case, **options)).train()
        loss_of(compiled(**case.first)).backward()
        grads.append(gradients_of(compiled))
    assert grads[0].keys() == grads[1].keys() and grads[0]
    assert all(torch.allclose(gradient, grads[1][name], atol=1e-6) for name, gradient in grads[0].items())


def test_asked_for_a_graph_it_is_refused() -> None:
    case = looping()
    with pytest.raises(GraftError) as caught:
        case_compiled("looping", case, capture="graph")
    assert caught.value.code == "GC030"


@pytest.mark.full
def test_asked_for_layers_maps_are_not_enough() -> None:
    with pytest.raises(GraftError) as caught:
        case_compiled("qwen2_vl", qwen2_vl(), capture="layers")
    assert caught.value.code == "GC030" and "model.visual.blocks" in caught.value.message


@pytest.mark.parametrize(
    "spec",
    [
        {"adapt": [{"method": "prompt", "length": 2}]},
    ],
)
def test_what_acts_on_the_whole_is_refused(spec: dict[str, Any]) -> None:
    case = looping()
    with pytest.raises(GraftError) as caught:
        graftc.compile(spec, case.model, case.first, cache=False)
    assert caught.value.code == "GC149"


@pytest.mark.full
def test_gates_over_rows_are_refused() -> None:
    case = qwen2_vl()
    with pytest.raises(GraftError, match=r"GC149: .* each row of a batch"):
        graftc.compile({"adapt": [{"method": "unipelt"}]}, case.model, case.first, cache=False)


@pytest.mark.slow
def test_it_is_not_exported_as_a_graph(tmp_path: Path) -> None:
    case = looping()
    compiled = case_compiled("looping", case)
    for format in ("onnx", "pt2"):
        with pytest.raises(GraftError) as caught:
            compiled.export(tmp_path / f"model.{format}", format)
        assert caught.value.code == "GC149" and not list(tmp_path.iterdir())


class Chosen(Block):
    """A layer whose result depends on a value."""

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return super().forward(x, scale if float(x.sum()) > 0 else 2 * scale)


@pytest.mark.slow
def test_a_layer_that_reads_values_is_no_graph() -> None:
    """Its graph would be right on the inputs shown, and wrong on others."""
    torch.manual_seed(0)
    model = Looping().eval()
    model.layers[1] = Chosen(16)
    case = looping()
    compiled = case_compiled("looping", Case(model, case.first, case.second)).eval()
    assert not any(
        path.startswith("layers.") and path.count(".") == 1 for path in elements_in(compiled.compilation.flags)
    )
    for factor in (1.0, -1.0):
        batch = {**case.second, "x": case.second["x"].abs() * factor}
        with torch.no_grad():
            assert torch.equal(compiled(**batch), model(**batch))


class Switched(Block):
    """A layer that reads a value if its input has more than three axes."""

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        if x.dim() > 3 and float(x.sum()) > 0:
            scale = -scale
        return super().forward(x, scale)


@pytest.mark.full
def test_a_call_in_which_a_layer_reads_values_is_refused() -> None:
    model, case = Looping().eval(), looping()
    model.layers[1] = Switched(16)
    compiled = case_compiled("looping", Case(model, case.first, case.second)).eval()
    with torch.no_grad():
        assert torch.equal(compiled(**case.second), model.eval()(**case.second))
        with pytest.raises(GraftError) as caught:
            compiled(torch.randn(2, 3, 4, 16), torch.tensor([1]))
    assert caught.value.code == "GC031" and "layers.1" in caught.value.message


class Sometimes(Looping):
    """A model with layers for inputs that it is not shown."""

    def __init__(self) -> None:
        super().__init__()
        self.others = nn.ModuleList(Block(16) for _ in range(2))

    def forward(self, x: Tensor, rounds: Tensor, other: Tensor | None = None) -> Tensor:
        for layer in self.others if other is not None else ():
            x = layer(x)
        return super().forward(x, rounds)


@pytest.mark.full
@pytest.mark.slow
def test_layers_that_the_inputs_shown_do_not_call_are_named() -> None:
    """Adapting such a layer is refused; otherwise a note says that nothing is adapted there."""
    model, case = Sometimes().eval(), looping()
    with pytest.raises(GraftError) as caught:
        case_compiled("looping", Case(model, case.first, case.second))
    assert caught.value.code == "GC023" and "others.0" in caught.value.message
    spec = {"adapt": [{**LORA, "target": {"modules": "layers.*.up"}}]}
    compiled = graftc.compile(spec, model, case.first, cache=False)
    assert any("others" in note for note in compiled.compilation.notes)


class Counting(nn.Module):
    """A map whose Python reads a value, so it runs as the model's own code."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(16))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight * (2.0 if float(x.sum()) > 0 else 1.0)


@pytest.mark.full
@pytest.mark.slow
def test_a_map_that_reads_values_is_no_graph() -> None:
    model, case = Looping().eval(), looping()
    model.layers[1].norm = Counting()
    compiled = case_compiled("looping", Case(model, case.first, case.second)).eval()
    assert "layers.1.norm" not in elements_in(compiled.compilation.flags)
    for factor in (1.0, -1.0):
        batch = {**case.second, "x": case.second["x"].abs() * factor}
        with torch.no_grad():
            assert torch.equal(compiled(**batch), model(**batch))
