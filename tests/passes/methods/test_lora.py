"""The algebra and the options of LoRA."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graftc
from graftc.compiler.capture.capture import capture
from graftc.compiler.capture.request import CaptureRequest
from graftc.compiler.folding.steps import lazy_tensors
from graftc.passes.core.ir.eval_mode import to_eval
from graftc.passes.core.ir.printer import structural_hash
from graftc.passes.core.weights.store import Store
from graftc.specs.errors.diagnostics import GraftError
from graftc.testing import largest_difference, outputs_of, perturb, same_bits
from graftc.testing.compare import inputs_for
from graftc.testing.families import tiny
from tests.kit.comparing import trainable
from tests.kit.models import fresh
from tests.kit.specs import varied

LORA = {"method": "lora", "target": {"role": ["attn.q", "attn.v", "ffn.down"]}, "rank": 4}
QUERY = {
    "bert": "bert.encoder.layer.0.attention.self.query",
    "llama": "model.layers.0.self_attn.q_proj",
    "gpt2": "transformer.h.0.attn.c_attn",
}


def folded(compiled: Any, name: str) -> Tensor:
    """A folded base tensor in float64, before rounding."""
    return lazy_tensors(compiled.compilation).exact(name)


DROPOUT = {
    "llama": {"attention_dropout": 0.1},
    "vit": {"attention_probs_dropout_prob": 0.1, "hidden_dropout_prob": 0.1},
}
"""Dropout for families whose configs have none by default."""


@pytest.mark.full
@pytest.mark.parametrize("family", DROPOUT)
def test_derived_eval_graph_is_the_captured_one(family: str) -> None:
    """Switching a train graph to eval mode gives the same graph as capturing in eval mode."""
    model = tiny(family, **DROPOUT[family])
    aliases = Store.mirror(model).aliases
    direct = capture(CaptureRequest.of(model, mode="eval", aliases=aliases)).program
    train = capture(CaptureRequest.of(model, mode="train", aliases=aliases)).program
    assert structural_hash(to_eval(train)) == structural_hash(direct)
    assert structural_hash(train) != structural_hash(direct)


@pytest.mark.slow
def test_query_alone_of_a_fused_matrix() -> None:
    """``attn.q`` of GPT-2 adapts its own rows; those of key and value stay unchanged to the bit."""
    model = tiny("gpt2")
    compiled = fresh(model, varied(LORA, "attn.q"))
    shapes = {name.rpartition(".")[2]: tuple(t.shape) for name, t in trainable(compiled).items()}
    assert shapes == {"A": (4, 48), "B": (48, 4)}
    assert compiled.report.trainable_parameters == 2 * 4 * (48 + 48)
    perturb(compiled)
    weight = compiled.merge().to_transformers().transformer.h[1].attn.c_attn.weight
    before = model.transformer.h[1].attn.c_attn.weight
    assert torch.equal(weight[:, 48:], before[:, 48:])
    assert bool((weight[:, :48] != before[:, :48]).all())


@pytest.mark.slow
def test_rows_of_a_fused_matrix_are_separate_maps() -> None:
    """LoRA on q and v of GPT-2's fused matrix equals two separate maps beside it."""
    model = tiny("gpt2")
    compiled = fresh(model, varied(LORA, ["attn.q", "attn.v"], alpha=12))
    tensors = perturb(compiled)

    def beside(layer: int) -> Any:
        factors = {
            part: [tensors[f"transformer.h.{layer}.attn.c_attn.graftc.lora.{part}.{f}"] for f in "AB"] for part in "qv"
        }

        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            x, result = args[0], output.clone()
            for part, start in (("q", 0), ("v", 96)):
                a, b = factors[part]
                result[..., start : start + 48] += 12 / 4 * (x @ a.T @ b.T)
            return result

        return hook

    inputs = inputs_for(compiled)
    actual = outputs_of(compiled, inputs)
    handles = [layer.attn.c_attn.register_forward_hook(beside(i)) for i, layer in enumerate(model.transformer.h)]
    expected = outputs_of(model, inputs)
    for handle in handles:
        handle.remove()
    assert largest_difference(actual, expected) <= 1e-5
    assert largest_difference(expected, outputs_of(model, inputs)) > 0.1


@pytest.mark.full
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_scaling_law(family: str) -> None:
    """(A, B, alpha) and (A, cB, alpha / c) are the same function, exactly for a power of two."""
    first, second = fresh(family, varied(LORA, alpha=16)), fresh(family, varied(LORA, alpha=4))
    tensors = perturb(first)
    second.load_adapter_state_dict({n: t * 4 if n.endswith(".B") else t for n, t in tensors.items()})
    inputs = inputs_for(first)
    assert same_bits(outputs_of(first, inputs), outputs_of(second, inputs))
    second.load_adapter_state_dict(tensors)
    assert largest_difference(outputs_of(first, inputs), outputs_of(second, inputs)) > 1e-3


@pytest.mark.full
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_update_has_at_most_the_rank(family: str) -> None:
    """``W' - W`` in float64 has rank 4 and is ``s B A``, in either orientation of the stored weight."""
    model = tiny(family)
    compiled = fresh(model, varied(LORA, "attn.q", alpha=6))
    tensors = perturb(compiled)
    name = f"{QUERY[family]}.weight"
    base = model.get_parameter(name).detach().double()
    update = folded(compiled, name) - base
    values = torch.linalg.svdvals(update)
    assert values[3] > 1e-3
    assert values[4] < 1e-12
    part = ".q" if family == "gpt2" else ""
    a, b = (tensors[f"{QUERY[family]}.graftc.lora{part}.{f}"].double() for f in "AB")
    expected = 6 / 4 * b @ a
    own = update.T[:48] if family == "gpt2" else update
    torch.testing.assert_close(own, expected, rtol=0, atol=1e-14)


@pytest.mark.slow
def test_gradients_at_the_start() -> None:
    """With ``B = 0`` no gradient reaches A, and a gradient reaches B."""
    compiled = fresh("bert", LORA)
    compiled(**inputs_for(compiled)).logits.square().sum().backward()
    tensors = trainable(compiled)
    assert {name.rpartition(".")[2] for name in tensors} == {"A", "B"}
    for name, tensor in tensors.items():
        assert tensor.grad is not None
        assert bool(tensor.grad.any()) == name.endswith(".B"), name


@pytest.mark.full
@pytest.mark.parametrize(("rslora", "expected"), [(False, 12 / 4), (True, 12 / math.sqrt(4))])
def test_scaling(rslora: bool, expected: float) -> None:
    """The factor is ``alpha / rank``, or ``alpha / sqrt(rank)`` with ``rslora``."""
    model = tiny("llama")
    compiled = fresh(model, varied(LORA, "attn.v", alpha=12, rslora=rslora))
    tensors = perturb(compiled)
    module = "model.layers.1.self_attn.v_proj"
    a, b = (tensors[f"{module}.graftc.lora.{f}"].double() for f in "AB")
    update = folded(compiled, f"{module}.weight") - model.get_parameter(f"{module}.weight").detach().double()
    assert update.shape == (24, 48)
    torch.testing.assert_close(update, expected * b @ a, rtol=0, atol=1e-14)


@pytest.mark.full
def test_kaiming_and_gaussian_start() -> None:
    """``A`` is uniform within ``1 / sqrt(in)``, or normal with standard deviation ``1 / rank``; ``B`` is zero."""
    uniform = {n: t.detach() for n, t in trainable(fresh("bert", varied(LORA, "ffn.down", rank=48))).items()}
    a = torch.cat([t.flatten() for n, t in uniform.items() if n.endswith(".A")])
    bound = 1 / math.sqrt(80)
    assert a.numel() == 2 * 48 * 80
    assert 0.99 * bound < a.abs().max() <= bound
    assert abs(float(a.std()) - bound / math.sqrt(3)) < 0.02 * bound
    gaussian = fresh("bert", varied(LORA, "ffn.down", rank=48, init="gaussian"))
    normal = {n: t.detach() for n, t in trainable(gaussian).items()}
    a = torch.cat([t.flatten() for n, t in normal.items() if n.endswith(".A")])
    assert abs(float(a.std()) * 48 - 1) < 0.03
    assert a.abs().max() * 48 > 3
    for tensors in (uniform, normal):
        assert all(not t.any() for n, t in tensors.items() if n.endswith(".B"))


@pytest.mark.full
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_pissa_takes_the_principal_part(family: str) -> None:
    """``s B A`` is the best approximation of W of that rank; both factors carry the same singular values."""
    model = tiny(family)
    compiled = fresh(model, varied(LORA, "attn.q", init="pissa", alpha=6))
    part = ".q" if family == "gpt2" else ""
    tensors = compiled.adapter_state_dict()
    assert {name.rpartition(".")[2] for name in tensors} == {"A", "B", "A0", "B0"}
    assert {name.rpartition(".")[2] for name in trainable(compiled)} == {"A", "B"}
    a, b = (tensors[f"{QUERY[family]}.graftc.lora{part}.{f}"].double() for f in "AB")
    stored = model.get_parameter(f"{QUERY[family]}.weight").detach().double()
    weight = stored.T[:48] if family == "gpt2" else stored
    rest = torch.linalg.svdvals(weight - 6 / 4 * b @ a)
    singular = torch.linalg.svdvals(weight)
    torch.testing.assert_close(rest[: 48 - 4], singular[4:], rtol=0, atol=1e-5)
    assert rest[44:].max() < 1e-5
    torch.testing.assert_close(a @ a.T, b.T @ b, rtol=0, atol=1e-5)


@pytest.mark.full
@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_olora_starts_orthonormal(family: str) -> None:
    """``B`` has orthonormal columns, and ``B A`` is the part of W in their span that starts with W's columns."""
    model = tiny(family)
    compiled = fresh(model, varied(LORA, "attn.q", init="olora"))
    part = ".q" if family == "gpt2" else ""
    tensors = compiled.adapter_state_dict()
    a, b = (tensors[f"{QUERY[family]}.graftc.lora{part}.{f}"].double() for f in "AB")
    stored = model.get_parameter(f"{QUERY[family]}.weight").detach().double()
    weight = stored.T[:48] if family == "gpt2" else stored
    torch.testing.assert_close(b.T @ b, torch.eye(4, dtype=torch.float64), rtol=0, atol=1e-6)
    torch.testing.assert_close(b @ a, b @ (b.T @ weight), rtol=0, atol=1e-5)
    torch.testing.assert_close((b @ a)[:, :4], weight[:, :4], rtol=0, atol=1e-5)


@pytest.mark.slow
def test_started_from_weight_trains_away_from_it() -> None:
    """The difference from the start is what folds: ``W' = W + s (B A - B0 A0)``."""
    model = tiny("bert")
    compiled = fresh(model, varied(LORA, "ffn.down", init="pissa", alpha=6))
    perturb(compiled)
    module = "bert.encoder.layer.1.output.dense"
    tensors = compiled.adapter_state_dict()
    a, b, a0, b0 = (tensors[f"{module}.graftc.lora.{f}"].double() for f in ("A", "B", "A0", "B0"))
    update = folded(compiled, f"{module}.weight") - model.get_parameter(f"{module}.weight").detach().double()
    torch.testing.assert_close(update, 6 / 4 * (b @ a - b0 @ a0), rtol=0, atol=1e-14)


@pytest.mark.slow
def test_bias_of_adapted_rows() -> None:
    """``lora_only`` trains the adapted rows of the adapted layers' biases, and no other rows."""
    model = tiny("gpt2")
    compiled = fresh(model, varied(LORA, "attn.q", bias="lora_only"))
    tensors = perturb(compiled)
    biases = {name: t for name, t in tensors.items() if name.endswith("bias")}
    assert [tuple(t.shape) for t in biases.values()] == [(48,), (48,)]
    assert all(".attn.c_attn." in name for name in biases)
    merged = compiled.merge().to_transformers()
    for layer in (0, 1):
        before = model.transformer.h[layer].attn.c_attn.bias
        after = merged.transformer.h[layer].attn.c_attn.bias
        assert torch.equal(after[48:], before[48:])
        trained = next(t for name, t in biases.items() if f".h.{layer}." in name)
        assert torch.equal(after[:48], trained)
        assert bool((after[:48] != before[:48]).any())


@pytest.mark.full
def test_bias_all() -> None:
    """``all`` trains every bias that the model reads; ``none`` trains none."""
    model = tiny("bert")
    everything = {name for name, _ in model.named_parameters() if name.endswith("bias")}
    compiled = fresh(model, varied(LORA, "attn.q", bias="all"))
    tensors = perturb(compiled)
    owners = {name.partition(".graftc.")[0] + ".bias" for name in tensors if name.endswith(".bias")}
    assert owners == everything
    merged = compiled.merge().to_transformers()
    changed = {n for n, p in merged.named_parameters() if not torch.equal(p, model.get_parameter(n))}
    queries = {f"bert.encoder.layer.{i}.attention.self.query.weight" for i in (0, 1)}
    assert changed == everything | queries
    assert not any(name.endswith("bias") for name in trainable(fresh(model, varied(LORA, "attn.q"))))


@pytest.mark.slow
def test_overrides() -> None:
    """The first override that matches a site sets its values there only, in the graph and in the fold."""
    model = tiny("bert")
    overrides = [{"modules": "**.layer.0.**", "rank": 2, "alpha": 5}, {"role": "attn.q", "rank": 3}]
    compiled = fresh(model, varied(LORA, ["attn.q", "ffn.down"], alpha=8, overrides=overrides))
    ranks = {name: t.shape[0] for name, t in trainable(compiled).items() if name.endswith(".A")}
    prefix = "bert.encoder.layer"
    assert ranks == {
        f"{prefix}.0.attention.self.query.graftc.lora.A": 2,
        f"{prefix}.0.output.dense.graftc.lora.A": 2,
        f"{prefix}.1.attention.self.query.graftc.lora.A": 3,
        f"{prefix}.1.output.dense.graftc.lora.A": 4,
    }
    tensors = perturb(compiled)
    scales = {"0.output.dense": 5 / 2, "1.attention.self.query": 8 / 3, "1.output.dense": 8 / 4}
    for module, scale in scales.items():
        a, b = (tensors[f"{prefix}.{module}.graftc.lora.{f}"].double() for f in "AB")
        weight = f"{prefix}.{module}.weight"
        update = folded(compiled, weight) - model.get_parameter(weight).detach().double()
        torch.testing.assert_close(update, scale * b @ a, rtol=0, atol=1e-14)
    inputs = inputs_for(compiled)
    assert largest_difference(outputs_of(compiled.merge(), inputs), outputs_of(compiled, inputs)) <= 2e-5


def test_rank_over_the_layer() -> None:
    """A rank that exceeds a site is refused with the site's name and size."""
    with pytest.raises(GraftError) as error:
        fresh("llama", varied(LORA, "attn.v", rank=25))
    assert error.value.code == "GC020"
    assert "24 x 48" in error.value.message


class Line(nn.Module):
    """A model that is a single linear map."""

    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[batch, 8]`` to ``[batch, 6]``."""
        return self.map(x)


def test_dropout_acts_on_the_input_of_the_branch() -> None:
    """In training every input of the branch is dropped or scaled up; the base's path and eval mode are unaffected."""
    model = Line()
    spec = {"adapt": [{"method": "lora", "target": {"modules": "map"}, "rank": 6, "alpha": 6, "dropout": 0.25}]}
    compiled = graftc.compile(spec, model, {"x": torch.ones(2, 8)})
    eye = torch.eye(8)[:6]
    compiled.load_adapter_state_dict({"map.graftc.lora.A": eye, "map.graftc.lora.B": torch.eye(6)})
    x = torch.ones(4000, 8)
    with torch.no_grad():
        compiled.train()
        branch = compiled(x) - model(x)
        compiled.eval()
        torch.testing.assert_close(compiled(x) - model(x), torch.ones(4000, 6), rtol=0, atol=1e-6)
    kept = branch > 0.5
    torch.testing.assert_close(branch, kept / 0.75, rtol=0, atol=1e-6)
    assert abs(float(kept.double().mean()) - 0.75) < 0.01


@pytest.mark.slow
def test_dropout_is_shared_by_sites_that_read_the_same() -> None:
    """q, k and v of a layer read one hidden state and share one mask; eval mode has none."""
    compiled = fresh("llama", varied(LORA, ["attn.q", "attn.k", "attn.v"], dropout=0.5))
    target = torch.ops.graftc.masked_dropout.default
    assert len(compiled.program("train").graph.find_nodes(op="call_function", target=target)) == 2
    assert not compiled.program("eval").graph.find_nodes(op="call_function", target=target)


@pytest.mark.full
def test_dropout_of_each_site() -> None:
    """With the scope ``target``, q, k and v have three masks; eval mode has none."""
    roles = ["attn.q", "attn.k", "attn.v"]
    compiled = fresh("llama", varied(LORA, roles, dropout=0.5, dropout_scope="target"))
    target = torch.ops.graftc.masked_dropout.default
    assert len(compiled.program("train").graph.find_nodes(op="call_function", target=target)) == 2 * 3
    assert not compiled.program("eval").graph.find_nodes(op="call_function", target=target)
    shared = fresh("llama", varied(LORA, roles, dropout=0.5))
    assert structural_hash(compiled.program("eval")) == structural_hash(shared.program("eval"))


@pytest.mark.parametrize(("scope", "same"), [("input", True), ("target", False)])
def test_masks_of_two_sites(scope: str, same: bool) -> None:
    """Two maps of one input drop the same entries of it, or with the scope ``target`` each its own."""
    spec = {"method": "lora", "target": {"modules": "*"}, "rank": 6, "alpha": 6, "dropout": 0.5, "dropout_scope": scope}
    compiled = graftc.compile({"adapt": [spec]}, Two(), {"x": torch.ones(2, 6)})
    eye = {f"{name}.graftc.lora.{part}": torch.eye(6) for name in ("first", "second") for part in "AB"}
    compiled.load_adapter_state_dict(eye)
    compiled.train()
    with torch.no_grad():
        first, second = compiled(torch.ones(100, 6))
    assert torch.equal(first > 1, second > 1) == same
    assert bool((first > 1).any()) and not bool((first > 1).all())


class Two(nn.Module):
    """Two linear maps with zero weights that read the same input."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False)
        for module in (self.first, self.second):
            nn.init.zeros_(module.weight)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map ``[batch, 6]`` to two tensors of the same shape."""
        return self.first(x), self.second(x)


@pytest.mark.full
def test_frozen_a(tmp_path: Path) -> None:
    """LoRA-FA has the function and the gradient of B of LoRA with the same factors; A neither trains nor counts as
    trained, and is saved with the adapter, in PEFT's format as well.
    """
    plain, frozen = fresh("llama", LORA), fresh("llama", varied(LORA, freeze_a=True))
    perturb(plain, 0.1)
    frozen.load_adapter_state_dict(plain.adapter_state_dict())
    inputs = inputs_for(plain)
    for compiled in (plain, frozen):
        compiled.train()(**inputs).logits.square().sum().backward()
    assert same_bits(outputs_of(plain, inputs), outputs_of(frozen, inputs))
    factors = {name: (tensor, frozen.get_parameter(name)) for name, tensor in trainable(plain).items()}
    assert {name for name in factors if name.endswith(".B")} == set(trainable(frozen))
    for name, (tensor, own) in factors.items():
        assert own.grad is None if name.endswith(".A") else torch.equal(own.grad, tensor.grad), name
    adaptation = frozen.report.adaptations[0]
    assert adaptation.trainable_parameters == sum(t.numel() for t in trainable(frozen).values())
    assert adaptation.frozen_parameters == plain.report.trainable_parameters - adaptation.trainable_parameters
    folder = frozen.export(tmp_path / "peft", format="peft")
    read = graftc.import_peft(folder, tiny("llama"))
    assert same_bits(outputs_of(frozen.eval(), inputs), outputs_of(read, inputs))


@pytest.mark.full
def test_frozen_a_keeps_no_input_of_its_sites() -> None:
    """Only the gradient of A needs the inputs, which here have 48 or 80 numbers per token; that of B needs 4."""

    def kept(compiled: Any) -> int:
        sizes: list[int] = []
        inputs = inputs_for(compiled)

        def count(tensor: Tensor) -> Tensor:
            sizes.append(tensor.numel() if not isinstance(tensor, nn.Parameter) else 0)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            compiled(**inputs)
        return sum(sizes)

    fields = {"dropout": 0.1, "dropout_scope": "target"}
    plain, frozen = (
        kept(fresh("llama", varied(LORA, **fields, freeze_a=is_frozen)).train()) for is_frozen in (False, True)
    )
    tokens = inputs_for(fresh("llama", LORA))["input_ids"].numel()
    assert plain - frozen >= 2 * tokens * (48 + 48 + 80)


@pytest.mark.slow
def test_a_table_with_frozen_a_trains() -> None:
    """On a table A is drawn and B is zero, so that a step changes the table."""
    compiled = fresh("bert", varied(LORA, "embed", freeze_a=True))
    assert set(trainable(compiled)) == {"bert.embeddings.word_embeddings.graftc.lora.B"}
    (b,) = trainable(compiled).values()
    before = outputs_of(compiled, inputs_for(compiled))
    compiled(**inputs_for(compiled)).logits.square().sum().backward()
    with torch.no_grad():
        b -= 0.1 * b.grad
    assert largest_difference(before, outputs_of(compiled, inputs_for(compiled))) > 1e-3
