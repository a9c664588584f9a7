"""A call's choices among the adaptations of banks, one per row of its batch, and where each row's aLoRAs begin."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from graftc.compiler.capture.interface import COUNT, dtype_of
from graftc.compiler.capture.isolation import is_traced
from graftc.compiler.compilation import Compilation
from graftc.passes.core.build.batch import BATCH
from graftc.runtime.invocations import positions_of, starts_in_call
from graftc.runtime.slots import Slots
from graftc.specs.base import Invoked
from graftc.specs.compose import Bank, CompositionSpec, Parallel
from graftc.specs.errors.diagnostics import GraftError, nearest


def with_choices(
    compilation: Compilation, present: Mapping[str, Any], chosen: Mapping[str, Any], *, adapted: bool = True
) -> dict[str, Any]:
    """Return a call's tensors together with those that choose among adaptations, or where they act.

    Args:
        compilation: the Compilation that has the banks.
        present: the source model's inputs, by name.
        chosen: bank inputs as the caller passed them, as tensors or lists of names and indices, and the positions
            from which aLoRAs act.
        adapted: whether the adaptations are used; if not, aLoRAs act nowhere.

    Raises:
        GraftError: GC038 for a choice that does not match its bank or the batch; GC140 if a call continues a cache that
            may contain an aLoRA's invocation.
    """
    tensors = repeated(compilation, present)
    for name, control in compilation.controls.items():
        if isinstance(control, Invoked):
            tensors |= starts_in_call(control, name, tensors, chosen.get(name), adapted=adapted)
        elif isinstance(control, Bank) and chosen.get(name) is not None:
            tensors |= rows_for(compilation, {name: chosen[name]}, *_rows(compilation, tensors))
    return tensors


@contextmanager
def held(compilation: Compilation, chosen: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Run a call while the adapters that it chooses stay in their slots.

    Choices on another device than the CPU are not known here, so nothing is held for them.

    Args:
        compilation: the Compilation that has the banks.
        chosen: bank inputs as the caller passed them.

    Yields:
        The choices, with the numbers of slots in the place of names.

    Raises:
        GraftError: GC038 for a slot that does not exist or is empty, GC190 if a slot is being written for too long.
    """
    numbers = dict(chosen)
    with ExitStack() as stack:
        banks = [control for control in compilation.controls.values() if isinstance(control, Bank)]
        for bank in {id(bank): bank for bank in banks}.values():
            slots = Slots.of(bank, compilation.store)
            if slots is None:
                continue
            ids, weights = chosen.get(bank.ids), chosen.get(bank.mixture)
            if ids is not None and not isinstance(ids, Tensor):
                numbers[bank.ids] = stack.enter_context(slots.use([ids] if isinstance(ids, str | int) else list(ids)))
            elif ids is None and weights is None:
                stack.enter_context(slots.use([slots.active]))
            else:
                stack.enter_context(slots.use(_numbers(bank, ids, weights)))
        yield numbers


def _numbers(bank: Bank, ids: Tensor | None, weights: Any) -> list[int]:
    """Return the slots that ids or weights choose; none if they are elsewhere, or if they do not fit the bank."""
    known = ids if ids is not None else weights if isinstance(weights, Tensor) else torch.tensor(weights)
    if known.device.type != "cpu" or known.is_floating_point() != (ids is None) or not known.numel():
        return []
    if ids is None:
        if known.shape[-1:] != (bank.size,):
            return []
        known = known.reshape(-1, bank.size).any(0).nonzero()
    numbers = {int(number) for number in known.flatten().tolist()}
    return [number for number in numbers if 0 <= number < bank.size]


def repeated(compilation: Compilation, present: Mapping[str, Any]) -> dict[str, Any]:
    """Return a call's tensors, without bank inputs, with one copy of the batch for each adaptation run in parallel.

    Raises:
        GraftError: GC038 if there is no batch whose rows could be repeated.
    """
    tensors = dict(present)
    for name, composition in compilation.controls.items():
        if isinstance(composition, Parallel):
            tensors = _repeated(compilation, tensors, name, composition)
    return tensors


def rows_for(compilation: Compilation, chosen: Mapping[str, Any], rows: int, device: torch.device) -> dict[str, Tensor]:
    """Return bank inputs, as the caller passed them, expanded to one entry per row.

    Args:
        compilation: the Compilation that has the banks.
        chosen: inputs by name, as for `with_choices`; None counts as absent.
        rows: the number of rows in the batch.
        device: the device for choices that are passed as a list.

    Raises:
        GraftError: GC038 for a choice that does not match its bank or the batch.
    """
    expanded: dict[str, Tensor] = {}
    for name, composition in compilation.controls.items():
        if isinstance(composition, Invoked) and chosen.get(name) is not None:
            expanded[name] = positions_of(name, chosen[name], rows, device)
        if not isinstance(composition, Bank) or chosen.get(name) is None:
            continue
        if name == composition.mixture:
            weights = _weights(composition, name, chosen[name], rows, device)
            expanded[name] = weights.to(dtype_of(compilation.model))
        else:
            expanded[name] = _ids(compilation, composition, name, chosen[name], rows, device)
    return expanded


def _batched(compilation: Compilation, present: Mapping[str, Any]) -> list[str]:
    """Return the names of a call's tensors whose first axis is the batch."""
    known = {spec.name: spec.shape[:1] == (BATCH,) for spec in compilation.program_as_run("train", "base").inputs}
    sure = [n for n, v in present.items() if known.get(n) and isinstance(v, Tensor)]
    rows = present[sure[0]].shape[0] if sure else None
    alike = [n for n, v in present.items() if n not in known and n != COUNT and isinstance(v, Tensor) and v.dim()]
    return sure + [name for name in alike if present[name].shape[0] == rows]


def _rows(compilation: Compilation, present: Mapping[str, Any]) -> tuple[int, torch.device]:
    named = _batched(compilation, present)
    if not named:
        raise GraftError("GC038", "the call has no batched tensor, so there are no rows to assign to adaptations")
    return present[named[0]].shape[0], present[named[0]].device


def _repeated(
    compilation: Compilation, present: Mapping[str, Any], name: str, composition: CompositionSpec
) -> dict[str, Any]:
    """Repeat the whole batch once for each adaptation."""
    count = len(composition.members)
    rows, device = _rows(compilation, present)
    batched = set(_batched(compilation, present))
    if COUNT in present:  # the loss stays the mean over all rows
        present = {**present, COUNT: present[COUNT] * count}
    many = {n: v.repeat(count, *(1,) * (v.dim() - 1)) if n in batched else v for n, v in present.items()}
    return {**many, name: torch.arange(count, device=device).repeat_interleave(rows)}


def _ids(compilation: Compilation, bank: Bank, name: str, given: Any, rows: int, device: torch.device) -> Tensor:
    if not isinstance(given, Tensor):
        listed = [given] if isinstance(given, str | int) else list(given)
        look_up = slot_of if bank.slots is None else _slot_now
        given = torch.tensor([look_up(compilation, bank, item) for item in listed], device=device)
    elif not is_traced() and given.device.type == "cpu" and given.numel() and given.dtype != torch.bool:
        low, high = int(given.min()), int(given.max())
        if low < 0 or high >= bank.size:
            bad = low if low < 0 else high
            raise GraftError("GC038", f"{name} contains {bad}, but {bank.name!r} has slots 0 to {bank.size - 1}")
    if given.dim() != 1 or given.is_floating_point() or given.dtype == torch.bool or given.shape[0] not in (1, rows):
        message = f"{name} is {str(given.dtype).removeprefix('torch.')}{list(given.shape)}"
        raise GraftError("GC038", message, hint=f"pass one integer for each of the {rows} rows")
    chosen: Tensor = given.to(torch.int64).expand(rows)
    return chosen


def _weights(bank: Bank, name: str, given: Any, rows: int, device: torch.device) -> Tensor:
    weights = given if isinstance(given, Tensor) else torch.tensor(given, device=device)
    slots, shape = bank.size, weights.shape
    if not weights.is_floating_point() or shape[-1:] != (slots,) or shape[:-1] not in ((), (1,), (rows,)):
        message = f"{name} is {str(weights.dtype).removeprefix('torch.')}{list(shape)}"
        raise GraftError("GC038", message, hint=f"pass a weight for each of the {rows} rows and {slots} slots")
    return weights.expand(rows, slots)


def slot_names(compilation: Compilation, bank: CompositionSpec) -> list[str]:
    """Return the names of a bank's adaptations in slot order; empty for an empty slot."""
    slots = Slots.of(bank, compilation.store)
    return list(bank.members) if slots is None else [name or "" for name in slots.names]


def slot_of(compilation: Compilation, bank: CompositionSpec, choice: str | int) -> int:
    """Return the index of a slot.

    Args:
        compilation: the Compilation that has the bank.
        bank: the bank.
        choice: the index or the name of one of its slots.

    Raises:
        GraftError: GC038 if the bank has no such slot.
    """
    if (slots := Slots.of(bank, compilation.store)) is not None:
        return slots.number(choice)
    members = slot_names(compilation, bank)
    if isinstance(choice, int) and not isinstance(choice, bool) and 0 <= choice < len(members):
        return choice
    if choice in members:
        return members.index(str(choice))
    close = nearest(choice, members) if isinstance(choice, str) else []
    hint = f"did you mean {close[0]!r}?" if close else f"the slots are: {', '.join(members)}"
    raise GraftError("GC038", f"{bank.name!r} has no slot {choice!r}", hint=hint)


_slot_now = torch.compiler.disable(  # type: ignore[no-untyped-call]
    slot_of, reason="the slot of a name may change: pass numbers, with compiled.bank().use(name, ...) as rows"
)
