"""From targets to sites, on candidates of toy models: nothing is ever silently left unadapted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graftc.compiler.resolve.select import check_overrides, select
from graftc.specs import LoRA, SiteKind, Target, widen
from graftc.specs.errors.diagnostics import GraftError
from graftc.specs.target import Candidate, depths
from tests.kit.refusals import refused

LINEAR = frozenset({SiteKind.LINEAR})
PROJECTIONS = {"q": "self.query", "k": "self.key", "v": "self.value", "o": "output.dense"}


def site(
    module: str, role: str | None, layer: int | None = None, stack: str = "", part: str = "", kind: str = "linear"
) -> Candidate:
    roles = widen(role) if role else frozenset()
    return Candidate((module, role, part), module, roles, SiteKind(kind), layer, stack, part=bool(part))


def encoder(depth: int = 4, no_values: Sequence[int] = (), name: str = "bert.encoder") -> list[Candidate]:
    """A BERT-like stack with a classifier; some layers may lack a value projection."""
    out: list[Candidate] = []
    for i in range(depth):
        layer = f"{name}.layer.{i}"
        for short, leaf in PROJECTIONS.items():
            if short != "v" or i not in no_values:
                out.append(site(f"{layer}.attention.{leaf}", f"attn.{short}", i))
        out.append(site(f"{layer}.attention.self", "attn", i, kind="attention"))
        out += [site(f"{layer}.intermediate.dense", "ffn.up", i), site(f"{layer}.output.dense", "ffn.down", i)]
    return [*out, site("classifier", "head")]


def translator(encoders: int = 3, decoders: int = 2) -> list[Candidate]:
    """A T5-like pair of stacks; the decoder has cross-attention."""
    out = [site(f"encoder.{i}.{n}", f"encoder.attn.{n}", i, "encoder") for i in range(encoders) for n in "qkv"]
    for i in range(decoders):
        out += [site(f"decoder.{i}.self.{n}", f"decoder.attn.{n}", i, "decoder") for n in "qkv"]
        out += [site(f"decoder.{i}.cross.{n}", f"decoder.cross.attn.{n}", i, "decoder") for n in "qkv"]
    return out


def fused(depth: int = 2) -> list[Candidate]:
    """A GPT-2-like stack: one matrix for q, k and v."""
    out: list[Candidate] = []
    for i in range(depth):
        out.append(site(f"h.{i}.c_attn", None, i))
        out += [site(f"h.{i}.c_attn", f"attn.{n}", i, part=n) for n in "qkv"]
    return out


def mixture(depth: int = 3) -> list[Candidate]:
    """A dense first layer, then experts, as in DeepSeek."""
    out = [site("layers.0.mlp.up", "ffn.up", 0)]
    out += [site(f"layers.{i}.mlp.experts", "experts", i, kind="experts") for i in range(1, depth)]
    return out + [site(f"layers.{i}.attn.q", "attn.q", i) for i in range(depth)]


def names(candidates: Sequence[Candidate]) -> list[str]:
    return [c.module for c in candidates]


def misselected(candidates: Sequence[Candidate], *, kinds: Any = LINEAR, **target: Any) -> GraftError:
    error = refused(select, Target(**target), candidates, "t", kinds=kinds, method="lora")
    assert error.place is not None and error.place.path.startswith("t")
    return error


# What is selected


@pytest.mark.parametrize(
    ("target", "count"),
    [
        ({"role": "attn.q"}, 4),
        ({"role": ["attn.q", "attn.v"]}, 8),
        ({"role": "{attn.{q,v},head}"}, 9),
        ({"role": "attn.q", "layers": "0:2"}, 2),
        ({"role": "attn.q", "layers": [0, -1]}, 2),
        ({"role": "attn.q", "layers": -1}, 1),
        ({"role": "attn.q", "layers": "2"}, 1),
        ({"role": "attn.q", "layers": "1:99"}, 3),
        ({"modules": "**.{query,value}"}, 8),
        ({"modules": "**.dense"}, 12),
        ({"modules": "**.dense", "role": ["attn.o", "ffn.up"]}, 8),
        ({"regex": r".*\.(query|key)"}, 8),
        ({"regex": [r".*query", r"classifier"], "expect": 5}, 5),
        ({"role": "attn.q", "exclude": "**.layer.{0,3}.**"}, 2),
        ({"role": "attn.q", "layers": "1:", "exclude": "**.layer.{0,3}.**"}, 2),
        ({"role": "attn.q", "expect": 4}, 4),
    ],
)
def test_counts(target: dict[str, Any], count: int) -> None:
    assert len(select(Target(**target), encoder(), kinds=LINEAR)) == count


def test_the_order_is_the_candidates_order_whatever_the_target_says() -> None:
    selected = select(Target(role=["attn.v", "attn.q"], layers=[1, 0]), encoder(2))
    assert names(selected) == [f"bert.encoder.layer.{i}.attention.self.{n}" for i in (0, 1) for n in ("query", "value")]


def test_layers_apply_to_both_stacks_unless_the_role_says_one() -> None:
    both = select(Target(role="attn.q", layers=-1), translator())
    assert names(both) == ["encoder.2.q", "decoder.1.self.q", "decoder.1.cross.q"]
    assert names(select(Target(role="decoder.attn.q", layers=0), translator())) == [
        "decoder.0.self.q",
        "decoder.0.cross.q",
    ]
    assert names(select(Target(role="decoder.cross.attn.k"), translator())) == [
        "decoder.0.cross.k",
        "decoder.1.cross.k",
    ]
    assert names(select(Target(role="encoder.attn.q", layers="1:"), translator())) == ["encoder.1.q", "encoder.2.q"]


def test_a_layer_of_the_deeper_stack_only_is_a_match() -> None:
    assert names(select(Target(role="attn.q", layers=2), translator())) == ["encoder.2.q"]


def test_modules_mean_whole_weights_and_roles_mean_their_rows() -> None:
    assert [c.part for c in select(Target(modules="**.c_attn"), fused())] == [False, False]
    assert [c.key[2] for c in select(Target(role="attn.{q,v}"), fused())] == ["q", "v", "q", "v"]  # type: ignore[index]
    rows = select(Target(role="attn.k", modules="h.0.*"), fused())
    assert [c.key for c in rows] == [("h.0.c_attn", "attn.k", "k")]


def test_rows_alone_need_a_role() -> None:
    rows_and_other = [*fused(), site("fc", None)]
    only_rows = [c for c in rows_and_other if c.part or c.module == "fc"]
    assert len(select(Target(modules="**.c_attn"), only_rows)) == 6
    parts = [*only_rows, Candidate("whole", "h.0.c_attn", frozenset(), SiteKind.VALUE, 0)]
    error = misselected(parts, modules="h.0.c_attn")
    assert error.code == "GC011" and error.hint == "name the role as well, for example role: attn.q"


def test_without_kinds_every_kind_is_selected() -> None:
    assert [c.kind for c in select(Target(role="attn"), encoder(2))] == [SiteKind.ATTENTION] * 2
    assert select(Target(), encoder()) == encoder()


def test_experts_stand_in_for_a_feed_forward_where_both_are_named() -> None:
    kinds = {SiteKind.LINEAR, SiteKind.EXPERTS}
    assert len(select(Target(role=["ffn.up", "experts"]), mixture(), kinds=kinds)) == 3
    error = misselected(mixture(), kinds=kinds, role="ffn.up")
    assert error.code == "GC015" and "'ffn.up' matched 1 of 3 layers; these 2 have none: 1, 2" in error.message
    assert len(select(Target(role="experts"), mixture(), kinds=kinds)) == 2


# What is refused


@pytest.mark.parametrize(
    ("target", "code", "path", "message"),
    [
        (
            {"modules": "**.querry"},
            "GC011",
            "t.modules",
            "modules '**.querry' matches none of the 25 sites that lora can take",
        ),
        ({"modules": ["**.query", "**.x"]}, "GC011", "t.modules[1]", "modules '**.x' matches none of the 25 sites"),
        ({"modules": "**.{query,x}"}, "GC011", "t.modules", "modules '**.x' of '**.{query,x}' matches none"),
        ({"regex": [".*", "query"]}, "GC011", "t.regex[1]", "regex 'query' matches none of the 25 sites"),
        ({"role": "attn.q", "layers": 4}, "GC011", "t.layers", "layers entry 4 matches none of the layers 0 to 3"),
        ({"role": "attn.q", "layers": [0, "4:"]}, "GC011", "t.layers[1]", "layers entry '4:' matches none"),
        ({"role": "attn.q", "layers": [0, -5]}, "GC011", "t.layers[1]", "layers entry -5 matches none"),
        ({"role": "head", "layers": 0}, "GC011", "t.layers", "the target selects 1 site, none of them in a layer"),
        (
            {"role": ["attn.q", "head"], "layers": 0},
            "GC011",
            "t.role[1]",
            "role 'head' matches 1 site, but layers: 0 leaves",
        ),
        (
            {"role": "attn.q", "exclude": "**.layer.9.**"},
            "GC011",
            "t.exclude",
            "exclude '**.layer.9.**' matches none of the 4",
        ),
        (
            {"role": "attn.q", "exclude": ["**.layer.{0,9}.**"]},
            "GC011",
            "t.exclude[0]",
            "'**.layer.9.**' of '**.layer.{0,9}.**'",
        ),
        (
            {"role": "attn.q", "exclude": "**.key"},
            "GC011",
            "t.exclude",
            "exclude '**.key' matches none of the 4 sites selected",
        ),
        (
            {"role": ["attn.q", "attn.k"], "exclude": "**.key"},
            "GC011",
            "t.role[1]",
            "but exclude: '**.key' leaves none of them",
        ),
        (
            {"role": "attn.q", "modules": "**.key"},
            "GC011",
            "t.role",
            "role 'attn.q' matches 4 sites, but none that modules",
        ),
        (
            {"role": "attn.{q,k}", "modules": "**.query"},
            "GC011",
            "t.role",
            "role 'attn.k' of 'attn.{q,k}' matches 4 sites",
        ),
        ({"role": "attn.q", "exclude": "**"}, "GC014", "t", "the target selects no site: 4 matched, 0 not excluded"),
        (
            {"role": "attn.q", "layers": 1, "exclude": "**.layer.1.**"},
            "GC014",
            "t",
            "4 matched, 1 in the layers, 0 not",
        ),
        ({"role": "attn.q", "expect": 5}, "GC013", "t.expect", "the target selects 4 sites, expected 5"),
        ({"role": "ffn.gate"}, "GC015", "t.role", "role 'ffn.gate' is not in this model"),
        ({"role": ["attn.q", "{head,embed}"]}, "GC015", "t.role[1]", "role 'embed' is not in this model"),
        ({"role": "decoder.attn.q"}, "GC015", "t.role", "role 'decoder.attn.q' is not in this model"),
        ({"role": "attn"}, "GC016", "t.role", "role 'attn' matches 4 sites (4 attention), but lora takes linear sites"),
        (
            {"modules": "**.self"},
            "GC016",
            "t.modules",
            "modules '**.self' matches 4 sites (4 attention), but lora takes",
        ),
    ],
)
def test_refusals(target: dict[str, Any], code: str, path: str, message: str) -> None:
    error = misselected(encoder(), **target)
    assert error.code == code and message in error.message
    assert error.place is not None and error.place.path == path


def test_a_role_that_some_layers_lack_is_refused_with_counts() -> None:
    error = misselected(encoder(30, no_values=(3, 9, 15, 21, 27)), role="attn.v")
    assert error.code == "GC015"
    assert error.message == "'attn.v' matched 25 of 30 layers; these 5 have none: 3, 9, 15, 21, 27"
    assert error.hint == (
        'if that is intended, set layers: ["0:3", "4:9", "10:15", "16:21", "22:27", "28:30"], or expect: 25'
    )


@pytest.mark.parametrize("more", [{"layers": [0, "2:4", 5]}, {"expect": 4}, {"modules": "**.value"}, {"layers": "2:4"}])
def test_a_role_that_some_layers_lack_passes_where_that_is_said(more: dict[str, Any]) -> None:
    selected = select(Target(role="attn.v", **more), encoder(6, no_values=(1, 4)))
    assert len(selected) == (2 if more == {"layers": "2:4"} else 4)


def test_layers_of_another_kind_lack_no_attention() -> None:
    """A fully understood layer without attention lacks none; one with something unresolved may have one."""
    hybrid = [*encoder(2), site("bert.encoder.layer.2.mixer", "mixer", 2)]
    target = Target(role="attn.q")
    assert [c.layer for c in select(target, hybrid, kinds=LINEAR)] == [0, 1]

    def unresolved(spot: tuple[str, int] | None) -> list[str]:
        return ["bert.encoder.layer.2.odd: several linear maps meet"] if spot in (None, ("", 2)) else []

    with pytest.raises(GraftError) as caught:
        select(target, hybrid, kinds=LINEAR, missing=unresolved)
    assert "matched 2 of 3 layers; this one has none: 2" in caught.value.message
    assert caught.value.details == ("bert.encoder.layer.2.odd: several linear maps meet",)


def test_missing_layers_are_told_by_stack() -> None:
    candidates = [
        c for c in translator(3, 3) if c.module not in ("encoder.1.v", "decoder.2.self.v", "decoder.2.cross.v")
    ]
    error = misselected(candidates, role="attn.v")
    assert error.message == "'attn.v' matched 4 of 6 layers; these 2 have none: decoder.2, encoder.1"
    assert error.hint == "if that is intended, set expect: 6"


def test_cross_attention_belongs_where_cross_attention_is() -> None:
    """A decoder may have cross-attention in some layers only; it must be complete in those."""
    candidates = [c for c in translator(1, 4) if not (c.module.startswith("decoder.1.cross"))]
    assert len(select(Target(role="cross.attn.k"), candidates)) == 3
    candidates = [c for c in candidates if c.module != "decoder.2.cross.k"]
    assert (
        "'cross.attn.k' matched 2 of 3 layers; this one has none: 2"
        in misselected(candidates, role="cross.attn.k").message
    )


def test_an_unmet_count_tells_where_it_falls_short() -> None:
    error = misselected(encoder(6, no_values=(1, 4)), role=["attn.q", "attn.v"], expect=12)
    assert error.message == "the target selects 10 sites, expected 12"
    assert error.details == (
        "role 'attn.q': 6 sites",
        "role 'attn.v': 4 sites",
        "'attn.v' matched 4 of 6 layers; these 2 have none: 1, 4",
    )


def test_an_unmatched_branch_comes_with_the_counts_of_the_others() -> None:
    error = misselected(encoder(), modules="**.{query,valu}")
    assert error.details == ("modules '**.query' of '**.{query,valu}': 4 sites",)
    assert error.hint is not None and error.hint.startswith("did you mean '**.value'")
    assert error.fix == ("valu", "value")


def test_a_kind_that_the_method_cannot_take_comes_with_what_it_could() -> None:
    assert misselected(encoder(), role="attn").hint == "it can take: attn.k, attn.o, attn.q, attn.v"
    error = misselected(encoder(), modules="bert.encoder.layer.0.attention.self")
    assert error.hint == "'bert.encoder.layer.0.attention.self.**' matches 3 sites"


# For all targets

roles = st.lists(
    st.sampled_from(["attn.q", "attn.k", "attn.v", "attn.o", "ffn.up", "head", "embed", "attn"]), min_size=1
)
globs = st.lists(st.sampled_from(["**", "**.query", "**.dense", "*.encoder.**", "**.layer.1.**", "**.x"]), min_size=1)
layers = st.lists(st.one_of(st.integers(-6, 6), st.sampled_from(["0:2", "1:", ":-1", "5:"])), min_size=1)


@pytest.mark.slow
@given(st.none() | roles, st.none() | globs, st.none() | layers, st.none() | globs, st.none() | st.integers(1, 9))
def test_what_is_selected_meets_every_condition_and_every_item_has_a_site(
    role: Any, modules: Any, layer: Any, exclude: Any, expect: Any
) -> None:
    candidates = encoder()
    target = Target(role=role, modules=modules, layers=layer, exclude=exclude, expect=expect)
    try:
        selected = select(target, candidates, kinds=LINEAR)
    except GraftError as error:
        assert error.code in {"GC011", "GC013", "GC014", "GC015", "GC016"}
        return
    assert selected and expect in (None, len(selected))
    kept = {c.key for c in selected}
    assert [c for c in candidates if c.key in kept] == selected
    for item in role or ():
        assert any(item in c.roles for c in selected)
        assert all(c.roles & set(role) for c in selected)
    for field, several in (("modules", modules), ("layers", layer)):
        for item in several or ():
            alone = (
                select(Target(role=role, modules="**", layers=None), candidates, kinds=LINEAR) if role else candidates
            )
            hits = {c.key for c in select(Target(**{field: item, "expect": None}), alone, kinds=LINEAR)}
            assert hits & kept
    for item in exclude or ():
        assert not {c.key for c in select(Target(modules=item), candidates)} & kept


# Overrides


def lora(*overrides: dict[str, Any]) -> LoRA:
    return LoRA.model_validate({"target": {"role": "attn.{q,v}"}, "overrides": list(overrides)})


def test_overrides_give_each_site_its_spec() -> None:
    candidates = encoder()
    spec = lora({"modules": "**.layer.0.**", "rank": 4}, {"role": "attn.v", "layers": -1, "rank": 2})
    selected = select(spec.target, candidates)
    check_overrides(spec, selected, "adapt[0]", depth=depths(candidates))
    ranks = [spec.for_site(c.module, c.roles, c.layer, depth=4).rank for c in selected]
    assert ranks == [4, 4, 8, 8, 8, 8, 8, 2]


def test_negative_layers_of_overrides_count_from_the_end_of_the_model() -> None:
    candidates = encoder()
    spec = lora({"layers": -1, "rank": 4})
    selected = select(Target(role="attn.q", layers="0:2"), candidates)
    with pytest.raises(GraftError) as caught:
        check_overrides(spec, selected, "adapt[0]", depth=depths(candidates))
    assert caught.value.code == "GC011"
    assert caught.value.place is not None and caught.value.place.path == "adapt[0].overrides[0].layers"
    check_overrides(spec, selected, "adapt[0]")


def test_a_spec_without_overrides_passes() -> None:
    check_overrides(lora(), encoder(), "adapt[0]")


def test_depths_are_by_stack() -> None:
    assert depths(translator(3, 2)) == {"encoder": 3, "decoder": 2}
    assert depths([site("a", None)]) == {}
