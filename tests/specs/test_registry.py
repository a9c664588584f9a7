"""Discovery of methods: built-in ones, installed plugins, and faulty plugins."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import graftc.specs
from graftc.specs import LoRA, Spec, load_spec, parse_spec
from graftc.specs.claims import Claims, FoldKind, SiteKind
from graftc.specs.errors.diagnostics import GraftError
from graftc.specs.registry import method_specs, reload_methods, unknown_method

SPEC = '''
from typing import ClassVar, Literal
from pydantic import Field
from graftc.specs.base import MethodSpec
from graftc.specs.claims import Claims, FoldKind, SiteKind

class {name}(MethodSpec):
    """Scale the output of a layer.

    More words.
    """
    claims: ClassVar[Claims] = Claims(frozenset({{SiteKind.LINEAR}}), identity_at_init=True, folds=FoldKind.EXACT)
    paper: ClassVar[str] = "Nobody 2024"
    method: Literal["{tag}"] = "{tag}"
    start: float = Field(default=1.0, gt=0)
    """First value of the scale."""
'''

Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Put a package with an entry point of graftc.methods on the path, as pip would."""
    monkeypatch.syspath_prepend(str(tmp_path))
    packages: list[str] = []

    def add(package: str, spec: str | None, name: str = "scale") -> None:
        folder = tmp_path / package
        folder.mkdir()
        (folder / "__init__.py").touch()
        if spec is not None:
            (folder / "spec.py").write_text(spec)
        info = tmp_path / f"{package}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[graftc.methods]\n{name} = {package}\n")
        packages.append(package)
        importlib.invalidate_caches()
        reload_methods()

    yield add
    for module in [m for m in sys.modules if m.partition(".")[0] in packages]:
        del sys.modules[module]
    monkeypatch.undo()
    reload_methods()


def test_built_in_methods_are_found_with_their_code_beside_them() -> None:
    entry = method_specs()["lora"]
    assert entry.spec_class is LoRA
    assert (entry.module, entry.method_module) == ("graftc.specs.methods.lora", "graftc.passes.methods.lora")
    assert entry.claims is LoRA.claims and entry.paper == LoRA.paper
    assert entry.summary.startswith("Low-rank adaptation of linear maps")


def test_every_method_has_what_the_lists_show() -> None:
    for tag, entry in method_specs().items():
        assert tag == entry.tag == entry.spec_class.model_fields["method"].default
        assert entry.summary.endswith(".") and entry.paper and entry.claims.sites
        for name, field in entry.spec_class.model_fields.items():
            assert field.description, f"{tag}.{name} has no docstring"


def test_the_table_of_methods_cannot_be_changed() -> None:
    with pytest.raises(TypeError):
        method_specs()["x"] = method_specs()["lora"]  # type: ignore[index]


def test_a_plugin_is_a_method_like_any_other(install: Install) -> None:
    install("plug_good", SPEC.format(name="Scale", tag="scale"))
    entry = method_specs()["scale"]
    assert (entry.module, entry.method_module) == ("plug_good.spec", "plug_good.method")
    assert entry.summary == "Scale the output of a layer." and entry.paper == "Nobody 2024"
    spec = load_spec({"adapt": [{"method": "scale", "target": {"role": "attn.q"}, "start": 2.0}]})
    assert type(spec.adapt[0]) is entry.spec_class and spec.adapt[0].name == "scale"
    assert graftc.specs.Scale is entry.spec_class  # type: ignore[attr-defined]
    schema = Spec.model_json_schema()
    assert set(schema["properties"]["adapt"]["items"]["discriminator"]["mapping"]) == set(method_specs())
    assert schema["$defs"]["Scale"]["properties"]["start"]["description"] == "First value of the scale."


def test_a_plugins_fields_have_the_same_errors(install: Install) -> None:
    install("plug_errors", SPEC.format(name="Scale", tag="scale"))
    with pytest.raises(GraftError) as caught:
        parse_spec("adapt:\n- {method: scale, target: {role: attn.q}, strat: 2}\n- {method: sclae}\n", file="s.yaml")
    assert str(caught.value).splitlines() == [
        "GC003: field 'strat' is unknown",
        "  --> s.yaml:2:43 (adapt[0].strat)",
        "  hint: did you mean 'start'?",
        "     2 - - {method: scale, target: {role: attn.q}, strat: 2}",
        "     2 + - {method: scale, target: {role: attn.q}, start: 2}",
        "  also GC004: method 'sclae' is unknown",
        "    --> s.yaml:3:12 (adapt[1].method)",
        "    hint: did you mean 'scale'?",
        "       3 - - {method: sclae}",
        "       3 + - {method: scale}",
    ]


def test_two_plugins_with_one_tag_are_named(install: Install) -> None:
    install("plug_one", SPEC.format(name="Scale", tag="scale"), "one")
    install("plug_two", SPEC.format(name="Other", tag="scale"), "two")
    with pytest.raises(GraftError) as caught:
        method_specs()
    assert caught.value.code == "GC070"
    assert caught.value.message == "the method 'scale' is defined in plug_one.spec and in plug_two.spec"


def test_a_plugin_may_not_take_a_built_in_tag(install: Install) -> None:
    install("plug_taken", SPEC.format(name="MyLoRA", tag="lora"))
    with pytest.raises(GraftError, match=r"defined in graftc\.specs\.methods\.lora and in plug_taken\.spec") as caught:
        method_specs()
    assert caught.value.code == "GC070"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (None, "ModuleNotFoundError"),
        ("1 / 0", "cannot be imported: ZeroDivisionError: division by zero"),
        ("", "has no method in plug_bad.spec"),
        (SPEC.format(name="Scale", tag="My-Scale"), "the tag 'My-Scale' of plug_bad.spec.Scale is not usable"),
        (SPEC.format(name="Scale", tag="scale").replace("claims:", "claim:"), "plug_bad.spec.Scale has no claims"),
        ("from graftc.specs.methods.lora import LoRA", "has no method in plug_bad.spec"),
    ],
)
def test_a_broken_plugin_is_named(install: Install, spec: str | None, message: str) -> None:
    install("plug_bad", spec)
    with pytest.raises(GraftError) as caught:
        method_specs()
    assert caught.value.code == "GC071" and caught.value.exit_code == 3
    assert message in caught.value.message and "plug_bad" in caught.value.message


def test_a_tag_that_no_method_has() -> None:
    assert unknown_method("LoRA").fix == ("LoRA", "lora")
    hint = unknown_method("zzz").hint
    assert hint is not None and hint.startswith("the methods are: ") and "lora" in hint


def test_claims_are_checked_where_they_are_made() -> None:
    claims = Claims(frozenset({SiteKind.LINEAR}), identity_at_init=True, folds=FoldKind.NONE)
    assert claims.inert == frozenset() and not claims.bankable
    with pytest.raises(ValueError, match="at least one kind of site"):
        Claims(frozenset(), identity_at_init=True, folds=FoldKind.NONE)
    with pytest.raises(ValueError, match="linaer"):
        Claims(frozenset({"linaer"}), identity_at_init=True, folds=FoldKind.NONE)  # type: ignore[arg-type]


PRESET = '''
from typing import ClassVar, Literal
from graftc.specs.methods.lora import LoRA

class Rank4(LoRA):
    """LoRA of rank 4."""
    paper: ClassVar[str] = "Nobody 2024"
    mechanism: ClassVar[str | None] = "{mechanism}"
    method: Literal["rank4"] = "rank4"
    rank: int = 4
'''


def test_a_preset_runs_the_code_of_its_mechanism(install: Install) -> None:
    from graftc.passes.core.method.registry import method_for

    assert method_for("pfeiffer") is method_for("bottleneck")
    assert method_specs()["pfeiffer"].claims is not method_specs()["bottleneck"].claims
    install("plug_preset", PRESET.format(mechanism="lora"))
    assert method_for("rank4") is method_for("lora")


@pytest.mark.parametrize("mechanism", ["nothing", "pfeiffer", "rank4"])
def test_a_mechanism_is_a_method_with_code_of_its_own(install: Install, mechanism: str) -> None:
    from graftc.passes.core.method.registry import method_for

    install("plug_preset", PRESET.format(mechanism=mechanism))
    with pytest.raises(GraftError) as error:
        method_for("rank4")
    assert error.value.code == "GC071" and mechanism in error.value.message


def test_a_method_that_cannot_be_parsed_is_told_by_its_name(install: Install) -> None:
    from graftc.passes.core.method.registry import method_for

    install("plug_broken", SPEC.format(name="Scale", tag="scale"))
    entry = method_specs()["scale"]
    folder = Path(sys.modules[entry.module].__file__ or "").parent
    (folder / "method.py").write_text("class Broken(:\n")
    with pytest.raises(GraftError) as error:
        method_for("scale")
    assert error.value.code == "GC071" and "plug_broken.method" in error.value.message
