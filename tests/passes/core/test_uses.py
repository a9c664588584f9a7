"""LoRA on every way in which a model reads a weight: identity, folding, and reads that only look like a linear map."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graftc
from graftc.passes.core.build.builder import Builder
from graftc.passes.core.sites.sites import EmbeddingSite, ExpertsSite, LinearSite
from graftc.runtime.compiled import Compiled
from graftc.specs.errors.diagnostics import GraftError
from graftc.testing import largest_difference, outputs_of, perturb, same_bits
from tests.kit.models import fresh
from tests.kit.specs import lora

WIDTH = 12


def functional(read: Callable[[Tensor, Any], Tensor], **shapes: tuple[int, ...]) -> nn.Module:
    """Return a model whose ``part`` has parameters of these shapes and computes ``read(x, part)``."""

    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name, shape in shapes.items():
                self.register_parameter(name, nn.Parameter(0.3 * torch.randn(shape)))

        def forward(self, x: Tensor) -> Tensor:
            return read(x, self)

    return Model(Part())


class Model(nn.Module):
    """A model with one part."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, x: Tensor) -> Tensor:
        return self.part(x)


class Experts(nn.Module):
    """Four experts, chosen per row by a number in the input."""

    def __init__(self, picked: bool) -> None:
        super().__init__()
        self.picked = picked
        self.weight = nn.Parameter(0.3 * torch.randn(4, WIDTH, 7))

    def forward(self, x: Tensor) -> Tensor:
        if not self.picked:
            return torch.bmm(x.unsqueeze(0).expand(4, -1, -1), self.weight).sum(0)
        which = (x[:, 0] * 10).long().abs() % 4
        return torch.bmm(x.unsqueeze(1), self.weight[which]).squeeze(1)


ROWS = torch.randn(5, WIDTH)
IMAGES = torch.randn(3, 6, 9, 10)
SERIES = torch.randn(3, 6, 11)
IDS = torch.randint(0, 31, (3, 7))

CASES: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "linear": (lambda: functional(lambda x, p: F.linear(x, p.weight), weight=(8, WIDTH)), ROWS),
    "transposed": (lambda: functional(lambda x, p: x @ p.weight.T, weight=(8, WIDTH)), ROWS),
    "in_out": (lambda: functional(lambda x, p: x @ p.weight, weight=(WIDTH, 8)), ROWS),
    "addmm": (
        lambda: functional(lambda x, p: torch.addmm(p.bias, x, p.weight), weight=(WIDTH, 8), bias=(8,)),
        ROWS,
    ),
    "weight_first": (
        lambda: functional(lambda x, p: (p.weight @ x.transpose(1, 2)).relu(), weight=(8, WIDTH)),
        torch.randn(2, 5, WIDTH),
    ),
    "kernel_squeezed": (
        lambda: functional(lambda x, p: F.conv1d(x, p.weight.squeeze(1).unsqueeze(1), groups=6), weight=(6, 1, 3)),
        SERIES,
    ),
    "first_rows": (lambda: functional(lambda x, p: F.linear(x, p.weight[:5]), weight=(8, WIDTH)), ROWS),
    "rows_with_bias": (
        lambda: functional(lambda x, p: F.linear(x, p.weight[2:7], p.bias[2:7]), weight=(8, WIDTH), bias=(8,)),
        ROWS,
    ),
    "conv1d": (lambda: Model(nn.Conv1d(6, 8, 3, stride=2, padding=1)), SERIES),
    "conv2d": (lambda: Model(nn.Conv2d(6, 8, (3, 2), stride=2, dilation=(1, 2))), IMAGES),
    "conv2d_same": (lambda: Model(nn.Conv2d(6, 8, 3, padding="same", bias=False)), IMAGES),
    "conv2d_1x1": (lambda: Model(nn.Conv2d(6, 8, 1)), IMAGES),
    "conv2d_groups": (lambda: Model(nn.Conv2d(6, 8, 3, groups=2)), IMAGES),
    "conv2d_depthwise": (lambda: Model(nn.Conv2d(6, 12, 3, groups=6)), IMAGES),
    "embedding": (lambda: Model(nn.Embedding(31, WIDTH, padding_idx=3)), IDS),
    "experts": (lambda: Model(Experts(picked=False)), ROWS),
    "experts_picked": (lambda: Model(Experts(picked=True)), ROWS),
    "one_expert_at_a_time": (
        lambda: functional(
            lambda x, p: torch.stack([F.linear(x, p.weight[i]) for i in range(3)]).sum(0), weight=(3, 8, WIDTH)
        ),
        ROWS,
    ),
    "in_projection": (lambda: Model(SelfAttention()), torch.randn(2, 5, WIDTH)),
    "twice": (lambda: functional(lambda x, p: F.linear(F.linear(x, p.weight).relu(), p.weight), weight=(12, 12)), ROWS),
}


class SelfAttention(nn.Module):
    """`nn.MultiheadAttention` on one input."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 3, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


def with_lora(case: str, **fields: Any) -> tuple[nn.Module, Compiled, Mapping[str, Tensor]]:
    """Return the case's frozen model in eval mode, the same with LoRA on everything, and the inputs."""
    build, x = CASES[case]
    torch.manual_seed(0)
    model = build().eval().requires_grad_(False)
    return model, fresh(model, lora(modules="**", **fields), inputs={"x": x}), {"x": x}


@pytest.mark.slow
@pytest.mark.parametrize(
    "init", ["kaiming", "pissa", *(pytest.param(name, marks=pytest.mark.full) for name in ("gaussian", "olora"))]
)
@pytest.mark.parametrize("case", CASES)
def test_identity_and_fold(case: str, init: str) -> None:
    """Nothing changes at first; folded equals unfolded, and so does a copy of the source with the folded tensors."""
    model, compiled, inputs = with_lora(case, init=init)
    assert same_bits(outputs_of(compiled, inputs), outputs_of(model, inputs))
    perturb(compiled, 0.1)
    unfolded = outputs_of(compiled, inputs)
    assert largest_difference(unfolded, outputs_of(model, inputs)) > 1e-2
    merged = compiled.merge()
    assert merged.certificate.passed
    assert all(site.change > 0 for site in merged.certificate.sites)
    source = copy.deepcopy(model)
    source.load_state_dict(merged.folded_state_dict())
    for folded in (merged, source):
        assert largest_difference(outputs_of(folded, inputs), unfolded) <= 2e-5


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("case", CASES)
def test_beside_training_in_full(case: str, method: str) -> None:
    """When the weight itself trains as well, nothing changes at first, and both fold into it."""
    build, x = CASES[case]
    torch.manual_seed(0)
    model, inputs = build().eval(), {"x": x}  # torch uses other kernels for frozen weights
    spec = {"train": ["**"], "adapt": [{"method": method, "target": {"modules": "**"}, "rank": 2}]}
    compiled = graftc.compile(spec, model, inputs).eval()
    assert same_bits(outputs_of(compiled, inputs), outputs_of(model, inputs))
    tensors = perturb(compiled, 0.1)
    assert any(".trained." in name for name in tensors)
    merged = compiled.merge()
    assert merged.certificate.passed
    assert largest_difference(outputs_of(merged, inputs), outputs_of(compiled, inputs)) <= 2e-5


@pytest.mark.parametrize("case", CASES)
def test_every_factor_gets_a_gradient(case: str) -> None:
    """One backward pass from random factors reaches all of them."""
    _, compiled, inputs = with_lora(case)
    tensors = perturb(compiled, 0.1)
    compiled.train()
    compiled(**inputs).square().sum().backward()
    grads = {name: p.grad for name, p in compiled.named_parameters() if p.requires_grad}
    assert grads.keys() == tensors.keys()
    assert all(grad is not None and bool(grad.abs().max() > 0) for grad in grads.values())


SHAPES: dict[str, list[tuple[tuple[int, ...], tuple[int, ...]]]] = {
    "transposed": [((2, WIDTH), (8, 2))],
    "in_out": [((2, WIDTH), (8, 2))],
    "first_rows": [((2, WIDTH), (5, 2))],
    "conv2d": [((2, 6 * 3 * 2), (8, 2))],
    "conv2d_groups": [((2, 3 * 9), (8, 2))],
    "embedding": [((2, 31), (WIDTH, 2))],
    "experts": [((4, 2, WIDTH), (4, 7, 2))],
    "one_expert_at_a_time": [((3, 2, WIDTH), (3, 8, 2))],
    "twice": [((2, 12), (12, 2))],
}


@pytest.mark.parametrize("case", SHAPES)
def test_shapes(case: str) -> None:
    """Factors have the sizes of the oriented rows, with one pair for all uses of a tensor."""
    _, compiled, _ = with_lora(case)
    shapes = [tuple(t.shape) for t in compiled.adapter_state_dict().values()]
    assert [(a, b) for a, b in zip(shapes[::2], shapes[1::2], strict=True)] == SHAPES[case]


def test_kinds() -> None:
    """Tables and experts have their own kinds of sites."""
    kinds = {"embedding": EmbeddingSite, "experts": ExpertsSite, "conv2d": LinearSite}
    for case, kind in kinds.items():
        _, compiled, _ = with_lora(case)
        ((site, _),) = compiled.compilation.main.resolved[0].sites
        assert type(site) is kind


def test_no_dropout_of_token_numbers() -> None:
    """Dropout is left out on the input of a table, which is token numbers."""
    _, compiled, _ = with_lora("embedding", dropout=0.5)
    assert "dropout" not in compiled.print_graph("train")


BLOCKED: dict[str, Callable[[], nn.Module]] = {
    "scaled": lambda: functional(lambda x, p: F.linear(x, 2 * p.weight), weight=(8, WIDTH)),
    "permuted": lambda: functional(lambda x, p: F.linear(x, p.weight.flip(0)), weight=(8, WIDTH)),
    "some_columns": lambda: functional(lambda x, p: F.linear(x[:, :6], p.weight[:, :6]), weight=(8, WIDTH)),
    "regrouped": lambda: functional(lambda x, p: F.linear(x, p.weight.reshape(WIDTH, 8).T), weight=(8, WIDTH)),
    "normed": lambda: Model(nn.utils.parametrizations.weight_norm(nn.Linear(WIDTH, 8))),
}


@pytest.mark.parametrize("case", BLOCKED)
def test_more_than_rows_of_a_tensor(case: str) -> None:
    """A weight computed from its tensor, or from parts that are not rows, is refused."""
    model = BLOCKED[case]().eval()
    spec = {"adapt": [{"method": "lora", "target": {"modules": "part**"}, "rank": 2}]}
    with pytest.raises(GraftError) as caught:
        graftc.compile(spec, model, {"x": ROWS})
    assert caught.value.code in ("GC011", "GC017")


def test_read_elsewhere_too() -> None:
    """A weight with another reader trains, with a warning; folding it would change the other reader as well."""
    model = functional(lambda x, p: F.linear(x, p.weight) + p.weight.square().sum(), weight=(8, WIDTH)).eval()
    spec = {"adapt": [{"method": "lora", "target": {"modules": "part"}, "rank": 2}]}
    with pytest.warns(UserWarning, match="GC024.*also read by"):
        compiled = graftc.compile(spec, model, {"x": ROWS})
    perturb(compiled)
    with pytest.raises(GraftError) as caught:
        compiled.merge()
    assert caught.value.code == "GC022"
    assert "part" in caught.value.message


def test_a_module_under_two_names() -> None:
    """A module registered twice is one place with two uses, and it folds because all of its readers are adapted."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(WIDTH, WIDTH)
            self.second = self.first

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x).relu())

    torch.manual_seed(0)
    model = Twice().eval().requires_grad_(False)
    spec = {"adapt": [{"method": "lora", "target": {"modules": "first", "expect": 1}, "rank": 2}]}
    compiled = graftc.compile(spec, model, {"x": ROWS}).eval()
    assert len(compiled.compilation.main.resolved[0].sites) == 2
    perturb(compiled, 0.1)
    folded = compiled.merge().folded_state_dict()
    assert torch.equal(folded["first.weight"], folded["second.weight"])
    source = copy.deepcopy(model)
    source.load_state_dict(folded)
    assert largest_difference(outputs_of(source, {"x": ROWS}), outputs_of(compiled, {"x": ROWS})) <= 2e-5


@pytest.mark.parametrize("method", ["lora", "loha", "lokr", "dora", "oft", "miss", "hira", "gralora"])
def test_some_rows_of_a_grouped_convolution(method: str) -> None:
    """Queries and values are rows of one grouped convolution, and rows cannot be computed without their group."""

    class Grouped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Conv1d(WIDTH, 3 * WIDTH, 1, groups=3)
            self.out = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x.transpose(1, 2)).transpose(1, 2).unflatten(-1, (3, 2, 6)).permute(2, 0, 3, 1, 4)
            return x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2))

    torch.manual_seed(0)
    model, x = Grouped().eval().requires_grad_(False), torch.randn(2, 5, WIDTH)
    size = {"block_size": 4} if method == "oft" else {"rank": 2}
    spec = {"adapt": [{"name": "a", "method": method, "target": {"role": ["attn.q", "attn.v"]}, **size}]}
    compiled = graftc.compile(spec, model, {"x": x}).eval()
    sites = [site for site, _ in compiled.compilation.main.resolved[0].sites]
    assert [str(site.own) for site in sites if isinstance(site, LinearSite)] == ["rows 0:12", "rows 24:36"]
    assert same_bits(outputs_of(compiled, {"x": x}), outputs_of(model, {"x": x}))
    perturb(compiled, 0.1)
    merged = compiled.merge()
    assert largest_difference(outputs_of(merged, {"x": x}), outputs_of(compiled, {"x": x})) <= 2e-5
    if method == "lora":
        build = Builder(compiled.compilation.program("train"), compiled.compilation.store, "other", "lora")
        with (
            build.on(sites[0]),
            pytest.raises(GraftError, match="is a grouped convolution") as error,
        ):
            build.map(sites[0], build.input(sites[0]), build.attribute("qkv.graftc.a.q.A"))
        assert error.value.code == "GC017"


def test_both_ways_round() -> None:
    """If a square weight is also read transposed, that read has other rows, so merging raises GC022."""
    model = functional(lambda x, p: F.linear(F.linear(x, p.weight).relu(), p.weight.T), weight=(WIDTH, WIDTH)).eval()
    spec = {"adapt": [{"method": "lora", "target": {"modules": "part"}, "rank": 2}]}
    with pytest.warns(UserWarning, match="GC024.*also read by"):
        compiled = graftc.compile(spec, model, {"x": ROWS})
    perturb(compiled)
    with pytest.raises(GraftError) as caught:
        compiled.merge()
    assert caught.value.code == "GC022"


def test_read_outside_its_module() -> None:
    """A weight that another module reads is one place: both reads are adapted, and it folds."""

    class Outside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(self.first(x).relu(), self.first.weight)

    torch.manual_seed(0)
    model = Outside().eval().requires_grad_(False)
    spec = {"adapt": [{"method": "lora", "target": {"modules": "first", "expect": 1}, "rank": 2}]}
    compiled = graftc.compile(spec, model, {"x": ROWS}).eval()
    assert [str(site.key) for site, _ in compiled.compilation.main.resolved[0].sites] == [
        "first.weight",
        "first.weight#1",
    ]
    perturb(compiled, 0.1)
    merged = compiled.merge()
    source = copy.deepcopy(model)
    source.load_state_dict(merged.folded_state_dict())
    assert largest_difference(outputs_of(source, {"x": ROWS}), outputs_of(compiled, {"x": ROWS})) <= 2e-5
