"""Where an aLoRA begins in each row of a call: as the call says, as its tokens say, or as its cache says.

Positions count from a row's first token, including padding and the tokens in a cache; -1 stands for a row that is not
adapted. A graph counts from the call's own first token instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from graftc.compiler.capture.fixed_cache import is_fixed, seen_of, state_of
from graftc.compiler.capture.isolation import is_traced
from graftc.compiler.capture.past import CACHE, Past, kinds_of, tensors_of
from graftc.compiler.compilation import Compilation
from graftc.passes.core.build.invocation import last_start
from graftc.passes.core.ir.cleaning import on_device
from graftc.passes.core.ir.past_inputs import SEEN
from graftc.specs.base import Invoked
from graftc.specs.errors.diagnostics import GraftError, warn
from graftc.specs.errors.text import counted, some

_STARTS = "_graftc_starts"
"""The attribute of a cache with the positions of its rows, and a tensor that identifies its contents."""

State = tuple[Tensor | None, tuple[float, ...]]
"""A tensor that a cache replaces when it changes, and numbers that change when something writes into its tensors."""

_PASS = "pass {}: the position of each row's first adapted token, or -1"


def starts_in_call(
    spec: Invoked, name: str, present: Mapping[str, Any], given: Any, *, adapted: bool
) -> dict[str, Tensor]:
    """Return the input that tells a graph where an aLoRA begins; empty if the graph finds that out from the tokens.

    Args:
        spec: the aLoRA.
        name: the input's name.
        present: the tensors of the call, by name, with the cache as it has been read.
        given: the positions as the caller passed them; None if the tokens and the cache decide.
        adapted: whether the aLoRA is used at all.

    Raises:
        GraftError: GC038 for positions that are not one integer for each row, or for a call without a text; GC140 if
            the invocation may be among the tokens in the cache.
    """
    past: Past | None = present.get(CACHE)
    text = present.get("input_ids", present.get("inputs_embeds"))
    if past is None and (given is None or not adapted):
        return {}
    if not isinstance(text, Tensor):
        raise GraftError("GC038", f"the call has no text in which {name} could be a position", hint="pass input_ids")
    rows, length = text.shape[0], _length(past)
    if not adapted:
        return {name: torch.full((rows,), -1, device=text.device)}
    if given is not None:
        start = positions_of(name, given, rows, text.device)
    elif text.is_floating_point():
        message = f"the call has token embeddings, in which the invocation of {spec.name!r} cannot be found"
        raise GraftError("GC140", message, hint=_PASS.format(name))
    else:
        assert past is not None
        found = starts_in(spec, text)
        start = torch.where(found < 0, _in_cache(spec, name, past, found), found + length)
    return {name: torch.where(start < 0, -1, (start - length).clamp(min=0))}


def starts_in(spec: Invoked, ids: Tensor) -> Tensor:
    """Return the position at which the invocation's last occurrence begins in each row, or -1: ``int64[rows]``."""

    def run(operator: Any, *args: Any) -> Any:
        placed, options = on_device(operator, args, {}, ids.device)
        return operator(*placed, **options)

    return last_start(run, ids, spec.invocation)  # type: ignore[no-any-return]


def _in_cache(spec: Invoked, name: str, past: Past, found: Tensor) -> Tensor:
    """Return the positions among the tokens in a cache; those of rows that ``found`` has in the call do not matter.

    Raises:
        GraftError: GC140 if they are not known.
    """
    recorded: tuple[State, Mapping[str, Tensor]] = getattr(past.cache, _STARTS, ((None, ()), {}))
    (first, writes), starts = recorded
    first_now, writes_now = _state_of(past.cache)
    if name in starts and first is first_now and writes == writes_now:
        return starts[name]
    if _has_tokens(past) and (is_traced() or bool((found < 0).any())):
        rows = [] if is_traced() else [str(row) for row, start in enumerate(found.tolist()) if start < 0]
        message = f"whether the invocation of {spec.name!r} is among the tokens in the cache is not known"
        message += f" for rows {some(rows, 3)}" if rows else ""
        raise GraftError("GC140", message, hint=_PASS.format(name))
    return torch.full_like(found, -1)


def _state_of(cache: Any) -> State:
    """Return what tells one state of a cache from another."""
    own = kinds_of(cache)["past"]
    first = next(iter(tensors_of(cache).values()), None)
    return first, state_of(own) if first is not None and is_fixed(own) else ()


def _length(past: Past | None) -> int | Tensor:
    """Return the number of tokens in a call's cache; for one of fixed length, its own count, ``int64[]``."""
    if past is None or past.capacity is None:
        return 0 if past is None else past.length
    return past.tensors[SEEN]


def _has_tokens(past: Past) -> bool:
    """Return whether there are, or may be, tokens in a call's cache."""
    return bool(past.length) if past.capacity is None else is_traced() or bool(past.tensors[SEEN])


def remember_starts(compilation: Compilation, present: Mapping[str, Any]) -> None:
    """Record in a call's cache where aLoRAs begin, for calls that continue it.

    The recorded position is not used if anything else has written to the cache, even in place.
    """
    past = present.get(CACHE)
    inputs = [name for name, control in compilation.controls.items() if isinstance(control, Invoked)]
    if not isinstance(past, Past) or not inputs or is_traced():
        return
    text = present.get("input_ids", present.get("inputs_embeds"))
    length: int | Tensor = past.length
    if past.capacity is not None and text is not None:
        # The cache counts the call's tokens by now, in a new tensor if gradients flow.
        length = seen_of(kinds_of(past.cache)["past"]) - text.shape[1]
    starts = {name: torch.where(present[name] < 0, -1, present[name] + length) for name in inputs}
    setattr(past.cache, _STARTS, (_state_of(past.cache), starts))


def positions_of(name: str, given: Any, rows: int, device: torch.device) -> Tensor:
    """Return positions as the caller passed them, expanded to one for each row: ``int64[rows]``.

    Raises:
        GraftError: GC038 for anything else than one integer for each row, or for all of them, and for values below -1.
    """
    if not isinstance(given, Tensor):
        listed = [given] if isinstance(given, int) else list(given)
        if not all(isinstance(item, int) and not isinstance(item, bool) for item in listed):
            raise GraftError("GC038", f"{name} is {listed!r:.80}", hint="pass one integer for each row, or -1")
        given = torch.tensor(listed, dtype=torch.int64, device=device)
    if given.dim() != 1 or given.is_floating_point() or given.dtype == torch.bool or given.shape[0] not in (1, rows):
        message = f"{name} is {str(given.dtype).removeprefix('torch.')}{list(given.shape)}"
        raise GraftError("GC038", message, hint=f"pass one integer for each of the {rows} rows, or -1")
    if not is_traced() and given.device.type == "cpu" and bool((given < -1).any()):
        message = f"{name} contains {int(given.min())}, which is not a position"
        raise GraftError("GC038", message, hint="pass -1 for a row that is not adapted")
    positions: Tensor = given.to(torch.int64).expand(rows)
    return positions


def starts_in_prompt(compilation: Compilation, prompt: Tensor) -> dict[str, Tensor]:
    """Return where aLoRAs begin in the token ids ``[rows, length]`` of a prompt; empty for token embeddings."""
    if prompt.is_floating_point() or prompt.dim() != 2:
        return {}
    aloras = {name: control for name, control in compilation.controls.items() if isinstance(control, Invoked)}
    return {name: starts_in(control, prompt) for name, control in aloras.items()}


def warn_of_invocations(compilation: Compilation, present: Mapping[str, Any]) -> None:
    """Warn (GC125) if no row of a call has an invocation, or if one that is a single token occurs repeatedly."""
    ids = present.get("input_ids")
    if not isinstance(ids, Tensor) or ids.device.type == "meta" or CACHE in present:
        return
    for name, control in compilation.controls.items():
        if not isinstance(control, Invoked) or name in present:
            continue
        often = (ids == control.invocation[0]).sum(1) > 1
        if bool((starts_in(control, ids) < 0).all()):
            message = f"none of the {counted(len(ids), 'row')} of the call has the invocation of {control.name!r}"
            warn("GC125", message, hint="add it to each prompt, with ids from the model's own tokenizer")
        elif len(control.invocation) == 1 and bool(often.any()):
            rows = counted(int(often.sum()), "row")
            message = f"the invocation of {control.name!r} is one token, which {rows} of the call contain several times"
            warn("GC125", message, hint="only the last one counts: use a longer invocation, or another token")
