"""Selections: the sets that the resolver selects, and targets that mean exactly these."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import graftc
import graftc.runtime.api
from graftc.compiler.capture.capture_cache import captured
from graftc.compiler.capture.defaults import default_axes
from graftc.compiler.capture.request import CaptureRequest
from graftc.compiler.resolve.resolver import Resolver
from graftc.compiler.resolve.select import select
from graftc.compiler.resolve.selectable import Selectable, SelectedPlace
from graftc.compiler.resolve.selection import Selection
from graftc.compiler.resolve.sitetable import SiteTable
from graftc.compiler.roles.structure import find_structure
from graftc.passes.core.weights.store import Store
from graftc.specs import LoRA, Spec, Target
from graftc.specs.errors.diagnostics import GraftError
from graftc.testing.families import tiny
from tests.compiler.test_select import encoder

NAMES = ("llama", "gpt2", "t5", "mixtral")
ROLES = {
    "llama": ["attn.q", "attn.k", "attn.v", "attn.o", "attn.{q,v}", "ffn.gate", "ffn.up", "ffn.down", "head", "embed"],
    "gpt2": ["attn.q", "attn.k", "attn.v", "attn.{k,v}", "attn.o", "ffn.up", "ffn.down", "head", "embed"],
    "t5": ["attn.q", "encoder.attn.k", "cross.attn.v", "decoder.attn.o", "decoder.ffn.up", "ffn.down", "embed"],
    "mixtral": ["attn.q", "attn.v", "attn.o", "experts", "router", "head"],
}
GLOBS = {
    "llama": ["**", "model.layers.*.self_attn.*", "**.q_proj", "**.{q,k}_proj", "**.mlp.**", "lm_head", "model.**"],
    "gpt2": ["**", "transformer.h.*.attn.*", "**.c_proj", "**.mlp.{c_fc,c_proj}", "transformer.w*"],
    "t5": ["encoder.**", "decoder.**", "**.q", "**.SelfAttention.{k,v}", "**.DenseReluDense.*", "lm_head"],
    "mixtral": ["**", "**.experts", "**.gate", "**.self_attn.*", "**.experts.down_proj"],
}
LAYERS: list[int | str] = [0, 1, -1, "0:1", "1:", ":"]


@cache
def table(name: str) -> SiteTable:
    """Return the sites of a model's usual signature, without using selections."""
    model = tiny(name)
    store = Store.mirror(model)
    result = captured(CaptureRequest.of(model, default_axes(model), aliases=store.aliases))
    structure = find_structure(result.program.graph, result.constants)
    return SiteTable(result.program, store, structure, dict(model.named_modules(remove_duplicate=False)))


@cache
def every(name: str, method: str | None = None) -> Selection:
    """Return the result of `graftc.select` for a tiny model."""
    return graftc.select(graftc.roles(tiny(name)), method=method)


def names(selection: Selection) -> set[str]:
    return {place.name for place in selection}


def resolved(name: str, target: Target) -> set[str]:
    """Return what LoRA adapts with a target, by the resolver alone."""
    (resolution,) = Resolver(table(name)).resolve(Spec(adapt=[LoRA(rank=1, target=target)]))
    labels = {}
    for candidate in table(name).candidates:
        key = table(name).entries[int(str(candidate.key))][0].key
        parameter = f".{candidate.parameter}" if candidate.parameter else ""
        labels[key] = candidate.name + parameter
    return {labels[site.key] for site, _ in resolution.places}


@st.composite
def simple(draw: st.DrawFn, name: str) -> Selection:
    """Draw a selection that is one target."""
    selection = every(name, "lora")
    for field in draw(st.permutations(["role", "modules", "layers", "exclude"]))[: draw(st.integers(0, 3))]:
        words: Any = {"role": ROLES[name], "layers": LAYERS}.get(field, GLOBS[name])
        selection = getattr(selection, field)(
            *draw(st.lists(st.sampled_from(words), min_size=1, max_size=2, unique=True))
        )
    return selection


@st.composite
def models(draw: st.DrawFn, count: int) -> tuple[str, list[Selection]]:
    name = draw(st.sampled_from(NAMES))
    return name, [draw(simple(name)) for _ in range(count)]


@pytest.mark.full
@given(models(3))
@settings(deadline=None, max_examples=60)
def test_selections_are_sets(drawn: tuple[str, list[Selection]]) -> None:
    a, b, c = drawn[1]
    assert names(a | b) == names(a) | names(b)
    assert names(a & b) == names(a) & names(b)
    assert names(a - b) == names(a) - names(b)
    assert (a | b) - b == a - b and a - (a - b) == a & b and (a | b) & c == (a & c) | (b & c)
    assert hash(a | b) == hash(b | a) and len(a | b) + len(a & b) == len(a) + len(b)
    order = [place.name for place in a | b]
    assert order == [place.name for place in every(drawn[0], "lora") | a | b if place in a | b]


@pytest.mark.slow
@given(models(2), st.sampled_from(LAYERS), st.integers(0, 9))
@settings(deadline=None, max_examples=60)
def test_narrowing_keeps_what_each_part_keeps(drawn: tuple[str, list[Selection]], layer: int | str, pick: int) -> None:
    name, (a, b) = drawn
    glob = GLOBS[name][pick % len(GLOBS[name])]
    both = a | b
    ways: list[Callable[[Selection], Selection]] = [lambda s: s.layers(layer), lambda s: s.exclude(glob)]
    for narrowed in ways:
        assert narrowed(both) == narrowed(a) | narrowed(b)
        assert not names(narrowed(both)) - names(both)
    assert both.exclude(glob) == both - both.modules(glob)


@pytest.mark.full
@given(st.sampled_from(NAMES), st.data())
@settings(deadline=None, max_examples=60)
def test_the_order_of_calls_makes_no_difference(name: str, data: st.DataObject) -> None:
    calls: list[tuple[str, Any]] = [
        ("role", data.draw(st.sampled_from(ROLES[name]))),
        ("modules", data.draw(st.sampled_from(GLOBS[name]))),
        ("layers", data.draw(st.sampled_from(LAYERS))),
        ("exclude", data.draw(st.sampled_from(GLOBS[name]))),
    ]
    results = []
    for order in (calls, data.draw(st.permutations(calls))):
        selection = every(name)
        for field, value in order:
            selection = getattr(selection, field)(value)
        results.append(selection)
    assert results[0] == results[1]


@pytest.mark.full
@given(models(1))
@settings(deadline=None, max_examples=80)
def test_a_simple_selection_is_what_the_resolver_selects(drawn: tuple[str, list[Selection]]) -> None:
    name, (selection,) = drawn
    written = selection._written
    assert written is not None
    fields = {f: getattr(written, f) for f in written.model_fields_set}
    # A stated number means that layers without a role are intended, as they always are in a selection.
    target = Target(**{"modules": "**"} | fields if not written.has_selector else fields, expect=len(selection) or None)
    try:
        expected = resolved(name, target)
    except GraftError as error:
        with pytest.raises(GraftError) as caught:
            selection.to_target()
        assert caught.value.code == error.code
        return
    assert names(selection) == expected == resolved(name, selection.to_target())
    assert selection.to_target().expect == len(selection)


@pytest.mark.full
@given(models(3), st.sampled_from(["|-", "||", "-&", "&|", "--"]))
@settings(deadline=None, max_examples=80)
def test_targets_of_combined_selections_are_exact(drawn: tuple[str, list[Selection]], signs: str) -> None:
    name, parts = drawn
    selection = parts[0]
    for sign, part in zip(signs, parts[1:], strict=True):
        selection = selection | part if sign == "|" else selection & part if sign == "&" else selection - part
    try:
        target = selection.to_target("lora")
    except GraftError as error:
        faulty = bool(selection.notes())
        assert error.code in {"GC093", "GC014", "GC011", "GC015", "GC016", "GC017"}
        if error.code == "GC014":
            assert not selection or faulty
        elif error.code == "GC093":
            assert any(place.rows is not None for place in selection) or name == "mixtral", str(selection)
        else:
            assert faulty or any(place.blocked for place in selection)
        return
    assert resolved(name, target) == names(selection) and target.expect == len(selection) > 0


@pytest.mark.slow
@given(st.sets(st.integers(0, 15), min_size=1))
@settings(deadline=None, max_examples=60)
def test_any_whole_weights_are_a_target(chosen: set[int]) -> None:
    """Weights are selected by path and joined one by one."""
    paths = [place.module for place in every("llama")]
    selection = every("llama").modules("**") - every("llama")
    for index in sorted(chosen):
        selection = selection | every("llama").modules(paths[index])
    assert resolved("llama", selection.to_target()) == {paths[index] for index in chosen}


COMBINED = {
    "llama": lambda s: (s.role("attn.{q,v}") | s.role("ffn.down").layers(1)) - s.modules("**.0.**.q_proj"),
    "gpt2": lambda s: s.role("attn.{q,v}") - s.role("attn.{q,v}").layers(0),
    "t5": lambda s: (s.role("attn.q") - s.role("cross.attn.q")) | s.role("encoder.ffn.up").layers(-1),
}


@pytest.mark.full
@pytest.mark.parametrize("name", COMBINED)
@pytest.mark.parametrize("as_value", [True, False], ids=["selection", "target"])
def test_compiled_models_have_these_sites(name: str, as_value: bool) -> None:
    model = tiny(name)
    selection = COMBINED[name](graftc.select(model))
    target = selection if as_value else selection.to_target()
    compiled = graftc.compile({"adapt": [{"method": "lora", "rank": 2, "target": target}]}, model)
    places = compiled.compilation.main.resolved[0].places
    expected = {place.name for place in selection}
    assert {s.key.module + (f"[{s.key.part}]" if s.key.part else "") for s, _ in places} == expected
    assert isinstance(compiled.spec.adapt[0].target, Target) and len(expected) > 1
    assert graftc.compile(Spec(adapt=[LoRA(rank=2, target=target)]), model).spec.adapt == compiled.spec.adapt


@pytest.mark.slow
def test_a_selection_is_what_a_report_counts() -> None:
    selection = every("llama").role("attn.q", "attn.v").layers(0)
    report = graftc.check({"adapt": [{"method": "lora", "rank": 3, "target": selection}]}, tiny("llama"))
    assert report.adaptations[0].sites == len(selection) == 2
    assert selection.parameters == sum(place.parameters for place in selection) == 48 * 48 + 24 * 48


# What a place reports


def test_places_of_a_fused_weight() -> None:
    q, k, v = (next(iter(every("gpt2").role(f"attn.{n}").layers(1))) for n in "qkv")
    assert [place.rows for place in (q, k, v)] == [((0, 48),), ((48, 96),), ((96, 144),)]
    assert all(p.module == "transformer.h.1.attn.c_attn" and p.shape == (48, 48) for p in (q, k, v))
    assert q.parameters == 48 * 48 + 48 and "rows 0:48" in q.evidence and q.layer == 1
    (whole,) = every("gpt2").modules("transformer.h.1.attn.c_attn")
    assert whole.rows is None and whole.parameters == 3 * q.parameters and not whole.roles
    assert whole.module in every("gpt2").modules("**.c_attn") and whole in every("gpt2")


@pytest.mark.slow
def test_places_have_what_graftc_roles_finds() -> None:
    for name in NAMES:
        structure = graftc.roles(tiny(name))
        evidence = {(f.module, f.role): f.evidence for f in structure.findings}
        for place in graftc.select(structure).role(*{f.role for f in structure.findings}):
            for role in place.roles[:1]:
                assert place.evidence == evidence.get((place.module, role), place.evidence)
                assert place.evidence


@pytest.mark.slow
def test_kinds() -> None:
    """A role implies its kind, a path alone means weights, and a method declares which kinds it takes."""
    kinds = {str(place.kind) for place in every("mixtral")}
    assert kinds == {"linear", "embedding", "experts"}
    assert {str(place.kind) for place in every("llama").role("norm", "attn", "layer.in")} == {
        "norm",
        "attention",
        "value",
    }
    assert {str(place.kind) for place in every("llama", "norms")} == {"norm"}
    assert not every("llama").modules("model.norm") and every("llama", "norms").modules("model.norm")
    with pytest.raises(GraftError, match=r"GC016.*norm.*lora takes"):
        every("llama").role("norm").to_target("lora")
    with pytest.raises(GraftError, match="GC016"):
        graftc.Spec.model_validate({"adapt": [{"method": "lora", "rank": 1, "target": every("llama").role("norm")}]})


def test_a_blocked_place_is_shown_and_refused() -> None:
    shared = every("t5").modules("shared")
    (place,) = shared
    assert place.blocked and place.blocked[:30] in str(shared) and place.blocked[:25] in shared._repr_html_()
    with pytest.raises(GraftError, match="GC017"):
        shared.to_target()


# Errors


def test_nothing_is_a_selection_too() -> None:
    selection = every("llama").modules("**.q_prj")
    assert len(selection) == 0 and not selection and not list(selection)
    assert "did you mean '**.q_proj'" in str(selection) and "did you mean" in selection._repr_html_()
    assert len(selection | every("llama").role("attn.q")) == 2
    with pytest.raises(GraftError, match="GC011"):
        selection.to_target()
    with pytest.raises(GraftError, match="GC011"):
        (selection | every("llama").role("attn.q")).to_target()
    with pytest.raises(GraftError, match="GC014"):
        (every("llama").role("attn.q") & every("llama").role("attn.k")).to_target()
    with pytest.raises(GraftError, match=r"GC014[\s\S]*adapt\[0\]\.target"):
        target = every("llama").role("attn.q") & every("llama").role("attn.k")
        Spec.model_validate({"adapt": [{"method": "lora", "rank": 1, "target": target}]})


def test_expect() -> None:
    selection = every("llama").role("attn.{q,v}").layers(0)
    assert selection.expect(2) is selection and selection.expect(2).to_target().expect == 2
    for wrong in (selection, selection | selection):
        with pytest.raises(GraftError) as caught:
            wrong.expect(3)
        assert caught.value.code == "GC013" and "2 sites, expected 3" in caught.value.message
    with pytest.raises(GraftError) as caught:
        every("llama").role("attn.{q,v}").expect(5)
    assert [str(d) for d in caught.value.details] == [
        "role 'attn.q' of 'attn.{q,v}': 2 sites",
        "role 'attn.v' of 'attn.{q,v}': 2 sites",
    ]
    with pytest.raises(GraftError) as caught:
        every("llama").modules("**.q_prj").expect(2)
    assert "matches none" in str(caught.value.details[0])
    for value in (None, "2", True, -1, 2.0):
        with pytest.raises(GraftError, match="GC073"):
            selection.expect(value)  # type: ignore[arg-type]


BAD: dict[str, Any] = {
    "GC012": lambda s: s.role("attn.zz"),
    "GC002 no role": lambda s: s.role(5),
    "GC002 none": lambda s: s.role(),
    "GC002 empty list": lambda s: s.layers([]),
    "GC002 layers": lambda s: s.layers("first"),
    "GC002 regex": lambda s: s.regex("("),
    "GC002 glob": lambda s: s.modules("{a"),
    "GC009": lambda s: s.modules("a" * 2000),
    "GC008": lambda s: s.regex("(?:(.)|(.)|(.)|(.))*[XYZ]"),
    "GC004": lambda s: s.to_target("lorra"),
    "GC004 of another kind": lambda s: s.to_target(["lora"]),
    "GC073": lambda s: s | every("gpt2"),
}


@pytest.mark.slow
@pytest.mark.parametrize("how", BAD)
def test_bad_arguments(how: str) -> None:
    with pytest.raises(GraftError) as caught:
        BAD[how](every("llama"))
    assert caught.value.code == how[:5] and caught.value.hint


def test_what_is_no_model() -> None:
    for value in (None, 5, "model", find_structure(table("llama").program.graph)):
        with pytest.raises(GraftError) as caught:
            graftc.select(value)  # type: ignore[arg-type]
        assert caught.value.code == "GC073"
    with pytest.raises(TypeError):
        every("llama") | {"a"}


def test_layers_without_a_role_are_noted() -> None:
    """A target would be refused for them, but a selection with a count says that they are intended."""
    candidates = tuple(encoder(depth=4, no_values=(1, 2)))
    places = {
        c.key: SelectedPlace(c.name, c.module, tuple(c.roles), c.kind, c.layer, c.stack, (), None, (), 0, 1, "")
        for c in candidates
    }
    selection = Selection(Selectable("Toy", candidates, places)).role("attn.v")
    assert "'attn.v' matched 2 of 4 layers; these 2 have none: 1, 2" in str(selection)
    with pytest.raises(GraftError) as caught:
        selection.expect(4)
    assert any("these 2 have none" in str(detail) for detail in caught.value.details)
    target = selection.to_target()
    assert {c.key for c in select(target, candidates)} == {c.key for c in candidates if "attn.v" in c.roles}
    with pytest.raises(GraftError, match="GC015"):
        select(target.model_copy(update={"expect": None}), candidates)


def test_rows_of_several_weights_that_no_target_means() -> None:
    selection = every("gpt2").role("attn.q").layers(0) | every("gpt2").role("attn.k").layers(1)
    with pytest.raises(GraftError) as caught:
        selection.to_target()
    assert caught.value.code == "GC093" and "c_attn" in str(caught.value)
    parts = [selection.role("attn.q"), selection.role("attn.k")]
    assert [resolved("gpt2", part.to_target()) for part in parts] == [names(part) for part in parts]


def test_rows_and_the_whole_weight_are_two_places() -> None:
    selection = every("gpt2").role("attn.q") - every("gpt2").layers(0)
    assert len(selection) == 2 and "two places" in str(selection)
    assert not (every("gpt2").role("attn.q") - every("gpt2").role("attn.q").layers(0)).to_json()["remarks"]


# Values


def test_selections_do_not_change_and_can_be_kept() -> None:
    selection = every("llama").role("attn.q")
    before = str(selection), selection.to_json()
    selection.layers(0), selection.exclude("**.0.**"), selection | every("llama")
    assert (str(selection), selection.to_json()) == before
    for other in (pickle.loads(pickle.dumps(selection)), copy.deepcopy(selection)):
        assert other == selection and str(other) == str(selection) and other.layers(0) == selection.layers(0)
    assert json.loads(json.dumps(selection.to_json())) == selection.to_json()
    assert selection.to_json()["count"] == 2 and selection.to_json()["places"][0]["roles"] == ["attn.q"]
    assert (
        selection != every("gpt2").role("attn.q")
        and selection != 5
        and len({selection, every("llama").role("attn.q")}) == 1
    )


def test_one_capture_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return captured(*args, **kwargs)

    monkeypatch.setattr(graftc.runtime.api, "captured", counted)
    structure = graftc.roles(tiny("llama"))
    base = graftc.select(structure)
    target = (base.role("attn.q") | graftc.select(structure, method="lora").layers(1)).to_target()
    assert len(calls) == 1 and target.expect == 8


@pytest.mark.full
def test_models_of_every_form() -> None:
    """A model, its roles, its compiled model and one on the meta device have the same places."""
    model = tiny("llama")
    compiled = graftc.compile({"adapt": [{"method": "lora", "rank": 2, "target": {"role": "attn.q"}}]}, model)
    with torch.device("meta"):
        meta = type(model)(model.config)
    selections = [graftc.select(m) for m in (model, graftc.roles(model), compiled, meta)]
    assert all(other == selections[0] and other.to_json() == selections[0].to_json() for other in selections)


@pytest.mark.full
def test_prefixes_and_virtual_tokens_do_not_change_the_base_of_a_compiled_model() -> None:
    spec = {"adapt": [{"method": "prompt", "length": 3}, {"method": "prefix", "length": 2}]}
    model = tiny("llama")
    assert graftc.select(graftc.compile(spec, model)).to_json() == graftc.select(model).to_json()


class Odd(nn.Module):
    """Layers whose names no glob can express."""

    def __init__(self, odd: list[str]) -> None:
        super().__init__()
        for name in odd:
            self.add_module(name, nn.Linear(6, 6))
        self.odd = odd

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply all of them, one after the other."""
        for name in self.odd:
            x = torch.relu(self.get_submodule(name)(x))
        return x


@pytest.mark.slow
def test_names_with_what_globs_give_a_meaning() -> None:
    odd = ["a*", "ab", "{x,y}", "x", "(c)|d", "sp ace"]
    model = Odd(odd)
    inputs = (torch.ones(4, 6),)
    base = graftc.select(model, inputs)
    assert [place.module for place in base] == odd
    for kept in (["a*", "x"], ["{x,y}", "(c)|d"], ["sp ace", "ab"]):
        selection = base - base
        for place in base:
            if place.module in kept:
                selection = selection | base.regex("".join(f"[{c}]" if c not in "^\\" else c for c in place.module))
        spec = {"adapt": [{"method": "lora", "rank": 2, "target": selection}]}
        report = graftc.check(spec, model, inputs)
        assert names(selection) == set(kept) and report.adaptations[0].sites == 2


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """Suppress the warning that tied heads will not fold."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
