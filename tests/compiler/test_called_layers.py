"""Layers that are alike are adapted as one function and its calls; all other code sees every layer."""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
from torch import Tensor

import graftc
from graftc.compiler.compilation import Compilation
from graftc.compiler.pipeline import StartingPoint, compile_model
from graftc.compiler.resolution import CalledResolution
from graftc.passes.core.ir.cleaning import remove_dead
from graftc.passes.core.ir.edits import Edits
from graftc.passes.core.ir.functions import calls, expand
from graftc.passes.core.ir.printer import structural_hash
from graftc.passes.core.ir.program import Program
from graftc.specs.errors.diagnostics import GraftError
from graftc.testing.contract import inputs_for, outputs_of
from graftc.testing.families import tiny
from tests.kit.comparing import gradients_of, same_tensors

DEPTH = 6
EVERYWHERE = {"role": ["attn.{q,k,v,o}", "ffn.{gate,up,down}"]}
LORA = {"method": "lora", "rank": 2, "dropout": 0.1, "target": EVERYWHERE}


def compiled_at(layers: int = DEPTH, adapt: Mapping[str, Any] = LORA, family: str = "llama") -> Any:
    return graftc.compile({"adapt": [dict(adapt)]}, tiny(family, layers=layers), seed=0, cache=False)


def compilation_of(compiled: Any) -> Compilation:
    return compiled._graftc.compilation  # type: ignore[no-any-return]


def is_called(compiled: Any) -> bool:
    main = compilation_of(compiled).main
    return isinstance(main, CalledResolution) and not main.is_written_out


def codes(compiled: Any, mode: Any = "train") -> set[int]:
    """Return the functions that the repeated layers run in a mode of the first signature."""
    key = compilation_of(compiled).key(mode)
    every = (pair for block in compiled._graftc.blocks.values() for pair in block._graftc.functions.items())
    functions = (function for name, function in every if name.startswith(f"{key}#"))
    return {id(getattr(function, "function", function)) for function in functions}


def hashed(program: Program) -> str:
    """Return the structural hash with every call written out, and without the nodes that edits have replaced."""
    expanded = program.copy(edits=Edits())
    expand(expanded.graph)
    remove_dead(expanded)
    return structural_hash(expanded)


def require_the_same(compiled: Any) -> None:
    """Check that graphs, tensors, outputs and gradients equal those of layers adapted one by one, to the bit."""
    compilation, runner = compilation_of(compiled), compiled._graftc
    as_run = {key: hashed(program) for key, program in compilation.table.programs.items()}
    parts = copy.deepcopy(dict(compilation.parts))
    names = [name for name, _ in compiled.named_parameters()]
    inputs = inputs_for(compiled)
    before = measured(compiled, inputs)
    assert {key: hashed(program) for key, program in compilation.programs.items()} == as_run
    assert compilation.parts == parts
    assert [name for name, _ in compiled.named_parameters()] == names
    for key in list(runner.shown.executables):
        runner.write_out(key)
        assert not calls(runner.shown.executables[key].program.graph)
    after = measured(compiled, inputs)
    assert same_tensors(before, after)


def require_every_layer(compiled: Any) -> None:
    """Check that tensors equal those of the same spec with every layer written out from the start, to the bit."""
    compilation = compilation_of(compiled)
    start = StartingPoint(compilation.seed, use_cache=False, every_layer=True)
    wanted = compile_model(
        compilation.spec, compilation.source, compilation.main.axes, flags=compilation.flags, start=start
    )
    ours, theirs = dict(compilation.store.adapters()), dict(wanted.store.adapters())
    assert same_tensors(ours, theirs)


def measured(compiled: Any, inputs: Any) -> dict[str, Tensor]:
    """Return the outputs in both modes, and the gradients."""
    compiled.eval()
    results = {f"eval {number}": value for number, value in enumerate(outputs_of(compiled, inputs))}
    compiled.train().zero_grad(set_to_none=True)
    torch.manual_seed(3)
    leaves = pytree.tree_leaves(compiled(**inputs))
    values = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    results |= {f"train {number}": value.detach() for number, value in enumerate(values)}
    sum(value.square().mean() for value in values if value.requires_grad).backward()  # type: ignore[union-attr]
    return results | gradients_of(compiled)


@pytest.mark.slow
@pytest.mark.sample("dora")
@pytest.mark.parametrize(
    ("adapt", "family"),
    [
        (LORA, "llama"),
        ({**LORA, "target": {"role": "attn.{q,k,v,o}"}}, "t5"),
        ({"method": "pfeiffer", "target": {"role": "ffn.sublayer"}}, "bert"),
        ({"method": "prefix", "length": 3}, "llama"),
        ({"method": "prefix", "length": 3}, "bert"),
        ({"method": "dora", "rank": 2, "target": {"role": "attn.{q,k,v}"}}, "gpt2"),
        ({"method": "ia3", "target": {"role": ["attn.{k,v}", "ffn.down"]}}, "t5"),
        ({"method": "vera", "rank": 3, "target": {"role": "attn.{q,v}"}}, "bert"),
        ({**LORA, "overrides": [{"layers": [2, 4], "rank": 3}]}, "llama"),
    ],
    ids=["lora", "lora-t5", "pfeiffer", "prefix", "prefix-bert", "dora", "ia3", "vera", "override"],
)
def test_calls_do_what_every_layer_does(adapt: Mapping[str, Any], family: str) -> None:
    compiled = compiled_at(adapt=adapt, family=family)
    assert is_called(compiled)
    require_the_same(compiled)


class TestFunctions:
    @pytest.mark.full
    def test_thirty_two_layers_are_one(self) -> None:
        compiled = compiled_at(32)
        assert len(compiled._graftc.blocks) == 32
        assert len(codes(compiled)) == len(codes(compiled, "eval")) == 1
        graph = compilation_of(compiled).program_as_run("train").graph
        deeper = compilation_of(compiled_at(33)).program_as_run("train").graph
        assert len(deeper.nodes) == len(graph.nodes) + 2

    @pytest.mark.full
    def test_an_override_on_two_layers_makes_two(self) -> None:
        compiled = compiled_at(32, {**LORA, "overrides": [{"layers": [7, 20], "rank": 4}]})
        assert is_called(compiled)
        assert len(codes(compiled)) == len(codes(compiled, "eval")) == 2
        assert {one.body for one in calls(compilation_of(compiled).program_as_run("train").graph)} == {
            "model.layers.1",
            "model.layers.7",
        }

    @pytest.mark.full
    def test_a_cache_makes_one_more(self) -> None:
        compiled = compiled_at(32).eval()
        before = codes(compiled, "eval")
        ids = torch.arange(6)[None]
        with torch.no_grad():
            compiled.generate(ids, max_new_tokens=3, do_sample=False)
        assert is_called(compiled)
        every = (f for block in compiled._graftc.blocks.values() for f in block._graftc.functions.values())
        cached = {id(getattr(f, "function", f)) for f in every} - before - codes(compiled, "train")
        assert len(cached) == 1


class TestWrittenOut:
    @pytest.mark.full
    def test_training_and_generating_do_without(self) -> None:
        compiled = compiled_at().train()
        ids = torch.arange(12).reshape(2, 6)
        compiled(input_ids=ids, labels=ids).loss.backward()
        compiled.eval()
        with torch.no_grad():
            compiled.generate(ids, max_new_tokens=2, do_sample=False)
        assert is_called(compiled)

    @pytest.mark.slow
    def test_looking_at_a_layer_writes_all_out(self) -> None:
        compiled = compiled_at()
        assert sum(len(resolved.places) for resolved in compilation_of(compiled).main.resolved) == 7 * DEPTH
        assert not is_called(compiled)
        assert not calls(compilation_of(compiled).program("train").graph)

    @pytest.mark.slow
    def test_threads_write_out_once(self) -> None:
        compiled = compiled_at()
        programs: list[Program] = []

        def look() -> None:
            programs.append(compilation_of(compiled).program("eval"))

        threads = [threading.Thread(target=look) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(programs) == 4
        assert len({id(program) for program in programs}) == 1

    @pytest.mark.slow
    def test_trained_tensors_stay(self) -> None:
        compiled = compiled_at().eval()
        with torch.no_grad():
            for parameter in compiled.parameters():
                if parameter.requires_grad:
                    parameter.normal_(0, 0.05, generator=torch.Generator().manual_seed(1))
        before = {name: tensor.clone() for name, tensor in compiled.adapter_state_dict().items()}
        inputs = inputs_for(compiled)
        outputs = outputs_of(compiled, inputs)
        merged = compiled.merge()
        assert all(torch.equal(before[name], now) for name, now in compiled.adapter_state_dict().items())
        assert all(torch.allclose(a, b, atol=2e-5) for a, b in zip(outputs, outputs_of(merged, inputs), strict=True))

    @pytest.mark.full
    def test_hooks_see_their_layer(self) -> None:
        compiled, seen = compiled_at().eval(), []
        ids = torch.arange(6)[None]
        with torch.no_grad():
            before = compiled(ids).logits
            layer = compiled.get_submodule("model.layers.3")
            layer.register_forward_hook(lambda module, args, output: seen.append(output))
            after = compiled(ids).logits
        assert len(seen) == 1
        assert torch.equal(before, after)

    @pytest.mark.full
    def test_a_copy_is_a_model_of_its_own(self) -> None:
        compiled = compiled_at().eval()
        copied = copy.deepcopy(compiled)
        ids = torch.arange(6)[None]
        with torch.no_grad():
            for parameter in copied.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1)
            assert not torch.equal(copied(ids).logits, compiled(ids).logits)
        assert compilation_of(copied).program("train") is compilation_of(compiled).program("train")


class TestToldAsOfEveryLayer:
    @pytest.mark.slow
    def test_an_error_names_the_first_place(self) -> None:
        with pytest.raises(GraftError) as told:
            compiled_at(adapt={**LORA, "rank": 4000})
        assert told.value.code == "GC020"
        assert "model.layers.0." in str(told.value)

    @pytest.mark.slow
    def test_an_error_of_a_later_layer_is_told(self) -> None:
        with pytest.raises(GraftError) as told:
            compiled_at(adapt={**LORA, "overrides": [{"layers": 3, "rank": 4000}]})
        assert told.value.code == "GC020"
        assert "model.layers.3." in str(told.value)

    @pytest.mark.full
    def test_a_warning_is_told_once(self) -> None:
        model = tiny("t5", layers=DEPTH)
        spec = {"adapt": [{"method": "lora", "rank": 2, "target": {"role": ["attn.q", "head"]}}]}
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            graftc.compile(spec, model, seed=0, cache=False)
        messages = [str(each.message) for each in told if "GC024" in str(each.message)]
        assert messages
        assert len(messages) == len(set(messages))


@pytest.mark.full
def test_parts_of_a_call_are_written_out_one_by_one() -> None:
    """Adaptations that a decoder's graph lacks are looked up in the graphs of other parts, as they are run."""
    model = tiny("t5", layers=DEPTH).eval()
    target = {"role": ["attn.q", "attn.k", "attn.v"]}
    compiled: Any = graftc.compile(
        {"adapt": [{"method": "lora", "rank": 2, "target": target}]}, model, cache=False
    ).eval()
    ids = torch.randint(3, 90, (2, 7), generator=torch.Generator().manual_seed(0))
    for given in (ids, ids[:, :1]):
        options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}
        assert torch.equal(compiled.generate(given, **options), model.generate(given, **options))  # type: ignore[operator]
    assert not any(calls(program.graph) for program in compilation_of(compiled).programs.values())


@pytest.mark.full
@pytest.mark.parametrize("field", ["density", "equivalent_rank"])
def test_an_attempt_with_calls_that_fails_leaves_nothing(field: str) -> None:
    """SpIEL reuses existing indices, and would mistake those of a failed attempt for selected ones."""
    compiled = compiled_at(adapt={"method": "spiel", "variant": "MA", field: {"density": 0.1}.get(field, 2)})
    assert not is_called(compiled)
    require_every_layer(compiled)
    trained = [name for name, parameter in compiled.named_parameters() if parameter.requires_grad]
    assert {name.split(".")[2] for name in trained} == {str(number) for number in range(DEPTH)}
