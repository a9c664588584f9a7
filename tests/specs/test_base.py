"""Behaviour that every method inherits: strictness, names, default placement, overrides."""

from __future__ import annotations

import keyword
from typing import Any, ClassVar, Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from graftc.specs.base import OWNERS, RESERVED_NAMES, Items, MethodSpec, check_name
from graftc.specs.claims import Claims, FoldKind, SiteKind
from graftc.specs.errors.diagnostics import GraftError
from graftc.specs.methods.lora import LoRA, LoRAOverride
from graftc.specs.overrides import Override, check_used
from graftc.specs.registry import method_specs
from graftc.specs.target import Target
from tests.kit.refusals import refused


class Bottleneck(MethodSpec):
    """A method with a placement of its own."""

    claims: ClassVar[Claims] = Claims(frozenset({SiteKind.SUBLAYER}), identity_at_init=False, folds=FoldKind.NONE)

    method: Literal["test_bottleneck"] = "test_bottleneck"
    target: Target = Target(role=["attn.sublayer", "ffn.sublayer"], exclude="**.pooler")
    width: int = Field(default=8, ge=1)


class Narrow(Override):
    rank: int | None = Field(default=None, ge=1)


class Bounded(MethodSpec):
    """A method whose fields depend on each other."""

    claims: ClassVar[Claims] = Claims(frozenset({SiteKind.LINEAR}), identity_at_init=True, folds=FoldKind.EXACT)

    method: Literal["test_bounded"] = "test_bounded"
    rank: int = 8
    overrides: Items[Narrow] = ()


# Strictness


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rank": "8"}, "rank must be an integer, not '8'"),
        ({"rank": True}, "rank must be an integer, not true"),
        ({"rank": 8.0}, "rank must be an integer, not 8.0"),
        ({"rank": None}, "rank must be an integer, not null"),
        ({"alpha": True}, "alpha must be a number, not true"),
        ({"alpha": float("nan")}, "alpha must be a finite number, not nan"),
        ({"alpha": float("inf")}, "alpha must be a finite number, not inf"),
        ({"rslora": 1}, "rslora must be true or false, not 1"),
        ({"overrides": {"rank": 3}}, "overrides must be a list, not a mapping"),
        ({"overrides": "abc"}, "overrides must be a list, not 'abc'"),
        ({"overrides": [3]}, "overrides[0] must be a mapping, not 3"),
        ({"target": 3}, "target must be a mapping, not 3"),
    ],
)
def test_loose_types_are_errors(fields: dict[str, Any], message: str) -> None:
    error = refused(LoRA, **{"target": {"role": "attn.q"}, **fields})
    assert (error.code, error.message) == ("GC002", message)


def test_a_whole_number_is_a_number() -> None:
    assert LoRA(target=Target(role="attn.q"), alpha=32).alpha == 32.0


def test_lists_become_tuples_so_that_specs_hash() -> None:
    spec = LoRA(target=Target(role=["attn.q"]), overrides=[LoRAOverride(layers=0, rank=2)])
    assert isinstance(spec.overrides, tuple)
    assert hash(spec) == hash(LoRA.model_validate(spec.model_dump()))


def test_errors_of_nested_values_keep_their_path() -> None:
    fields = {"target": {"role": "attn.q"}, "overrides": [{"layers": 0, "rank": 1}, {"layers": 1, "rnk": 0}]}
    error = refused(LoRA, **fields)
    assert error.code == "GC003" and error.place is not None
    assert error.place.path == "overrides[1].rnk"
    assert error.fix == ("rnk", "rank")


# Names


@pytest.mark.parametrize("name", ["a", "_x", "attention_2", "B"])
def test_usable_names(name: str) -> None:
    assert LoRA(name=name, target=Target(role="attn.q")).name == name


@pytest.mark.parametrize(
    ("name", "better"),
    [("my-lora", "my_lora"), ("a b", "a_b"), ("train", "train_1"), ("class", "class_1"), ("_modules", "_modules_1")]
    + [(owner, f"{owner}_1") for owner in OWNERS.values()],
)
def test_unusable_names_get_a_proposal(name: str, better: str) -> None:
    error = refused(LoRA, name=name, target={"role": "attn.q"})
    assert error.code == "GC002" and error.fix == (name, better)
    assert error.place is not None and error.place.path == "name"
    assert check_name(better) is None


@pytest.mark.parametrize("name", ["", "1a", "é", "a.b", "__call__", "9"])
def test_names_that_no_module_may_have(name: str) -> None:
    assert check_name(name) is not None


@given(st.text(max_size=12))
def test_accepted_names_can_hold_a_child_module(name: str) -> None:
    if check_name(name) is not None:
        return
    parent = torch.nn.Module()
    parent.add_module(name, torch.nn.Identity())
    assert isinstance(getattr(parent, name), torch.nn.Identity)
    assert name.isidentifier() and not keyword.iskeyword(name)


def test_no_attribute_of_a_module_is_a_free_name() -> None:
    module = torch.nn.Module()
    taken = {n for n in {*dir(module), *vars(module)} if check_name(n) is None}
    assert taken == set()
    assert "forward" in RESERVED_NAMES


# Targets


def test_a_method_without_placement_needs_a_target() -> None:
    assert refused(LoRA).message == "target is missing"
    error = refused(LoRA, target={"layers": 0})
    assert error.message == "a target needs role, modules or regex"
    assert error.place is not None and error.place.path == "target"


def test_a_target_narrows_the_default_placement() -> None:
    for target in ({"layers": "0:2"}, Target(layers="0:2")):
        assert Bottleneck(target=target).target == Target(  # type: ignore[arg-type]
            role=["attn.sublayer", "ffn.sublayer"], exclude="**.pooler", layers="0:2"
        )


def test_a_target_with_selectors_replaces_the_default_placement() -> None:
    assert Bottleneck(target=Target(role="ffn.sublayer")).target == Target(role="ffn.sublayer")
    assert Bottleneck().target.role == ("attn.sublayer", "ffn.sublayer")


@pytest.mark.parametrize(("word", "fix"), [("attn.q", "{role: attn.q}"), ("encoder.x", "{modules: encoder.x}")])
def test_a_word_for_a_target_gets_a_proposal(word: str, fix: str) -> None:
    assert refused(LoRA, target=word).fix == (word, fix)


# Overrides


def lora(*overrides: dict[str, Any]) -> LoRA:
    return LoRA.model_validate({"target": {"role": "attn.q"}, "alpha": 4.0, "overrides": list(overrides)})


def test_the_first_override_that_matches_holds() -> None:
    spec = lora({"modules": "**.0.q", "rank": 2}, {"layers": "0:2", "rank": 3, "dropout": 0.5})
    first = spec.for_site("m.0.q", {"attn.q"}, 0)
    second = spec.for_site("m.1.q", {"attn.q"}, 1, depth=4)
    assert (first.rank, first.dropout, first.alpha) == (2, 0.0, 4.0)
    assert (second.rank, second.dropout, second.alpha) == (3, 0.5, 4.0)
    assert spec.for_site("m.2.q", {"attn.q"}, 2, depth=4) is spec
    assert isinstance(first, LoRA) and first.scaling == 2.0


def test_override_fields_narrow_each_other() -> None:
    spec = lora({"role": "attn.{q,v}", "layers": -1, "modules": ["**.q", "**.v"], "rank": 1})
    assert spec.for_site("m.3.q", {"attn.q"}, 3, depth=4).rank == 1
    assert spec.for_site("m.3.k", {"attn.q"}, 3, depth=4).rank == 8
    assert spec.for_site("m.3.q", {"attn.k"}, 3, depth=4).rank == 8
    assert spec.for_site("m.2.q", {"attn.q"}, 2, depth=4).rank == 8
    assert spec.for_site("m.q", {"attn.q"}, None).rank == 8


def test_an_override_must_say_where_and_what() -> None:
    assert refused(LoRAOverride, rank=3).message == "an override needs role, modules or layers"
    error = refused(LoRAOverride, layers=0)
    assert error.message == "an override changes nothing" and error.hint == "it may set: rank, alpha, dropout, init"
    assert refused(LoRAOverride, layers=0, rank=0).message == "rank must be at least 1, not 0"


def test_a_method_without_overrides_is_the_same_everywhere() -> None:
    spec = Bottleneck()
    assert spec.override_list() == () and spec.for_site("a", {"attn.sublayer"}, 0) is spec
    assert refused(Bottleneck, overrides=[]).code == "GC003"


def test_values_that_do_not_fit_together_are_found_where_they_meet() -> None:
    class Even(Bounded):
        @classmethod
        def model_validate(cls, obj: Any, **kwargs: Any) -> Even:
            if obj["rank"] % 2:
                raise GraftError("GC002", "rank must be even")
            return super().model_validate(obj, **kwargs)

    spec = Even(target=Target(role="attn.q"), overrides=[Narrow(layers=0, rank=3)])
    with pytest.raises(GraftError, match="rank must be even"):
        spec.for_site("m", {"attn.q"}, 0)


class Place:
    def __init__(self, module: str, role: str, layer: int | None) -> None:
        self.module, self.roles, self.layer, self.stack = module, {role}, layer, ""
        self.parameter = ""


SITES = [Place(f"m.{i}.{name}", f"attn.{name}", i) for i in range(4) for name in ("q", "v")]


@pytest.mark.parametrize(
    ("overrides", "path", "message"),
    [
        ([{"layers": 9, "rank": 1}], "o[0].layers", "matches none of the 8 sites selected: layers '9'"),
        ([{"layers": [0, "7:"], "rank": 1}], "o[0].layers[1]", "matches none of the 8 sites selected: layers '7:'"),
        ([{"role": "attn.{q,o}", "rank": 1}], "o[0].role", "role 'attn.o' of 'attn.{q,o}'"),
        ([{"modules": ["**.q", "**.x"], "rank": 1}], "o[0].modules[1]", "modules '**.x'"),
        ([{"role": "attn.q", "modules": "**.v", "rank": 1}], "o[0].role", "role 'attn.q'"),
        ([{"layers": ":2", "rank": 1}, {"layers": 1, "rank": 2}], "o[1]", "the override is never used"),
    ],
)
def test_unused_overrides_are_errors(overrides: list[dict[str, Any]], path: str, message: str) -> None:
    with pytest.raises(GraftError) as caught:
        check_used(lora(*overrides).overrides, SITES, {"": 4}, "o")
    assert caught.value.code == "GC011" and message in caught.value.message
    assert caught.value.place is not None and caught.value.place.path == path


def test_used_overrides_pass() -> None:
    spec = lora({"layers": 1, "rank": 1}, {"layers": ":2", "rank": 2}, {"role": "attn.v", "rank": 3})
    check_used(spec.overrides, SITES, {"": 4}, "o")
    assert [spec.for_site(s.module, s.roles, s.layer, depth=4).rank for s in SITES] == [2, 2, 1, 1, 8, 3, 8, 3]


def test_a_subclass_elsewhere_is_no_registered_method() -> None:
    assert not {"test_bottleneck", "test_bounded"} & set(method_specs())
