"""Plan memory before training: the peak of a step, and the sizes that fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from graftc.applications.planner.optimisers import Make
from graftc.applications.planner.sizes import bytes_of
from graftc.applications.planner.workbench import TOKENS, Training, Workbench
from graftc.compiler.capture.interface import ExampleInputs
from graftc.compiler.capture.source_model import require_plain
from graftc.passes.core import progress
from graftc.records.applications.memory import MemoryPlan
from graftc.runtime.api import SpecLike, spec_for
from graftc.runtime.sources.models import load_model_and_inputs
from graftc.runtime.swapped_arguments import check_spec_and_model
from graftc.specs.document import Spec
from graftc.specs.errors.calls import public
from graftc.specs.errors.diagnostics import GraftError, correction
from graftc.specs.errors.text import size_text
from graftc.specs.io import early_spec

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
"""The dtypes that a base may have, by name."""

_MOST = 2**40
"""The maximum number of tokens in a batch; beyond it, tensor sizes overflow."""

_SHORT = {"fp32": "float32", "f32": "float32", "bf16": "bfloat16", "fp16": "float16", "f16": "float16"}


@public("graftc.plan")
def plan(
    spec: SpecLike,
    model: nn.Module | str,
    example_inputs: ExampleInputs | None = None,
    *,
    batch: int = 1,
    sequence: int | None = None,
    dtype: str | torch.dtype | None = None,
    checkpoint: bool | Literal["layers"] | None = None,
    optimizer: str | Make | None = None,
    devices: int = 1,
    device: str = "cuda",
    accumulate: bool = False,
    budget: int | str | None = None,
    cache: bool = True,
) -> MemoryPlan:
    """Return the peak memory that training will take on each device.

    One training step and one optimiser step are run on tensors without memory, with the spec's recomputation,
    checkpointing and chunked loss. The model may be on the meta device.

    Args:
        spec: as for `graftc.compile`.
        model: a module, or a model name in any form that the command line accepts, from which a module without weights
            is created.
        example_inputs: as for `graftc.compile`.
        batch: the number of rows on each device.
        sequence: the number of tokens in each row; required by models that take sequences.
        dtype: the dtype of the base, for example ``"bfloat16"``; by default its own.
        checkpoint: whether layers are recomputed in the backward pass; by default as in the spec.
        optimizer: ``adamw``, ``sgd``, ``sgd-momentum``, ``adafactor``, ``adamw8bit``, ``aged-adamw`` or ``sm3``, or a
            function that creates an optimiser from a list of parameters; by default ``adamw``, or for SpIEL the
            optimiser of its variant. For ``adamw8bit``, the sizes of bitsandbytes' state are assumed, and bitsandbytes
            is not run.
        devices: the number of devices that share parameters, gradients and optimiser state by FSDP2, with a unit for
            each layer and one for the rest.
        device: the device type: ``cpu``, or an accelerator, on which torch's optimisers process all tensors at once and
            a chunked loss has larger chunks.
        accumulate: whether gradients from other micro-batches already exist.
        budget: the memory of each device in bytes, or for example ``"24GB"``; if given, the largest batch and sequence
            that fit are searched for.
        cache: whether to keep captured graphs in the user's cache folder.

    Raises:
        GraftError: as for `graftc.compile`; GC073 for arguments of the wrong type, or if nothing trains; GC091 for an
            unknown optimizer, GC130 for a method that cannot be sharded, GC143 for sequences that are too long, GC154
            for a budget that is not a number of bytes, GC155 if not even the smallest step fits.
    """
    check_spec_and_model("graftc.plan", spec, model)
    room = None if budget is None else bytes_of(budget)
    rows, tokens = _count("batch", batch), None if sequence is None else _count("sequence", sequence)
    if rows * (tokens or 1) > _MOST:
        message = f"a batch of {rows} x {tokens} tokens is too large"
        raise GraftError("GC073", message, hint=f"plan for at most {_MOST:,} tokens")
    _known_device(device)
    with progress.working("planning", model if isinstance(model, str) else type(model).__name__):
        bench = workbench(
            spec,
            model,
            example_inputs,
            dtype=dtype,
            checkpoint=checkpoint,
            cache=cache,
            optimizer=optimizer,
            devices=devices,
            device=device,
            accumulate=accumulate,
        )
        result = bench.plan(rows, tokens)
        return result if room is None else fitted(bench, result, room)


def workbench(
    spec: SpecLike,
    model: nn.Module | str,
    example_inputs: ExampleInputs | None = None,
    *,
    dtype: str | torch.dtype | None = None,
    checkpoint: bool | Literal["layers"] | None = None,
    cache: bool = True,
    **training: Any,
) -> Workbench:
    """Build the workbench that plans steps; the arguments are as for `plan`."""
    early = early_spec(Path(spec)) if isinstance(spec, str | Path) else spec
    if isinstance(model, str):
        module, given = load_model_and_inputs(model, meta=True)
        model, example_inputs = module, given if example_inputs is None else example_inputs
    loaded = spec_for(early, model, example_inputs)
    require_plain(model)
    options = Training(**{**training, "devices": _count("devices", training.get("devices", 1))})
    spec = checkpointed(loaded, checkpoint)
    return Workbench(spec, model, example_inputs, options, dtype=_dtype(dtype), cache=cache)


def checkpointed(spec: Spec, checkpoint: bool | Literal["layers"] | None) -> Spec:
    """Return the spec with checkpointing switched on or off, or unchanged if ``checkpoint`` is None."""
    if checkpoint is None:
        return spec
    if checkpoint not in (True, False, "layers"):
        raise GraftError("GC073", f"checkpoint is {checkpoint!r}", hint="use True to recompute layers, or False")
    return spec.model_copy(update={"checkpoint": "layers" if checkpoint else None})


def fitted(bench: Workbench, plan: MemoryPlan, room: int) -> MemoryPlan:
    """Return the plan, extended by the largest sizes that fit.

    Raises:
        GraftError: GC155 if not even one row of the shortest sequences fits.
    """
    fitting = bench.fitted(plan, room)
    if not fitting.largest_batch and not fitting.largest_sequence:
        smallest = bench.plan(1, min(plan.sequence or TOKENS, TOKENS))
        if smallest.peak > room:
            raise _nothing_fits(smallest, room)
    return fitting


def _nothing_fits(smallest: MemoryPlan, room: int) -> GraftError:
    tokens = "" if smallest.sequence is None else f" of {smallest.sequence} tokens"
    message = f"one row{tokens} takes {size_text(smallest.peak)}, but only {size_text(room)} are available"
    parts = {
        "what stays": smallest.resident,
        "activations": smallest.step,
        "gradients and the optimizer's step": smallest.gradients + smallest.update,
    }
    ways = []
    if not smallest.checkpoint:
        ways.append("set checkpoint: layers")
    if smallest.devices == 1 and smallest.resident > room // 2:
        ways.append("share the model among devices")
    hint = f"the smallest step takes {size_text(smallest.peak)}" + (f"; {' or '.join(ways)}" if ways else "")
    details = [f"{name}: {size_text(size)}" for name, size in parts.items()]
    return GraftError("GC155", message, hint=hint, details=details)


def _dtype(given: Any) -> torch.dtype | None:
    if given is None or given in DTYPES.values():
        return given  # type: ignore[no-any-return]
    name = _SHORT.get(str(given), str(given).removeprefix("torch."))
    if name not in DTYPES:
        hint, _ = correction(name, [*DTYPES, *_SHORT], f"the dtypes are: {', '.join(DTYPES)}")
        raise GraftError("GC073", f"dtype is {given!r}", hint=hint)
    return DTYPES[name]


def _known_device(given: Any) -> None:
    try:
        torch.device(given)
    except (RuntimeError, TypeError) as error:
        raise GraftError("GC073", f"device is {given!r}", hint="use cuda, cpu or another torch device type") from error


def _count(name: str, given: Any) -> int:
    if isinstance(given, bool) or not isinstance(given, int) or given < 1:
        raise GraftError("GC073", f"{name} is {given!r}", hint="use a positive integer")
    return given
