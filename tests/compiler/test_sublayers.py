"""Residual branches: each part is what its name says, checked by value."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from graftc.records.roles import Sublayer
from tests.compiler.structure_cases import Captured, family

PRE = (
    "gpt2",
    "llama",
    "vit",
    "phi3",
    "opt",
    "t5",
    "qwen3",
    "mixtral",
    "deepseek",
    "dinov2",
    "whisper",
    "granite",
    "swin",
)
POST = ("bert", "roberta", "bart", "distilbert", "deberta_v2", "squeezebert", "xlnet")
SANDWICH = ("gemma2", "gemma3")
BRANCH_NORM = ("olmo2", "swinv2")
PARALLEL = ("neox", "gptj", "falcon", "falcon_grouped", "codegen", "cohere")
QUICK = ("gpt2", "bert", "llama", "neox", "t5")
READERS = ("attn.q", "attn.k", "attn.v", "ffn.up", "ffn.gate", "lowrank.q", "lowrank.kv", "router")


def families(*groups: tuple[str, ...]) -> list[Any]:
    names = [name for group in groups for name in group]
    return [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in names]


def inside(model: Captured, sublayer: Sublayer) -> list[fx.Node]:
    """Return the linear maps that the branch needs and the stream does not."""
    flow = model.flow
    return [
        n
        for n in flow.linears
        if (n is sublayer.branch or flow.is_above(n, sublayer.branch))
        and not flow.is_above(n, sublayer.stream)
        and n is not sublayer.stream
    ]


def entries(value: Any) -> Tensor:
    assert isinstance(value, Tensor)
    return value.flatten().sort().values


@pytest.mark.full
@pytest.mark.parametrize("name", families(PRE, POST, SANDWICH, BRANCH_NORM, PARALLEL))
def test_a_sum_is_its_stream_and_branches(name: str) -> None:
    model = family(name)
    values = model.run()
    sums: dict[fx.Node, list[Sublayer]] = {}
    for sublayer in model.structure.sublayers:
        sums.setdefault(sublayer.sum, []).append(sublayer)
    assert sums
    for total, parts in sums.items():
        assert len({p.stream for p in parts}) == 1
        expected = values[parts[0].stream] + sum(values[p.branch] for p in parts)
        torch.testing.assert_close(values[total], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.sample("phi3", "whisper")
@pytest.mark.parametrize("name", families(PRE, POST, SANDWICH, BRANCH_NORM, PARALLEL))
def test_normed_is_what_the_first_maps_of_a_branch_read(name: str) -> None:
    model = family(name)
    values = model.run()
    roles = {f.node: f.role for f in model.structure.findings}
    for sublayer in model.structure.sublayers:
        own = inside(model, sublayer)
        first = [n for n in own if not any(model.flow.is_above(m, n) for m in own)]
        readers = [n for n in first if roles.get(n, "").endswith(READERS) and model.flow.is_above(sublayer.normed, n)]
        assert readers, sublayer
        for node in readers:
            # Windows, heads and rows may be split off on the way: the same numbers in another order.
            assert torch.equal(entries(values[sublayer.normed]), entries(values[model.flow.linears[node].input]))


@pytest.mark.sample("bert", "codegen", "whisper")
@pytest.mark.parametrize("name", families(PRE, POST, SANDWICH, BRANCH_NORM, PARALLEL))
def test_a_branch_is_reached_from_its_projection_without_another_map(name: str) -> None:
    model = family(name)
    flow = model.flow
    for sublayer in model.structure.sublayers:
        assert sublayer.projection is sublayer.branch or flow.is_above(sublayer.projection, sublayer.branch)
        after = [n for n in inside(model, sublayer) if flow.is_above(sublayer.projection, n)]
        assert not after, sublayer
        last = {n for n in inside(model, sublayer) if n is sublayer.projection or flow.is_above(n, sublayer.projection)}
        assert last == set(inside(model, sublayer))


@pytest.mark.sample("bert", "codegen", "whisper")
@pytest.mark.parametrize("name", families(PRE, POST, SANDWICH, BRANCH_NORM, PARALLEL))
def test_the_stream_goes_on_from_the_output(name: str) -> None:
    model = family(name)
    values = model.run()
    compared = 0
    for before, after in pairwise(model.structure.sublayers):
        same = before.stack == after.stack and before.sum is not after.sum
        if not same or (name in ("swin", "swinv2") and before.layer != after.layer):
            continue
        assert torch.equal(entries(values[before.output]), entries(values[after.stream]))
        compared += 1
    assert compared


@pytest.mark.sample("codegen", "phi3", "whisper")
@pytest.mark.parametrize("name", families(PRE, SANDWICH, PARALLEL))
def test_a_norm_before_the_branch(name: str) -> None:
    model = family(name)
    values = model.run()
    for sublayer in model.structure.sublayers:
        assert sublayer.post_norm is None and sublayer.output is sublayer.sum
        normed = values[sublayer.normed]
        assert not torch.equal(normed, values[sublayer.stream])
        # Norms of fresh models only shift and scale each position: the direction is the stream's, centred or not.
        stream = values[sublayer.stream].reshape(normed.shape)
        centred = stream - stream.mean(-1, keepdim=True)
        near = [torch.cosine_similarity(normed, expected, -1).min() for expected in (stream, centred)]
        assert max(near) > 1 - 1e-5


@pytest.mark.sample("bert")
@pytest.mark.parametrize("name", families(POST))
def test_a_norm_behind_the_sum(name: str) -> None:
    model = family(name)
    values = model.run()
    for sublayer in model.structure.sublayers:
        assert torch.equal(values[sublayer.normed], values[sublayer.stream])
        assert sublayer.output is sublayer.post_norm is not None
        total = values[sublayer.sum]
        axis = 1 if name == "squeezebert" else -1
        expected = torch.nn.functional.layer_norm(total.transpose(axis, -1), (total.shape[axis],), eps=1e-12)
        actual = values[sublayer.post_norm]
        actual = actual if actual.shape == expected.shape else actual.transpose(axis, -1)
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", families(SANDWICH, BRANCH_NORM))
def test_a_norm_in_the_branch(name: str) -> None:
    model = family(name)
    values = model.run()
    norms = {f.node for f in model.structure.by_role()["norm"]}
    for sublayer in model.structure.sublayers:
        assert sublayer.projection is not sublayer.branch and sublayer.post_norm is None
        between = [n for n in norms if model.flow.is_above(sublayer.projection, n)]
        assert any(n is sublayer.branch or model.flow.is_above(n, sublayer.branch) for n in between)
        if name in BRANCH_NORM:
            assert torch.equal(values[sublayer.normed], values[sublayer.stream])


@pytest.mark.full
@pytest.mark.parametrize("name", families(PARALLEL))
def test_parallel_sublayers_share_stream_and_sum(name: str) -> None:
    sublayers = family(name).structure.sublayers
    assert [s.roles for s in sublayers] == [("attn.sublayer",), ("ffn.sublayer",)] * 2
    for attention, feed_forward in zip(sublayers[::2], sublayers[1::2], strict=True):
        assert attention.stream is feed_forward.stream and attention.sum is feed_forward.sum
        assert attention.branch is not feed_forward.branch


@pytest.mark.parametrize("name", families(("dinov2", "granite")))
def test_scales_stand_between_projection_and_branch(name: str) -> None:
    model = family(name)
    values = model.run()
    for sublayer in model.structure.sublayers:
        assert sublayer.projection in model.flow.linears
        ratio = values[sublayer.branch] / values[sublayer.projection]
        torch.testing.assert_close(ratio, torch.full_like(ratio, 0.5 if name == "granite" else 1.0))
        assert sublayer.branch is not sublayer.projection


@pytest.mark.full
def test_roles_of_sublayers_in_two_stacks() -> None:
    sublayers = family("t5").structure.sublayers
    assert [s.roles for s in sublayers if s.stack == "encoder.block"] == [
        ("encoder.attn.sublayer",),
        ("encoder.ffn.sublayer",),
    ] * 2
    assert [s.roles for s in sublayers if s.stack == "decoder.block"] == [
        ("decoder.attn.sublayer",),
        ("decoder.cross.attn.sublayer",),
        ("decoder.ffn.sublayer",),
    ] * 2
    assert {(s.owner, s.use) for s in sublayers} == {
        (f"{n}.block.{i}", 0) for n in ("encoder", "decoder") for i in (0, 1)
    }


@pytest.mark.slow
def test_a_shared_layer_has_each_sublayer_twice() -> None:
    sublayers = family("albert").structure.sublayers
    assert [(s.roles, s.use) for s in sublayers] == [
        (("attn.sublayer",), 0),
        (("ffn.sublayer",), 0),
        (("attn.sublayer",), 1),
        (("ffn.sublayer",), 1),
    ]
    assert len({s.owner for s in sublayers}) == 1
