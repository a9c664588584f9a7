"""The algebra and the options of DoRA."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import graftc
from graftc.passes.core.ir.program import provenance
from graftc.passes.core.weights.names import RESERVED
from graftc.specs.errors.diagnostics import GraftError
from graftc.testing import largest_difference, outputs_of, perturb, same_bits
from graftc.testing.compare import SHAPES, flat, inputs_for
from graftc.testing.families import tiny
from tests.kit.comparing import trainable
from tests.kit.models import fresh
from tests.kit.specs import varied
from tests.passes.methods.dora_models import (
    DORA,
    Line,
    exact,
    losses,
    on_line,
    roles_of,
)


@pytest.mark.full
@pytest.mark.parametrize("family", ["bert", "gpt2", "gpt_neox", "llama", "mixtral"])
def test_row_norms_of_the_folded_weight_are_the_magnitudes(family: str) -> None:
    """Every row norm is ``|m|``, for negative magnitudes as well."""
    compiled = fresh(family, varied(DORA, roles_of(family)))
    perturb(compiled, 0.3)
    with torch.no_grad():
        for name, tensor in trainable(compiled).items():
            if name.endswith(".m"):
                tensor[..., ::3] *= -1
    compilation = compiled.compilation
    (resolved,) = compilation.main.resolved
    for site, _ in resolved.places:
        folded = site.own.operand(exact(compiled, site.own.tensor))
        magnitude = compilation.store.get(compilation.parts["dora"][site.key]["m"]).detach().double()
        torch.testing.assert_close(torch.linalg.vector_norm(folded, dim=-1), magnitude.abs(), rtol=1e-14, atol=0)


def test_twice_the_magnitude_is_twice_the_output_less_the_bias() -> None:
    line = Line()
    compiled = on_line(line, rank=3).eval()
    perturb(compiled, 0.2)
    x, bias = torch.randn(7, 8), line.map.bias.detach()
    with torch.no_grad():
        once = compiled(x) - bias
        dict(compiled.named_parameters())["map.graftc.dora.m"].mul_(2)
        torch.testing.assert_close(compiled(x) - bias, 2 * once, rtol=1e-5, atol=1e-6)
    assert float((once - (line(x) - bias)).abs().max().detach()) > 1e-2


def test_the_direction_does_not_depend_on_the_size_of_v() -> None:
    """``V`` and ``3 V`` have the same direction: with tripled W and B and the same m, the outputs are unchanged."""
    small, large = Line(bias=False), Line(bias=False)
    with torch.no_grad():
        large.map.weight.copy_(3 * small.map.weight)
    first, second = (on_line(line, rank=3).eval() for line in (small, large))
    tensors = perturb(first, 0.2)
    b = "map.graftc.dora.B"
    second.load_adapter_state_dict({**tensors, b: 3 * tensors[b]})
    x = torch.randn(7, 8)
    torch.testing.assert_close(second(x), first(x), rtol=1e-5, atol=1e-6)


@pytest.mark.full
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dropout_on", ["input", "branch"])
def test_identity_at_the_start_in_train_mode(dtype: torch.dtype, dropout_on: str) -> None:
    """The start is exact even with dropout, since it multiplies dropped values by zero; magnitudes are float32."""
    model = tiny("llama", dtype=dtype)
    compiled = fresh(model, varied(DORA, dropout=0.5, dropout_on=dropout_on))
    magnitudes = [t for n, t in trainable(compiled).items() if n.endswith(".m")]
    assert {t.dtype for t in magnitudes} == {torch.float32}
    inputs = inputs_for(compiled)
    with torch.no_grad():
        expected = flat(model(**inputs))
        compiled.train()
        actual = flat(compiled(**inputs))
    assert torch.equal(actual[0], expected[0])


@pytest.mark.full
def test_magnitude_only_sites() -> None:
    """Sites with ``direction: false`` have no A and B, and the fold scales their rows."""
    model = tiny("gpt2")
    compiled = fresh(model, varied(DORA, ["attn.v", "ffn.down"], overrides=[{"role": "attn.v", "direction": False}]))
    shapes = {}
    for name, tensor in trainable(compiled).items():
        module, _, part = name.partition(f".{RESERVED}.dora.")
        if ".h.0." in f".{module}.":
            shapes[part] = tuple(tensor.shape)
    assert shapes == {"v.m": (48,), "A": (4, 80), "B": (48, 4), "m": (48,)}
    perturb(compiled)
    name = "transformer.h.0.attn.c_attn"
    before = model.get_parameter(f"{name}.weight").detach().double()
    after = exact(compiled, f"{name}.weight")
    magnitude = trainable(compiled)[f"{name}.graftc.dora.v.m"].detach().double()
    expected = before[:, 96:] * magnitude / torch.linalg.vector_norm(before[:, 96:], dim=0)
    torch.testing.assert_close(after[:, 96:], expected, rtol=1e-14, atol=1e-15)
    assert torch.equal(after[:, :96], before[:, :96])


@pytest.mark.slow
def test_magnitudes_alone() -> None:
    compiled = fresh("bert", varied(DORA, "ffn.down", direction=False))
    assert {name.rpartition(".")[2] for name in trainable(compiled)} == {"m"}
    assert compiled.report.trainable_parameters == 2 * 48


@pytest.mark.slow
def test_overrides_by_site() -> None:
    compiled = fresh("bert", varied(DORA, "ffn.down", overrides=[{"layers": "0", "rank": 2, "alpha": 5.0}]))
    ranks = {name.split(".")[3]: t.shape[0] for name, t in trainable(compiled).items() if name.endswith(".A")}
    assert ranks == {"0": 2, "1": 4}


def test_rank_over_the_layer() -> None:
    with pytest.raises(GraftError) as error:
        fresh("llama", varied(DORA, "attn.v", rank=25))
    assert error.value.code == "GC020"
    assert "24 x 48" in error.value.message


@pytest.mark.slow
def test_the_weight_is_never_adapted_in_a_graph() -> None:
    """No inserted node has the size of a weight, since norms come from products of the rank's size."""
    compiled = fresh("llama", varied(DORA, "ffn.down", norm_gradient="exact"))
    for program in (compiled.program("train"), compiled.program("eval")):
        inserted = [n for n in program.graph.nodes if n.op == "call_function" and provenance(n) is not None]
        shapes = [tuple(n.meta["val"].shape) for n in inserted]
        assert shapes
        assert all(sorted(shape) != [48, 80] for shape in shapes if len(shape) == 2)


def test_rows_of_zeros_train_and_fold() -> None:
    """A row of norm zero causes no division by zero; without a bias its magnitude gets a gradient once B has moved."""
    line = Line(bias=False)
    with torch.no_grad():
        line.map.weight[2] = 0
    compiled = on_line(line, rank=3)
    x = torch.randn(9, 8)
    assert torch.equal(compiled(x), line(x))
    perturb(compiled, 0.3)
    losses([compiled(x)]).backward()
    assert all(t.grad is not None and t.grad.isfinite().all() for t in trainable(compiled).values())
    folded = compiled.eval().merge()
    assert largest_difference([folded(x)], [compiled(x)]) <= 1e-5


class Picture(nn.Module):
    """A model of two square convolutions, over points and over patches, and a grouped one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.point = nn.Conv2d(6, 6, 1)
        self.patch = nn.Conv2d(6, 6, 3, padding=1)
        self.grouped = nn.Conv2d(6, 4, 3, groups=2, stride=2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[batch, 6, 9, 9]`` to ``[batch, 4, 4, 4]``."""
        return self.grouped(torch.relu(self.patch(torch.relu(self.point(x)))))


@pytest.mark.full
@pytest.mark.parametrize("names", [["point"], ["patch"], ["grouped"], ["point", "patch", "grouped"]])
def test_convolutions_start_fold_and_unfold(names: list[str]) -> None:
    """The base is exact before and after, even for square kernels, where no shape would reveal a missing transpose."""
    model = Picture()
    before = copy.deepcopy(model.state_dict())
    x = torch.randn(2, 6, 9, 9)
    spec = {"adapt": [{"method": "dora", "target": {"modules": names}, "rank": 3}]}
    compiled = graftc.compile(spec, model, {"x": x}).eval()
    assert torch.equal(compiled(x), model(x))
    perturb(compiled, 0.2)
    merged = compiled.merge()
    assert merged.certificate.passed
    assert float((merged(x) - compiled(x)).detach().abs().max()) <= 1e-5
    assert float((compiled(x) - model(x)).detach().abs().max()) > 1e-2
    with compiled.disabled():
        assert torch.equal(compiled(x), model(x))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_square_layers_fold(family: str) -> None:
    """Projections from 48 to 48 features fold, stored in either orientation."""
    compiled = fresh(family, varied(DORA, "attn.o"))
    perturb(compiled, 0.2)
    inputs = inputs_for(compiled)
    assert largest_difference(outputs_of(compiled.merge(), inputs), outputs_of(compiled, inputs)) <= 2e-5


@pytest.mark.slow
def test_merging_leaves_everything_else_as_it_was() -> None:
    model = tiny("gpt2")
    before = copy.deepcopy(model.state_dict())
    compiled = fresh(model, DORA)
    perturb(compiled, 0.2)
    inputs = inputs_for(compiled)
    expected = outputs_of(compiled, inputs)
    compiled.merge()
    assert same_bits(outputs_of(compiled, inputs), expected)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_shared_layer_has_one_scale() -> None:
    """All uses of a weight read the scale that the first one computes, and the weight folds as one place."""
    model = Twice()
    x = torch.randn(5, 6)
    compiled = graftc.compile({"adapt": [{"method": "dora", "target": {"modules": "map"}, "rank": 2}]}, model, {"x": x})
    target = torch.ops.graftc.row_norm.default
    assert len(compiled.program("train").graph.find_nodes(op="call_function", target=target)) == 1
    perturb(compiled, 0.2)
    compiled.eval()
    assert float((compiled.merge()(x) - compiled(x)).detach().abs().max()) <= 1e-5


class Twice(nn.Module):
    """A model that uses one linear map twice."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.map = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[batch, 6]`` to ``[batch, 6]``."""
        return self.map(torch.relu(self.map(x)))


@pytest.mark.full
def test_saved_and_loaded(tmp_path: Path) -> None:
    """Tensors that follow from the base's weights are not saved, and are computed again on loading."""
    model = tiny("gpt2")
    compiled = fresh(model, varied(DORA, dropout=0.1))
    assert {name.rpartition(".")[2] for name in compiled.adapter_state_dict()} == {"A", "B", "m"}
    perturb(compiled, 0.2)
    compiled.save(tmp_path / "kept")
    inputs = inputs_for(compiled)
    assert same_bits(outputs_of(graftc.load(tmp_path / "kept", model=model), inputs), outputs_of(compiled, inputs))


@pytest.mark.full
def test_pt2_holds_aten_only(tmp_path: Path) -> None:
    compiled = fresh("llama", DORA)
    perturb(compiled, 0.1)
    inputs = inputs_for(compiled)
    program = torch.export.load(compiled.export(tmp_path / "model.pt2", format="pt2"))
    assert not any("graftc." in str(node.target) for node in program.graph.nodes if node.op == "call_function")
    outputs = list(program.module()(**inputs).values())
    assert largest_difference(outputs, outputs_of(compiled, inputs)) <= 1e-5


@pytest.mark.full
def test_shapes_that_were_not_captured() -> None:
    compiled = fresh("llama", varied(DORA, norm_gradient="exact", dropout=0.2))
    perturb(compiled, 0.1)
    merged = compiled.merge()
    for sizes in SHAPES:
        inputs = inputs_for(compiled, sizes)
        assert largest_difference(outputs_of(merged, inputs), outputs_of(compiled, inputs)) <= 2e-5
