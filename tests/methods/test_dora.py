"""DoRA's algebra, gradients and options."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graftc
from graftc.passes.core.program import provenance
from graftc.passes.core.store import RESERVED
from graftc.specs.diagnostics import GraftError
from graftc.testing import largest_difference, outputs_of, perturb, same_bits
from graftc.testing.compare import SHAPES, flat, inputs_for
from tests.families import FAMILIES, tiny

ROLES = ["attn.q", "attn.v", "ffn.down"]


def roles_of(family: str) -> list[str]:
    """All of Mixtral's feed-forward layers are experts."""
    return ["attn.q", "attn.v", "experts"] if family == "mixtral" else ROLES


def adapted(model: nn.Module, role: Any = ROLES, **fields: Any) -> Any:
    """``model`` with DoRA of rank 4 on ``role``, in eval mode."""
    entry = {"method": "dora", "target": {"role": role}, "rank": 4, "alpha": 6, **fields}
    return graftc.compile({"adapt": [entry]}, model).eval()


def trainable(compiled: Any) -> dict[str, Tensor]:
    """Trainable tensors by name."""
    return {name: tensor for name, tensor in compiled.named_parameters() if tensor.requires_grad}


def exact(compiled: Any, name: str) -> Tensor:
    """A folded base tensor in float64, before rounding."""
    found: Tensor = compiled.compilation.lazy_tensors().exact(name)
    return found


def written_out(weight: Tensor, own: Mapping[str, Tensor], scaling: float, detached: bool) -> Tensor:
    """``m V / |V|``, as it stands in the paper."""
    direction = weight + scaling * own["B"] @ own["A"] if "A" in own else weight
    norm = torch.linalg.vector_norm(direction, dim=-1, keepdim=True)
    return own["m"].unsqueeze(-1) * direction / (norm.detach() if detached else norm)


def reference(
    compiled: Any, model: nn.Module, tensors: Mapping[str, Tensor], inputs: Mapping[str, Any]
) -> list[Tensor]:
    """Outputs of the source model with every adapted weight written out, differentiable in ``tensors``."""
    compilation = compiled.compilation
    weights: dict[str, Tensor] = {}
    for resolved in compilation.main.resolved:
        for site, spec in resolved.places:
            names = compilation.parts[resolved.name][site.key]
            own = {part: tensors[name] for part, name in names.items()}
            stored = weights.get(site.use.weight, model.get_parameter(site.use.weight).detach())
            oriented = site.use.layout.orient(stored)
            rows = written_out(site.rows.take(oriented, -2), own, spec.scaling, spec.norm_gradient == "detached")
            weights[site.use.weight] = site.use.layout.restore(site.rows.put(oriented, rows, -2), stored.shape)
    found = torch.func.functional_call(model, weights, kwargs=dict(inputs))
    return [leaf for leaf in flat(found) if leaf.is_floating_point()]


def losses(leaves: list[Tensor]) -> Tensor:
    """One number that every output takes part in."""
    generator = torch.Generator().manual_seed(3)
    return sum(((leaf * torch.randn(leaf.shape, generator=generator)).sum() for leaf in leaves), torch.zeros(()))


@pytest.mark.parametrize("norm_gradient", ["detached", "exact"])
@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_and_gradients_are_those_of_the_formula(family: str, norm_gradient: str) -> None:
    """Against autograd on the formula written out in the source model, in float64: 1e-10, gradients to 1e-9 of their
    largest. Kernels for experts have no float64; there 1e-5 and 1e-4."""
    wide = family != "mixtral"
    model = tiny(family, dtype=torch.float64 if wide else torch.float32)
    compiled = adapted(model, roles_of(family), norm_gradient=norm_gradient)
    perturb(compiled, 0.2)
    tensors = trainable(compiled)
    inputs = inputs_for(compiled)
    copies = {name: tensor.detach().clone().requires_grad_() for name, tensor in tensors.items()}
    expected = reference(compiled, model, copies, inputs)
    found = [leaf for leaf in flat(compiled(**inputs)) if leaf.is_floating_point()]
    assert largest_difference(found, expected) <= (1e-10 if wide else 1e-5)
    losses(found).backward()
    losses(expected).backward()
    for name, tensor in tensors.items():
        a, b = tensor.grad, copies[name].grad
        assert a is not None and b is not None
        assert bool(a.any()), name
        assert float((a - b).abs().max() / b.abs().max()) <= (1e-9 if wide else 1e-4), name


def test_detached_and_exact_differ_in_gradients_only() -> None:
    """The same forward pass; through the norm, gradients of A and B change and that of m does not."""
    model, grads, outputs = tiny("llama"), [], []
    for kind in ("detached", "exact"):
        compiled = adapted(model, norm_gradient=kind)
        perturb(compiled, 0.2)
        inputs = inputs_for(compiled)
        outputs.append(outputs_of(compiled, inputs))
        losses(flat(compiled(**inputs))).backward()
        grads.append({name: tensor.grad for name, tensor in trainable(compiled).items()})
    assert same_bits(*outputs)
    last = "model.layers.1.mlp.down_proj.graftc.dora."
    torch.testing.assert_close(grads[0][last + "m"], grads[1][last + "m"], rtol=1e-5, atol=1e-5)
    for name in grads[0]:
        if not name.endswith(".m"):
            assert float((grads[0][name] - grads[1][name]).abs().max()) > 1e-3, name


def test_the_exact_gradient_is_orthogonal_to_each_row() -> None:
    """Scaling a row of V changes nothing, so the exact gradient has no part along it; the detached one has."""
    along = {}
    # With an identity for A, the gradient of B is that of V.
    line, eye = Line(6, 6, torch.float64), torch.eye(6, dtype=torch.float64)
    b = torch.randn(6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    tensors = {"A": eye, "B": b, "m": torch.linspace(0.5, 2, 6, dtype=torch.float64)}
    x = torch.randn(5, 6, dtype=torch.float64)
    for kind in ("detached", "exact"):
        compiled = on_line(line, rank=6, alpha=6, norm_gradient=kind)
        compiled.load_adapter_state_dict({f"map.graftc.dora.{part}": value for part, value in tensors.items()})
        losses([compiled(x)]).backward()
        grad = trainable(compiled)["map.graftc.dora.B"].grad
        assert grad is not None
        along[kind] = float((grad * (line.map.weight.detach() + b)).sum(-1).abs().max())
    assert along["exact"] <= 1e-12
    assert along["detached"] > 1e-2


class Line(nn.Module):
    """One linear map with nothing around it."""

    def __init__(self, into: int = 8, out: int = 6, dtype: torch.dtype = torch.float32, bias: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.map = nn.Linear(into, out, dtype=dtype, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """``[batch, in]`` to ``[batch, out]``."""
        return self.map(x)


def on_line(line: Line, **fields: Any) -> Any:
    """DoRA on the one map."""
    spec = {"adapt": [{"method": "dora", "target": {"modules": "map"}, **fields}]}
    return graftc.compile(spec, line, {"x": torch.ones(2, line.map.in_features, dtype=line.map.weight.dtype)})


@pytest.mark.parametrize("family", ["bert", "gpt2", "gpt_neox", "llama", "mixtral"])
def test_row_norms_of_the_folded_weight_are_the_magnitudes(family: str) -> None:
    """Negative magnitudes too: a norm is ``|m|``."""
    compiled = adapted(tiny(family), roles_of(family))
    perturb(compiled, 0.3)
    with torch.no_grad():
        for name, tensor in trainable(compiled).items():
            if name.endswith(".m"):
                tensor[..., ::3] *= -1
    compilation = compiled.compilation
    (resolved,) = compilation.main.resolved
    for site, _ in resolved.places:
        folded = site.rows.take(site.use.layout.orient(exact(compiled, site.use.weight)), -2)
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
    """``V`` and ``3 V`` are one direction: with W and B three times as large and the same m, outputs are the same."""
    small, large = Line(bias=False), Line(bias=False)
    with torch.no_grad():
        large.map.weight.copy_(3 * small.map.weight)
    first, second = (on_line(line, rank=3).eval() for line in (small, large))
    tensors = perturb(first, 0.2)
    b = "map.graftc.dora.B"
    second.load_adapter_state_dict({**tensors, b: 3 * tensors[b]})
    x = torch.randn(7, 8)
    torch.testing.assert_close(second(x), first(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dropout_on", ["input", "branch"])
def test_identity_at_the_start_in_train_mode(dtype: torch.dtype, dropout_on: str) -> None:
    """With dropout too: what multiplies a dropped value is zero. In 16 bits magnitudes are float32."""
    model = tiny("llama", dtype=dtype)
    compiled = adapted(model, dropout=0.5, dropout_on=dropout_on)
    magnitudes = [t for n, t in trainable(compiled).items() if n.endswith(".m")]
    assert {t.dtype for t in magnitudes} == {torch.float32}
    inputs = inputs_for(compiled)
    with torch.no_grad():
        expected = flat(model(**inputs))
        compiled.train()
        found = flat(compiled(**inputs))
    assert torch.equal(found[0], expected[0])


def test_gradients_in_bfloat16() -> None:
    """Against float32 on the same values: bfloat16 has 8 bits, so 3 % of the largest."""
    model = tiny("llama", dtype=torch.bfloat16)
    compiled = adapted(model, ["attn.v", "ffn.down"])
    perturb(compiled, 0.1)
    wide = tiny("llama")
    with torch.no_grad():
        for a, b in zip(wide.parameters(), model.parameters(), strict=True):
            a.copy_(b)
    inputs = inputs_for(compiled)
    tensors = trainable(compiled)
    copies = {name: tensor.detach().float().requires_grad_() for name, tensor in tensors.items()}
    expected = reference(compiled, wide, copies, inputs)
    found = flat(compiled(**inputs))
    assert found[0].dtype == torch.bfloat16
    losses([found[0].float()]).backward()
    losses(expected[:1]).backward()
    for name, tensor in tensors.items():
        a, b = tensor.grad, copies[name].grad
        assert a is not None and b is not None and a.dtype == tensor.dtype
        assert float((a.float() - b).abs().max() / b.abs().max()) <= 3e-2, name


def test_dropout_on_the_input_is_the_papers() -> None:
    """``W x + (c - 1) W x~ + c s B A x~ + b`` for the mask that was drawn, which a diagonal for ``B A`` shows."""
    line = Line(8, 8, torch.float64)
    compiled = on_line(line, rank=8, alpha=8, dropout=0.25)
    eye = torch.eye(8, dtype=torch.float64)
    m = torch.linspace(0.5, 1.5, 8, dtype=torch.float64)
    compiled.load_adapter_state_dict({"map.graftc.dora.A": eye, "map.graftc.dora.B": 50 * eye, "map.graftc.dora.m": m})
    weight, bias = line.map.weight.detach(), line.map.bias.detach()
    c = m / torch.linalg.vector_norm(weight + 50 * eye, dim=-1)
    x = torch.randn(300, 8, dtype=torch.float64).abs() + 1
    with torch.no_grad():
        compiled.train()
        found = compiled(x)
        compiled.eval()
        torch.testing.assert_close(compiled(x), c * (x @ weight.T + 50 * x) + bias, rtol=0, atol=1e-12)
    # y = W x + b + ((c - 1) W + 50 c) x~ is solved for x~, which has to be x with entries dropped.
    mixed = (c - 1)[:, None] * weight + torch.diag(50 * c)
    dropped = torch.linalg.solve(mixed, (found - x @ weight.T - bias).T).T
    kept = dropped.abs() > 1e-9
    torch.testing.assert_close(dropped, kept * x / 0.75, rtol=0, atol=1e-9)
    assert abs(float(kept.double().mean()) - 0.75) < 0.05


def test_dropout_on_the_branch_leaves_the_base_alone() -> None:
    """``c (W x + s B A x~) + b``."""
    line = Line(8, 8, torch.float64)
    compiled = on_line(line, rank=8, alpha=8, dropout=0.25, dropout_on="branch")
    eye = torch.eye(8, dtype=torch.float64)
    m = torch.linspace(0.5, 1.5, 8, dtype=torch.float64)
    compiled.load_adapter_state_dict({"map.graftc.dora.A": eye, "map.graftc.dora.B": eye, "map.graftc.dora.m": m})
    weight, bias = line.map.weight.detach(), line.map.bias.detach()
    c = m / torch.linalg.vector_norm(weight + eye, dim=-1)
    x = torch.randn(300, 8, dtype=torch.float64).abs() + 1
    with torch.no_grad():
        dropped = (compiled.train()(x) - bias) / c - x @ weight.T
    kept = dropped.abs() > 1e-9
    torch.testing.assert_close(dropped, kept * x / 0.75, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("dropout_on", "bias"), [("input", True), ("input", False), ("branch", True), ("branch", False)]
)
def test_gradients_with_dropout(dropout_on: str, bias: bool) -> None:
    """For one drawn mask, against autograd on the formula with that mask."""
    line = Line(8, 6, torch.float64, bias)
    compiled = on_line(line, rank=3, dropout=0.3, dropout_on=dropout_on, dropout_mask="recomputed")
    perturb(compiled, 0.3)
    compiled.train()
    x = torch.randn(9, 8, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(5)
    losses([compiled(x)]).backward()
    mask = drawn_mask(x.detach())
    y = x.detach().clone().requires_grad_()
    own = {n.rpartition(".")[2]: t.detach().clone().requires_grad_() for n, t in trainable(compiled).items()}
    weight = line.map.weight.detach()
    direction = weight + 2 * 8 / 3 * own["B"] @ own["A"]
    c = own["m"] / torch.linalg.vector_norm(direction, dim=-1).detach()
    dropped = y * mask
    base = dropped if dropout_on == "input" else y
    out = y @ weight.T + (c - 1) * (base @ weight.T) + c * (2 * 8 / 3) * (dropped @ own["A"].T @ own["B"].T)
    losses([out if line.map.bias is None else out + line.map.bias.detach()]).backward()
    assert x.grad is not None and y.grad is not None
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-10, atol=1e-12)
    for name, tensor in trainable(compiled).items():
        torch.testing.assert_close(tensor.grad, own[name.rpartition(".")[2]].grad, rtol=1e-10, atol=1e-12)


def drawn_mask(x: Tensor) -> Tensor:
    """The factors that dropout of ``x`` multiplies with after ``manual_seed(5)``."""
    from graftc.passes.core.ops import SEEDS, dropout_mask

    torch.manual_seed(5)
    seed = torch.randint_like(torch.zeros(1, dtype=torch.int64), 0, SEEDS)
    return dropout_mask(x, seed, 0.3).double() / 0.7


def test_masks_are_shared_by_input_or_not() -> None:
    """q, k and v of a layer read one hidden state."""
    target = torch.ops.aten.dropout.default
    counts = {}
    for scope in ("input", "target"):
        compiled = adapted(tiny("llama"), ["attn.q", "attn.k", "attn.v"], dropout=0.5, dropout_scope=scope)
        counts[scope] = len(compiled.program("train").graph.find_nodes(op="call_function", target=target))
        assert not compiled.program("eval").graph.find_nodes(op="call_function", target=target)
    assert counts == {"input": 2, "target": 6}


def test_eval_mode_has_one_product_with_the_weight() -> None:
    """The second product, with what a dropout took, is of train mode."""
    compiled = adapted(tiny("llama"), ["attn.q"], dropout=0.5)
    name = "model.layers.0.self_attn.q_proj.weight"
    products = {
        mode: [u for n in compiled.program(mode).graph.find_nodes(op="get_attr") if n.target == name for u in n.users]
        for mode in ("train", "eval")
    }
    linear = torch.ops.aten.linear.default
    assert {mode: sum(n.target is linear for n in users) for mode, users in products.items()} == {"train": 2, "eval": 1}


def test_magnitude_only_sites() -> None:
    """``direction: false`` leaves A and B out where it holds; the fold scales rows there."""
    model = tiny("gpt2")
    compiled = adapted(model, ["attn.v", "ffn.down"], overrides=[{"role": "attn.v", "direction": False}])
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


def test_magnitudes_alone() -> None:
    compiled = adapted(tiny("bert"), "ffn.down", direction=False)
    assert {name.rpartition(".")[2] for name in trainable(compiled)} == {"m"}
    assert compiled.report.trainable_parameters == 2 * 48


def test_overrides_by_site() -> None:
    compiled = adapted(tiny("bert"), "ffn.down", overrides=[{"layers": "0", "rank": 2, "alpha": 5.0}])
    ranks = {name.split(".")[3]: t.shape[0] for name, t in trainable(compiled).items() if name.endswith(".A")}
    assert ranks == {"0": 2, "1": 4}


def test_rank_over_the_layer() -> None:
    with pytest.raises(GraftError) as error:
        adapted(tiny("llama"), "attn.v", rank=25)
    assert error.value.code == "GC020"
    assert "24 x 48" in error.value.message


def test_the_weight_is_never_adapted_in_a_graph() -> None:
    """No node has the size of a weight: norms come from products of the rank's size."""
    compiled = adapted(tiny("llama"), "ffn.down", norm_gradient="exact")
    for program in (compiled.program("train"), compiled.program("eval")):
        inserted = [n for n in program.graph.nodes if n.op == "call_function" and provenance(n) is not None]
        shapes = [tuple(n.meta["val"].shape) for n in inserted]
        assert shapes
        assert all(sorted(shape) != [48, 80] for shape in shapes if len(shape) == 2)


def test_rows_of_zeros_train_and_fold() -> None:
    """A row without a norm is no division by zero; without a bias its magnitude gets a gradient when B has moved."""
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


def test_a_magnitude_of_zero_has_a_gradient() -> None:
    """Its row computes nothing, and what it would compute is still the gradient."""
    for bias in (True, False):
        line = Line(bias=bias)
        compiled = on_line(line, direction=False)
        magnitude = trainable(compiled)["map.graftc.dora.m"]
        norm = magnitude.detach().clone()
        with torch.no_grad():
            magnitude[1] = 0
        x = torch.randn(9, 8)
        compiled(x).sum().backward()
        expected = (x @ line.map.weight.detach().T).sum(0) / norm
        assert magnitude.grad is not None
        torch.testing.assert_close(magnitude.grad, expected, rtol=1e-4, atol=1e-5)


def test_checkpointing_gives_the_same_gradients() -> None:
    grads = []
    for checkpoint in (False, True):
        entry = {"method": "dora", "target": {"role": ROLES}, "rank": 4, "dropout": 0.3}
        spec = {"adapt": [entry], **({"checkpoint": "layers"} if checkpoint else {})}
        compiled = graftc.compile(spec, tiny("llama"))
        perturb(compiled)
        compiled.train()
        torch.manual_seed(1)
        losses(flat(compiled(**inputs_for(compiled)))).backward()
        grads.append([tensor.grad for tensor in trainable(compiled).values()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_autocast_computes_norms_in_float32() -> None:
    """Under autocast c is that of float32, so the start is still the base's to the bit."""
    model = tiny("llama")
    compiled = adapted(model)
    inputs = inputs_for(compiled)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert same_bits(flat(compiled(**inputs)), flat(model(**inputs))[:1])
        before = flat(compiled(**inputs))[0]
    perturb(compiled, 0.1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        leaves = flat(compiled(**inputs))
        assert float((leaves[0] - before).detach().abs().max()) > 1e-2
        losses([leaves[0].float()]).backward()
    assert all(t.grad is not None and t.grad.dtype == t.dtype for t in trainable(compiled).values())


class Picture(nn.Module):
    """Two square convolutions, over points and over patches, and a grouped one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.point = nn.Conv2d(6, 6, 1)
        self.patch = nn.Conv2d(6, 6, 3, padding=1)
        self.grouped = nn.Conv2d(6, 4, 3, groups=2, stride=2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``[batch, 6, 9, 9]`` to ``[batch, 4, 4, 4]``."""
        return self.grouped(torch.relu(self.patch(torch.relu(self.point(x)))))


@pytest.mark.parametrize("names", [["point"], ["patch"], ["grouped"], ["point", "patch", "grouped"]])
def test_convolutions_start_fold_and_unfold(names: list[str]) -> None:
    """Square kernels included, where a missing transpose would pass unseen: the base is exact before and after."""
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


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_square_layers_fold(family: str) -> None:
    """Projections of width 48 to 48, stored either way round."""
    compiled = adapted(tiny(family), "attn.o")
    perturb(compiled, 0.2)
    inputs = inputs_for(compiled)
    assert largest_difference(outputs_of(compiled.merge(), inputs), outputs_of(compiled, inputs)) <= 2e-5


def test_merging_leaves_everything_else_as_it_was() -> None:
    model = tiny("gpt2")
    before = copy.deepcopy(model.state_dict())
    compiled = adapted(model)
    perturb(compiled, 0.2)
    inputs = inputs_for(compiled)
    expected = outputs_of(compiled, inputs)
    compiled.merge()
    assert same_bits(outputs_of(compiled, inputs), expected)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_shared_layer_has_one_scale() -> None:
    """All uses of a weight read the scale that the first one computes, and the fold is that of the one place."""
    model = Twice()
    x = torch.randn(5, 6)
    compiled = graftc.compile({"adapt": [{"method": "dora", "target": {"modules": "map"}, "rank": 2}]}, model, {"x": x})
    target = torch.ops.graftc.row_norm.default
    assert len(compiled.program("train").graph.find_nodes(op="call_function", target=target)) == 1
    perturb(compiled, 0.2)
    compiled.eval()
    assert float((compiled.merge()(x) - compiled(x)).detach().abs().max()) <= 1e-5


class Twice(nn.Module):
    """One map, used twice."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.map = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        """``[batch, 6]`` to ``[batch, 6]``."""
        return self.map(torch.relu(self.map(x)))


def test_saved_and_loaded(tmp_path: Path) -> None:
    """What follows from the base's weights is not kept, and is there again."""
    model = tiny("gpt2")
    compiled = adapted(model, dropout=0.1)
    assert {name.rpartition(".")[2] for name in compiled.adapter_state_dict()} == {"A", "B", "m"}
    perturb(compiled, 0.2)
    compiled.save(tmp_path / "kept")
    inputs = inputs_for(compiled)
    assert same_bits(outputs_of(graftc.load(tmp_path / "kept", model=model), inputs), outputs_of(compiled, inputs))


@pytest.mark.slow
def test_pt2_holds_aten_only(tmp_path: Path) -> None:
    compiled = adapted(tiny("llama"))
    perturb(compiled, 0.1)
    inputs = inputs_for(compiled)
    program = torch.export.load(compiled.export(tmp_path / "model.pt2"))
    assert not any("graftc." in str(node.target) for node in program.graph.nodes if node.op == "call_function")
    found = list(program.module()(**inputs).values())
    assert largest_difference(found, outputs_of(compiled, inputs)) <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(("family", "norm_gradient"), [("llama", "detached"), ("vit", "exact")])
def test_compiled_training_steps(family: str, norm_gradient: str) -> None:
    """``torch.compile(fullgraph=True)`` of train mode, backward pass included, without and with biases."""
    compiled = adapted(tiny(family), norm_gradient=norm_gradient).train()
    perturb(compiled, 0.1)
    inputs, grads = inputs_for(compiled), []
    for function in (compiled, torch.compile(compiled, fullgraph=True, dynamic=True, backend="aot_eager")):
        compiled.zero_grad()
        losses(flat(function(**inputs))).backward()
        grads.append([tensor.grad for tensor in trainable(compiled).values()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_shapes_that_were_not_captured() -> None:
    compiled = adapted(tiny("llama"), norm_gradient="exact", dropout=0.2)
    perturb(compiled, 0.1)
    merged = compiled.merge()
    for sizes in SHAPES:
        inputs = inputs_for(compiled, sizes)
        assert largest_difference(outputs_of(merged, inputs), outputs_of(compiled, inputs)) <= 2e-5
