"""What graftc relies on behind private names of libraries, on tiny examples: a table of probes and names.

A probe calls the functions of `graftc.compat` for one subject. It has to fail, in whatever way, when one of its names
is gone from the library, so it imports what it calls itself.
"""

from __future__ import annotations

import copy
import inspect
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn

Probe = Callable[[], None]
PROBES: dict[str, Probe] = {}
"""The probe of each private name. ``f('text')`` stands for a text in the code of a function, or in a text."""


def covers(*names: str) -> Callable[[Probe], Probe]:
    def register(probe: Probe) -> Probe:
        PROBES.update(dict.fromkeys(names, probe))
        return probe

    return register


# --- torch -------------------------------------------------------------------------------------------------


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


@covers("torch._ops.OpOverload._schema")
def operators_have_schemas() -> None:
    from graftc.compat.operators import schema_of

    aten = torch.ops.aten
    add, in_place, view = map(schema_of, (aten.addmm.default, aten.add_.Tensor, aten.view.default))
    assert [argument.name for argument in add.arguments] == ["self", "mat1", "mat2", "beta", "alpha"]
    assert isinstance(add.arguments[0].type, torch.TensorType) and add.arguments[3].default_value == 1
    assert add.arguments[3].kwarg_only and not add.arguments[0].kwarg_only
    assert in_place.is_mutable and not add.is_mutable
    assert in_place.arguments[0].is_write and in_place.arguments[0].alias_info.is_write
    assert view.returns[0].alias_info is not None and add.returns[0].alias_info is None
    assert [str(result.type) for result in schema_of(aten.unbind.int).returns] == ["List[Tensor]"]


@covers("torch._ops.HigherOrderOperator", "torch._ops.OperatorBase", "torch._ops.OpOverloadPacket")
def operators_have_kinds() -> None:
    from torch._higher_order_ops import cond

    from graftc.compat.operators import HigherOrderOperator, OperatorBase, OpOverloadPacket

    one = torch.ops.aten.add.Tensor
    assert isinstance(torch.ops.higher_order.cond, HigherOrderOperator) and callable(cond)
    assert isinstance(one, OperatorBase) and not isinstance(one, HigherOrderOperator)
    assert isinstance(one.overloadpacket, OpOverloadPacket) and not isinstance(one, OpOverloadPacket)


def _traced(function: Callable[..., Any], *inputs: Tensor) -> list[Any]:
    from torch.fx.experimental.proxy_tensor import make_fx

    return [node.target for node in make_fx(function)(*inputs).graph.nodes]


@covers("torch.ops.aten._to_copy", "torch.ops.aten._unsafe_view")
def graphs_have_operators_of_these_names() -> None:
    from graftc.compat.operators import TO_COPY, UNSAFE_VIEW

    assert TO_COPY in _traced(lambda x: x.to(torch.float64), torch.ones(2))
    assert UNSAFE_VIEW in _traced(lambda x, w: x @ w, torch.ones(2, 3, 4), torch.ones(4, 5))


@covers("torch.ops.aten._local_scalar_dense")
def reading_a_value_is_an_operator() -> None:
    from graftc.compat.modes import TorchDispatchMode
    from graftc.compat.operators import LOCAL_SCALAR

    called: list[Any] = []

    class Recording(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            called.append(func)
            return func(*args, **(kwargs or {}))

    with Recording():
        assert torch.ones(1).item() == 1
    assert LOCAL_SCALAR in called


@covers("torch.ops.aten._is_all_true", "torch.ops.aten._assert_scalar", "torch.ops.aten._assert_tensor_metadata")
def checks_of_values_are_operators() -> None:
    from graftc.compat.operators import ASSERT_SCALAR, ASSERT_TENSOR_METADATA, IS_ALL_TRUE

    class Checking(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            torch._check_tensor_all(x > 0, "text")
            return x.to(torch.float64)

    graph = torch.export.export(Checking(), (torch.ones(2),), strict=False).graph
    assert graph.find_nodes(op="call_function", target=ASSERT_TENSOR_METADATA)
    (checked,) = graph.find_nodes(op="call_function", target=IS_ALL_TRUE)
    below = {checked}
    for node in graph.nodes:  # in order, so that all users of a node come behind it
        below |= {node} if below.intersection(node.all_input_nodes) else set()
    assert below.intersection(graph.find_nodes(op="call_function", target=ASSERT_SCALAR))


@covers("torch.ops.aten._grouped_mm", "torch.ops.aten._safe_softmax")
def operators_that_compute() -> None:
    from graftc.compat.operators import GROUPED_MM, SAFE_SOFTMAX

    x, w = torch.ones(3, 8, dtype=torch.bfloat16), torch.ones(2, 8, 8, dtype=torch.bfloat16)
    ends = torch.tensor([1, 3], dtype=torch.int32)
    assert torch.equal(GROUPED_MM(x, w, ends), torch.full((3, 8), 8.0, dtype=torch.bfloat16))
    scores = torch.tensor([[0.0, 0.0], [-torch.inf, -torch.inf]])
    assert torch.equal(SAFE_SOFTMAX(scores, -1), torch.tensor([[0.5, 0.5], [0.0, 0.0]]))


@covers(
    "torch.ops.aten._scaled_dot_product_flash_attention_for_cpu",
    "torch.ops.aten._scaled_dot_product_fused_attention_overrideable",
)
def kernels_of_attention_are_operators() -> None:
    from graftc.compat.operators import CPU_FLASH_ATTENTION, OTHER_FUSED_ATTENTION

    q = torch.ones(1, 1, 2, 8)
    assert torch.equal(CPU_FLASH_ATTENTION(q, q, q)[0], q)
    assert str(OTHER_FUSED_ATTENTION.default).endswith("overrideable.default")


@covers("torch.Tensor._version")
def writes_are_counted() -> None:
    from graftc.compat.tensors import version_of

    tensor = torch.zeros(2)
    before = version_of(tensor)
    tensor.add_(1)
    assert (before, version_of(tensor), version_of(tensor.detach())) == (0, 1, 1)
    with torch.inference_mode():
        assert version_of(torch.zeros(2).add_(1)) == 0


@covers("torch.Tensor._base")
def views_know_what_they_are_views_of() -> None:
    from graftc.compat.tensors import is_view

    tensor = torch.zeros(2)
    assert is_view(tensor[:1]) and not is_view(tensor) and not is_view(tensor.clone())


@covers("torch.UntypedStorage._cdata")
def storages_are_told_apart() -> None:
    from graftc.compat.fake_tensors import FakeTensorMode
    from graftc.compat.tensors import storage_key, storage_sizes

    with FakeTensorMode():
        one, other = torch.zeros(2), torch.zeros(2)
        assert storage_key(one) == storage_key(one[:1]) != storage_key(other)
        assert sorted(storage_sizes([one, one[1:], other]).values()) == [8, 8]


@covers("torch.Tensor._make_wrapper_subclass")
def tensors_without_storage_have_a_class() -> None:
    from graftc.compat.tensors import wrapper

    class Empty(Tensor):
        @classmethod
        def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return torch.ones(int(func is torch.ops.aten.neg.default))

    empty = wrapper(Empty, (2, 3), torch.float16, torch.device("cpu"), strides=(1, 2), requires_grad=True)
    assert type(empty) is Empty and empty.shape == (2, 3) and empty.stride() == (1, 2)
    assert empty.dtype == torch.float16 and empty.requires_grad and torch.neg(empty).shape == (1,)


@covers("torch._C._functorch.peek_interpreter_stack")
def transforms_are_noticed() -> None:
    from graftc.compat.autograd import is_transformed

    asked = []
    torch.func.vmap(lambda x: asked.append(is_transformed()) or x)(torch.ones(2))
    assert asked == [True] and not is_transformed()


@covers("torch.autograd.forward_ad._current_level")
def forward_gradients_are_noticed() -> None:
    from graftc.compat.autograd import has_forward_gradients

    assert not has_forward_gradients()
    with torch.autograd.forward_ad.dual_level():
        assert has_forward_gradients()


@covers("torch.autograd.Variable._execution_engine")
def functions_run_behind_a_backward_pass() -> None:
    from graftc.compat.autograd import after_backward

    order: list[str] = []
    x = torch.ones(2, requires_grad=True)
    y = x * 2
    y.register_hook(lambda _: after_backward(lambda: order.append("behind")))
    x.register_hook(lambda _: order.append("within"))
    y.sum().backward()
    assert order == ["within", "behind"]


@covers("torch._C._autograd._top_saved_tensors_default_hooks")
def hooks_of_saved_tensors_are_read() -> None:
    from graftc.compat.autograd import saved_tensor_hooks

    def pack(tensor: Tensor) -> Tensor:
        return tensor

    assert saved_tensor_hooks() is None
    with torch.autograd.graph.saved_tensors_hooks(pack, Tensor.clone):
        assert saved_tensor_hooks() == (pack, Tensor.clone)


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


# --- modes -------------------------------------------------------------------------------------------------


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


# --- modules -----------------------------------------------------------------------------------------------


@covers(*(f"torch.nn.Module.{name}" for name in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")))
def modules_keep_tables() -> None:
    from graftc.compat import modules

    module = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 2, bias=False))
    norm, linear = modules.children_of(module).values()
    assert norm is module[0] and modules.parameters_of(linear) == {"weight": linear.weight, "bias": None}
    assert modules.buffers_of(norm)["running_mean"] is norm.running_mean
    norm.register_buffer("aside", torch.ones(1), persistent=False)
    assert modules.transient_of(norm) == {"aside"}
    modules.transient_of(norm).add("running_var")
    modules.buffers_of(norm)["running_mean"] = replaced = torch.ones(2)
    modules.children_of(module)["2"] = nn.ReLU()
    assert norm.running_mean is replaced and len(module) == 3 and "0.running_var" not in module.state_dict()
    tables = {name: vars(linear)[name] for name in (modules.PARAMETERS, modules.BUFFERS, modules.CHILDREN)}
    assert list(tables.values()) == [linear._parameters, {}, {}]


@covers("torch.nn.Module._compiled_call_impl")
def compiled_modules_are_known() -> None:
    from graftc.compat.modules import is_compiled

    module = nn.Linear(1, 1)
    assert not is_compiled(module)
    module.compile(backend="eager")
    assert is_compiled(module)


@covers("torch.nn.Module._get_name")
def modules_have_printed_names() -> None:
    from graftc.compat.modules import printed_as, printed_kind

    @printed_as(lambda module: module.text)
    class Named(nn.Module):
        text = "Other"

    assert printed_kind(Named()) == "Other" and repr(Named()) == "Other()" and printed_kind(nn.ReLU()) == "ReLU"
    assert nn.Module._get_name(Named()) == "Named"


@covers("torch.nn.Module._apply")
def conversions_go_through_one_method() -> None:
    from graftc.compat.modules import applied_by

    dtypes: list[torch.dtype] = []

    def apply(module: Any, fn: Any, convert: Any) -> Any:
        dtypes.append(fn(torch.ones(1)).dtype)
        return convert() if len(dtypes) < 3 else module

    decorated = applied_by(apply)(type("Decorated", (nn.Linear,), {}))
    module = nn.Sequential(decorated(1, 1)).double()
    assert module.half()[0].weight.dtype == torch.float16
    assert module.to(torch.float32)[0].weight.dtype == torch.float16 and len(dtypes) == 3


@covers("torch.nn.Module._call_impl", "torch.nn.Module._wrapped_call_impl")
def calls_run_these_methods() -> None:
    from graftc.compat.modules import RUN_BY_CALLS

    run, wrapped = (getattr(nn.Module, name) for name in RUN_BY_CALLS)
    assert nn.Module.__call__ is wrapped and RUN_BY_CALLS[0] in wrapped.__code__.co_names and callable(run)


@covers("torch.nn.BatchNorm1d._version")
def classes_say_the_form_of_their_state() -> None:
    from graftc.compat.modules import STORED_VERSION

    module = nn.BatchNorm1d(1)
    assert module.state_dict()._metadata[""]["version"] == getattr(module, STORED_VERSION) == 2


HOOKS = ("forward_hooks", "forward_pre_hooks", "backward_hooks", "backward_pre_hooks")


def _with_hooks() -> nn.Module:
    """Return a module with a hook of each kind, which is a text that says so."""
    module = nn.Linear(1, 1)
    hooks: dict[str, Any] = {name: _Hook(name) for name in HOOKS}
    module.register_forward_pre_hook(hooks["forward_pre_hooks"])
    module.register_forward_hook(hooks["forward_hooks"], with_kwargs=True, always_call=True)
    module.register_full_backward_hook(hooks["backward_hooks"])
    module.register_full_backward_pre_hook(hooks["backward_pre_hooks"])
    return module


class _Hook(str):
    __slots__ = ()

    def __call__(self, *_: Any, **__: Any) -> None: ...


@covers(*(f"torch.nn.Module._{name}" for name in HOOKS))
def modules_keep_tables_of_hooks() -> None:
    from graftc.compat import hooks

    module = _with_hooks()
    assert [*hooks.forward_hooks(module).values()] == ["forward_pre_hooks", "forward_hooks"]
    assert [*hooks.backward_hooks(module).values()] == ["backward_pre_hooks", "backward_hooks"]
    for names, kept in ((hooks.FORWARD, HOOKS[:2]), (hooks.BACKWARD, HOOKS[2:])):
        assert [*(hook for name in names for hook in vars(module)[name].values())] == [*kept]


@covers(*(f"torch.nn.Module._forward_{name}" for name in ("hooks_with_kwargs", "pre_hooks_with_kwargs")))
def hooks_say_what_they_take() -> None:
    from graftc.compat import hooks

    module = _with_hooks()
    assert hooks.hooks_before(module) == [("forward_pre_hooks", False)]
    assert hooks.hooks_after(module) == [("forward_hooks", True)]


@covers("torch.nn.Module._forward_hooks_always_called")
def tables_around_a_call_are_all_known() -> None:
    from graftc.compat import hooks

    module = _with_hooks()
    filled = {name for name, table in vars(module).items() if "_hooks" in name and table}
    assert filled <= {*hooks.CALL_HOOKS} <= vars(module).keys() and len(filled) == 6
    emptied = hooks.without_hooks(vars(module))
    assert {*hooks.CALL_HOOKS} <= emptied.keys() and not any(emptied.values())
    assert all(type(table) is type(vars(module)[name]) for name, table in emptied.items())


@covers(*(f"torch.nn.modules.module._global_{name}" for name in HOOKS), "torch.nn.modules.module._has_any_global_hook")
def hooks_on_all_modules_are_known() -> None:
    from graftc.compat import hooks

    assert not hooks.has_global_hooks()
    kinds = {"forward_pre": "forward_pre", "forward": "forward", "full_backward": "backward"}
    kinds["full_backward_pre"] = "backward_pre"
    for register, kind in kinds.items():
        handle = getattr(nn.modules.module, f"register_module_{register}_hook")(hook := _Hook(kind))
        try:
            assert hooks.has_global_hooks()
            tables = hooks.global_hooks()
            assert [name for name, table in tables.items() if hook in table.values()] == [f"global_{kind}_hooks"]
            assert [(hook, False)] == hooks.hooks_before(nn.ReLU()) or kind != "forward_pre"
            assert [(hook, False)] == hooks.hooks_after(nn.ReLU()) or kind != "forward"
        finally:
            handle.remove()


@covers("torch.optim.Optimizer._optimizer_step_pre_hooks")
def wrappers_of_optimisers_are_told_apart() -> None:
    from graftc.compat.hooks import has_step_hooks

    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))])
    bare = torch.optim.SGD.__new__(type("Wrapper", (torch.optim.SGD,), {}))
    assert has_step_hooks(optimizer) and not has_step_hooks(bare)
    optimizer.register_step_pre_hook(_Hook("hook"))
    assert [*optimizer._optimizer_step_pre_hooks.values()] == ["hook"]


@covers(
    "torch.distributed.algorithms._checkpoint.checkpoint_wrapper.ActivationWrapper.__init__('_checkpoint_wrapped_module')",
    "torch.distributed.fsdp._common_utils.FSDP_WRAPPED_MODULE('_fsdp_wrapped_module')",
    "torch._dynamo.eval_frame.OptimizedModule.__init__('_orig_mod')",
)
def wrappers_hold_modules_under_known_names() -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
    from torch.distributed.fsdp import _common_utils

    from graftc.compat.fsdp import WRAPPED

    wrappers = (checkpoint_wrapper(nn.ReLU()), torch.compile(nn.ReLU(), backend="eager"))
    names = [next(name for name, _ in wrapper.named_children()) for wrapper in wrappers]
    assert (names[0], _common_utils.FSDP_WRAPPED_MODULE, names[1]) == WRAPPED


@contextmanager
def _processes() -> Iterator[Any]:
    """Run the block in a process group of this process alone, and yield its store."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        yield store
    finally:
        torch.distributed.destroy_process_group()


@covers(
    "torch.distributed.fsdp.FSDPModule._get_fsdp_state",
    "torch.distributed.fsdp._fully_shard._fsdp_state.FSDPState._mp_policy",
)
def units_know_what_they_compute_in() -> None:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    from graftc.compat.fsdp import computing_dtype

    with _processes():
        unit = fully_shard(nn.Linear(2, 2), mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
        assert computing_dtype(unit) == torch.bfloat16
        assert computing_dtype(fully_shard(nn.Linear(2, 2))) is None
    assert computing_dtype(nn.Linear(2, 2)) is None


@covers("torch.distributed.distributed_c10d._get_default_store")
def processes_share_a_store() -> None:
    from graftc.compat.fsdp import process_store

    with _processes():
        process_store().set("key", "value")
        assert process_store().get("key") == b"value"


# --- transformers ------------------------------------------------------------------------------------------


def _gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"vocab_size": 8, "n_positions": 8, "n_embd": 4, "n_layer": 1, "n_head": 1}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=1, eos_token_id=None, pad_token_id=0)).eval()


@covers("transformers.PreTrainedConfig._name_or_path")
def configs_say_where_they_are_from() -> None:
    from transformers import AutoConfig

    from graftc.compat.transformers import ABOUT_ORIGIN, path_of

    with tempfile.TemporaryDirectory() as folder:
        _gpt2().config.save_pretrained(folder)
        config = AutoConfig.from_pretrained(folder)
        assert path_of(config) == folder
    assert path_of(object()) is None and "_name_or_path" in vars(config).keys() & ABOUT_ORIGIN


@covers("transformers.PreTrainedConfig._remove_keys_not_serialized('_commit_hash')")
def commits_are_recorded_and_not_saved() -> None:
    from graftc.compat.transformers import ABOUT_ORIGIN, commit_of, set_commit

    config = _gpt2().config
    before, text = {*vars(config)}, config.to_json_string()
    assert commit_of(config) is None
    set_commit(config, "0123")
    assert commit_of(config) == "0123" and config.to_json_string() == text and config.to_dict().keys() < {*dir(config)}
    assert vars(config).keys() - before <= ABOUT_ORIGIN


@covers("transformers.GenerationConfig._original_object_hash")
def generation_configs_keep_a_hash() -> None:
    from transformers import GenerationConfig

    from graftc.compat.transformers import ABOUT_ORIGIN

    with tempfile.TemporaryDirectory() as folder:
        GenerationConfig(max_length=4).save_pretrained(folder)
        read = vars(GenerationConfig.from_pretrained(folder))
    assert read.keys() - vars(GenerationConfig()).keys() <= ABOUT_ORIGIN
    assert "_original_object_hash" in read.keys() & ABOUT_ORIGIN


@covers("transformers.PreTrainedModel._output_capturing_hooks_installed")
def models_remember_that_they_have_run() -> None:
    from graftc.compat.transformers import ABOUT_ORIGIN

    model = _gpt2()
    parts = [*model.modules()]
    before = [{*vars(part)} for part in parts]
    model(torch.ones(1, 2, dtype=torch.long), output_hidden_states=True)
    new = {name for part, names in zip(parts, before, strict=True) for name in vars(part).keys() - names}
    assert "_output_capturing_hooks_installed" in new and new <= ABOUT_ORIGIN


@covers("transformers.PreTrainedConfig._attn_implementation")
def configs_choose_an_attention() -> None:
    from transformers import GPT2Config

    from graftc.compat.transformers import attention_of

    assert attention_of(GPT2Config(attn_implementation="eager")) == "eager"
    assert "flash" in attention_of(GPT2Config(attn_implementation="flash_attention_2"))


@covers("transformers.quantizers.base._assign_is_quantized('_is_quantized')")
def quantised_models_are_marked() -> None:
    from transformers.quantizers.base import HfQuantizer

    from graftc.compat.transformers import not_quantised

    class Plain(HfQuantizer):
        requires_calibration = False

        def is_serializable(self) -> bool:
            return False

        @property
        def is_trainable(self) -> bool:
            return False

        def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
            return model

    model = _gpt2()
    before = {*vars(model.config)}
    Plain.__new__(Plain)
    quantizer = Plain.__new__(Plain)
    quantizer.quantization_config, quantizer.pre_quantized = None, False
    quantizer.postprocess_model(model)
    del model.config.quantization_config
    assert {*vars(model.config)} > before
    not_quantised(model.config)
    assert {*vars(model.config)} == before


@covers("transformers.PreTrainedModel._initialize_weights('_is_hf_initialized')")
def modules_may_be_left_as_they_are() -> None:
    from graftc.compat.transformers import leave_as_it_is

    model = _gpt2()
    for part in model.modules():
        vars(part).pop("_is_hf_initialized", None)
    model.transformer.h[0].mlp.c_fc.weight.data.fill_(3)
    model.transformer.h[0].mlp.c_proj.weight.data.fill_(3)
    leave_as_it_is(model.transformer.h[0].mlp.c_fc)
    model.init_weights()
    assert bool((model.transformer.h[0].mlp.c_fc.weight == 3).all())
    assert not bool((model.transformer.h[0].mlp.c_proj.weight == 3).any())


@covers("transformers.exporters.utils._PATCHES")
def patches_of_exports_are_listed() -> None:
    from transformers.exporters import exporter_dynamo, utils

    from graftc.compat.transformers import export_patches

    patches = export_patches()
    assert patches is not None and exporter_dynamo is not None
    before, applied = patches["dynamo"], []
    assert len(before) > 10 and all(isinstance(patch[0], str) for patch in before)
    patches["dynamo"] = [("torch.nn.functional", "relu", lambda original: applied.append(original) or original)]
    try:
        with utils.apply_patches("dynamo"):
            assert applied == [nn.functional.relu]
    finally:
        patches["dynamo"] = before


@covers("transformers.models.auto.auto_factory._BaseAutoModelClass", "transformers.AutoModel._model_mapping")
def auto_classes_have_classes_for_configs() -> None:
    from transformers import AutoModel, AutoModelForCausalLM, GPT2LMHeadModel, GPT2Model

    from graftc.compat.transformers import auto_classes, loaded_by

    assert {AutoModel, AutoModelForCausalLM} <= {*auto_classes()}
    model = _gpt2()
    assert loaded_by(AutoModel, model.config) == (GPT2Model,)
    assert loaded_by(AutoModelForCausalLM, model.config) == (GPT2LMHeadModel,)
    assert loaded_by(AutoModel, None) == (None,)


@covers("transformers.models.auto.auto_factory._BaseAutoModelClass.from_pretrained('_from_auto')")
def auto_classes_add_options() -> None:
    from transformers import AutoModel
    from transformers.models.auto import auto_factory

    from graftc.compat.transformers import LOADING_OPTIONS, loaded_by

    model, given = _gpt2(), dict[str, Any]()
    (cls,) = loaded_by(AutoModel, model.config)

    class Loader(cls):  # type: ignore[misc, valid-type]
        @classmethod
        def from_pretrained(cls, *args: Any, **options: Any) -> None:
            given.update(options)

    class Auto(auto_factory._BaseAutoModelClass):
        _model_mapping = {type(model.config): Loader}  # noqa: RUF012

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        Auto.from_pretrained(folder, config=model.config)
    own = {name for name in given if name.startswith("_")}
    assert "_from_auto" in own and own <= {*LOADING_OPTIONS}


@covers("transformers.GenerationMixin._prepare_cache_for_generation('_is_user_defined')")
def a_cache_of_the_caller_is_marked() -> None:
    from transformers import DynamicCache

    from graftc.compat.transformers import given_by_caller

    caches = DynamicCache(), DynamicCache()
    model = _gpt2()
    name = next(name for name in inspect.signature(model.forward).parameters if name in ("cache", "past_key_values"))
    model.generate(torch.ones(1, 2, dtype=torch.long), **{name: caches[0]}, max_new_tokens=1)
    given_by_caller(caches[1])
    assert vars(caches[0]).keys() == vars(caches[1]).keys() > vars(DynamicCache()).keys()


@covers(
    *(f"transformers.GenerationMixin._{name}" for name in ("expand_inputs_for_generation", "get_stopping_criteria")),
    *(
        f"transformers.GenerationMixin._{name}"
        for name in ("valid_auto_compile_criteria", "prepare_cache_for_generation")
    ),
)
def the_loop_has_steps() -> None:
    from graftc.compat.transformers import loop_steps

    taken: dict[str, Any] = {}

    def rows(model: Any, expand: Any, expand_size: int, is_encoder_decoder: bool, input_ids: Any, **given: Any) -> Any:
        taken["rows"] = expand_size, tuple(input_ids.shape)
        return expand(expand_size, is_encoder_decoder, input_ids, **given)

    def criteria(model: Any, ending: Any, generation_config: Any, *args: Any, **kwargs: Any) -> Any:
        taken["criteria"] = generation_config.max_length
        return ending(generation_config, *args, **kwargs)

    def compiles(model: Any, compiling: Any, *args: Any) -> bool:
        taken["compiles"] = compiling(*args)
        return False

    def cache(
        model: Any, prepare: Any, generation_config: Any, model_kwargs: Any, mode: Any, rows: int, *_: Any
    ) -> None:
        taken["cache"] = rows, generation_config.cache_implementation
        prepare(generation_config, model_kwargs, mode, rows, *_)

    model = _gpt2()
    front = loop_steps(rows=rows, criteria=criteria, compiles=compiles, cache=cache)(type("Front", (), {}))
    model.__class__ = type("GPT2", (front, type(model)), {})
    ids = torch.ones(1, 2, dtype=torch.long)
    both = model.generate(ids, max_new_tokens=2, num_return_sequences=2, do_sample=True)
    assert both.shape == (2, 4) and bool((both[:, :2] == 1).all())
    assert taken == {"rows": (2, (1, 2)), "criteria": 4, "compiles": False, "cache": (1, None)}


# --- peft and TRL ------------------------------------------------------------------------------------------


@covers("peft.utils.transformers_weight_conversion._MOE_TARGET_MODULE_MAPPING")
def peft_knows_merged_projections() -> None:
    from graftc.compat.peft import merged_projections

    experts = {"w1": "gate_up_proj", "w2": "down_proj", "w3": "gate_up_proj"}
    assert any(experts.items() <= table.items() for table in merged_projections())


_ADD = "trl.trainer.utils.add_fused_lm_head"


@covers(
    f"{_ADD}('outputs')",
    f"{_ADD}('temperature')",
    f"{_ADD}('cast_lm_head_to_fp32')",
    f"{_ADD}('fused_lm_head')",
    "trl.trainer.utils.FusedCausalLMOutput",
)
def trl_sets_a_forward() -> None:
    from trl.trainer import utils

    from graftc.compat.trl import fused_forward

    model = _gpt2()
    assert fused_forward(model.forward) is None
    for temperature in (1.0, 0.5):
        other = copy.deepcopy(model)
        utils.add_fused_lm_head(other, temperature, False, ("log_probs", "entropy"))
        fused = fused_forward(other.forward)
        assert fused is not None and fused.fields == ("log_probs", "entropy") and fused.plain == (temperature == 1)
        assert fused.output(loss=1).loss == 1
    utils.add_fused_lm_head(model, cast_lm_head_to_fp32=True)
    fused = fused_forward(model.forward)
    assert fused is not None and not fused.plain
