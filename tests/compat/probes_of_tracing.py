"""Probes: nested containers, fake tensors, symbolic sizes, settings of the compiler, graphs, and modes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from tests.compat.table import covers


@covers(*(f"torch.utils._pytree.tree_{name}" for name in ("flatten", "leaves", "map", "map_only")))
def containers_are_taken_apart() -> None:
    from graftc.compat import pytree

    value = {"a": [1, (2.0, None)]}
    leaves, spec = pytree.tree_flatten(value)
    assert leaves == pytree.tree_leaves(value) == [1, 2.0, None]
    assert spec.type is dict and spec.context == ["a"] and not spec.is_leaf()
    assert [child.type for child in spec.children()] == [list]
    assert pytree.tree_map(lambda leaf: leaf and leaf + 1, value) == {"a": [2, (3.0, None)]}
    assert pytree.tree_map_only(int, lambda leaf: leaf + 1, value) == {"a": [2, (2.0, None)]}


@covers("torch.utils._pytree.TreeSpec")
def the_structure_of_an_export_is_of_this_class() -> None:
    from graftc.compat import pytree

    assert isinstance(pytree.tree_flatten([1])[1], pytree.TreeSpec)


@covers("torch.utils._pytree.treespec_dumps")
def structures_become_text_that_is_read_back() -> None:
    from torch.utils import _pytree

    from graftc.compat.structures import structure_text

    value = ([1, 2], {"a": 3})
    assert _pytree.treespec_loads(structure_text(value)) == _pytree.tree_structure(value)


@covers("torch._subclasses.fake_tensor.FakeTensor", "torch._subclasses.fake_tensor.FakeTensorMode")
def fake_tensors_know_their_mode() -> None:
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    from graftc.compat.fake_tensors import FakeTensor, FakeTensorMode

    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    assert mode.cache_enabled
    mode.cache_enabled = False
    with mode:
        tensor = torch.empty(2, 3) @ torch.ones(3, 4)
    assert type(tensor) is FakeTensor and tensor.fake_mode is mode and mode.shape_env is not None
    assert tensor.shape == (2, 4) and tensor.device.type == "cpu"
    FakeTensorMode.cache_clear()


@covers(
    "torch._subclasses.fake_tensor.DataDependentOutputException",
    "torch._subclasses.fake_tensor.DynamicOutputShapeException",
)
def fake_tensors_refuse_what_depends_on_values() -> None:
    from graftc.compat import fake_tensors

    with fake_tensors.FakeTensorMode() as mode:
        for ask, kind in ((Tensor.item, "DataDependentOutput"), (torch.nonzero, "DynamicOutputShape")):
            mode.shape_env = None
            try:
                ask(torch.ones(1))
            except getattr(fake_tensors, f"{kind}Exception") as error:
                assert error.func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
            else:
                raise AssertionError(kind)


@covers("torch._guards.detect_fake_mode")
def code_on_fake_tensors_is_noticed() -> None:
    from graftc.compat.fake_tensors import FakeTensorMode, is_faking

    assert not is_faking()
    with FakeTensorMode():
        assert is_faking()


@covers("torch._dispatch.python.enable_python_dispatcher")
def python_decompositions_are_enabled() -> None:
    from graftc.compat.fake_tensors import enable_python_dispatcher

    with enable_python_dispatcher():
        assert torch._C._dispatch_tls_is_dispatch_key_included(torch._C.DispatchKey.PythonDispatcher)


@covers(*(f"torch.utils._sympy.functions.{name}" for name in ("FloorDiv", "Max", "Min", "Mod")))
def sizes_have_functions() -> None:
    import sympy

    from graftc.compat.symbols import FloorDiv, Max, Min, Mod

    size = sympy.Symbol("s", integer=True, positive=True)
    results = [int(each.subs({size: 7})) for each in (FloorDiv(size, 2), Mod(size, 4), Max(size, 9), Min(size, 5))]
    assert results == [3, 3, 9, 5]


@covers("torch._dynamo.source.ConstantSource")
def symbols_are_made_from_a_name() -> None:
    from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

    from graftc.compat.symbols import ConstantSource

    source = ConstantSource("graftc_s0")
    symbol = ShapeEnv().create_symbol(5, source, dynamic_dim=DimDynamic.DYNAMIC, constraint_dim=None)
    assert symbol.is_Symbol and symbol.is_integer


@covers("torch._dynamo.config")
def settings_of_dynamo_are_changed_in_a_block() -> None:
    from graftc.compat.dynamo import failing_on_recompiles, without_call_cache

    settings: Any = torch._dynamo.config
    before = settings.fake_tensor_cache_enabled, settings.error_on_recompile
    with without_call_cache(), failing_on_recompiles():
        assert (settings.fake_tensor_cache_enabled, settings.error_on_recompile) == (False, True)
    assert (settings.fake_tensor_cache_enabled, settings.error_on_recompile) == before == (True, False)


@covers("torch._dynamo.config.fake_tensor_cache_enabled")
def modes_of_exports_have_no_cache() -> None:
    from graftc.compat.dynamo import without_call_cache
    from graftc.compat.fake_tensors import FakeTensorMode

    with without_call_cache():
        assert not FakeTensorMode().cache_enabled


@covers("torch._dynamo.config.error_on_recompile")
def compiling_again_is_an_error() -> None:
    from graftc.compat.dynamo import failing_on_recompiles

    torch.compiler.reset()
    compiled = torch.compile(lambda x: x + 1, backend="eager", dynamic=False)
    compiled(torch.ones(2))
    try:
        with failing_on_recompiles():
            compiled(torch.ones(3))
    except torch._dynamo.exc.RecompileError:
        return
    finally:
        torch.compiler.reset()
    raise AssertionError("it was compiled again")


@covers("torch._check")
def conditions_are_checked() -> None:
    from graftc.compat.checks import check

    check(True)
    try:
        check(False)
    except RuntimeError:
        return
    raise AssertionError


@covers("torch._check_tensor_all")
def checks_of_values_are_told() -> None:
    from graftc.compat.checks import told_of_value_checks

    told: list[Any] = []
    original = torch._check_tensor_all
    with told_of_value_checks(told.append):
        torch._check_tensor_all(torch.tensor([True]), "text")
    assert told == ["text"] and torch._check_tensor_all is original


@covers("torch.fx.Node._erased")
def erased_nodes_are_known() -> None:
    from graftc.compat.graphs import is_erased

    graph = fx.Graph()
    node = graph.placeholder("x")
    assert not is_erased(node)
    graph.erase_node(node)
    assert is_erased(node)


@covers("torch._export.passes._node_metadata_hook._EMPTY_NN_MODULE_STACK_KEY('_empty_nn_module_stack')")
def nodes_outside_of_modules_say_so() -> None:
    from torch._export.passes._node_metadata_hook import _node_metadata_hook

    from graftc.compat.graphs import OUTSIDE_MODULES

    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = torch.ones(1)
    node = graph.call_function(torch.ops.aten.neg.default, (x,))
    _node_metadata_hook(node)
    assert [str(path).startswith(OUTSIDE_MODULES) for path, _ in node.meta["nn_module_stack"].values()] == [True]


@covers("torch.utils._python_dispatch.TorchDispatchMode", "torch.utils._python_dispatch._disable_current_modes")
def modes_are_suspended() -> None:
    from graftc.compat.modes import TorchDispatchMode, no_modes

    called: list[str] = []

    class Recording(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            called.append(func.name())
            return func(*args, **(kwargs or {}))

    with Recording():
        torch.ones(2)
        with no_modes():
            torch.zeros(2)
        torch.neg(torch.tensor(1))
    assert "aten::ones" in called and "aten::neg" in called and "aten::zeros" not in called


@covers(
    "torch._ops._ModeStackStateForPreDispatch",
    "torch._ops._ModeStackStateForPreDispatch._schema_check_mode",
    "torch._ops._mode_stack_state_for_pre_dispatch",
    "torch._C._dispatch_tls_is_dispatch_key_included",
)
def early_traces_are_suspended() -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    from graftc.compat.modes import no_modes

    stack: Any = torch._ops.mode_stack_state_for_pre_dispatch
    counts: list[int] = []

    def function(x: Tensor) -> Tensor:
        counts.append(stack().count())
        with no_modes():
            counts.append(stack().count())
            torch.zeros(2)
            stack()._schema_check_mode = "mine"
        assert stack()._schema_check_mode is None
        return x + 1

    targets = [node.target for node in make_fx(function, pre_dispatch=True)(torch.ones(2)).graph.nodes]
    assert counts == [1, 0] and torch.ops.aten.zeros.default not in targets and torch.ops.aten.add.Tensor in targets
    assert stack().count() == 0 and stack()._schema_check_mode is None
    with no_modes():
        stack()._schema_check_mode = "mine"  # goes to the stack of this thread, through what stands in for torch's own
        assert stack().count() == 1
    assert stack().count() == 0


@covers(
    "torch.overrides._pop_mode",
    "torch.overrides._push_mode",
    "torch._C._len_torch_function_stack",
)
def function_modes_are_suspended() -> None:
    from graftc.compat.modes import no_function_modes

    with torch.device("meta"):
        with no_function_modes():
            assert torch.ones(1).device.type == "cpu"
        assert torch.ones(1).device.type == "meta"


@covers(
    "torch.overrides._get_current_function_mode_stack",
    "torch.utils._python_dispatch._get_current_dispatch_mode_stack",
)
def modes_in_force_are_listed() -> None:
    from graftc.compat.fake_tensors import FakeTensorMode
    from graftc.compat.modes import modes_in_force

    with torch.device("meta"), FakeTensorMode() as mode:
        functions, operators = modes_in_force()
        assert functions.device.type == "meta" and operators is mode
    assert modes_in_force() == []
