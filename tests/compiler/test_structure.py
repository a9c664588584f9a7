"""Roles from data flow: claims are checked against the effects of real numbers."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable

import pytest
import torch
import transformers
from _pytest.mark import ParameterSet
from hypothesis import given
from hypothesis import strategies as st

from graftc.compiler.capture.capture import capture
from graftc.compiler.capture.request import CaptureRequest
from graftc.compiler.capture.signature import Axis
from graftc.compiler.roles.structure import Finding, find_structure
from graftc.passes.core.weights.runs import runs_of
from graftc.specs.claims import SiteKind
from graftc.specs.errors.text import format_layers, format_runs
from graftc.specs.roles import parse_role
from tests.compiler.perturbation import attention_of, moved, noise, own_rows, perturbed, stored_rows
from tests.compiler.structure_cases import VALUES, Behind, Captured, Einsum, Misnamed, Odd, Packed, captured, family
from tests.compiler.structure_expected import EXPECTED, EXPERTS, LAYERS, MIXERS, UNRESOLVED
from tests.compiler.structure_models import MODELS, D

QUICK = ("bert", "gpt2", "llama", "vit", "neox", "phi3", "t5")
WITHOUT_FEED_FORWARD = dict.fromkeys(("mixtral", "qwen3_moe", "gpt_oss", "segformer"), 0)
SLOW = (
    *("falcon_grouped", "bloom", "codegen", "mixtral", "gpt_oss", "deepseek", "deberta_v2", "whisper"),
    *("swinv2", "clip", "squeezebert", "xlnet", "jamba", "segformer"),
)
"""One of a kind each: fused and interleaved rows, experts, two stacks, windows, convolutions, other mixers. The others
are in ``make test-full``, and in ``make coverage`` with every other class of transformers."""


def _marked(names: Iterable[str]) -> list[ParameterSet]:
    """Return the names as parameters; all tests of a model share its capture, and so have the same marks."""
    marks = {f: () if f in QUICK else pytest.mark.slow if f in SLOW else pytest.mark.full for f in names}
    return [pytest.param(name, marks=own) for name, own in marks.items()]


FAMILIES = _marked(MODELS)


def shown(finding: Finding) -> tuple[str | None, str]:
    return finding.parameter, "all" if finding.rows is None else format_runs(finding.rows)


# --- what is found ---------------------------------------------------------------------------------------


@pytest.mark.full
@pytest.mark.parametrize("name", FAMILIES)
def test_roles_of_family(name: str) -> None:
    by_role = family(name).structure.by_role()
    for role, expected in EXPECTED[name].items():
        lowest = min(expected_layers(name, role))
        first = [shown(f) for f in by_role.get(role, []) if f.layer in (lowest, None)]
        assert expected in first, role
        assert len(set(first)) == 1, role
        in_layers = {f.layer for f in by_role[role]} - {None}
        assert not in_layers or in_layers == expected_layers(name, role)


def expected_layers(name: str, role: str) -> set[int]:
    if name == "albert":
        return {0}
    return LAYERS.get((name, role), {0, 1})


@pytest.mark.full
@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_left_is_reported_with_a_reason(name: str) -> None:
    structure = family(name).structure
    assert {u.module for u in structure.unresolved} == set(UNRESOLVED.get(name, {}))
    for entry in structure.unresolved:
        assert UNRESOLVED[name][entry.module] in entry.reason


@pytest.mark.full
@pytest.mark.parametrize("name", FAMILIES)
def test_findings_are_well_formed(name: str) -> None:
    model = family(name)
    order = {node: i for i, node in enumerate(model.graph.nodes)}
    positions = [order[f.node] for f in model.structure.findings]
    assert positions == sorted(positions)
    places = [(f.role, f.module, f.parameter, f.rows, f.use) for f in model.structure.findings]
    assert len(places) == len(set(places))
    for finding in model.structure.findings:
        assert parse_role(finding.role).name in finding.role
        assert finding.evidence
        assert finding.module == finding.node.meta["module"]
        if finding.layer is not None:
            assert finding.module.startswith(f"{finding.stack}.{finding.layer}")
        if finding.rows is not None:
            flat = [edge for run in finding.rows for edge in run]
            assert flat == sorted(set(flat))
    assert len(model.structure.by_role().get("attn", [])) in (0, len(model.flow.attentions))


@pytest.mark.slow
def test_norm_scales_are_found_fused_and_written_out() -> None:
    bert, llama = (family(n).structure.by_role()["norm"] for n in ("bert", "llama"))
    assert [f.parameter for f in bert] == [
        "bert.embeddings.LayerNorm.weight",
        *(f"bert.encoder.layer.{i}.{n}.LayerNorm.weight" for i in (0, 1) for n in ("attention.output", "output")),
    ]
    assert [f.parameter for f in llama] == [
        *(f"model.layers.{i}.{n}_layernorm.weight" for i in (0, 1) for n in ("input", "post_attention")),
        "model.norm.weight",
    ]
    assert {f.kind for f in (*bert, *llama)} == {SiteKind.NORM}


@pytest.mark.full
@pytest.mark.parametrize("name", _marked(EXPERTS))
def test_experts_are_whole_3d_weights(name: str) -> None:
    findings = family(name).structure.by_role()["experts"]
    assert {f.kind for f in findings} == {SiteKind.EXPERTS}
    by_layer = {
        layer: tuple(f.parameter for f in findings if f.layer == layer) for layer in {f.layer for f in findings}
    }
    assert by_layer == EXPERTS[name]
    assert all(f.rows is None and f.use == 0 for f in findings)


@pytest.mark.full
@pytest.mark.parametrize("name", _marked(MIXERS))
def test_projections_of_a_branch_that_mixes_positions_without_attention(name: str) -> None:
    findings = family(name).structure.by_role()["mixer"]
    assert [f.parameter for f in findings] == [f"{module}.weight" for module in MIXERS[name]]


@pytest.mark.full
def test_keys_of_two_projections() -> None:
    """Keys combine a low-rank projection with rows of the first stage that the heads share."""
    actual = {(f.parameter, f.rows) for f in family("deepseek").structure.having("attn.k") if f.layer == 0}
    attention = "model.layers.0.self_attn"
    assert actual == {
        (f"{attention}.kv_a_proj_with_mqa.weight", ((16, 24),)),
        (f"{attention}.kv_b_proj.weight", ((0, 8), (20, 28), (40, 48), (60, 68))),
    }


@pytest.mark.full
@pytest.mark.slow
def test_a_shared_layer_is_told_apart_by_use() -> None:
    findings = family("albert").structure.by_role()["attn.q"]
    assert [(f.layer, f.use) for f in findings] == [(0, 0), (0, 1)]


# --- the independent check: perturb what is claimed, and see what changes ---------------------------------


@pytest.mark.full
@pytest.mark.parametrize("name", FAMILIES)
def test_claimed_rows_move_their_operand_and_no_other(name: str) -> None:
    model = family(name)
    base = model.run()
    checked = set()
    for letter in "qkv":
        for finding in model.structure.having(f"attn.{letter}"):
            if finding.use:
                continue
            attention = attention_of(model, finding)
            rows = own_rows(model, finding)
            edges = [rows] if finding.rows is None else [rows, *(torch.tensor([a]) for a, _ in finding.rows)]
            edges += [] if finding.rows is None else [torch.tensor([b - 1]) for _, b in finding.rows]
            for some in edges if finding.layer == 0 else [rows]:
                change = perturbed(model, finding, some, noise)
                assert moved(model, base, change, attention) == {letter}, (finding, some)
            checked.add(finding.role)
    assert len(checked) >= 3


@pytest.mark.full
@pytest.mark.parametrize("name", FAMILIES)
def test_other_rows_of_a_fused_weight_leave_the_operand_alone(name: str) -> None:
    model = family(name)
    base = model.run()
    for letter in "qkv":
        for finding in model.structure.having(f"attn.{letter}"):
            if finding.rows is None or finding.layer != 0 or "kv_a" in finding.module:
                continue
            every = torch.ones(stored_rows(model, finding), dtype=torch.bool)
            every[own_rows(model, finding)] = False
            others = torch.nonzero(every).flatten()
            change = perturbed(model, finding, others, noise)
            assert letter not in moved(model, base, change, attention_of(model, finding)), finding


@pytest.mark.full
@pytest.mark.parametrize("name", FAMILIES)
def test_output_projections_move_the_stream_and_not_their_own_attention(name: str) -> None:
    model = family(name)
    base = model.run()
    findings = model.structure.having("attn.o")
    assert len(findings) == len(model.flow.attentions)
    for finding in findings:
        if finding.layer != 0 or finding.use:
            continue
        changed = model.run(perturbed(model, finding, own_rows(model, finding), noise))
        first = next(s for s in model.structure.sublayers if model.flow.is_above(finding.node, s.sum))
        assert not torch.equal(base[first.sum], changed[first.sum])
        assert torch.equal(base[first.stream], changed[first.stream])


@pytest.mark.sample("vit", "clip")
@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_feed_forward_is_linear_in_up_and_not_in_gate(name: str) -> None:
    """Doubling the up rows doubles the inner activation of a gated feed-forward; doubling the gate rows does not."""
    model = family(name)
    base = model.run()
    findings = model.structure.having("ffn.down")
    assert len(findings) == WITHOUT_FEED_FORWARD.get(name, len(model.flow.attentions) - len(crosses(model)))
    for down in findings:
        inner = model.flow.linears[down.node].input
        unscaled = base[inner]
        parts = [f for f in model.structure.findings if f.role.endswith((".up", ".gate")) and before(model, f, down)]
        is_gated = any("gate" in f.role for f in parts)
        assert parts
        for part in parts:
            if part.use or down.use:
                continue
            after = model.run(perturbed(model, part, own_rows(model, part), lambda own: own * 2))[inner]
            assert not torch.equal(unscaled, after), part
            if is_gated:
                linear = torch.allclose(after, unscaled * 2, rtol=1e-4, atol=1e-7)
                assert linear == part.role.endswith("up"), part


def crosses(model: Captured) -> list[Finding]:
    return model.structure.having("cross.attn")


def before(model: Captured, part: Finding, down: Finding) -> bool:
    same = (part.stack, part.layer) == (down.stack, down.layer)
    return same and model.flow.is_above(part.node, model.flow.linears[down.node].input)


# --- models of our own: names say nothing ----------------------------------------------------------------


@pytest.mark.slow
def test_roles_do_not_come_from_names() -> None:
    torch.manual_seed(0)
    model = captured(Misnamed(), VALUES)
    by_role = {
        role: shown(findings[0]) for role, findings in model.structure.by_role().items() if findings[0].parameter
    }
    odd = ",".join(f"{i}:{i + 1}" for i in (1, 3, 5, 7))
    even = ",".join(f"{i}:{i + 1}" for i in (0, 2, 4, 6))
    assert by_role == {
        "attn.q": ("layers.0.v_proj.weight", "all"),
        "attn.k": ("layers.0.down_proj.weight", f"{odd},... (48 runs)"),
        "attn.v": ("layers.0.down_proj.weight", f"{even},... (48 runs)"),
        "attn.o": ("layers.0.gate.weight", "all"),
        "ffn.up": ("layers.0.q_proj.weight", "all"),
        "ffn.down": ("layers.0.o_proj.weight", "all"),
        "head": ("embedding.weight", "all"),
    }
    base = model.run()
    for letter in "qkv":
        for finding in model.structure.having(f"attn.{letter}"):
            change = perturbed(model, finding, own_rows(model, finding), noise)
            assert moved(model, base, change, attention_of(model, finding)) == {letter}


@pytest.mark.full
def test_slices_of_one_parameter_are_rows_of_it() -> None:
    target = Axis("y", torch.float32, ("batch", "target_sequence", D))
    model = Packed()
    graph = capture(CaptureRequest.of(model, [*VALUES, target], mode="train")).program.graph
    by_role = find_structure(graph).by_role()
    assert {r: shown(f[0]) for r, f in by_role.items() if "attn." in r} == {
        "encoder.attn.q": ("encoder.layers.0.self_attn.in_proj_weight", "0:48"),
        "encoder.attn.k": ("encoder.layers.0.self_attn.in_proj_weight", "48:96"),
        "encoder.attn.v": ("encoder.layers.0.self_attn.in_proj_weight", "96:144"),
        "encoder.attn.o": ("encoder.layers.0.self_attn.out_proj.weight", "all"),
        "decoder.attn.q": ("decoder.layers.0.self_attn.in_proj_weight", "0:48"),
        "decoder.attn.k": ("decoder.layers.0.self_attn.in_proj_weight", "48:96"),
        "decoder.attn.v": ("decoder.layers.0.self_attn.in_proj_weight", "96:144"),
        "decoder.attn.o": ("decoder.layers.0.self_attn.out_proj.weight", "all"),
        "decoder.cross.attn.q": ("decoder.layers.0.multihead_attn.in_proj_weight", "0:48"),
        "decoder.cross.attn.k": ("decoder.layers.0.multihead_attn.in_proj_weight", "48:96"),
        "decoder.cross.attn.v": ("decoder.layers.0.multihead_attn.in_proj_weight", "96:144"),
        "decoder.cross.attn.o": ("decoder.layers.0.multihead_attn.out_proj.weight", "all"),
    }


@pytest.mark.slow
def test_index_notation_and_writes_in_place() -> None:
    torch.manual_seed(0)
    model = captured(Einsum(), VALUES)
    second = tuple((i + 7, i + 12) for i in range(0, D, 12))
    third = tuple((i + 5, i + 12) for i in range(0, D, 12))
    for layer in (0, 1):
        actual = {(f.role, f.module, f.rows) for f in model.structure.findings if f.layer == layer and f.parameter}
        assert actual == {
            ("attn.q", f"layers.{layer}.0", None),
            ("attn.k", f"layers.{layer}.1", second),
            ("attn.k", f"layers.{layer}.2", third),
            ("attn.v", f"layers.{layer}.2", None),
            ("attn.o", f"layers.{layer}.3", None),
        }
    assert len(model.structure.sublayers) == 2
    assert [u.module for u in model.structure.unresolved] == ["layers.0.1", "layers.1.1"]
    assert "rows 0:7,12:19" in model.structure.unresolved[0].reason


@pytest.mark.slow
def test_unknown_forms_are_unresolved_and_never_guessed() -> None:
    structure = find_structure(capture(CaptureRequest.of(Odd(), VALUES)).program.graph)
    assert structure.findings == ()
    reasons = {u.module: u.reason for u in structure.unresolved}
    assert set(reasons) == {name for name, _ in Odd().named_children()}
    assert "more than two linear maps in a row" in reasons["first"]
    assert "no other linear map" in reasons["lone"]
    assert "not as a gated product" in reasons["join"]
    assert "neither of the factors" in reasons["plain"]
    assert "cannot be followed" in reasons["halves"]


@pytest.mark.slow
def test_more_tokens_cut_off_than_the_small_sizes_have() -> None:
    assert captured(Behind(), VALUES).structure.by_role().keys() == {"ffn.up", "ffn.down"}


# --- parts -----------------------------------------------------------------------------------------------


@given(st.sets(st.integers(0, 60)))
def test_runs_are_sorted_disjoint_and_complete(columns: set[int]) -> None:
    runs = runs_of(torch.tensor(sorted(columns), dtype=torch.int64))
    assert {i for a, b in runs for i in range(a, b)} == columns
    edges = [edge for run in runs for edge in run]
    assert edges == sorted(set(edges))


def test_runs_and_layers_as_text() -> None:
    assert format_runs(((0, 4), (8, 12))) == "0:4,8:12"
    assert format_runs(tuple((i, i + 1) for i in range(0, 12, 2))) == "0:1,2:3,4:5,6:7,... (6 runs)"
    assert format_layers([3, 0, 1, 2, 5, 5]) == "0-3,5"


@pytest.mark.slow
def test_json_and_table_of_a_fused_model() -> None:
    structure = family("gpt2").structure
    plain = json.loads(json.dumps(structure.to_json()))
    key = next(f for f in plain["findings"] if f["role"] == "attn.k")
    assert key["rows"] == [[48, 96]] and key["layer"] == 0 and key["kind"] == "linear"
    assert "rows 48:96 of c_attn" in key["evidence"]
    lines = {(role, rows, layers) for role, _, rows, layers, _ in structure.rows()}
    assert ("attn.k", "48:96", "0-1") in lines


@pytest.mark.full
def test_the_graph_is_left_as_it_was() -> None:
    graph = capture(CaptureRequest.of(MODELS["gpt2"]())).program.graph
    before_text, keys = str(graph), [sorted(n.meta) for n in graph.nodes]
    assert find_structure(graph).to_json() == find_structure(graph).to_json()
    assert str(graph) == before_text and [sorted(n.meta) for n in graph.nodes] == keys


@pytest.mark.full
def test_a_real_size_on_meta_is_quick() -> None:
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=8)
        )
    graph = capture(CaptureRequest.of(model)).program.graph
    started = time.perf_counter()
    structure = find_structure(graph)
    assert time.perf_counter() - started < 2.0
    assert {f.layer for f in structure.having("attn.q")} == set(range(8))
    assert not structure.unresolved
