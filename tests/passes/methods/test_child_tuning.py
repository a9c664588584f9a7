"""Child-Tuning: the contract, the gradients that reach an optimiser, their cost in memory, and resumed training."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import graftc
from graftc.passes.core.ir.program import provenance
from graftc.passes.core.method.steering import STEP
from graftc.passes.graph.outline import outline
from graftc.specs.errors.diagnostics import GraftError, GraftWarning
from graftc.testing import DeploymentContract, MethodContract
from graftc.testing.compare import flat, inputs_for
from graftc.testing.families import tiny
from tests.kit.comparing import trainable
from tests.kit.models import fresh
from tests.kit.specs import varied
from tests.kit.training import adamw
from tests.runtime.training.test_selecting import batches, entries

CHILD: dict[str, Any] = {"method": "child_tuning"}
FULL = {"method": "full"}
MASK = torch.ops.graftc.grad_mask.default
QUERY = "model.layers.{}.self_attn.q_proj.graftc.child_tuning.weight"


class TestChildTuning(MethodContract):
    """Child-Tuning of every parameter, with a share so large that three steps reach every tensor, however small."""

    adaptation: ClassVar[Mapping[str, Any]] = {**CHILD, "reserve_p": 0.7}


class TestRoles(MethodContract):
    """Child-Tuning of some places, including rows of fused weights."""

    variant = True
    adaptation: ClassVar[Mapping[str, Any]] = {**CHILD, "target": {"role": ["attn.v", "ffn.down"]}}
    families = ("bert", "gpt_neox", "llama", "t5", "vit")


class TestChosenOnce(MethodContract):
    """Variant D, before its entries have been chosen from examples."""

    variant = True
    adaptation: ClassVar[Mapping[str, Any]] = {"method": "child_tuning", "variant": "D"}


class TestDeployed(DeploymentContract):
    """Export and compilation of Child-Tuning."""

    adaptation: ClassVar[Mapping[str, Any]] = CHILD
    families = ("llama",)


def backward(compiled: Any, number: int = 0, run: Callable[..., Any] | None = None) -> None:
    """Run the backward pass of the batch with this number; gradients accumulate."""
    torch.manual_seed(number)
    leaves = flat((compiled if run is None else run)(**inputs_for(compiled, seed=number)))
    torch.stack([leaf.square().sum() for leaf in leaves if leaf.is_floating_point()]).sum().backward()


def gradients(compiled: Any, *numbers: int, run: Callable[..., Any] | None = None) -> dict[str, Tensor]:
    """Return the summed gradients of some batches, by the names that `full` gives them."""
    compiled.zero_grad()
    for number in numbers or (0,):
        backward(compiled, number, run)
    return {name.replace(".child_tuning.", ".full."): tensor.grad for name, tensor in trainable(compiled).items()}


def train(compiled: Any, optimiser: torch.optim.Optimizer, steps: range, *, after: bool = True) -> None:
    """Take the steps with these numbers."""
    for number in steps:
        backward(compiled, number)
        optimiser.step()
        if after:
            compiled.after_step()
        optimiser.zero_grad()


@pytest.mark.full
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "t5", "vit", "mixtral", "gpt_neox"])
def test_every_gradient_is_masked(family: str) -> None:
    """Kept elements are those of `full`, divided by p; a tensor with several uses has one mask for their sum."""
    child, full = (fresh(family, entry, seed=0).train() for entry in (varied(CHILD, reserve_p=0.5), FULL))
    actual, expected = gradients(child), gradients(full)
    assert actual.keys() == expected.keys()
    kept = total = 0
    for name, gradient in expected.items():
        keeps = actual[name] != 0
        assert torch.equal(actual[name], torch.where(keeps, 2 * gradient, 0)), name
        kept, total = kept + int(keeps[gradient != 0].sum()), total + int((gradient != 0).sum())
    assert abs(kept / total - 0.5) <= 5 * (0.25 / total) ** 0.5


@pytest.mark.full
def test_micro_batches_share_a_mask() -> None:
    """Gradients of micro-batches add up to the masked sum to the bit, since division by one half rounds nothing."""
    child, full = (fresh("llama", entry, seed=0).train() for entry in (varied(CHILD, reserve_p=0.5), FULL))
    actual, expected = gradients(child, 1, 2), gradients(full, 1, 2)
    one = gradients(child, 1)
    for name, gradient in expected.items():
        keeps = actual[name] != 0
        assert torch.equal(actual[name], torch.where(keeps, 2 * gradient, 0)), name
        assert not bool((one[name] != 0)[~keeps & (gradient != 0)].any()), name


def mask_of(compiled: Any, name: str) -> Tensor:
    """Return which elements of a tensor's gradient are kept now."""
    return gradients(compiled)[name.replace(".child_tuning.", ".full.")] != 0


def agreement(a: Tensor, b: Tensor) -> float:
    """Return how many standard deviations the agreement of two masks is from that of independent ones of p = 0.3."""
    share = 0.3**2 + 0.7**2
    return abs(float((a == b).double().mean()) - share) / (share * (1 - share) / a.numel()) ** 0.5


@pytest.mark.full
def test_masks_differ() -> None:
    """Masks differ between steps, tensors and seeds, but not between calls."""
    compiled = fresh("llama", CHILD, seed=0).train()
    first = mask_of(compiled, QUERY.format(0))
    assert abs(float(first.double().mean()) - 0.3) <= 5 * (0.21 / first.numel()) ** 0.5
    assert torch.equal(mask_of(compiled, QUERY.format(0)), first)
    assert torch.equal(mask_of(fresh("llama", CHILD, seed=0).train(), QUERY.format(0)), first)
    assert agreement(mask_of(compiled, QUERY.format(1)), first) <= 5
    assert agreement(mask_of(fresh("llama", CHILD, seed=1).train(), QUERY.format(0)), first) <= 5
    for _ in range(3):
        before = mask_of(compiled, QUERY.format(0))
        compiled.after_step()
        assert agreement(mask_of(compiled, QUERY.format(0)), before) <= 5


@pytest.mark.full
def test_the_mean_over_steps_is_the_gradient() -> None:
    """The mean is the gradient within five standard errors, for each element and for all elements together."""
    target = {"role": "attn.q", "layers": 0}
    child = fresh("llama", varied(CHILD, target=target), seed=0).train()
    expected = gradients(fresh("llama", varied(FULL, target=target), seed=0).train())
    name, steps = QUERY.format(0).replace(".child_tuning.", ".full."), 200
    mean = torch.zeros_like(expected[name], dtype=torch.float64)
    for _ in range(steps):
        mean += gradients(child)[name].double() / steps
        child.after_step()
    ratio = mean / expected[name].double()
    error = (0.7 / 0.3 / steps) ** 0.5
    assert float((ratio - 1).abs().max()) <= 5 * error
    assert abs(float(ratio.mean()) - 1) <= 5 * error / ratio.numel() ** 0.5


@pytest.mark.full
def test_with_all_kept_it_is_full_fine_tuning() -> None:
    """With every element kept, AdamW gives the same tensors to the bit, and nothing is inserted or counted."""
    child, full = (fresh("bert", entry, seed=0).train() for entry in (varied(CHILD, reserve_p=1), FULL))
    for compiled in (child, full):
        train(compiled, adamw(compiled, lr=1e-2, weight_decay=0.1), range(4))
    assert [n.target for n in child.program("train").graph.nodes].count(MASK) == 0
    actual, expected = child.adapter_state_dict(), full.adapter_state_dict()
    assert {name.replace(".child_tuning.", ".full.") for name in actual} == set(expected)
    for name, tensor in actual.items():
        assert torch.equal(tensor, expected[name.replace(".child_tuning.", ".full.")]), name


@pytest.mark.full
def test_a_checkpointed_layer_has_the_same_gradients() -> None:
    """Gradients are equal to the bit, since a recomputed layer uses the same masks again."""
    compiled = fresh("bert", CHILD, seed=0).train()
    once = gradients(compiled)
    compiled.gradient_checkpointing_enable()
    again = gradients(compiled)
    assert all(torch.equal(once[name], again[name]) for name in once)


@pytest.mark.full
@pytest.mark.parametrize("seed", [0, 1])
def test_a_resumed_training_goes_on(seed: int) -> None:
    """Tensors and optimiser state resume training to the bit, even if the new model has another seed."""
    uninterrupted, first, second = (fresh("bert", CHILD, seed=own).train() for own in (0, 0, seed))
    train(uninterrupted, adamw(uninterrupted, lr=1e-2, weight_decay=0.1), range(5))
    optimiser, resumed = adamw(first, lr=1e-2, weight_decay=0.1), adamw(second, lr=1e-2, weight_decay=0.1)
    train(first, optimiser, range(3))
    second.load_adapter_state_dict(first.adapter_state_dict())
    resumed.load_state_dict(copy.deepcopy(optimiser.state_dict()))
    train(second, resumed, range(3, 5))
    expected, actual = uninterrupted.adapter_state_dict(), second.adapter_state_dict()
    assert expected[f"graftc.child_tuning.{STEP}"].tolist() == [5]
    assert expected.keys() == actual.keys()
    assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())


@pytest.mark.full
def test_an_artifact_goes_on(tmp_path: Path) -> None:
    """Saved graphs contain the operator, and a step after loading is the step that would have followed."""
    compiled = fresh("llama", CHILD, seed=0).train()
    train(compiled, adamw(compiled, lr=1e-2, weight_decay=0.1), range(2))
    compiled.save(tmp_path / "kept")
    loaded = graftc.load(tmp_path / "kept", tiny("llama")).train()
    nodes = [[n.target for n in c.program("train").graph.nodes].count(MASK) for c in (compiled, loaded)]
    assert nodes[0] == nodes[1] == len(trainable(compiled))
    actual, expected = gradients(loaded), gradients(compiled)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def saved(compiled: Any) -> int:
    """Return the bytes that a forward pass saves for the backward pass, apart from the model's own tensors."""
    owned = {t.untyped_storage().data_ptr() for t in [*compiled.parameters(), *compiled.buffers()]}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        outputs = compiled(**inputs_for(compiled))
    del outputs
    return sum(size for pointer, size in kept.items() if pointer not in owned)


@pytest.mark.full
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "mixtral"])
def test_nothing_is_copied(family: str) -> None:
    """A pass saves as many bytes as with `full`, and a masked weight shares the weight's memory."""
    child, full = (fresh(family, entry, seed=0).train() for entry in (CHILD, FULL))
    for compiled in (child, full):
        torch.manual_seed(0)
        compiled(**inputs_for(compiled))
    assert saved(child) == saved(full) > 0
    seen: list[bool] = []
    for node in child.program("train").graph.find_nodes(op="call_function", target=MASK):
        weight, step, seed = (child.store.get(str(source.target)) for source in node.args[:3])
        seen.append(MASK(weight, step, seed, node.args[3]).data_ptr() == weight.data_ptr())
    assert all(seen) and len(seen) == len(trainable(child))


@pytest.mark.full
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.full)])
def test_a_compiled_step(backend: str) -> None:
    """A step in one graph keeps the same elements of the same gradients, up to rounding; the next step keeps other ones
    without recompilation.
    """
    compiled = fresh("llama", varied(CHILD, target={"role": ["attn.q", "ffn.down"]}), seed=0).train()
    one_graph: Any = torch.compile(compiled, fullgraph=True, dynamic=True, backend=backend)
    for number in range(2):
        with torch._dynamo.config.patch(error_on_recompile=number > 0):
            expected, actual = gradients(compiled), gradients(compiled, run=one_graph)
        for name, gradient in expected.items():
            assert torch.equal(actual[name] == 0, gradient == 0), name
            torch.testing.assert_close(actual[name], gradient, rtol=1e-3, atol=1e-4 * float(gradient.abs().max()))
        compiled.after_step()


@pytest.mark.full
def test_a_step_under_autocast() -> None:
    """Gradients are float32 like the weights, and masked in the same way."""
    compiled = fresh("llama", CHILD, seed=0).train()
    plain = gradients(compiled)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = gradients(compiled)
    for name, gradient in plain.items():
        assert cast[name].dtype == torch.float32
        assert not bool(cast[name][gradient == 0].any()), name


@pytest.mark.full
@pytest.mark.parametrize(("dtype", "kept"), [("float32", torch.float32), ("base", torch.bfloat16)])
def test_a_model_in_16_bits(dtype: str, kept: torch.dtype) -> None:
    compiled = graftc.compile({"adapt": [{**CHILD, "dtype": dtype}]}, tiny("llama").bfloat16()).train()
    gradient = gradients(compiled)[QUERY.format(0).replace(".child_tuning.", ".full.")]
    assert gradient.dtype == kept and abs(float((gradient != 0).double().mean()) - 0.3) < 0.05


@pytest.mark.slow
def test_nodes_say_who_inserted_them_and_go() -> None:
    """Each trained tensor has one node at its site in train mode; eval mode and folded models have none."""
    compiled = fresh("gpt_neox", varied(CHILD, target={"role": ["attn.q", "ffn.down"]}), seed=0).train()
    nodes = compiled.program("train").graph.find_nodes(op="call_function", target=MASK)
    assert {str(node.args[0].target) for node in nodes} == set(trainable(compiled)) and len(nodes) == 8
    for node in nodes:
        origin = provenance(node)
        assert origin is not None and (origin["adaptation"], origin["method"]) == ("child_tuning", "child_tuning")
        assert origin["site"].startswith(f"{node.meta['module']}.") and origin["part"] == "mask"
        assert str(node.args[0].target).startswith(f"{node.meta['module']}.graftc.child_tuning.")
    train(compiled, adamw(compiled, lr=1e-2, weight_decay=0.1), range(1))
    merged = compiled.merge()
    for program in (compiled.program("eval"), *(each.program for each in merged.shown.executables.values())):
        assert MASK not in {node.target for node in program.graph.nodes}
        assert not [n for n in program.graph.find_nodes(op="get_attr") if str(n.target).endswith(("step", "_seed"))]


@pytest.mark.slow
def test_equal_layers_have_equal_code() -> None:
    """Seeds are tensors, so equal layers are compiled once."""
    outlined = outline(fresh("bert", CHILD, seed=0).train().program("train"))
    first, second = (block.graph.python_code("self").src for block in outlined.blocks)
    assert first == second and "grad_mask" in first


@pytest.mark.full
def test_forgetting_to_count_warns() -> None:
    """A warning says that every step has had the same mask, which would train one part of the network only."""
    compiled = fresh("llama", CHILD, seed=0).train()
    train(compiled, adamw(compiled, lr=1e-2, weight_decay=0.1), range(2), after=False)
    with pytest.warns(GraftWarning, match="after_step") as caught:
        compiled.merge()
    assert [warning.message.code for warning in caught] == ["GC025"]


@pytest.mark.full
def test_beside_lora_on_the_same_weight() -> None:
    """The low-rank update gets its full gradient, and both adaptations fold."""
    entries = [{**CHILD, "target": {"role": "attn.q"}}, {"method": "lora", "target": {"role": "attn.q"}, "rank": 4}]
    compiled = graftc.compile({"adapt": entries}, tiny("llama")).train()
    train(compiled, adamw(compiled, lr=1e-2, weight_decay=0.1), range(2))
    by_name = gradients(compiled)
    for name, gradient in by_name.items():
        assert bool((gradient == 0).any()) == (".lora." not in name), name
    assert compiled.merge().certificate.passed


@pytest.mark.parametrize(
    ("fields", "text"),
    [({"reserve_p": 0}, "reserve_p"), ({"reserve_p": 1.5}, "reserve_p"), ({"variant": "E"}, "variant")],
    ids=str,
)
def test_what_is_refused(fields: dict[str, Any], text: str) -> None:
    """Each invalid value is refused with the name of its field."""
    with pytest.raises(GraftError, match=text):
        graftc.load_spec({"adapt": [{**CHILD, **fields}]})


@pytest.mark.full
def test_chosen_once() -> None:
    """The chosen entries are exactly the requested share of all layers' entries, those with the largest mean square of
    clipped gradients. Only these change within the layers, whatever the optimiser does; anything outside may change.
    """
    model = tiny("bert")
    examples = batches(model)
    spec = {"adapt": [{"method": "child_tuning", "variant": "D", "reserve_p": 0.1, "clip": 0.05}]}
    chosen = graftc.compile(spec, model).select(examples)
    inside = {n: p for n, p in model.named_parameters() if ".layer." in n}
    scores = {n: torch.zeros_like(p) for n, p in inside.items()}
    for batch in examples:
        model.zero_grad()
        model(**batch).loss.backward()
        for name, parameter in inside.items():
            assert parameter.grad is not None
            torch.nn.utils.clip_grad_norm_([parameter], 0.05)
            scores[name] += parameter.grad**2
    count = sum(p.numel() for p in inside.values()) // 10
    selected = entries(chosen)
    assert selected.keys() <= inside.keys() and sum(len(own) for own in selected.values()) == count
    least = torch.cat([s.flatten() for s in scores.values()]).topk(count).values.min()
    for name, score in scores.items():
        above = set(torch.nonzero(score.flatten() > least * 1.001).flatten().tolist())
        assert above <= selected.get(name, set())
    optimiser = adamw(chosen, lr=1e-2, weight_decay=0.5)
    chosen.train()
    for batch in examples:
        optimiser.zero_grad()
        chosen(**batch).loss.backward()
        optimiser.step()
    folded = dict(chosen.eval().merge().to_transformers().named_parameters())
    for name, parameter in inside.items():
        moved = set(torch.nonzero((folded[name] != parameter).flatten()).flatten().tolist())
        assert moved <= selected.get(name, set())
    outside = [n for n, p in model.named_parameters() if n not in inside and not torch.equal(p, folded[n])]
    assert any(n.startswith("bert.embeddings.word") for n in outside)
    assert any(n.startswith("classifier") for n in outside)


@pytest.mark.full
def test_all_entries_chosen_are_full_fine_tuning_of_the_layers() -> None:
    """With a share of 1, AdamW without weight decay takes the same course as with `full`."""
    model = tiny("llama")
    layers = {"modules": "model.layers.**"}
    entry = {"method": "child_tuning", "variant": "D", "reserve_p": 1.0, "target": layers}
    every = [graftc.compile({"adapt": [e]}, model) for e in (entry, {"method": "full", "target": layers})]
    folded = []
    for compiled in every:
        compiled.train()
        optimiser = adamw(compiled, lr=1e-3, weight_decay=0)
        for batch in batches(model, 3):
            optimiser.zero_grad()
            compiled(**batch).loss.backward()
            optimiser.step()
        folded.append(dict(compiled.eval().merge().to_transformers().named_parameters()))
    for name, value in folded[0].items():
        torch.testing.assert_close(value, folded[1][name], rtol=1e-4, atol=1e-5)
