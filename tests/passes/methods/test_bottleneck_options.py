"""Options of bottleneck adapters: single linear maps, scale, dropout, width, starts, and refused combinations."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graftc
from graftc.specs.errors.diagnostics import GraftError
from graftc.testing import largest_difference, outputs_of, perturb, same_bits
from graftc.testing.compare import flat, inputs_for
from graftc.testing.families import tiny

LLM = {"method": "llm_adapters", "target": {"modules": ["up", "down"]}, "bottleneck": 3}
PLACED = {"method": "bottleneck", "target": {"modules": "down"}, "bottleneck": 3}


class Parts(nn.Module):
    """Two linear maps in a row."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(12, 20), nn.Linear(20, 8)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[batch, sequence, 12]`` to ``[batch, sequence, 8]``."""
        return self.down(torch.relu(self.up(x)))


def parts(**fields: Any) -> tuple[Parts, Any, dict[str, Tensor], Tensor]:
    """The two maps in float64, their adapted and perturbed form, the adapters' tensors, and an input."""
    model, x = Parts().double(), torch.randn(3, 5, 12, dtype=torch.float64)
    entry = {**(PLACED if fields.get("method") == "bottleneck" else LLM), **fields}
    compiled = graftc.compile({"adapt": [entry]}, model, {"x": x}).eval()
    perturb(compiled, 0.3)
    name = compiled.spec.adapt[0].name
    tensors = {n.replace(f".graftc.{name}", ""): t.detach() for n, t in compiled.adapter_state_dict().items()}
    return model, compiled, tensors, x


def delta(tensors: dict[str, Tensor], place: str, x: Tensor) -> Tensor:
    """Return ``U tanh(D x)``."""
    return torch.tanh(x @ tensors[f"{place}.down"].T) @ tensors[f"{place}.up"].T


# --- single maps ----------------------------------------------------------------------------------------------


def placed(placement: str, linear: nn.Linear, tensors: dict[str, Tensor], place: str, x: Tensor) -> Tensor:
    """Return the output of a map with an adapter of scale 0.5."""
    if placement == "input":
        return linear(x + 0.5 * delta(tensors, place, x))
    z = linear(x)
    return z + 0.5 * delta(tensors, place, z if placement == "output" else x)


@pytest.mark.parametrize("placement", ["input", "output", "parallel"])
def test_placements(placement: str) -> None:
    """The placements compute ``W (x + s A(x)) + b``, ``z + s A(z)`` and ``z + s A(x)``."""
    model, compiled, tensors, x = parts(placement=placement, scale=0.5)
    inner = torch.relu(placed(placement, model.up, tensors, "up", x))
    expected = placed(placement, model.down, tensors, "down", inner)
    torch.testing.assert_close(compiled(x), expected, rtol=0, atol=1e-12)
    assert largest_difference([compiled(x)], [model(x)]) > 0.05


@pytest.mark.full
def test_series_is_behind_the_maps_that_end_a_sublayer() -> None:
    """In series, adapters come after the maps that end a sublayer and before all others, by role and not by name."""
    entry = {"method": "llm_adapters", "target": {"role": ["attn.{q,k,v,o}", "ffn.{gate,up,down}"]}, "bottleneck": 3}
    tensors = graftc.compile({"adapt": [entry]}, tiny("llama")).adapter_state_dict()
    assert {t.shape[0] for n, t in tensors.items() if n.endswith(".down")} == {3}
    widths = {n.split(".")[4]: t.shape[1] for n, t in tensors.items() if ".0." in n and n.endswith(".down")}
    before = dict.fromkeys(("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"), 48)
    assert widths == {**before, "o_proj": 48, "down_proj": 48}
    tensors = parts()[2]  # without a residual, the last map is the model's head
    assert [tensors[f"{name}.down"].shape[1] for name in ("up", "down")] == [12, 20]


def test_parallel_without_activation_is_low_rank() -> None:
    """With the identity as its activation, an adapter computes ``W + s U D`` in float64."""
    model, compiled, tensors, x = parts(placement="parallel", activation="identity", scale=0.7)
    merged = copy.deepcopy(model)
    with torch.no_grad():
        for name in ("up", "down"):
            merged.get_submodule(name).weight += 0.7 * tensors[f"{name}.up"] @ tensors[f"{name}.down"]
    torch.testing.assert_close(compiled(x), merged(x), rtol=0, atol=1e-12)
    assert largest_difference([compiled(x)], [model(x)]) > 0.05


@pytest.mark.full
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_parallel_without_activation_in_families(family: str) -> None:
    """In families with transposed weights and rows of fused ones, such an adapter computes ``W + s U D``, too."""
    model, merged = tiny(family, dtype=torch.float64), tiny(family, dtype=torch.float64)
    entry = {"method": "llm_adapters", "target": {"role": ["attn.k", "ffn.down"]}, "placement": "parallel"}
    compiled = graftc.compile({"adapt": [{**entry, "activation": "identity", "bottleneck": 4}]}, model).eval()
    perturb(compiled, 0.3)
    tensors = compiled.adapter_state_dict()
    with torch.no_grad():
        for name in [n for n in tensors if n.endswith(".down")]:
            module = name.partition(".graftc.")[0]
            update = tensors[name.removesuffix("down") + "up"] @ tensors[name]
            weight = merged.get_parameter(f"{module}.weight")
            weight = weight.T if family == "gpt2" else weight
            (weight[48:96] if weight.shape[0] == 144 else weight).add_(update)
    inputs = inputs_for(compiled)
    assert largest_difference(outputs_of(compiled, inputs), outputs_of(merged, inputs)) <= 1e-12
    assert largest_difference(outputs_of(compiled, inputs), outputs_of(model, inputs)) > 0.05


@pytest.mark.parametrize(
    ("reads", "adds_to", "width"), [("input", "input", 20), ("output", "output", 8), ("input", "output", 20)]
)
def test_the_mechanism_on_a_map(reads: str, adds_to: str, width: int) -> None:
    """The mechanism reads and adds at the named ends of a linear map, with biases."""
    model, compiled, tensors, x = parts(method="bottleneck", reads=reads, adds_to=adds_to, activation="tanh")
    assert tensors["down.down"].shape == (3, width)
    inner = torch.relu(model.up(x))

    def adapter(v: Tensor) -> Tensor:
        hidden = torch.tanh(v @ tensors["down.down"].T + tensors["down.down_bias"])
        return hidden @ tensors["down.up"].T + tensors["down.up_bias"]

    z = model.down(inner)
    if adds_to == "input":
        expected = model.down(inner + adapter(inner))
    else:
        expected = z + adapter(z if reads == "output" else inner)
    torch.testing.assert_close(compiled(x), expected, rtol=0, atol=1e-12)


# --- scale, dropout, width, start -----------------------------------------------------------------------------


def test_learned_scale() -> None:
    """A learned scale is one number that starts at 1, trains, and multiplies the added value."""
    model, x = Parts().double(), torch.randn(3, 5, 12, dtype=torch.float64)
    entry = {**LLM, "target": {"modules": "down"}, "placement": "parallel", "scale": "learned"}
    compiled = graftc.compile({"adapt": [entry]}, model, {"x": x}).eval()
    name = "down.graftc.llm_adapters.scale"
    scale = compiled.get_parameter(name)
    assert scale.shape == (1,) and scale.requires_grad and float(scale.detach()) == 1
    perturb(compiled, 0.3)

    def added(value: float) -> Tensor:
        with torch.no_grad():
            scale.fill_(value)
            difference: Tensor = compiled(x) - model(x)
        return difference

    one = added(1.0)
    assert float(one.abs().max()) > 0.05
    torch.testing.assert_close(added(-2.5), -2.5 * one, rtol=0, atol=1e-12)
    compiled(x).sum().backward()
    assert scale.grad is not None and float(scale.grad.abs()) > 0


def test_dropout_acts_on_the_bottleneck() -> None:
    """With an identity as the second projection, every entry of the result is one of the bottleneck: dropped, or
    divided by the share that is kept.
    """
    x = torch.randn(64, 50, 12, dtype=torch.float64)
    entry = {**PLACED, "bottleneck": 8, "activation": "identity", "bias": False, "dropout": 0.25}
    model = Parts().double()
    compiled = graftc.compile({"adapt": [entry]}, model, {"x": x})
    tensors = compiled.adapter_state_dict()
    tensors["down.graftc.bottleneck.up"] = torch.eye(8, dtype=torch.float64)
    compiled.load_adapter_state_dict(tensors)
    inner = torch.relu(model.up(x))
    hidden = inner @ tensors["down.graftc.bottleneck.down"].T
    with torch.no_grad():
        ratio = (compiled.train()(x) - model(x)) / hidden
        kept = ratio.abs() > 1e-6
        torch.testing.assert_close(ratio[kept], torch.full_like(ratio[kept], 1 / 0.75), rtol=1e-4, atol=1e-6)
        assert abs(float(kept.double().mean()) - 0.75) < 0.02
        evaluated = compiled.eval()(x)
    torch.testing.assert_close(evaluated, model(x) + hidden, rtol=0, atol=1e-12)


@pytest.mark.full
@pytest.mark.parametrize(("reduction", "width"), [(16, 3), (5, 9), (5.5, 8), (48, 1), (47.5, 1), (0.5, 96), (32, 1)])
def test_reduction_is_rounded_down(reduction: float, width: int) -> None:
    """The width is ``int(d // r)`` of 48, as in AdapterHub."""
    compiled = graftc.compile({"adapt": [{"method": "pfeiffer", "reduction": reduction}]}, tiny("bert"))
    assert {t.shape[0] for n, t in compiled.adapter_state_dict().items() if n.endswith(".down")} == {width}


@pytest.mark.slow
def test_reduction_is_of_what_is_read() -> None:
    """In parallel with a map from 80 to 48, the reduction divides 80."""
    entry = {"method": "llm_adapters", "placement": "parallel", "bottleneck": None, "reduction": 16}
    tensors = graftc.compile({"adapt": [entry]}, tiny("bert")).adapter_state_dict()
    assert {tuple(t.shape) for t in tensors.values()} == {(5, 80), (48, 5)}


@pytest.mark.slow
def test_overrides_of_width() -> None:
    """Overrides set the width by layer and by role, in either of its two forms, and together with another scale."""
    entry = {
        "method": "houlsby",
        "bottleneck": 7,
        "overrides": [{"layers": 0, "bottleneck": 4}, {"role": "attn.sublayer", "reduction": 16, "scale": 2.0}],
    }
    compiled = graftc.compile({"adapt": [entry]}, tiny("bert"))
    tensors = compiled.adapter_state_dict()
    widths = [t.shape[0] for n, t in tensors.items() if n.endswith(".down")]
    assert sorted(widths) == [3, 4, 4, 7]
    assert tensors["bert.encoder.layer.1.graftc.houlsby.attn.down"].shape == (3, 48)
    scales = [
        n for n in compiled.program("eval").graph.nodes if n.target is torch.ops.aten.mul.Tensor and 2.0 in n.args
    ]
    assert len(scales) == 1


@pytest.mark.full
@pytest.mark.parametrize(
    ("init", "down", "up"),
    [("lora", 48**-0.5 / 3**0.5, 0.0), ("bert", 0.02, 0.02), ("houlsby", 8.8e-4, 8.8e-4), ("xavier", 0.12, 0.12)],
)
def test_starts(init: str, down: float, up: float) -> None:
    """Each start has its own standard deviations and zero biases; only `lora` starts from the base."""
    model = tiny("bert")
    entry = {"method": "bottleneck", "bottleneck": 96, "init": init}
    compiled = graftc.compile({"adapt": [entry]}, model).eval()
    for name, tensor in compiled.adapter_state_dict().items():
        part = name.rpartition(".")[2]
        expected = {"down": down, "up": up}.get(part, 0.0)
        assert float(tensor.std()) == pytest.approx(expected, rel=0.05), name
        if init == "houlsby":
            assert float(tensor.abs().max()) <= 2e-3
    inputs = inputs_for(compiled)
    assert same_bits(outputs_of(compiled, inputs), outputs_of(model, inputs)) == (init == "lora")


@pytest.mark.slow
def test_houlsby_starts_near_the_base() -> None:
    """At the start one adapter changes its branch by about one part in ten thousand."""
    model = tiny("bert")
    compiled = graftc.compile({"adapt": [{"method": "houlsby", "bottleneck": 24}]}, model).eval()
    inputs = inputs_for(compiled)
    actual, base = outputs_of(compiled, inputs), outputs_of(model, inputs)
    assert 0 < largest_difference(actual, base) < 1e-3


@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh", "silu", "tanh", "leaky_relu", "identity"])
def test_activations(activation: str) -> None:
    """Each activation is torch's own function."""
    functions = {"gelu_tanh": lambda x: nn.functional.gelu(x, approximate="tanh"), "identity": lambda x: x}
    function = functions.get(activation) or getattr(nn.functional, activation)
    model, compiled, tensors, x = parts(method="bottleneck", activation=activation, bias=False)
    inner = torch.relu(model.up(x))
    expected = model.down(inner) + function(inner @ tensors["down.down"].T) @ tensors["down.up"].T
    torch.testing.assert_close(compiled(x), expected, rtol=0, atol=1e-12)


@pytest.mark.full
def test_norms_of_houlsby_train_as_copies() -> None:
    """`norms: true` also trains scale and shift of every normalisation, including that of the embeddings."""
    model = tiny("bert")
    plain, with_norms = (
        graftc.compile({"adapt": [{"method": "houlsby", "bottleneck": 5, "norms": norms}]}, model)
        for norms in (False, True)
    )
    extra = with_norms.report.trainable_parameters - plain.report.trainable_parameters
    assert extra == 5 * 2 * 48
    assert sum("LayerNorm" in n for n in with_norms.adapter_state_dict()) == 5 * 2


@pytest.mark.full
def test_flops() -> None:
    """The two projections cost four operations per token, input feature, hidden unit and site."""
    for method, sites in (("houlsby", 4), ("pfeiffer", 2), ("llm_adapters", 2)):
        report = graftc.compile({"adapt": [{"method": method, "bottleneck": 5}]}, tiny("bert")).report
        assert report.adaptations[0].sites == sites
        assert report.adaptations[0].flops_per_token == sites * 2 * 2 * 48 * 5


# --- refused combinations -------------------------------------------------------------------------------------

INNER = {"method": "bottleneck", "reads": "stream", "adds_to": "inner", "bottleneck": 4}
PATCHES = {"modules": "**.patch_embeddings.projection"}


@pytest.mark.full
@pytest.mark.parametrize(
    ("family", "entry", "code", "message"),
    [
        ("mixtral", INNER, "GC017", "more than one linear map"),
        ("mixtral", {**INNER, "adds_to": "branch", "reads": "inner"}, "GC017", "no inner activation"),
        ("vit", {**LLM, "target": PATCHES}, "GC017", "not a product of its input"),
        (
            "bert",
            {**PLACED, "target": {"role": "ffn.down"}, "reads": "output", "adds_to": "input"},
            "GC017",
            "and add to its input",
        ),
        ("bert", {"method": "pfeiffer", "reduction": 49}, "GC020", "for an input of width 48"),
        ("mixtral", {"method": "llm_adapters"}, "GC015", "ffn.down"),
        ("bert", {"method": "pfeiffer", "target": {"role": "ffn.down"}}, "GC016", "linear"),
        ("bert", {"method": "pfeiffer", "bottleneck": 4, "reduction": 4}, "GC002", "both set the width"),
        ("bert", {"method": "he_parallel", "init_std": 0.1}, "GC002", "has no effect with init: lora"),
        (
            "bert",
            {"method": "bottleneck", "reads": "input", "adds_to": "branch"},
            "GC002",
            "has an input and an output",
        ),
        ("bert", {"method": "bottleneck", "adds_to": "sum"}, "GC002", "cannot add to the sum"),
        ("bert", {"method": "bottleneck", "reads": "output", "adds_to": "inner"}, "GC002", "which comes earlier"),
        ("bert", {"method": "houlsby", "norms": True, "target": {"modules": "**"}}, "GC002", "norms: true"),
    ],
)
def test_refusals(family: str, entry: dict[str, Any], code: str, message: str) -> None:
    with pytest.raises(GraftError, match=message) as error:
        graftc.compile({"adapt": [entry]}, tiny(family))
    assert error.value.code == code


@pytest.mark.full
def test_nothing_random_may_lie_between() -> None:
    """Nodes between the branch and the place that is read are computed twice. A norm gives the same result, but an
    adapter with dropout after the norm does not, so it has to come later, as the error says.
    """
    behind, pfeiffer = {"method": "adapter_l", "bottleneck": 4, "dropout": 0.1}, {"method": "pfeiffer"}
    with pytest.raises(GraftError, match=r"draws random numbers between the branch and the .* of bert") as error:
        graftc.compile({"adapt": [behind, pfeiffer]}, tiny("bert"))
    assert error.value.code == "GC017" and "after this one" in str(error.value.hint)
    assert graftc.compile({"adapt": [pfeiffer, behind]}, tiny("bert")).report.trainable_parameters > 0


@pytest.mark.full
def test_train_mode_draws_anew() -> None:
    """Two calls differ by the adapter's dropout in train mode, and not at all in eval mode."""
    model = tiny("llama")
    compiled = graftc.compile({"adapt": [{"method": "he_sequential", "bottleneck": 8, "dropout": 0.3}]}, model).train()
    perturb(compiled, 0.3)
    inputs = inputs_for(compiled)
    with torch.no_grad():
        one, two = (flat(compiled(**inputs)) for _ in range(2))
    assert largest_difference(one, two) > 1e-3
    assert same_bits(outputs_of(compiled, inputs), outputs_of(compiled, inputs))
