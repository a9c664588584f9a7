"""DoRA's gradients and dropout, compared with autograd on the formula written out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import graftc
from graftc.testing import largest_difference, outputs_of, perturb, same_bits
from graftc.testing.compare import flat, inputs_for
from graftc.testing.families import FAMILIES, tiny
from tests.kit.comparing import floats, trainable
from tests.kit.models import fresh
from tests.kit.specs import varied
from tests.passes.methods.dora_models import (
    DORA,
    ROLES,
    Line,
    losses,
    on_line,
    reference,
    roles_of,
)


@pytest.mark.full
@pytest.mark.parametrize("norm_gradient", ["detached", "exact"])
@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_and_gradients_are_those_of_the_formula(family: str, norm_gradient: str) -> None:
    """Outputs equal the formula written out in the source model to 1e-10, and gradients those of autograd to 1e-9 of
    their largest, in float64. Kernels for experts have no float64, so 1e-5 and 1e-4 apply there.
    """
    wide = family != "mixtral"
    model = tiny(family, dtype=torch.float64 if wide else torch.float32)
    compiled = fresh(model, varied(DORA, roles_of(family), norm_gradient=norm_gradient))
    perturb(compiled, 0.2)
    tensors = trainable(compiled)
    inputs = inputs_for(compiled)
    copies = {name: tensor.detach().clone().requires_grad_() for name, tensor in tensors.items()}
    expected = reference(compiled, model, copies, inputs)
    actual = floats(compiled(**inputs))
    assert largest_difference(actual, expected) <= (1e-10 if wide else 1e-5)
    losses(actual).backward()
    losses(expected).backward()
    for name, tensor in tensors.items():
        a, b = tensor.grad, copies[name].grad
        assert a is not None and b is not None
        assert bool(a.any()), name
        assert float((a - b).abs().max() / b.abs().max()) <= (1e-9 if wide else 1e-4), name


@pytest.mark.slow
def test_detached_and_exact_differ_in_gradients_only() -> None:
    """The forward pass is the same; a gradient through the norm changes the gradients of A and B, but not that of m."""
    model, grads, outputs = tiny("llama"), [], []
    for kind in ("detached", "exact"):
        compiled = fresh(model, varied(DORA, norm_gradient=kind))
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
    """Scaling a row of V changes nothing, so the exact gradient has no component along it, unlike the detached one."""
    along = {}
    # With an identity as A, the gradient of B is that of V.
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


@pytest.mark.full
def test_gradients_in_bfloat16() -> None:
    """Gradients agree with float32 on the same values to 3 % of the largest, since bfloat16 has 8 bits."""
    model = tiny("llama", dtype=torch.bfloat16)
    compiled = fresh(model, varied(DORA, ["attn.v", "ffn.down"]))
    perturb(compiled, 0.1)
    wide = tiny("llama")
    with torch.no_grad():
        for a, b in zip(wide.parameters(), model.parameters(), strict=True):
            a.copy_(b)
    inputs = inputs_for(compiled)
    tensors = trainable(compiled)
    copies = {name: tensor.detach().float().requires_grad_() for name, tensor in tensors.items()}
    expected = reference(compiled, wide, copies, inputs)
    actual = flat(compiled(**inputs))
    assert actual[0].dtype == torch.bfloat16
    losses([actual[0].float()]).backward()
    losses(expected[:1]).backward()
    for name, tensor in tensors.items():
        a, b = tensor.grad, copies[name].grad
        assert a is not None and b is not None and a.dtype == tensor.dtype
        assert float((a.float() - b).abs().max() / b.abs().max()) <= 3e-2, name


def test_dropout_on_the_input_is_the_papers() -> None:
    """The output is ``W x + (c - 1) W x~ + c s B A x~ + b`` for the drawn mask, which a diagonal ``B A`` reveals."""
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
        outputs = compiled(x)
        compiled.eval()
        torch.testing.assert_close(compiled(x), c * (x @ weight.T + 50 * x) + bias, rtol=0, atol=1e-12)
    # Solve y = W x + b + ((c - 1) W + 50 c) x~ for x~, which has to be x with some entries dropped.
    mixed = (c - 1)[:, None] * weight + torch.diag(50 * c)
    dropped = torch.linalg.solve(mixed, (outputs - x @ weight.T - bias).T).T
    kept = dropped.abs() > 1e-9
    torch.testing.assert_close(dropped, kept * x / 0.75, rtol=0, atol=1e-9)
    assert abs(float(kept.double().mean()) - 0.75) < 0.05


def test_dropout_on_the_branch_leaves_the_base_alone() -> None:
    """The output is ``c (W x + s B A x~) + b``."""
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
    """For one drawn mask, gradients equal those of autograd on the formula with that mask."""
    line = Line(8, 6, torch.float64, bias)
    compiled = on_line(line, rank=3, dropout=0.3, dropout_on=dropout_on, dropout_mask="recomputed")
    perturb(compiled, 0.3)
    compiled.train()
    x = torch.randn(9, 8, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(5)
    losses([compiled(x)]).backward()
    mask = drawn_mask(x.detach())
    y = x.detach().clone().requires_grad_()
    copies = {n.rpartition(".")[2]: t.detach().clone().requires_grad_() for n, t in trainable(compiled).items()}
    weight = line.map.weight.detach()
    direction = weight + 2 * 8 / 3 * copies["B"] @ copies["A"]
    c = copies["m"] / torch.linalg.vector_norm(direction, dim=-1).detach()
    dropped = y * mask
    base = dropped if dropout_on == "input" else y
    out = y @ weight.T + (c - 1) * (base @ weight.T) + c * (2 * 8 / 3) * (dropped @ copies["A"].T @ copies["B"].T)
    losses([out if line.map.bias is None else out + line.map.bias.detach()]).backward()
    assert x.grad is not None and y.grad is not None
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-10, atol=1e-12)
    for name, tensor in trainable(compiled).items():
        torch.testing.assert_close(tensor.grad, copies[name.rpartition(".")[2]].grad, rtol=1e-10, atol=1e-12)


def drawn_mask(x: Tensor) -> Tensor:
    """Return the factors by which dropout multiplies ``x`` after ``manual_seed(5)``."""
    from graftc.passes.core.ops.dropout import dropout_mask
    from graftc.passes.core.ops.hashing import SEEDS

    torch.manual_seed(5)
    seed = torch.randint_like(torch.zeros(1, dtype=torch.int64), 0, SEEDS)
    return dropout_mask(x, seed, 0.3).double() / 0.7


@pytest.mark.slow
def test_masks_are_shared_by_input_or_not() -> None:
    """The queries, keys and values of a layer read one hidden state, so with the scope ``input`` they share a mask."""
    target = torch.ops.graftc.masked_dropout.default
    counts = {}
    for scope in ("input", "target"):
        compiled = fresh("llama", varied(DORA, ["attn.q", "attn.k", "attn.v"], dropout=0.5, dropout_scope=scope))
        counts[scope] = len(compiled.program("train").graph.find_nodes(op="call_function", target=target))
        assert not compiled.program("eval").graph.find_nodes(op="call_function", target=target)
    assert counts == {"input": 2, "target": 6}


@pytest.mark.slow
def test_eval_mode_has_one_product_with_the_weight() -> None:
    """The second product, with the dropped input, exists in train mode only."""
    compiled = fresh("llama", varied(DORA, ["attn.q"], dropout=0.5))
    name = "model.layers.0.self_attn.q_proj.weight"
    products = {
        mode: [u for n in compiled.program(mode).graph.find_nodes(op="get_attr") if n.target == name for u in n.users]
        for mode in ("train", "eval")
    }
    linear = torch.ops.aten.linear.default
    assert {mode: sum(n.target is linear for n in users) for mode, users in products.items()} == {"train": 2, "eval": 1}


def test_a_magnitude_of_zero_has_a_gradient() -> None:
    """A row with magnitude zero computes nothing, but its magnitude's gradient is what the row would compute."""
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


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_magnitude_of_zero_has_the_gradient_of_the_update_too(dtype: torch.dtype) -> None:
    """The magnitude multiplies all of ``u + s B A x``."""
    line = Line(bias=False).to(dtype)
    compiled = on_line(line, rank=3, alpha=6)
    perturb(compiled, 0.3)
    tensors = trainable(compiled)
    magnitude, a, b = (tensors[f"map.graftc.dora.{part}"] for part in ("m", "A", "B"))
    with torch.no_grad():
        magnitude[1] = 0
    x = torch.randn(9, 8).to(dtype)
    outputs = compiled(x)
    assert not outputs[:, 1].abs().max() > 1e-20
    outputs.double().sum().backward()
    adapted = (line.map.weight + 2 * b @ a).detach().double()
    expected = (x.double() @ adapted.T).sum(0) / adapted.norm(dim=-1)
    assert magnitude.grad is not None
    tolerance = {torch.float64: 1e-9, torch.float32: 1e-4}.get(dtype, 3e-2)
    torch.testing.assert_close(
        magnitude.grad.double(), expected, rtol=tolerance, atol=tolerance * float(expected.abs().max())
    )


@pytest.mark.full
def test_checkpointing_gives_the_same_gradients() -> None:
    grads = []
    for checkpoint in (False, True):
        entry = {"method": "dora", "target": {"role": ROLES}, "rank": 4, "dropout": 0.3}
        spec = {"adapt": [entry], **({"checkpoint": "layers"} if checkpoint else {})}
        compiled = graftc.compile(spec, tiny("llama"), seed=0)
        perturb(compiled)
        compiled.train()
        torch.manual_seed(1)
        losses(flat(compiled(**inputs_for(compiled)))).backward()
        grads.append([tensor.grad for tensor in trainable(compiled).values()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.slow
def test_autocast_computes_norms_in_float32() -> None:
    """Under autocast c is computed in float32, so the start is still the base's to the bit."""
    model = tiny("llama")
    compiled = fresh(model, DORA)
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


@pytest.mark.full
@pytest.mark.parametrize(("family", "norm_gradient"), [("llama", "detached"), ("vit", "exact")])
def test_compiled_training_steps(family: str, norm_gradient: str) -> None:
    """``torch.compile(fullgraph=True)`` gives the same gradients in train mode, without and with biases."""
    compiled = fresh(family, varied(DORA, norm_gradient=norm_gradient)).train()
    perturb(compiled, 0.1)
    inputs, grads = inputs_for(compiled), []
    for function in (compiled, torch.compile(compiled, fullgraph=True, dynamic=True, backend="aot_eager")):
        compiled.zero_grad()
        losses(flat(function(**inputs))).backward()
        grads.append([tensor.grad for tensor in trainable(compiled).values()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
