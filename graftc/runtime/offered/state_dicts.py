"""State dicts, which contain trained, steering and updated tensors, but not the base, which is never written to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from graftc.compat.modules import transient_of
from graftc.compat.tensors import version_of
from graftc.compiler.capture.identity.fingerprint import Identity
from graftc.compiler.inspect.snapshot import adapter_tensors, adapter_tensors_now, adapter_values, slot_copies
from graftc.passes.core.weights.sharding import copy_whole, gathered, is_sharded, local
from graftc.passes.core.weights.source_lock import source_lock
from graftc.passes.core.weights.store import Store, plain
from graftc.runtime.artifact.checkpoint_record import RECORD, as_tensor, from_tensor, record_of, weights_of
from graftc.runtime.model.adapted import AdaptedRunner
from graftc.runtime.model.feature import Feature
from graftc.runtime.model.root import Root
from graftc.runtime.model.sharded import Meeting
from graftc.specs.errors.arguments import as_mapping, kind_of
from graftc.specs.errors.diagnostics import GraftError
from graftc.specs.errors.text import counted


class StateDicts(Feature):
    """Creates and loads a compiled model's state dicts."""

    def adapter_state_dict(self) -> dict[str, Tensor]:
        """Return all tensors that graftc added and that have to be saved, detached and by full name.

        These are parameters and controller state. Those of a bank with ``slots`` are copies from one moment. The
        tensors of a sharded model are gathered, so every process must call this method.
        """
        Meeting.of(self.runner.module, "adapter_state_dict")
        return dict(adapter_values(self.runner.store))

    def load_adapter_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy adapter tensors into the model; names and shapes must be those of `adapter_state_dict`.

        For a sharded model, every process must call this method, and receives its shards of the first process's
        tensors.

        Args:
            tensors: the adapter tensors, by name.

        Raises:
            GraftError: GC053 for missing, unknown or misshapen tensors, for values that the model's dtype cannot
                represent, and for tensors of rows other than those that this model has chosen; GC073 for an argument
                that is not a mapping of tensors. In all cases, nothing is copied.
        """
        as_mapping(tensors, "adapter tensors", Tensor)
        own = dict(adapter_tensors(self.runner.store))
        wrong = sorted(own.keys() ^ tensors.keys())
        wrong += [n for n in own.keys() & tensors.keys() if own[n].shape != tensors[n].shape]
        if wrong:
            raise GraftError("GC053", f"the adapter tensors do not match the model: {', '.join(wrong[:5])}")
        odd = sorted(n for n in own if not _holds(own[n], tensors[n]))
        if odd:
            kind = str(tensors[odd[0]].dtype).removeprefix("torch.")
            message = (
                f"{odd[0]} has {kind} values that {str(own[odd[0]].dtype).removeprefix('torch.')} cannot represent"
            )
            raise GraftError("GC053", message, details=[counted(len(odd), "tensor")])
        settled = self.runner.store.settled
        _require_settled(n for n in settled if not torch.equal(own[n].cpu(), tensors[n].cpu()))
        Meeting.of(self.runner.module, "load_adapter_state_dict")
        with torch.no_grad():
            for name in own:  # in the same order in every process
                copy_whole(own[name], tensors[name])

    def full_state_dict(self) -> dict[str, Tensor]:
        """Return all tensors, including the base's, by name, detached; tied ones only once, under their owner's name.

        The tensors of a sharded model are gathered, so every process must call this method.
        """
        Meeting.of(self.runner.module, "full_state_dict")
        kept = dict(adapter_tensors_now(self.runner.store))
        store = self.runner.store
        base = {name: tensor for name, tensor in store.base() if name not in kept and persists(store, name)}
        return {name: gathered(tensor) for name, tensor in (base | kept).items()}

    def record(self) -> Tensor:
        """Return a record of the spec, base and inputs to which a state dict belongs, as ``uint8[bytes]``."""
        values = self.runner.device.type != "meta"
        return as_tensor(record_of(self.runner.compilation, self.identity(), values=values))

    def identity(self) -> Identity:
        """Return the source model's identity, which is computed again after one of its tensors has been written to."""
        source = self.runner.compilation.source
        with source_lock():
            version = [(id(tensor), version_of(tensor)) for tensor in [*source.parameters(), *source.buffers()]]
        return self.runner.once("identity", self.runner.compilation.identity, of=version)

    def kept(self) -> set[str]:
        """Return the names of the tensors in a state dict."""
        trained = (name for name, parameter in self.runner.module.named_parameters() if parameter.requires_grad)
        return {plain(name) for name in [*(name for name, _ in adapter_tensors(self.runner.store)), *trained]}

    def stone(self, kept: set[str]) -> str | None:
        """Return the name of the base tensor that a state dict contains as an empty tensor; None if there is none.

        Because of it, loading the dict into a plain model fails, since no loader accepts another size.
        """
        inner = f"{getattr(self.runner, 'base_model_prefix', '')}."
        names = [name for name, t in self.runner.store.base() if isinstance(t, nn.Parameter) and t.numel()]
        names = [name for name in names if plain(name) not in kept]
        return next((name for name in names if name.startswith(inner)), names[0] if names else None)


def persists(store: Store, name: str) -> bool:
    """Return whether a tensor is included in its module's state dicts."""
    path, _, last = name.rpartition(".")
    return last not in transient_of(store.owner(path))


def keep_state(module: Root) -> None:
    """Register the hooks that keep the base out of a compiled model's state dicts."""
    module.register_state_dict_post_hook(_without_base)  # type: ignore[no-untyped-call]
    module.register_load_state_dict_pre_hook(_check_base)  # type: ignore[no-untyped-call]
    module.register_load_state_dict_post_hook(_miss_no_base)  # type: ignore[no-untyped-call]


def _of(module: Root) -> StateDicts:
    runner = module._graftc
    assert isinstance(runner, AdaptedRunner)
    return StateDicts(runner)


def _without_base(module: Root, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """Remove the base from a state dict, and replace slots that other threads may change by copies from one moment.

    Raises:
        GraftError: GC130 for a base that was sharded on the meta device, to be loaded from a state dict later.
    """
    states = _of(module)
    if any(is_sharded(tensor) and tensor.device.type == "meta" for tensor in module.parameters()):
        message = "the base was sharded without its weights, but a compiled model's state dict contains none of them"
        hint = "load the base in every process: fsdp_cpu_ram_efficient_loading: false in Accelerate's config"
        raise GraftError("GC130", message, hint=hint)
    kept = states.kept()
    for key in [key for key in state if key.startswith(prefix)]:
        name = plain(key.removeprefix(prefix))
        if name not in kept and name != RECORD:
            del state[key]
    for name, tensor in slot_copies(states.runner.store).items():
        key = prefix + name
        if key in state and state[key] is not states.runner.store.get(name):  # with ``keep_vars``, the tensor itself
            state[key] = tensor.detach()
    stone = states.stone(kept)
    if stone is not None:
        state[prefix + stone] = torch.empty(0)


def _require_settled(different: Iterable[str]) -> None:
    """Refuse other values of tensors that determined the graphs.

    Raises:
        GraftError: GC053 if any tensor has them.
    """
    if names := sorted(different):
        message = f"the graphs depend on other values of {', '.join(names[:5])}"
        hint = (
            "load the file that they come from with graftc.load(path), which compiles with them; the same seed and "
            "base give the same values only on the same kind of machine"
        )
        raise GraftError("GC053", message, hint=hint)


def _check_base(module: Root, state: dict[str, Any], prefix: str, *rest: Any) -> None:
    """Check a state dict's record and base tensors against this model's base, and remove the base tensors.

    The base tensors are not loaded, since the base is never written to.

    Raises:
        GraftError: GC087 for another base, GC053 if tensors that determined the graphs differ, GC073 for a base entry
            that is not a tensor.
    """
    states = _of(module)
    states.runner.derived["loading"] = prefix
    kept, store = states.kept(), states.runner.store
    _check_record(states, state.get(prefix + RECORD))
    own = {plain(name): tensor for name, tensor in store.tensors()}
    other: list[str] = []
    for key in [key for key in state if key.startswith(prefix)]:
        name = plain(key.removeprefix(prefix))
        if name in own and name in kept and isinstance(state[key], Tensor):
            # Copying would cast anyway; ``assign`` would set a dtype that the graphs cannot use.
            state[key] = state[key].to(own[name].dtype)
        if name in own and name not in kept and persists(store, name):
            given = state.pop(key)
            if not isinstance(given, Tensor):
                raise GraftError("GC073", f"{name} in the state dict is {kind_of(given)}", hint="pass tensors by name")
            if given.numel() and not _same(own[name], given):
                other.append(name)
    if other:
        message = f"the state dict belongs to another base: {', '.join(other[:5])}"
        hint = "compile its own base, or load adapter tensors into this one with load_adapter_state_dict()"
        raise GraftError("GC087", message, hint=hint, details=[f"{counted(len(other), 'tensor')} of another base"])
    settled = {name: state[prefix + name] for name in store.settled if prefix + name in state}
    _require_settled(name for name, given in settled.items() if not _same(store.get(name), given))


def _check_record(states: StateDicts, state: Any) -> None:
    if not isinstance(state, Tensor) or states.runner.device.type == "meta":
        return
    record = from_tensor(state, "the state dict")
    if record.base.weights not in (None, weights_of(states.identity())):
        message = f"the state dict belongs to another base, a {record.base.model} with other weights"
        hint = "compile its own base, or load its adapter tensors into this one with load_adapter_state_dict()"
        raise GraftError("GC087", message, hint=hint)


def _holds(own: Tensor, given: Tensor) -> bool:
    """Return whether a tensor's dtype can represent another tensor's values, which may be rounded if floating-point."""
    if not own.is_floating_point() or not given.is_floating_point():
        return own.dtype == given.dtype
    wider = torch.promote_types(own.dtype, given.dtype) != own.dtype
    return not wider or own.is_meta or bool((given.to(own.dtype).isfinite() | ~given.isfinite()).all())


def _same(own: Tensor, given: Any) -> bool:
    if not isinstance(given, Tensor) or own.shape != given.shape:
        return False
    mine, theirs = local(own.detach()), local(given.detach())
    if mine.device.type == "meta" or theirs.device.type == "meta":
        return False
    return torch.equal(mine, theirs.to(mine.device, mine.dtype))


def _miss_no_base(module: Root, keys: Any) -> None:
    """Remove base tensors from the missing keys, since state dicts need not contain them."""
    prefix, kept = _of(module).runner.derived.get("loading", ""), _of(module).kept()
    missing: list[str] = keys.missing_keys
    missing[:] = [key for key in missing if not key.startswith(prefix) or plain(key.removeprefix(prefix)) in kept]
