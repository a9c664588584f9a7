"""Passes of plugins: found, placed, checked against their declarations, shown like ours, and in keys and artifacts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import graftc
from graftc.compiler.adapting import ADAPT, EVAL
from graftc.compiler.capture.capture_cache import key
from graftc.compiler.capture.request import CaptureRequest
from graftc.compiler.inspect.explain import explain
from graftc.compiler.inspect.history import history
from graftc.passes.core.added_passes import extended
from graftc.passes.core.ir.program import provenance
from graftc.passes.lowering.lower import LOWER
from graftc.records.passes import figure_rows
from graftc.runtime.artifact import open_artifact
from graftc.specs.errors.diagnostics import GraftError
from graftc.testing.compare import flat, inputs_for
from graftc.testing.families import HIDDEN, tiny
from tests.kit.models import fresh
from tests.kit.plugins import Install, installing
from tests.kit.refusals import refused
from tools.docs.blocks import blocks

LORA: dict[str, Any] = {"method": "lora", "rank": 2, "target": {"role": ["attn.q", "attn.v"]}}

HEAD = """
import torch
from graftc.extend import AddedPass, LinearSite, Pass

def nothing(program, context):
    pass

"""

SCALE = f"""{HEAD}
def scale(program, context):
    build = context.builder()
    for site in context.adapted.get("lora", ()):
        with build.on(site):
            build.set_output(site, build.call(torch.ops.aten.mul.Tensor, build.output(site), FACTOR, part="scale"))

SCALE = AddedPass(Pass("scale", scale, {{"places", "adapted"}}), after="insert")
"""
"""Multiplies the outputs of what LoRA adapts."""


@pytest.fixture
def install(tmp_path: Path) -> Iterator[Install]:
    folder = tmp_path / "site"
    folder.mkdir()
    with installing(folder) as installed:
        yield installed


def misfit(*parts: str) -> GraftError:
    """Return the error about an installed pass, and check that its message has these parts."""
    error = refused(fresh, "bert", LORA, code="GC077")
    assert error.place is not None and error.place.path.startswith("entry point "), error
    assert all(part in error.message for part in parts), error.message
    return error


def names(pipeline: Any) -> list[str]:
    return [each.name for each in extended(pipeline)]


class TestPlacing:
    def test_nothing_is_added_where_nothing_is_installed(self) -> None:
        assert [str(extended(each)) for each in (ADAPT, EVAL, LOWER)] == [str(each) for each in (ADAPT, EVAL, LOWER)]

    def test_passes_go_where_they_ask_to_be(self, install: Install) -> None:
        source = HEAD + "".join(
            f"{name.upper()} = AddedPass(Pass({name!r}, nothing, rewrites=False), {place})\n"
            for name, place in [
                ("a", "after='insert'"),
                ("b", "after='a'"),
                ("c", "after='insert'"),
                ("d", "before='recompute'"),
                ("e", "after='mode(eval)', pipeline='eval'"),
                ("f", "before='lower(projections)', pipeline='lower'"),
            ]
        )
        install("some-passes", source, **{name: name.upper() for name in "dcbafe"})
        behind = names(ADAPT)[names(ADAPT).index("insert") :]
        assert behind == ["insert", "a", "b", "c", "d", "recompute"]
        assert names(EVAL) == ["mode(eval)", "e"]
        assert names(LOWER) == ["lower(loss)", "f", "lower(projections)"]
        assert "  a (looks; where wanted; from some-passes 1.0; requires copy)" in str(extended(ADAPT)).splitlines()

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("arguments", "message", "hint"),
        [
            ("Pass('a', nothing), after='insrt'", "'adapt' has no pass 'insrt'", "'insert'"),
            ("Pass('a', nothing), after='a'", "relative to each other in a cycle: 'a' of broken 1.0", "copy, roles"),
            ("Pass('insert', nothing), after='roles'", "two passes with the same name: the pass 'insert' and",
             "'insert-2'"),
            ("Pass('a', nothing), before='copy'", "requires 'copy', which no pass before it ensures", "after 'copy'"),
            ("Pass('a', nothing, {'place'}), after='insert'", "requires 'place', which no", "did you mean 'places'?"),
            ("Pass('a', nothing, {'adapted'}), after='roles'", "requires 'adapted', which no", "after 'insert'"),
            ("Pass('a', nothing, ensures={'roles'}), after='insert'", "one of graftc's own facts", "another name"),
            ("Pass('a', nothing), pipeline='adpt', after='insert'", "the pipeline 'adpt'", "did you mean 'adapt'?"),
            ("Pass('a', nothing), after='insert', before='insert'", "with two places", "before= or after="),
            ("Pass('a', nothing)", "with no place", "before= or after="),
            ("Pass('A pass', nothing), after='insert'", "named 'A pass'", "lower-case"),
            ("Pass('verify', nothing), after='insert'", "which is a reserved name", "another name"),
            ("nothing, after='insert'", "as a pass", "AddedPass(Pass(...), after=...)"),
        ],
    )  # fmt: skip
    def test_one_that_cannot_be_placed(self, arguments: str, message: str, hint: str, install: Install) -> None:
        install("broken", f"{HEAD}MADE = AddedPass({arguments})", mine="MADE")
        error = misfit(message)
        assert hint in error.hint, error.hint
        assert str(error.place) == 'entry point mine = "broken:MADE"'

    @pytest.mark.slow
    def test_a_circle_of_two(self, install: Install) -> None:
        for one, other in ("ab", "ba"):
            install(f"pass-{one}", f"{HEAD}MADE = AddedPass(Pass({one!r}, nothing), after={other!r})", mine="MADE")
        misfit("in a cycle: 'a' of pass-a 1.0 after 'b', 'b' of pass-b 1.0 after 'a'")

    @pytest.mark.slow
    def test_two_of_one_name(self, install: Install) -> None:
        for package in ("one", "two"):
            install(package, f"{HEAD}MADE = AddedPass(Pass('same', nothing), after='insert')", mine="MADE")
        misfit("two passes with the same name: the pass 'same' of one 1.0 and the pass 'same' of two 1.0")

    def test_one_that_cannot_be_imported(self, install: Install) -> None:
        install("broken", "import a_module_that_is_not_there", mine="MADE")
        error = misfit("broken 1.0 cannot be imported", "a_module_that_is_not_there")
        assert "uninstall broken" in error.hint


class TestHeldToWhatTheySay:
    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("body", "says", "message"),
        [
            ("1 / 0", "", "fails: ZeroDivisionError: division by zero"),
            ("return 3", "", "returns a value of type int"),
            ("context.sites", "", "reads 'sites', but does not declare that it requires it"),
            ("context.adapted", "{'sites'}", "reads 'places'"),
            ("context['depth']", "", "reads 'depth'"),
            ("context['sites']", "{'sites'}", "reads the value of 'sites', which has none"),
            ("pass", "ensures={'depth'}", "declares that it ensures 'depth', but does not set a value"),
            ("context['depth'] = 3", "", "sets 'depth', but does not declare"),
            ("context.figure('depth', float('nan'))", "", "nan as 'depth', which is not a finite number"),
            ("context.figure('depth', 'deep')", "", "'deep' as 'depth', which is not a finite number"),
            ("context.figure('depth', True)", "", "True as 'depth', which is not a finite number"),
            ("context.figure('depth', '12')", "", "'12' as 'depth', which is not a finite number"),
            ("context.figure('depth', 10**400)", "", "which is not a finite number"),
            ("context.builder()", "rewrites=False", "requests a Builder, but has rewrites=False"),
            ("program.graph.output_node().meta['val'] = 0; list(program.graph.nodes)[-2].target = abs", "",
             "leaves an invalid graph: after mine at"),
            ("call = list(program.graph.find_nodes(op='call_function', target=torch.ops.aten.tanh.default))[0]; "
             "call.replace_all_uses_with(call.args[0])", "rewrites=False", "has rewrites=False, but changed the graph"),
            ("call = list(program.graph.find_nodes(op='call_function', target=torch.ops.aten.tanh.default))[0]; "
             "call.replace_all_uses_with(call.args[0])", "", "a node of the base was changed"),
            ("program.graph.find_nodes(op='call_function', target=torch.ops.aten.tanh.default)[0].target = abs",
             "rewrites=False", "has rewrites=False, but changed the graph"),
            ("node = [n for n in program.graph.nodes if any(type(a) in (int, float) for a in n.args)][-1]; "
             "node.args = tuple(a + 1 if type(a) in (int, float) else a for a in node.args)",
             "rewrites=False", "has rewrites=False, but changed the graph"),
            ("program.output_node.meta['val'] = 0", "rewrites=False", "has rewrites=False, but changed the graph"),
        ],
    )  # fmt: skip
    def test_it(self, body: str, says: str, message: str, install: Install) -> None:
        source = f"{HEAD}def mine(program, context):\n    {body}\n"
        install("mine", f"{source}MINE = AddedPass(Pass('mine', mine, {says}), after='insert')", mine="MINE")
        misfit("the pass 'mine' of mine 1.0", message)

    def test_its_own_errors_keep_their_codes(self, install: Install) -> None:
        source = (
            f"{HEAD}from graftc.extend import GraftError\ndef mine(p, c):\n    raise GraftError('GC020', 'too small')\n"
        )
        install("mine", f"{source}MINE = AddedPass(Pass('mine', mine), after='insert')", mine="MINE")
        with pytest.raises(GraftError, match="too small") as caught:
            fresh("bert", LORA)
        assert caught.value.code == "GC020"

    @pytest.mark.slow
    def test_facts_go_from_one_to_another(self, install: Install) -> None:
        source = f"""{HEAD}
def measure(program, context):
    context["widths"] = [site.out_features for site in context.adapted["lora"]]

def show(program, context):
    context.figure("widest", max(context["widths"]))

MEASURE = AddedPass(Pass("measure", measure, {{"places"}}, {{"widths"}}, rewrites=False), after="insert")
SHOW = AddedPass(Pass("show", show, "widths", rewrites=False), after="measure")
"""
        install("widths", source, measure="MEASURE", show="SHOW")
        figures = {record.name: record.figures for record in fresh("bert", LORA).report.passes}
        assert [f.value for f in figures["show"]] == [HIDDEN] and not figures["measure"]

    def test_one_that_is_not_wanted_does_not_run(self, install: Install) -> None:
        wanted = "lambda program, context: 'houlsby' in context.spec.owners"
        definition = f"Pass('mine', lambda program, context: 1 / 0, wanted={wanted})"
        install("mine", f"{HEAD}MINE = AddedPass({definition}, after='insert')", mine="MINE")
        model = fresh("bert", LORA)
        assert not model.report.passes and "mine" not in [row.step for row in history(model.snapshot)]


class TestFigures:
    SOURCE = f"""{HEAD}
def count(program, context):
    for site in context.sites:
        if isinstance(site, LinearSite):
            context.figure("rows", site.out_features, site)
    context.figure("nodes", len(program.graph.nodes))

COUNT = AddedPass(Pass("count", count, {{"sites"}}, rewrites=False), after="insert")

def after(program, context):
    context.figure("nodes", len(program.graph.nodes))

AFTER = AddedPass(Pass("after", after, rewrites=False), pipeline="eval", after="mode(eval)")
"""

    @pytest.mark.slow
    def test_reports_have_them(self, install: Install) -> None:
        install("counting", self.SOURCE, "0.3", count="COUNT", after="AFTER")
        model = fresh("bert", LORA)
        count, after = model.report.passes
        assert (count.pipeline, count.name, count.distribution, count.version) == ("adapt", "count", "counting", "0.3")
        assert (after.pipeline, after.name) == ("eval", "after") and not count.rewrites
        program = model.compilation.program
        assert count.figures[-1].value == len(program("train").graph.nodes)
        assert [f.value for f in after.figures] == [len(program("eval").graph.nodes)]
        rows = {(row.name, row.site): (row.layers, row.value) for row in figure_rows(model.report.passes)}
        width, layers = HIDDEN, 2
        assert rows["rows", "bert.encoder.layer.*.attention.self.query.weight"] == (f"0-{layers - 1}", width)
        assert rows["rows", "bert.pooler.dense.weight"] == ("", width)
        data = model.report.to_json()["passes"][0]
        assert data["figures"][-1] == {
            "name": "nodes",
            "site": "",
            "layer": None,
            "stack": "",
            "value": count.figures[-1].value,
        }
        assert "bert.encoder.layer.*.attention.self.query.weight" in model.report._repr_html_()

    @pytest.mark.slow
    def test_graphs_are_as_without(self, install: Install) -> None:
        without = fresh("bert", LORA)
        install("counting", self.SOURCE, count="COUNT", after="AFTER")
        model = fresh("bert", LORA)
        for mode in ("train", "eval"):
            assert model.print_graph(mode) == without.print_graph(mode)
        steps = [row.step for row in history(model.snapshot)]
        assert [step for step in steps if step not in ("count", "after")] == [
            row.step for row in history(without.snapshot)
        ]
        assert steps.index("count") == steps.index("insert(lora)") + 1 and steps[-1] == "after"
        assert {"count", "after"} <= {step.name for step in model.report.steps}

    @pytest.mark.slow
    def test_artifacts_keep_them(self, install: Install, tmp_path: Path) -> None:
        fresh("bert", LORA).save(tmp_path / "without", certify=False)
        assert '"passes"' not in (tmp_path / "without" / "manifest.json").read_text(encoding="utf-8")
        install("counting", self.SOURCE, count="COUNT", after="AFTER")
        model = fresh("bert", LORA)
        model.save(tmp_path / "artifact", certify=False)
        artifact = open_artifact(tmp_path / "artifact")
        assert artifact.passes == artifact.snapshot.passes == model.report.passes
        assert graftc.load(tmp_path / "without", tiny("bert")).report.passes == model.report.passes

    @pytest.mark.slow
    def test_captures_have_keys_of_their_own(self, install: Install) -> None:
        model = tiny("bert")
        request = CaptureRequest(model, fresh("bert", LORA).compilation.main.axes)
        before = key(request)
        install("counting", self.SOURCE, count="COUNT")
        assert key(request) not in (before, None)


class TestRewriting:
    @pytest.mark.slow
    def test_graphs_of_both_modes_have_what_it_inserts(self, install: Install) -> None:
        plain = fresh("bert", LORA).eval()
        inputs = inputs_for(plain)
        install("scaling", SCALE.replace("FACTOR", "1.0"), scale="SCALE")
        model = fresh("bert", LORA).eval()
        assert torch.equal(flat(model(**inputs))[0], flat(plain(**inputs))[0])
        rows = {row.step: row for row in history(model.snapshot, "train")}
        sites = len(model.compilation.main.resolved[0].sites)
        assert rows["scale"].added == sites and rows["scale"].verified
        assert rows["scale"].inserted == rows["insert(lora)"].inserted + sites
        text = [line for line in model.print_graph("eval").splitlines() if "# + scale" in line]
        assert len(text) == sites and all("aten.mul" in line for line in text)
        (record,) = model.report.passes
        assert record.rewrites and not record.figures

    @pytest.mark.slow
    def test_what_it_inserts_is_explained(self, install: Install) -> None:
        install("scaling", SCALE.replace("FACTOR", "1.0"), scale="SCALE")
        model = fresh("bert", LORA)
        made_by = ((node, provenance(node)) for node in model.program("eval").graph.nodes)
        node = next(node for node, origin in made_by if origin is not None and origin["adaptation"] == "scale")
        explanation = explain(model.snapshot, node.name, "eval")
        assert explanation.nodes[0].step == "scale" and "the pass 'scale' of scaling 1.0" in explanation.text()

    @pytest.mark.slow
    def test_it_changes_what_is_computed(self, install: Install) -> None:
        plain = fresh("bert", LORA).eval()
        inputs = inputs_for(plain)
        install("scaling", SCALE.replace("FACTOR", "3.0"), scale="SCALE")
        model = fresh("bert", LORA).eval()
        assert not torch.allclose(flat(model(**inputs))[0], flat(plain(**inputs))[0])
        with model.disabled():
            assert torch.equal(flat(model(**inputs))[0], flat(tiny("bert").eval()(**inputs))[0])

    @pytest.mark.slow
    def test_an_artifact_needs_the_same_pass(self, install: Install, tmp_path: Path) -> None:
        fresh("bert", LORA).save(tmp_path / "plain", certify=False)
        with installing(_folder(tmp_path / "one")) as one:
            one("scaling", SCALE.replace("FACTOR", "3.0"), scale="SCALE")
            scaled = fresh("bert", LORA)
            scaled.save(tmp_path / "scaled", certify=False)
            loaded = graftc.load(tmp_path / "scaled", tiny("bert"))
            assert loaded.print_graph("eval") == scaled.print_graph("eval")
            with pytest.raises(GraftError, match=r"'scale' of scaling 1\.0 rewrites graphs, but") as caught:
                graftc.load(tmp_path / "plain", tiny("bert"))
            assert caught.value.code == "GC077" and "uninstall scaling" in caught.value.hint
        with pytest.raises(
            GraftError, match=r"rewritten by .*'scale' of scaling 1\.0, which is not installed"
        ) as caught:
            graftc.load(tmp_path / "scaled", tiny("bert"))
        assert caught.value.code == "GC077" and caught.value.hint == "pip install scaling==1.0"
        assert graftc.load(tmp_path / "plain", tiny("bert"))

    @pytest.mark.slow
    def test_the_example_of_the_guide(self, install: Install) -> None:
        (block,) = (b.text for b in blocks("writing-a-pass.md") if "def scale" in b.text)
        install("scaling", f"{HEAD}from graftc.extend import PassContext, Program\n{block}", scale="SCALE")
        model = fresh("bert", LORA)
        added = next(row.added for row in history(model.snapshot) if row.step == "scale")
        assert added == len(model.compilation.main.resolved[0].sites)

    @pytest.mark.slow
    def test_nothing_folds(self, install: Install) -> None:
        install("scaling", SCALE.replace("FACTOR", "3.0"), scale="SCALE")
        model = fresh("bert", LORA)
        with pytest.raises(GraftError, match=r"the pass 'scale' of scaling 1\.0 has rewritten the graph") as caught:
            model.merge()
        assert caught.value.code == "GC050" and "without scaling" in caught.value.hint

    @pytest.mark.slow
    def test_it_lowers(self, install: Install) -> None:
        source = f"""{HEAD}
def tanh(program, context):
    for node in program.graph.find_nodes(op="call_function", target=torch.ops.aten.tanh.default):
        with program.graph.inserting_after(node):
            own = program.graph.call_function(torch.ops.aten.mul.Tensor, (node, FACTOR))
        own.meta = dict(node.meta)
        node.replace_all_uses_with(own, delete_user_cb=lambda user: user is not own)

TANH = AddedPass(Pass("double", tanh), pipeline="lower", after="lower(projections)")
"""
        plain = fresh("bert", LORA).train()
        inputs = inputs_for(plain)
        install("doubling", source.replace("FACTOR", "2.0"), double="TANH")
        model = fresh("bert", LORA).train()
        assert model.print_graph("train") == plain.print_graph("train")
        torch.manual_seed(0)
        one = flat(model(**inputs))[0]
        torch.manual_seed(0)
        assert not torch.equal(one, flat(plain(**inputs))[0])
        assert history(model.snapshot, "train", lowered=True)[-1].step == "double"

    @pytest.mark.slow
    def test_one_that_breaks_a_lowered_graph(self, install: Install) -> None:
        source = f"""{HEAD}
def broken(program, context):
    for node in program.graph.find_nodes(op="call_function", target=torch.ops.aten.tanh.default):
        node.meta["val"] = node.meta["val"].double()

BROKEN = AddedPass(Pass("broken", broken), pipeline="lower", after="lower(projections)")
"""
        install("breaking", source, broken="BROKEN")
        with pytest.raises(GraftError, match="leaves an invalid graph: after broken") as caught:
            model = fresh("bert", LORA).train()
            model(**inputs_for(model))
        assert caught.value.code == "GC077"

    @pytest.mark.full
    def test_every_signature_goes_through_it(self, install: Install) -> None:
        install("scaling", SCALE.replace("FACTOR", "3.0"), scale="SCALE")
        model = tiny("llama")
        adapted = graftc.compile({"adapt": [LORA]}, model).eval()
        inputs = inputs_for(adapted)
        adapted(**inputs, use_cache=True)
        signatures = adapted.compilation.signatures
        assert len(signatures) > 1 and all(s.passes[0].name == "scale" for s in signatures.values())


def _folder(path: Path) -> Path:
    path.mkdir()
    return path
