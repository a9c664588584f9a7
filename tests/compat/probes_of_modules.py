"""Probes: modules, hooks, optimisers, and wrappers of modules."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from tests.compat.table import covers


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
